// Running jobs on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace fastattn {

// Calls run(job, thread) for every job in [0, jobs), each once, on at most `threads` threads; thread in [0, threads).
// Jobs are handed out in order, one by one.
void parallel_for(int64_t jobs, int threads, const std::function<void(int64_t, int)>& run);

}  // namespace fastattn
