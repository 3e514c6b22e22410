// The inner product of everything here: a few rows times two vectors of columns.
#pragma once
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int TILE_COLUMNS = 2 * W;

// acc[i] += sum over k of a[i * a_stride + k] * b[k * b_stride + column] for COLUMNS vectors of columns, k ascending:
// the result of a row and a column is the same to the bit whichever tile it stands in, so that equal tokens score
// equally.
template <int ROWS, int COLUMNS>
ELISION_INLINE void dot_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                             Vec (&acc)[ROWS][COLUMNS]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) column[j] = load(b + k * b_stride + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = set(a[i * a_stride + k]);
      for (int j = 0; j < COLUMNS; ++j) acc[i][j] = fma(x, column[j], acc[i][j]);
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

// `rows` rows of x as columns: out[column / TILE_COLUMNS][k][column % TILE_COLUMNS], what is left over zero.
// take(row) says where a row begins; `prepare` (row, out) writes it as `depth` floats.
template <class Prepare>
ELISION_INLINE void pack_columns(int64_t rows, int64_t depth, float* out, float* line, const Prepare& prepare) {
  for (int64_t first = 0; first < rows; first += TILE_COLUMNS) {
    float* panel = out + first * depth;
    const int64_t here = smaller<int64_t>(TILE_COLUMNS, rows - first);
    if (here < TILE_COLUMNS) memset(panel, 0, sizeof(float) * static_cast<size_t>(depth * TILE_COLUMNS));
    for (int64_t j = 0; j < here; ++j) {
      prepare(first + j, line);
      for (int64_t k = 0; k < depth; ++k) panel[k * TILE_COLUMNS + j] = line[k];
    }
  }
}

ELISION_INLINE int64_t padded_columns(int64_t n) { return (n + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

}  // namespace ELISION_VARIANT
}  // namespace elision
