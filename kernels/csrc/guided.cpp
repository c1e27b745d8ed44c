// Tokens for the blocks of outputs that have to match: the calls.
#include <algorithm>
#include <atomic>
#include <numeric>

#include "driver.h"
#include "paths.h"

namespace losa {

namespace {

using SharedWords = std::shared_ptr<const Words>;

struct Held {  // what a caller has a handle of
  Grammar grammar;
  int64_t likeliest, limit;
};

Paths& paths_of_thread() {
  static thread_local Paths paths;
  return paths;
}

Grammar& grammar_of(const LosaGuided& guided, int64_t b) {
  return static_cast<Held*>(guided.grammars[b])->grammar;
}

Block block_of(const LosaGuided& guided, int64_t b, const int64_t* tokens, int64_t placed = -1) {
  return {tokens, guided.indptr[b + 1] - guided.indptr[b], static_cast<int32_t>(guided.states[b]), guided.rooms[b],
          placed};
}

// First hole of each block, and their number: [blocks + 1]. Checks everything.
std::vector<int64_t> first_holes(const LosaGuided& guided) {
  std::vector<int64_t> first(1, 0);
  for (int64_t b = 0; b < guided.blocks; ++b) {
    const Grammar& grammar = grammar_of(guided, b);
    const int64_t from = guided.indptr[b], until = guided.indptr[b + 1];
    if (from > until || guided.states[b] < 0 || guided.states[b] > grammar.done || guided.rooms[b] < 0)
      throw Refusal("block %lld: state %lld of %d, room %lld", (long long)b, (long long)guided.states[b], grammar.done,
                    (long long)guided.rooms[b]);
    for (int64_t i = from; i < until; ++i)
      if (guided.tokens[i] < -1 || guided.tokens[i] >= grammar.words->size)
        throw Refusal("block %lld: token %lld of %lld", (long long)b, (long long)guided.tokens[i],
                      (long long)grammar.words->size);
    if (grammar.words->size > guided.width)
      throw Refusal("logits: %lld of %lld ids", (long long)guided.width, (long long)grammar.words->size);
    if (grammar.ends.empty()) throw Refusal("block %lld: nothing ends its output", (long long)b);
    first.push_back(first.back() + std::count(guided.tokens + from, guided.tokens + until, -1));
  }
  if (first.back() != guided.holes)
    throw Refusal("rows: found %lld, for %lld holes", (long long)guided.holes, (long long)first.back());
  return first;
}

HoleRow row_of(const LosaGuided& guided, int64_t hole) {
  return {guided.logits + hole * guided.width, guided.kept ? guided.kept + hole * guided.width : nullptr,
          guided.sharpness[hole], guided.total[hole], guided.uniform[hole]};
}

// work(b) for every block in parallel; it is false where a row is missing. These are then prepared, one after the
// other, and come once more: prepare(b) makes what is missing.
template <class Work, class Prepare>
void over_blocks(const LosaRun* run, const LosaGuided& guided, Work work, Prepare prepare) {
  std::vector<int64_t> todo(guided.blocks);
  std::iota(todo.begin(), todo.end(), 0);
  std::vector<uint8_t> lacking(guided.blocks, 0);
  std::atomic<int64_t> impossible{-1}, starved{0};
  while (!todo.empty()) {
    in_parallel(run->threads, static_cast<int64_t>(todo.size()), [&](int64_t t, int) {
      try {
        const int found = work(todo[t]);
        lacking[todo[t]] = found < 0;
        if (found == 0) impossible = todo[t];
      } catch (const std::bad_alloc&) {
        starved = 1;
      }
    });
    if (starved) throw std::bad_alloc();
    if (impossible >= 0) throw Refusal("block %lld: no token sequence can match", (long long)impossible);
    std::vector<int64_t> again;
    for (const int64_t b : todo)
      if (lacking[b]) prepare(b), again.push_back(b);
    todo.swap(again);
  }
}

int64_t likeliest_of(const LosaGuided& guided, int64_t b) {
  return static_cast<Held*>(guided.grammars[b])->likeliest;
}

// A block of this many bytes of rows can be remembered as a whole, so that its next step does not make them anew.
int64_t most_of(const LosaGuided& guided, int64_t b) {
  return static_cast<Held*>(guided.grammars[b])->limit;
}

// Choices for the holes of a block as it stands. 1 done, 0 impossible, -1 a row is missing.
int fill(const LosaGuided& guided, int64_t b, const int64_t* tokens, const HoleRow* rows, int64_t only,
         Choice* choices) {
  Paths& paths = paths_of_thread();
  paths.begin(grammar_of(guided, b), block_of(guided, b, tokens), likeliest_of(guided, b), most_of(guided, b));
  if (!paths.forward(nullptr)) return -1;
  return paths.choose(rows, {guided.path[b] != 0, guided.drawn[b] != 0, only}, choices);
}

void prepare(const LosaGuided& guided, int64_t b, const int64_t* tokens) {
  Paths& paths = paths_of_thread();
  paths.begin(grammar_of(guided, b), block_of(guided, b, tokens), 0, most_of(guided, b));
  paths.forward(&grammar_of(guided, b));
}

// Whether a token was well placed: 1 some path is left, 0 none, -1 a row is missing.
int fits(const LosaGuided& guided, int64_t b, const int64_t* tokens, int64_t placed) {
  Paths& paths = paths_of_thread();
  paths.begin(grammar_of(guided, b), block_of(guided, b, tokens, placed), 0, most_of(guided, b));
  return paths.forward(nullptr) ? paths.possible() : -1;
}

struct Settling {  // of one block: its tokens so far, and the accepted holes that are still to come, the surest first
  std::vector<int64_t> tokens, places, order;
  size_t next = 0;
};

Settling settling_of(const LosaGuided& guided, int64_t b, int64_t first, const uint8_t* accepted,
                     const double* confidence) {
  Settling found;
  found.tokens.assign(guided.tokens + guided.indptr[b], guided.tokens + guided.indptr[b + 1]);
  for (size_t i = 0; i < found.tokens.size(); ++i)
    if (found.tokens[i] < 0) found.places.push_back(static_cast<int64_t>(i));
  for (size_t n = 0; n < found.places.size(); ++n)
    if (accepted[first + n]) found.order.push_back(static_cast<int64_t>(n));
  std::stable_sort(found.order.begin(), found.order.end(),
                   [&](int64_t a, int64_t c) { return confidence[first + a] > confidence[first + c]; });
  return found;
}

// Settles hole after hole; goes on where it was stopped by a missing row.
int settle(const LosaGuided& guided, int64_t b, int64_t first, Settling& at, int64_t* chosen, double* logprob) {
  std::vector<HoleRow> rows;
  std::vector<Choice> choices;
  for (; at.next < at.order.size(); ++at.next) {
    const int64_t hole = at.order[at.next];
    int64_t& token = at.tokens[at.places[hole]];
    token = chosen[first + hole];
    int found = fits(guided, b, at.tokens.data(), at.places[hole]);
    if (found == 0) {
      token = -1;
      rows.clear();
      int64_t only = -1;
      for (size_t n = 0; n < at.places.size(); ++n) {
        if (at.tokens[at.places[n]] >= 0) continue;
        if (static_cast<int64_t>(n) == hole) only = static_cast<int64_t>(rows.size());
        rows.push_back(row_of(guided, first + n));
      }
      choices.resize(rows.size());
      found = fill(guided, b, at.tokens.data(), rows.data(), only, choices.data());
      if (found > 0) {
        token = chosen[first + hole] = choices[only].token;
        logprob[first + hole] = choices[only].logprob;
      }
    }
    if (found <= 0) return token = -1, found;
  }
  return 1;
}

}  // namespace

}  // namespace losa

using namespace losa;

extern "C" int losa_words_new(LosaRun* run, int64_t size, const int64_t* starts, const uint8_t* bytes, void** words) {
  return guarded(run, [&](const Level&) {
    if (size < 1 || size >= kFar || starts[0] != 0) throw Refusal("a vocabulary of %lld ids", (long long)size);
    for (int64_t i = 0; i < size; ++i)
      if (starts[i] > starts[i + 1]) throw Refusal("id %lld ends before it starts", (long long)i);
    *words = new SharedWords(std::make_shared<const Words>(size, starts, bytes));
  });
}

extern "C" void losa_words_free(void* words) {
  delete static_cast<SharedWords*>(words);
}

extern "C" int losa_grammar_new(LosaRun* run, void* words, const LosaAutomaton* automaton, const int32_t* ends,
                                int64_t end_count, int64_t wide, int64_t likeliest, int64_t work, int64_t limit,
                                void** grammar) {
  return guarded(run, [&](const Level&) {
    const LosaAutomaton& a = *automaton;
    const SharedWords& shared = *static_cast<SharedWords*>(words);
    if (a.states < 1 || a.states >= kFar || a.classes < 1 || a.classes > 256)
      throw Refusal("an automaton of %lld states and %lld classes", (long long)a.states, (long long)a.classes);
    for (int64_t i = 0; i < a.states * a.classes; ++i)
      if (a.next[i] < -1 || a.next[i] >= a.states) throw Refusal("state %d of %lld", a.next[i], (long long)a.states);
    for (int i = 0; i < 256; ++i)
      if (a.class_of[i] >= a.classes) throw Refusal("class %d of %lld", a.class_of[i], (long long)a.classes);
    for (int64_t i = 0; i < end_count; ++i)
      if (ends[i] < 0 || ends[i] >= shared->size) throw Refusal("end %d of %lld", ends[i], (long long)shared->size);
    if (wide < 1 || likeliest < 1) throw Refusal("wide %lld, likeliest %lld", (long long)wide, (long long)likeliest);
    const Table table = {a.states, a.classes, a.next, a.class_of, a.accepting, a.bytes_left};
    *grammar = new Held{Grammar(shared, table, ends, end_count, wide, work), likeliest, limit};
  });
}

extern "C" void losa_grammar_free(void* grammar) {
  delete static_cast<Held*>(grammar);
}

extern "C" int64_t losa_grammar_bytes(void* grammar) {
  return static_cast<Held*>(grammar)->grammar.held();
}

extern "C" int losa_grammar_walk(LosaRun* run, void* grammar, const int64_t* tokens, int64_t count, int64_t* state) {
  return guarded(run, [&](const Level&) {
    const Grammar& held = static_cast<Held*>(grammar)->grammar;
    if (*state < 0 || *state > held.done) throw Refusal("state: found %lld of %d", (long long)*state, held.done);
    for (int64_t i = 0; i < count; ++i)
      if (tokens[i] < 0 || tokens[i] >= held.words->size) throw Refusal("tokens: found %lld", (long long)tokens[i]);
    for (int64_t i = 0; i < count && *state != kNowhere; ++i)
      *state = held.step(static_cast<int32_t>(*state), tokens[i]);
  });
}

extern "C" int losa_grammar_left(LosaRun* run, void* grammar, int64_t state, int64_t room, int64_t* left) {
  return guarded(run, [&](const Level&) {
    Grammar& held = static_cast<Held*>(grammar)->grammar;
    if (state < 0 || state > held.done) throw Refusal("state: found %lld of %d", (long long)state, held.done);
    const int32_t at = static_cast<int32_t>(state);
    *left = room >= 0 && held.can_finish(at, room) > 0 ? 0 : held.tokens_left(at);
  });
}

extern "C" int losa_guide(LosaRun* run, const LosaGuided* guided, int64_t* chosen, double* confidence,
                          double* logprob) {
  return guarded(run, [&](const Level&) {
    const std::vector<int64_t> first = first_holes(*guided);
    for (int64_t b = 0; b < guided->blocks; ++b) {
      const Held* held = static_cast<Held*>(guided->grammars[b]);
      if (held->grammar.held() > held->limit) grammar_of(*guided, b).forget();
    }
    const auto work = [&](int64_t b) {
      std::vector<HoleRow> rows;
      std::vector<Choice> choices(first[b + 1] - first[b]);
      for (int64_t hole = first[b]; hole < first[b + 1]; ++hole) rows.push_back(row_of(*guided, hole));
      const int found = fill(*guided, b, guided->tokens + guided->indptr[b], rows.data(), -1, choices.data());
      for (size_t n = 0; found > 0 && n < choices.size(); ++n) {
        chosen[first[b] + n] = choices[n].token;
        confidence[first[b] + n] = choices[n].confidence;
        logprob[first[b] + n] = choices[n].logprob;
      }
      return found;
    };
    over_blocks(run, *guided, work, [&](int64_t b) { prepare(*guided, b, guided->tokens + guided->indptr[b]); });
  });
}

extern "C" int losa_settle(LosaRun* run, const LosaGuided* guided, const uint8_t* accepted, const double* confidence,
                           int64_t* chosen, double* logprob) {
  return guarded(run, [&](const Level&) {
    const std::vector<int64_t> first = first_holes(*guided);
    for (int64_t b = 0; b < guided->blocks; ++b)
      for (int64_t i = first[b]; i < first[b + 1]; ++i)
        if (chosen[i] < 0 || chosen[i] >= grammar_of(*guided, b).words->size)
          throw Refusal("chosen: found %lld", (long long)chosen[i]);
    std::vector<Settling> settling(guided->blocks);
    for (int64_t b = 0; b < guided->blocks; ++b)
      if (!guided->path[b]) settling[b] = settling_of(*guided, b, first[b], accepted, confidence);
    over_blocks(
        run, *guided, [&](int64_t b) { return settle(*guided, b, first[b], settling[b], chosen, logprob); },
        [&](int64_t b) {
          Settling& at = settling[b];
          const int64_t hole = at.order[at.next];
          at.tokens[at.places[hole]] = chosen[first[b] + hole];
          prepare(*guided, b, at.tokens.data());
          at.tokens[at.places[hole]] = -1;
          prepare(*guided, b, at.tokens.data());
        });
  });
}
