// What is needed of DLPack 1: how tensors of other libraries look, and the table of functions by which their type hands
// them over. Names and order of fields are the standard's (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace fastattn {

struct DLDevice {
  int32_t device_type, device_id;
};

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;  // in elements; both belong to the tensor
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  const DLPackExchangeAPI* prev_api;  // of an older major version, or null
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills in the second from a tensor of the table's type; -1 with a Python exception set on failure. May be null.
  int (*dltensor_from_py_object_no_sync)(void* tensor, DLTensor* out);
  void* current_work_stream;
};

}  // namespace fastattn
