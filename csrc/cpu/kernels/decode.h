// Forward pass for few query rows, as in decoding: lanes are features, not queries.
//
// With fewer rows than lanes the products of forward.h would compute mostly padding, and would copy K and V that are
// not float32. Here each key's row is read once, as it lies (any page size, any dtype), and dotted with all queries.
// Each value's row is added to all outputs. Cost per key and row: (head_dim + head_dim_v) / kWidth / kPerWord
// multiply-adds and 1 / kWidth of a transpose; bytes: each key and value once. Reading them bounds it, so they are read
// in memory order, whole rows, few side by side. With eight rows side by side, or with parts of rows, a Zen 3 core read
// two thirds as fast from memory.
#pragma once

#include "../tile/decode_products.h"
#include "../tile/scratch.h"
#include "epilogue.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Keys of one step. Values are prefetched while its keys are read, and the next keys while its values are: so far
// ahead, and no further, memory keeps up.
constexpr int kDecodeBlockN = 64;

template <class E, class T>
struct DecodeScratch {
  using S = typename E::Scalar;
  using Word = typename E::Word;
  static constexpr int kWidth = E::Vector::kWidth, kElements = kWidth * E::kPerWord;
  Word* queries;  // [row][words of dim, padded to whole vectors]
  S *acc, *sums;  // [row][dim_v padded to whole words of vectors]: outputs, and what a step adds to them
  SoftmaxTile<E> tile;
  const T **k, **v, **next_k;  // rows of the step's keys, and of the keys of the step after it
  T* rest;                     // [key][kElements]: the last features of values, where they are not whole vectors
  T* zeros;                    // the values of no key
  int query_words, dim_v;      // padded

  DecodeScratch(const Params& p, Arena& arena) {
    constexpr int kRows = kDecodeRows<typename E::Vector>, kLanes = Panel<typename E::Vector>::kLanes;
    query_words = decode_query_words<E>(p);
    dim_v = int(round_up(p.head_dim_v, kElements));
    queries = arena.take<Word>(int64_t(kRows) * query_words);
    acc = arena.take<S>(int64_t(kRows) * dim_v);
    sums = arena.take<S>(int64_t(kRows) * dim_v);
    tile.scores = arena.take<S>(kDecodeBlockN * kLanes);
    tile.probs = E::kPerWord == 1 ? reinterpret_cast<Word*>(tile.scores) : arena.take<Word>(kDecodeBlockN / 2 * kLanes);
    tile.factors = arena.take<S>(p.dropout_threshold ? kDecodeBlockN * kLanes : 0);
    k = arena.take<const T*>(kDecodeBlockN);
    v = arena.take<const T*>(kDecodeBlockN);
    next_k = arena.take<const T*>(kDecodeBlockN);
    const bool whole = p.head_dim_v % kElements == 0;
    rest = arena.take<T>(whole ? 0 : kDecodeBlockN * kElements);
    zeros = arena.take<T>(dim_v);
    tile.terms.values = arena.take<S>(kDecodeBlockN * kLanes);
    tile.terms.seen = arena.take<uint8_t>(kDecodeBlockN);
  }
};

// What all steps of a job share.
template <class E>
struct DecodeContext {
  KVHead kv;
  ScoreMod<typename E::Scalar> mod;
};

struct DecodeStep {
  KeyTile tile;
  int next_keys;        // of the step after this one
  const uint8_t* seen;  // null, or 0 for keys that no row sees and whose memory may hold NaN
};

// The outputs of rows r .. r + kRows. next_keys: keys of the step after this one to prefetch meanwhile, evenly: the
// processor may drop prefetches that come all at once.
template <class E, class T, int kRows>
void decode_outputs(const Params& p, const DecodeScratch<E, T>& s, const DecodeStep& step, int r, int next_keys,
                    const typename E::Scalar* rescale) {
  using V = typename E::Vector;
  constexpr int kTile = kRows == 4 && V::kWidth < 16 ? 2 : kRows;  // more need 32 registers
  const int keys = step.tile.count, dim = int(p.head_dim), dim_v = int(p.head_dim_v);
  const uint8_t* seen = step.seen;
  const int whole = dim_v / s.kElements * s.kElements;
  for (int n = 0; n < keys; n += 4) {
    const T *v[4], *rest[4];
    for (int i = 0; i < 4; ++i) {
      if (n + i < next_keys) prefetch_row(s.next_k[n + i], dim);
      const bool there = n + i < keys && (seen == nullptr || seen[n + i]);
      v[i] = there ? s.v[n + i] : s.zeros;
      rest[i] = there ? s.rest + (n + i) * s.kElements : s.zeros;
    }
    for (int i = r; i < r + kRows; i += kTile) {
      const typename E::Word* probs = s.tile.probs + n / E::kPerWord * Panel<V>::kLanes + i;
      typename E::Scalar* sums = s.sums + i * s.dim_v;
      auto product = n == 0 ? decode_outputs_tile<E, T, kTile, true> : decode_outputs_tile<E, T, kTile, false>;
      product(probs, v, whole, sums, s.dim_v);
      if (whole < dim_v) product(probs, rest, s.kElements, sums + whole, s.dim_v);
    }
  }
  for (int i = r; i < r + kRows; ++i) {
    for (int d = 0; d < s.dim_v; d += V::kWidth) {
      typename V::Scalar* to = s.acc + i * s.dim_v + d;
      fma(V::set(rescale[i]), V::load(to), V::load(s.sums + i * s.dim_v + d)).store(to);
    }
  }
}

template <class E, class T>
void decode_step(const DecodeContext<E>& c, const MaskedPanel<typename E::Vector>& panel, DecodeStep step,
                 OnlineSoftmax<typename E::Vector>& state, DecodeScratch<E, T>& s) {
  using V = typename E::Vector;
  constexpr int kLanes = Panel<V>::kLanes;
  const Params& p = c.kv.p;
  const int dim = int(p.head_dim), dim_v = int(p.head_dim_v), keys = step.tile.count;
  const bool full = c.mod.keeps_products && panel.mask.is_full(step.tile);
  Visibility visible{true, false};
  if (!full) visible = make_masked_terms(c.kv, panel, step.tile, c.mod, s.tile.terms);
  if (!visible.any) return;
  if (visible.gaps) step.seen = s.tile.terms.seen;
  decode_scores<E, T>({s.queries, panel.count, s.query_words, dim}, s.k, keys, s.tile.scores, {s.v, dim_v});
  typename V::Scalar full_max[kLanes];
  if (full) column_maximum<V, 1>(s.tile.scores, keys, full_max);
  softmax_step<E, 1>(p, c.mod, panel, step.tile, full ? full_max : nullptr, s.tile, state);
  const int whole = dim_v / s.kElements * s.kElements;
  for (int n = 0; n < keys && whole < dim_v; ++n) {
    const bool seen = step.seen == nullptr || step.seen[n];
    copy_padded(s.v[n] + whole, seen ? dim_v - whole : 0, s.kElements, s.rest + n * s.kElements);
  }
  for (int n = keys; n % 4 != 0; ++n) {  // outputs are summed over four keys at a time
    if (n % E::kPerWord != 0) continue;  // the other half of a word is zero already
    for (int r = 0; r < panel.count; ++r) s.tile.probs[n / E::kPerWord * kLanes + r] = 0;
  }
  for_row_pieces<V>(panel.count, [&](auto rows, int r) {
    decode_outputs<E, T, decltype(rows)::value>(p, s, step, r, r == 0 ? step.next_keys : 0, state.rescale);
  });
}

// Writes out, its residual and lse; or the results of a split.
template <class E, class T>
void store_decode_rows(const DecodeContext<E>& c, const MaskedPanel<typename E::Vector>& panel, const ForwardJob& job,
                       const Splits& splits, const OnlineSoftmax<typename E::Vector>& state,
                       const DecodeScratch<E, T>& s) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  const Params& p = c.kv.p;
  const int dim_v = int(p.head_dim_v);
  const View residual = out_residual(p);
  const V zero = V::set(S(0)), inf = V::set(S(__builtin_inf()));
  S factors[Panel<V>::kLanes];
  finalize_panel<V>(c.kv, c.mod.unit, panel, job, splits, 0, state, factors);
  for (int r = 0; r < panel.count; ++r) {
    const V factor = V::set(factors[r]);
    const auto empty = equal(factor, zero);
    S* acc = s.acc + r * s.dim_v;
    for (int d = 0; d < s.dim_v; d += V::kWidth) select(empty, zero, V::load(acc + d) * factor).store(acc + d);
    if (job.split >= 0) {
      store_row<V>(acc, dim_v, out_accum_row<S>(p, job, splits, r), 1);
      continue;
    }
    store_row<V>(acc, dim_v, panel_row<T>(p.out, c.kv.seq, panel, r), p.out.stride_d);
    if (residual.data == nullptr) continue;
    for (int d = 0; d < s.dim_v; d += V::kWidth) select(empty, inf, rounding_error<T>(V::load(acc + d))).store(acc + d);
    store_row<V>(acc, dim_v, panel_row<T>(residual, c.kv.seq, panel, r), residual.stride_d);
  }
}

template <class E, class T>
void decode_job(const Params& p, const ForwardJob& job, const Splits& splits, void* memory) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  Arena arena(memory);
  DecodeScratch<E, T> s(p, arena);
  const Sequence seq = sequence_of(p, job.b);
  const DecodeContext<E> c{{p, seq, job.b, job.head_kv}, {p, true}};
  MaskedPanel<V> panel;
  set_panel(panel, c.kv, group_of(p, job.head_kv), job.first_row, job.rows, job.keys);
  OnlineSoftmax<V> state;
  state.reset();
  load_decode_queries<E, T>(c.kv, panel, s.query_words, s.queries);
  for (int i = 0; i < panel.count * s.dim_v; ++i) s.acc[i] = S(0);
  for (int i = 0; i < s.dim_v; ++i) s.zeros[i] = T{};
  const KeyRange range = panel.mask.keys();
  auto find_keys = [&](int64_t n_begin, const T** rows) {
    const int keys = int(larger(0, smaller(kDecodeBlockN, range.last - n_begin)));
    for (int n = 0; n < keys; ++n) rows[n] = key_row<const T>(c.kv, p.k, n_begin + n);
    return keys;
  };
  int keys = find_keys(range.first, s.k);
  for (int64_t n_begin = range.first; n_begin < range.last; n_begin += kDecodeBlockN) {
    for (int n = 0; n < keys; ++n) s.v[n] = key_row<const T>(c.kv, p.v, n_begin + n);
    const int next_keys = find_keys(n_begin + kDecodeBlockN, s.next_k);
    decode_step<E, T>(c, panel, {{n_begin, keys}, next_keys, nullptr}, state, s);
    const T** used = s.k;
    s.k = s.next_k;
    s.next_k = used;
    keys = next_keys;
  }
  store_decode_rows<E, T>(c, panel, job, splits, state, s);
}

template <class E>
size_t decode_scratch(const Params& p) {
  Arena arena(nullptr);
  DecodeScratch<E, typename E::Scalar> scratch(p, arena);
  return arena.used();
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
