// Which pages and which rows: bounds of all rows and heads at once, the best pages, their union, the changed rows.
#include <algorithm>
#include <cstring>
#include <limits>

#include "driver.h"

namespace losa {

namespace {

constexpr int64_t kPagesPerTask = 1024;  // a multiple of kKeys

struct Task {  // bounds of some pages for the computed rows of one segment and one KV head
  int64_t segment, from, until;
  int kv_head;
};

// [q+, q-] of a query vector: the bound of q . k over a page is its product with [maximum, minimum].
void split_signs(const float* q, int dim, int stride, float* out) {
  for (int d = 0; d < dim; ++d) {
    out[d] = q[d] > 0.0f ? q[d] : 0.0f;
    out[dim + d] = q[d] > 0.0f ? 0.0f : q[d];
  }
  std::fill(out + 2 * dim, out + stride, 0.0f);
}

int64_t pages_of(const LosaPool& pool, const LosaGroup& group, int64_t segment) {
  return (group.prefix_lens[segment] + pool.page_size - 1) / pool.page_size;
}

std::vector<Task> tasks_of(const LosaPool& pool, const LosaGroup& group, const std::vector<int64_t>& starts,
                           const uint8_t* whole) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < group.segments; ++s) {
    if (starts[s] == starts[s + 1] || (whole && whole[s])) continue;
    const int64_t pages = pages_of(pool, group, s);
    for (int g = 0; g < pool.kv_heads; ++g)
      for (int64_t from = 0; from < pages; from += kPagesPerTask)
        tasks.push_back({s, from, std::min(from + kPagesPerTask, pages), g});
  }
  return tasks;
}

// Bounds of a task. With shared heads, out(row) holds the largest of a row's heads; else out(row, head) each.
// `out` gives where the bound of page 0 lies.
template <class Out>
void score(const Level& level, const LosaPool& pool, const LosaGroup& group, const LosaQuery& query,
           const std::vector<int64_t>& starts, const Task& task, bool shared, const Workspace& space, int thread,
           Out out) {
  const int dim = pool.head_dim, depth = 2 * dim, stride = stride_of(depth);
  const int heads = query.heads / pool.kv_heads, wide = std::min(heads, kRows), tall = kRows / wide;
  const int64_t* table = group.table + group.table_indptr[task.segment];
  float* q = space.extra(thread);
  float spare[kRows * kKeys];
  for (int64_t row = starts[task.segment]; row < starts[task.segment + 1]; row += tall) {
    const int rows = static_cast<int>(std::min<int64_t>(tall, starts[task.segment + 1] - row));
    for (int h = 0; h < heads; h += wide) {
      const int across = std::min(wide, heads - h), share = shared ? across : 1;
      for (int i = 0; i < rows * across; ++i) {
        const int64_t at = query.rows ? query.rows[row + i / across] : row + i / across;
        const int64_t head = task.kv_head * heads + h + i % across;
        split_signs(query.q + (at * query.heads + head) * dim, dim, stride, q + i * stride);
      }
      for (int64_t page = task.from; page < task.until; page += kKeys) {
        const int count = static_cast<int>(std::min<int64_t>(kKeys, task.until - page));
        int64_t where[kKeys];
        float* to[kRows];
        for (int i = 0; i < count; ++i) where[i] = (table[page + i] * pool.kv_heads + task.kv_head) * depth;
        const bool more = shared && h > 0;  // heads beyond the first kRows join the maximum afterwards
        for (int i = 0; i < rows * across / share; ++i)
          to[i] = more ? spare + i * kKeys : out(row + i * share / across, h + i * share % across) + page;
        level.scores(q, rows * across, share, depth, {pool.bounds, nullptr, pool.dtype, dim, where, count}, to,
                     space.tiles(thread));
        for (int i = 0; more && i < rows; ++i) {
          float* best = out(row + i, 0) + page;
          for (int j = 0; j < count; ++j) best[j] = std::max(best[j], to[i][j]);
        }
      }
    }
  }
}

void check(const LosaPool& pool, const LosaGroup& group, const LosaQuery& query) {
  check_pool(pool);
  check_tables(pool, group, group.prefix_lens);
  if (!pool.bounds) throw Refusal("the pool keeps no page bounds");
  if (query.heads < 1 || query.heads % pool.kv_heads)
    throw Refusal("%d query heads cannot share %d KV heads", query.heads, pool.kv_heads);
}

Workspace workspace(const LosaPool& pool, int threads) {
  return Workspace(threads, 2 * pool.head_dim, static_cast<int64_t>(kRows) * stride_of(2 * pool.head_dim));
}

}  // namespace

}  // namespace losa

using namespace losa;

extern "C" int losa_page_scores(LosaRun* run, const LosaPool* pool, const LosaGroup* group, const LosaQuery* query,
                                int64_t width, float* scores) {
  return guarded(run, [&](const Level& level) {
    check(*pool, *group, *query);
    const std::vector<int64_t> starts = rows_of_segments(*query, *group);
    for (int64_t s = 0; s < group->segments; ++s)
      if (starts[s] < starts[s + 1] && pages_of(*pool, *group, s) > width)
        throw Refusal("width: found %lld, allowed: at least %lld", (long long)width,
                      (long long)pages_of(*pool, *group, s));
    std::fill(scores, scores + query->count * query->heads * width, -std::numeric_limits<float>::infinity());
    const std::vector<Task> tasks = tasks_of(*pool, *group, starts, nullptr);
    const Workspace space = workspace(*pool, run->threads);
    in_parallel(run->threads, static_cast<int64_t>(tasks.size()), [&](int64_t t, int thread) {
      const int64_t first = static_cast<int64_t>(tasks[t].kv_head) * (query->heads / pool->kv_heads);
      score(level, *pool, *group, *query, starts, tasks[t], false, space, thread,
            [&](int64_t row, int head) { return scores + (row * query->heads + first + head) * width; });
    });
  });
}

extern "C" int losa_select_pages(LosaRun* run, const LosaPool* pool, const LosaGroup* group, const LosaQuery* query,
                                 const uint8_t* whole, const int64_t* best, int64_t capacity, int64_t* indptr,
                                 int64_t* indices, int64_t* seen) {
  return guarded(run, [&](const Level& level) {
    check(*pool, *group, *query);
    const std::vector<int64_t> starts = rows_of_segments(*query, *group);
    const int64_t segments = group->segments, heads = pool->kv_heads;
    std::vector<int64_t> at(segments + 1, 0), lists(segments + 1, 0);  // first score and first mark of a segment
    int64_t most = 0;
    for (int64_t s = 0; s < segments; ++s) {
      seen[s] = whole[s] ? 0 : starts[s + 1] - starts[s];
      const int64_t pages = seen[s] ? pages_of(*pool, *group, s) : 0;
      if (seen[s] && best[s] < 1) throw Refusal("best: found %lld, allowed: at least 1", (long long)best[s]);
      at[s + 1] = at[s] + heads * seen[s] * pages;
      lists[s + 1] = lists[s] + heads * pages;
      most += heads * (seen[s] ? std::min(pages, seen[s] * std::min(best[s], pages)) : 0);
    }
    if (capacity < most) throw Refusal("capacity: found %lld, needed: %lld", (long long)capacity, (long long)most);
    const Floats scores(at[segments]);
    std::vector<uint8_t> marks(lists[segments], 0);
    const std::vector<Task> tasks = tasks_of(*pool, *group, starts, whole);
    const Workspace space = workspace(*pool, run->threads);
    in_parallel(run->threads, static_cast<int64_t>(tasks.size()), [&](int64_t t, int thread) {
      const Task& task = tasks[t];
      const int64_t pages = pages_of(*pool, *group, task.segment);
      float* mine = scores.get() + at[task.segment] + task.kv_head * seen[task.segment] * pages;
      score(level, *pool, *group, *query, starts, task, true, space, thread,
            [&](int64_t row, int) { return mine + (row - starts[task.segment]) * pages; });
    });
    in_parallel(run->threads, segments * heads, [&](int64_t e, int) {
      const int64_t s = e / heads, g = e % heads, pages = seen[s] ? pages_of(*pool, *group, s) : 0;
      uint8_t* marked = marks.data() + lists[s] + g * pages;
      for (int64_t r = 0; r < seen[s]; ++r)
        level.mark_best(scores.get() + at[s] + (g * seen[s] + r) * pages, pages, best[s], marked);
    });
    int64_t end = indptr[0] = 0;
    for (int64_t e = 0; e < segments * heads; ++e) {
      const int64_t s = e / heads, pages = seen[s] ? pages_of(*pool, *group, s) : 0;
      const uint8_t* marked = marks.data() + lists[s] + e % heads * pages;
      for (int64_t page = 0; page < pages; ++page)
        if (marked[page]) indices[end++] = page;
      indptr[e + 1] = end;
    }
  });
}

extern "C" int losa_changed_rows(LosaRun* run, const void* now, void* before, int32_t dtype, int64_t segments,
                                 int64_t block_length, int64_t width, int64_t slots, const int64_t* slot,
                                 const uint8_t* fresh, const int64_t* keep, const float* share, int64_t* rows,
                                 int64_t* count) {
  return guarded(run, [&](const Level& level) {
    if (dtype < LOSA_F32 || dtype > LOSA_F16 || width < 1 || width > std::numeric_limits<int32_t>::max())
      throw Refusal("dtype %d, width %lld", dtype, (long long)width);
    for (int64_t s = 0; s < segments; ++s)
      if (slot[s] < 0 || slot[s] >= slots)
        throw Refusal("slot: found %lld, allowed: below %lld", (long long)slot[s], (long long)slots);
    const int64_t bytes = width * bytes_of(dtype);
    const Floats changes(segments * block_length);
    const int threads = segments * block_length * bytes < (1 << 16) ? 1 : run->threads;
    in_parallel(threads, segments * block_length, [&](int64_t row, int) {
      const int64_t s = row / block_length;
      const char* mine = static_cast<const char*>(now) + row * bytes;
      char* kept = static_cast<char*>(before) + (slot[s] * block_length + row % block_length) * bytes;
      const float sum = fresh[s] ? 0.0f : level.distance(mine, kept, dtype, width) / static_cast<float>(width);
      changes.get()[row] = sum == sum ? sum : std::numeric_limits<float>::infinity();
      std::memcpy(kept, mine, bytes);
    });
    int64_t end = 0;
    std::vector<int64_t> order(block_length);
    std::vector<uint8_t> active(block_length);
    for (int64_t s = 0; s < segments; ++s) {
      const float* change = changes.get() + s * block_length;
      for (int64_t i = 0; i < block_length; ++i) order[i] = i;
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return change[a] > change[b]; });
      double total = 0.0, above = 0.0;
      for (const int64_t i : order) total += change[i];
      for (int64_t i = 0; i < block_length; ++i) {
        const float wanted = share[s] * static_cast<float>(total);
        above += change[order[i]];
        const float rest = static_cast<float>(above) - change[order[i]];
        active[order[i]] = fresh[s] || i < keep[s] || rest < wanted;
      }
      for (int64_t i = 0; i < block_length; ++i)
        if (active[i]) rows[end++] = s * block_length + i;
    }
    *count = end;
  });
}
