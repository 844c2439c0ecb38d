// What changes scores between the product of q and k and the softmax: softcap, ALiBi and bias.
#pragma once

#include "../simd/math.h"
#include "lse.h"
#include "mask.h"

namespace fastattn {
namespace FASTATTN_ISA {

// How a kernel changes the scores of a sequence. ALiBi and bias are the terms of a score.
template <class S>
struct ScoreMod {
  bool has_terms;
  // Products of q and k begin with the terms, divided by the scale; in all steps of a call, so that forward and
  // backward pass round a score alike. Scales of head_dims up to 1024: a smaller one would cost a large bias its range.
  bool folded;
  // Scores stay products of q and k, with the terms in them, until they are exponents.
  bool keeps_products;
  Unit<S> unit;
  S factor;  // makes products scores, to which terms are added; without softcap
  bool has_softcap;
  S into_cap, cap;  // scale / softcap, and softcap

  // decode: the sequence is one of the decode kernel, whose products begin with 0.
  ScoreMod(const Params& p, bool decode)
      : has_terms(p.bias.data != nullptr || p.alibi.data != nullptr),
        folded(!decode && has_terms && p.softcap == 0 && p.scale >= 1.0 / 32),
        keeps_products(p.softcap == 0 && p.scale > 1e-18 && (folded || !has_terms)),
        unit(keeps_products ? unit_of_products<S>(p.scale) : natural_unit<S>()),
        factor(S(keeps_products ? 1 : p.scale)),
        has_softcap(p.softcap > 0),
        into_cap(S(has_softcap ? p.scale / p.softcap : 0)),
        cap(S(p.softcap)) {}
};

// A finite bias times unit, within the range of finite numbers: a row of nothing but the lowest sees all keys alike, as
// in eager attention. Infinities and NaN stay.
template <class V>
inline V bounded_product(V bias, V unit) {
  using S = typename V::Scalar;
  constexpr S kLargest = sizeof(S) == 4 ? S(3.40282347e38) : S(1.7976931348623157e308);
  const V x = bias * unit, bounded = min(V::set(kLargest), max(V::set(-kLargest), x));
  return select(equal(abs(bias), V::set(S(__builtin_inf()))), x, bounded);
}

// terms += unit * bias; first: = unit * bias. bias: at the tile's first key.
template <class V, class T>
void add_bias(const Params& p, const Panel<V>& panel, const T* bias, int keys, bool first, typename V::Scalar unit,
              typename V::Scalar* terms) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const int lanes = panel.lanes();
  const int64_t key_stride = p.bias.stride_d;
  int64_t at[kLanes];
  const V factor = V::set(unit);
  auto add = [&](int n, int lane, V x) {
    S* to = terms + n * kLanes + lane;
    (first ? x : x + V::load(to)).store(to);
  };
  if (row_offsets(panel, p.bias, at)) {  // one row for all lanes, as in a bias per key
    for (int n = 0; n < keys; ++n) {
      const V x = bounded_product(V::set(S(to_float(bias[at[0] + n * key_stride]))), factor);
      for (int lane = 0; lane < lanes; lane += V::kWidth) add(n, lane, x);
    }
    return;
  }
  for (int lane = 0; lane < lanes; lane += V::kWidth)
    for_each_key<V>(bias, at + lane, key_stride, keys, [&](int n, V x) { add(n, lane, bounded_product(x, factor)); });
}

// terms = -unit * slope * |i + offset - j|.
template <class V>
void make_alibi(const Params& p, const Sequence& seq, const Panel<V>& panel, KeyTile tile, typename V::Scalar unit,
                typename V::Scalar* terms) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const int lanes = panel.lanes(), keys = tile.count;
  S distance[kLanes], slope[kLanes];
  for (int lane = 0; lane < lanes; ++lane) {
    distance[lane] = S(panel.query[lane] + seq.offset - tile.n_begin);
    const int64_t at = panel.b * p.alibi.stride_b + panel.head[lane] * p.alibi.stride_h;
    slope[lane] = static_cast<const S*>(p.alibi.data)[at] * -unit;
  }
  for (int lane = 0; lane < lanes; lane += V::kWidth) {
    const V d = V::load(distance + lane), m = V::load(slope + lane);
    for (int n = 0; n < keys; ++n) (m * abs(d - V::set(S(n)))).store(terms + n * kLanes + lane);
  }
}

// terms = unit * (ALiBi + bias) for the keys of a tile; there must be one of them.
template <class V>
void make_terms(const Params& p, const Sequence& seq, const Panel<V>& panel, KeyTile tile, typename V::Scalar unit,
                typename V::Scalar* terms) {
  const bool first = p.alibi.data == nullptr;
  if (!first) make_alibi(p, seq, panel, tile, unit, terms);
  if (p.bias.data == nullptr) return;
  auto add = [&](const auto* bias) {
    add_bias(p, panel, bias + tile.n_begin * p.bias.stride_d, tile.count, first, unit, terms);
  };
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

// The terms of a masked tile: -inf where hidden, else ALiBi and bias, or 0 if the products have these already.
template <class V>
Visibility make_masked_terms(const KVHead& kv, const MaskedPanel<V>& panel, KeyTile tile,
                             const ScoreMod<typename V::Scalar>& mod, TileTerms<V> to) {
  const int lanes = panel.lanes(), keys = tile.count;
  if (mod.has_terms && !mod.folded) {
    make_terms(kv.p, kv.seq, panel, tile, typename V::Scalar(1), to.values);
  } else {
    for (int n = 0; n < keys; ++n)
      for (int lane = 0; lane < lanes; lane += V::kWidth) V::set(0).store(to.values + n * Panel<V>::kLanes + lane);
  }
  return panel.mask.hide(tile, to.values, to.seen);
}

// Products -> scores with their terms, in one vector of lanes; returns their maximum per lane.
template <class V>
V modify_scores(const ScoreMod<typename V::Scalar>& mod, typename V::Scalar* scores, const typename V::Scalar* terms,
                int keys) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const bool capped = mod.has_softcap;
  const V scale = V::set(capped ? mod.into_cap : mod.factor), cap = V::set(mod.cap);
  const V hidden = V::set(S(-__builtin_inf()));
  V highest = hidden;
  for (int at = 0; at < keys * kLanes; at += kLanes) {
    const V a = V::load(terms + at), raw = V::load(scores + at) * scale;
    V x = raw + a;
    if (capped) x = fma(tanh(raw), cap, a);
    // A hidden score may have been made of NaN: it must not become NaN + -inf.
    x = select(equal(a, hidden), hidden, x);
    x.store(scores + at);
    highest = max(highest, x);
  }
  return highest;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
