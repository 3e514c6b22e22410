// One vector of floats, in the width that the flags of this translation unit allow, and the three storage types.
//
// Everything lives in a namespace named after the variant: no function here may be shared with a unit that was
// compiled for another processor.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ELISION_INLINE inline __attribute__((always_inline))

namespace elision {
namespace ELISION_VARIANT {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class T>
ELISION_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T>
ELISION_INLINE T larger(T a, T b) { return a > b ? a : b; }

ELISION_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
ELISION_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

ELISION_INLINE float widen(float x) { return x; }
ELISION_INLINE float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
ELISION_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal
  return from_bits(sign | to_bits(tiny));
}

ELISION_INLINE void narrow(float x, float* out) { *out = x; }
ELISION_INLINE void narrow(float x, bf16* out) {
  const uint32_t bits = to_bits(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
ELISION_INLINE void narrow(float x, f16* out) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to more than the largest half
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the float adder rounds
    half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    const uint32_t even = magnitude >> 13 & 1;
    half = (magnitude - (112u << 23) + 0xfff + even) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
// ---- AVX-512 ----------------------------------------------------------------------------------------
constexpr int W = 16;
constexpr int TILE_ROWS = 12;
struct Vec {
  __m512 v;
};
struct Ints {
  __m512i v;
};
ELISION_INLINE __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
ELISION_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
ELISION_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
ELISION_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
ELISION_INLINE Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
ELISION_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
ELISION_INLINE Vec load(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p))};
}
ELISION_INLINE Vec load(const bf16* p, int64_t n) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
ELISION_INLINE __m256i narrowed(Vec x, const f16*) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ELISION_INLINE __m256i narrowed(Vec x, const bf16*) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(even, nan, quiet), 16));
#endif
}
ELISION_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
ELISION_INLINE void store(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), x.v); }
template <class T>
ELISION_INLINE void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(x, p));
}
template <class T>
ELISION_INLINE void store(T* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), narrowed(x, p)); }
ELISION_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
ELISION_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
ELISION_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
ELISION_INLINE Vec divide(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
ELISION_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ELISION_INLINE Vec most(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
ELISION_INLINE Vec least(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
ELISION_INLINE Vec nearest(Vec x) { return {_mm512_roundscale_ps(x.v, 0)}; }
ELISION_INLINE Vec scaled_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// value where x > bound or x is NaN, else 0.
ELISION_INLINE Vec unless_below(Vec x, Vec bound, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLE_UQ), value.v)};
}
ELISION_INLINE Ints ints(int32_t first, int32_t step) {
  const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(_mm512_set1_epi32(first), _mm512_mullo_epi32(ramp, _mm512_set1_epi32(step)))};
}
// Where x > best, x becomes best and its place the place.
ELISION_INLINE void keep_larger(Vec x, Ints at, Vec& best, Ints& place) {
  const __mmask16 more = _mm512_cmp_ps_mask(x.v, best.v, _CMP_GT_OQ);
  best.v = _mm512_mask_mov_ps(best.v, more, x.v);
  place.v = _mm512_mask_mov_epi32(place.v, more, at.v);
}
ELISION_INLINE void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x.v); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
// ---- AVX2 -------------------------------------------------------------------------------------------
constexpr int W = 8;
constexpr int TILE_ROWS = 4;
struct Vec {
  __m256 v;
};
struct Ints {
  __m256i v;
};
ELISION_INLINE __m256i lanes(int64_t n) {
  const __m256i ramp = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), ramp);
}
ELISION_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
ELISION_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
ELISION_INLINE Vec widened(__m128i half, const f16*) { return {_mm256_cvtph_ps(half)}; }
ELISION_INLINE Vec widened(__m128i half, const bf16*) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
template <class T>
ELISION_INLINE Vec load(const T* p) {
  return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
}
ELISION_INLINE Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lanes(n))}; }
template <class T>
ELISION_INLINE Vec load(const T* p, int64_t n) {
  uint16_t part[8] = {};
  memcpy(part, p, static_cast<size_t>(n) * 2);
  return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part)), p);
}
ELISION_INLINE __m128i narrowed(Vec x, const f16*) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ELISION_INLINE __m128i narrowed(Vec x, const bf16*) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  return _mm256_castsi256_si128(packed);
}
ELISION_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
ELISION_INLINE void store(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, lanes(n), x.v); }
template <class T>
ELISION_INLINE void store(T* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed(x, p));
}
template <class T>
ELISION_INLINE void store(T* p, Vec x, int64_t n) {
  uint16_t part[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(part), narrowed(x, p));
  memcpy(p, part, static_cast<size_t>(n) * 2);
}
ELISION_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
ELISION_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
ELISION_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
ELISION_INLINE Vec divide(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
ELISION_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ELISION_INLINE Vec most(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
ELISION_INLINE Vec least(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
ELISION_INLINE Vec nearest(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
ELISION_INLINE Vec scaled_by_power(Vec x, Vec n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(power))};
}
ELISION_INLINE Vec unless_below(Vec x, Vec bound, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_NLE_UQ), value.v)};
}
ELISION_INLINE Ints ints(int32_t first, int32_t step) {
  const __m256i ramp = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_add_epi32(_mm256_set1_epi32(first), _mm256_mullo_epi32(ramp, _mm256_set1_epi32(step)))};
}
ELISION_INLINE void keep_larger(Vec x, Ints at, Vec& best, Ints& place) {
  const __m256 more = _mm256_cmp_ps(x.v, best.v, _CMP_GT_OQ);
  best.v = _mm256_blendv_ps(best.v, x.v, more);
  place.v = _mm256_blendv_epi8(place.v, at.v, _mm256_castps_si256(more));
}
ELISION_INLINE void store(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }

#else
// ---- portable: vectors of GCC and Clang, which become what the processor has -----------------------------
constexpr int W = 8;
constexpr int TILE_ROWS = 2;
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
struct Vec {
  Floats8 v;
};
struct Ints {
  Ints8 v;
};
ELISION_INLINE Vec set(float x) { return {Floats8{x, x, x, x, x, x, x, x}}; }
template <class T>
ELISION_INLINE Vec load(const T* p, int64_t n) {
  Vec x = set(0.0f);
  for (int64_t i = 0; i < n; ++i) x.v[i] = widen(p[i]);
  return x;
}
template <class T>
ELISION_INLINE Vec load(const T* p) { return load(p, W); }
ELISION_INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x.v, p, sizeof x.v);
  return x;
}
template <class T>
ELISION_INLINE void store(T* p, Vec x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(x.v[i], p + i);
}
template <class T>
ELISION_INLINE void store(T* p, Vec x) { store(p, x, W); }
ELISION_INLINE void store(float* p, Vec x) { memcpy(p, &x.v, sizeof x.v); }
ELISION_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
ELISION_INLINE Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
ELISION_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
ELISION_INLINE Vec divide(Vec a, Vec b) { return {a.v / b.v}; }
ELISION_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
ELISION_INLINE Vec most(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
ELISION_INLINE Vec least(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
ELISION_INLINE Vec nearest(Vec x) {
  const Vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it leaves no bits behind the point
  return sub(add(x, magic), magic);
}
ELISION_INLINE Vec scaled_by_power(Vec x, Vec n) {
  typedef uint32_t Bits8 __attribute__((vector_size(32)));
  const Bits8 power = (reinterpret_cast<Bits8>(__builtin_convertvector(n.v, Ints8)) + 127u) << 23u;
  Floats8 factor;
  memcpy(&factor, &power, sizeof factor);
  return {x.v * factor};
}
ELISION_INLINE Vec unless_below(Vec x, Vec bound, Vec value) {
  const Floats8 none = {};
  return {x.v <= bound.v ? none : value.v};
}
ELISION_INLINE Ints ints(int32_t first, int32_t step) {
  return {Ints8{0, 1, 2, 3, 4, 5, 6, 7} * step + first};
}
ELISION_INLINE void keep_larger(Vec x, Ints at, Vec& best, Ints& place) {
  const Ints8 more = x.v > best.v;
  best.v = more ? x.v : best.v;
  place.v = more ? at.v : place.v;
}
ELISION_INLINE void store(int32_t* p, Ints x) { memcpy(p, &x.v, sizeof x.v); }
#endif

// ---- for every variant ---------------------------------------------------------------------------------
// Lanes are added in a fixed order.
ELISION_INLINE float sum(Vec x) {
  float part[W];
  store(part, x);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  return part[0];
}
ELISION_INLINE float maximum(Vec x) {
  float part[W];
  store(part, x);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) part[i] = larger(part[i], part[i + step]);
  return part[0];
}

// e^x for x <= 88; below -87.3 it is 0, and a NaN stays one. Reduction to |r| <= ln(2)/2, then the Taylor series to r^7 / 7!: the relative
// error stays below 2e-7.
ELISION_INLINE Vec exponential(Vec x) {
  const Vec floor_ = set(-87.3f);
  const Vec bounded = most(floor_, x);  // of a NaN and a number, most() is the second operand
  const Vec n = nearest(mul(bounded, set(1.44269504088896f)));
  Vec r = fma(n, set(-0.693359375f), bounded);
  r = fma(n, set(2.12194440054690583e-4f), r);
  Vec p = set(1.0f / 5040);
  p = fma(p, r, set(1.0f / 720));
  p = fma(p, r, set(1.0f / 120));
  p = fma(p, r, set(1.0f / 24));
  p = fma(p, r, set(1.0f / 6));
  p = fma(p, r, set(0.5f));
  p = fma(p, r, set(1.0f));
  p = fma(p, r, set(1.0f));
  return unless_below(x, floor_, scaled_by_power(p, n));
}

}  // namespace ELISION_VARIANT
}  // namespace elision
