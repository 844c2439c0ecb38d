#include "workspace.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace fastattn {
namespace {

constexpr size_t kKeptBytes = size_t(32) << 20;

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
};

thread_local Buffer buffer;

void grow(size_t bytes) {
  buffer.release();
  constexpr size_t kPage = 4096;
  if (bytes > SIZE_MAX - kPage) throw std::bad_alloc();
  const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
  buffer.data = std::aligned_alloc(kPage, rounded);
  if (buffer.data == nullptr) throw std::bad_alloc();
  buffer.size = rounded;
}

}  // namespace

Workspace::Workspace(size_t bytes) {
  if (buffer.size < bytes) grow(bytes);
#ifdef FASTATTN_POISON
  std::memset(buffer.data, 0xff, buffer.size);  // NaN: reading it before writing shows in the results
#endif
}

Workspace::~Workspace() {
  if (buffer.size > kKeptBytes) buffer.release();
}

char* Workspace::data() const { return static_cast<char*>(buffer.data); }

}  // namespace fastattn
