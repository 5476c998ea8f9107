#include "threads.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "waiting.h"

namespace blendserve {
namespace {

// Pauses before a thread sleeps. One takes about 15-45 ns, so a wait stays awake for 30-90 us: longer than the gap
// between two ops of a step (a few us) and than a futex wake-up, short enough not to hurt whoever else needs the core.
constexpr int kSpins = 2000;

constexpr uint64_t kTileBits = 32;
constexpr uint64_t kTileMask = (uint64_t{1} << kTileBits) - 1;

}  // namespace

// A run is published by storing its unclaimed tiles. A worker that claims a tile keeps the run alive until it reports
// the tile done, so only a successful claim may read `fn` and `num_tiles`; a worker that comes late finds nothing to
// claim and nobody waits for it.
struct ThreadTeam::State {
  explicit State(int num_threads) : num_threads(num_threads) {
    const unsigned num_cores = std::thread::hardware_concurrency();
    spins = num_cores != 0 && static_cast<unsigned>(num_threads) > num_cores ? 0 : kSpins;
  }

  // Claims one tile of the current run. The run's number sits above the tile count, so that a slow worker's exchange
  // cannot succeed on a later run's count.
  bool claim(int64_t& tile) {
    uint64_t seen = unclaimed.load(std::memory_order_acquire);
    while ((seen & kTileMask) != 0) {
      if (unclaimed.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        tile = num_tiles - static_cast<int64_t>(seen & kTileMask);
        return true;
      }
    }
    return false;
  }

  void work(int worker) noexcept {
    int64_t tile;
    while (claim(tile)) {
      (*fn)(tile, worker);
      if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_one();
    }
  }

  void worker_loop(int worker) noexcept {
    uint32_t seen = 0;
    for (;;) {
      seen = wait_until(run_number, spins, [&](uint32_t now) { return now != seen; });
      if (is_stopping.load(std::memory_order_relaxed)) return;
      work(worker);
    }
  }

  void announce() {
    run_number.fetch_add(1, std::memory_order_release);
    run_number.notify_all();
  }

  void stop() {
    is_stopping.store(true, std::memory_order_relaxed);
    announce();
    for (std::thread& worker : workers) worker.join();
  }

  const int num_threads;
  int spins;
  const TileFn* fn = nullptr;
  int64_t num_tiles = 0;
  alignas(64) std::atomic<uint64_t> unclaimed{0};   // run number << kTileBits | tiles nobody has claimed yet
  alignas(64) std::atomic<uint32_t> unfinished{0};  // tiles not done yet
  alignas(64) std::atomic<uint32_t> run_number{0};
  std::atomic<bool> is_stopping{false};
  std::vector<std::thread> workers;
};

ThreadTeam::ThreadTeam(int num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument("a thread team needs at least 1 thread, got " + std::to_string(num_threads));
  }
  state_ = std::make_unique<State>(num_threads);
  state_->workers.reserve(static_cast<size_t>(num_threads));
  try {
    for (int worker = 1; worker < num_threads; ++worker) {
      state_->workers.emplace_back([state = state_.get(), worker] { state->worker_loop(worker); });
    }
  } catch (const std::system_error& error) {
    const size_t num_started = state_->workers.size() + 1;
    state_->stop();  // a thread that is destroyed before it is joined would end the process
    throw std::invalid_argument("the system gives only " + std::to_string(num_started) + " of " +
                                std::to_string(num_threads) + " threads (" + error.what() + "); use fewer");
  }
}

ThreadTeam::~ThreadTeam() { state_->stop(); }

int ThreadTeam::num_threads() const { return state_->num_threads; }

int ThreadTeam::spins() const { return state_->spins; }

void ThreadTeam::run(int64_t num_tiles, TileFn fn) noexcept {
  State& state = *state_;
  if (state.num_threads == 1 || num_tiles <= 1) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) fn(tile, 0);
    return;
  }
  state.fn = &fn;
  state.num_tiles = num_tiles;
  state.unfinished.store(static_cast<uint32_t>(num_tiles), std::memory_order_relaxed);
  const uint64_t next_run = (state.unclaimed.load(std::memory_order_relaxed) >> kTileBits) + 1;
  state.unclaimed.store(next_run << kTileBits | static_cast<uint64_t>(num_tiles), std::memory_order_release);
  state.announce();
  state.work(0);
  wait_until(state.unfinished, state.spins, [](uint32_t left) { return left == 0; });
}

}  // namespace blendserve
