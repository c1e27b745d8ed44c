// Products of rows with the rows of a weight matrix, and the gate between two of them.
//
// A product is summed over the lanes of one vector in the order of its terms, then over the lanes, then over what is
// left behind the last whole vector: the same bits in every tile, so a row does not depend on its company.
#pragma once

#include "simd.h"

namespace {

// out[r][c] of `Rows` rows and `Columns` weight rows.
template <int kind, int Rows, int Columns>
inline void product_tile(const float* const* rows, int64_t width, const void* weights, int64_t first,
                         float* const* out) {
  V sum[Rows][Columns];
  LOSA_UNROLL
  for (int r = 0; r < Rows; ++r) LOSA_UNROLL
  for (int c = 0; c < Columns; ++c) sum[r][c] = splat(0.0f);
  const int64_t whole = width / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    V weight[Columns];
    LOSA_UNROLL
    for (int c = 0; c < Columns; ++c) weight[c] = load_as(weights, (first + c) * width + i, kind);
    LOSA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const V x = load(rows[r] + i);
      LOSA_UNROLL
      for (int c = 0; c < Columns; ++c) sum[r][c] = fma(x, weight[c], sum[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) {
      float total = sum_of(sum[r][c]);
      for (int64_t i = whole; i < width; ++i) total += rows[r][i] * load_one(weights, (first + c) * width + i, kind);
      out[r][first + c] = total;
    }
}

template <int kind, int Columns>
inline void product_columns(const float* const* rows, int64_t count, int64_t width, const void* weights, int64_t first,
                            float* const* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) product_tile<kind, 4, Columns>(rows + r, width, weights, first, out + r);
  for (; r < count; ++r) product_tile<kind, 1, Columns>(rows + r, width, weights, first, out + r);
}

// A few weight rows stay in the nearest cache while all rows pass by.
template <int kind>
inline void products_of(const float* const* rows, int64_t count, int64_t width, const void* weights, int64_t first,
                        int64_t behind, float* const* out) {
  int64_t c = first;
  for (; c + kAcross <= behind; c += kAcross) product_columns<kind, kAcross>(rows, count, width, weights, c, out);
  for (; c < behind; ++c) product_columns<kind, 1>(rows, count, width, weights, c, out);
}

void products(const float* const* rows, int64_t count, int64_t width, const void* weights, int dtype, int64_t first,
              int64_t behind, float* const* out) {
  if (dtype == LOSA_F32)
    products_of<LOSA_F32>(rows, count, width, weights, first, behind, out);
  else if (dtype == LOSA_BF16)
    products_of<LOSA_BF16>(rows, count, width, weights, first, behind, out);
  else
    products_of<LOSA_F16>(rows, count, width, weights, first, behind, out);
}

// gate = gate / (1 + e^-gate) * up. The exponential is defined up to 88; beyond, the quotient is 0 to rounding.
void gate(float* gates, const float* ups, int64_t width) {
  const V one = splat(1.0f), most = splat(87.0f);
  float a[W], b[W];
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    const V g = load(gates + i);
    store(gates + i, g / (one + exponential(smaller(splat(0.0f) - g, most))) * load(ups + i));
  }
  if (i == width) return;
  store(a, splat(0.0f));
  store(b, splat(0.0f));
  const unsigned long rest = (unsigned long)(width - i) * sizeof(float);
  __builtin_memcpy(a, gates + i, rest);
  __builtin_memcpy(b, ups + i, rest);
  const V g = load(a);
  store(a, g / (one + exponential(smaller(splat(0.0f) - g, most))) * load(b));
  __builtin_memcpy(gates + i, a, rest);
}

}  // namespace
