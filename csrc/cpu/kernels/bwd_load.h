// Brings a block of keys, and the rows of a panel, into the order that the backward pass's products read.
#pragma once

#include "bwd_preprocess.h"
#include "bwd_scratch.h"

namespace fastattn {
namespace FASTATTN_ISA {

// One block of keys.
template <class E>
struct BackwardBlock {
  KeyTile tile;
  KeyRows<E> k, v;        // along head_dim and head_dim_v
  ColumnTiles<E> k_keys;  // k with words along the keys
};

// The pointer tells the element type.
template <class V, class T>
void load_rows_and_columns(const T*, const BackwardContext<Single<V>>& c, int64_t panels,
                           BackwardBlock<Single<V>>& block) {
  const Params& p = c.kv.p;
  block.k = load_rows<V, T>(c.kv, p.k, int(p.head_dim), block.tile, c.s.k_copy);
  block.v = load_rows<V, T>(c.kv, p.v, int(p.head_dim_v), block.tile, c.s.v_copy);
  block.k_keys = columns_of<Single<V>>(block.k, block.tile.count, int(p.head_dim), panels, c.s.k_keys_copy);
}

#ifdef __AVX512BF16__
inline void load_rows_and_columns(const bf16*, const BackwardContext<Pairs>& c, int64_t, BackwardBlock<Pairs>& block) {
  const Params& p = c.kv.p;
  block.k = load_pair_rows(c.kv, p.k, int(p.head_dim), block.tile, c.s.k_copy);
  block.v = load_pair_rows(c.kv, p.v, int(p.head_dim_v), block.tile, c.s.v_copy);
  block.k_keys = interleave_keys(c.kv, p.k, int(p.head_dim), block.tile, c.s.k_keys_copy);
}
#endif

// panels: how many will read k_keys.
template <class E, class T>
BackwardBlock<E> load_backward_block(const BackwardContext<E>& c, KeyTile tile, int64_t panels) {
  BackwardBlock<E> block;
  block.tile = tile;
  for (int n = 0; n < tile.count && c.decode; ++n)
    c.s.decode_keys[n] = key_row<const T>(c.kv, c.kv.p.k, tile.n_begin + n);
  load_rows_and_columns(static_cast<const T*>(nullptr), c, panels, block);
  return block;
}

// Loads queries, output gradients, lse and delta of panel `place` of a group. Rows that saw nothing are
// left out, and rows that see none of the block's keys.
template <class E, class T>
void load_panel(const BackwardContext<E>& c, const MaskedPanel<typename E::Vector>& panel, int place) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const Params& p = c.kv.p;
  const Sequence& seq = c.kv.seq;
  const BackwardScratch<E>& s = c.s;
  const int lanes = panel.lanes();
  const T *q[kLanes], *dout[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    q[lane] = dout[lane] = nullptr;
    s.lse[lane] = S(__builtin_inf());  // all probabilities become 0
    s.lse_low[lane] = s.delta[lane] = S(0);
    if (lane >= panel.count || !panel.mask.sees_keys(lane)) continue;
    const int64_t head = panel.head[lane], query = panel.query[lane];
    if (saw_nothing<S, T>(p, seq, panel.b, head, query)) continue;
    q[lane] = panel_row<const T>(p.q, seq, panel, lane);
    dout[lane] = panel_row<const T>(p.dout, seq, panel, lane);
    const Twofold<S> lse = over(load_lse<S>(p, seq, panel.b, head, query), c.mod.unit.natural);
    s.lse[lane] = lse.high;
    s.lse_low[lane] = lse.low * c.mod.unit.exponent;
    s.delta[lane] = *panel_row<const S>(c.buffers.delta, seq, panel, lane);
  }
  if (c.decode) {
    load_decode_queries<E, T>(c.kv, panel, s.query_words, s.decode_queries);
  } else {
    Columns<E, T>::pack(q, lanes, p.q.stride_d, int(p.head_dim), s.q_columns, kLanes);
  }
  Columns<E, T>::pack(dout, lanes, p.dout.stride_d, int(p.head_dim_v), s.dout_columns, kLanes);
  auto pack = [&](const T* const* rows, int64_t stride, int dim, typename E::Word* words) {
    words += place * Operands<E>::kPanelWords * kLanes;
    for (int d = 0; d < dim; d += kLanes, words += Operands<E>::kRow * kLanes)
      pack_rows(E{}, rows, lanes, stride, d, int(smaller(kLanes, dim - d)), words);
  };
  pack(q, p.q.stride_d, int(p.head_dim), s.q_rows);
  pack(dout, p.dout.stride_d, int(p.head_dim_v), s.dout_rows);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
