// Which keys the rows of a panel see, by sequence length, window and boolean mask.
//
// This is the one seam between kernels and masks; the plan asks visible_keys of params.h. PanelMask answers two
// questions: which keys of a block to visit (block_info), and which pairs of a tile to hide (hide). Another kind of
// mask is one more source of these answers.
#pragma once

#include "pack.h"
#include "panel.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Keys [n_begin, n_begin + count) of a sequence: those of one step.
struct KeyTile {
  int64_t n_begin;
  int count;
  int64_t n_end() const { return n_begin + count; }
};

// The keys that a panel visits: [n_begin, n_end). Those of [full_begin, full_end) hide nothing from any row.
struct BlockInfo {
  int64_t n_begin, full_begin, full_end, n_end;
};

// What a panel sees of a tile.
struct Visibility {
  bool any;   // some row sees some key
  bool gaps;  // some key is seen by no row; its memory may hold NaN
};

template <class V>
class PanelMask {
  using S = typename V::Scalar;
  static constexpr int kLanes = kLanesOf<V>;

 public:
  // limit: the keys of the job.
  void set(const Params& p, const Sequence& seq, const Panel<V>& panel, KeyRange limit) {
    lanes_ = panel.lanes();
    padded_ = panel.count < lanes_;
    any_ = {limit.last, limit.first};
    all_ = limit;
    for (int lane = 0; lane < kLanes; ++lane) {
      visible_[lane] = {0, 0};
      if (lane >= panel.count) continue;
      KeyRange keys = visible_keys(p, seq, panel.query[lane]);
      keys = {larger(keys.first, limit.first), smaller(keys.last, limit.last)};
      visible_[lane] = keys;
      if (keys.first < keys.last) any_ = {smaller(any_.first, keys.first), larger(any_.last, keys.last)};
      all_ = {larger(all_.first, keys.first), smaller(all_.last, keys.last)};
    }
    mask_ = static_cast<const byte*>(p.mask.data);
    mask_stride_ = p.mask.stride_d;
    if (mask_ != nullptr) mask_same_ = row_offsets(panel, p.mask, mask_rows_);
  }

  // By length and window.
  bool sees_keys() const { return any_.first < any_.last; }
  bool sees_keys(int lane) const { return visible_[lane].first < visible_[lane].last; }
  KeyRange keys() const { return any_; }  // the union over rows; any_.last <= any_.first if there is none
  bool visits(int64_t n_begin, int64_t n_end) const { return any_.first < n_end && n_begin < any_.last; }

  // Whether all rows see all keys of a tile.
  bool is_full(KeyTile tile) const { return mask_ == nullptr && in_all_ranges(tile); }

  // The part of the block [n_begin, n_end) that the panel visits. Cuts are multiples of `alignment` from n_begin on,
  // except the end.
  BlockInfo block_info(int64_t n_begin, int64_t n_end, int64_t alignment) const {
    BlockInfo info;
    info.n_begin = larger(n_begin, n_begin + (any_.first - n_begin) / alignment * alignment);
    info.n_end = smaller(n_end, any_.last);
    const int64_t begin = n_begin + (all_.first - n_begin + alignment - 1) / alignment * alignment;
    const int64_t end = n_begin + (all_.last - n_begin) / alignment * alignment;
    info.full_begin = larger(info.n_begin, smaller(info.n_end, begin));
    info.full_end = all_.last >= info.n_end ? info.n_end : larger(info.full_begin, smaller(info.n_end, end));
    if (mask_ != nullptr) info.full_begin = info.full_end = info.n_end;
    return info;
  }

  // Hides pairs of a tile: their terms [key][kLanes] become -inf. seen[key] tells whether any row sees a key. Comes
  // after all other changes of the terms: what a hidden pair was given, NaN perhaps, must not show.
  Visibility hide(KeyTile tile, S* terms, uint8_t* seen) const {
    if (padded_ || !in_all_ranges(tile)) hide_outside_ranges(tile, terms);
    if (mask_ == nullptr) {
      for (int n = 0; n < tile.count; ++n) seen[n] = any_.first <= tile.n_begin + n && tile.n_begin + n < any_.last;
      return {true, tile.n_begin < any_.first || any_.last < tile.n_end()};
    }
    hide_by_mask(tile, terms, seen);
    int count = 0;
    for (int n = 0; n < tile.count; ++n) count += seen[n];
    return {count > 0, count < tile.count};
  }

 private:
  bool in_all_ranges(KeyTile tile) const { return all_.first <= tile.n_begin && tile.n_end() <= all_.last; }

  void hide_outside_ranges(KeyTile tile, S* terms) const {
    const V hidden = V::set(S(-__builtin_inf()));
    const int keys = tile.count, lanes = lanes_;
    S first[kLanes], last[kLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      first[lane] = S(smaller(larger(visible_[lane].first - tile.n_begin, 0), keys));
      last[lane] = S(smaller(larger(visible_[lane].last - tile.n_begin, 0), keys));
    }
    for (int lane = 0; lane < lanes; lane += V::kWidth) {
      const V from = V::load(first + lane), to = V::load(last + lane);
      for (int n = 0; n < keys; ++n) {
        const V j = V::set(S(n));
        S* at = terms + n * kLanes + lane;
        const V x = select(less(j, from), hidden, V::load(at));
        select(less(j, to), x, hidden).store(at);
      }
    }
  }

  void hide_by_mask(KeyTile tile, S* terms, uint8_t* seen) const {
    const V hidden = V::set(S(-__builtin_inf())), zero = V::set(S(0));
    const int64_t stride = mask_stride_;
    const byte* mask = mask_ + tile.n_begin * stride;
    const int keys = tile.count, lanes = lanes_;
    for (int n = 0; n < keys; ++n) seen[n] = 0;
    for (int lane = 0; lane < lanes; lane += V::kWidth) {
      auto hide_key = [&](int n, V kept) {
        S* to = terms + n * kLanes + lane;
        const V x = select(equal(kept, zero), hidden, V::load(to));
        x.store(to);
        // Not "above -inf", which NaN is not.
        seen[n] |= !all(equal(x, hidden));
      };
      if (mask_same_) {
        for (int n = 0; n < keys; ++n) hide_key(n, V::set(S(mask[mask_rows_[0] + n * stride].bits)));
      } else {
        for_each_key<V>(mask, mask_rows_ + lane, stride, keys, hide_key);
      }
    }
  }

  int lanes_;
  bool padded_;               // some lanes have no row
  KeyRange visible_[kLanes];  // what length and window let a row see
  KeyRange any_, all_;        // the union of these over rows, and their intersection
  const byte* mask_;          // null: no mask
  int64_t mask_stride_, mask_rows_[kLanes];
  bool mask_same_ = false;
};

template <class V>
struct MaskedPanel : Panel<V> {
  PanelMask<V> mask;
};

// limit: the keys of the job.
template <class V>
void set_panel(MaskedPanel<V>& panel, const KVHead& kv, HeadGroup heads, int64_t first_row, int64_t rows,
               KeyRange limit) {
  set_rows(panel, kv.b, heads, first_row, rows);
  panel.mask.set(kv.p, kv.seq, panel, limit);
}

// What is added to the scores of a tile.
template <class V>
struct TileTerms {
  typename V::Scalar* values;  // [key][kLanes]: ALiBi and bias; -inf where hidden
  uint8_t* seen;               // [key]: some row of the panel sees the key
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
