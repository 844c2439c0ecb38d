// The Python module fastattn._cpu: calls described once, then run on addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "cpu/core.h"

namespace py = pybind11;

namespace fastattn {
namespace {

using Four = std::array<int64_t, 4>;

// The names under which Python hands over strides and addresses.
constexpr std::pair<const char*, View Params::*> kTensors[] = {
    {"q", &Params::q},         {"k", &Params::k},         {"v", &Params::v},
    {"mask", &Params::mask},   {"bias", &Params::bias},   {"alibi_slopes", &Params::alibi},
    {"sinks", &Params::sinks}, {"k_new", &Params::k_new}, {"v_new", &Params::v_new},
    {"out", &Params::out},     {"lse", &Params::lse},     {"dout", &Params::dout},
    {"dlse", &Params::dlse},   {"dq", &Params::dq},       {"dk", &Params::dk},
    {"dv", &Params::dv},       {"dbias", &Params::dbias}, {"dsinks", &Params::dsinks},
};
constexpr std::pair<const char*, const int32_t* Params::*> kIndices[] = {
    {"kv_lengths", &Params::kv_lengths},
    {"cu_seqlens_q", &Params::cu_seqlens_q},
    {"cu_seqlens_k", &Params::cu_seqlens_k},
    {"block_table", &Params::block_table},
};
constexpr std::pair<const char*, const void* Params::*> kTables[] = {{"cos", &Params::cos}, {"sin", &Params::sin}};
constexpr std::pair<const char*, int64_t Params::*> kSizes[] = {
    {"batch", &Params::batch},
    {"heads_q", &Params::heads_q},
    {"heads_kv", &Params::heads_kv},
    {"seqlen_q", &Params::seqlen_q},
    {"seqlen_k", &Params::seqlen_k},
    {"head_dim", &Params::head_dim},
    {"head_dim_v", &Params::head_dim_v},
    {"max_pages", &Params::max_pages},
    {"page_size", &Params::page_size},
    {"seqlen_new", &Params::seqlen_new},
    {"rotary_dim", &Params::rotary_dim},
    {"window_left", &Params::window_left},
    {"window_right", &Params::window_right},
};
constexpr std::pair<const char*, double Params::*> kNumbers[] = {
    {"scale", &Params::scale},
    {"softcap", &Params::softcap},
    {"dropout_scale", &Params::dropout_scale},
};

template <class T>
T address(const py::handle& number) {
  return reinterpret_cast<T>(number.cast<uintptr_t>());
}

// A call without its addresses: what stays the same from one call of a kind to the next.
class Call {
 public:
  // strides: name -> (batch, head, position, feature), see View. dbias_size: the bias's own shape.
  Call(const py::dict& sizes, const py::dict& numbers, const py::dict& strides, const Four& dbias_size) {
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

  void forward(const py::dict& addresses, uint64_t seed, int threads) const {
    run(fastattn::forward, at(addresses, seed), threads);
  }
  void forward_with_cache(const py::dict& addresses, uint64_t seed, int threads) const {
    run(fastattn::forward_with_cache, at(addresses, seed), threads);
  }
  void backward(const py::dict& addresses, uint64_t seed, int threads) const {
    run(fastattn::backward, at(addresses, seed), threads);
  }

  // forward and backward of calls without other tensors, in the shortest way. 0 stands for a result not wanted.
  void attend(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, int threads) const {
    run(fastattn::forward, plain(q, k, v, out, lse), threads);
  }
  void gradients(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t dout, uintptr_t dq,
                 uintptr_t dk, uintptr_t dv, int threads) const {
    Params p = plain(q, k, v, out, lse);
    p.dout.data = reinterpret_cast<void*>(dout);
    p.dq.data = reinterpret_cast<void*>(dq);
    p.dk.data = reinterpret_cast<void*>(dk);
    p.dv.data = reinterpret_cast<void*>(dv);
    run(fastattn::backward, p, threads);
  }

 private:
  Params plain(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse) const {
    Params p = p_;
    p.q.data = reinterpret_cast<void*>(q);
    p.k.data = reinterpret_cast<void*>(k);
    p.v.data = reinterpret_cast<void*>(v);
    p.out.data = reinterpret_cast<void*>(out);
    p.lse.data = reinterpret_cast<void*>(lse);
    return p;
  }

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

  static void require(const View& view, int64_t numbers, const char* name) {
    if (view.data == nullptr && numbers > 0) throw py::value_error(std::string(name) + " has no memory");
  }

  static void run(void (*function)(const Params&, int), const Params& p, int threads) {
    require(p.q, p.batch * p.heads_q * p.seqlen_q * p.head_dim, "q");
    if (p.block_table == nullptr) {
      require(p.k, p.batch * p.heads_kv * p.seqlen_k * p.head_dim, "k");
      require(p.v, p.batch * p.heads_kv * p.seqlen_k * p.head_dim_v, "v");
    }
    require(p.out, p.batch * p.heads_q * p.seqlen_q * p.head_dim_v, "out");
    py::gil_scoped_release release;
    function(p, threads);
  }

  Params p_;
};

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cpu, m) {
  using fastattn::Call;
  m.doc() = "CPU kernels of fastattn. Addresses and strides are trusted: fastattn.problem has checked them.";
  m.def("instruction_sets", &fastattn::instruction_sets,
        "Instruction sets that this processor can run, the best first.");
  m.def(
      "instruction_set", [] { return fastattn::kernels().name; }, "The instruction set in use (see FASTATTN_CPU_ISA).");
  m.def(
      "multiply_adds",
      [](int dtype, int64_t steps, int threads) {
        py::gil_scoped_release release;
        return fastattn::multiply_adds(static_cast<fastattn::DType>(dtype), steps, threads);
      },
      "Multiply-adds and nothing else, for benchmarks: returns the floating-point operations done.");
  py::class_<Call>(m, "Call")
      .def(py::init<const py::dict&, const py::dict&, const py::dict&, const fastattn::Four&>())
      .def("attend", &Call::attend)
      .def("gradients", &Call::gradients)
      .def("forward", &Call::forward)
      .def("forward_with_cache", &Call::forward_with_cache)
      .def("backward", &Call::backward);
}
