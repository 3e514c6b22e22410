// Weights in the order in which the products read them. Written by linear_pack.cc, the same for every variant.
//
// Channels are in tiles. Of few bits: TILE_NBITS channels; a tile is scales [groups][16], zeros [groups][16] if there are
// any, padding to 64 bytes, then the weights: for 8 bits [columns / 4][16 channels][4 columns], for 4 bits [columns / 8][16]
// [4], a low nibble being of the first four columns and a high one of the next four. Floats: [columns][TILE_ROWS_FLOAT].
// Channels and columns beyond the last are zeros.
#pragma once
#include <stdint.h>
#include <string.h>

#include "elision.h"

namespace elision {

constexpr int64_t TILE_NBITS = 16, TILE_FLOATS = 32;
constexpr uint32_t PACKED_MAGIC = 0x4b504c45;  // of this layout

struct PackedHeader {
  uint32_t magic;
  int32_t bits, weight_dtype, scale_dtype, zero_dtype;  // types of few bits: ELISION_U8; 0: there are none
  int32_t unused;
  int64_t channels, width, group, groups, tile_bytes;
};
constexpr int64_t PACKED_HEADER = 128;  // bytes before the first tile
static_assert(sizeof(PackedHeader) <= PACKED_HEADER, "the header has its room");

inline int64_t size_of(int32_t dtype) {
  return dtype == 0 ? 0 : dtype == ELISION_F32 ? 4 : dtype == ELISION_U8 ? 1 : 2;
}
inline bool few_bits(int32_t bits) { return bits == 4 || bits == 8; }

// Bytes in front of a tile's weights.
inline int64_t head_bytes(const PackedHeader& h) {
  return (h.groups * TILE_NBITS * (size_of(h.scale_dtype) + size_of(h.zero_dtype)) + 63) / 64 * 64;
}
inline int64_t tile_channels(const PackedHeader& h) { return few_bits(h.bits) ? TILE_NBITS : TILE_FLOATS; }
inline int64_t tiles_of(const PackedHeader& h) { return (h.channels + tile_channels(h) - 1) / tile_channels(h); }

inline bool known_types(const PackedHeader& h) {
  const int32_t w = h.weight_dtype, s = h.scale_dtype, z = h.zero_dtype;
  if (!few_bits(h.bits))
    return s == 0 && z == 0 && (h.bits == 32 ? w == ELISION_F32 : h.bits == 16 && (w == ELISION_F16 || w == ELISION_BF16));
  return w == ELISION_U8 && (s == ELISION_F32 || s == ELISION_F16) &&
         (z == 0 || z == ELISION_U8 || z == ELISION_F32 || z == ELISION_F16);
}

// Fills in groups and tile_bytes. False where types and lengths make no weight.
inline bool complete(PackedHeader& h) {
  constexpr int64_t MOST = int64_t{1} << 31;
  if (!known_types(h)) return false;
  if (h.channels < 0 || h.width < 1 || h.channels > MOST || h.width > MOST) return false;
  if (few_bits(h.bits)) {
    if (h.group != 16 && (h.group < 32 || h.group % 32 != 0 || h.group > MOST)) return false;
    h.groups = (h.width + h.group - 1) / h.group;
    h.tile_bytes = head_bytes(h) + h.groups * h.group * TILE_NBITS * h.bits / 8;
  } else {
    h.group = 0, h.groups = 0;
    h.tile_bytes = h.width * TILE_FLOATS * size_of(h.weight_dtype);
  }
  int64_t total;
  return !__builtin_mul_overflow(h.tile_bytes, tiles_of(h), &total) && total < INT64_MAX / 4;
}
inline int64_t packed_bytes(const PackedHeader& h) { return PACKED_HEADER + h.tile_bytes * tiles_of(h); }

}  // namespace elision
