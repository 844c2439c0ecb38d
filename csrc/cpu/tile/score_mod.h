// What is added to a block of scores, and what is hidden from it: ALiBi, bias, mask, window and lengths in one array.
#pragma once

#include "lse.h"
#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V>
struct AddendScratch {
  typename V::Scalar* values;  // [keys][kLanes]
  uint8_t* seen;               // [keys]: some row of the panel sees the key
};

// f(n, values) for the keys n < keys of kWidth rows of a bias or mask, `values` being a key's in all rows. at: where
// the rows begin. Whole tiles are read along the keys and turned, so that no line is touched twice.
template <class V, class T, class F>
inline void for_keys(const T* from, const int64_t* at, int64_t key_stride, int keys, F f) {
  using S = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  int n = 0;
  if constexpr (sizeof(S) == 8 ? sizeof(T) == 8 : sizeof(T) <= 4) {  // what the vector can load
    for (; key_stride == 1 && n + kWidth <= keys; n += kWidth) {
      V tile[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i] = V::load(from + at[i] + n);
      transpose(tile);
#pragma GCC unroll 16
      for (int t = 0; t < kWidth; ++t) f(n + t, tile[t]);
    }
  }
  for (; n < keys; ++n) {
    S values[kWidth];
    for (int i = 0; i < kWidth; ++i) values[i] = S(to_float(from[at[i] + n * key_stride]));
    f(n, V::load(values));
  }
}

// A finite bias times unit, within the range of finite numbers: a row of nothing but the lowest sees all keys alike, as
// in eager attention. Infinities and NaN stay.
template <class V>
inline V bounded_product(V bias, V unit) {
  using S = typename V::Scalar;
  constexpr S kLargest = sizeof(S) == 4 ? S(3.40282347e38) : S(1.7976931348623157e308);
  const V x = bias * unit, bounded = min(V::set(kLargest), max(V::set(-kLargest), x));
  return select(equal(abs(bias), V::set(S(__builtin_inf()))), x, bounded);
}

// a += unit * bias. first: a holds nothing yet.
template <class V, class T>
void add_bias(const T* bias, const int64_t* at, bool same, int64_t key_stride, int lanes, int keys, bool first,
              typename V::Scalar unit, typename V::Scalar* a) {
  using S = typename V::Scalar;
  if (same) {  // one row for all lanes, as in a bias per key
    for (int n = 0; n < keys; ++n) {
      const V x = bounded_product(V::set(S(to_float(bias[at[0] + n * key_stride]))), V::set(unit));
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
  const V factor = V::set(unit);
  for (int lane = 0; lane < lanes; lane += V::kWidth) {
    for_keys<V>(bias, at + lane, key_stride, keys, [&](int n, V x) {
      S* to = a + n * Panel<V>::kLanes + lane;
      x = bounded_product(x, factor);
      (first ? x : x + V::load(to)).store(to);
    });
  }
}

// -unit * slope * |i + offset - j|.
template <class V>
void make_alibi(const Params& p, const Sequence& seq, const Panel<V>& panel, int64_t n0, int keys, int lanes,
                typename V::Scalar unit, typename V::Scalar* a) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  S distance[kLanes], slope[kLanes];
  for (int lane = 0; lane < lanes; ++lane) {
    distance[lane] = S(panel.query[lane] + seq.offset - n0);
    const int64_t at = panel.b * p.alibi.stride_b + panel.head[lane] * p.alibi.stride_h;
    slope[lane] = static_cast<const S*>(p.alibi.data)[at] * -unit;
  }
  for (int lane = 0; lane < lanes; lane += V::kWidth) {
    const V d = V::load(distance + lane), m = V::load(slope + lane);
    for (int n = 0; n < keys; ++n) (m * abs(d - V::set(S(n)))).store(a + n * kLanes + lane);
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

// ALiBi and bias for keys n0 .. n0 + keys, times unit; there must be one of them.
template <class V>
void make_terms(const Params& p, const Sequence& seq, const Panel<V>& panel, int64_t n0, int keys,
                typename V::Scalar unit, typename V::Scalar* a) {
  const int lanes = panel.vectors * V::kWidth;
  const bool first = p.alibi.data == nullptr;
  if (!first) make_alibi(p, seq, panel, n0, keys, lanes, unit, a);
  if (p.bias.data == nullptr) return;
  int64_t at[Panel<V>::kLanes];
  const bool same = row_offsets(panel, p.bias, n0, at);
  auto add = [&](const auto* bias) { add_bias<V>(bias, at, same, p.bias.stride_d, lanes, keys, first, unit, a); };
  switch (p.bias_dtype) {
    case DType::kFloat32:
      return add(static_cast<const float*>(p.bias.data));
    case DType::kFloat64:
      return add(static_cast<const double*>(p.bias.data));
    case DType::kBFloat16:
      return add(static_cast<const bf16*>(p.bias.data));
    default:
      return add(static_cast<const fp16*>(p.bias.data));
  }
}

inline bool has_terms(const Params& p) { return p.bias.data != nullptr || p.alibi.data != nullptr; }

// Whether ALiBi and bias, divided by the scale, are where the products of q and k begin. In all steps of a call, so
// that forward and backward pass round a score alike. Scales of head_dims up to 1024: a smaller one would cost a large
// bias its range.
inline bool folds_terms(const Params& p) { return has_terms(p) && p.softcap == 0 && p.scale >= 1.0 / 32; }

// Whether scores stay products of q and k, until they are exponents. `folded`: with ALiBi and bias in them.
inline bool stay_products(const Params& p, bool folded) {
  return p.softcap == 0 && p.scale > 1e-18 && (folded || !has_terms(p));
}

template <class S>
inline Unit<S> unit_of(const Params& p, bool folded) {
  return stay_products(p, folded) ? unit_of_products<S>(p.scale) : natural_unit<S>();
}

// Whether a step that hides nothing is plain: nothing has to be done to its scores.
inline bool can_be_plain(const Params& p, bool folded) { return p.mask.data == nullptr && stay_products(p, folded); }

// -inf where the mask is False. seen[key] says whether any row of the panel sees the key.
template <class V>
void hide_masked(const Params& p, const Panel<V>& panel, int64_t n0, int keys, AddendScratch<V> a) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const V hidden = V::set(S(-__builtin_inf())), zero = V::set(S(0));
  const byte* mask = static_cast<const byte*>(p.mask.data);
  int64_t at[kLanes];
  const bool same = row_offsets(panel, p.mask, n0, at);
  const int64_t first = at[0], stride = p.mask.stride_d;
  for (int n = 0; n < keys; ++n) a.seen[n] = 0;
  for (int lane = 0; lane < panel.vectors * V::kWidth; lane += V::kWidth) {
    auto hide = [&](int n, V kept) {
      S* to = a.values + n * kLanes + lane;
      const V x = select(equal(kept, zero), hidden, V::load(to));
      x.store(to);
      // Not "above -inf", which NaN is not.
      a.seen[n] |= !all(equal(x, hidden));
    };
    if (same) {
      for (int n = 0; n < keys; ++n) hide(n, V::set(S(mask[first + n * stride].bits)));
    } else {
      for_keys<V>(mask, at + lane, stride, keys, hide);
    }
  }
}

// Fills a.values for keys n0 .. n0 + keys: -inf where hidden, else ALiBi and bias, or 0 if the scores have these
// already
// (`folded`). Returns whether any pair is visible, and in `gaps` whether some key is seen by no row.
template <class V>
bool make_addend(const Params& p, const Sequence& seq, const Panel<V>& panel, int64_t n0, int keys, bool folded,
                 AddendScratch<V> a, bool& gaps) {
  const int lanes = panel.vectors * V::kWidth;
  if (has_terms(p) && !folded) {
    make_terms(p, seq, panel, n0, keys, typename V::Scalar(1), a.values);
  } else {
    for (int n = 0; n < keys; ++n)
      for (int lane = 0; lane < lanes; lane += V::kWidth) V::set(0).store(a.values + n * Panel<V>::kLanes + lane);
  }
  // Hiding comes last: what a hidden pair was given, NaN perhaps, must not show.
  if (panel.count < lanes || !(panel.all.first <= n0 && n0 + keys <= panel.all.last))
    hide_unseen(panel, n0, keys, lanes, a.values);
  if (p.mask.data == nullptr) {
    for (int n = 0; n < keys; ++n) a.seen[n] = panel.any.first <= n0 + n && n0 + n < panel.any.last;
    gaps = n0 < panel.any.first || panel.any.last < n0 + keys;
    return true;
  }
  hide_masked(p, panel, n0, keys, a);
  int seen = 0;
  for (int n = 0; n < keys; ++n) seen += a.seen[n];
  gaps = seen < keys;
  return seen > 0;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
