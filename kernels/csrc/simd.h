// The smallest vector layer that the kernels need: W floats, compiled for whatever the translation unit allows.
//
// Everything lies in an anonymous namespace and no standard library header with inline code is included: were one
// level's copy of an inline function kept by the linker for all, an older CPU would meet instructions it lacks.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "losa_kernels.h"

#define LOSA_UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
// Registers: 32 allow 6 rows times 4 vectors of accumulators, 16 allow 6 times 2.
constexpr int kAcross = W == 16 ? 4 : 2, kDown = 6;

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));

constexpr float kMinusInfinity = -__builtin_inff();

inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

inline V splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return V{x, x, x, x};
#endif
}

inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline V larger(V a, V b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline V smaller(V a, V b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Lane numbers first, first + 1, ...
inline I count_from(int first) {
  I lanes;
  LOSA_UNROLL
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes + first;
}

inline float largest_of(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float best = v[0];
  LOSA_UNROLL
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

inline float sum_of(V v) {
  float part[W];
  store(part, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// e^x for x <= 88, exactly 0 below -87.3 and exactly 1 at 0; NaN stays NaN. e^x = 2^n e^r with n = round(x / ln 2);
// e^r by Taylor's series to the 7th power: |r| <= ln 2 / 2 leaves a relative error of 5e-9 before rounding.
inline V exponential(V x) {
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves it in the low bits
  const V shifted = fma(x, splat(1.44269504f), magic);
  const V n = shifted - magic;
  V r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, splat(2.12194440e-4f), r);
  V y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  const I exponent = ((I)shifted - (I)magic + 127) << 23;
  return x < splat(-87.3f) ? splat(0.0f) : y * (V)exponent;
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline uint16_t narrow_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen_f16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  const float small = (float)(int32_t)rest * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
  return sign ? -small : small;
}

inline uint16_t narrow_f16(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (rest < 0x38800000) {                                   // below 2^-14: let the addition round to 2^-24
    const float shifted = from_bits(rest) + 0.5f;
    return (uint16_t)(sign | (to_bits(shifted) - to_bits(0.5f)));
  }
  return (uint16_t)(sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13));
}

inline float widen(uint16_t x, int dtype) {
  return dtype == LOSA_BF16 ? from_bits((uint32_t)x << 16) : widen_f16(x);
}

// W values of a vector of any dtype as floats.
inline V load_as(const void* from, int64_t at, int dtype) {
  if (dtype == LOSA_F32) return load((const float*)from + at);
  const uint16_t* half = (const uint16_t*)from + at;
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256((const __m256i*)half);
  if (dtype == LOSA_F16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128((const __m128i*)half);
  if (dtype == LOSA_F16) return _mm256_cvtph_ps(raw);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
  return V{widen(half[0], dtype), widen(half[1], dtype), widen(half[2], dtype), widen(half[3], dtype)};
#endif
}

inline float load_one(const void* from, int64_t at, int dtype) {
  return dtype == LOSA_F32 ? ((const float*)from)[at] : widen(((const uint16_t*)from)[at], dtype);
}

inline void store_one(void* to, int64_t at, int dtype, float x) {
  if (dtype == LOSA_F32)
    ((float*)to)[at] = x;
  else
    ((uint16_t*)to)[at] = dtype == LOSA_BF16 ? narrow_bf16(x) : narrow_f16(x);
}

}  // namespace
