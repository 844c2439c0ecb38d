#include "launch.h"

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

namespace fastattn {
namespace cuda {
namespace {

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

void check(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call, which may be somebody else's, does not find it
  throw std::runtime_error(doing + " failed with " + describe(error));
}

std::string describe(const Launch& launch) {
  return std::string("kernel ") + launch.kernel.name + " (" + std::to_string(launch.blocks) + " blocks of " +
         std::to_string(launch.kernel.threads) + " threads, " + std::to_string(launch.kernel.shared_bytes) +
         " bytes of shared memory)";
}

// A kernel may have more than 48 KiB of shared memory only after asking for it, once per kernel and GPU.
void allow_shared_memory(const Launch& launch, int device) {
  if (launch.kernel.shared_bytes == 0) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!allowed.emplace(launch.kernel.function, device).second) return;
  const cudaError_t error = cudaFuncSetAttribute(launch.kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 launch.kernel.shared_bytes);
  if (error != cudaSuccess) allowed.erase({launch.kernel.function, device});
  check(error, "asking for the shared memory of " + describe(launch));
}

// Makes a GPU the current one of this thread, and gives it back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "asking for the current GPU");
    if (device != before_) check(cudaSetDevice(device), "turning to GPU " + std::to_string(device));
  }
  ~CurrentDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }

 private:
  int device_, before_ = 0;
};

cudaError_t launch_kernel(const Launch& launch, cudaStream_t stream) {
  constexpr size_t kMostTensorMaps = 8;
  void* arguments[1 + kMostTensorMaps] = {const_cast<Arguments*>(&launch.arguments)};
  if (launch.tensor_maps.size() > kMostTensorMaps) return cudaErrorInvalidValue;
  for (size_t i = 0; i < launch.tensor_maps.size(); ++i)
    arguments[1 + i] = const_cast<TensorMap*>(&launch.tensor_maps[i]);

  const dim3 blocks(static_cast<unsigned>(launch.blocks)), threads(static_cast<unsigned>(launch.kernel.threads));
  const size_t shared_bytes = static_cast<size_t>(launch.kernel.shared_bytes);
  if (launch.cluster_size == 1)
    return cudaLaunchKernel(launch.kernel.function, blocks, threads, arguments, shared_bytes, stream);

  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster_size);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, launch.kernel.function, arguments);
}

}  // namespace

std::string why_unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return describe(error);
  }
  return count > 0 ? "" : "there is none";
}

void run(const Launch& launch, int device, void* stream) {
  if (launch.blocks == 0) return;
  if (launch.blocks > 0x7fffffff) throw std::runtime_error(describe(launch) + " has more blocks than a grid can have");
  const CurrentDevice current(device);
  allow_shared_memory(launch, device);
  check(launch_kernel(launch, static_cast<cudaStream_t>(stream)), describe(launch));
}

}  // namespace cuda
}  // namespace fastattn
