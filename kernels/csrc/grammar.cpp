// Rows of a token automaton, and how few tokens lead from a state to an end.
#include "grammar.h"

#include <algorithm>
#include <cstring>

namespace losa {

namespace {

constexpr int64_t kDense = 16;  // rows with more than a 1/kDense of all ids are put in order by counting

uint64_t hash_of(const std::vector<int32_t>& values, uint64_t hash) {
  for (const int32_t value : values)
    hash = (hash ^ static_cast<uint32_t>(value)) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
  return hash;
}

}  // namespace

Words::Words(int64_t size, const int64_t* starts, const uint8_t* bytes)
    : size(size), starts(starts, starts + size + 1), bytes(bytes, bytes + starts[size]), first(257, 0) {
  const auto less = [&](int32_t a, int32_t b) {
    const int64_t la = starts[a + 1] - starts[a], lb = starts[b + 1] - starts[b];
    const int found = std::memcmp(bytes + starts[a], bytes + starts[b], std::min(la, lb));
    return found ? found < 0 : la != lb ? la < lb : a < b;
  };
  bool alone[256] = {};
  for (int64_t i = 0; i < size; ++i) {
    const int64_t length = starts[i + 1] - starts[i];
    longest = std::max<int32_t>(longest, static_cast<int32_t>(length));
    if (length == 1) alone[bytes[starts[i]]] = true;
    if (length > 0) order.push_back(static_cast<int32_t>(i));
  }
  covers_bytes = std::all_of(alone, alone + 256, [](bool there) { return there; });
  std::sort(order.begin(), order.end(), less);
  common.assign(order.size(), 0);
  for (size_t i = 0; i < order.size(); ++i) {
    const uint8_t* mine = bytes + starts[order[i]];
    ++first[mine[0] + 1];
    if (i == 0) continue;
    const uint8_t* before = bytes + starts[order[i - 1]];
    const int64_t most =
        std::min(starts[order[i] + 1] - starts[order[i]], starts[order[i - 1] + 1] - starts[order[i - 1]]);
    common[i] = static_cast<int32_t>(std::mismatch(mine, mine + most, before).first - mine);
  }
  for (int b = 0; b < 256; ++b) first[b + 1] += first[b];
}

Grammar::Grammar(std::shared_ptr<const Words> the_words, const Table& table, const int32_t* the_ends, int64_t end_count,
                 int64_t wide, int64_t work)
    : words(std::move(the_words)),
      done(static_cast<int32_t>(table.states)),
      ends(the_ends, the_ends + end_count),
      classes_(table.classes),
      wide_(wide),
      work_(work),
      next_(table.next, table.next + table.states * table.classes),
      class_of_(table.class_of, table.class_of + 256),
      accepting_(table.accepting, table.accepting + table.states),
      is_end_(words->size, 0),
      bytes_left_(table.bytes_left, table.bytes_left + table.states),
      left_(table.states, -1),
      sizes_(table.states + 1, 0),
      rows_(table.states) {
  for (const int32_t end : ends) is_end_[end] = 1;
  own_ = static_cast<int64_t>(next_.size() * 4 + table.states * (1 + 4 + 4 + 4 + sizeof(void*)) + words->size);
  held_ = own_;
}

void Grammar::forget() {
  for (auto& row : rows_) row.reset();
  shapes_.clear();
  by_hash_.clear();
  held_ = own_;
}

int32_t Grammar::step(int32_t state, int64_t token) const {
  if (is_end_[token]) return accepting(state) ? done : kNowhere;
  if (state == done) return done;
  const int64_t from = words->starts[token], until = words->starts[token + 1];
  if (from == until) return kNowhere;
  for (int64_t i = from; i < until && state >= 0; ++i) state = next(state, words->bytes[i]);
  return state;
}

// All ids that may follow and the states behind them, in the order of their bytes. The states along the beginning that
// an id shares with the one before are known; an id that shares the byte where that one failed fails there, too.
void Grammar::follow(int32_t state, std::vector<std::pair<int32_t, int32_t>>& found) const {
  std::vector<int32_t> along(words->longest + 1);
  along[0] = state;
  for (int b = 0; b < 256; ++b) {
    if (words->first[b] == words->first[b + 1] || next(state, static_cast<uint8_t>(b)) < 0) continue;
    int32_t alive = 0;  // bytes of the id before that could be walked
    for (int64_t i = words->first[b]; i < words->first[b + 1]; ++i) {
      const int32_t id = words->order[i], shared = i == words->first[b] ? 0 : words->common[i];
      if (shared > alive) continue;
      const int64_t from = words->starts[id], length = words->starts[id + 1] - from;
      alive = shared;
      while (alive < length) {
        const int32_t behind = next(along[alive], words->bytes[from + alive]);
        if (behind < 0) break;
        along[++alive] = behind;
      }
      if (alive == length && !is_end_[id]) found.emplace_back(id, along[alive]);
    }
  }
}

// Pairs by their ids, all of which differ.
void Grammar::in_order(std::vector<std::pair<int32_t, int32_t>>& found) const {
  if (static_cast<int64_t>(found.size()) * kDense < words->size) {
    std::sort(found.begin(), found.end());
    return;
  }
  std::vector<int32_t> behind(words->size, kNowhere);
  for (const auto& [id, target] : found) behind[id] = target;
  found.clear();
  for (int64_t id = 0; id < words->size; ++id)
    if (behind[id] >= 0) found.emplace_back(static_cast<int32_t>(id), behind[id]);
}

const Row& Grammar::make(int32_t state) {
  if (rows_[state]) return *rows_[state];
  std::vector<std::pair<int32_t, int32_t>> found;  // (id, state behind it)
  follow(state, found);
  in_order(found);
  if (accepting_[state])
    for (const int32_t end : ends) found.emplace_back(end, done);
  auto row = std::make_unique<Row>();
  for (const auto& [id, target] : found)
    if (!sizes_[target]++) row->targets.push_back(target);
  std::sort(row->targets.begin(), row->targets.end());
  Shape shape;
  shape.ids.resize(found.size());
  shape.starts.assign(1, 0);
  for (const int32_t target : row->targets) {
    shape.starts.push_back(shape.starts.back() + sizes_[target]);
    sizes_[target] = shape.starts[shape.starts.size() - 2];  // where its next id goes
  }
  for (const auto& [id, target] : found) shape.ids[sizes_[target]++] = id;
  for (const int32_t target : row->targets) sizes_[target] = 0;
  row->shape = shared(std::move(shape));
  held_ += static_cast<int64_t>(sizeof(Row) + row->targets.capacity() * 4);
  rows_[state] = std::move(row);
  return *rows_[state];
}

const Shape* Grammar::shared(Shape&& shape) {
  const uint64_t hash = hash_of(shape.starts, hash_of(shape.ids, 1));
  const auto [from, until] = by_hash_.equal_range(hash);
  for (auto it = from; it != until; ++it)
    if (it->second->ids == shape.ids && it->second->starts == shape.starts) return it->second;
  auto kept = std::make_unique<Shape>(std::move(shape));
  kept->number = shapes();
  if (static_cast<int64_t>(kept->ids.size()) > wide_) {
    kept->group_of.assign(words->size, -1);
    for (size_t g = 0; g + 1 < kept->starts.size(); ++g)
      for (int32_t i = kept->starts[g]; i < kept->starts[g + 1]; ++i)
        kept->group_of[kept->ids[i]] = static_cast<int32_t>(g);
  }
  held_ += static_cast<int64_t>(sizeof(Shape)) + kept->bytes();
  by_hash_.emplace(hash, kept.get());
  shapes_.push_back(std::move(kept));
  return shapes_.back().get();
}

int Grammar::can_finish(int32_t state, int64_t room) const {
  if (accepting(state)) return 1;
  const int64_t bytes = bytes_left_[state];
  if (bytes > room * words->longest) return 0;
  if (bytes <= room && words->covers_bytes) return 1;
  return left_[state] < 0 ? -1 : left_[state] <= room;
}

int32_t Grammar::tokens_left(int32_t state) {
  if (accepting(state)) return 0;
  return left_[state] < 0 ? search(state) : left_[state];
}

// Breadth first. A way that is longer than what is known already (by single bytes, or of a state on the way) is left.
int32_t Grammar::search(int32_t start) {
  struct Seen {
    int32_t state, before;
  };
  int32_t best = words->covers_bytes ? bytes_left_[start] : kFar, last = -1;
  std::vector<Seen> seen = {{start, -1}};
  std::vector<uint8_t> known(done + 1, 0);
  known[start] = 1;
  int64_t work = work_;
  size_t layer = 0;
  for (int32_t depth = 0; depth < best && layer < seen.size() && work > 0; ++depth) {
    const size_t until = seen.size();
    for (; layer < until && work > 0; ++layer) {
      const int32_t state = seen[layer].state;
      const int32_t more = accepting(state) ? 0 : left_[state] < 0 ? kFar : left_[state];
      if (more < best - depth) best = depth + more, last = static_cast<int32_t>(layer);
      const int64_t least = (bytes_left_[state] + words->longest - 1) / std::max(words->longest, 1);
      if (more < kFar || depth + least >= best) continue;
      const Row& row = make(state);
      work -= static_cast<int64_t>(row.shape->ids.size()) + 64;
      for (const int32_t target : row.targets) {
        if (known[target]) continue;
        known[target] = 1;
        if (target != done) seen.push_back({target, static_cast<int32_t>(layer)});
      }
    }
  }
  left_[start] = best;
  int32_t left = last < 0 ? 0 : best;
  std::vector<int32_t> way;
  for (int32_t i = last; i >= 0; i = seen[i].before) way.push_back(seen[i].state);
  for (auto it = way.rbegin(); it != way.rend(); ++it, --left)
    if (*it != start && (left_[*it] < 0 || left < left_[*it])) left_[*it] = left;
  return best;
}

}  // namespace losa
