/* Sixteen numbers at a time (one AVX-512 register) or eight (one of AVX2, two of NEON), in GCC's portable vectors. Wider vectors
   than registers would be kept in memory.

   Rows are read and written in fp32 or bf16; arithmetic is fp32. `bf` says which, and is a constant wherever it matters. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16
#define ACROSS 4 /* vectors of a row that are worked on together: with those of four rows they must fit the registers */
#else
#define LANES 8
#define ACROSS 2
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t hvec_at __attribute__((vector_size(2 * LANES), aligned(2)));

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

INLINE vec splat(float x) { return (vec){} + x; }

INLINE vec widen(hvec h) { return (vec)(__builtin_convertvector(h, uvec) << 16); }

#ifdef __AVX512F__ /* ---- what the portable vectors of C do poorly ---- */

#include <immintrin.h>

INLINE vec largest(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); } /* b where a is NaN */

INLINE float sum_lanes(vec v) { return _mm512_reduce_add_ps((__m512)v); }

INLINE float max_lanes(vec v) { return _mm512_reduce_max_ps((__m512)v); }

INLINE __mmask16 first_lanes(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1u); }

/* The first `count` lanes of v; the others are `rest`. */
INLINE vec keep_first(long count, vec v, vec rest) {
  return (vec)_mm512_mask_blend_ps(first_lanes(count), (__m512)rest, (__m512)v);
}

/* To the nearest bf16, ties to even; NaN stays NaN. */
INLINE hvec narrow(vec v) {
#ifdef __AVX512BF16__
  return (hvec)_mm512_cvtneps_pbh((__m512)v);
#else
  __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i near = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (hvec)_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(near, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

INLINE vec power_of_two(vec p, vec n) { return (vec)_mm512_scalef_ps((__m512)p, (__m512)n); } /* p · 2^n */

INLINE vec nearest(vec x) { return (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* 1 / x within 2 units in the last place, for 1 ≤ x < 2^127. */
INLINE vec reciprocal(vec x) {
  vec y = (vec)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
}

INLINE vec clamp(vec x, float low, float high) { /* NaN stays NaN */
  return (vec)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
}

INLINE vec zero_below(vec x, float limit, vec v) { /* 0 where x < limit, else v */
  __mmask16 below = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_LT_OQ);
  return (vec)_mm512_mask_blend_ps(below, (__m512)v, _mm512_setzero_ps());
}

#else /* ---- the same anywhere ---- */

INLINE vec choose(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }

INLINE vec largest(vec a, vec b) { return choose(a > b, a, b); }

INLINE float sum_lanes(vec v) {
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] += v[i + n];
  return v[0];
}

INLINE float max_lanes(vec v) {
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] = v[i] > v[i + n] ? v[i] : v[i + n];
  return v[0];
}

INLINE vec keep_first(long count, vec v, vec rest) {
  ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  return choose(lanes < (int32_t)(count < LANES ? count : LANES), v, rest);
}

INLINE hvec narrow(vec v) {
  uvec u = (uvec)v;
  uvec near = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  ivec nan = v != v;
  return __builtin_convertvector((uvec)(((ivec)near & ~nan) | (nan & 0x7fc0)), hvec);
}

INLINE vec power_of_two(vec p, vec n) { /* n is whole and at most 127 */
  vec shifted = n + 12582912.0f;        /* 1.5 · 2^23 */
  vec scaled = (vec)((ivec)p + (((ivec)shifted - 0x4b400000) << 23));
  return choose(p != p, p, choose(n < -126.0f, splat(0), scaled));
}

INLINE vec zero_below(vec x, float limit, vec v) { return choose(x < limit, splat(0), v); }

INLINE vec nearest(vec x) { return (x + 12582912.0f) - 12582912.0f; }

INLINE vec reciprocal(vec x) { return 1.0f / x; }

INLINE vec clamp(vec x, float low, float high) {
  x = choose(x < low, splat(low), x);
  return choose(x > high, splat(high), x);
}

#endif

/* e to the power x within 2 units in the last place; x is taken for 88 above it, and (nearly) 0 comes out below −88. */
INLINE vec exponential(vec x) {
  vec y = clamp(x, -104.0f, 88.0f);
  vec n = nearest(y * 1.44269504088896341f);
  vec r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  return power_of_two(p, n);
}

/* Numbers i … i + LANES − 1 of a row. */
INLINE vec load(const void *row, long i, int bf) {
  return bf ? widen(*(const hvec_at *)((const uint16_t *)row + i)) : (vec)*(const vec_at *)((const float *)row + i);
}

INLINE void store(void *row, long i, vec v, int bf) {
  if (bf)
    *(hvec_at *)((uint16_t *)row + i) = narrow(v);
  else
    *(vec_at *)((float *)row + i) = v;
}

/* The last `count` < LANES numbers of a row; the other lanes are 0. */
INLINE vec load_part(const void *row, long i, long count, int bf) {
  if (bf) {
    hvec h = {};
    memcpy(&h, (const uint16_t *)row + i, (size_t)count * 2);
    return widen(h);
  }
  vec v = {};
  memcpy(&v, (const float *)row + i, (size_t)count * 4);
  return v;
}

INLINE void store_part(void *row, long i, vec v, long count, int bf) {
  if (bf) {
    hvec h = narrow(v);
    memcpy((uint16_t *)row + i, &h, (size_t)count * 2);
  } else {
    memcpy((float *)row + i, &v, (size_t)count * 4);
  }
}

/* For each vector of a row of n: `i` is its first number, `w` how many of its lanes exist. */
#define EACH(i, w, n) for (long i = 0, w; i < (n) && (w = (n) - i < LANES ? (n) - i : LANES, 1); i += LANES)
#define LOAD(row, i, w, bf) ((w) == LANES ? load(row, i, bf) : load_part(row, i, w, bf))
#define STORE(row, i, v, w, bf)       \
  do {                                \
    if ((w) == LANES)                 \
      store(row, i, v, bf);           \
    else                              \
      store_part(row, i, v, w, bf);   \
  } while (0)

INLINE const void *row_of(const void *rows, long i, long width, int bf) {
  return (const char *)rows + i * width * (bf ? 2 : 4);
}

INLINE void *out_row(void *rows, long i, long width, int bf) { return (char *)rows + i * width * (bf ? 2 : 4); }
