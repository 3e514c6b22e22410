// rms_norm and add_rms_norm: a row is summed in one order whatever stands around it. Bound by memory: two rows of floats
// a row, four with the addition.
#pragma once
#include "common.h"
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int64_t NORM_ELEMENTS = 8192;  // elements a task takes, about: a step of one row is worth no second thread

// The sum of squares of x, or of x + residual, which goes to `total`.
template <bool ADDS>
ELISION_INLINE float squares(const float* x, const float* residual, float* total, int64_t width) {
  Vec sums[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  const auto take = [&](int64_t i, Vec& sum, int64_t n) {
    Vec v = n == W ? load(x + i) : load(x + i, n);
    if (ADDS) {
      v = add(v, n == W ? load(residual + i) : load(residual + i, n));
      n == W ? store(total + i, v) : store(total + i, v, n);
    }
    sum = fma(v, v, sum);
  };
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
    for (int part = 0; part < 4; ++part) take(i + part * W, sums[part], W);
  for (; i + W <= width; i += W) take(i, sums[0], W);
  if (i < width) take(i, sums[0], width - i);
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

struct Norm {
  const elision_norm_args& args;
  int64_t rows;  // of a task

  void row(int64_t r) const {
    const int64_t width = args.width;
    const float* x = args.x + r * width;
    float* out = args.out + r * width;
    float* total = args.total == nullptr ? nullptr : args.total + r * width;
    const float found = total == nullptr ? squares<false>(x, nullptr, nullptr, width)
                                         : squares<true>(x, args.residual + r * width, total, width);
    const Vec factor = set(1.0f / __builtin_sqrtf(found / static_cast<float>(width) + args.eps));
    if (total != nullptr) x = total;
    int64_t i = 0;
    for (; i + W <= width; i += W) store(out + i, mul(mul(load(x + i), factor), load(args.weight + i)));
    const int64_t n = width - i;
    if (n > 0) store(out + i, mul(mul(load(x + i, n), factor), load(args.weight + i, n)), n);
  }

  void task(int64_t index) const {
    const int64_t last = smaller(args.rows, (index + 1) * rows);
    for (int64_t r = index * rows; r < last; ++r) row(r);
  }
};

inline int norm(const elision_norm_args& args, const elision_runner& runner, char*, size_t) {
  Norm whole{args, larger<int64_t>(1, NORM_ELEMENTS / args.width)};
  const size_t count = static_cast<size_t>((args.rows + whole.rows - 1) / whole.rows);
  const auto one = [](void* self, size_t i) { static_cast<const Norm*>(self)->task(static_cast<int64_t>(i)); };
  runner.run(runner.self, one, &whole, count);
  return 0;
}

}  // namespace ELISION_VARIANT
}  // namespace elision
