// A mixture of experts: each token through the gated layers that were chosen for it, weighted and added.
//
// (token, place) pairs are sorted by expert, so that an expert's weights are read once however many tokens it has; work
// is cut along the experts' columns. Arithmetic is float32 whatever the weights' dtype.
#include <algorithm>

#include "driver.h"

namespace losa {

namespace {

constexpr int64_t kTokens = 512;  // per pass: bounds the scratch
constexpr int64_t kColumns = 64;  // of a work item

// The pairs of one pass: order[starts[i] .. starts[i + 1]) belong to experts[i].
struct Sorted {
  std::vector<int64_t> experts, starts, order;
};

Sorted sort_by_expert(const int64_t* chosen, int64_t pairs, int64_t count) {
  std::vector<int64_t> place(count + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) ++place[chosen[p] + 1];
  Sorted sorted;
  for (int64_t e = 0; e < count; ++e) {
    if (place[e + 1]) {
      sorted.experts.push_back(e);
      sorted.starts.push_back(place[e]);
    }
    place[e + 1] += place[e];
  }
  sorted.starts.push_back(pairs);
  sorted.order.resize(pairs);
  for (int64_t p = 0; p < pairs; ++p) sorted.order[place[chosen[p]]++] = p;
  return sorted;
}

// For every expert of the pass: out[pair] = its rows' products with `columns` weight rows of `width` numbers.
void multiply(const Level& level, int threads, const Sorted& sorted, const std::vector<const float*>& rows,
              int64_t width, const void* weights, int dtype, int64_t columns, const std::vector<float*>& out) {
  const int64_t cuts = (columns + kColumns - 1) / kColumns;
  const int64_t tasks = static_cast<int64_t>(sorted.experts.size()) * cuts;
  in_parallel(threads, tasks, [&](int64_t task, int) {
    const int64_t i = task / cuts, first = task % cuts * kColumns, at = sorted.starts[i];
    const int64_t size = columns * width * bytes_of(dtype);
    const char* own = static_cast<const char*>(weights) + sorted.experts[i] * size;
    level.products(rows.data() + at, sorted.starts[i + 1] - at, width, own, dtype, first,
                   std::min(columns, first + kColumns), out.data() + at);
  });
}

void check(const LosaExperts& experts, const int64_t* chosen, int64_t pairs) {
  if (experts.count < 1 || experts.hidden < 1 || experts.width < 1)
    throw Refusal("experts: found %lld of width %lld on %lld channels", (long long)experts.count,
                  (long long)experts.width, (long long)experts.hidden);
  if (experts.dtype < LOSA_F32 || experts.dtype > LOSA_F16) throw Refusal("dtype: found %d", experts.dtype);
  for (int64_t p = 0; p < pairs; ++p)
    if (chosen[p] < 0 || chosen[p] >= experts.count)
      throw Refusal("chosen: found expert %lld, allowed: below %lld", (long long)chosen[p], (long long)experts.count);
}

// One pass over at most kTokens tokens.
void mix(const Level& level, int threads, const LosaExperts& experts, const char* x, int64_t tokens,
         const int64_t* chosen, const float* weight, int64_t per_token, char* out) {
  const int64_t pairs = tokens * per_token, hidden = experts.hidden, width = experts.width;
  const Sorted sorted = sort_by_expert(chosen, pairs, experts.count);
  const Floats wide(tokens * hidden), inner(pairs * 2 * width), mixed(pairs * hidden);
  const int64_t row_bytes = hidden * bytes_of(experts.dtype);
  in_parallel(threads, tokens, [&](int64_t t, int) {
    level.copy(x + t * row_bytes, experts.dtype, wide.get() + t * hidden, LOSA_F32, static_cast<int>(hidden));
  });
  std::vector<const float*> rows(pairs);
  std::vector<float*> into(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    rows[i] = wide.get() + sorted.order[i] / per_token * hidden;
    into[i] = inner.get() + i * 2 * width;
  }
  multiply(level, threads, sorted, rows, hidden, experts.gate_up, experts.dtype, 2 * width, into);
  in_parallel(threads, pairs, [&](int64_t i, int) { level.gate(into[i], into[i] + width, width); });
  for (int64_t i = 0; i < pairs; ++i) {
    rows[i] = into[i];
    into[i] = mixed.get() + sorted.order[i] * hidden;
  }
  multiply(level, threads, sorted, rows, width, experts.down, experts.dtype, hidden, into);
  in_parallel(threads, tokens, [&](int64_t t, int) {
    float* total = mixed.get() + t * per_token * hidden;
    for (int64_t c = 0; c < hidden; ++c) total[c] *= weight[t * per_token];
    for (int64_t k = 1; k < per_token; ++k)
      for (int64_t c = 0; c < hidden; ++c) total[c] += weight[t * per_token + k] * total[k * hidden + c];
    level.copy(total, LOSA_F32, out + t * row_bytes, experts.dtype, static_cast<int>(hidden));
  });
}

}  // namespace

}  // namespace losa

using namespace losa;

extern "C" int losa_mix_experts(LosaRun* run, const LosaExperts* experts, const void* x, int64_t tokens,
                                const int64_t* chosen, const float* weight, int64_t per_token, void* out) {
  return guarded(run, [&](const Level& level) {
    if (tokens < 0 || per_token < 1) throw Refusal("experts per token: found %lld", (long long)per_token);
    check(*experts, chosen, tokens * per_token);
    const int64_t row_bytes = experts->hidden * bytes_of(experts->dtype);
    for (int64_t t = 0; t < tokens; t += kTokens)
      mix(level, run->threads, *experts, static_cast<const char*>(x) + t * row_bytes, std::min(kTokens, tokens - t),
          chosen + t * per_token, weight + t * per_token, per_token, static_cast<char*>(out) + t * row_bytes);
  });
}
