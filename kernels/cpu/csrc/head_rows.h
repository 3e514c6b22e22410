// What is done to a head's row of q or k before attention: RMS norm, then a rotation of its first channels.
#pragma once
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

ELISION_INLINE float sum_of_squares(const float* x, int64_t width) {
  Vec acc = set(0.0f);
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    const Vec v = load(x + i);
    acc = fma(v, v, acc);
  }
  if (i < width) {
    const Vec v = load(x + i, width - i);
    acc = fma(v, v, acc);
  }
  return sum(acc);
}

ELISION_INLINE float inverse_root(float squares, int64_t width, float eps) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);
}

// out = x * by * (weight + offset).
ELISION_INLINE void norm_row(const float* x, float by, const float* weight, float offset, int64_t width, float* out) {
  int64_t i = 0;
  const Vec factor = set(by), more = set(offset);
  for (; i + W <= width; i += W) store(out + i, mul(mul(load(x + i), factor), add(load(weight + i), more)));
  if (i < width) {
    const int64_t n = width - i;
    store(out + i, mul(mul(load(x + i, n), factor), add(load(weight + i, n), more)), n);
  }
}

// The first `turned` channels of x, in place: channel i with channel i + turned / 2.
ELISION_INLINE void turn_halves(float* x, const float* cos, const float* sin, int64_t turned) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = smaller<int64_t>(W, half - i);
    const bool whole = n == W;
    const auto at = [&](const float* p) { return whole ? load(p) : load(p, n); };
    const Vec a = at(x + i), b = at(x + half + i);
    const Vec low = sub(mul(a, at(cos + i)), mul(b, at(sin + i)));
    const Vec high = add(mul(b, at(cos + half + i)), mul(a, at(sin + half + i)));
    if (whole) {
      store(x + i, low), store(x + half + i, high);
    } else {
      store(x + i, low, n), store(x + half + i, high, n);
    }
  }
}

// The same with channel 2i and channel 2i + 1.
ELISION_INLINE void turn_pairs(float* x, const float* cos, const float* sin, int64_t turned) {
  for (int64_t i = 0; i + 1 < turned; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = a * cos[i] - b * sin[i];
    x[i + 1] = b * cos[i + 1] + a * sin[i + 1];
  }
}

}  // namespace ELISION_VARIANT
}  // namespace elision
