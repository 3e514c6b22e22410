// What the native tests share: a check, buffers between pages that nobody may touch, random numbers, calls.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <random>

#include "elision.h"

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
      abort();                                                                  \
    }                                                                           \
  } while (0)

using Random = std::mt19937_64;
inline int64_t between(Random& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}
template <size_t N>
int64_t one_of(Random& random, const int64_t (&values)[N]) {
  return values[random() % N];
}
inline float number(Random& random) { return static_cast<float>(between(random, -1000, 1000)) / 500.0f; }

// `count` elements that end where a forbidden page begins, as long as needed: a read or a write behind them is a
// fault in every build. What stands before them is checked in the end.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = sizeof(T) * static_cast<size_t>(count);
    room_ = (bytes + page) / page * page;
    start_ = static_cast<unsigned char*>(
        mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(start_ != MAP_FAILED);
    CHECK(mprotect(start_ + room_, page, PROT_NONE) == 0);
    memset(start_, CANARY, room_);
    data_ = reinterpret_cast<T*>(start_ + room_ - bytes);
  }
  ~Guarded() {
    for (unsigned char* at = start_; at < reinterpret_cast<unsigned char*>(data_); ++at) CHECK(*at == CANARY);
    munmap(start_, room_ + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() const { return data_; }
  T* given() const { return count_ == 0 ? nullptr : data_; }  // as hosts hand over what has no elements
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t count() const { return count_; }
  size_t bytes() const { return sizeof(T) * static_cast<size_t>(count_); }
  bool equals(const Guarded& other) const { return memcmp(data_, other.data_, bytes()) == 0; }

 private:
  static constexpr unsigned char CANARY = 0xa5;
  unsigned char* start_;
  size_t room_;
  T* data_;
  int64_t count_;
};

inline int64_t bytes_of(int32_t dtype) { return dtype == ELISION_F32 ? 4 : dtype == ELISION_BOOL ? 1 : 2; }

// Values of any of the float types, small and exact in all of them.
inline void fill(Random& random, unsigned char* at, int64_t count, int32_t dtype) {
  static const uint16_t halves[] = {0x0000, 0x3c00, 0xbc00, 0x3800, 0x4000, 0x3400}, brains[] = {0,      0x3f80, 0xbf80,
                                                                                               0x3f00, 0x4000, 0x3e80};
  for (int64_t i = 0; i < count; ++i) {
    const float wide = number(random);
    const size_t pick = random() % 6;
    if (dtype == ELISION_F32) memcpy(at + 4 * i, &wide, 4);
    if (dtype == ELISION_F16) memcpy(at + 2 * i, &halves[pick], 2);
    if (dtype == ELISION_BF16) memcpy(at + 2 * i, &brains[pick], 2);
    if (dtype == ELISION_BOOL) at[i] = pick > 1;
  }
}

// The last call's sentence, and the threads it may use.
struct Call {
  elision_runner runner;
  char error[256] = "";
  explicit Call(int threads = 1) { elision_own_threads(threads, &runner); }

  template <class Args>
  int operator()(int (*function)(const Args*, const elision_runner*, char*, size_t), const Args& args) {
    error[0] = 0;
    return function(&args, &runner, error, sizeof error);
  }
  // Is it refused, with this in the sentence?
  template <class Args>
  bool refuses(int (*function)(const Args*, const elision_runner*, char*, size_t), const Args& args, const char* part) {
    const bool right = (*this)(function, args) == 1 && strstr(error, part) != nullptr;
    if (!right) fprintf(stderr, "expected '%s', got '%s'\n", part, error);
    return right;
  }
};

void test_match();
void test_mean();
void test_merge();
void test_restore();
void test_attention();
void test_linear();
void test_threads();
void test_fork();
