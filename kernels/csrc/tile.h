// Small matrix products on tiles: queries times turned keys, weights times values.
//
// Each result element is one chain of multiply-adds in a fixed order, whatever block it is computed in: a row's
// result does not depend on how rows and columns are cut into blocks.
#pragma once

#include "level.h"
#include "simd.h"

namespace {

using losa::kKeys;
using losa::kLanes;
using losa::kRows;
using losa::stride_of;

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls body(Count<n>) for n in 1 .. 6.
template <class Body>
inline void with_count(int n, Body body) {
  switch (n) {
    case 1: return body(Count<1>{});
    case 2: return body(Count<2>{});
    case 3: return body(Count<3>{});
    case 4: return body(Count<4>{});
    case 5: return body(Count<5>{});
    default: return body(Count<6>{});
  }
}

// Cuts 0 .. total into pieces of at most `most`, as equal as possible, and calls body(first, Count<size>).
template <class Body>
inline void in_pieces(int total, int most, Body body) {
  const int pieces = (total + most - 1) / most;
  for (int i = 0, first = 0; i < pieces; ++i) {
    const int size = (total - first + pieces - i - 1) / (pieces - i);
    with_count(size, [&](auto count) { body(first, count); });
    first += size;
  }
}

constexpr int pieces_of(int total, int most) {
  return (total + most - 1) / most;
}

// A vector of any dtype as floats, zeros up to the stride.
inline void widen_row(const void* from, int64_t at, int dtype, int dim, int stride, float* to) {
  int d = 0;
  for (; d + W <= dim; d += W) store(to + d, load_as(from, at + d, dtype));
  for (; d < dim; ++d) to[d] = load_one(from, at + d, dtype);
  for (; d < stride; ++d) to[d] = 0.0f;
}

// Pointers to the vectors of a tile as floats; copies only what is not float already or ends within a vector.
inline void tile_rows(const void* from, int dtype, int dim, const int64_t* where, int count, float* copies,
                      const float** rows) {
  if (dtype == LOSA_F32 && dim % kLanes == 0) {
    for (int i = 0; i < count; ++i) rows[i] = (const float*)from + where[i];
    return;
  }
  const int stride = stride_of(dim);
  for (int i = 0; i < count; ++i) {
    widen_row(from, where[i], dtype, dim, stride, copies + i * stride);
    rows[i] = copies + i * stride;
  }
}

// Vectors that the next tile will read, fetched line by line while this one is computed: a list of pages jumps about in
// memory, and the hardware does not foresee where to.
struct Ahead {
  const char* base;
  const int64_t* where;
  int64_t each, bytes, at = 0;  // bytes of a number and of a vector; next line of the vector
  int left, pace = 0;           // vectors still to be fetched; lines per step

  // steps: how often `step` will be called.
  Ahead(const void* from, int dtype, int dim, const int64_t* places, int count, int steps)
      : base((const char*)from), where(places), each(losa::bytes_of(dtype)), bytes(dim * each), left(count) {
    if (count > 0) pace = (int)(((bytes + 63) / 64 * count + steps - 1) / steps);
  }
  inline void step() {
    for (int i = 0; i < pace && left; ++i) {
      __builtin_prefetch(base + *where * each + at, 0, 2);  // to the second cache: the innermost is full of this tile
      at += 64;
      if (at >= bytes) at = 0, ++where, --left;
    }
  }
};

// out [R, kKeys] = q [R, stride] times turned keys, N vectors of columns.
template <int R, int N>
inline void dots(const float* q, int stride, const float* turned, int depth, float* out, Ahead& ahead) {
  V sum[R][N];
  LOSA_UNROLL
  for (int r = 0; r < R; ++r) LOSA_UNROLL
  for (int n = 0; n < N; ++n) sum[r][n] = splat(0.0f);
  for (int d = 0; d < depth; ++d) {
    V keys[N];
    ahead.step();
    LOSA_UNROLL
    for (int n = 0; n < N; ++n) keys[n] = load(turned + d * kKeys + n * W);
    LOSA_UNROLL
    for (int r = 0; r < R; ++r) {
      const V each = splat(q[r * stride + d]);
      LOSA_UNROLL
      for (int n = 0; n < N; ++n) sum[r][n] = fma(each, keys[n], sum[r][n]);
    }
  }
  LOSA_UNROLL
  for (int r = 0; r < R; ++r) LOSA_UNROLL
  for (int n = 0; n < N; ++n) store(out + r * kKeys + n * W, sum[r][n]);
}

// The same for bounds: `turned` holds maxima in its first dim lines and minima in the next. A product is largest with
// the maximum where the query is positive and with the minimum where it is negative, so each of its numbers meets one
// of the two: half the products of [q+, q-] . [maxima; minima].
template <int R, int N>
inline void signed_dots(const float* q, int stride, const float* turned, int dim, float* out, Ahead& ahead) {
  V sum[R][N];
  const int64_t apart = (int64_t)dim * kKeys;
  LOSA_UNROLL
  for (int r = 0; r < R; ++r) LOSA_UNROLL
  for (int n = 0; n < N; ++n) sum[r][n] = splat(0.0f);
  for (int d = 0; d < dim; ++d) {
    ahead.step();
    LOSA_UNROLL
    for (int r = 0; r < R; ++r) {
      const float number = q[r * stride + d];
      const V each = splat(number);
      const float* bounds = turned + d * kKeys + (-(int64_t)(to_bits(number) >> 31) & apart);
      LOSA_UNROLL
      for (int n = 0; n < N; ++n) sum[r][n] = fma(each, load(bounds + n * W), sum[r][n]);
    }
  }
  LOSA_UNROLL
  for (int r = 0; r < R; ++r) LOSA_UNROLL
  for (int n = 0; n < N; ++n) store(out + r * kKeys + n * W, sum[r][n]);
}

// acc [R, stride] = acc * shrink + weights [R, kKeys] times values, N vectors of channels.
template <int R, int N>
inline void mix(const float* weights, const float* const* values, int first, int count, const float* shrink, float* acc,
                int stride, Ahead& ahead) {
  V sum[R][N];
  LOSA_UNROLL
  for (int r = 0; r < R; ++r) LOSA_UNROLL
  for (int n = 0; n < N; ++n) sum[r][n] = load(acc + r * stride + first + n * W) * splat(shrink[r]);
  for (int i = 0; i < count; ++i) {
    const float* row = values[i] + first;
    ahead.step();
    V value[N];
    LOSA_UNROLL
    for (int n = 0; n < N; ++n) value[n] = load(row + n * W);
    LOSA_UNROLL
    for (int r = 0; r < R; ++r) {
      const V each = splat(weights[r * kKeys + i]);
      LOSA_UNROLL
      for (int n = 0; n < N; ++n) sum[r][n] = fma(each, value[n], sum[r][n]);
    }
  }
  LOSA_UNROLL
  for (int r = 0; r < R; ++r) LOSA_UNROLL
  for (int n = 0; n < N; ++n) store(acc + r * stride + first + n * W, sum[r][n]);
}

}  // namespace
