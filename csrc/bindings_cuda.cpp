// The Python module fastattn._cuda: calls described once, then planned or launched with addresses and a stream.
#include <vector>

#include "bindings_call.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace fastattn {
namespace {

using cuda::Arguments;
using cuda::Device;
using cuda::Launch;
using cuda::Operation;

class Call : public Description {
 public:
  using Description::Description;

  int64_t workspace_bytes(Operation operation, const py::dict& addresses, int capability, int multiprocessors) const {
    return cuda::workspace_bytes(operation, at(addresses, 0), {capability, multiprocessors});
  }

  // What `run` would launch on such a GPU: (kernel, blocks, threads, bytes of shared memory, bytes of its argument).
  py::list plan(Operation operation, const py::dict& addresses, uint64_t seed, int capability, int multiprocessors,
                uintptr_t workspace) const {
    py::list launches;
    for (const Launch& launch : planned(operation, addresses, seed, {capability, multiprocessors}, workspace)) {
      const py::bytes argument(reinterpret_cast<const char*>(&launch.arguments), sizeof(Arguments));
      launches.append(py::make_tuple(launch.kernel.name, launch.blocks, launch.kernel.threads,
                                     launch.kernel.shared_bytes, argument));
    }
    return launches;
  }

  void run(Operation operation, const py::dict& addresses, uint64_t seed, int device, uintptr_t stream,
           uintptr_t workspace) const {
    const Device properties = cuda::device_of(device);
    const std::vector<Launch> launches = planned(operation, addresses, seed, properties, workspace);
    py::gil_scoped_release release;
    cuda::run(launches, device, reinterpret_cast<void*>(stream));
  }

 private:
  std::vector<Launch> planned(Operation operation, const py::dict& addresses, uint64_t seed, const Device& device,
                              uintptr_t workspace) const {
    const Params p = at(addresses, seed);
    require_memory(p);
    return cuda::plan(operation, p, device, reinterpret_cast<void*>(workspace));
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
  for (const auto& field : {&Arguments::partial_out, &Arguments::partial_lse, &Arguments::row_lse, &Arguments::delta})
    add(a.*field);
  return offsets;
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_cuda, m) {
  namespace py = fastattn::py;
  using fastattn::Call;
  using fastattn::cuda::Operation;
  m.doc() = "CUDA kernels of fastattn. Addresses and strides are trusted: fastattn.problem has checked them.";
  m.def("why_unavailable", &fastattn::cuda::why_unavailable, "Empty, or why kernels cannot run here.");
  m.def("address_offsets", &fastattn::address_offsets, "Offsets of the addresses within a kernel's argument.");
  m.attr("HEAD_DIMS") =
      py::tuple(py::cast(std::vector<int>(std::begin(fastattn::cuda::kHeadDims), std::end(fastattn::cuda::kHeadDims))));
  py::enum_<Operation>(m, "Operation", py::module_local())
      .value("forward", Operation::kForward)
      .value("backward", Operation::kBackward)
      .value("with_cache", Operation::kWithCache);
  py::class_<Call>(m, "Call", py::module_local())
      .def(py::init<const py::dict&, const py::dict&, const py::dict&, const fastattn::Four&>())
      .def("workspace_bytes", &Call::workspace_bytes)
      .def("plan", &Call::plan)
      .def("run", &Call::run);
}
