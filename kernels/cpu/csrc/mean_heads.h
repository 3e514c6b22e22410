// mean_heads: one key per token, the mean over the heads. Floor: k is read once.
#pragma once
#include "common.h"
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int64_t MEAN_CHUNK = 64;  // tokens a task takes

template <class T>
struct Mean {
  const elision_mean_args& args;
  int64_t chunks;

  void tokens(int64_t sample, int64_t first) const {
    const int64_t heads = args.heads, width = args.width, until = smaller(args.tokens, first + MEAN_CHUNK);
    const Vec count = set(static_cast<float>(heads));
    for (int64_t token = first; token < until; ++token) {
      const T* k = static_cast<const T*>(args.k) + sample * args.k_stride[0] + token * args.k_stride[2];
      T* out = static_cast<T*>(args.metric) + (sample * args.tokens + token) * width;
      for (int64_t c = 0; c < width; c += W) {
        const int64_t n = smaller<int64_t>(W, width - c);
        Vec total = set(0.0f);
        for (int64_t h = 0; h < heads; ++h) {
          const T* at = k + h * args.k_stride[1] + c;
          total = add(total, n == W ? load(at) : load(at, n));
        }
        if (n == W)
          store(out + c, divide(total, count));
        else
          store(out + c, divide(total, count), n);
      }
    }
  }
};

template <class T>
int mean_of(const elision_mean_args& args, const elision_runner& runner) {
  Mean<T> mean{args, (args.tokens + MEAN_CHUNK - 1) / MEAN_CHUNK};
  const auto task = [](void* self, size_t i) {
    const Mean<T>& m = *static_cast<Mean<T>*>(self);
    m.tokens(static_cast<int64_t>(i) / m.chunks, static_cast<int64_t>(i) % m.chunks * MEAN_CHUNK);
  };
  runner.run(runner.self, task, &mean, static_cast<size_t>(args.batch * mean.chunks));
  return 0;
}

inline int mean(const elision_mean_args& args, const elision_runner& runner, char*, size_t) {
  if (args.dtype == ELISION_F16) return mean_of<f16>(args, runner);
  if (args.dtype == ELISION_BF16) return mean_of<bf16>(args, runner);
  return mean_of<float>(args, runner);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
