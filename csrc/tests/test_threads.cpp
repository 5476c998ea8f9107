#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#define BLENDSERVE_CAN_LIMIT_MEMORY
#endif

#include "check.h"
#include "threads.h"

namespace {
std::atomic<int64_t> num_allocations{0};
}

void* operator new(size_t size) {
  num_allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace blendserve {
namespace {

constexpr int kMaxThreads = 8;

void runs_every_tile_once() {
  for (int num_threads = 1; num_threads <= kMaxThreads; ++num_threads) {
    ThreadTeam team(num_threads);
    CHECK(team.num_threads() == num_threads);
    for (const int64_t num_tiles : {0, 1, 2, 3, 7, 8, 9, 64, 1000}) {
      // Plain integers: what tiles write is visible to the caller when run() returns (ThreadSanitizer checks that).
      std::vector<int> visits(static_cast<size_t>(num_tiles), 0);
      team.run(num_tiles, [&](int64_t tile, int worker) {
        CHECK(worker >= 0 && worker < num_threads);
        ++visits[static_cast<size_t>(tile)];
      });
      for (const int count : visits) CHECK(count == 1, "threads ", num_threads, ", tiles ", num_tiles);
    }
  }
}

void a_worker_runs_one_tile_at_a_time() {
  for (const int num_threads : {2, 3, 8}) {
    ThreadTeam team(num_threads);
    std::vector<int64_t> counts(static_cast<size_t>(num_threads) * 16, 0);  // plain: one worker number, one thread
    for (int run = 0; run < 50; ++run) {
      team.run(40, [&](int64_t, int worker) { ++counts[static_cast<size_t>(worker) * 16]; });
    }
    int64_t total = 0;
    for (const int64_t count : counts) total += count;
    CHECK(total == 50 * 40);
  }
}

void consecutive_runs_see_each_others_results() {
  for (const int num_threads : {2, 4, 8}) {
    ThreadTeam team(num_threads);
    std::vector<int64_t> values(16, 0);
    for (int64_t step = 1; step <= 3000; ++step) {
      team.run(16, [&, step](int64_t tile, int) {
        auto& value = values[static_cast<size_t>(tile)];
        value = value == step - 1 ? step : -1;
      });
    }
    for (const int64_t value : values) CHECK(value == 3000);
  }
}

void sleeping_workers_wake_up() {
  ThreadTeam team(3);
  for (int run = 0; run < 5; ++run) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));  // far beyond the time a worker stays awake
    // Two tiles that wait for each other: passes only if a second thread takes part.
    std::atomic<int> num_inside{0};
    team.run(2, [&](int64_t, int) {
      num_inside.fetch_add(1);
      while (num_inside.load() < 2) std::this_thread::yield();
    });
    CHECK(num_inside.load() == 2);
  }
}

void a_caller_sleeps_until_a_slow_tile_ends() {
  ThreadTeam team(2);
  for (int run = 0; run < 3; ++run) {
    int slow = 0;
    std::atomic<bool> is_started{false};
    team.run(2, [&](int64_t, int worker) {
      if (worker == 0) {
        while (!is_started.load()) std::this_thread::yield();
      } else {
        is_started.store(true);
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        slow = 1;
      }
    });
    CHECK(slow == 1);
  }
}

void unused_teams_end() {
  for (int i = 0; i < 50; ++i) ThreadTeam team(1 + i % kMaxThreads);
}

void several_teams_live_together() {
  ThreadTeam first(2);
  ThreadTeam second(3);
  int64_t sum = 0;
  for (int i = 0; i < 100; ++i) {
    std::vector<int64_t> parts(12, 0);
    (i % 2 == 0 ? first : second).run(12, [&](int64_t tile, int) { parts[static_cast<size_t>(tile)] = tile; });
    for (const int64_t part : parts) sum += part;
  }
  CHECK(sum == 100 * 66);
}

void run_never_allocates() {
  ThreadTeam team(4);
  std::atomic<int64_t> sum{0};
  const int64_t before = num_allocations.load();
  for (int i = 0; i < 100; ++i) team.run(20, [&](int64_t tile, int) { sum.fetch_add(tile); });
  CHECK(num_allocations.load() == before);
  CHECK(sum.load() == 100 * 190);
}

void a_team_needs_a_thread() {
  CHECK(test::throws<std::invalid_argument>([] { ThreadTeam team(0); }));
  CHECK(test::throws<std::invalid_argument>([] { ThreadTeam team(-3); }));
}

#if defined(BLENDSERVE_CAN_LIMIT_MEMORY)
void threads_that_the_system_refuses_are_an_error() {
  rlimit before;
  CHECK(getrlimit(RLIMIT_AS, &before) == 0);
  rlim_t num_pages = 0;
  std::ifstream("/proc/self/statm") >> num_pages;
  rlimit tight = before;
  tight.rlim_cur = num_pages * static_cast<rlim_t>(getpagesize()) + (rlim_t{64} << 20);  // room for few stacks of 8 MB
  CHECK(setrlimit(RLIMIT_AS, &tight) == 0);
  CHECK(test::throws<std::invalid_argument>([] { ThreadTeam team(1000); }));
  CHECK(setrlimit(RLIMIT_AS, &before) == 0);
  ThreadTeam team(2);  // nothing of the refused team is left
  int64_t sum[2] = {0, 0};
  team.run(2, [&](int64_t tile, int) { sum[tile] = tile + 1; });
  CHECK(sum[0] + sum[1] == 3);
}
#endif

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(runs_every_tile_once);
  RUN(a_worker_runs_one_tile_at_a_time);
  RUN(consecutive_runs_see_each_others_results);
  RUN(sleeping_workers_wake_up);
  RUN(a_caller_sleeps_until_a_slow_tile_ends);
  RUN(unused_teams_end);
  RUN(several_teams_live_together);
  RUN(run_never_allocates);
  RUN(a_team_needs_a_thread);
#if defined(BLENDSERVE_CAN_LIMIT_MEMORY)
  RUN(threads_that_the_system_refuses_are_an_error);
#endif
  return 0;
}
