// Products of a few lines with keys and values that stand anywhere: a line's arithmetic is the same whatever lines and
// keys stand beside it.
#pragma once
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int LINES = W == 16 ? 6 : 3;  // lines in registers at once
constexpr int KEYS = 4;                 // keys in registers at once

// The sums of four vectors; lanes are added in the same order for each.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
ELISION_INLINE void four_sums(const Vec (&x)[4], float* out) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512 e = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  const __m256 f = _mm256_add_ps(_mm512_castps512_ps256(e), _mm512_extractf32x8_ps(e, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1)));
}
#elif defined(__AVX2__)
ELISION_INLINE void four_sums(const Vec (&x)[4], float* out) {
  const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(x[0].v, x[1].v), _mm256_unpackhi_ps(x[0].v, x[1].v));
  const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(x[2].v, x[3].v), _mm256_unpackhi_ps(x[2].v, x[3].v));
  const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
  const __m256 f = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1)));
}
#else
ELISION_INLINE void four_sums(const Vec (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
}
#endif

// Where consecutive keys stand: in a run of a cache, or wherever a list of slots says.
template <class T>
struct Run {
  const T* base;
  int64_t width;
  ELISION_INLINE const T* operator()(int64_t j) const { return base + j * width; }
};
template <class T>
struct Listed {
  const T* cache;
  int64_t width;
  const int32_t* slots;
  ELISION_INLINE const T* operator()(int64_t j) const { return cache + slots[j] * width; }
};

// out[i * stride + j] = q[i * width ...] . key(j) for N lines and `count` keys.
template <int N, class At>
void score(const float* q, int64_t width, const At& key, int64_t count, float* out, int64_t stride) {
  const int64_t whole = width / W * W, left = width - whole;
  for (int64_t j = 0; j < count; j += KEYS) {
    const decltype(key(0)) keys[KEYS] = {key(j), key(smaller(j + 1, count - 1)), key(smaller(j + 2, count - 1)),
                                         key(smaller(j + 3, count - 1))};
    Vec acc[N][KEYS];
    for (int i = 0; i < N; ++i)
      for (int c = 0; c < KEYS; ++c) acc[i][c] = set(0.0f);
    for (int64_t d = 0; d < whole; d += W) {
      Vec column[KEYS];
      for (int c = 0; c < KEYS; ++c) column[c] = load(keys[c] + d);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const Vec x = load(q + i * width + d);
        for (int c = 0; c < KEYS; ++c) acc[i][c] = fma(x, column[c], acc[i][c]);
      }
    }
    if (left > 0) {
      Vec column[KEYS];
      for (int c = 0; c < KEYS; ++c) column[c] = load(keys[c] + whole, left);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const Vec x = load(q + i * width + whole, left);
        for (int c = 0; c < KEYS; ++c) acc[i][c] = fma(x, column[c], acc[i][c]);
      }
    }
    if (j + KEYS <= count) {
      for (int i = 0; i < N; ++i) four_sums(acc[i], out + i * stride + j);
    } else {
      for (int i = 0; i < N; ++i) {
        float sums[KEYS];
        four_sums(acc[i], sums);
        for (int64_t c = 0; j + c < count; ++c) out[i * stride + j + c] = sums[c];
      }
    }
  }
}

template <int N, int VECTORS, class At>
ELISION_INLINE void weigh_strip(const float* weights, int64_t stride, const At& value, int64_t count, int64_t first,
                                int64_t left, float* out, int64_t columns) {
  Vec acc[N][VECTORS];
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < VECTORS; ++c) acc[i][c] = load(out + i * columns + first + c * W);
  for (int64_t j = 0; j < count; ++j) {
    const auto* row = value(j) + first;
    Vec column[VECTORS];
    for (int c = 0; c < VECTORS; ++c) column[c] = left == 0 ? load(row + c * W) : load(row + c * W, left);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec x = set(weights[i * stride + j]);
      for (int c = 0; c < VECTORS; ++c) acc[i][c] = fma(x, column[c], acc[i][c]);
    }
  }
  for (int i = 0; i < N; ++i)
    for (int c = 0; c < VECTORS; ++c) store(out + i * columns + first + c * W, acc[i][c]);
}

// out[i * columns ...] += weights[i * stride + j] * value(j), j ascending, for N lines; columns: width up to whole vectors.
template <int N, class At>
void weigh(const float* weights, int64_t stride, const At& value, int64_t count, int64_t width, float* out,
           int64_t columns) {
  constexpr int MOST = 4;
  int64_t first = 0;
  for (; first + MOST * W <= width; first += MOST * W)
    weigh_strip<N, MOST>(weights, stride, value, count, first, 0, out, columns);
  for (; first + 2 * W <= width; first += 2 * W)
    weigh_strip<N, 2>(weights, stride, value, count, first, 0, out, columns);
  for (; first + W <= width; first += W) weigh_strip<N, 1>(weights, stride, value, count, first, 0, out, columns);
  if (first < width) weigh_strip<N, 1>(weights, stride, value, count, first, width - first, out, columns);
}

// Calls body.template tile<n>(line) for `lines` lines from `first`, with as large an n as fits.
template <class Body>
ELISION_INLINE void for_lines(int64_t first, int64_t lines, const Body& body) {
  for (; lines >= LINES; first += LINES, lines -= LINES) body.template tile<LINES>(first);
  switch (lines) {
    case 1: return body.template tile<1>(first);
    case 2: return body.template tile<2>(first);
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    case 3: return body.template tile<3>(first);
    case 4: return body.template tile<4>(first);
    case 5: return body.template tile<5>(first);
#endif
    default: return;
  }
}

}  // namespace ELISION_VARIANT
}  // namespace elision
