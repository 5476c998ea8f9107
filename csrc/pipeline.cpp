#include "pipeline.h"

#include <algorithm>

#include "waiting.h"

namespace blendserve {
namespace {

// The word of a chain: number of the op << 33 | is it of class memory << 32 | unclaimed tiles.
constexpr int kSerialShift = 33;
constexpr uint64_t kMemoryBit = uint64_t{1} << 32;
constexpr uint64_t kTileMask = kMemoryBit - 1;

// More tiles than these are never held by one worker at a time: short contexts would fill a chunk with hundreds.
constexpr size_t kMaxHeldTiles = 16;

}  // namespace

Pipeline::Pipeline(ThreadTeam& team, const PipelineOptions& options) : team_(team) {
  workers_.resize(static_cast<size_t>(team.num_threads()));
  for (Worker& worker : workers_) worker.memory_tiles.reserve(kMaxHeldTiles);
  set_options(options);
}

void Pipeline::set_options(const PipelineOptions& options) {
  options_ = options;
  if (options_.memory_lanes < 1) options_.memory_lanes = team_.num_threads();
  const int64_t max_pieces = std::max<int64_t>(1, options.chunk_bytes / kPrefetchPieceBytes);
  for (Worker& worker : workers_) worker.pieces.resize(static_cast<size_t>(max_pieces));
}

void Pipeline::run(Chains& chains, int num_chains) noexcept {
  chains_ = &chains;
  num_chains_ = num_chains;
  num_running_.store(num_chains, std::memory_order_relaxed);
  num_lanes_taken_.store(0, std::memory_order_relaxed);
  for (int chain = 0; chain < num_chains; ++chain) {
    Chain& state = state_[static_cast<size_t>(chain)];
    state.num_done.store(0, std::memory_order_relaxed);
    state.awaited.store(0, std::memory_order_relaxed);
  }
  for (int chain = 0; chain < num_chains; ++chain) go_on(chain, 0);
  team_.run(team_.num_threads(), [this](int64_t, int worker) { work(worker); });
}

void Pipeline::work(int worker) {
  for (;;) {
    const uint32_t seen = events_.load(std::memory_order_acquire);
    Claim claim;
    if (claim_compute(claim)) {
      run_compute_tile(claim, worker);
    } else if (claim_memory(claim)) {
      run_tile(claim, worker, nullptr);
    } else {
      if (num_running_.load(std::memory_order_acquire) == 0) return;
      wait_until(events_, team_.spins(), [seen](uint32_t now) { return now != seen; });
    }
  }
}

// Beside memory tiles, where there are some and the tile can fetch what they read: they run after it, from cache.
void Pipeline::run_compute_tile(const Claim& compute, int worker) {
  const int64_t capacity = num_chains_ > 1 ? chains_->num_fetched_pieces(compute.chain, compute.op, compute.tile) : 0;
  if (capacity == 0) return run_tile(compute, worker, nullptr);
  Worker& mine = workers_[static_cast<size_t>(worker)];
  const int64_t max_pieces = std::min(capacity, static_cast<int64_t>(mine.pieces.size()));
  const bool has_lane = take_lane();
  const int64_t num_pieces = has_lane ? take_memory_tiles(mine, max_pieces) : 0;
  PrefetchPieces pieces = {mine.pieces.data(), mine.pieces.data() + num_pieces, options_.iteration_bytes};
  run_tile(compute, worker, num_pieces > 0 ? &pieces : nullptr);
  for (const Claim& held : mine.memory_tiles) run_tile(held, worker, nullptr);
  mine.memory_tiles.clear();
  if (has_lane) num_lanes_taken_.fetch_sub(1, std::memory_order_relaxed);
}

// False where so many workers hold memory tiles that more would only wait for memory.
bool Pipeline::take_lane() {
  int taken = num_lanes_taken_.load(std::memory_order_relaxed);
  while (taken < options_.memory_lanes) {
    if (num_lanes_taken_.compare_exchange_weak(taken, taken + 1, std::memory_order_relaxed)) return true;
  }
  return false;
}

// Takes memory tiles as long as another one like the last fits into what can be fetched. Returns the number of pieces.
int64_t Pipeline::take_memory_tiles(Worker& mine, int64_t max_pieces) {
  int64_t num_pieces = 0;
  Claim held;
  int64_t last_pieces = 1;
  while (num_pieces + last_pieces <= max_pieces && mine.memory_tiles.size() < kMaxHeldTiles && claim_memory(held)) {
    mine.memory_tiles.push_back(held);
    last_pieces =
        chains_->list_pieces(held.chain, held.op, held.tile, mine.pieces.data() + num_pieces, max_pieces - num_pieces);
    num_pieces += last_pieces;
  }
  return num_pieces;
}

bool Pipeline::claim(int chain, TileClass tile_class, Claim& claim) {
  Chain& state = state_[static_cast<size_t>(chain)];
  const uint64_t wanted = tile_class == TileClass::kMemory ? kMemoryBit : 0;
  uint64_t seen = state.unclaimed.load(std::memory_order_acquire);
  while ((seen & kTileMask) != 0 && (seen & kMemoryBit) == wanted) {
    if (state.unclaimed.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      claim = {chain, state.op, state.num_tiles - static_cast<int64_t>(seen & kTileMask)};
      return true;
    }
  }
  return false;
}

bool Pipeline::claim_compute(Claim& claim) {
  if (num_chains_ == 1) return this->claim(0, TileClass::kCompute, claim);
  const int first =
      state_[1].urgency.load(std::memory_order_relaxed) > state_[0].urgency.load(std::memory_order_relaxed);
  return this->claim(first, TileClass::kCompute, claim) || this->claim(1 - first, TileClass::kCompute, claim);
}

// Of two memory ops the one that began first: its chain has compute tiles the sooner.
bool Pipeline::claim_memory(Claim& claim) {
  if (num_chains_ == 1) return this->claim(0, TileClass::kMemory, claim);
  const uint32_t age =
      state_[1].published.load(std::memory_order_relaxed) - state_[0].published.load(std::memory_order_relaxed);
  const int first = static_cast<int32_t>(age) < 0;
  return this->claim(first, TileClass::kMemory, claim) || this->claim(1 - first, TileClass::kMemory, claim);
}

void Pipeline::run_tile(const Claim& claim, int worker, PrefetchPieces* pieces) {
  chains_->run(claim.chain, claim.op, claim.tile, worker, pieces);
  Chain& state = state_[static_cast<size_t>(claim.chain)];
  if (state.unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  chains_->end(claim.chain, claim.op);
  // Sequentially consistent, as all that touches `awaited` and `num_done`: of a chain that begins to wait and one that
  // gets there at the same time, at least one sees the other.
  state.num_done.store(claim.op + 1);
  if (num_chains_ > 1) resume(1 - claim.chain);
  go_on(claim.chain, claim.op + 1);
}

// Begins a chain's op `op` or, where that has no tiles, the first one after it that has.
void Pipeline::go_on(int chain, int64_t op) {
  Chain& state = state_[static_cast<size_t>(chain)];
  for (; op < chains_->num_ops(chain); ++op) {
    if (num_chains_ > 1) {
      const int64_t awaited = chains_->num_awaited_ops(chain, op);
      const Chain& other = state_[static_cast<size_t>(1 - chain)];
      if (other.num_done.load() < awaited) {
        state.op = op;
        state.awaited.store(awaited);
        // The other one may have got there meanwhile: who takes the number away goes on.
        if (other.num_done.load() < awaited || state.awaited.exchange(0) == 0) return;
      }
    }
    const OpTiles tiles = chains_->begin(chain, op);
    if (tiles.num_tiles > 0) return publish(chain, op, tiles);
    chains_->end(chain, op);
    state.num_done.store(op + 1);
    if (num_chains_ > 1) resume(1 - chain);
  }
  num_running_.fetch_sub(1, std::memory_order_acq_rel);
  signal();
}

// Goes on with a chain that waits for what is done by now.
void Pipeline::resume(int chain) {
  Chain& state = state_[static_cast<size_t>(chain)];
  const int64_t awaited = state.awaited.load();
  if (awaited == 0 || state_[static_cast<size_t>(1 - chain)].num_done.load() < awaited) return;
  if (state.awaited.exchange(0) == 0) return;
  go_on(chain, state.op);
}

void Pipeline::publish(int chain, int64_t op, const OpTiles& tiles) {
  Chain& state = state_[static_cast<size_t>(chain)];
  state.op = op;
  state.num_tiles = tiles.num_tiles;
  state.unfinished.store(tiles.num_tiles, std::memory_order_relaxed);
  state.urgency.store(tiles.urgency, std::memory_order_relaxed);
  state.published.store(events_.load(std::memory_order_relaxed), std::memory_order_relaxed);
  const uint64_t serial = (state.unclaimed.load(std::memory_order_relaxed) >> kSerialShift) + 1;
  const uint64_t memory_bit = tiles.tile_class == TileClass::kMemory ? kMemoryBit : 0;
  state.unclaimed.store(serial << kSerialShift | memory_bit | static_cast<uint64_t>(tiles.num_tiles),
                        std::memory_order_release);
  signal();
}

void Pipeline::signal() {
  events_.fetch_add(1, std::memory_order_release);
  events_.notify_all();
}

}  // namespace blendserve
