// How the values of tensors lie in memory, as one key: without torch's headers, and without asking Python for one
// attribute after another, which takes longer than a small call computes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>

#include "dlpack.h"

namespace fastattn {

namespace py = pybind11;

class LayoutReader {
 public:
  // A function (*tensors) -> bytes, the same for tensors of the same dtypes, devices, shapes and strides of which the
  // same are negated on reading. None if `tensor_type` has no table of DLPack's.
  // It raises TypeError for what is no tensor of that type, has too many dimensions or no memory, and whatever the
  // table's function raises for tensors that DLPack cannot describe.
  static py::object make(const py::type& tensor_type) {
    if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return py::none();
    const py::object table = tensor_type.attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) PyErr_Clear();
    while (api != nullptr && api->major != 1) api = api->prev_api;
    if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr) return py::none();
    // Kept for good, as the table and the type are.
    auto* reader = new LayoutReader{reinterpret_cast<PyTypeObject*>(py::type(tensor_type).release().ptr()),
                                    api->dltensor_from_py_object_no_sync, py::str("is_neg").release().ptr()};
    static PyMethodDef method = {"layouts", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&read)),
                                 METH_FASTCALL, "How the values of tensors lie in memory, as one key."};
    return py::reinterpret_steal<py::object>(PyCFunction_New(&method, py::capsule(reader, kName).ptr()));
  }

 private:
  static constexpr const char* kName = "fastattn.LayoutReader";
  static constexpr int kMostTensors = 8, kMostDims = 8;
  static constexpr size_t kMostBytes = 2 + sizeof(DLDevice) + sizeof(DLDataType) + 2 * kMostDims * sizeof(int64_t);

  LayoutReader(PyTypeObject* type, int (*describe)(void*, DLTensor*), PyObject* is_neg)
      : type_(type), describe_(describe), is_neg_(is_neg) {}

  static PyObject* read(PyObject* self, PyObject* const* tensors, Py_ssize_t count) {
    const auto* reader = static_cast<const LayoutReader*>(PyCapsule_GetPointer(self, kName));
    if (count > kMostTensors) return PyErr_Format(PyExc_TypeError, "at most %d tensors, got %zd", kMostTensors, count);
    char key[kMostTensors * kMostBytes], *end = key;
    for (Py_ssize_t i = 0; i < count; ++i) {
      end = reader->add(tensors[i], end);
      if (end == nullptr) return nullptr;
    }
    return PyBytes_FromStringAndSize(key, end - key);
  }

  // Writes one tensor's part of the key and returns its end; null with a Python exception set on failure.
  char* add(PyObject* tensor, char* end) const {
    if (!PyObject_TypeCheck(tensor, type_)) {
      PyErr_Format(PyExc_TypeError, "expected tensors, got %s", Py_TYPE(tensor)->tp_name);
      return nullptr;
    }
    DLTensor x;
    if (describe_(tensor, &x) != 0) return nullptr;
    if (x.ndim > kMostDims) {
      PyErr_Format(PyExc_TypeError, "at most %d dimensions, got %d", kMostDims, int(x.ndim));
      return nullptr;
    }
    int64_t numbers = 1;
    for (int d = 0; d < x.ndim; ++d) numbers *= x.shape[d];
    if (x.data == nullptr && numbers > 0) {
      PyErr_SetString(PyExc_TypeError, "the tensor has no memory");
      return nullptr;
    }
    PyObject* negated = PyObject_CallMethodNoArgs(tensor, is_neg_);  // all that DLPack does not tell
    if (negated == nullptr) return nullptr;
    *end++ = char(negated == Py_True);
    Py_DECREF(negated);
    *end++ = char(x.ndim);
    const auto write = [&end](const void* data, size_t size) {
      std::memcpy(end, data, size);
      end += size;
    };
    write(&x.device, sizeof(x.device));
    write(&x.dtype, sizeof(x.dtype));
    write(x.shape, size_t(x.ndim) * sizeof(int64_t));
    write(x.strides, size_t(x.ndim) * sizeof(int64_t));
    return end;
  }

  PyTypeObject* type_;
  int (*describe_)(void*, DLTensor*);
  PyObject* is_neg_;
};

}  // namespace fastattn
