// Memory that the launches of a plan share, handed out on the host.
#pragma once

#include <cstdint>

namespace fastattn {
namespace cuda {

class Workspace {
 public:
  explicit Workspace(void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

  // The next `count` numbers, from a multiple of kAlignment bytes on.
  template <class T>
  T* take(int64_t count) {
    const uintptr_t at = begin_ + static_cast<uintptr_t>(bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }

  // What has been handed out.
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  uintptr_t begin_;
  int64_t bytes_ = 0;
};

}  // namespace cuda
}  // namespace fastattn
