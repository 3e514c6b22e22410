// merge_tokens: the mean of every slot's tokens, weighted by size.
//
// Every slot gathers its sources in the order of `source`, so no two tasks write the same place and the sum has one
// order. Floor: x is read once and y written once; the arithmetic hides behind that.
#pragma once
#include "common.h"
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int64_t BYTES_PER_TASK = 1 << 16;

// Offsets of (pre, sample, mid, token) rows in a dense value.
struct Strides {
  int64_t pre, sample, mid, token;
  Strides(const elision_layout& layout, int64_t batch, int64_t tokens, int64_t wanted_batch) {
    const int64_t width = layout.width;
    if (layout.swapped) {
      sample = width, mid = sample * batch, token = mid * layout.mid, pre = token * tokens;
    } else {
      token = width, mid = token * tokens, sample = mid * layout.mid, pre = sample * batch;
    }
    if (batch == 1 && wanted_batch != 1) sample = 0;
  }
};

template <class T>
struct Merge {
  const elision_merge_args& args;
  Trouble trouble;
  Strides from, to;
  int64_t chunk, chunks;     // slots a task takes, tasks per sample
  int32_t *begin, *members;  // per sample: members[begin[j] ... begin[j + 1]] are the sources of slot j

  int64_t map_row(int64_t sample) const { return args.map_batch == 1 ? 0 : sample; }
  float size_of(int64_t sample, int64_t token) const {
    return args.size == nullptr ? 1.0f : args.size[(args.size_batch == 1 ? 0 : sample) * args.count + token];
  }

  // The sources of every slot, and the check that no index leads out of bounds.
  void group(int64_t sample) {
    const int64_t row = map_row(sample), count = args.count, left = args.left, gone = args.gone;
    const int32_t *slot = args.slot + row * count, *keep = args.keep + row * left, *source = args.source + row * gone;
    int32_t* first = begin + sample * (left + 2);
    int32_t* member = members + sample * gone;
    for (int64_t j = 0; j < left + 2; ++j) first[j] = 0;
    for (int64_t j = 0; j < left; ++j)
      if (keep[j] < 0 || keep[j] >= count) return trouble.report(TROUBLE_KEEP);
    for (int64_t i = 0; i < gone; ++i) {
      if (source[i] < 0 || source[i] >= count) return trouble.report(TROUBLE_SOURCE);
      const int32_t goes = slot[source[i]];
      if (goes < -1 || goes >= left) return trouble.report(TROUBLE_SLOT);
      if (goes >= 0 && size_of(sample, source[i]) > 0) ++first[goes + 2];
    }
    for (int64_t j = 2; j < left + 2; ++j) first[j] += first[j - 1];
    for (int64_t i = 0; i < gone; ++i) {
      const int32_t goes = slot[source[i]];
      if (goes >= 0 && size_of(sample, source[i]) > 0) member[first[goes + 1]++] = source[i];
    }
    float* new_size = args.new_size + sample * left;
    for (int64_t j = 0; j < left; ++j) {
      float total = 0;
      for (int32_t i = first[j]; i < first[j + 1]; ++i) total += size_of(sample, member[i]);
      new_size[j] = size_of(sample, keep[j]) + total;
    }
  }

  ELISION_INLINE Vec part(const T* x, int64_t n) const { return n == W ? load(x) : load(x, n); }

  void slots(int64_t sample, int64_t from_slot) {
    const int64_t row = map_row(sample), left = args.left, width = args.layout.width;
    const int32_t *keep = args.keep + row * left, *first = begin + sample * (left + 2);
    const int32_t* member = members + sample * args.gone;
    const int64_t until = smaller(left, from_slot + chunk);
    for (int64_t p = 0; p < args.layout.pre; ++p) {
      for (int64_t m = 0; m < args.layout.mid; ++m) {
        const T* x = static_cast<const T*>(args.x) + p * from.pre + sample * from.sample + m * from.mid;
        T* y = static_cast<T*>(args.y) + p * to.pre + sample * to.sample + m * to.mid;
        for (int64_t j = from_slot; j < until; ++j) {
          const T* own = x + keep[j] * from.token;
          T* out = y + j * to.token;
          if (first[j] == first[j + 1]) {
            memcpy(out, own, sizeof(T) * static_cast<size_t>(width));
            continue;
          }
          const Vec weight = set(size_of(sample, keep[j])), total = set(args.new_size[sample * left + j]);
          for (int64_t c = 0; c < width; c += W) {
            const int64_t n = smaller<int64_t>(W, width - c);
            Vec mean = mul(part(own + c, n), weight);
            for (int32_t i = first[j]; i < first[j + 1]; ++i)
              mean = fma(part(x + member[i] * from.token + c, n), set(size_of(sample, member[i])), mean);
            mean = divide(mean, total);
            if (n == W)
              store(out + c, mean);
            else
              store(out + c, mean, n);
          }
        }
      }
    }
  }

  int run(const elision_runner& runner, char* error, size_t room) {
    const size_t words = static_cast<size_t>(args.batch) * (args.left + 2 + args.gone);
    const Scratch memory(CALL_INDICES, sizeof(int32_t) * words);
    begin = static_cast<int32_t*>(memory.data());
    if (begin == nullptr) return fail(error, room, "merge_tokens: out of memory");
    members = begin + args.batch * (args.left + 2);
    const auto group_one = [](void* self, size_t i) { static_cast<Merge*>(self)->group(static_cast<int64_t>(i)); };
    runner.run(runner.self, group_one, this, static_cast<size_t>(args.batch));
    const int64_t row_bytes =
        args.layout.pre * args.layout.mid * args.layout.width * static_cast<int64_t>(sizeof(T));
    if (trouble.code == 0 && args.left > 0 && row_bytes > 0) {
      chunk = larger<int64_t>(1, smaller<int64_t>(args.left, BYTES_PER_TASK / row_bytes));
      chunks = (args.left + chunk - 1) / chunk;
      const auto task = [](void* self, size_t i) {
        Merge* m = static_cast<Merge*>(self);
        m->slots(static_cast<int64_t>(i) / m->chunks, static_cast<int64_t>(i) % m->chunks * m->chunk);
      };
      runner.run(runner.self, task, this, static_cast<size_t>(args.batch * chunks));
    }
    return explain(trouble, "merge_tokens", error, room);
  }
};

template <class T>
int merge_of(const elision_merge_args& args, const elision_runner& runner, char* error, size_t room) {
  const Strides from(args.layout, args.x_batch, args.count, args.batch);
  const Strides to(args.layout, args.batch, args.left, args.batch);
  Merge<T> merge{args, {}, from, to, 0, 0, nullptr, nullptr};
  return merge.run(runner, error, room);
}

inline int merge(const elision_merge_args& args, const elision_runner& runner, char* error, size_t room) {
  if (args.dtype == ELISION_F16) return merge_of<f16>(args, runner, error, room);
  if (args.dtype == ELISION_BF16) return merge_of<bf16>(args, runner, error, room);
  return merge_of<float>(args, runner, error, room);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
