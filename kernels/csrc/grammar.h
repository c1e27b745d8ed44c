// An automaton over the tokens of a vocabulary: a row of it is made when its state is first met.
//
// States are those of an automaton over bytes, and one more, `done`, which the ends of an output lead to and nothing
// leaves. Making rows and searching change a grammar and are for one thread at a time; all that is const is for many.
// V vocabulary, S states without `done`, C classes of bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace losa {

constexpr int32_t kNowhere = -1, kFar = INT32_MAX;

// The bytes of every id, and the ids with any in the order of their bytes, so that one walk serves a common beginning.
struct Words {
  Words(int64_t size, const int64_t* starts, const uint8_t* bytes);
  int64_t size;
  std::vector<int64_t> starts;  // [V + 1]
  std::vector<uint8_t> bytes;
  std::vector<int32_t> order;   // ids
  std::vector<int32_t> common;  // bytes that order[i] has in common with order[i - 1]
  std::vector<int64_t> first;   // [257] where the ids of a first byte begin in `order`
  int32_t longest = 0;
  bool covers_bytes = false;  // every byte is an id of its own
};

// Ids in groups that lead to the same state, whatever that is: group g is ids[starts[g]] to ids[starts[g + 1]],
// ascending. States that count something have equal shapes, and so share one.
struct Shape {
  std::vector<int32_t> ids, starts;
  std::vector<int32_t> group_of;  // [V], -1 = in none; of wide shapes only
  int64_t number;                 // among all shapes
  int64_t bytes() const { return 4 * static_cast<int64_t>(ids.size() + starts.size() + group_of.size()); }
};

// What may follow in a state: group g of the shape leads to targets[g], ascending.
struct Row {
  const Shape* shape;
  std::vector<int32_t> targets;
};

struct Table {  // an automaton over bytes, as a caller has it
  int64_t states, classes;
  const int32_t* next;        // [S, C]
  const uint8_t* class_of;    // [256]
  const uint8_t* accepting;   // [S]
  const int32_t* bytes_left;  // [S] the fewest bytes to an accepting state
};

class Grammar {
 public:
  // wide: shapes of more ids than this are wide. ends: ids that end an output. work: of one search, in ids looked at.
  Grammar(std::shared_ptr<const Words> words, const Table& table, const int32_t* ends, int64_t end_count, int64_t wide,
          int64_t work);

  const Row* row(int32_t state) const { return rows_[state].get(); }  // null: not made yet
  const Row& make(int32_t state);
  // The state behind a token, or kNowhere.
  int32_t step(int32_t state, int64_t token) const;
  bool is_end(int64_t token) const { return is_end_[token]; }
  bool accepting(int32_t state) const { return state == done || accepting_[state]; }
  // Whether at most `room` tokens lead to where an output may end: 1 yes, 0 no, -1 not known without a search.
  int can_finish(int32_t state, int64_t room) const;
  // The fewest tokens to where an output may end; what single bytes take if the search for less takes too long, and
  // kFar without them. What is found good stays so: the way found is remembered with its states.
  int32_t tokens_left(int32_t state);
  // Forget all rows. Pointers to them are void.
  void forget();
  int64_t held() const { return held_; }  // bytes of rows and tables, about
  int64_t shapes() const { return static_cast<int64_t>(shapes_.size()); }

  const std::shared_ptr<const Words> words;
  const int32_t done;
  const std::vector<int32_t> ends;

 private:
  int32_t next(int32_t state, uint8_t byte) const { return next_[state * classes_ + class_of_[byte]]; }
  void follow(int32_t state, std::vector<std::pair<int32_t, int32_t>>& found) const;
  void in_order(std::vector<std::pair<int32_t, int32_t>>& found) const;
  const Shape* shared(Shape&& shape);
  int32_t search(int32_t state);

  const int64_t classes_, wide_, work_;
  std::vector<int32_t> next_;
  std::vector<uint8_t> class_of_, accepting_, is_end_;
  std::vector<int32_t> bytes_left_, left_;  // left_: tokens, -1 = not searched
  std::vector<int32_t> sizes_;              // [S + 1] of groups while a row is made, 0 otherwise
  std::vector<std::unique_ptr<Row>> rows_;
  std::vector<std::unique_ptr<Shape>> shapes_;
  std::unordered_multimap<uint64_t, const Shape*> by_hash_;
  int64_t own_, held_;
};

}  // namespace losa
