// Backward pass, in the forward's orientation: lanes are queries. One pass makes dQ, dK and dV.
//
// clang-format off
//   S^T = K Q^T      P^T = exp2(S^T - lse)      dP^T = V dO^T      dS^T = P^T (dP^T - delta)
//   dV += P^T dO     dK += dS^T Q               dQ^T += K^T dS^T
// clang-format on
//
// Cost per panel of 32 rows and n keys, in multiply-adds: n * 32 * (3 head_dim + 2 head_dim_v), plus some 20
// instructions / kWidth per score: the five products bound it. A job owns a range of keys: dK and dV of a block stay in
// the second-level cache while all queries pass by. dQ is read and written once per block, 2 / kBlockN of the products'
// work. Jobs over splits of the keys write dQ addends of their own, summed in the order of the splits: no
// atomics, the same bits always.
#pragma once

#include "bwd_dkdv.h"
#include "bwd_dq.h"
#include "bwd_scores.h"

namespace fastattn {
namespace FASTATTN_ISA {

// One tile of the block and one panel, up to dQ. The operands of dK and dV stay in scratch. begins: it is the panel's
// first tile. Returns false, and has done nothing, if nothing is visible.
template <class E, class T, int kVectors>
bool backward_step(const BackwardContext<E>& c, const BackwardBlock<E>& block,
                   const MaskedPanel<typename E::Vector>& panel, KeyTile tile, int place, bool begins,
                   typename E::Scalar* dq) {
  const Operands<E> to = c.s.operands.at(int(tile.n_begin - block.tile.n_begin), place);
  const Visibility visible = backward_scores<E, T, kVectors>(c, block, panel, tile, to, nullptr);
  if (!visible.any) return false;
  if (c.kv.p.dq.data != nullptr) add_dq<E, kVectors>(c, block, tile, visible.gaps, begins, dq);
  return true;
}

// One panel of a group, at `place`, up to dQ. Returns the keys of the block that it visited.
template <class E, class T>
BlockKeys backward_panel(const BackwardContext<E>& c, const BackwardBlock<E>& block,
                         const MaskedPanel<typename E::Vector>& panel, int place, bool begins, typename E::Scalar* dq) {
  const KeyTile all = block.tile;
  if (panel.mask.sees_keys()) {
    load_panel<E, T>(c, panel, place);
    const BlockInfo info = panel.mask.block_info(all.n_begin, all.n_end(), E::kPerWord);
    const KeyTile tile{info.n_begin, int(info.n_end - info.n_begin)};
    auto step = panel.vectors == 2 ? backward_step<E, T, 2> : backward_step<E, T, 1>;
    if (step(c, block, panel, tile, place, begins, dq))
      return {int(info.n_begin - all.n_begin), int(info.n_end - all.n_begin)};
  }
  if (begins && c.kv.p.dq.data != nullptr) clear(dq, c.kv.p.head_dim * Panel<typename E::Vector>::kLanes);
  return {0, 0};
}

// A block of keys against a group of panels, the first of which holds the rows from first_row on. The job's first block
// stores the panels' dQ, and the first group the block's dK and dV; the others add to them.
template <class E, class T>
void backward_group(const BackwardContext<E>& c, const BackwardBlock<E>& block, const BackwardJob& job,
                    int64_t first_row, int64_t rows, typename E::Scalar* dq) {
  constexpr int kLanes = Panel<typename E::Vector>::kLanes;
  const KeyTile all = block.tile;
  const bool first_block = all.n_begin == job.keys.first, first_group = first_row == 0;
  BlockKeys visited[kGroupPanels<E>], shared{0, all.count};  // by each panel, and by all of them
  int panels = 0, lanes[kGroupPanels<E>], all_lanes = 0;
  for (; panels < kGroupPanels<E> && first_row < rows; ++panels, first_row += kLanes, dq += c.kv.p.head_dim * kLanes) {
    MaskedPanel<typename E::Vector> panel;
    set_panel(panel, c.kv, group_of(c.kv.p, job.head_kv), first_row, rows - first_row, {all.n_begin, all.n_end()});
    const BlockKeys keys = backward_panel<E, T>(c, block, panel, panels, first_block, dq);
    visited[panels] = keys;
    lanes[panels] = panel.lanes();
    all_lanes += lanes[panels];
    shared = {int(larger(shared.first, keys.first)), int(smaller(shared.last, keys.last))};
  }
  shared.last = int(larger(shared.first, shared.last));
  if (first_group && shared.first == 0 && shared.last == all.count) {
    add_dkdv<E, Update::kStore>(c, {0, all.count}, 0, all_lanes);
    return;
  }
  if (first_group) clear_dkdv(c, all.count);
  add_dkdv<E, Update::kAdd>(c, shared, 0, all_lanes);
  for (int i = 0; i < panels; ++i) {  // keys that not all panels visit
    add_dkdv<E, Update::kAdd>(c, {visited[i].first, int(smaller(visited[i].last, shared.first))}, i, lanes[i]);
    add_dkdv<E, Update::kAdd>(c, {int(larger(visited[i].first, shared.last)), visited[i].last}, i, lanes[i]);
  }
}

template <class E, class T>
void backward_job(const Params& p, const BackwardJob& job, const BackwardBuffers& buffers, void* memory) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  Arena arena(memory);
  const BackwardScratch<E> s(p, arena);
  const Sequence seq = sequence_of(p, job.b);
  const BackwardContext<E> c({p, seq, job.b, job.head_kv}, buffers, s);
  const int64_t rows = seq.q_length * group_of(p, job.head_kv).count;
  const int64_t panels = (rows + kLanes - 1) / kLanes, dq_size = p.head_dim * kLanes;
  S* dq = static_cast<S*>(buffers.dq_accum) + (job.split * buffers.panels + job.first_panel) * dq_size;
  if (p.dq.data != nullptr && job.keys.first >= job.keys.last) clear(dq, panels * dq_size);
  for (int64_t n_begin = job.keys.first; n_begin < job.keys.last; n_begin += kBlockN) {
    const KeyTile tile{n_begin, int(smaller(kBlockN, job.keys.last - n_begin))};
    const BackwardBlock<E> block = load_backward_block<E, T>(c, tile, p.dq.data != nullptr ? panels : 0);
    int64_t i = 0;
    do {  // a group without rows gives zeros
      backward_group<E, T>(c, block, job, i * kLanes, rows, dq + i * dq_size);
    } while ((i += kGroupPanels<E>) < panels);
    store_key_grads<V, T>(c.kv, p.dk, tile, int(p.head_dim), s.dk, S(p.scale));
    store_key_grads<V, T>(c.kv, p.dv, tile, int(p.head_dim_v), s.dv, S(1));
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
