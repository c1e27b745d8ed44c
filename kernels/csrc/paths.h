// The usable paths through one block: forward over the states that can be reached, backward over those that lead on.
//
// A position holds a known token or a hole. A path is a state before each position and one behind the last; it can be
// used if every known token is stepped on and its end can still finish. The definitions, and why they are as they are,
// stand in losa_runtime/grammar/block_paths.py and losa_runtime/runner/guided.py, the reference of all this.
#pragma once

#include <utility>

#include "grammar.h"

namespace losa {

struct Block {
  const int64_t* tokens;  // [length], -1 = a hole
  int64_t length;
  int32_t state;   // before the first
  int64_t room;    // tokens that may still follow behind the last
  int64_t placed;  // position of a token that was a hole, -1 = none: behind the end of an output it has to be one
};

// What the model says of a hole: the score of an id is logits[id] * sharpness - total, less kFiltered where not kept.
struct HoleRow {
  const float* logits;
  const uint8_t* kept;  // null: all are
  double sharpness, total, uniform;
  double plain(int64_t id) const;
  double score(int64_t id) const;
};

struct Choice {
  int64_t token;
  double confidence, logprob;
};

// How holes are filled. path: along the best path, or a drawn one; otherwise each hole by itself, and only hole `only`
// if that is not -1.
struct Filling {
  bool path, drawn;
  int64_t only;
};

constexpr double kFiltered = 1e4;

class Paths {
 public:
  // For a block of `grammar`, which is not to change before all is done. most: bytes that the distinct shapes of all
  // its rows may have, so that no block takes a memory and a time without bounds.
  void begin(const Grammar& grammar, const Block& block, int64_t likeliest, int64_t most);
  // The states before each position. False: a row or a search is missing, or there is too much; with a maker what is
  // missing is made, and too much is refused.
  bool forward(Grammar* maker);
  // Behind `forward`: whether some path can be used.
  bool possible() const;
  // Behind `forward`: a choice for every hole; rows and choices per hole in order. False: nothing can be used.
  bool choose(const HoleRow* rows, const Filling& filling, Choice* choices);

 private:
  struct Group {    // of one position
    bool used;      // whether a usable path has its tokens
    double gain;    // the best of its scores, or the logarithm of their sum
    double linear;  // e^(gain - the best gain)
  };
  struct Place {  // a distinct shape of one position, and its first group
    const Shape* shape;
    int64_t first;
    bool exact;  // all its tokens were looked at
  };
  void meet(int32_t state, std::vector<int32_t>& states);
  bool fits(const Shape& shape);
  void set_behind(int64_t position);
  void lead_token(int64_t position);
  bool lead_hole(int64_t position);
  bool starved(int64_t position) const;
  void weigh_hole(int64_t position, const HoleRow& row, int64_t hole, bool drawn);
  void weigh(const HoleRow& row, Place& place, bool drawn);
  double weigh_id(const HoleRow& row, int32_t id);
  void look(const HoleRow& row, int64_t hole);
  void value_hole(int64_t position, bool drawn);
  double through(const Row& row, double shift, bool drawn) const;
  void walk(const HoleRow* rows, bool drawn, Choice* choices);
  int32_t pick(const Row& row, const HoleRow& hole, int64_t number, bool drawn, int64_t* token);
  Choice own(const HoleRow& row, int64_t hole, bool only_done, bool drawn);
  Choice choice(const HoleRow& row, int64_t hole, int64_t token) const;
  size_t taken(const HoleRow& row, bool drawn);
  const Group* groups_of(const Row& row) const { return groups_.data() + places_[place_of_[row.shape->number]].first; }

  const Grammar* grammar_ = nullptr;
  Block block_ = {};
  int64_t likeliest_ = 0, most_ = 0, room_ = 0;  // room_: of most_, what is left
  std::vector<uint8_t> counted_;                 // [shapes] whether a shape was taken off it
  std::vector<std::vector<int32_t>> before_;     // [length + 1] states
  std::vector<std::vector<double>> value_;       // of each: of what follows; minus infinity = leads nowhere
  std::vector<double> behind_, linear_;          // [S + 1] values behind the position that is looked at
  std::vector<uint32_t> met_, weighed_, liked_;  // [S + 1], [V], [V]: equal to the turn = met in this turn
  uint32_t turn_ = 0;
  std::vector<double> score_, p_;  // [V] of the ids weighed in this turn
  std::vector<int64_t> place_of_;  // [shapes] of this position, -1 = none
  std::vector<Place> places_;
  std::vector<Group> groups_;
  std::vector<std::vector<int32_t>> likely_;  // per hole, if it was asked for: the likeliest ids, ascending
  std::vector<double> mass_;                  // per hole: the probability of what usable paths have there
  std::vector<int64_t> count_;                // and how many ids that are
  double mass_now_ = 0.0;
  std::vector<int32_t> seen_;                        // the ids weighed in this turn
  bool liked_only_ = false;                          // the mass counts the likeliest alone, and the rest as a whole
  int64_t liked_now_ = 0;                            // the hole of which these are
  std::vector<std::pair<double, int64_t>> options_;  // (score, id), to take one of
  std::vector<int32_t> targets_;                     // the states behind them
};

}  // namespace losa
