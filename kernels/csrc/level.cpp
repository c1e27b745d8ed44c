// The functions of one instruction set. Compiled once per level, with that level's flags and its table's name in
// LOSA_LEVEL_TABLE.
#include "level.h"
#include "products.h"
#include "simd.h"
#include "tile.h"
#include "turn.h"

namespace {

using losa::Keys;
using losa::State;
using losa::Tiles;

// Weights of one row against a tile: scores become e^(score - top); returns by what older sums shrink.
inline float weigh(float* scores, int columns, int seen, float* top, float* lanes) {
  V best = splat(kMinusInfinity);
  for (int i = 0; i < columns; i += W) {
    V score = load(scores + i);
    if (seen < i + W) {
      score = count_from(i) < I{} + seen ? score : splat(kMinusInfinity);
      store(scores + i, score);
    }
    best = larger(score, best);
  }
  const float before = *top, found = largest_of(best), now = found > before ? found : before;
  if (now == kMinusInfinity) {  // nothing seen yet: weights 0 instead of e^(-inf + inf)
    for (int i = 0; i < columns; i += W) {
      const V score = load(scores + i);  // a NaN must not be lost here
      store(scores + i, score == score ? splat(0.0f) : score);
    }
    return 1.0f;
  }
  V shift = splat(now), sum = splat(0.0f);
  for (int i = 0; i < columns; i += W) {
    const V weight = exponential(load(scores + i) - shift);
    store(scores + i, weight);
    sum += weight;
  }
  float shrink[W];
  store(shrink, exponential(splat(before) - shift));
  store(lanes, fma(load(lanes), splat(shrink[0]), sum));
  *top = now;
  return shrink[0];
}

// The largest of a tile's scores per page; `from` counts keys from the start of a page.
inline void note_peaks(const float* scores, int from, int count, int page_size, float* peaks) {
  for (int i = 0; i < count;) {
    const int inside = (from + i) % page_size, left = page_size - inside, run = count - i < left ? count - i : left;
    float* peak = peaks + (from + i) / page_size;
    float best = inside ? *peak : kMinusInfinity;
    int j = 0;
    if (run >= W) {
      V most = splat(best);
      for (; j + W <= run; j += W) most = larger(load(scores + i + j), most);
      best = largest_of(most);
    }
    for (; j < run; ++j) best = scores[i + j] > best ? scores[i + j] : best;
    *peak = best;
    i += run;
  }
}

template <int R>
inline void dots_of_rows(const float* q, int stride, int depth, int columns, const Tiles& tiles, float* scores,
                         Ahead& ahead) {
  in_pieces(columns / W, kAcross, [&](int first, auto across) {
    dots<R, (across.value < kAcross ? across.value : kAcross)>(q, stride, tiles.turned + first * W, depth,
                                                               scores + first * W, ahead);
  });
}

void attend(const float* q, int rows, const Keys& keys, const int32_t* visible, State state, const Tiles& tiles,
            const losa::Peaks* peaks) {
  const int dim = keys.dim, stride = stride_of(dim);
  for (int i = 0; i < rows * stride; ++i) state.acc[i] = 0.0f;
  for (int i = 0; i < rows * kLanes; ++i) tiles.lanes[i] = 0.0f;
  for (int r = 0; r < rows; ++r) state.top[r] = kMinusInfinity;
  Ahead opening(keys.v, keys.dtype, dim, keys.where, keys.count < kKeys ? keys.count : kKeys, 1);
  opening.step();  // the first values arrive while the first keys are turned and multiplied
  for (int start = 0; start < keys.count; start += kKeys) {
    const int count = keys.count - start < kKeys ? keys.count - start : kKeys, columns = whole_vectors(count);
    const float* values[kKeys];
    const int follow = keys.count - start - count, next = follow < kKeys ? follow : kKeys;
    const int64_t* then = keys.where + start + count;
    Ahead k_ahead(keys.k, keys.dtype, dim, then, next, pieces_of(rows, kDown) * pieces_of(columns / W, kAcross) * dim);
    Ahead v_ahead(keys.v, keys.dtype, dim, then, next, pieces_of(rows, kDown) * pieces_of(stride / W, kAcross) * count);
    turn_tile(keys.k, keys.dtype, dim, keys.where + start, count, tiles.keys, tiles.turned);
    tile_rows(keys.v, keys.dtype, dim, keys.where + start, count, tiles.values, values);
    in_pieces(rows, kDown, [&](int first, auto down) {
      constexpr int R = down.value;
      float* weights = tiles.weights + first * kKeys;
      dots_of_rows<R>(q + first * stride, stride, dim, columns, tiles, weights, k_ahead);
      float shrink[R];
      for (int r = 0; r < R; ++r) {
        int seen = visible ? visible[first + r] - start : count;
        seen = seen < count ? (seen > 0 ? seen : 0) : count;
        float* lanes = tiles.lanes + (first + r) * kLanes;
        if (peaks) note_peaks(weights + r * kKeys, start, count, peaks->page_size, peaks->rows[first + r]);
        shrink[r] = weigh(weights + r * kKeys, columns, seen, state.top + first + r, lanes);
      }
      in_pieces(stride / W, kAcross, [&](int part, auto across) {
        mix<R, (across.value < kAcross ? across.value : kAcross)>(weights, values, part * W, count, shrink,
                                                                  state.acc + first * stride, stride, v_ahead);
      });
    });
  }
  for (int r = 0; r < rows; ++r) state.sum[r] = sum_of(load(tiles.lanes + r * kLanes));
}

void add(State into, State from, int rows, int dim) {
  const int stride = stride_of(dim);
  for (int r = 0; r < rows; ++r) {
    const float top = into.top[r] > from.top[r] ? into.top[r] : from.top[r];
    if (top == kMinusInfinity) continue;
    const float mine = __builtin_expf(into.top[r] - top), other = __builtin_expf(from.top[r] - top);
    float *a = into.acc + r * stride, *b = from.acc + r * stride;
    for (int d = 0; d < stride; d += W) store(a + d, fma(load(b + d), splat(other), load(a + d) * splat(mine)));
    into.sum[r] = into.sum[r] * mine + from.sum[r] * other;
    into.top[r] = top;
  }
}

// out = a * left + b * right
inline void blend(const float* a, float left, const float* b, float right, float* out, int dim) {
  int d = 0;
  for (; d + W <= dim; d += W) store(out + d, fma(load(b + d), splat(right), load(a + d) * splat(left)));
  for (; d < dim; ++d) out[d] = __builtin_fmaf(b[d], right, a[d] * left);
}

void merge(const float* a, float lse_a, const float* b, float lse_b, float* out, int dim) {
  const float top = lse_a > lse_b ? lse_a : lse_b;
  if (top == kMinusInfinity) {
    for (int d = 0; d < dim; ++d) out[d] = 0.0f;
    return;
  }
  const float left = __builtin_expf(lse_a - top), right = __builtin_expf(lse_b - top), total = left + right;
  blend(a, left / total, b, right / total, out, dim);
}

void finish(State state, int rows, int dim, float* const* out, float* const* lse, const float* const* other_out,
            const float* const* other_lse) {
  const int stride = stride_of(dim);
  for (int r = 0; r < rows; ++r) {
    const float* acc = state.acc + r * stride;
    const float sum = state.sum[r], part = state.top[r] + __builtin_logf(sum);
    if (lse) *lse[r] = state.top[r] == kMinusInfinity && sum == 0.0f ? kMinusInfinity : part;
    if (other_out && *other_lse[r] != kMinusInfinity) {
      const float most = state.top[r] > *other_lse[r] ? state.top[r] : *other_lse[r];
      const float mine = __builtin_expf(state.top[r] - most), other = __builtin_expf(*other_lse[r] - most);
      const float total = mine * sum + other;
      blend(acc, mine / total, other_out[r], other / total, out[r], dim);
    } else {
      const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
      for (int d = 0; d < dim; ++d) out[r][d] = acc[d] * share;
    }
  }
}

void bounds_scores(const float* q, int rows, int share, const Keys& keys, float* const* out, const Tiles& tiles) {
  const int columns = whole_vectors(keys.count), stride = stride_of(keys.dim), depth = 2 * keys.dim;
  Ahead ahead(keys.k, keys.dtype, depth, keys.where + keys.count, keys.ahead,
              pieces_of(rows, kDown) * pieces_of(columns / W, kAcross) * keys.dim);
  turn_tile(keys.k, keys.dtype, depth, keys.where, keys.count, tiles.keys, tiles.turned);
  in_pieces(rows, kDown, [&](int first, auto down) {
    in_pieces(columns / W, kAcross, [&](int part, auto across) {
      signed_dots<down.value, (across.value < kAcross ? across.value : kAcross)>(
          q + first * stride, stride, tiles.turned + part * W, keys.dim, tiles.weights + first * kKeys + part * W,
          ahead);
    });
  });
  for (int r = 0; r < rows; r += share) {
    float* best = tiles.weights + r * kKeys;
    for (int other = 1; other < share; ++other)
      for (int i = 0; i < columns; i += W) store(best + i, larger(load(best + other * kKeys + i), load(best + i)));
    for (int i = 0; i < keys.count; ++i) out[r / share][i] = best[i];
  }
}

void mass(const float* q, const float* lse, int rows, const Keys& keys, const Tiles& tiles) {
  const int columns = whole_vectors(keys.count), stride = stride_of(keys.dim);
  Ahead ahead(keys.k, keys.dtype, keys.dim, keys.where + keys.count, keys.ahead,
              pieces_of(rows, kDown) * pieces_of(columns / W, kAcross) * keys.dim);
  turn_tile(keys.k, keys.dtype, keys.dim, keys.where, keys.count, tiles.keys, tiles.turned);
  in_pieces(rows, kDown, [&](int first, auto down) {
    dots_of_rows<down.value>(q + first * stride, stride, keys.dim, columns, tiles, tiles.weights + first * kKeys,
                             ahead);
  });
  for (int r = 0; r < rows; ++r) {
    const V shift = splat(lse[r] == kMinusInfinity ? -kMinusInfinity : lse[r]);
    for (int i = 0; i < columns; i += W) {
      float* at = tiles.weights + r * kKeys + i;
      const V x = load(at) - shift;
      store(at, x > splat(88.0f) ? splat(-kMinusInfinity) : exponential(x));
    }
  }
}

// A float's place in the order of all floats as a number; both zeros are equal and NaN is the largest.
inline int32_t rank_of(float x) {
  const int32_t bits = (int32_t)to_bits(x + 0.0f);
  return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : 0x7fffffff;
}

inline int64_t count_from_bar(const float* ranks, int64_t n, int32_t bar) {
  I found = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) found -= (I)load(ranks + i) >= I{} + bar;
  int64_t count = 0;
  for (int lane = 0; lane < W; ++lane) count += found[lane];
  for (; i < n; ++i) count += (int32_t)to_bits(ranks[i]) >= bar;
  return count;
}

void mark_best(float* scores, int64_t n, int64_t best, uint8_t* marked) {
  if (best >= n) {
    for (int64_t i = 0; i < n; ++i) marked[i] = 1;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t rank = rank_of(scores[i]);
    __builtin_memcpy(scores + i, &rank, sizeof rank);
  }
  // The best-th largest rank, found bit by bit: the largest bar that at least `best` ranks reach.
  uint32_t bar = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1)
    if (count_from_bar(scores, n, (int32_t)((bar | bit) ^ 0x80000000u)) >= best) bar |= bit;
  const int32_t last = (int32_t)(bar ^ 0x80000000u);
  int64_t level = best - (last == 0x7fffffff ? 0 : count_from_bar(scores, n, last + 1));
  for (int64_t i = 0; i < n; ++i) {
    const int32_t rank = (int32_t)to_bits(scores[i]);
    if (rank > last || (rank == last && level-- > 0)) marked[i] = 1;
  }
}

float distance(const void* a, const void* b, int dtype, int64_t count) {
  V sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W) {
    LOSA_UNROLL
    for (int n = 0; n < 4; ++n) {
      const V d = load_as(a, i + n * W, dtype) - load_as(b, i + n * W, dtype);
      sums[n] = fma(d, d, sums[n]);
    }
  }
  float total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) {
    const float d = load_one(a, i, dtype) - load_one(b, i, dtype);
    total += d * d;
  }
  return total;
}

void copy(const void* from, int from_dtype, void* to, int to_dtype, int dim) {
  if (from_dtype == to_dtype) {
    __builtin_memcpy(to, from, (unsigned long)(dim * losa::bytes_of(to_dtype)));
    return;
  }
  int d = 0;
#if defined(__AVX512F__)
  if (to_dtype == LOSA_F16)
    for (; d + W <= dim; d += W)
      _mm256_storeu_si256((__m256i*)((uint16_t*)to + d), _mm512_cvtps_ph(load_as(from, d, from_dtype), 0));
#elif defined(__AVX2__)
  if (to_dtype == LOSA_F16)
    for (; d + W <= dim; d += W)
      _mm_storeu_si128((__m128i*)((uint16_t*)to + d), _mm256_cvtps_ph(load_as(from, d, from_dtype), 0));
#endif
  for (; d < dim; ++d) store_one(to, d, to_dtype, load_one(from, d, from_dtype));
}

void bounds(const void* keys, int dtype, int dim, int count, void* top, void* bottom, float* buffer) {
  const int stride = stride_of(dim);
  float *high = buffer, *low = buffer + stride, *row = buffer + 2 * stride;
  widen_row(keys, 0, dtype, dim, stride, high);
  for (int d = 0; d < stride; d += W) store(low + d, load(high + d));
  for (int i = 1; i < count; ++i) {
    widen_row(keys, (int64_t)i * dim, dtype, dim, stride, row);
    for (int d = 0; d < stride; d += W) {
      store(high + d, larger(load(row + d), load(high + d)));
      store(low + d, smaller(load(row + d), load(low + d)));
    }
  }
  for (int d = 0; d < dim; ++d) {
    store_one(top, d, dtype, high[d]);
    store_one(bottom, d, dtype, low[d]);
  }
}

// In two rounds, as the mean square less the square of the mean would cancel.
void moments(const void* keys, int dtype, int dim, int count, float* mean, float* spread, float* buffer) {
  const int stride = stride_of(dim);
  const V each = splat((float)count);
  float *middle = buffer, *wide = buffer + stride, *row = buffer + 2 * stride;
  for (int d = 0; d < 2 * stride; d += W) store(middle + d, splat(0.0f));
  for (int i = 0; i < count; ++i) {
    widen_row(keys, (int64_t)i * dim, dtype, dim, stride, row);
    for (int d = 0; d < stride; d += W) store(middle + d, load(middle + d) + load(row + d));
  }
  for (int d = 0; d < stride; d += W) store(middle + d, load(middle + d) / each);
  for (int i = 0; i < count; ++i) {
    widen_row(keys, (int64_t)i * dim, dtype, dim, stride, row);
    for (int d = 0; d < stride; d += W) {
      const V off = load(row + d) - load(middle + d);
      store(wide + d, load(wide + d) + off * off);
    }
  }
  for (int d = 0; d < stride; d += W) store(wide + d, load(wide + d) / each);
  __builtin_memcpy(mean, middle, (unsigned long)dim * sizeof(float));
  __builtin_memcpy(spread, wide, (unsigned long)dim * sizeof(float));
}

}  // namespace

namespace losa {

extern const Level LOSA_LEVEL_TABLE = {attend, add,    finish,  bounds_scores, mass,     mark_best, distance,
                                       copy,   bounds, moments, merge,         products, gate};

}  // namespace losa
