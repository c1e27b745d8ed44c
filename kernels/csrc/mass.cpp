// How much softmax mass each granule of a prefix holds, per query head: scores and exponentials of all rows against all
// keys, in chunks of whole granules. Knows nothing of values, nor of what the mass is used for.
#include <algorithm>

#include "attend.h"

namespace losa {

namespace {

constexpr int64_t kKeysPerTask = 512;  // fixed, so that sums do not depend on the number of threads

struct Task {  // granules from .. until of one segment and KV head
  int64_t segment, from, until;
  int kv_head;
};

struct Mass {  // what all tasks of a call share
  const Level& level;
  const LosaPool& pool;
  const LosaGroup& group;
  const LosaQuery& query;
  const float* lse;
  int64_t granule, width;
  bool largest;
  float* out;
  int heads() const { return query.heads / pool.kv_heads; }
  int folded() const { return static_cast<int>(group.block_length) * heads(); }
};

struct Bench {  // one thread's scratch
  Tiles tiles;
  float *q, *lse, *open, *columns;
};

// Folded row i is row i / heads, head i % heads. open: its mass so far of the granule that a tile left unfinished.
// columns [heads, kKeys]: masses of the keys of a tile, summed over rows.
int64_t scratch_size(const Mass& mass) {
  return static_cast<int64_t>(mass.folded()) * (stride_of(mass.pool.head_dim) + 2) + mass.heads() * kKeys;
}

Bench bench(const Workspace& space, int thread, const Mass& mass) {
  const int64_t rows = mass.folded();
  float* q = space.extra(thread);
  float* lse = q + rows * stride_of(mass.pool.head_dim);
  return {space.tiles(thread), q, lse, lse + rows, lse + 2 * rows};
}

void pack(const Mass& mass, const Task& task, const Bench& mine) {
  const int dim = mass.pool.head_dim, stride = stride_of(dim), heads = mass.heads();
  for (int i = 0; i < mass.folded(); ++i) {
    const int64_t row = task.segment * mass.group.block_length + i / heads;
    const int64_t at = row * mass.query.heads + task.kv_head * heads + i % heads;
    float* to = mine.q + static_cast<int64_t>(i) * stride;
    for (int d = 0; d < dim; ++d) to[d] = mass.query.q[at * dim + d] * mass.query.scale;
    std::fill(to + dim, to + stride, 0.0f);
    mine.lse[i] = mass.lse[at];
    mine.open[i] = 0.0f;
  }
}

inline float larger_or_nan(float best, float x) {
  return x > best || x != x ? x : best;
}

// Adds the masses [rows, kKeys] of some folded rows against a tile of keys to the columns.
void add_rows(const float* weights, int first, int rows, int count, int heads, float* columns) {
  for (int i = 0; i < rows; ++i) {
    float* sum = columns + (first + i) % heads * kKeys;
    for (int c = 0; c < count; ++c) sum[c] += weights[i * kKeys + c];
  }
}

// Adds up the granules of each folded row and keeps the largest of the rows. key: first key's place in the prefix;
// ends: whether the tile's last key ends its granule.
void keep_largest(const float* weights, int first, int rows, int count, int64_t key, bool ends, const Mass& mass,
                  float* open, float* out) {
  const int64_t granule = key / mass.granule, left = (granule + 1) * mass.granule - key;
  for (int i = 0; i < rows; ++i) {
    const float* mine = weights + i * kKeys;
    float* best = out + (first + i) % mass.heads() * mass.width + granule;
    if (mass.granule == 1) {
      for (int c = 0; c < count; ++c) best[c] = larger_or_nan(best[c], mine[c]);
      continue;
    }
    float sum = open[first + i];
    for (int64_t c = 0, until = left; c < count; until += mass.granule, ++best) {
      for (; c < count && c < until; ++c) sum += mine[c];
      if (c < until && !ends) break;
      *best = larger_or_nan(*best, sum);
      sum = 0.0f;
    }
    open[first + i] = sum;
  }
}

void run_tile(const Mass& mass, const KeyList& keys, int64_t from, int count, const Bench& mine, float* out) {
  const int stride = stride_of(mass.pool.head_dim), heads = mass.heads();
  const int known = static_cast<int>(std::min<int64_t>(count + kKeys, keys.count - from));
  int64_t where[2 * kKeys];
  keys.locate(from, known, where);
  if (!mass.largest) std::fill(mine.columns, mine.columns + heads * kKeys, 0.0f);
  const bool ends = from + count == keys.count || (from + count) % mass.granule == 0;
  for (int first = 0; first < mass.folded(); first += kRows) {
    const int rows = std::min(kRows, mass.folded() - first);
    mass.level.mass(mine.q + static_cast<int64_t>(first) * stride, mine.lse + first, rows,
                    {mass.pool.k, nullptr, mass.pool.dtype, mass.pool.head_dim, where, count, known - count},
                    mine.tiles);
    if (mass.largest)
      keep_largest(mine.tiles.weights, first, rows, count, from, ends, mass, mine.open, out);
    else
      add_rows(mine.tiles.weights, first, rows, count, heads, mine.columns);
  }
  for (int h = 0; h < heads && !mass.largest; ++h)
    for (int c = 0; c < count; ++c) out[h * mass.width + (from + c) / mass.granule] += mine.columns[h * kKeys + c];
}

void run_task(const Mass& mass, const Task& task, const Bench& mine) {
  KeyList keys;
  keys.table = mass.group.table + mass.group.table_indptr[task.segment];
  keys.count = mass.group.prefix_lens[task.segment];
  keys.page_size = mass.pool.page_size, keys.kv_heads = mass.pool.kv_heads;
  keys.kv_head = task.kv_head, keys.dim = mass.pool.head_dim;
  float* out = mass.out + (task.segment * mass.query.heads + task.kv_head * mass.heads()) * mass.width;
  pack(mass, task, mine);
  const int64_t end = std::min(task.until * mass.granule, keys.count);
  for (int64_t from = task.from * mass.granule; from < end; from += kKeys)
    run_tile(mass, keys, from, static_cast<int>(std::min<int64_t>(kKeys, end - from)), mine, out);
  for (int h = 0; h < mass.heads() && !mass.largest; ++h)
    for (int64_t j = task.from; j < task.until; ++j)
      out[h * mass.width + j] /= static_cast<float>(mass.group.block_length);
}

void check(const Mass& mass) {
  check_pool(mass.pool);
  check_tables(mass.pool, mass.group, mass.group.prefix_lens);
  if (mass.query.heads < 1 || mass.query.heads % mass.pool.kv_heads)
    throw Refusal("%d query heads cannot share %d KV heads", mass.query.heads, mass.pool.kv_heads);
  if (mass.query.rows) throw Refusal("rows: found %lld, allowed: all", (long long)mass.query.count);
  rows_of_segments(mass.query, mass.group);
  if (mass.granule < 1) throw Refusal("granule: found %lld, allowed: at least 1", (long long)mass.granule);
}

std::vector<Task> tasks_of(const Mass& mass) {
  const int64_t each = std::max<int64_t>(1, kKeysPerTask / mass.granule);
  std::vector<Task> tasks;
  for (int64_t s = 0; s < mass.group.segments; ++s) {
    const int64_t granules = (mass.group.prefix_lens[s] + mass.granule - 1) / mass.granule;
    if (granules > mass.width)
      throw Refusal("width: found %lld, allowed: at least %lld", (long long)mass.width, (long long)granules);
    for (int g = 0; g < mass.pool.kv_heads; ++g)
      for (int64_t from = 0; from < granules; from += each)
        tasks.push_back({s, from, std::min(from + each, granules), g});
  }
  return tasks;
}

}  // namespace

}  // namespace losa

using namespace losa;

extern "C" int losa_prefix_mass(LosaRun* run, const LosaPool* pool, const LosaGroup* group, const LosaQuery* query,
                                const float* lse, int64_t granule, int32_t largest, int64_t width, float* mass) {
  return guarded(run, [&](const Level& level) {
    const Mass all = {level, *pool, *group, *query, lse, granule, width, largest != 0, mass};
    check(all);
    const std::vector<Task> tasks = tasks_of(all);
    const Workspace space(run->threads, pool->head_dim, scratch_size(all));
    std::fill(mass, mass + group->segments * query->heads * width, 0.0f);
    in_parallel(run->threads, static_cast<int64_t>(tasks.size()),
                [&](int64_t t, int thread) { run_task(all, tasks[t], bench(space, thread, all)); });
  });
}
