// The Python module fastattn._cpu: calls described once, then run on addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cpu/core.h"

namespace py = pybind11;

namespace fastattn {
namespace {

using Strides = std::array<int64_t, 4>;

void set_strides(View& view, const py::dict& strides, const char* name) {
  if (!strides.contains(name)) return;
  const Strides s = strides[name].cast<Strides>();
  view = {nullptr, s[0], s[1], s[2], s[3]};
}

// A call without its addresses: what stays the same from one call of a shape to the next.
class Call {
 public:
  Call(const py::dict& sizes, const py::dict& options, const py::dict& strides, const Strides& dbias_size) {
    auto size = [&](const char* name) { return sizes[name].cast<int64_t>(); };
    p_.dtype = static_cast<DType>(size("dtype"));
    p_.bias_dtype = static_cast<DType>(size("bias_dtype"));
    p_.batch = size("batch");
    p_.heads_q = size("heads_q");
    p_.heads_kv = size("heads_kv");
    p_.seqlen_q = size("seqlen_q");
    p_.seqlen_k = size("seqlen_k");
    p_.head_dim = size("head_dim");
    p_.head_dim_v = size("head_dim_v");
    p_.max_pages = size("max_pages");
    p_.page_size = size("page_size");
    p_.seqlen_new = size("seqlen_new");
    p_.rotary_dim = size("rotary_dim");
    p_.rotary_interleaved = size("rotary_interleaved") != 0;
    p_.window_left = size("window_left");
    p_.window_right = size("window_right");
    p_.bottom_right = size("bottom_right") != 0;
    p_.dropout_threshold = uint32_t(size("dropout_threshold"));
    p_.scale = options["scale"].cast<double>();
    p_.softcap = options["softcap"].cast<double>();
    p_.dropout_scale = options["dropout_scale"].cast<double>();
    set_strides(p_.q, strides, "q");
    set_strides(p_.k, strides, "k");
    set_strides(p_.v, strides, "v");
    set_strides(p_.out, strides, "out");
    set_strides(p_.lse, strides, "lse");
    set_strides(p_.mask, strides, "mask");
    set_strides(p_.bias, strides, "bias");
    set_strides(p_.alibi, strides, "alibi_slopes");
    set_strides(p_.sinks, strides, "sinks");
    set_strides(p_.k_new, strides, "k_new");
    set_strides(p_.v_new, strides, "v_new");
    set_strides(p_.dout, strides, "dout");
    set_strides(p_.dlse, strides, "dlse");
    set_strides(p_.dq, strides, "dq");
    set_strides(p_.dk, strides, "dk");
    set_strides(p_.dv, strides, "dv");
    set_strides(p_.dbias, strides, "dbias");
    set_strides(p_.dsinks, strides, "dsinks");
    std::copy(dbias_size.begin(), dbias_size.end(), p_.dbias_size);
  }

  // The shortest way: no other tensors, no lse.
  void attend(uint64_t q, uint64_t k, uint64_t v, uint64_t out, int threads) const {
    Params p = p_;
    set(p.q, q);
    set(p.k, k);
    set(p.v, v);
    set(p.out, out);
    py::gil_scoped_release release;
    fastattn::forward(p, threads);
  }

  void forward(uint64_t q, uint64_t k, uint64_t v, uint64_t mask, uint64_t bias, uint64_t alibi, uint64_t sinks,
               uint64_t kv_lengths, uint64_t cu_seqlens_q, uint64_t cu_seqlens_k, uint64_t block_table, uint64_t seed,
               uint64_t out, uint64_t lse, int threads) const {
    const Params p = with_inputs(q, k, v, mask, bias, alibi, sinks, kv_lengths, cu_seqlens_q, cu_seqlens_k, block_table,
                                 seed, out, lse);
    py::gil_scoped_release release;
    fastattn::forward(p, threads);
  }

  // k and v are the cache.
  void forward_with_cache(uint64_t q, uint64_t k, uint64_t v, uint64_t mask, uint64_t bias, uint64_t alibi,
                          uint64_t sinks, uint64_t kv_lengths, uint64_t cu_seqlens_q, uint64_t cu_seqlens_k,
                          uint64_t block_table, uint64_t seed, uint64_t out, uint64_t lse, uint64_t k_new,
                          uint64_t v_new, uint64_t cos, uint64_t sin, int threads) const {
    Params p = with_inputs(q, k, v, mask, bias, alibi, sinks, kv_lengths, cu_seqlens_q, cu_seqlens_k, block_table, seed,
                           out, lse);
    set(p.k_new, k_new);
    set(p.v_new, v_new);
    p.cos = reinterpret_cast<const void*>(cos);
    p.sin = reinterpret_cast<const void*>(sin);
    py::gil_scoped_release release;
    fastattn::forward_with_cache(p, threads);
  }

  void backward(uint64_t q, uint64_t k, uint64_t v, uint64_t mask, uint64_t bias, uint64_t alibi, uint64_t sinks,
                uint64_t kv_lengths, uint64_t cu_seqlens_q, uint64_t cu_seqlens_k, uint64_t block_table, uint64_t seed,
                uint64_t out, uint64_t lse, uint64_t dout, uint64_t dlse, uint64_t dq, uint64_t dk, uint64_t dv,
                uint64_t dbias, uint64_t dsinks, int threads) const {
    Params p = with_inputs(q, k, v, mask, bias, alibi, sinks, kv_lengths, cu_seqlens_q, cu_seqlens_k, block_table, seed,
                           out, lse);
    set(p.dout, dout);
    set(p.dlse, dlse);
    set(p.dq, dq);
    set(p.dk, dk);
    set(p.dv, dv);
    set(p.dbias, dbias);
    set(p.dsinks, dsinks);
    py::gil_scoped_release release;
    fastattn::backward(p, threads);
  }

 private:
  Params with_inputs(uint64_t q, uint64_t k, uint64_t v, uint64_t mask, uint64_t bias, uint64_t alibi, uint64_t sinks,
                     uint64_t kv_lengths, uint64_t cu_seqlens_q, uint64_t cu_seqlens_k, uint64_t block_table,
                     uint64_t seed, uint64_t out, uint64_t lse) const {
    Params p = p_;
    set(p.q, q);
    set(p.k, k);
    set(p.v, v);
    set(p.mask, mask);
    set(p.bias, bias);
    set(p.alibi, alibi);
    set(p.sinks, sinks);
    p.kv_lengths = indices(kv_lengths);
    p.cu_seqlens_q = indices(cu_seqlens_q);
    p.cu_seqlens_k = indices(cu_seqlens_k);
    p.block_table = indices(block_table);
    p.seed = seed;
    set(p.out, out);
    set(p.lse, lse);
    return p;
  }
  static void set(View& view, uint64_t address) { view.data = reinterpret_cast<void*>(address); }
  static const int32_t* indices(uint64_t address) { return reinterpret_cast<const int32_t*>(address); }

  Params p_;
};

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fastattn. Addresses and strides are trusted: fastattn.problem has checked them.";
  m.def("instruction_sets", &fastattn::instruction_sets,
        "Instruction sets that this processor can run, the best first.");
  m.def(
      "instruction_set", [] { return fastattn::kernels().name; }, "The instruction set in use (see FASTATTN_CPU_ISA).");
  py::class_<fastattn::Call>(m, "Call")
      .def(py::init<const py::dict&, const py::dict&, const py::dict&, const std::array<int64_t, 4>&>())
      .def("attend", &fastattn::Call::attend)
      .def("forward", &fastattn::Call::forward)
      .def("forward_with_cache", &fastattn::Call::forward_with_cache)
      .def("backward", &fastattn::Call::backward);
}
