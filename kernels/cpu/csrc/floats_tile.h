// A tile of the product of float rows with float weights: every sum goes through its columns in order, so that how many
// rows share a tile does not change a bit.
#pragma once
#include "packed.h"
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

// weight [columns][32], panel [columns][R] -> out [R][32]
template <class T, int R>
void floats_tile(const uint8_t* weight, const char* panel, int64_t columns, float* out) {
  for (int64_t part = 0; part < TILE_FLOATS; part += 2 * W) {
    const T* w = reinterpret_cast<const T*>(weight) + part;
    const float* x = reinterpret_cast<const float*>(panel);
    Vec left[R], right[R];
    for (int r = 0; r < R; ++r) left[r] = right[r] = set(0.0f);
    for (int64_t k = 0; k < columns; ++k, w += TILE_FLOATS, x += R) {
      const Vec a = load(w), b = load(w + W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec factor = set(x[r]);
        left[r] = fma(a, factor, left[r]);
        right[r] = fma(b, factor, right[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      store(out + r * TILE_FLOATS + part, left[r]);
      store(out + r * TILE_FLOATS + part + W, right[r]);
    }
  }
}

using FloatsTile = void (*)(const uint8_t*, const char*, int64_t, float*);

constexpr int FLOATS_ROWS = W == 16 ? 12 : TILE_ROWS == 4 ? 6 : 2;
ELISION_INLINE int floats_rows(int64_t rows) {
  if (rows >= FLOATS_ROWS) return FLOATS_ROWS;
  return static_cast<int>(rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 ? 8 : 12);
}

template <class T>
FloatsTile floats_tile_of(int rows) {
  if constexpr (FLOATS_ROWS >= 12) {
    if (rows == 12) return floats_tile<T, 12>;
    if (rows == 8) return floats_tile<T, 8>;
  }
  if constexpr (FLOATS_ROWS >= 6) {
    if (rows == 6) return floats_tile<T, 6>;
    if (rows == 4) return floats_tile<T, 4>;
    if (rows == 3) return floats_tile<T, 3>;
  }
  return rows == 2 ? floats_tile<T, 2> : floats_tile<T, 1>;
}

}  // namespace ELISION_VARIANT
}  // namespace elision
