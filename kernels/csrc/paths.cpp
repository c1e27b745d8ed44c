// Dynamic programming over the positions of a block and the states of its grammar.
#include "paths.h"

#include <algorithm>
#include <limits>

#include "driver.h"

namespace losa {

namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr double kLeast = -1e30;  // of a score: what the model rules out is still in order, and sums stay finite

}  // namespace

double HoleRow::plain(int64_t id) const {
  const double found = logits[id] * sharpness - total;
  return found > kLeast ? found : kLeast;
}

double HoleRow::score(int64_t id) const {
  return kept && !kept[id] ? plain(id) - kFiltered : plain(id);
}

void Paths::begin(const Grammar& grammar, const Block& block, int64_t likeliest, int64_t most) {
  grammar_ = &grammar, block_ = block, likeliest_ = likeliest, most_ = most;
  const size_t states = grammar.done + 1, size = grammar.words->size, positions = block.length + 1;
  if (met_.size() < states) met_.resize(states, 0), behind_.resize(states), linear_.resize(states);
  if (weighed_.size() < size) weighed_.resize(size, 0), liked_.resize(size, 0), score_.resize(size), p_.resize(size);
  if (before_.size() < positions) before_.resize(positions), value_.resize(positions), likely_.resize(positions);
  mass_.assign(positions, 0.0);
  count_.assign(positions, 0);
  for (auto& likely : likely_) likely.clear();
  if (turn_ > std::numeric_limits<uint32_t>::max() - 4 * positions) {
    for (auto* marks : {&met_, &weighed_, &liked_}) std::fill(marks->begin(), marks->end(), 0);
    turn_ = 0;
  }
}

void Paths::meet(int32_t state, std::vector<int32_t>& states) {
  if (met_[state] == turn_) return;
  met_[state] = turn_;
  states.push_back(state);
}

// Takes a shape off the room for shapes, if it was not yet. False: there is none left.
bool Paths::fits(const Shape& shape) {
  if (shape.number >= static_cast<int64_t>(counted_.size())) counted_.resize(shape.number + 1, 0);
  if (!counted_[shape.number]) counted_[shape.number] = 1, room_ -= shape.bytes();
  return room_ >= 0;
}

bool Paths::forward(Grammar* maker) {
  counted_.assign(grammar_->shapes(), 0);
  room_ = most_;
  before_[0].assign(1, block_.state);
  for (int64_t i = 0; i < block_.length; ++i) {
    std::vector<int32_t>& behind = before_[i + 1];
    behind.clear();
    ++turn_;
    for (const int32_t state : before_[i]) {
      if (block_.tokens[i] >= 0) {
        if (i == block_.placed && state == grammar_->done && !grammar_->is_end(block_.tokens[i])) continue;
        const int32_t target = grammar_->step(state, block_.tokens[i]);
        if (target != kNowhere) meet(target, behind);
      } else if (state == grammar_->done) {
        meet(state, behind);
      } else {
        if (!grammar_->row(state) && !maker) return false;
        const Row& row = maker ? maker->make(state) : *grammar_->row(state);
        if (!fits(*row.shape)) {
          if (!maker) return false;
          throw Refusal("the states of a block have more than %lld bytes of tokens", (long long)most_);
        }
        for (const int32_t target : row.targets) meet(target, behind);
      }
    }
  }
  for (const int32_t state : before_[block_.length]) {
    if (grammar_->can_finish(state, block_.room) >= 0) continue;
    if (!maker) return false;
    maker->tokens_left(state);
  }
  return true;
}

bool Paths::possible() const {
  const std::vector<int32_t>& last = before_[block_.length];
  return std::any_of(last.begin(), last.end(), [&](int32_t s) { return grammar_->can_finish(s, block_.room) > 0; });
}

bool Paths::choose(const HoleRow* rows, const Filling& filling, Choice* choices) {
  const int64_t length = block_.length;
  value_[length].clear();
  for (const int32_t state : before_[length])
    value_[length].push_back(grammar_->can_finish(state, block_.room) > 0 ? 0.0 : kNever);
  int64_t hole = std::count(block_.tokens, block_.tokens + length, -1);
  for (int64_t i = length - 1; i >= 0; --i) {
    set_behind(i + 1);
    value_[i].assign(before_[i].size(), kNever);
    if (block_.tokens[i] >= 0) {
      lead_token(i);
      continue;
    }
    --hole;
    const bool more = lead_hole(i);
    if (!filling.path && filling.only >= 0 && filling.only != hole) continue;
    weigh_hole(i, rows[hole], hole, filling.drawn);
    if (filling.path)
      value_hole(i, filling.drawn);
    else
      choices[hole] = own(rows[hole], hole, !more, filling.drawn);
  }
  if (value_[0][0] == kNever) return false;
  if (filling.path) walk(rows, filling.drawn, choices);
  return true;
}

void Paths::set_behind(int64_t position) {
  for (size_t i = 0; i < before_[position].size(); ++i) behind_[before_[position][i]] = value_[position][i];
}

void Paths::lead_token(int64_t position) {
  for (size_t i = 0; i < before_[position].size(); ++i) {
    const int32_t target = grammar_->step(before_[position][i], block_.tokens[position]);
    if (target != kNowhere) value_[position][i] = behind_[target];
  }
}

// Which states lead on, and by which groups; whether any but `done` do. Values are 0 for now.
bool Paths::lead_hole(int64_t position) {
  places_.clear();
  groups_.clear();
  place_of_.assign(grammar_->shapes(), -1);
  bool more = false;
  for (size_t i = 0; i < before_[position].size(); ++i) {
    const int32_t state = before_[position][i];
    double& value = value_[position][i];
    if (state == grammar_->done) {
      value = behind_[state];
      continue;
    }
    const Row& row = *grammar_->row(state);
    int64_t& place = place_of_[row.shape->number];
    if (place < 0) {
      place = static_cast<int64_t>(places_.size());
      places_.push_back({row.shape, static_cast<int64_t>(groups_.size()), false});
      groups_.resize(groups_.size() + row.targets.size(), {false, kNever, 0.0});
    }
    Group* group = groups_.data() + places_[place].first;
    for (const int32_t target : row.targets) {
      if (behind_[target] != kNever) group->used = true, value = 0.0;
      ++group;
    }
    more = more || value != kNever;
  }
  return more;
}

// Gains of the used groups, and the probability of all that is allowed.
void Paths::weigh_hole(int64_t position, const HoleRow& row, int64_t hole, bool drawn) {
  ++turn_;
  mass_now_ = 0.0;
  seen_.clear();
  const auto has_used = [&](const Place& place) {
    const Group* from = groups_.data() + place.first;
    return std::any_of(from, from + place.shape->starts.size() - 1, [](const Group& group) { return group.used; });
  };
  liked_only_ = std::any_of(places_.begin(), places_.end(),
                            [&](const Place& place) { return !place.shape->group_of.empty() && has_used(place); });
  if (liked_only_) look(row, hole);
  for (Place& place : places_) weigh(row, place, drawn);
  const bool ended = std::any_of(before_[position].begin(), before_[position].end(),
                                 [&](int32_t state) { return state == grammar_->done && behind_[state] != kNever; });
  if (ended)
    for (const int32_t id : grammar_->ends) weigh_id(row, id);
  if (liked_only_ && (seen_.empty() || starved(position)))
    for (Place& place : places_) place.exact = true, weigh(row, place, drawn);
  mass_[hole] = mass_now_, count_[hole] = static_cast<int64_t>(seen_.size());
}

// Whether some state that leads on does so by none of the ids that were looked at.
bool Paths::starved(int64_t position) const {
  for (size_t i = 0; i < before_[position].size(); ++i) {
    if (before_[position][i] == grammar_->done || value_[position][i] == kNever) continue;
    const Row& row = *grammar_->row(before_[position][i]);
    const Group* group = groups_of(row);
    bool leads = false;
    for (size_t e = 0; e < row.targets.size() && !leads; ++e)
      leads = behind_[row.targets[e]] != kNever && group[e].gain != kNever;
    if (!leads) return true;
  }
  return false;
}

}  // namespace losa
