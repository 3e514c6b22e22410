// Rows of x as bytes, and a tile of their product with weights of 4 or 8 bits.
//
// A row is cut into blocks of 32 columns (16 where groups have 16); a block is signed bytes and the float that they are
// multiples of. Products of bytes are added as integers within a block, blocks as floats within a group, groups as floats
// in their order. All of it is one row's own: how many rows share a tile does not change a bit.
#pragma once
#include "bytes.h"
#include "packed.h"

namespace elision {
namespace ELISION_VARIANT {

// What zero points are.
enum { ZERO_FIXED, ZERO_INTS, ZERO_OFFSETS };

struct NbitsShape {
  int64_t groups, per_group, block;  // blocks in a group, columns in a block
  int32_t bits, zeros;
  int64_t head, share;  // bytes in front of a tile's weights, and of a tile for each block
  int64_t columns() const { return groups * per_group * block; }
  int64_t row_bytes() const { return groups * (per_group * (block + 8) + 4); }
};

// Up to `most` rows side by side: for every block [columns / 4][rows][4] bytes, [rows] scales, [rows] integers that the
// sums begin with; then [groups][rows] sums of x, for offsets.
template <int B>
void quantize_row(const float* x, const NbitsShape& s, int64_t row, int64_t rows, char* panel) {
  const int64_t stride = rows * (B + 8);
  float* sums = reinterpret_cast<float*>(panel + s.groups * s.per_group * stride) + row;
  const int32_t zero = s.zeros == ZERO_FIXED ? 1 << (s.bits - 1) : s.zeros == ZERO_INTS ? 1 : 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    float group_sum = 0.0f;
    for (int64_t b = 0; b < s.per_group; ++b, x += B, panel += stride) {
      Ints most_bits = set(0);
      for (int i = 0; i < B; i += W) most_bits = most(most_bits, magnitude_bits(load(x + i)));
      const float top = from_bits(static_cast<uint32_t>(maximum(most_bits)));  // NaN is the largest
      const bool none = top < 1e-30f;
      const float scale = none ? 0.0f : top / 127.0f;
      const Vec inverse = set(none ? 0.0f : 127.0f / top);
      int8_t q[B];
      Ints total = set(0);
      for (int i = 0; i < B; i += W) {
        const Ints whole = rounded(mul(load(x + i), inverse));
        total = add(total, whole);
        store_bytes(q + i, whole);
      }
      const int32_t added = sum(total);
      for (int i = 0; i < B; i += 4) memcpy(panel + (i * rows + row * 4), q + i, 4);
      const int32_t begin = -zero * added;
      memcpy(panel + B * rows + row * 4, &scale, 4);
      memcpy(panel + (B + 4) * rows + row * 4, &begin, 4);
      group_sum += scale * static_cast<float>(added);
    }
    sums[g * rows] = group_sum;
  }
}

// How far ahead memory is asked for: processors do so by themselves within a page, and for a stream that they know, but
// a tile has two, its scales and its weights. What follows a tile is the next one.
constexpr int64_t FETCH = 8192;

// out [R][16]. zeros: int32 or float [groups][16].
template <int BITS, int ZEROS, int B, int R>
void nbits_tile(const uint8_t* weight, const float* scales, const void* zeros, const char* panel, const NbitsShape& s,
                float* out) {
  constexpr int64_t STRIDE = R * (B + 8), LANES = W * 4, LINE = TILE_NBITS * 4, BLOCK = LINE * B * BITS / 32;
  const float* sums = reinterpret_cast<const float*>(panel + s.groups * s.per_group * STRIDE);
  for (int64_t part = 0; part < TILE_NBITS / W; ++part) {
    const uint8_t* w = weight + part * LANES;
    const uint8_t* ahead = weight - s.head + FETCH;
    const char* at = panel;
    Vec total[R];
    for (int r = 0; r < R; ++r) total[r] = set(0.0f);
    for (int64_t g = 0; g < s.groups; ++g) {
      Vec group[R];
      for (int r = 0; r < R; ++r) group[r] = set(0.0f);
      Ints zero = set(int32_t{0});
      if (ZEROS == ZERO_INTS) zero = load_ints(static_cast<const int32_t*>(zeros) + g * TILE_NBITS + part * W);
      for (int64_t b = 0; b < s.per_group; ++b, at += STRIDE, w += BLOCK) {
        const float* scale = reinterpret_cast<const float*>(at + B * R);
        const int32_t* begin = reinterpret_cast<const int32_t*>(at + (B + 4) * R);
        for (int64_t i = 0; i < s.share; i += 64) fetch(ahead + i);
        ahead += s.share;
        Ints dots[R];
        for (int r = 0; r < R; ++r) {
          dots[r] = set(begin[r]);
          if (ZEROS == ZERO_INTS) dots[r] = mul_short(zero, dots[r]);
          if (ZEROS == ZERO_OFFSETS) dots[r] = set(int32_t{0});
        }
        const int8_t* quads = reinterpret_cast<const int8_t*>(at);
        if (BITS == 8) {
#pragma GCC unroll 8
          for (int q = 0; q < B / 4; ++q) {
            const Bytes bytes = load_bytes(w + q * LINE);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) dots[r] = dot<false>(dots[r], bytes, quads + (q * R + r) * 4);
          }
        } else {
#pragma GCC unroll 4
          for (int q = 0; q < B / 8; ++q) {
            const Bytes both = load_bytes(w + q * LINE), low = low_nibbles(both), high = high_nibbles(both);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) dots[r] = dot<true>(dots[r], low, quads + (2 * q * R + r) * 4);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) dots[r] = dot<true>(dots[r], high, quads + ((2 * q + 1) * R + r) * 4);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) group[r] = fma(to_floats(dots[r]), set(scale[r]), group[r]);
      }
      const Vec factor = load(scales + g * TILE_NBITS + part * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r] = fma(group[r], factor, total[r]);
      if (ZEROS == ZERO_OFFSETS) {
        const Vec offset = load(static_cast<const float*>(zeros) + g * TILE_NBITS + part * W);
        for (int r = 0; r < R; ++r) total[r] = fma(offset, set(sums[g * R + r]), total[r]);
      }
    }
    for (int r = 0; r < R; ++r) store(out + r * TILE_NBITS + part * W, total[r]);
  }
}

using NbitsTile = void (*)(const uint8_t*, const float*, const void*, const char*, const NbitsShape&, float*);

// Rows that share a tile: as many as there are registers for.
constexpr int NBITS_ROWS = W == 16 ? 8 : TILE_ROWS;
// How many rows a kernel for `rows` has; the last ones may be padding.
ELISION_INLINE int nbits_rows(int64_t rows) {
  if (rows >= NBITS_ROWS) return NBITS_ROWS;
  return static_cast<int>(rows <= 4 ? rows : rows <= 6 ? 6 : 8);
}

template <int BITS, int ZEROS, int B>
NbitsTile nbits_tile_for(int rows) {
  if constexpr (NBITS_ROWS >= 8) {
    if (rows == 8) return nbits_tile<BITS, ZEROS, B, 8>;
    if (rows == 6) return nbits_tile<BITS, ZEROS, B, 6>;
  }
  if constexpr (NBITS_ROWS >= 4) {
    if (rows == 4) return nbits_tile<BITS, ZEROS, B, 4>;
    if (rows == 3) return nbits_tile<BITS, ZEROS, B, 3>;
  }
  return rows == 2 ? nbits_tile<BITS, ZEROS, B, 2> : nbits_tile<BITS, ZEROS, B, 1>;
}
template <int BITS, int B>
NbitsTile nbits_tile_for(int zeros, int rows) {
  return zeros == ZERO_FIXED  ? nbits_tile_for<BITS, ZERO_FIXED, B>(rows)
         : zeros == ZERO_INTS ? nbits_tile_for<BITS, ZERO_INTS, B>(rows)
                              : nbits_tile_for<BITS, ZERO_OFFSETS, B>(rows);
}
inline NbitsTile nbits_tile_of(const NbitsShape& s, int rows) {
  if (s.block == 32) return s.bits == 4 ? nbits_tile_for<4, 32>(s.zeros, rows) : nbits_tile_for<8, 32>(s.zeros, rows);
  return s.bits == 4 ? nbits_tile_for<4, 16>(s.zeros, rows) : nbits_tile_for<8, 16>(s.zeros, rows);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
