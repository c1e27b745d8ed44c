// Turning keys: vectors that lie one after another become a tile with the channels outermost, all floats.
#pragma once

#include "tile.h"

namespace {

#if defined(__AVX512F__) || defined(__AVX2__)

// Channels d .. d + 4 of every fourth of W rows, one row after another.
template <int kind>
inline V every_fourth(const void* const* rows, int d) {
  if (kind == LOSA_F32) {
    const auto four = [&](int i) { return _mm_loadu_ps((const float*)rows[i] + d); };
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(four(0)), four(4), 1);
#if defined(__AVX512F__)
    return _mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps256_ps512(low), four(8), 2), four(12), 3);
#else
    return low;
#endif
  }
  const auto eight = [&](int i) {
    const __m128i first = _mm_loadl_epi64((const __m128i*)((const uint16_t*)rows[i] + d));
    return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(first), (const double*)((const uint16_t*)rows[i + 4] + d)));
  };
#if defined(__AVX512F__)
  const __m256i raw = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(0)), eight(8), 1);
  if (kind == LOSA_F16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#else
  if (kind == LOSA_F16) return _mm256_cvtph_ps(eight(0));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(0)), 16));
#endif
}

#if defined(__AVX512F__)
#define LOSA_PAIRS(kind, width, a, b) _mm512_unpack##kind##_##width(a, b)
typedef __m512d Pairs;
#else
#define LOSA_PAIRS(kind, width, a, b) _mm256_unpack##kind##_##width(a, b)
typedef __m256d Pairs;
#endif

// Channels d .. d + 4 of W rows: out[c] holds channel c of all of them.
template <int kind>
inline void turn_quad(const void* const* rows, int d, float* out) {
  V z[4];
  LOSA_UNROLL
  for (int j = 0; j < 4; ++j) z[j] = every_fourth<kind>(rows + j, d);
  const Pairs low01 = (Pairs)LOSA_PAIRS(lo, ps, z[0], z[1]), high01 = (Pairs)LOSA_PAIRS(hi, ps, z[0], z[1]);
  const Pairs low23 = (Pairs)LOSA_PAIRS(lo, ps, z[2], z[3]), high23 = (Pairs)LOSA_PAIRS(hi, ps, z[2], z[3]);
  store(out, (V)LOSA_PAIRS(lo, pd, low01, low23));
  store(out + kKeys, (V)LOSA_PAIRS(hi, pd, low01, low23));
  store(out + 2 * kKeys, (V)LOSA_PAIRS(lo, pd, high01, high23));
  store(out + 3 * kKeys, (V)LOSA_PAIRS(hi, pd, high01, high23));
}

#if defined(__AVX512F__)

// Channels d .. d + 16 of 16 rows. Each row's cache line is read once: rows whose addresses differ by multiples of 4 KB
// would push one another out of the innermost cache before a second visit.
template <int kind>
inline void turn_square(const void* const* rows, int d, float* out) {
  V z[W], pairs[W];
  LOSA_UNROLL
  for (int i = 0; i < W; ++i) z[i] = load_as(rows[i], d, kind);
  LOSA_UNROLL
  for (int i = 0; i < W; i += 2) {
    pairs[i] = LOSA_PAIRS(lo, ps, z[i], z[i + 1]);
    pairs[i + 1] = LOSA_PAIRS(hi, ps, z[i], z[i + 1]);
  }
  LOSA_UNROLL
  for (int i = 0; i < W; i += 4) {  // z[i + c]: channels c, 4 + c, ... of rows i .. i + 4
    z[i] = (V)LOSA_PAIRS(lo, pd, (Pairs)pairs[i], (Pairs)pairs[i + 2]);
    z[i + 1] = (V)LOSA_PAIRS(hi, pd, (Pairs)pairs[i], (Pairs)pairs[i + 2]);
    z[i + 2] = (V)LOSA_PAIRS(lo, pd, (Pairs)pairs[i + 1], (Pairs)pairs[i + 3]);
    z[i + 3] = (V)LOSA_PAIRS(hi, pd, (Pairs)pairs[i + 1], (Pairs)pairs[i + 3]);
  }
  LOSA_UNROLL
  for (int c = 0; c < 4; ++c) {
    const V low = _mm512_shuffle_f32x4(z[c], z[4 + c], 0x44), high = _mm512_shuffle_f32x4(z[c], z[4 + c], 0xee);
    const V low2 = _mm512_shuffle_f32x4(z[8 + c], z[12 + c], 0x44);
    const V high2 = _mm512_shuffle_f32x4(z[8 + c], z[12 + c], 0xee);
    store(out + c * kKeys, _mm512_shuffle_f32x4(low, low2, 0x88));
    store(out + (4 + c) * kKeys, _mm512_shuffle_f32x4(low, low2, 0xdd));
    store(out + (8 + c) * kKeys, _mm512_shuffle_f32x4(high, high2, 0x88));
    store(out + (12 + c) * kKeys, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}

#endif
#undef LOSA_PAIRS

#else

template <int kind>
inline void turn_quad(const void* const* rows, int d, float* out) {
  for (int c = 0; c < 4; ++c)
    for (int i = 0; i < W; ++i) out[c * kKeys + i] = load_one(rows[i], d + c, kind);
}

#endif

template <int kind>
inline void turn(const void* const* rows, int columns, int depth, float* turned) {
  for (int i = 0; i < columns; i += W) {
    int d = 0;
#if defined(__AVX512F__)
    for (; d + W <= depth; d += W) turn_square<kind>(rows + i, d, turned + d * kKeys + i);
#endif
    for (; d < depth; d += 4) turn_quad<kind>(rows + i, d, turned + d * kKeys + i);
  }
}

inline int whole_vectors(int count) {
  return (count + W - 1) / W * W;
}

// turned[d][i] = channel d of the vector at where[i]. Columns behind `count`, up to a whole vector, repeat the first
// one: they weigh nothing later.
inline void turn_tile(const void* from, int dtype, int dim, const int64_t* where, int count, float* copies,
                      float* turned) {
  const int columns = whole_vectors(count);
  const void* rows[kKeys];
  if (dim % 4) {  // quads would reach beyond the vector: turn padded copies
    const float* padded[kKeys];
    tile_rows(from, dtype, dim, where, count, copies, padded);
    for (int i = 0; i < columns; ++i) rows[i] = padded[i < count ? i : 0];
    return turn<LOSA_F32>(rows, columns, dim, turned);
  }
  for (int i = 0; i < columns; ++i) rows[i] = (const char*)from + where[i < count ? i : 0] * losa::bytes_of(dtype);
  if (dtype == LOSA_F32) return turn<LOSA_F32>(rows, columns, dim, turned);
  if (dtype == LOSA_BF16) return turn<LOSA_BF16>(rows, columns, dim, turned);
  turn<LOSA_F16>(rows, columns, dim, turned);
}

}  // namespace
