#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastattn {
namespace {

using TeamStart = void (*)(void (*)(void*), void*, unsigned, unsigned);

bool forked = false;

// The OpenMP runtime that torch has loaded, if it has GNU's interface; null after a fork, when its workers are gone.
// Its workers spin for a while after each of torch's own regions. A second pool would compete with them for the cores.
TeamStart openmp_team() {
#ifdef FASTATTN_NO_OPENMP
  return nullptr;
#else
  static const TeamStart found = [] {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return reinterpret_cast<TeamStart>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return forked ? nullptr : found;
#endif
}

struct Team {
  const std::function<void(int64_t, int)>* run;
  int64_t jobs;
  std::atomic<int64_t> next_job{0};
  std::atomic<int> next_thread{0};

  void work() {
    const int thread = next_thread.fetch_add(1);
    for (int64_t job; (job = next_job.fetch_add(1)) < jobs;) (*run)(job, thread);
  }
};

}  // namespace

void parallel_for(int64_t jobs, int threads, const std::function<void(int64_t, int)>& run) {
  if (threads > jobs) threads = int(jobs);
  if (threads <= 1) {
    for (int64_t job = 0; job < jobs; ++job) run(job, 0);
    return;
  }
  Team team{&run, jobs};
  if (const TeamStart start = openmp_team()) {
    start([](void* data) { static_cast<Team*>(data)->work(); }, &team, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back([&team] { team.work(); });
  team.work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace fastattn
