// What the drivers share: refusals, dtypes, scratch memory, the loop over work items.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>
#include <vector>

#include "level.h"

namespace losa {

// Thrown before anything is read or written; `guarded` turns it into the call's answer.
struct Refusal {
  char text[240];
  template <class... Values>
  explicit Refusal(const char* format, Values... values) {
    std::snprintf(text, sizeof text, format, values...);
  }
};

template <class Body>
int guarded(LosaRun* run, Body body) {
  try {
    const Level* level = level_of(run->level);
    if (!level) throw Refusal("level: found %d, which this CPU or build does not have", run->level);
    if (run->threads < 1) throw Refusal("threads: found %d, allowed: at least 1", run->threads);
    body(*level);
    return 0;
  } catch (const Refusal& refusal) {
    std::snprintf(run->error, sizeof run->error, "%s", refusal.text);
  } catch (const std::bad_alloc&) {
    std::snprintf(run->error, sizeof run->error, "out of memory");
  }
  return 1;
}

// Uninitialised floats aligned to a cache line. Throws std::bad_alloc.
struct Floats {
  explicit Floats(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64 + 64;
    data.reset(static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
  }
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Free> data;
  float* get() const { return data.get(); }
};

// Scratch of every thread, allocated before threads start: inside a parallel region nothing may throw.
class Workspace {
 public:
  // depth: the longest vector; extra: further floats per thread.
  Workspace(int threads, int depth, int64_t extra)
      : depth_(stride_of(depth)), each_(size(depth_) + (extra + kLanes - 1) / kLanes * kLanes), all_(threads * each_) {}
  Tiles tiles(int thread) const {
    float* at = all_.get() + thread * each_;
    float* keys = at + static_cast<int64_t>(depth_) * kKeys;
    float* values = keys + static_cast<int64_t>(depth_) * kKeys;
    float* weights = values + static_cast<int64_t>(depth_) * kKeys;
    return {at, keys, values, weights, weights + kRows * kKeys};
  }
  float* extra(int thread) const { return all_.get() + thread * each_ + size(depth_); }

 private:
  static int64_t size(int depth) {
    return 3 * static_cast<int64_t>(depth) * kKeys + static_cast<int64_t>(kRows) * (kKeys + kLanes);
  }
  int depth_;
  int64_t each_;
  Floats all_;
};

int thread_number();

// body(index, thread) for 0 .. count on up to `threads` threads; the work items are independent of one another.
template <class Body>
void in_parallel(int threads, int64_t count, Body body) {
  if (threads == 1 || count < 2) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(i, thread_number());
}

// --- checks ----------------------------------------------------------------------------------------------------------

void check_pool(const LosaPool& pool);
// Every page that positions before lengths[s] need is in the table and in the pool.
void check_tables(const LosaPool& pool, const LosaGroup& group, const int64_t* lengths);
// First computed row of each segment among the computed rows: [S + 1]. Checks that rows are sorted and in range.
std::vector<int64_t> rows_of_segments(const LosaQuery& query, const LosaGroup& group);

}  // namespace losa
