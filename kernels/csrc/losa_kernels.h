// The C interface of the CPU kernels: plain pointers and sizes, no tensor library, so that one binary serves all.
//
// Every call covers all segments of a group at once. Arrays are contiguous and indices int64. Nothing is read or
// written before all indices have been checked; a refusal returns 1 and leaves its reason in `LosaRun::error`.
// Results are the same bits for any number of threads and any company in the batch.
// S segments, B block length, R rows of the group, H query heads, G KV heads, D head dim, P pages of the pool.
#ifndef LOSA_KERNELS_H
#define LOSA_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOSA_ABI 7
#define LOSA_API __attribute__((visibility("default")))

enum LosaDType { LOSA_F32 = 0, LOSA_BF16 = 1, LOSA_F16 = 2 };
enum LosaShare { LOSA_MAX = 0, LOSA_MEAN = 1, LOSA_NONE = 2 };
enum LosaLevel { LOSA_PORTABLE = 0, LOSA_AVX2 = 1, LOSA_AVX512 = 2 };

typedef struct {
  int32_t level;    // a LosaLevel for which losa_has_level says 1
  int32_t threads;  // at least 1
  char error[240];  // out: why a call was refused
} LosaRun;

// One layer's pages: k, v [P, G, page_size, D], bounds [P, G, 2, D] (maximum, then minimum), moments [P, G, 2, D]
// (mean, then mean squared deviation, float32 beside keys of any dtype). Bounds and moments may be null.
typedef struct {
  int64_t pages;
  int32_t kv_heads, page_size, head_dim, dtype;
  void *k, *v, *bounds;
  float* moments;
} LosaPool;

// Segments and their page tables: table[table_indptr[s] ...] are the pages of segment s in order.
typedef struct {
  int64_t segments;
  const int64_t* table_indptr;  // [S + 1]
  const int64_t* table;
  const int64_t* prefix_lens;  // [S] stored positions before each segment's rows
  int64_t block_length;
} LosaGroup;

// Query rows: q [R, H, D] of the whole group; rows [count], sorted, those to be computed (null: all of them).
typedef struct {
  const float* q;
  int64_t total;
  const int64_t* rows;
  int64_t count;
  int32_t heads;
  float scale;
} LosaQuery;

// Granules to read, CSR: list (owner * heads + head). Owners are segments or, with per_row, computed rows.
// whole [S]: 1 = read the whole prefix; the segment's lists are empty.
typedef struct {
  const int64_t* indptr;
  const int64_t* indices;
  int64_t index_count;
  const uint8_t* whole;
  int64_t granule;
  int32_t heads, per_row;
} LosaLists;

// What the R rows of a group know of their prefixes. Row r has the state at place[r] (null: at r; no two at the same)
// of out [places, H, D] and lse [places, H]. The rows in `rows` [count], sorted (null: all of them), have new ones,
// fresh_out [count, H, D] and fresh_lse [count, H]: these are taken instead and written to the row's place. heads
// [count, H]: 1 = so for this head; null: for all. With a count of 0 nothing is written.
typedef struct {
  float *out, *lse;
  int64_t places;
  const int64_t* place;
  const float *fresh_out, *fresh_lse;
  const int64_t* rows;
  int64_t count;
  const uint8_t* heads;
} LosaPrefix;

// A deterministic automaton over bytes: next [states, classes], -1 = nothing can match like this; class_of [256];
// accepting [states]; bytes_left [states], the fewest bytes to an accepting state. Matches begin in state 0.
typedef struct {
  int64_t states, classes;
  const int32_t* next;
  const uint8_t *class_of, *accepting;
  const int32_t* bytes_left;
} LosaAutomaton;

// Blocks of outputs that have to match their grammars. tokens[indptr[b] ...] are the output positions of block b, -1 =
// a hole; states [blocks] before the first; rooms [blocks]: tokens that may follow behind the last. path [blocks]: 1 =
// along the best path, 0 = each hole by itself; drawn [blocks]: 1 = drawn by `uniform`. Of every hole, in order: logits
// [holes, width]; kept [holes, width], 0 = filtered out (null: nothing is); sharpness [holes], one by the temperature;
// total [holes], the logarithm of the sum of e^(sharpness * logit); uniform [holes] in [0, 1).
typedef struct {
  int64_t blocks;
  void* const* grammars;
  const int64_t *indptr, *tokens, *states, *rooms;
  const uint8_t *path, *drawn;
  int64_t holes, width;
  const float* logits;
  const uint8_t* kept;
  const double *sharpness, *total, *uniform;
} LosaGuided;

LOSA_API int losa_abi(void);
LOSA_API int losa_has_level(int level);

// Attention of the computed rows to their prefixes (lists may be null: all of it). out [count, H, D], lse [count, H].
// peaks [count, H, width]: also each row's largest scaled score per page where it reads its whole prefix, -inf
// elsewhere (the page size must divide 1024); null: not wanted.
LOSA_API int losa_prefix(LosaRun*, const LosaPool*, const LosaGroup*, const LosaQuery*, const LosaLists*, float* out,
                         float* lse, float* peaks, int64_t width);

// Block-causal attention of stored rows; counts [S] rows per segment. out [R, H, D].
LOSA_API int losa_prefill(LosaRun*, const LosaPool*, const LosaGroup*, const LosaQuery*, const int64_t* counts,
                          float* out);

// Attention of each block of B rows to its own k, v [R, G, D]: lse [R, H] (may be null) and out [R, H, D], the latter
// merged with that to the prefix (null: there is none).
LOSA_API int losa_block(LosaRun*, const LosaQuery*, const float* k, const float* v, int64_t block_length,
                        int32_t kv_heads, int32_t head_dim, const LosaPrefix*, float* out, float* lse);

// Merge two parts over disjoint keys, n vectors of dim each.
LOSA_API int losa_merge(LosaRun*, int64_t n, int32_t dim, const float* out_a, const float* lse_a, const float* out_b,
                        const float* lse_b, float* out);

// Upper bounds of q . k per page, unscaled: scores [count, H, width], -inf behind a segment's last page.
LOSA_API int losa_page_scores(LosaRun*, const LosaPool*, const LosaGroup*, const LosaQuery*, int64_t width,
                              float* scores);

// Best pages of each computed row (largest bounds, ties to the lowest page) as CSR lists. share: LOSA_MAX or LOSA_MEAN
// over its query heads = a list per KV head, LOSA_NONE = per query head. Lists are ordered by owner, then head; owners
// are segments, which get the union of their rows' pages, or with per_row the computed rows. active [count, H]: 1 = the
// head takes part, a list without any is empty; null: all do. best [S]: pages per row. whole [S]: 1 = not scored, empty
// lists. indptr [owners * lists + 1], indices [capacity]: the most that the lists can hold is checked. seen [S]: rows.
LOSA_API int losa_select_pages(LosaRun*, const LosaPool*, const LosaGroup*, const LosaQuery*, const uint8_t* whole,
                               const int64_t* best, int32_t share, int32_t per_row, const uint8_t* active,
                               int64_t capacity, int64_t* indptr, int64_t* indices, int64_t* seen);

// Softmax mass of the granules of each prefix, [S, H, width], 0 behind a segment's last one: e^(scale q . k - lse)
// summed over the keys of a granule, then over all rows of the segment: their mean, or with `largest` their maximum.
// lse [R, H]; -inf gives no mass.
LOSA_API int losa_prefix_mass(LosaRun*, const LosaPool*, const LosaGroup*, const LosaQuery*, const float* lse,
                              int64_t granule, int32_t largest, int64_t width, float* mass);

// Which rows changed. now [S, B, parts, width] and before [slots, B, parts, width] have one dtype; segment s compares
// with before[slot[s]], which then becomes now (with keep_stable only where active). Each part is judged by itself
// among the rows of its segment. fresh [S]: 1 = nothing to compare with, all rows. keep [S]: the most changed rows;
// share [S]: or those before which less than this share of the change lies. 0 switches a rule off. active [S, B, parts]
// is the answer; rows [S * B] receives the sorted rows with an active part and *count their number.
LOSA_API int losa_changed_rows(LosaRun*, const void* now, void* before, int32_t dtype, int64_t segments,
                               int64_t block_length, int64_t parts, int64_t width, int64_t slots, const int64_t* slot,
                               const uint8_t* fresh, const int64_t* keep, const float* share, int32_t keep_stable,
                               uint8_t* active, int64_t* rows, int64_t* count);

// Write k, v [count, G, D] of `dtype` at page * page_size + offset and renew the bounds and moments of the touched
// pages.
LOSA_API int losa_store(LosaRun*, const LosaPool*, const void* k, const void* v, int32_t dtype,
                        const int64_t* locations, int64_t count);

// The bytes of every id of a vocabulary, those of id i at starts[i] to starts[i + 1]; none for what is no text.
LOSA_API int losa_words_new(LosaRun*, int64_t size, const int64_t* starts, const uint8_t* bytes, void** words);
LOSA_API void losa_words_free(void* words);  // grammars made of it stay whole

// An automaton seen through a vocabulary; ends: ids that end an output where it may end. Its rows are made when they
// are first needed, and forgotten when they hold more than `limit` bytes; a block that needs more than that at once is
// refused. States with more than `wide` ids are judged by the `likeliest` ids of a hole. work: of one search for the
// fewest tokens left, in ids looked at. Not for two calls at once.
LOSA_API int losa_grammar_new(LosaRun*, void* words, const LosaAutomaton*, const int32_t* ends, int64_t end_count,
                              int64_t wide, int64_t likeliest, int64_t work, int64_t limit, void** grammar);
LOSA_API void losa_grammar_free(void* grammar);
LOSA_API int64_t losa_grammar_bytes(void* grammar);

// The state behind some tokens, from *state: -1 where they cannot follow.
LOSA_API int losa_grammar_walk(LosaRun*, void* grammar, const int64_t* tokens, int64_t count, int64_t* state);

// The fewest tokens from a state to where an output may end (INT32_MAX: none do), what single bytes would take where
// the search for less takes too long; 0 if it can be told at once that `room` tokens are enough (room -1: search).
LOSA_API int losa_grammar_left(LosaRun*, void* grammar, int64_t state, int64_t room, int64_t* left);

// A token for every hole, its probability among what usable paths have there, and its log-probability: [holes] each.
LOSA_API int losa_guide(LosaRun*, const LosaGuided*, int64_t* chosen, double* confidence, double* logprob);

// Changes what was chosen hole by hole so that the accepted tokens fit together: the surest are kept, and one that an
// earlier one has ruled out is chosen again. accepted, confidence, chosen, logprob: [holes].
LOSA_API int losa_settle(LosaRun*, const LosaGuided*, const uint8_t* accepted, const double* confidence,
                         int64_t* chosen, double* logprob);

// The experts of one layer, all of `dtype`: gate_up [count, 2 width, hidden] (gate, then up), down [count, hidden,
// width].
typedef struct {
  int64_t count, hidden, width;
  int32_t dtype;
  const void *gate_up, *down;
} LosaExperts;

// out [tokens, hidden] = sum over k of weight[t][k] * down(silu(gate(x)) * up(x)) of expert chosen[t][k], in the order
// of k; x and out have the experts' dtype, chosen and weight are [tokens, per_token].
LOSA_API int losa_mix_experts(LosaRun*, const LosaExperts*, const void* x, int64_t tokens, const int64_t* chosen,
                              const float* weight, int64_t per_token, void* out);

#ifdef __cplusplus
}
#endif
#endif
