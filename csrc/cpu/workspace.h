// The memory of a call, beside its tensors.
#pragma once

#include <cstddef>

namespace fastattn {

// Aligned to a page. The calling thread keeps it for its next call, except large pieces, which are given back.
class Workspace {
 public:
  explicit Workspace(size_t bytes);  // throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const;
};

}  // namespace fastattn
