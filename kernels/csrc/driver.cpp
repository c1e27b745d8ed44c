// Choice of the instruction set, and the checks that come before every read.
#include "driver.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace losa {

#ifdef _OPENMP
int thread_number() {
  return omp_get_thread_num();
}
#else
int thread_number() {
  return 0;
}
#endif

const Level* level_of(int level) {
#ifdef LOSA_X86
  __builtin_cpu_init();
  if (level == LOSA_AVX2) {
    const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return has ? &avx2_level : nullptr;
  }
  if (level == LOSA_AVX512) {
    const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return has ? &avx512_level : nullptr;
  }
#endif
  return level == LOSA_PORTABLE ? &portable_level : nullptr;
}

void check_pool(const LosaPool& pool) {
  if (pool.head_dim < 1 || pool.head_dim > kMaxDim)
    throw Refusal("head_dim: found %d, allowed: 1 to %d", pool.head_dim, kMaxDim);
  if (pool.dtype < LOSA_F32 || pool.dtype > LOSA_F16) throw Refusal("dtype: found %d", pool.dtype);
  if (pool.pages < 1 || pool.kv_heads < 1 || pool.page_size < 1)
    throw Refusal("pool of %lld pages, %d KV heads, page size %d", (long long)pool.pages, pool.kv_heads,
                  pool.page_size);
}

void check_tables(const LosaPool& pool, const LosaGroup& group, const int64_t* lengths) {
  if (group.segments < 1 || group.block_length < 1) throw Refusal("a group without segments or block length");
  for (int64_t s = 0; s < group.segments; ++s) {
    const int64_t first = group.table_indptr[s], held = group.table_indptr[s + 1] - first, length = lengths[s];
    if (length < 0 || held < 0 || held * pool.page_size < length)
      throw Refusal("segment %lld: %lld pages of %d do not cover %lld positions", (long long)s, (long long)held,
                    pool.page_size, (long long)length);
    const int64_t needed = (length + pool.page_size - 1) / pool.page_size;
    for (int64_t i = first; i < first + needed; ++i)
      if (group.table[i] < 0 || group.table[i] >= pool.pages)
        throw Refusal("segment %lld: page %lld is not one of %lld", (long long)s, (long long)group.table[i],
                      (long long)pool.pages);
  }
}

std::vector<int64_t> rows_of_segments(const LosaQuery& query, const LosaGroup& group) {
  const int64_t total = group.segments * group.block_length;
  if (query.total != total || query.count < 0 || (!query.rows && query.count != total))
    throw Refusal("rows: found %lld of %lld, for %lld segments of %lld", (long long)query.count, (long long)query.total,
                  (long long)group.segments, (long long)group.block_length);
  std::vector<int64_t> starts(group.segments + 1, 0);
  int64_t before = -1;
  for (int64_t i = 0; i < query.count; ++i) {
    const int64_t row = query.rows ? query.rows[i] : i;
    if (row <= before || row >= total)
      throw Refusal("rows: found %lld after %lld, allowed: sorted, below %lld", (long long)row, (long long)before,
                    (long long)total);
    before = row;
    ++starts[row / group.block_length + 1];
  }
  for (int64_t s = 0; s < group.segments; ++s) starts[s + 1] += starts[s];
  return starts;
}

}  // namespace losa

extern "C" int losa_abi(void) {
  return LOSA_ABI;
}

extern "C" int losa_has_level(int level) {
  return losa::level_of(level) != nullptr;
}
