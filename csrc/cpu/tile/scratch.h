// Carves arrays out of one piece of memory; with a null start it only counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn {
namespace FASTATTN_ISA {

class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(start_ + used_);
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;  // each array begins on a cache line of its own
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* start_;
  size_t used_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
