// A call described from Python once, then completed with addresses each time: what both native modules share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "params.h"

namespace fastattn {

namespace py = pybind11;

using Four = std::array<int64_t, 4>;

// The names under which Python hands over strides and addresses.
inline constexpr std::pair<const char*, View Params::*> kTensors[] = {
    {"q", &Params::q},           {"k", &Params::k},         {"v", &Params::v},
    {"mask", &Params::mask},     {"bias", &Params::bias},   {"alibi_slopes", &Params::alibi},
    {"sinks", &Params::sinks},   {"k_new", &Params::k_new}, {"v_new", &Params::v_new},
    {"out", &Params::out},       {"lse", &Params::lse},     {"residual", &Params::residual},
    {"dout", &Params::dout},     {"dlse", &Params::dlse},   {"dq", &Params::dq},
    {"dk", &Params::dk},         {"dv", &Params::dv},       {"dbias", &Params::dbias},
    {"dsinks", &Params::dsinks},
};
inline constexpr std::pair<const char*, const int32_t* Params::*> kIndices[] = {
    {"kv_lengths", &Params::kv_lengths},     {"q_offset", &Params::q_offset},
    {"cu_seqlens_q", &Params::cu_seqlens_q}, {"cu_seqlens_k", &Params::cu_seqlens_k},
    {"block_table", &Params::block_table},
};
inline constexpr std::pair<const char*, const void* Params::*> kTables[] = {{"cos", &Params::cos},
                                                                            {"sin", &Params::sin}};
inline constexpr std::pair<const char*, int64_t Params::*> kSizes[] = {
    {"batch", &Params::batch},
    {"heads_q", &Params::heads_q},
    {"heads_kv", &Params::heads_kv},
    {"seqlen_q", &Params::seqlen_q},
    {"seqlen_k", &Params::seqlen_k},
    {"head_dim", &Params::head_dim},
    {"head_dim_v", &Params::head_dim_v},
    {"max_pages", &Params::max_pages},
    {"page_size", &Params::page_size},
    {"num_pages", &Params::num_pages},
    {"seqlen_new", &Params::seqlen_new},
    {"rotary_dim", &Params::rotary_dim},
    {"rotary_positions", &Params::rotary_positions},
    {"window_left", &Params::window_left},
    {"window_right", &Params::window_right},
};
inline constexpr std::pair<const char*, double Params::*> kNumbers[] = {
    {"scale", &Params::scale},
    {"softcap", &Params::softcap},
    {"dropout_scale", &Params::dropout_scale},
};

template <class T>
T address(const py::handle& number) {
  return reinterpret_cast<T>(number.cast<uintptr_t>());
}

// A call without its addresses: what stays the same from one call of a kind to the next.
class Description {
 public:
  // strides: name -> (batch, head, position, feature), see View. dbias_size: the bias's own shape.
  Description(const py::dict& sizes, const py::dict& numbers, const py::dict& strides, const Four& dbias_size) {
    for (const auto& [name, field] : kSizes) p_.*field = sizes[name].cast<int64_t>();
    for (const auto& [name, field] : kNumbers) p_.*field = numbers[name].cast<double>();
    for (const auto& [name, field] : kTensors) {
      if (!strides.contains(name)) continue;
      const Four s = strides[name].cast<Four>();
      p_.*field = {nullptr, s[0], s[1], s[2], s[3]};
    }
    p_.dtype = static_cast<DType>(sizes["dtype"].cast<int>());
    p_.bias_dtype = static_cast<DType>(sizes["bias_dtype"].cast<int>());
    p_.bottom_right = sizes["bottom_right"].cast<bool>();
    p_.rotary_interleaved = sizes["rotary_interleaved"].cast<bool>();
    p_.dropout_threshold = sizes["dropout_threshold"].cast<uint32_t>();
    std::copy(dbias_size.begin(), dbias_size.end(), p_.dbias_size);
  }

 protected:
  Params at(const py::dict& addresses, uint64_t seed) const {
    Params p = p_;
    p.seed = seed;
    for (const auto& [name, field] : kTensors)
      if (addresses.contains(name)) (p.*field).data = address<void*>(addresses[name]);
    for (const auto& [name, field] : kIndices)
      if (addresses.contains(name)) p.*field = address<const int32_t*>(addresses[name]);
    for (const auto& [name, field] : kTables)
      if (addresses.contains(name)) p.*field = address<const void*>(addresses[name]);
    return p;
  }

  // The same for calls without other tensors, in the shortest way. 0 stands for a result not wanted.
  Params attending(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t residual) const {
    Params p = p_;
    p.q.data = reinterpret_cast<void*>(q);
    p.k.data = reinterpret_cast<void*>(k);
    p.v.data = reinterpret_cast<void*>(v);
    p.out.data = reinterpret_cast<void*>(out);
    p.lse.data = reinterpret_cast<void*>(lse);
    p.residual.data = reinterpret_cast<void*>(residual);
    return p;
  }
  static Params with_gradients(Params p, uintptr_t dout, uintptr_t dq, uintptr_t dk, uintptr_t dv) {
    p.dout.data = reinterpret_cast<void*>(dout);
    p.dq.data = reinterpret_cast<void*>(dq);
    p.dk.data = reinterpret_cast<void*>(dk);
    p.dv.data = reinterpret_cast<void*>(dv);
    return p;
  }

  // Refuses a call that would read or write where there is no memory.
  static void require_memory(const Params& p) {
    require(p.q, p.batch * p.heads_q * p.seqlen_q * p.head_dim, "q");
    if (p.block_table == nullptr) {
      require(p.k, p.batch * p.heads_kv * p.seqlen_k * p.head_dim, "k");
      require(p.v, p.batch * p.heads_kv * p.seqlen_k * p.head_dim_v, "v");
    }
    require(p.out, p.batch * p.heads_q * p.seqlen_q * p.head_dim_v, "out");
  }

  Params p_;

 private:
  static void require(const View& view, int64_t numbers, const char* name) {
    if (view.data == nullptr && numbers > 0) throw py::value_error(std::string(name) + " has no memory");
  }
};

}  // namespace fastattn
