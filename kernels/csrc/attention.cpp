// The attention calls of the C interface: each turns its question into work items.
#include <algorithm>
#include <limits>

#include "attend.h"

namespace losa {

namespace {

void check_query(const LosaQuery& query, int kv_heads) {
  if (query.heads < 1 || query.heads % kv_heads)
    throw Refusal("%d query heads cannot share %d KV heads", query.heads, kv_heads);
}

KeyList whole(const LosaPool& pool, const LosaGroup& group, int64_t segment, int64_t length, int kv_head) {
  KeyList keys;
  keys.table = group.table + group.table_indptr[segment];
  keys.count = length;
  keys.page_size = pool.page_size, keys.kv_heads = pool.kv_heads, keys.kv_head = kv_head, keys.dim = pool.head_dim;
  return keys;
}

// List `index` of a segment, checked: sorted, unique, inside the prefix.
KeyList listed(const LosaPool& pool, const LosaGroup& group, const LosaLists& lists, int64_t index, int64_t segment,
               int kv_head) {
  const int64_t first = lists.indptr[index], last = lists.indptr[index + 1], prefix = group.prefix_lens[segment];
  KeyList keys = whole(pool, group, segment, 0, kv_head);
  keys.granules = lists.indices + first;
  keys.granule = lists.granule;
  for (int64_t i = first, before = -1; i < last; before = lists.indices[i++])
    if (lists.indices[i] <= before || lists.indices[i] >= (prefix + lists.granule - 1) / lists.granule)
      throw Refusal("list %lld: found %lld after %lld, allowed: sorted granules of %lld inside %lld positions",
                    (long long)index, (long long)lists.indices[i], (long long)before, (long long)lists.granule,
                    (long long)prefix);
  if (last > first) {
    const int64_t end = (lists.indices[last - 1] + 1) * lists.granule;
    keys.count = (last - first) * lists.granule - std::max<int64_t>(0, end - prefix);
  }
  return keys;
}

void check_lists(const LosaLists& lists, const LosaPool& pool, const LosaQuery& query, int64_t owners) {
  if (lists.heads < pool.kv_heads || lists.heads % pool.kv_heads || query.heads % lists.heads || lists.granule < 1)
    throw Refusal("lists for %d heads of granules of %lld", lists.heads, (long long)lists.granule);
  const int64_t entries = owners * lists.heads;
  if (lists.indptr[0] != 0 || lists.indptr[entries] != lists.index_count)
    throw Refusal("indptr: found %lld to %lld, allowed: 0 to %lld", (long long)lists.indptr[0],
                  (long long)lists.indptr[entries], (long long)lists.index_count);
  for (int64_t e = 0; e < entries; ++e)
    if (lists.indptr[e] > lists.indptr[e + 1]) throw Refusal("indptr: falls at %lld", (long long)e);
}

void prefix_items(std::vector<Item>& items, const LosaPool& pool, const LosaGroup& group, const LosaQuery& query,
                  const LosaLists* lists, const std::vector<int64_t>& starts) {
  const int per_kv = query.heads / pool.kv_heads;
  for (int64_t s = 0; s < group.segments; ++s) {
    const int64_t row = starts[s], rows = starts[s + 1] - row;
    if (!lists || lists->whole[s]) {
      for (int g = 0; g < pool.kv_heads; ++g)
        add_items(items, whole(pool, group, s, group.prefix_lens[s], g), row, rows, g * per_kv, per_kv);
      continue;
    }
    const int per_list = query.heads / lists->heads;
    const int64_t owners = lists->per_row ? rows : 1, first = lists->per_row ? row : s;
    for (int64_t o = 0; o < owners; ++o)
      for (int e = 0; e < lists->heads; ++e) {
        const int g = e * pool.kv_heads / lists->heads;
        const KeyList keys = listed(pool, group, *lists, (first + o) * lists->heads + e, s, g);
        add_items(items, keys, row + o, lists->per_row ? 1 : rows, e * per_list, per_list);
      }
  }
}

void check_places(const LosaPrefix& prefix, int64_t rows) {
  if (!prefix.place) {
    if (prefix.places != rows)
      throw Refusal("states of the prefix: found %lld, allowed: %lld", (long long)prefix.places, (long long)rows);
    return;
  }
  std::vector<int64_t> sorted(prefix.place, prefix.place + rows);
  std::sort(sorted.begin(), sorted.end());
  for (int64_t r = 0; r < rows; ++r) {
    if (sorted[r] < 0 || sorted[r] >= prefix.places)
      throw Refusal("place: found %lld, allowed: 0 to %lld", (long long)sorted[r], (long long)prefix.places - 1);
    if (r && sorted[r] == sorted[r - 1]) throw Refusal("place: found %lld twice", (long long)sorted[r]);
  }
}

// The number of each row among those with a new state, -1 for the others.
std::vector<int64_t> fresh_of_rows(const LosaPrefix& prefix, int64_t rows) {
  if (prefix.count < 0 || (!prefix.rows && prefix.count && prefix.count != rows))
    throw Refusal("fresh states: found %lld, allowed: %lld", (long long)prefix.count, (long long)rows);
  std::vector<int64_t> fresh(rows, -1);
  for (int64_t i = 0, before = -1; i < prefix.count; ++i) {
    const int64_t row = prefix.rows ? prefix.rows[i] : i;
    if (row <= before || row >= rows)
      throw Refusal("fresh rows: found %lld after %lld, allowed: sorted, below %lld", (long long)row, (long long)before,
                    (long long)rows);
    fresh[row] = i;
    before = row;
  }
  return fresh;
}

void check_peaks(const LosaPool& pool, const LosaGroup& group, const LosaLists* lists,
                 const std::vector<int64_t>& starts, int64_t width) {
  if (kChunk % pool.page_size)
    throw Refusal("peaks of pages of %d, allowed: page sizes that divide %d", pool.page_size, kChunk);
  for (int64_t s = 0; s < group.segments; ++s) {
    const int64_t pages = (group.prefix_lens[s] + pool.page_size - 1) / pool.page_size;
    if (starts[s] < starts[s + 1] && (!lists || lists->whole[s]) && pages > width)
      throw Refusal("peaks: found room for %lld pages, needed: %lld", (long long)width, (long long)pages);
  }
}

}  // namespace

}  // namespace losa

using namespace losa;

extern "C" int losa_prefix(LosaRun* run, const LosaPool* pool, const LosaGroup* group, const LosaQuery* query,
                           const LosaLists* lists, float* out, float* lse, float* peaks, int64_t width) {
  return guarded(run, [&](const Level& level) {
    check_pool(*pool);
    check_query(*query, pool->kv_heads);
    check_tables(*pool, *group, group->prefix_lens);
    const std::vector<int64_t> starts = rows_of_segments(*query, *group);
    if (lists) check_lists(*lists, *pool, *query, lists->per_row ? query->count : group->segments);
    std::vector<Item> items;
    prefix_items(items, *pool, *group, *query, lists, starts);
    if (peaks) {
      check_peaks(*pool, *group, lists, starts, width);
      std::fill(peaks, peaks + query->count * query->heads * width, -std::numeric_limits<float>::infinity());
    }
    run_items({level, run->threads, pool->k, pool->v, pool->dtype, pool->head_dim, *query, 1, out, lse, nullptr, peaks,
               width, pool->page_size},
              items);
  });
}

extern "C" int losa_prefill(LosaRun* run, const LosaPool* pool, const LosaGroup* group, const LosaQuery* query,
                            const int64_t* counts, float* out) {
  return guarded(run, [&](const Level& level) {
    check_pool(*pool);
    check_query(*query, pool->kv_heads);
    const int64_t block = group->block_length;
    std::vector<int64_t> ends(group->segments);
    int64_t total = 0;
    for (int64_t s = 0; s < group->segments; ++s) {
      if (counts[s] < 1 || block < 1 || counts[s] % block || group->prefix_lens[s] % block)
        throw Refusal("segment %lld: %lld rows after %lld are not whole blocks of %lld", (long long)s,
                      (long long)counts[s], (long long)group->prefix_lens[s], (long long)block);
      ends[s] = group->prefix_lens[s] + counts[s];
      total += counts[s];
    }
    check_tables(*pool, *group, ends.data());
    if (query->rows || query->count != total || query->total != total)
      throw Refusal("rows: found %lld, allowed: all %lld", (long long)query->count, (long long)total);
    const int per_kv = query->heads / pool->kv_heads;
    const int64_t tile = std::max<int64_t>(1, kRows / per_kv / block) * block;  // positions that share the keys
    std::vector<Item> items;
    for (int64_t s = 0, row = 0; s < group->segments; row += counts[s++])
      for (int64_t first = group->prefix_lens[s]; first < ends[s];) {
        const int64_t last = std::min((first / tile + 1) * tile, ends[s]);  // edges do not move with the cut
        for (int g = 0; g < pool->kv_heads; ++g)
          add_items(items, whole(*pool, *group, s, last, g), row + first - group->prefix_lens[s], last - first,
                    g * per_kv, per_kv, first);
        first = last;
      }
    std::reverse(items.begin(), items.end());  // the longest first: threads end together
    run_items({level, run->threads, pool->k, pool->v, pool->dtype, pool->head_dim, *query, block, out, nullptr}, items);
  });
}

extern "C" int losa_block(LosaRun* run, const LosaQuery* query, const float* k, const float* v, int64_t block_length,
                          int32_t kv_heads, int32_t head_dim, const LosaPrefix* prefix, float* out, float* lse) {
  return guarded(run, [&](const Level& level) {
    check_pool({1, kv_heads, 1, head_dim, LOSA_F32, nullptr, nullptr, nullptr, nullptr});
    check_query(*query, kv_heads);
    if (block_length < 1 || query->total % block_length || query->rows || query->count != query->total)
      throw Refusal("rows: found %lld, allowed: whole blocks of %lld", (long long)query->count,
                    (long long)block_length);
    std::vector<Item> items;
    KeyList keys;
    keys.count = block_length;
    keys.step = static_cast<int64_t>(kv_heads) * head_dim;
    for (int64_t row = 0; row < query->count; row += block_length)
      for (int g = 0; g < kv_heads; ++g) {
        keys.first = row * keys.step + static_cast<int64_t>(g) * head_dim;
        add_items(items, keys, row, block_length, g * (query->heads / kv_heads), query->heads / kv_heads);
      }
    Others others;
    if (prefix) {
      check_places(*prefix, query->total);
      others = {prefix, fresh_of_rows(*prefix, query->total)};
    }
    run_items({level, run->threads, k, v, LOSA_F32, head_dim, *query, 1, out, lse, prefix ? &others : nullptr}, items);
  });
}

extern "C" int losa_merge(LosaRun* run, int64_t n, int32_t dim, const float* out_a, const float* lse_a,
                          const float* out_b, const float* lse_b, float* out) {
  return guarded(run, [&](const Level& level) {
    constexpr int64_t kEach = 512;
    in_parallel(run->threads, (n + kEach - 1) / kEach, [&](int64_t part, int) {
      for (int64_t i = part * kEach; i < std::min(n, (part + 1) * kEach); ++i)
        level.merge(out_a + i * dim, lse_a[i], out_b + i * dim, lse_b[i], out + i * dim, dim);
    });
  });
}
