// Writing K/V into pages, and the bounds and moments of the keys of every page that was touched.
#include <algorithm>

#include "driver.h"

namespace losa {

namespace {

struct Touched {
  int64_t page;
  int filled;  // leading offsets of the page that hold keys of its present owner
};

// Pages are filled from offset 0 upwards, so the last offset stored now tells how much of a page is filled.
std::vector<Touched> touched_pages(const int64_t* locations, int64_t count, int page_size) {
  std::vector<Touched> touched;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t page = locations[i] / page_size;
    const int filled = static_cast<int>(locations[i] % page_size) + 1;
    if (!touched.empty() && touched.back().page == page)
      touched.back().filled = std::max(touched.back().filled, filled);
    else
      touched.push_back({page, filled});
  }
  // A page met twice is kept once, with its larger filling.
  std::sort(touched.begin(), touched.end(), [](const Touched& a, const Touched& b) {
    return a.page != b.page ? a.page < b.page : a.filled > b.filled;
  });
  const auto same = [](const Touched& a, const Touched& b) { return a.page == b.page; };
  touched.erase(std::unique(touched.begin(), touched.end(), same), touched.end());
  return touched;
}

}  // namespace

}  // namespace losa

using namespace losa;

extern "C" int losa_store(LosaRun* run, const LosaPool* pool, const void* k, const void* v, int32_t dtype,
                          const int64_t* locations, int64_t count) {
  return guarded(run, [&](const Level& level) {
    check_pool(*pool);
    if (dtype < LOSA_F32 || dtype > LOSA_F16) throw Refusal("dtype: found %d", dtype);
    for (int64_t i = 0; i < count; ++i)
      if (locations[i] < 0 || locations[i] >= pool->pages * pool->page_size)
        throw Refusal("locations: found %lld, allowed: below %lld", (long long)locations[i],
                      (long long)(pool->pages * pool->page_size));
    const int dim = pool->head_dim, heads = pool->kv_heads, size = pool->page_size;
    const int64_t from_bytes = dim * bytes_of(dtype), bytes = dim * bytes_of(pool->dtype);
    in_parallel(count < 16 ? 1 : run->threads, count, [&](int64_t i, int) {
      const int64_t page = locations[i] / size, offset = locations[i] % size;
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t from = (i * heads + g) * from_bytes, to = ((page * heads + g) * size + offset) * bytes;
        level.copy(static_cast<const char*>(k) + from, dtype, static_cast<char*>(pool->k) + to, pool->dtype, dim);
        level.copy(static_cast<const char*>(v) + from, dtype, static_cast<char*>(pool->v) + to, pool->dtype, dim);
      }
    });
    if (!pool->bounds && !pool->moments) return;
    const std::vector<Touched> touched = touched_pages(locations, count, size);
    const int64_t each = 3 * static_cast<int64_t>(stride_of(dim));
    const int64_t tasks = static_cast<int64_t>(touched.size());
    const Floats buffers(run->threads * each);
    in_parallel(tasks < 4 ? 1 : run->threads, tasks, [&](int64_t t, int thread) {
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t tile = touched[t].page * heads + g;
        const char* keys = static_cast<const char*>(pool->k) + tile * size * bytes;
        float* buffer = buffers.get() + thread * each;
        if (pool->bounds) {
          char* bound = static_cast<char*>(pool->bounds) + 2 * tile * bytes;
          level.bounds(keys, pool->dtype, dim, touched[t].filled, bound, bound + bytes, buffer);
        }
        if (pool->moments) {
          float* moment = pool->moments + 2 * tile * dim;
          level.moments(keys, pool->dtype, dim, touched[t].filled, moment, moment + dim, buffer);
        }
      }
    });
  });
}
