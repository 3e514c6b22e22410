// Threads for hosts whose calls bring none (torch by way of ctypes).
//
// Torch's threads are those of its OpenMP library: idle ones still turn for a while behind its own loops, so that others
// would fight them for the cores, and they begin within a microsecond. Where the host hands us that library's way in, our
// tasks run on them. Elsewhere one pool of our own serves the process. A caller that finds it busy does its tasks by itself, so that callers never wait for
// each other; results do not depend on who does a task.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "common.h"

namespace elision {
namespace {

class Pool {
 public:
  void run(int threads, elision_task task, void* data, size_t count) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const size_t helpers = count > 1 && threads > 1 && turn.owns_lock() ? std::min<size_t>(threads - 1, count - 1) : 0;
    if (helpers == 0) {
      for (size_t i = 0; i < count; ++i) task(data, i);
      return;
    }
    grow(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task, data_ = data, count_ = count;
      next_ = 0;
      wanted_ = helpers, busy_ = 0;
      ++round_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // who has not begun by now is not needed
    done_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void work() {
    for (size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) task_(data_, i);
  }

  // A system that gives no more threads leaves us with those we have.
  void grow(size_t helpers) {
    try {
      for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();  // until the process ends
    } catch (const std::system_error&) {
    }
  }

  void serve() {
    size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (wanted_ == 0) continue;
      --wanted_, ++busy_;
      lock.unlock();
      work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  elision_task task_ = nullptr;
  void* data_ = nullptr;
  size_t count_ = 0, round_ = 0, wanted_ = 0, busy_ = 0, started_ = 0;
  std::atomic<size_t> next_{0};
};

// A forked child has none of its parent's threads, and a lock may be held by one that it lacks: it gets a pool of its
// own. Pools are never destroyed, their threads may outlive main.
std::atomic<Pool*> current{nullptr};
std::atomic<elision_parallel> lent{nullptr};
const int hooked = pthread_atfork(nullptr, nullptr, [] {
  current = nullptr;
  lent = nullptr;  // libgomp waits forever for threads that a child does not have
});

Pool& pool() {
  Pool* found = current;
  if (found == nullptr) {
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

struct Job {
  elision_task task;
  void* data;
  size_t count;
  std::atomic<size_t> next;
  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    for (size_t i = job.next.fetch_add(1); i < job.count; i = job.next.fetch_add(1)) job.task(job.data, i);
  }
};

void run_own(void* self, elision_task task, void* data, size_t count) {
  static_cast<void>(hooked);
  const int threads = static_cast<int>(reinterpret_cast<intptr_t>(self));
  const elision_parallel parallel = lent;
  if (parallel != nullptr && threads > 1 && count > 1) {
    Job job{task, data, count, {0}};
    // All of torch's threads, few tasks or many: a smaller team would end the others.
    return parallel(Job::work, &job, static_cast<unsigned>(threads), 0);
  }
  pool().run(threads, task, data, count);
}

}  // namespace
}  // namespace elision

extern "C" void elision_own_threads(int threads, elision_runner* runner) {
  runner->run = elision::run_own;
  runner->self = reinterpret_cast<void*>(static_cast<intptr_t>(threads < 1 ? 1 : threads));
}

extern "C" void elision_borrow_threads(elision_parallel parallel) { elision::lent = parallel; }
