// The memory of a thread in the backward pass, and what its steps share.
#pragma once

#include "../jobs.h"
#include "../tile/decode_products.h"
#include "../tile/scores.h"
#include "../tile/scratch.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Panels whose rows go into dV and dK together. The products over one panel's few rows alone would spend a fifth of
// their time on loading and storing what they add to.
template <class E>
constexpr int kGroupPanels = larger(1, smaller(8, 64 * E::kPerWord / Panel<typename E::Vector>::kLanes));

// Probabilities and score gradients, as the operands of the products that follow.
template <class E>
struct Operands {
  using Word = typename E::Word;
  static constexpr int kPanelWords = Panel<typename E::Vector>::kLanes / E::kPerWord;
  static constexpr int kRow = kGroupPanels<E> * kPanelWords;
  Word* probs;        // [key][lane words of a group]: words along the lanes, for dV
  Word* dscores;      // [key][lane words of a group]: likewise, for dK
  Word* dscores_key;  // [key word][lane] of one panel: words along the keys, for dQ

  // Those of one panel of the group, from a key on.
  Operands at(int key, int panel) const {
    const int64_t shift = key * int64_t(kRow) + panel * kPanelWords;
    return {probs + shift, dscores + shift, dscores_key};
  }
};

template <class E>
struct BackwardScratch {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  using Word = typename E::Word;
  static constexpr int kLanes = Panel<V>::kLanes;

  // Of one tile, [key][kLanes].
  S *scores, *dprobs, *factors, *dbias;
  TileTerms<V> terms;
  Operands<E> operands;

  // Of one panel.
  S *lse, *lse_low, *delta;        // [lane]: lse in the unit of scores, what it lacks as an exponent of 2, and delta
  Word *q_columns, *dout_columns;  // [word of dim][lane]
  Word* decode_queries;            // [row][query_words], instead of q_columns after the decode kernel
  int query_words;

  // Of a group of panels: [columns of kLanes][lane words of the group][kLanes], along dim.
  Word *q_rows, *dout_rows;

  // Of one block of keys.
  S *dk, *dv;  // [columns of kLanes][key][kLanes], along dim
  Word *k_copy, *v_copy, *k_keys_copy;
  const void** decode_keys;  // [key]: rows of k, after the decode kernel
  Word *gapless, *half_word;

  BackwardScratch(const Params& p, Arena& arena) {
    const int64_t dim = round_up(p.head_dim, kLanes), dim_v = round_up(p.head_dim_v, kLanes);
    const int words = words_of(int(p.head_dim), E::kPerWord), words_v = words_of(int(p.head_dim_v), E::kPerWord);
    scores = arena.take<S>(kBlockN * kLanes);
    dprobs = arena.take<S>(kBlockN * kLanes);
    factors = arena.take<S>(p.dropout_threshold ? kBlockN * kLanes : 0);
    dk = arena.take<S>(kBlockN * dim);
    dv = arena.take<S>(kBlockN * dim_v);
    dbias = arena.take<S>(p.dbias.data ? kBlockN * kLanes : 0);
    lse = arena.take<S>(kLanes);
    lse_low = arena.take<S>(kLanes);
    delta = arena.take<S>(kLanes);
    query_words = decode_query_words<E>(p);
    decode_queries = arena.take<Word>(int64_t(kDecodeRows<V>) * query_words);
    decode_keys = arena.take<const void*>(kBlockN);
    q_columns = arena.take<Word>(int64_t(words) * kLanes);
    dout_columns = arena.take<Word>(int64_t(words_v) * kLanes);
    q_rows = arena.take<Word>(Operands<E>::kRow * dim);
    dout_rows = arena.take<Word>(Operands<E>::kRow * dim_v);
    operands.probs = arena.take<Word>(kBlockN * Operands<E>::kRow);
    operands.dscores = arena.take<Word>(kBlockN * Operands<E>::kRow);
    operands.dscores_key = arena.take<Word>(kBlockN / E::kPerWord * kLanes);
    terms.values = arena.take<S>(kBlockN * kLanes);
    terms.seen = arena.take<uint8_t>(kBlockN);
    k_copy = arena.take<Word>(int64_t(kBlockN) * words);
    v_copy = arena.take<Word>(int64_t(kBlockN) * words_v);
    k_keys_copy = arena.take<Word>(tiles_size<E>(p.head_dim));
    gapless = arena.take<Word>(int64_t(kBlockN) * p.head_dim);
    half_word = arena.take<Word>(p.head_dim);
  }
};

template <class E>
size_t backward_scratch(const Params& p) {
  Arena arena(nullptr);
  BackwardScratch<E> scratch(p, arena);
  return arena.used();
}

// What all steps on a sequence and key/value head share. Scores are computed as the forward pass did: `decode` tells
// whether by the decode kernel.
template <class E>
struct BackwardContext {
  KVHead kv;
  const BackwardBuffers& buffers;
  const BackwardScratch<E>& s;
  bool decode;
  ScoreMod<typename E::Scalar> mod;

  BackwardContext(const KVHead& kv, const BackwardBuffers& buffers, const BackwardScratch<E>& s)
      : kv(kv), buffers(buffers), s(s), decode(is_decode<typename E::Vector>(kv.p, kv.seq)), mod(kv.p, decode) {}
};

template <class S>
void clear(S* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = S(0);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
