// gated: fn(x) * y, element by element. Bound by memory for small functions: three rows of floats a row.
#pragma once
#include "common.h"
#include "functions.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int64_t GATED_ELEMENTS = 16384;  // elements a task takes, about

template <int FN>
ELISION_INLINE Vec activated(Vec x) {
  switch (FN) {
    case ELISION_SILU: return mul(x, sigmoid(x));
    case ELISION_GELU: return mul(mul(x, set(0.5f)), add(error_function(mul(x, set(0.70710678118654752f))), set(1.0f)));
    case ELISION_GELU_TANH: {  // (1 + tanh u) / 2 = sigmoid(2 u)
      const Vec cube = mul(mul(x, x), x), u = mul(fma(cube, set(0.044715f), x), set(1.5957691216057308f));
      return mul(x, sigmoid(u));
    }
    case ELISION_QUICK_GELU: return mul(x, sigmoid(mul(x, set(1.702f))));
    case ELISION_RELU: return unless_below(x, set(0.0f), x);
    case ELISION_SIGMOID: return sigmoid(x);
    default: return hyperbolic_tangent(x);
  }
}

template <int FN>
void gated_row(const float* x, const float* y, float* out, int64_t width) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(out + i, mul(activated<FN>(load(x + i)), load(y + i)));
  if (i < width) {
    const int64_t left = width - i;
    store(out + i, mul(activated<FN>(load(x + i, left)), load(y + i, left)), left);
  }
}

struct Gated {
  const elision_gated_args& args;
  int64_t rows, pieces, piece;  // a task takes `rows` rows, or a piece of one row
  void (*row)(const float*, const float*, float*, int64_t);

  void task(int64_t index) const {
    const int64_t first = index / pieces * rows, last = smaller(args.rows, first + rows);
    const int64_t start = index % pieces * piece, width = smaller(piece, args.width - start);
    for (int64_t r = first; r < last && width > 0; ++r)
      row(args.x + r * args.x_stride + start, args.y + r * args.y_stride + start, args.out + r * args.width + start,
          width);
  }
};

inline int gated(const elision_gated_args& args, const elision_runner& runner, char*, size_t) {
  static void (*const functions[])(const float*, const float*, float*, int64_t) = {
      gated_row<ELISION_SILU>, gated_row<ELISION_GELU>,    gated_row<ELISION_GELU_TANH>, gated_row<ELISION_QUICK_GELU>,
      gated_row<ELISION_RELU>, gated_row<ELISION_SIGMOID>, gated_row<ELISION_TANH>};
  Gated whole{args, 0, 1, args.width, functions[args.fn]};
  whole.rows = larger<int64_t>(1, GATED_ELEMENTS / args.width);
  if (args.width > 2 * GATED_ELEMENTS) {
    whole.pieces = (args.width + GATED_ELEMENTS - 1) / GATED_ELEMENTS;
    whole.piece = (args.width + whole.pieces - 1) / whole.pieces;
  }
  const size_t count = static_cast<size_t>((args.rows + whole.rows - 1) / whole.rows * whole.pieces);
  const auto one = [](void* self, size_t i) { static_cast<const Gated*>(self)->task(static_cast<int64_t>(i)); };
  runner.run(runner.self, one, &whole, count);
  return 0;
}

}  // namespace ELISION_VARIANT
}  // namespace elision
