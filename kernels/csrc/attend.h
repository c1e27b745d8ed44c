// Work items of attention: some folded query rows against one list of keys.
#pragma once

#include <vector>

#include "driver.h"

namespace losa {

// Where key i of a list lies, as an element offset into a cache.
struct KeyList {
  const int64_t* table = nullptr;     // pages of the request; null: `first` + i * `step` in a plain array
  const int64_t* granules = nullptr;  // null: positions 0, 1, 2, ...
  int64_t granule = 1, count = 0;     // count: keys
  int64_t first = 0, step = 0;
  int page_size = 1, kv_heads = 1, kv_head = 0, dim = 0;

  // where[i] for keys from .. from + n.
  void locate(int64_t from, int n, int64_t* where) const;
};

// Rows row .. row + rows of the computed ones, query heads head .. head + heads: rows * heads <= kRows folded rows.
struct Item {
  KeyList keys;
  int64_t row;
  int rows, head, heads;
  int64_t position;  // block-causal: position of the first row; -1: every row sees every key
};

// States over other keys that the rows are merged with. fresh [R]: the number of each row's new state; -1: it has none.
struct Others {
  const LosaPrefix* states = nullptr;
  std::vector<int64_t> fresh;
};

// Everything the items of one call have in common. rows: as in LosaQuery. out [count, H, D], lse [count, H] or null;
// others: null: none. peaks [count, H, width]: each row's largest score per page of `page_size` where it reads a whole
// prefix; null: not wanted.
struct Call {
  const Level& level;
  int threads;
  const void *k, *v;
  int dtype, dim;
  const LosaQuery& query;
  int64_t block_length;
  float *out, *lse;
  const Others* others = nullptr;
  float* peaks = nullptr;
  int64_t width = 0;
  int page_size = 1;
};

// Adds the items of these rows and heads, cut to kRows folded rows each.
void add_items(std::vector<Item>& items, const KeyList& keys, int64_t row, int64_t rows, int head, int heads,
               int64_t position = -1);

void run_items(const Call& call, const std::vector<Item>& items);

}  // namespace losa
