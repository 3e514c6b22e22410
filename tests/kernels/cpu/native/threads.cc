// Many callers at once, each with threads of its own: the results are those of one caller on one thread.
#include <dirent.h>
#include <sys/wait.h>

#include <atomic>
#include <thread>
#include <vector>

#include "check.h"

namespace {

constexpr int64_t BATCH = 2, COUNT = 211, WIDTH = 24, GONE = 60, LEFT = COUNT - GONE;

// A matching, a merge, an attention over what is left, and back.
struct Chain {
  Guarded<float> x{BATCH * COUNT * WIDTH}, y{BATCH * LEFT * WIDTH}, size{BATCH * LEFT}, out{BATCH * LEFT * WIDTH};
  Guarded<float> full{BATCH * COUNT * WIDTH};
  Guarded<int32_t> slot{BATCH * COUNT}, keep{BATCH * LEFT}, source{BATCH * GONE};

  explicit Chain(int threads) {
    Random random(7);
    for (int64_t i = 0; i < x.count(); ++i) x[i] = number(random);
    Call call(threads);
    elision_match_args match{};
    match.metric = x.data(), match.slot = slot.data(), match.keep = keep.data(), match.source = source.data();
    match.batch = BATCH, match.count = COUNT, match.width = WIDTH, match.gone = match.r = GONE;
    match.denominator = 1, match.dtype = ELISION_F32, match.published = 1;
    CHECK(call(elision_match, match) == 0);
    elision_merge_args merge{};
    merge.x = x.data(), merge.y = y.data(), merge.new_size = size.data();
    merge.slot = slot.data(), merge.keep = keep.data(), merge.source = source.data();
    merge.batch = merge.x_batch = merge.map_batch = BATCH, merge.count = COUNT, merge.left = LEFT, merge.gone = GONE;
    merge.layout = {1, 1, WIDTH, 0}, merge.dtype = ELISION_F32;
    CHECK(call(elision_merge, merge) == 0);
    elision_attention_args attention{};
    attention.q = attention.k = attention.v = y.data(), attention.out = out.data(), attention.size = size.data();
    attention.batch = attention.size_batch = BATCH, attention.heads = attention.kv_heads = 3, attention.batch_per_size = 1;
    attention.queries = attention.keys = LEFT, attention.width = attention.value_width = WIDTH / 3;
    for (int64_t* stride : {attention.q_stride, attention.k_stride, attention.v_stride, attention.out_stride})
      stride[0] = LEFT * WIDTH, stride[1] = WIDTH / 3, stride[2] = WIDTH;
    attention.scale = 0.35f, attention.dtype = ELISION_F32;
    CHECK(call(elision_attention, attention) == 0);
    elision_restore_args restore{};
    restore.y = out.data(), restore.x = full.data(), restore.slot = slot.data();
    restore.batch = restore.y_batch = restore.map_batch = BATCH, restore.count = COUNT, restore.left = LEFT;
    restore.layout = {1, 1, WIDTH, 0}, restore.itemsize = 4;
    CHECK(call(elision_restore, restore) == 0);
  }
  bool equals(const Chain& other) const {
    return slot.equals(other.slot) && keep.equals(other.keep) && source.equals(other.source) && y.equals(other.y) &&
           size.equals(other.size) && out.equals(other.out) && full.equals(other.full);
  }
};

int threads_of_process() {
  DIR* tasks = opendir("/proc/self/task");
  CHECK(tasks != nullptr);
  int count = -2;  // "." and ".."
  while (readdir(tasks) != nullptr) ++count;
  closedir(tasks);
  return count;
}

}  // namespace

void test_threads() {
  const Chain expected(1);
  for (const int threads : {-3, 0, 2, 5, 1, 3}) CHECK(Chain(threads).equals(expected));
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&expected, caller] {
      for (int i = 0; i < 20; ++i) CHECK(Chain(1 + (caller + i) % 4).equals(expected));
    });
  for (std::thread& caller : callers) caller.join();
}

// While another thread is at work, and may hold any lock.
void test_fork() {
  const Chain expected(3);
  std::atomic<bool> enough{false};
  std::thread other([&] {
    while (!enough) CHECK(Chain(3).equals(expected));
  });
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      alarm(60);  // a child that waits for its parent's threads would wait for ever
      const int alone = threads_of_process();
      const bool right = Chain(3).equals(expected);
      _exit(right && alone == 1 && threads_of_process() == 3 ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(Chain(3).equals(expected));
  }
  enough = true;
  other.join();
}
