// What the drivers ask of one instruction set: a table of functions, one table per level.
//
// The functions are compiled once per level with that level's flags (level.cpp) and only ever called through a table
// that `level_of` hands out for a level which this CPU has.
#pragma once

#include <cstdint>

#include "losa_kernels.h"

namespace losa {

constexpr int kRows = 64;     // folded query rows per work item
constexpr int kKeys = 64;     // keys per tile
constexpr int kChunk = 1024;  // keys per split: fixed, so that a result does not depend on who computed it
constexpr int kMaxDim = 512;  // largest head dim
constexpr int kLanes = 16;    // strides are multiples of this, the widest vector

constexpr int stride_of(int dim) {
  return (dim + kLanes - 1) / kLanes * kLanes;
}

// Running softmax of some rows: acc [rows, stride] not normalised, top and sum [rows].
struct State {
  float* acc;
  float* top;
  float* sum;
};

// Keys of one chunk: where[i] is the element offset of key i's vector in k and in v. `ahead` further places follow in
// `where`, those that will be read next; `attend` finds its own.
struct Keys {
  const void* k;
  const void* v;
  int dtype;
  int dim;
  const int64_t* where;
  int count;
  int ahead = 0;
};

// Scratch of one thread, see Workspace.
struct Tiles {
  float* turned;   // [stride, kKeys] keys with the head dim outermost
  float* keys;     // [kKeys, stride] widened keys
  float* values;   // [kKeys, stride] widened values
  float* weights;  // [kRows, kKeys]
  float* lanes;    // [kRows, kLanes] partial sums
};

// Where the largest score of each page goes: row i's pages lie at rows[i][0 ..], the chunk begins with a page.
struct Peaks {
  float* rows[kRows];
  int page_size;
};

struct Level {
  // Softmax state of `rows` scaled queries [rows, stride] over the keys. visible [rows]: how many leading keys of
  // the chunk a row sees; null: all. peaks: null: not wanted; only without `visible`.
  void (*attend)(const float* q, int rows, const Keys&, const int32_t* visible, State, const Tiles&, const Peaks*);
  // into = into + from, two disjoint key sets.
  void (*add)(State into, State from, int rows, int dim);
  // Normalised outputs to out[row]; with a part over other keys (other_out[row], other_lse[row]) merged with it.
  void (*finish)(State, int rows, int dim, float* const* out, float* const* lse, const float* const* other_out,
                 const float* const* other_lse);
  // Upper bounds of the scores of `rows` queries [rows, stride] against up to kKeys pages, whose bounds, maximum then
  // minimum, lie at keys.where: the largest of every `share` rows goes to out[row / share][0 .. keys.count).
  void (*bounds_scores)(const float* q, int rows, int share, const Keys&, float* const* out, const Tiles&);
  // Softmax masses e^(q . k - lse) of `rows` queries [rows, stride] against up to kKeys keys, to tiles.weights; what
  // lies behind keys.count there means nothing. lse -inf: none.
  void (*mass)(const float* q, const float* lse, int rows, const Keys&, const Tiles&);
  // Marks the `best` largest of n scores, of equal ones the first; NaN counts as the largest. Overwrites the scores.
  void (*mark_best)(float* scores, int64_t n, int64_t best, uint8_t* marked);
  // Sum of squared differences of two vectors.
  float (*distance)(const void* a, const void* b, int dtype, int64_t count);
  // Copy a vector, converting between dtypes (round to nearest even).
  void (*copy)(const void* from, int from_dtype, void* to, int to_dtype, int dim);
  // Channel-wise maximum and minimum of `count` >= 1 consecutive vectors; buffer holds 3 * stride floats.
  void (*bounds)(const void* keys, int dtype, int dim, int count, void* top, void* bottom, float* buffer);
  // Channel-wise mean and mean squared deviation of `count` >= 1 consecutive vectors; buffer holds 3 * stride floats.
  void (*moments)(const void* keys, int dtype, int dim, int count, float* mean, float* spread, float* buffer);
  // out = a and b merged, one vector each.
  void (*merge)(const float* a, float lse_a, const float* b, float lse_b, float* out, int dim);
  // out[r][c] = rows[r] . weight row c, for `count` rows and the weight rows [first, behind), each of `width` numbers.
  void (*products)(const float* const* rows, int64_t count, int64_t width, const void* weights, int dtype,
                   int64_t first, int64_t behind, float* const* out);
  // gates = silu(gates) * ups.
  void (*gate)(float* gates, const float* ups, int64_t width);
};

extern const Level portable_level;
#ifdef LOSA_X86
extern const Level avx2_level, avx512_level;
#endif

// The table of a level, or null if this CPU or this build does not have it.
const Level* level_of(int level);

inline int64_t bytes_of(int dtype) {
  return dtype == LOSA_F32 ? 4 : 2;
}

}  // namespace losa
