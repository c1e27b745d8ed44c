// What the tokens of a hole are worth, and which are taken.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "paths.h"

namespace losa {

namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr double kTiny = 1e-250;  // smaller sums are made anew from logarithms

// The greatest of each of `chunks` parts of a row, all but the last of `step` ids.
std::vector<float> chunk_maxima(const float* logits, int64_t size, int64_t step) {
  constexpr int kLanes = 16;
  std::vector<float> found;
  for (int64_t from = 0; from < size; from += step) {
    const int64_t until = std::min(from + step, size);
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, logits[from]);
    int64_t i = from;
    for (; i + kLanes <= until; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lanes[j] = logits[i + j] > lanes[j] ? logits[i + j] : lanes[j];
    for (; i < until; ++i) lanes[0] = std::max(lanes[0], logits[i]);
    found.push_back(*std::max_element(lanes, lanes + kLanes));
  }
  return found;
}

// The logarithm of the sum of e^value(i) over 0 .. count.
template <class Value>
double log_sum(size_t count, Value value) {
  double most = kNever, sum = 0.0;
  for (size_t i = 0; i < count; ++i) most = std::max(most, value(i));
  if (most == kNever) return kNever;
  for (size_t i = 0; i < count; ++i) sum += std::exp(value(i) - most);
  return most + std::log(sum);
}

}  // namespace

// Score and probability of an id, once per turn.
double Paths::weigh_id(const HoleRow& row, int32_t id) {
  if (weighed_[id] != turn_) {
    weighed_[id] = turn_;
    const double plain = row.plain(id);
    score_[id] = row.kept && !row.kept[id] ? plain - kFiltered : plain;
    p_[id] = std::exp(plain);
    if (!liked_only_ || liked_[id] == turn_) mass_now_ += p_[id];
    seen_.push_back(id);
  }
  return score_[id];
}

// Gains of the used groups of a shape: of all of its ids, or of a wide one of the likeliest.
void Paths::weigh(const HoleRow& row, Place& place, bool drawn) {
  const Shape& shape = *place.shape;
  Group* groups = groups_.data() + place.first;
  const size_t count = shape.starts.size() - 1;
  if (!shape.group_of.empty() && !place.exact) {
    for (const int32_t id : likely_[liked_now_]) {
      const int32_t g = shape.group_of[id];
      if (g < 0 || !groups[g].used) continue;
      const double score = weigh_id(row, id);
      if (!drawn || groups[g].gain == kNever)
        groups[g].gain = std::max(groups[g].gain, score);
      else
        groups[g].gain = std::max(groups[g].gain, score) + std::log1p(std::exp(-std::fabs(groups[g].gain - score)));
    }
    return;
  }
  for (size_t g = 0; g < count; ++g) {
    if (!groups[g].used) continue;
    const int32_t *from = shape.ids.data() + shape.starts[g], *until = shape.ids.data() + shape.starts[g + 1];
    double best = kNever, sum = 0.0;
    for (const int32_t* id = from; id < until; ++id) {
      best = std::max(best, weigh_id(row, *id));
      if (!row.kept || row.kept[*id]) sum += p_[*id];
    }
    groups[g].gain = !drawn        ? best
                     : sum > kTiny ? std::log(sum)
                                   : log_sum(until - from, [&](size_t i) { return score_[from[i]]; });
  }
}

// The likeliest ids of a hole, ties to the lowest, and the probability of all others. As many parts of the row as ids
// are wanted have a maximum of at least `least`, so only these need to be gone through.
void Paths::look(const HoleRow& row, int64_t hole) {
  constexpr int64_t kPerChunk = 4;  // parts for every id that is wanted
  const int64_t size = grammar_->words->size, wanted = std::min(likeliest_, size);
  const int64_t step = std::max<int64_t>(1, size / (wanted * kPerChunk));
  const std::vector<float> maxima = chunk_maxima(row.logits, size, step);
  std::vector<float> order = maxima;
  std::nth_element(order.begin(), order.begin() + wanted - 1, order.end(), std::greater<float>());
  const float least = order[wanted - 1];
  std::vector<int32_t>& likely = likely_[hole];
  likely.clear();
  for (size_t chunk = 0; chunk < maxima.size(); ++chunk) {
    if (maxima[chunk] < least) continue;
    const int64_t from = static_cast<int64_t>(chunk) * step, until = std::min(from + step, size);
    for (int64_t id = from; id < until; ++id)
      if (row.logits[id] >= least) likely.push_back(static_cast<int32_t>(id));
  }
  const auto likelier = [&](int32_t a, int32_t b) {
    return row.logits[a] != row.logits[b] ? row.logits[a] > row.logits[b] : a < b;
  };
  if (wanted < static_cast<int64_t>(likely.size()))
    std::nth_element(likely.begin(), likely.begin() + wanted, likely.end(), likelier);
  likely.resize(wanted);
  std::sort(likely.begin(), likely.end());
  double sum = 0.0;
  for (const int32_t id : likely) liked_[id] = turn_, sum += std::exp(row.plain(id));
  mass_now_ += std::max(0.0, 1.0 - sum);
  liked_now_ = hole;
}

void Paths::value_hole(int64_t position, bool drawn) {
  double best_gain = kNever, best_behind = kNever;
  for (const Group& group : groups_) best_gain = std::max(best_gain, group.gain);
  for (const int32_t state : before_[position + 1]) best_behind = std::max(best_behind, behind_[state]);
  if (drawn) {
    for (Group& group : groups_) group.linear = std::exp(group.gain - best_gain);
    for (const int32_t state : before_[position + 1]) linear_[state] = std::exp(behind_[state] - best_behind);
  }
  for (size_t i = 0; i < before_[position].size(); ++i) {
    const int32_t state = before_[position][i];
    double& value = value_[position][i];
    if (value != kNever && state != grammar_->done)
      value = through(*grammar_->row(state), best_gain + best_behind, drawn);
  }
}

// What a state is worth that leads on: its best way, or all together. shift: the greatest there could be.
double Paths::through(const Row& row, double shift, bool drawn) const {
  const Group* group = groups_of(row);
  const size_t count = row.targets.size();
  double found = kNever, sum = 0.0;
  if (!drawn) {
    for (size_t i = 0; i < count; ++i) found = std::max(found, group[i].gain + behind_[row.targets[i]]);
    return found;
  }
  for (size_t i = 0; i < count; ++i) sum += group[i].linear * linear_[row.targets[i]];
  if (sum > kTiny) return std::log(sum) + shift;
  return log_sum(count, [&](size_t i) { return group[i].gain + behind_[row.targets[i]]; });
}

// From the start to the end along the best path, or a drawn one.
void Paths::walk(const HoleRow* rows, bool drawn, Choice* choices) {
  int32_t state = block_.state;
  int64_t hole = 0;
  for (int64_t i = 0; i < block_.length; ++i) {
    if (block_.tokens[i] >= 0) {
      state = grammar_->step(state, block_.tokens[i]);
      continue;
    }
    const HoleRow& row = rows[hole];
    if (state == grammar_->done) {
      choices[hole] = {grammar_->ends[0], 0.0, std::max(row.plain(grammar_->ends[0]), -kFiltered)};
    } else {
      int64_t token = 0;
      set_behind(i + 1);
      state = pick(*grammar_->row(state), row, hole, drawn, &token);
      choices[hole] = choice(row, hole, token);
    }
    ++hole;
  }
}

// The next token of a path, and the state behind it.
int32_t Paths::pick(const Row& row, const HoleRow& hole, int64_t number, bool drawn, int64_t* token) {
  const Shape& shape = *row.shape;
  options_.clear();
  targets_.clear();
  const auto offer = [&](int32_t id, size_t g) {
    options_.push_back({hole.score(id) + behind_[row.targets[g]], id});
    targets_.push_back(row.targets[g]);
  };
  if (!shape.group_of.empty())
    for (const int32_t id : likely_[number]) {
      const int32_t g = shape.group_of[id];
      if (g >= 0 && behind_[row.targets[g]] != kNever) offer(id, g);
    }
  if (options_.empty())
    for (size_t g = 0; g < row.targets.size(); ++g) {
      if (behind_[row.targets[g]] == kNever) continue;
      for (int32_t i = shape.starts[g]; i < shape.starts[g + 1]; ++i) offer(shape.ids[i], g);
    }
  const size_t found = taken(hole, drawn);
  *token = options_[found].second;
  return targets_[found];
}

// The place of the best of `options_`, the first of equal ones, or of one drawn.
size_t Paths::taken(const HoleRow& row, bool drawn) {
  size_t best = 0;
  for (size_t i = 1; i < options_.size(); ++i)
    if (options_[i].first > options_[best].first) best = i;
  if (!drawn) return best;
  const double most = options_[best].first;
  double total = 0.0, sum = 0.0;
  for (auto& option : options_) total += option.first = std::exp(option.first - most);
  for (size_t i = 0; i < options_.size(); ++i)
    if ((sum += options_[i].first) > row.uniform * total) return i;
  return best;
}

// A hole by itself: the best of all that is allowed there, or one drawn.
Choice Paths::own(const HoleRow& row, int64_t hole, bool only_done, bool drawn) {
  options_.clear();
  std::sort(seen_.begin(), seen_.end());
  for (const int32_t id : seen_) options_.push_back({score_[id], id});
  if (options_.empty()) return {0, 0.0, -kFiltered};  // of a position that nothing can reach
  Choice found = choice(row, hole, options_[taken(row, drawn)].second);
  if (only_done) found.confidence = 0.0;
  return found;
}

// A token with its probability among what is allowed.
Choice Paths::choice(const HoleRow& row, int64_t hole, int64_t token) const {
  const double plain = row.plain(token), mass = mass_[hole];
  const double confidence =
      mass > 0.0 ? std::min(1.0, std::exp(plain) / mass) : 1.0 / static_cast<double>(count_[hole]);
  return {token, confidence, std::max(plain, -kFiltered)};
}

}  // namespace losa
