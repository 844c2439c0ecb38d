// The Python module fastattn._cpu: calls described once, then run on addresses.
#include "../cpu/instruction_sets.h"
#include "../cpu/run.h"
#include "description.h"
#include "layout_key.h"

namespace fastattn {
namespace {

class Call : public Description {
 public:
  using Description::Description;

  void forward(const py::dict& addresses, uint64_t seed, int threads) const {
    run(fastattn::forward, at(addresses, seed), threads);
  }
  void forward_with_cache(const py::dict& addresses, uint64_t seed, int threads) const {
    run(fastattn::forward_with_cache, at(addresses, seed), threads);
  }
  void backward(const py::dict& addresses, uint64_t seed, int threads) const {
    run(fastattn::backward, at(addresses, seed), threads);
  }

  // forward and backward of calls without other tensors.
  void attend(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t residual,
              int threads) const {
    run(fastattn::forward, attending(q, k, v, out, lse, residual), threads);
  }
  void gradients(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t residual,
                 uintptr_t dout, uintptr_t dq, uintptr_t dk, uintptr_t dv, int threads) const {
    run(fastattn::backward, with_gradients(attending(q, k, v, out, lse, residual), dout, dq, dk, dv), threads);
  }

 private:
  static void run(void (*function)(const Params&, int), const Params& p, int threads) {
    require_memory(p);
    py::gil_scoped_release release;
    function(p, threads);
  }
};

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cpu, m) {
  using fastattn::Call;
  namespace py = fastattn::py;
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
  m.def("layout_reader", &fastattn::LayoutReader::make, py::arg("tensor_type"),
        "A function (*tensors) -> bytes that tells how the values of tensors of this type lie in memory; or None.");
  py::class_<Call>(m, "Call")
      .def(py::init<const py::dict&, const py::dict&, const py::dict&, const fastattn::Four&>())
      .def("attend", &Call::attend)
      .def("gradients", &Call::gradients)
      .def("forward", &Call::forward)
      .def("forward_with_cache", &Call::forward_with_cache)
      .def("backward", &Call::backward);
}
