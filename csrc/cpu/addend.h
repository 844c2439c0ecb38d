// What is added to a block of scores, and what is hidden from it: ALiBi, bias, mask, window and lengths in one array.
#pragma once

#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <class V>
struct AddendScratch {
  typename V::Scalar* values;  // [keys][kLanes]
  uint8_t* seen;               // [keys]: some row of the panel sees the key
};

// Adds kWidth keys of kWidth rows of the bias, read along the keys and turned, so that no line is touched twice.
template <class V, class T>
void add_bias_tile(const T* bias, const int64_t* at, int64_t key_stride, int lane, int n, int keys, bool first,
                   typename V::Scalar* a) {
  using S = typename V::Scalar;
  V tile[V::kWidth];
  for (int i = 0; i < V::kWidth; ++i) {
    const T* from = bias + at[lane + i] + n * key_stride;
    if constexpr (sizeof(S) == 8 ? sizeof(T) == 8 : sizeof(T) <= 4) {  // what the vector can load
      if (key_stride == 1) {
        tile[i] = load_some<V>(from, keys);
        continue;
      }
    }
    S row[V::kWidth] = {};
    for (int t = 0; t < keys; ++t) row[t] = S(to_float(from[t * key_stride]));
    tile[i] = V::load(row);
  }
  transpose(tile);
  const V unit = V::set(S(kLog2E));
  for (int t = 0; t < keys; ++t) {
    S* to = a + (n + t) * Panel<V>::kLanes + lane;
    V x = tile[t] * unit;
    if (!first) x = x + V::load(to);
    x.store(to);
  }
}

// first: a holds nothing yet.
template <class V, class T>
void add_bias(const T* bias, const int64_t* at, bool same, int64_t key_stride, int lanes, int keys, bool first,
              typename V::Scalar* a) {
  using S = typename V::Scalar;
  if (same) {  // one row for all lanes, as in a bias per key
    for (int n = 0; n < keys; ++n) {
      const V x = V::set(S(to_float(bias[at[0] + n * key_stride])) * S(kLog2E));
      for (int lane = 0; lane < lanes; lane += V::kWidth) {
        S* to = a + n * Panel<V>::kLanes + lane;
        if (first) {
          x.store(to);
        } else {
          (V::load(to) + x).store(to);
        }
      }
    }
    return;
  }
  for (int lane = 0; lane < lanes; lane += V::kWidth)
    for (int n = 0; n < keys; n += V::kWidth)
      add_bias_tile<V>(bias, at, key_stride, lane, n, int(smaller(V::kWidth, keys - n)), first, a);
}

// -slope * |i + offset - j| in units of log2, or 0.
template <class V>
void make_alibi(const Params& p, const Sequence& seq, const Panel<V>& panel, int64_t n0, int keys, int lanes,
                typename V::Scalar* a) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  S distance[kLanes], slope[kLanes];
  for (int lane = 0; lane < lanes; ++lane) {
    distance[lane] = S(panel.query[lane] + seq.offset - n0);
    slope[lane] = S(0);
    if (p.alibi.data != nullptr) {
      const int64_t at = panel.b * p.alibi.stride_b + panel.head[lane] * p.alibi.stride_h;
      slope[lane] = static_cast<const S*>(p.alibi.data)[at] * S(-kLog2E);
    }
  }
  for (int lane = 0; lane < lanes; lane += V::kWidth) {
    const V d = V::load(distance + lane), m = V::load(slope + lane);
    for (int n = 0; n < keys; ++n) {
      V x = V::set(S(0));
      if (p.alibi.data != nullptr) x = m * abs(d - V::set(S(n)));
      x.store(a + n * kLanes + lane);
    }
  }
}

// Where each row of the panel begins in a (batch, heads_q, seqlen_q, seqlen_k) view, at key n0.
template <class V>
bool row_offsets(const Panel<V>& panel, const View& view, int64_t n0, int64_t* at) {
  bool same = true;
  for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
    at[lane] = panel.b * view.stride_b + panel.head[lane] * view.stride_h + panel.query[lane] * view.stride_s +
               n0 * view.stride_d;
    if (lane >= panel.count) at[lane] = at[0];
    same = same && at[lane] == at[0];
  }
  return same;
}

// -inf where length or window hide a key from a row.
template <class V>
void hide_unseen(const Panel<V>& panel, int64_t n0, int keys, int lanes, typename V::Scalar* a) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const V hidden = V::set(S(-__builtin_inf()));
  S first[kLanes], last[kLanes];
  for (int lane = 0; lane < lanes; ++lane) {
    first[lane] = S(smaller(larger(panel.keys[lane].first - n0, 0), keys));
    last[lane] = S(smaller(larger(panel.keys[lane].last - n0, 0), keys));
  }
  for (int lane = 0; lane < lanes; lane += V::kWidth) {
    const V from = V::load(first + lane), to = V::load(last + lane);
    for (int n = 0; n < keys; ++n) {
      const V j = V::set(S(n));
      S* at = a + n * kLanes + lane;
      const V x = select(less(j, from), hidden, V::load(at));
      select(less(j, to), x, hidden).store(at);
    }
  }
}

// Fills a.values for keys n0 .. n0 + keys, in units of log2: -inf where hidden. Returns whether any pair is visible,
// and in `gaps` whether some key is seen by no row.
template <class V>
bool make_addend(const Params& p, const Sequence& seq, const Panel<V>& panel, int64_t n0, int keys, AddendScratch<V> a,
                 bool& gaps) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const int lanes = panel.vectors * V::kWidth;
  const bool first = p.alibi.data == nullptr;
  if (!first || p.bias.data == nullptr) make_alibi(p, seq, panel, n0, keys, lanes, a.values);
  int64_t at[kLanes];
  if (p.bias.data != nullptr) {
    const bool same = row_offsets(panel, p.bias, n0, at);
    switch (p.bias_dtype) {
      case DType::kFloat32:
        add_bias<V>(static_cast<const float*>(p.bias.data), at, same, p.bias.stride_d, lanes, keys, first, a.values);
        break;
      case DType::kFloat64:
        add_bias<V>(static_cast<const double*>(p.bias.data), at, same, p.bias.stride_d, lanes, keys, first, a.values);
        break;
      case DType::kBFloat16:
        add_bias<V>(static_cast<const bf16*>(p.bias.data), at, same, p.bias.stride_d, lanes, keys, first, a.values);
        break;
      default:
        add_bias<V>(static_cast<const fp16*>(p.bias.data), at, same, p.bias.stride_d, lanes, keys, first, a.values);
    }
  }
  // Hiding comes last: what a hidden pair was given, NaN perhaps, must not show.
  if (panel.count < lanes || !(panel.all.first <= n0 && n0 + keys <= panel.all.last))
    hide_unseen(panel, n0, keys, lanes, a.values);
  if (p.mask.data == nullptr) {
    for (int n = 0; n < keys; ++n) a.seen[n] = panel.any.first <= n0 + n && n0 + n < panel.any.last;
    gaps = n0 < panel.any.first || panel.any.last < n0 + keys;
    return true;
  }
  gaps = false;
  const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data);
  const bool same = row_offsets(panel, p.mask, n0, at);
  bool any_seen = false;
  for (int n = 0; n < keys; ++n) {
    S* row = a.values + n * kLanes;
    bool seen = false;
    if (same && !mask[at[0] + n * p.mask.stride_d]) {
      for (int lane = 0; lane < lanes; ++lane) row[lane] = S(-__builtin_inf());
    } else {
      for (int lane = 0; lane < panel.count; ++lane) {
        if (!same && !mask[at[lane] + n * p.mask.stride_d]) row[lane] = S(-__builtin_inf());
        seen |= row[lane] != S(-__builtin_inf());
      }
    }
    a.seen[n] = seen;
    any_seen |= seen;
    gaps |= !seen;
  }
  return any_seen;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
