// Running jobs on several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fastattn {

// Calls run(job, thread) for every job in [0, jobs), each once, on at most `threads` threads; thread in [0, threads).
// Jobs are handed out in order, one by one.
void parallel_for(int64_t jobs, int threads, const std::function<void(int64_t, int)>& run);

// Memory of a call. The calling thread keeps it for its next call, but for large pieces, which are given back.
class Scratch {
 public:
  explicit Scratch(size_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const;
};

}  // namespace fastattn
