// Running work items: keys are cut into chunks of fixed size, each chunk starts a fresh softmax, and the chunks of an
// item are added up from the first to the last. Who computes a chunk is free, what is computed is not.
#include "attend.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

namespace losa {

namespace {

constexpr int64_t kMostPartials = int64_t{16} << 20;  // floats that may be spent on chunks computed apart

struct Bench {  // one thread's scratch for attention
  Tiles tiles;
  float* q;
  State sum, part;
};

int64_t state_size(int dim) {
  return static_cast<int64_t>(kRows) * (stride_of(dim) + 2);
}

State state_at(float* at, int dim) {
  float* top = at + static_cast<int64_t>(kRows) * stride_of(dim);
  return {at, top, top + kRows};
}

Bench bench(const Workspace& space, int thread, int dim) {
  float* q = space.extra(thread);
  float* first = q + static_cast<int64_t>(kRows) * stride_of(dim);
  return {space.tiles(thread), q, state_at(first, dim), state_at(first + state_size(dim), dim)};
}

int64_t chunks_of(const Item& item) {
  return (item.keys.count + kChunk - 1) / kChunk;
}

// The element offset of an item's folded row in an array [rows, H, D] (dim 1: [rows, H]).
int64_t place(const Call& call, const Item& item, int i, int dim) {
  return ((item.row + i / item.heads) * call.query.heads + item.head + i % item.heads) * dim;
}

void pack(const Call& call, const Item& item, float* q) {
  const int stride = stride_of(call.dim);
  for (int i = 0; i < item.rows * item.heads; ++i) {
    const int64_t computed = item.row + i / item.heads;
    const int64_t row = call.query.rows ? call.query.rows[computed] : computed;
    const float* from = call.query.q + (row * call.query.heads + item.head + i % item.heads) * call.dim;
    for (int d = 0; d < call.dim; ++d) q[i * stride + d] = from[d] * call.query.scale;
    for (int d = call.dim; d < stride; ++d) q[i * stride + d] = 0.0f;
  }
}

void attend_chunk(const Call& call, const Item& item, int64_t chunk, const Bench& bench, State state) {
  int64_t where[kChunk];
  int32_t visible[kRows];
  const int64_t from = chunk * kChunk;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, item.keys.count - from));
  item.keys.locate(from, count, where);
  const Keys keys = {call.k, call.v, call.dtype, call.dim, where, count};
  for (int i = 0; item.position >= 0 && i < item.rows * item.heads; ++i) {
    const int64_t block = (item.position + i / item.heads) / call.block_length;
    visible[i] = static_cast<int32_t>(std::clamp<int64_t>((block + 1) * call.block_length - from, 0, count));
  }
  Peaks peaks;
  const bool wanted = call.peaks && item.keys.table && !item.keys.granules;
  for (int i = 0; wanted && i < item.rows * item.heads; ++i)
    peaks.rows[i] = call.peaks + place(call, item, i, 1) * call.width + from / call.page_size;
  peaks.page_size = call.page_size;
  call.level.attend(bench.q, item.rows * item.heads, keys, item.position >= 0 ? visible : nullptr, state, bench.tiles,
                    wanted ? &peaks : nullptr);
}

// Where the state lies that an item's folded row is merged with: the remembered one, once a new one has replaced it. No
// other item comes here.
std::pair<const float*, const float*> other(const Call& call, const Item& item, int i) {
  const LosaPrefix& states = *call.others->states;
  const int64_t row = item.row + i / item.heads, number = call.others->fresh[row];
  const int64_t heads = call.query.heads, head = item.head + i % item.heads;
  const int64_t kept = (states.place ? states.place[row] : row) * heads + head, fresh = number * heads + head;
  float *out = states.out + kept * call.dim, *lse = states.lse + kept;
  if (number >= 0 && (!states.heads || states.heads[fresh])) {
    std::memcpy(out, states.fresh_out + fresh * call.dim, call.dim * sizeof(float));
    *lse = states.fresh_lse[fresh];
  }
  return {out, lse};
}

void write(const Call& call, const Item& item, State state) {
  float *out[kRows], *lse[kRows];
  const float *other_out[kRows], *other_lse[kRows];
  const int rows = item.rows * item.heads;
  for (int i = 0; i < rows; ++i) {
    out[i] = call.out + place(call, item, i, call.dim);
    lse[i] = call.lse ? call.lse + place(call, item, i, 1) : nullptr;
    if (call.others) std::tie(other_out[i], other_lse[i]) = other(call, item, i);
  }
  call.level.finish(state, rows, call.dim, out, call.lse ? lse : nullptr, call.others ? other_out : nullptr,
                    call.others ? other_lse : nullptr);
}

void run_item(const Call& call, const Item& item, const Bench& mine) {
  pack(call, item, mine.q);
  attend_chunk(call, item, 0, mine, mine.sum);  // without keys: an empty state
  for (int64_t chunk = 1; chunk < chunks_of(item); ++chunk) {
    attend_chunk(call, item, chunk, mine, mine.part);
    call.level.add(mine.sum, mine.part, item.rows * item.heads, call.dim);
  }
  write(call, item, mine.sum);
}

}  // namespace

void KeyList::locate(int64_t from, int n, int64_t* where) const {
  if (!table) {
    for (int i = 0; i < n; ++i) where[i] = first + (from + i) * step;
    return;
  }
  int64_t entry = granules ? from / granule : 0, inside = granules ? from % granule : from;
  for (int i = 0; i < n;) {
    const int64_t position = (granules ? granules[entry] * granule : 0) + inside;
    const int64_t page = position / page_size, offset = position % page_size;
    int64_t run = std::min<int64_t>(n - i, page_size - offset);
    if (granules) run = std::min(run, granule - inside);
    const int64_t start = ((table[page] * kv_heads + kv_head) * page_size + offset) * dim;
    for (int64_t j = 0; j < run; ++j) where[i + j] = start + j * dim;
    i += static_cast<int>(run);
    inside += run;
    if (granules && inside == granule) ++entry, inside = 0;
  }
}

void add_items(std::vector<Item>& items, const KeyList& keys, int64_t row, int64_t rows, int head, int heads,
               int64_t position) {
  const int wide = std::min(heads, kRows);
  const int64_t tall = kRows / wide;
  for (int h = 0; h < heads; h += wide)
    for (int64_t r = 0; r < rows; r += tall) {
      const int64_t now = std::min(tall, rows - r);
      items.push_back({keys, row + r, static_cast<int>(now), head + h, std::min(wide, heads - h),
                       position < 0 ? -1 : position + r});
    }
}

void run_items(const Call& call, const std::vector<Item>& items) {
  const int64_t count = static_cast<int64_t>(items.size()), each = state_size(call.dim);
  std::vector<int64_t> starts(1, 0);
  for (const Item& item : items) starts.push_back(starts.back() + std::max<int64_t>(1, chunks_of(item)));
  const int64_t chunks = starts.back();
  const int threads = static_cast<int>(std::clamp<int64_t>(chunks, 1, call.threads));
  const Workspace space(threads, call.dim, static_cast<int64_t>(kRows) * stride_of(call.dim) + 2 * each);
  if (threads == 1 || chunks == count || chunks * each > kMostPartials) {
    in_parallel(threads, count,
                [&](int64_t i, int thread) { run_item(call, items[i], bench(space, thread, call.dim)); });
    return;
  }
  const Floats partials(chunks * each);
  std::vector<int64_t> item_of(chunks);
  for (int64_t i = 0; i < count; ++i) std::fill(item_of.begin() + starts[i], item_of.begin() + starts[i + 1], i);
  const auto partial = [&](int64_t chunk) { return state_at(partials.get() + chunk * each, call.dim); };
  in_parallel(threads, chunks, [&](int64_t c, int thread) {
    const Bench mine = bench(space, thread, call.dim);
    const Item& item = items[item_of[c]];
    pack(call, item, mine.q);
    attend_chunk(call, item, c - starts[item_of[c]], mine, partial(c));
  });
  in_parallel(threads, count, [&](int64_t i, int) {
    const State sum = partial(starts[i]);
    for (int64_t c = starts[i] + 1; c < starts[i + 1]; ++c)
      call.level.add(sum, partial(c), items[i].rows * items[i].heads, call.dim);
    write(call, items[i], sum);
  });
}

}  // namespace losa
