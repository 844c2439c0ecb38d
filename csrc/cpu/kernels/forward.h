// Forward pass: online softmax over blocks of keys.
//
// Lanes are queries: S^T = K Q^T (keys x lanes), softmax goes down the columns without crossing lanes, O^T = V^T P^T.
// Cost of a panel of 32 rows over n keys, in multiply-adds: n * 32 * (head_dim + head_dim_v) in the two products, and
// about n * 32 * 12 instructions / kWidth of softmax. So the products take 85% of the time at head_dim 64. K and V are
// read once per job from memory and once per panel from the second-level cache; scores never leave it. The products
// bound it.
#pragma once

#include "../tile/scores.h"
#include "../tile/scratch.h"
#include "epilogue.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class E>
struct ForwardScratch {
  using S = typename E::Scalar;
  using Word = typename E::Word;
  SoftmaxTile<E> tile;
  Word *queries, *gapless, *half_word;
  S* acc;
  BlockScratch<E> block;
  int64_t queries_size, acc_size;  // of one panel

  ForwardScratch(const Params& p, Arena& arena) {
    constexpr int kLanes = Panel<typename E::Vector>::kLanes;
    const int dim = int(p.head_dim), dim_v = int(p.head_dim_v), words = words_of(dim, E::kPerWord);
    queries_size = int64_t(words) * kLanes;
    acc_size = int64_t(dim_v) * kLanes;
    tile.scores = arena.take<S>(kBlockN * kLanes);
    tile.probs = E::kPerWord == 1 ? reinterpret_cast<Word*>(tile.scores) : arena.take<Word>(kBlockN / 2 * kLanes);
    queries = arena.take<Word>(queries_size * kMaxPanelsPerJob);
    acc = arena.take<S>(acc_size * kMaxPanelsPerJob);
    block.k = arena.take<Word>(int64_t(kBlockN) * words);
    block.v = arena.take<Word>(tiles_size<E>(dim_v));
    tile.factors = arena.take<S>(p.dropout_threshold ? kBlockN * kLanes : 0);
    tile.terms.values = arena.take<S>(kBlockN * kLanes);
    tile.terms.seen = arena.take<uint8_t>(kBlockN);
    gapless = arena.take<Word>(int64_t(kBlockN) * dim_v);
    half_word = arena.take<Word>(dim_v);
  }
};

// What all steps of a job share.
template <class E>
struct ForwardContext {
  KVHead kv;
  ScoreMod<typename E::Scalar> mod;
  ForwardScratch<E> s;
};

// A panel of a job, and its results so far.
template <class E>
struct ForwardPanel {
  using V = typename E::Vector;
  MaskedPanel<V> rows;
  OnlineSoftmax<V> softmax;
  typename E::Word* queries;
  typename E::Scalar* acc;
};

// One step: a tile of keys against one panel. full: nothing is hidden, and the products are the scores.
template <class E, int kVectors>
void forward_step(const ForwardContext<E>& c, ForwardPanel<E>& panel, const KeyBlock<E>& block, KeyTile tile,
                  bool full) {
  using V = typename E::Vector;
  const Params& p = c.kv.p;
  const int dim_v = int(p.head_dim_v), keys = tile.count, at = int(tile.n_begin - block.n_begin);
  Visibility visible{true, false};
  if (!full) visible = make_masked_terms(c.kv, panel.rows, tile, c.mod, c.s.tile.terms);
  if (!visible.any) return;
  typename E::Scalar row_max[Panel<V>::kLanes];
  typename E::Scalar* full_max = full ? row_max : nullptr;
  make_scores<E, kVectors>(c.kv, c.mod, panel.rows, tile, block.k.from(at), panel.queries, c.s.tile.scores, full_max);
  softmax_step<E, kVectors>(p, c.mod, panel.rows, tile, full_max, c.s.tile, panel.softmax);
  ColumnTiles<E> v = block.v.from(at / E::kPerWord);
  if (visible.gaps) v = without_gaps<E>(v, keys, dim_v, c.s.tile.terms.seen, c.s.gapless);
  // Each block is summed from zero and then added: errors grow with the number of blocks, not of keys.
  if (panel.softmax.begun) {
    gemm_over_keys<E, kVectors, Update::kScaleAdd>(dim_v, keys, v, c.s.tile.probs, panel.acc, c.s.half_word,
                                                   panel.softmax.rescale);
  } else {
    gemm_over_keys<E, kVectors, Update::kStore>(dim_v, keys, v, c.s.tile.probs, panel.acc, c.s.half_word);
    panel.softmax.begun = true;
  }
}

// The block's keys up to n_end against one panel: masked, full and masked tiles.
template <class E>
void forward_block(const ForwardContext<E>& c, ForwardPanel<E>& panel, const KeyBlock<E>& block, int64_t n_end) {
  // A tile begins at a whole word of v.
  BlockInfo info = panel.rows.mask.block_info(block.n_begin, n_end, E::kPerWord);
  if (!c.mod.keeps_products) info.full_begin = info.full_end = info.n_end;
  const int64_t cuts[4] = {info.n_begin, info.full_begin, info.full_end, info.n_end};
  for (int i = 0; i < 3; ++i) {
    if (cuts[i] >= cuts[i + 1]) continue;
    const KeyTile tile{cuts[i], int(cuts[i + 1] - cuts[i])};
    if (panel.rows.vectors == 2) {
      forward_step<E, 2>(c, panel, block, tile, i == 1);
    } else {
      forward_step<E, 1>(c, panel, block, tile, i == 1);
    }
  }
}

// Writes out = acc * factor, transposed into rows, its residual, and lse; or the results of a split.
template <class E, class T>
void store_panel(const ForwardContext<E>& c, const ForwardPanel<E>& panel, const ForwardJob& job, const Splits& splits,
                 int64_t first_row) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const Params& p = c.kv.p;
  const S* acc = panel.acc;
  const int count = panel.rows.count;
  S factors[kLanes];
  finalize_panel<V>(c.kv, c.mod.unit, panel.rows, job, splits, first_row, panel.softmax, factors);
  auto store = [&](auto* const* rows, int64_t stride, S of_nothing, auto transform) {
    for (int lane = 0; lane < count; lane += V::kWidth) {
      const V factor = V::load(factors + lane), instead = V::set(of_nothing);
      const auto empty = equal(factor, V::set(S(0)));
      store_columns<V>(
          int(p.head_dim_v), int(smaller(V::kWidth, count - lane)),
          [&](int d) { return select(empty, instead, transform(V::load(acc + d * kLanes + lane) * factor)); },
          rows + lane, stride);
    }
  };
  if (job.split >= 0) {
    S* rows[kLanes];
    for (int lane = 0; lane < count; ++lane) rows[lane] = out_accum_row<S>(p, job, splits, first_row + lane);
    store(rows, 1, S(0), [](V x) { return x; });
    return;
  }
  T* rows[kLanes];
  auto find_rows = [&](const View& view) {
    for (int lane = 0; lane < count; ++lane) rows[lane] = panel_row<T>(view, c.kv.seq, panel.rows, lane);
  };
  find_rows(p.out);
  store(rows, p.out.stride_d, S(0), [](V x) { return x; });
  const View residual = out_residual(p);
  if (residual.data == nullptr) return;
  find_rows(residual);
  store(rows, residual.stride_d, S(__builtin_inf()), [](V x) { return rounding_error<T>(x); });
}

// Begins panel i of a job: its rows, what they see, and their queries as columns.
template <class E, class T>
void load_forward_panel(const ForwardContext<E>& c, const ForwardJob& job, int i, ForwardPanel<E>& panel) {
  constexpr int kLanes = Panel<typename E::Vector>::kLanes;
  const Params& p = c.kv.p;
  const int64_t row = i * int64_t(kLanes);
  set_panel(panel.rows, c.kv, group_of(p, job.head_kv), job.first_row + row, job.rows - row, job.keys);
  panel.softmax.reset();
  panel.queries = c.s.queries + i * c.s.queries_size;
  panel.acc = c.s.acc + i * c.s.acc_size;
  const T* rows[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    rows[lane] = panel.rows.mask.sees_keys(lane) ? panel_row<const T>(p.q, c.kv.seq, panel.rows, lane) : nullptr;
  Columns<E, T>::pack(rows, panel.rows.lanes(), p.q.stride_d, int(p.head_dim), panel.queries, kLanes);
}

template <class E, class T>
void forward_job(const Params& p, const ForwardJob& job, const Splits& splits, void* memory) {
  constexpr int kLanes = Panel<typename E::Vector>::kLanes;
  Arena arena(memory);
  const Sequence seq = sequence_of(p, job.b);
  const ForwardContext<E> c{{p, seq, job.b, job.head_kv}, {p, false}, {p, arena}};
  ForwardPanel<E> panels[kMaxPanelsPerJob];
  const int count = int((job.rows + kLanes - 1) / kLanes);
  KeyRange keys{job.keys.last, job.keys.first};
  for (int i = 0; i < count; ++i) {
    load_forward_panel<E, T>(c, job, i, panels[i]);
    const PanelMask<typename E::Vector>& mask = panels[i].rows.mask;
    if (mask.sees_keys()) keys = {smaller(keys.first, mask.keys().first), larger(keys.last, mask.keys().last)};
  }
  // Blocks begin at whole words and end at multiples of their size. So a panel's results do not depend on which others
  // share its job. Without visible keys there is no block: `keys` may lie anywhere.
  if (keys.first < keys.last) keys.first = keys.first / E::kPerWord * E::kPerWord;
  for (int64_t n_begin = keys.first; n_begin < keys.last;) {
    const int64_t n_end = smaller(keys.last, (n_begin / kBlockN + 1) * kBlockN);
    const KeyBlock<E> block =
        load_block(static_cast<const T*>(nullptr), c.kv, {n_begin, int(n_end - n_begin)}, count, c.s.block);
    for (int i = 0; i < count; ++i)
      if (panels[i].rows.mask.visits(n_begin, n_end)) forward_block(c, panels[i], block, n_end);
    n_begin = n_end;
  }
  for (int i = 0; i < count; ++i) store_panel<E, T>(c, panels[i], job, splits, i * kLanes);
}

template <class E>
size_t forward_scratch(const Params& p) {
  Arena arena(nullptr);
  ForwardScratch<E> scratch(p, arena);
  return arena.used();
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
