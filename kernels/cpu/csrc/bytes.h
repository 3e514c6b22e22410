// Sums of products of bytes: W lanes of four unsigned bytes each (weights) times four signed ones that all lanes share.
#pragma once
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

ELISION_INLINE int32_t quad_at(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, 4);
  return quad;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
struct Bytes {
  __m512i v;
};
ELISION_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
ELISION_INLINE Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
ELISION_INLINE Bytes high_nibbles(Bytes x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
ELISION_INLINE Ints set(int32_t x) { return {_mm512_set1_epi32(x)}; }
ELISION_INLINE Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
ELISION_INLINE Vec to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
// Products of numbers that 16 bits hold.
ELISION_INLINE Ints mul_short(Ints a, Ints b) { return {_mm512_madd_epi16(a.v, b.v)}; }
// SMALL: the weights are below 128.
template <bool SMALL>
ELISION_INLINE Ints dot(Ints sum, Bytes w, const int8_t* quad) {
  const __m512i a = _mm512_set1_epi32(quad_at(quad));
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(sum.v, w.v, a)};
#else
  if (SMALL) {
    const __m512i pairs = _mm512_maddubs_epi16(w.v, a);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
  }
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w.v, _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w.v, 8), _mm512_srai_epi16(a, 8));
  return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd))};
#endif
}
ELISION_INLINE Ints rounded(Vec x) { return {_mm512_cvtps_epi32(x.v)}; }
ELISION_INLINE void store_bytes(int8_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x.v));
}
ELISION_INLINE Ints magnitude_bits(Vec x) {
  return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))};
}
ELISION_INLINE Ints most(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
ELISION_INLINE Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
ELISION_INLINE int32_t maximum(Ints x) { return _mm512_reduce_max_epi32(x.v); }
ELISION_INLINE int32_t sum(Ints x) { return _mm512_reduce_add_epi32(x.v); }
// Is any lane of x not below or at the bound? NaNs are not.
ELISION_INLINE bool any_above(Vec x, Vec bound) { return _mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLE_UQ) != 0; }
ELISION_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct Bytes {
  __m256i v;
};
ELISION_INLINE Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
ELISION_INLINE Bytes low_nibbles(Bytes x) { return {_mm256_and_si256(x.v, _mm256_set1_epi8(15))}; }
ELISION_INLINE Bytes high_nibbles(Bytes x) {
  return {_mm256_and_si256(_mm256_srli_epi16(x.v, 4), _mm256_set1_epi8(15))};
}
ELISION_INLINE Ints set(int32_t x) { return {_mm256_set1_epi32(x)}; }
ELISION_INLINE Ints load_ints(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
ELISION_INLINE Vec to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.v)}; }
ELISION_INLINE Ints mul_short(Ints a, Ints b) { return {_mm256_madd_epi16(a.v, b.v)}; }
template <bool SMALL>
ELISION_INLINE Ints dot(Ints sum, Bytes w, const int8_t* quad) {
  const __m256i a = _mm256_set1_epi32(quad_at(quad));
  if (SMALL) {
    const __m256i pairs = _mm256_maddubs_epi16(w.v, a);
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
  // Two products of full bytes do not fit 16 bits.
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w.v, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w.v, 8), _mm256_srai_epi16(a, 8));
  return {_mm256_add_epi32(sum.v, _mm256_add_epi32(even, odd))};
}
ELISION_INLINE Ints rounded(Vec x) { return {_mm256_cvtps_epi32(x.v)}; }
ELISION_INLINE void store_bytes(int8_t* p, Ints x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
ELISION_INLINE Ints magnitude_bits(Vec x) {
  return {_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff))};
}
ELISION_INLINE Ints most(Ints a, Ints b) { return {_mm256_max_epi32(a.v, b.v)}; }
ELISION_INLINE Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
ELISION_INLINE bool any_above(Vec x, Vec bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_NLE_UQ)) != 0;
}
ELISION_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#else
typedef uint8_t Bytes32 __attribute__((vector_size(32)));
struct Bytes {
  Bytes32 v;
};
ELISION_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  memcpy(&x.v, p, sizeof x.v);
  return x;
}
ELISION_INLINE Bytes low_nibbles(Bytes x) { return {x.v & static_cast<uint8_t>(15)}; }
ELISION_INLINE Bytes high_nibbles(Bytes x) { return {x.v >> 4}; }
ELISION_INLINE Ints set(int32_t x) { return {Ints8{x, x, x, x, x, x, x, x}}; }
ELISION_INLINE Ints load_ints(const int32_t* p) {
  Ints x;
  memcpy(&x.v, p, sizeof x.v);
  return x;
}
ELISION_INLINE Vec to_floats(Ints x) { return {__builtin_convertvector(x.v, Floats8)}; }
ELISION_INLINE Ints mul_short(Ints a, Ints b) { return {a.v * b.v}; }
template <bool SMALL>
ELISION_INLINE Ints dot(Ints sum, Bytes w, const int8_t* quad) {
  Ints8 lanes;
  memcpy(&lanes, &w.v, sizeof lanes);
  for (int i = 0; i < 4; ++i) sum.v += (lanes >> 8 * i & 255) * static_cast<int32_t>(quad[i]);
  return sum;
}
// A number that 32 bits do not hold, or none, becomes -128: it is garbage, but always the same.
ELISION_INLINE Ints rounded(Vec x) {
  Ints out;
  const Vec whole = nearest(x);
  for (int i = 0; i < W; ++i) out.v[i] = whole.v[i] >= -128.0f && whole.v[i] <= 127.0f ? static_cast<int32_t>(whole.v[i]) : -128;
  return out;
}
ELISION_INLINE void store_bytes(int8_t* p, Ints x) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
ELISION_INLINE Ints magnitude_bits(Vec x) {
  Ints bits;
  memcpy(&bits.v, &x.v, sizeof bits.v);
  return {bits.v & 0x7fffffff};
}
ELISION_INLINE Ints most(Ints a, Ints b) { return {a.v > b.v ? a.v : b.v}; }
ELISION_INLINE Ints add(Ints a, Ints b) { return {a.v + b.v}; }
ELISION_INLINE bool any_above(Vec x, Vec bound) {
  for (int i = 0; i < W; ++i)
    if (!(x.v[i] <= bound.v[i])) return true;
  return false;
}
ELISION_INLINE void fetch(const void* p) { __builtin_prefetch(p); }
#endif

#if !defined(__AVX512F__)
ELISION_INLINE int32_t maximum(Ints x) {
  int32_t part[W], found;
  store(part, x);
  found = part[0];
  for (int i = 1; i < W; ++i) found = larger(found, part[i]);
  return found;
}
ELISION_INLINE int32_t sum(Ints x) {
  int32_t part[W], total = 0;
  store(part, x);
  for (int i = 0; i < W; ++i) total += part[i];
  return total;
}
#endif

}  // namespace ELISION_VARIANT
}  // namespace elision
