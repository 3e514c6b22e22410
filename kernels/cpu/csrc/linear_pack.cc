// Weights into the order of packed.h: once, when a kernel or a graph is made.
#include <algorithm>

#include "common.h"
#include "packed.h"

namespace elision {
namespace {

bool header_of(const elision_pack_args& a, PackedHeader* h) {
  *h = PackedHeader{};
  h->magic = PACKED_MAGIC, h->bits = a.bits, h->channels = a.channels, h->width = a.width;
  h->weight_dtype = a.weight_dtype;
  if (few_bits(a.bits)) h->scale_dtype = a.scale_dtype, h->zero_dtype = a.zero_dtype, h->group = a.group;
  return complete(*h);
}

struct Packing {
  const elision_pack_args& a;
  PackedHeader h;
  uint8_t* tiles;

  // [channels][groups] elements -> [groups][16]
  void turn(const void* from, int64_t size, int64_t first, int64_t count, uint8_t* to) const {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t g = 0; g < h.groups; ++g)
        memcpy(to + (g * TILE_NBITS + c) * size,
               static_cast<const uint8_t*>(from) + ((first + c) * h.groups + g) * size, static_cast<size_t>(size));
  }

  void few(int64_t tile) const {
    uint8_t* to = tiles + tile * h.tile_bytes;
    const int64_t first = tile * TILE_NBITS, count = std::min(TILE_NBITS, h.channels - first);
    memset(to, 0, static_cast<size_t>(h.tile_bytes));
    turn(a.scales, size_of(h.scale_dtype), first, count, to);
    if (h.zero_dtype != 0)
      turn(a.zeros, size_of(h.zero_dtype), first, count, to + h.groups * TILE_NBITS * size_of(h.scale_dtype));
    to += head_bytes(h);
    const int64_t columns = h.groups * h.group, bytes = columns * h.bits / 8;
    for (int64_t c = 0; c < count; ++c) {
      const uint8_t* row = static_cast<const uint8_t*>(a.weight) + (first + c) * bytes;
      if (h.bits == 8) {
        for (int64_t q = 0; q < columns / 4; ++q) memcpy(to + (q * TILE_NBITS + c) * 4, row + q * 4, 4);
        continue;
      }
      // Eight columns are four bytes here and there; there a byte holds columns j and j + 4, here 2 j and 2 j + 1.
      for (int64_t q = 0; q < columns / 8; ++q, row += 4) {
        const uint8_t nibbles[8] = {static_cast<uint8_t>(row[0] & 15), static_cast<uint8_t>(row[0] >> 4),
                                    static_cast<uint8_t>(row[1] & 15), static_cast<uint8_t>(row[1] >> 4),
                                    static_cast<uint8_t>(row[2] & 15), static_cast<uint8_t>(row[2] >> 4),
                                    static_cast<uint8_t>(row[3] & 15), static_cast<uint8_t>(row[3] >> 4)};
        for (int64_t j = 0; j < 4; ++j)
          to[(q * TILE_NBITS + c) * 4 + j] = static_cast<uint8_t>(nibbles[j] | nibbles[j + 4] << 4);
      }
    }
  }

  template <class T>
  void floats(int64_t tile) const {
    T* to = reinterpret_cast<T*>(tiles + tile * h.tile_bytes);
    const int64_t first = tile * TILE_FLOATS, count = std::min(TILE_FLOATS, h.channels - first);
    if (count < TILE_FLOATS) memset(to, 0, static_cast<size_t>(h.tile_bytes));
    constexpr int64_t PART = 64;  // columns at a time: what is written stays in the nearest cache
    for (int64_t k0 = 0; k0 < h.width; k0 += PART) {
      const int64_t until = std::min(h.width, k0 + PART);
      for (int64_t c = 0; c < count; ++c) {
        const T* row = static_cast<const T*>(a.weight) + (first + c) * h.width;
        for (int64_t k = k0; k < until; ++k) to[k * TILE_FLOATS + c] = row[k];
      }
    }
  }
};

}  // namespace
}  // namespace elision

using namespace elision;

extern "C" {

int64_t elision_packed_bytes(const elision_pack_args* args) {
  PackedHeader h;
  return header_of(*args, &h) ? packed_bytes(h) : 0;
}

int elision_pack(const elision_pack_args* args, const elision_runner* runner, char* error, size_t room) {
  PackedHeader h;
  if (!header_of(*args, &h))
    return fail(error, room, "linear: no weight of %d bits for %lld columns in groups of %lld", static_cast<int>(args->bits),
                static_cast<long long>(args->width), static_cast<long long>(args->group));
  uint8_t* to = static_cast<uint8_t*>(args->packed);
  memset(to, 0, PACKED_HEADER);
  memcpy(to, &h, sizeof h);
  Packing packing{*args, h, to + PACKED_HEADER};
  const auto task = [](void* self, size_t i) {
    const Packing& p = *static_cast<const Packing*>(self);
    const int64_t tile = static_cast<int64_t>(i);
    if (few_bits(p.h.bits))
      p.few(tile);
    else if (p.h.bits == 32)
      p.floats<uint32_t>(tile);
    else
      p.floats<uint16_t>(tile);
  };
  runner->run(runner->self, task, &packing, static_cast<size_t>(tiles_of(h)));
  return 0;
}
}
