// The inner product of everything here: a few rows times two vectors of columns.
#pragma once
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int TILE_COLUMNS = 2 * W;

// How operands of a storage type are multiplied: as floats, or, where the processor can, as pairs of bf16 whose two
// products are added to a float.
template <class T>
struct Multiplied {
  using Element = float;
  static constexpr int64_t STEP = 1;  // numbers in an element
};
ELISION_INLINE Vec load_elements(const float* p) { return load(p); }
ELISION_INLINE Vec splat(float x) { return set(x); }
ELISION_INLINE Vec accumulate(Vec x, Vec column, Vec acc) { return fma(x, column, acc); }

#if defined(__AVX512BF16__)
struct Pair {
  uint32_t bits;
};
struct Pairs {
  __m512bh v;
};
template <>
struct Multiplied<bf16> {
  using Element = Pair;
  static constexpr int64_t STEP = 2;
};
ELISION_INLINE Pairs load_elements(const Pair* p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
ELISION_INLINE Pairs splat(Pair x) {
  return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x.bits)))};
}
ELISION_INLINE Vec accumulate(Pairs x, Pairs column, Vec acc) { return {_mm512_dpbf16_ps(acc.v, x.v, column.v)}; }
#endif

// acc[i] += sum over k of a[i * a_stride + k] * b[k * b_stride + column] for COLUMNS vectors of columns, k ascending:
// the result of a row and a column is the same to the bit whichever tile it stands in, so that equal tokens score
// equally. Strides and depth count elements.
template <class E, int ROWS, int COLUMNS>
ELISION_INLINE void dot_tile(const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t depth,
                             Vec (&acc)[ROWS][COLUMNS]) {
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_elements(b)) column[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) column[j] = load_elements(b + k * b_stride + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const auto x = splat(a[i * a_stride + k]);
      for (int j = 0; j < COLUMNS; ++j) acc[i][j] = accumulate(x, column[j], acc[i][j]);
    }
  }
}

// Calls body.template tile<n>(row) until `rows` rows are done, with as large an n as fits.
template <class Body>
ELISION_INLINE void for_row_tiles(int64_t rows, Body& body) {
  int64_t row = 0;
  for (; row + TILE_ROWS <= rows; row += TILE_ROWS) body.template tile<TILE_ROWS>(row);
  if (TILE_ROWS > 8)
    for (; row + 8 <= rows; row += 8) body.template tile<8>(row);
  if (TILE_ROWS > 4)
    for (; row + 4 <= rows; row += 4) body.template tile<4>(row);
  if (TILE_ROWS > 2)
    for (; row + 2 <= rows; row += 2) body.template tile<2>(row);
  for (; row < rows; ++row) body.template tile<1>(row);
}

// Rows as columns: out[column / TILE_COLUMNS][k][column % TILE_COLUMNS], what is left over zero. prepare(row, line)
// writes a row as `depth` elements.
template <class E, class Prepare>
ELISION_INLINE void pack_columns(int64_t rows, int64_t depth, E* out, E* line, const Prepare& prepare) {
  for (int64_t first = 0; first < rows; first += TILE_COLUMNS) {
    E* panel = out + first * depth;
    const int64_t here = smaller<int64_t>(TILE_COLUMNS, rows - first);
    if (here < TILE_COLUMNS) memset(panel, 0, sizeof(E) * static_cast<size_t>(depth * TILE_COLUMNS));
    for (int64_t j = 0; j < here; ++j) {
      prepare(first + j, line);
      for (int64_t k = 0; k < depth; ++k) panel[k * TILE_COLUMNS + j] = line[k];
    }
  }
}

ELISION_INLINE int64_t padded_columns(int64_t n) { return (n + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

}  // namespace ELISION_VARIANT
}  // namespace elision
