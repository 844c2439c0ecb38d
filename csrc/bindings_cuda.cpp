// The Python module fastattn._cuda: calls described once, then launched with addresses and a stream.
#include <vector>

#include "bindings_call.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace fastattn {
namespace {

using cuda::Arguments;
using cuda::Launch;

class Call : public Description {
 public:
  using Description::Description;

  // What `forward` would launch: (kernel, blocks, threads, bytes of shared memory, bytes of its argument).
  py::tuple plan_forward(const py::dict& addresses) const {
    const Launch launch = planned(addresses);
    return py::make_tuple(launch.kernel.name, launch.blocks, launch.kernel.threads, launch.kernel.shared_bytes,
                          py::bytes(reinterpret_cast<const char*>(&launch.arguments), sizeof(Arguments)));
  }

  void forward(const py::dict& addresses, int device, uintptr_t stream) const {
    const Launch launch = planned(addresses);
    py::gil_scoped_release release;
    cuda::run(launch, device, reinterpret_cast<void*>(stream));
  }

 private:
  Launch planned(const py::dict& addresses) const {
    const Params p = at(addresses, 0);
    require_memory(p);
    return cuda::plan_forward(p);
  }
};

// Where the addresses lie in a kernel's argument, for those who run kernels on memory of their own.
std::vector<int64_t> address_offsets() {
  const Arguments a;
  std::vector<int64_t> offsets;
  const auto add = [&](const auto& field) {
    offsets.push_back(reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&a));
  };
  for (const auto& [name, field] : kTensors) add((a.p.*field).data);
  for (const auto& [name, field] : kIndices) add(a.p.*field);
  for (const auto& [name, field] : kTables) add(a.p.*field);
  return offsets;
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cuda, m) {
  namespace py = fastattn::py;
  using fastattn::Call;
  m.doc() = "CUDA kernels of fastattn. Addresses and strides are trusted: fastattn.problem has checked them.";
  m.def("why_unavailable", &fastattn::cuda::why_unavailable, "Empty, or why kernels cannot run here.");
  m.def("address_offsets", &fastattn::address_offsets, "Offsets of the addresses within a kernel's argument.");
  m.attr("LARGEST_HEAD_DIM") = fastattn::cuda::kLargestHeadDim;
  py::class_<Call>(m, "Call", py::module_local())
      .def(py::init<const py::dict&, const py::dict&, const py::dict&, const fastattn::Four&>())
      .def("plan_forward", &Call::plan_forward)
      .def("forward", &Call::forward);
}
