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
  const int dim = pool.head_dim, stride = stride_of(dim);
  const int heads = query.heads / pool.kv_heads, wide = std::min(heads, kRows), tall = kRows / wide;
  const int64_t *table = group.table + group.table_indptr[task.segment], pages = pages_of(pool, group, task.segment);
  float* q = space.extra(thread);
  float spare[kRows * kKeys];
  for (int64_t row = starts[task.segment]; row < starts[task.segment + 1]; row += tall) {
    const int rows = static_cast<int>(std::min<int64_t>(tall, starts[task.segment + 1] - row));
    for (int h = 0; h < heads; h += wide) {
      const int across = std::min(wide, heads - h), share = shared ? across : 1;
      for (int i = 0; i < rows * across; ++i) {
        const int64_t at = query.rows ? query.rows[row + i / across] : row + i / across;
        const int64_t head = task.kv_head * heads + h + i % across;
        const float* from = query.q + (at * query.heads + head) * dim;
        std::fill(std::copy(from, from + dim, q + i * stride), q + (i + 1) * stride, 0.0f);
      }
      for (int64_t page = task.from; page < task.until; page += kKeys) {
        const int count = static_cast<int>(std::min<int64_t>(kKeys, task.until - page));
        const int known = static_cast<int>(std::min<int64_t>(2 * kKeys, pages - page));
        int64_t where[2 * kKeys];
        float* to[kRows];
        for (int i = 0; i < known; ++i) where[i] = (table[page + i] * pool.kv_heads + task.kv_head) * 2 * dim;
        const bool more = shared && h > 0;  // heads beyond the first kRows join the maximum afterwards
        for (int i = 0; i < rows * across / share; ++i)
          to[i] = more ? spare + i * kKeys : out(row + i * share / across, h + i * share % across) + page;
        level.bounds_scores(q, rows * across, share,
                            {pool.bounds, nullptr, pool.dtype, dim, where, count, known - count}, to,
                            space.tiles(thread));
        for (int i = 0; more && i < rows; ++i) {
          float* best = out(row + i, 0) + page;
          for (int j = 0; j < count; ++j) best[j] = std::max(best[j], to[i][j]);
        }
      }
    }
  }
}

// Marks the rows (every `apart`-th of change and of active) that are among the `keep` most changed, or before which
// less than the share of the whole change lies; equal changes go to the first rows.
void most_changed(const float* change, int64_t rows, int64_t apart, int64_t keep, float share,
                  std::vector<int64_t>& order, uint8_t* active) {
  for (int64_t i = 0; i < rows; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return change[a * apart] > change[b * apart]; });
  double total = 0.0, above = 0.0;
  for (const int64_t i : order) total += change[i * apart];
  for (int64_t i = 0; i < rows; ++i) {
    const float wanted = share * static_cast<float>(total), mine = change[order[i] * apart];
    above += mine;
    active[order[i] * apart] = i < keep || static_cast<float>(above) - mine < wanted;
  }
}

// The score line of one list: of the lines of its query heads, `apart` floats from one to the next, those that take
// part become one by their maximum or mean. Returns null if none takes part. Overwrites the lines.
float* shared_line(float* lines, int64_t apart, int64_t pages, int heads, const uint8_t* active, bool mean) {
  float* line = nullptr;
  int taking = 0;
  for (int h = 0; h < heads; ++h) {
    if (active && !active[h]) continue;
    const float* other = lines + h * apart;
    if (!taking++) {
      line = lines + h * apart;
    } else if (mean) {
      for (int64_t i = 0; i < pages; ++i) line[i] += other[i];
    } else {
      for (int64_t i = 0; i < pages; ++i) line[i] = line[i] < other[i] ? other[i] : line[i];
    }
  }
  for (int64_t i = 0; mean && taking > 1 && i < pages; ++i) line[i] /= static_cast<float>(taking);
  return line;
}

void check(const LosaPool& pool, const LosaGroup& group, const LosaQuery& query) {
  check_pool(pool);
  check_tables(pool, group, group.prefix_lens);
  if (!pool.bounds) throw Refusal("the pool keeps no page bounds");
  if (query.heads < 1 || query.heads % pool.kv_heads)
    throw Refusal("%d query heads cannot share %d KV heads", query.heads, pool.kv_heads);
}

Workspace workspace(const LosaPool& pool, int threads) {
  return Workspace(threads, 2 * pool.head_dim, static_cast<int64_t>(kRows) * stride_of(pool.head_dim));
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
                                 const uint8_t* whole, const int64_t* best, int32_t share, int32_t per_row,
                                 const uint8_t* active, int64_t capacity, int64_t* indptr, int64_t* indices,
                                 int64_t* seen) {
  return guarded(run, [&](const Level& level) {
    check(*pool, *group, *query);
    if (share < LOSA_MAX || share > LOSA_NONE) throw Refusal("share: found %d", share);
    const std::vector<int64_t> starts = rows_of_segments(*query, *group);
    const int64_t segments = group->segments, lists = share == LOSA_NONE ? query->heads : pool->kv_heads;
    const int per_kv = query->heads / pool->kv_heads, per_list = static_cast<int>(query->heads / lists);
    const bool fused = share == LOSA_MAX && !active;  // the maximum is taken while scoring: one line per KV head
    const int64_t lines = fused ? pool->kv_heads : query->heads;
    std::vector<int64_t> at(segments + 1, 0), marks_at(segments + 1, 0);  // first score and first mark of a segment
    int64_t most = 0;
    for (int64_t s = 0; s < segments; ++s) {
      seen[s] = whole[s] ? 0 : starts[s + 1] - starts[s];
      const int64_t pages = seen[s] ? pages_of(*pool, *group, s) : 0;
      if (seen[s] && best[s] < 1) throw Refusal("best: found %lld, allowed: at least 1", (long long)best[s]);
      const int64_t owned = seen[s] * std::min(seen[s] ? best[s] : 0, pages);
      at[s + 1] = at[s] + lines * seen[s] * pages;
      marks_at[s + 1] = marks_at[s] + lists * (per_row ? seen[s] : 1) * pages;
      most += lists * (per_row ? owned : std::min(pages, owned));
    }
    if (capacity < most) throw Refusal("capacity: found %lld, needed: %lld", (long long)capacity, (long long)most);
    const Floats scores(at[segments]);
    std::vector<uint8_t> marks(marks_at[segments], 0);
    const std::vector<Task> tasks = tasks_of(*pool, *group, starts, whole);
    const Workspace space = workspace(*pool, run->threads);
    in_parallel(run->threads, static_cast<int64_t>(tasks.size()), [&](int64_t t, int thread) {
      const Task& task = tasks[t];
      const int64_t s = task.segment, pages = pages_of(*pool, *group, s), first = task.kv_head * (fused ? 1 : per_kv);
      score(level, *pool, *group, *query, starts, task, fused, space, thread, [&](int64_t row, int head) {
        return scores.get() + at[s] + ((first + (fused ? 0 : head)) * seen[s] + row - starts[s]) * pages;
      });
    });
    in_parallel(run->threads, segments * lists, [&](int64_t task, int) {
      const int64_t s = task / lists, e = task % lists, pages = seen[s] ? pages_of(*pool, *group, s) : 0;
      uint8_t* marked = marks.data() + marks_at[s] + e * pages;
      for (int64_t r = 0; r < seen[s]; ++r, marked += per_row ? lists * pages : 0) {
        const uint8_t* taking = active ? active + (starts[s] + r) * query->heads + e * per_list : nullptr;
        float* line = scores.get() + at[s] + ((fused ? e : e * per_list) * seen[s] + r) * pages;
        if (!fused) line = shared_line(line, seen[s] * pages, pages, per_list, taking, share == LOSA_MEAN);
        if (line) level.mark_best(line, pages, best[s], marked);
      }
    });
    int64_t end = indptr[0] = 0, entry = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t pages = seen[s] ? pages_of(*pool, *group, s) : 0;
      const uint8_t* marked = marks.data() + marks_at[s];
      const int64_t owners = per_row ? starts[s + 1] - starts[s] : 1;
      for (int64_t e = 0; e < owners * lists; ++e, marked += pages) {
        for (int64_t page = 0; page < pages; ++page)
          if (marked[page]) indices[end++] = page;
        indptr[++entry] = end;
      }
    }
  });
}

extern "C" int losa_changed_rows(LosaRun* run, const void* now, void* before, int32_t dtype, int64_t segments,
                                 int64_t block_length, int64_t parts, int64_t width, int64_t slots, const int64_t* slot,
                                 const uint8_t* fresh, const int64_t* keep, const float* share, int32_t keep_stable,
                                 uint8_t* active, int64_t* rows, int64_t* count) {
  return guarded(run, [&](const Level& level) {
    if (dtype < LOSA_F32 || dtype > LOSA_F16 || parts < 1 || width < 1 || width > std::numeric_limits<int32_t>::max())
      throw Refusal("dtype %d, %lld parts of width %lld", dtype, (long long)parts, (long long)width);
    for (int64_t s = 0; s < segments; ++s)
      if (slot[s] < 0 || slot[s] >= slots)
        throw Refusal("slot: found %lld, allowed: below %lld", (long long)slot[s], (long long)slots);
    const int64_t bytes = width * bytes_of(dtype), line = block_length * parts;
    const Floats changes(segments * line);
    const int threads = segments * line * bytes < (1 << 16) ? 1 : run->threads;
    const auto mine = [&](int64_t i) { return static_cast<const char*>(now) + i * bytes; };
    const auto kept = [&](int64_t i) {
      return static_cast<char*>(before) + (slot[i / line] * line + i % line) * bytes;
    };
    in_parallel(threads, segments * line, [&](int64_t i, int) {
      const bool first = fresh[i / line];
      const float sum = first ? 0.0f : level.distance(mine(i), kept(i), dtype, width) / static_cast<float>(width);
      changes.get()[i] = sum == sum ? sum : std::numeric_limits<float>::infinity();
      if (!keep_stable) std::memcpy(kept(i), mine(i), bytes);
    });
    std::vector<int64_t> order(block_length);
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t part = 0; part < parts; ++part)
        most_changed(changes.get() + s * line + part, block_length, parts, fresh[s] ? block_length : keep[s], share[s],
                     order, active + s * line + part);
    int64_t end = 0;
    for (int64_t row = 0; row < segments * block_length; ++row)
      if (std::memchr(active + row * parts, 1, parts)) rows[end++] = row;
    *count = end;
    if (!keep_stable) return;
    in_parallel(threads, segments * line, [&](int64_t i, int) {
      if (active[i]) std::memcpy(kept(i), mine(i), bytes);
    });
  });
}
