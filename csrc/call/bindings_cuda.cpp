// The Python module fastattn._cuda: calls described once, then launched with addresses and a stream.
#include <string>
#include <utility>
#include <vector>

#include "../cuda/host/kernel_table.h"
#include "../cuda/host/launch.h"
#include "../cuda/host/num_splits.h"
#include "../cuda/host/plan.h"
#include "description.h"

namespace fastattn {
namespace {

using cuda::Arguments;
using cuda::Gpu;
using cuda::Launch;
using cuda::Operation;
using cuda::Plan;

constexpr std::pair<const char*, Operation> kOperations[] = {{"forward", Operation::kForward},
                                                             {"backward", Operation::kBackward},

                                                             {"decode", Operation::kDecode}};

Operation operation_of(const std::string& wanted) {
  for (const auto& [name, operation] : kOperations)
    if (wanted == name) return operation;
  throw py::value_error("no operation is called " + wanted);
}

class Call : public Description {
 public:
  using Description::Description;

  // The memory that an operation needs besides its tensors, whose addresses tell which of them there are.
  int64_t workspace_bytes(const std::string& operation, const py::dict& addresses, int capability,
                          int multiprocessors) const {
    return planned(operation, addresses, {capability, multiprocessors}).workspace_bytes;
  }

  // What `run` would launch: (kernel, blocks, threads, bytes of shared memory, bytes of its argument) each.
  std::vector<py::tuple> plan(const std::string& operation, const py::dict& addresses, int capability,
                              int multiprocessors) const {
    std::vector<py::tuple> launches;
    for (const Launch& x : planned(operation, addresses, {capability, multiprocessors}).launches)
      launches.push_back(py::make_tuple(x.kernel.name, x.blocks, x.kernel.threads, x.kernel.shared_bytes,
                                        py::bytes(reinterpret_cast<const char*>(&x.arguments), sizeof(Arguments))));
    return launches;
  }

  void run(const std::string& operation, const py::dict& addresses, int capability, int multiprocessors, int device,
           uintptr_t stream) const {
    launch(planned(operation, addresses, {capability, multiprocessors}), device, stream);
  }

  // forward and backward of calls without other tensors.
  void attend(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t residual,
              uintptr_t workspace, int capability, int multiprocessors, int device, uintptr_t stream) const {
    launch(
        planned(Operation::kForward, attending(q, k, v, out, lse, residual), {capability, multiprocessors}, workspace),
        device, stream);
  }
  void gradients(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t residual,
                 uintptr_t dout, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t workspace, int capability,
                 int multiprocessors, int device, uintptr_t stream) const {
    const Params p = with_gradients(attending(q, k, v, out, lse, residual), dout, dq, dk, dv);
    launch(planned(Operation::kBackward, p, {capability, multiprocessors}, workspace), device, stream);
  }

 private:
  static void launch(const Plan& plan, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    for (const Launch& launch : plan.launches) cuda::run(launch, device, reinterpret_cast<void*>(stream));
  }
  Plan planned(const std::string& operation, const py::dict& addresses, const Gpu& gpu) const {
    const uintptr_t workspace = addresses.contains("workspace") ? addresses["workspace"].cast<uintptr_t>() : 0;
    return planned(operation_of(operation), at(addresses, 0), gpu, workspace);
  }
  static Plan planned(Operation operation, const Params& p, const Gpu& gpu, uintptr_t workspace) {
    require_memory(p);
    return cuda::plan(operation, p, gpu, reinterpret_cast<void*>(workspace));
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
  for (const auto field : {&Arguments::lse_log2, &Arguments::neg_delta}) add(a.*field);
  add(a.q_rotated.data);
  add(a.out_accum);
  add(a.lse_accum);
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
  m.def("splits", &fastattn::cuda::num_splits, "How many splits a call with a cache gets: blocks, keys, slots.");
  m.def(
      "max_head_dim", [](int capability) { return fastattn::cuda::architecture_of(capability).max_head_dim(); },
      "The largest head_dim on a GPU of a compute capability, times 10.");
  py::class_<Call>(m, "Call", py::module_local())
      .def(py::init<const py::dict&, const py::dict&, const py::dict&, const fastattn::Four&>())
      .def("workspace_bytes", &Call::workspace_bytes)
      .def("plan", &Call::plan)
      .def("attend", &Call::attend)
      .def("gradients", &Call::gradients)
      .def("run", &Call::run);
}
