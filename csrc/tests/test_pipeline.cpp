// The pipeline on ops that only count: every tile once, ops of a chain in order, what is awaited first, no deadlock
// with any number of threads, and no memory taken while it runs.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "check.h"
#include "pipeline.h"

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

struct FakeOp {
  int64_t num_tiles;
  TileClass tile_class = TileClass::kCompute;
  int64_t num_awaited = 0;  // ops of the other chain
  int64_t num_fetched = 0;  // pieces that each tile could fetch
};

// Checks on the way: an op begins when the one before it has ended and what it awaits has, and ends after its tiles.
class FakeChains final : public Chains {
 public:
  FakeChains(std::vector<FakeOp> first, std::vector<FakeOp> second) : ops_{std::move(first), std::move(second)} {
    for (size_t chain = 0; chain < 2; ++chain) {
      for (const FakeOp& op : ops_[chain]) {
        runs_[chain].push_back(std::make_unique<std::atomic<int>[]>(static_cast<size_t>(op.num_tiles)));
      }
    }
  }
  int64_t num_ops(int chain) const override { return static_cast<int64_t>(ops_[at(chain)].size()); }
  int64_t num_awaited_ops(int chain, int64_t op) const override { return ops_[at(chain)][at(op)].num_awaited; }
  OpTiles begin(int chain, int64_t op) override {
    CHECK(num_ended_[at(chain)].load() == op);
    const FakeOp& fake = ops_[at(chain)][at(op)];
    CHECK(num_ended_[at(1 - chain)].load() >= fake.num_awaited);
    return {fake.num_tiles, fake.tile_class, static_cast<int32_t>(op % 3)};
  }
  int64_t num_fetched_pieces(int chain, int64_t op, int64_t) const override {
    return ops_[at(chain)][at(op)].num_fetched;
  }
  void run(int chain, int64_t op, int64_t tile, int worker, PrefetchPieces* pieces) override {
    CHECK(num_ended_[at(chain)].load() == op);
    CHECK(worker >= 0);
    if (ops_[at(chain)][at(op)].tile_class == TileClass::kMemory) CHECK(pieces == nullptr);
    if (meets_in_pairs_ && ops_[at(chain)][at(op)].num_fetched > 0) meet(pieces != nullptr);
    if (pieces != nullptr) {
      CHECK(pieces->left() <= ops_[at(chain)][at(op)].num_fetched);
      num_fetched_ += pieces->left();
    }
    runs_[at(chain)][at(op)][at(tile)].fetch_add(1);
  }
  void end(int chain, int64_t op) override {
    for (int64_t tile = 0; tile < ops_[at(chain)][at(op)].num_tiles; ++tile) {
      CHECK(runs_[at(chain)][at(op)][at(tile)].load() == 1, "tile ", tile, " of op ", op);
    }
    num_ended_[at(chain)].store(op + 1);
  }
  int64_t list_pieces(int, int64_t, int64_t, const uint16_t** pieces, int64_t max_pieces) const override {
    ++num_held_;
    const int64_t count = max_pieces < 3 ? max_pieces : 3;
    for (int64_t i = 0; i < count; ++i) pieces[i] = nullptr;
    return count;
  }

  // Tiles that could fetch then end two by two, each on a thread of its own.
  void meet_in_pairs() { meets_in_pairs_ = true; }
  bool is_done(int chain) const { return num_ended_[at(chain)].load() == num_ops(chain); }
  int64_t num_fetched() const { return num_fetched_.load(); }
  int num_held() const { return num_held_.load(); }
  int most_holders() const { return most_holders_.load(); }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  // `holds`: memory tiles are held.
  void meet(bool holds) {
    const int holders = num_holders_ += holds;
    for (int most = most_holders_; holders > most && !most_holders_.compare_exchange_weak(most, holders);) {
    }
    const int place = ++num_met_;
    while (num_met_ < (place + 1) / 2 * 2) std::this_thread::yield();
    num_holders_ -= holds;
  }

  std::vector<FakeOp> ops_[2];
  bool meets_in_pairs_ = false;
  std::atomic<int> num_met_{0};
  mutable std::atomic<int> num_held_{0};
  std::atomic<int> num_holders_{0}, most_holders_{0};
  std::vector<std::unique_ptr<std::atomic<int>[]>> runs_[2];
  std::atomic<int64_t> num_ended_[2] = {0, 0};
  std::atomic<int64_t> num_fetched_{0};
};

// Layers as a model has them: compute tiles, memory tiles, some ops without tiles.
std::vector<FakeOp> layers(int num_layers, int64_t num_compute, int64_t num_memory, bool is_second) {
  std::vector<FakeOp> ops;
  for (int layer = 0; layer < num_layers; ++layer) {
    ops.push_back({num_compute, TileClass::kCompute, 0, 8});
    ops.push_back({1});
    ops.push_back({layer % 2, TileClass::kCompute, is_second ? static_cast<int64_t>(ops.size()) : 0});
    ops.push_back({num_memory, TileClass::kMemory});
    ops.push_back({0});
  }
  return ops;
}

void check_run(ThreadTeam& team, int memory_lanes, std::vector<FakeOp> first, std::vector<FakeOp> second) {
  Pipeline pipeline(team, {4096, 48, memory_lanes});
  FakeChains chains(std::move(first), std::move(second));
  pipeline.run(chains, 2);
  CHECK(chains.is_done(0) && chains.is_done(1));
}

void two_chains_run_every_tile_once() {
  for (int num_threads = 1; num_threads <= 8; ++num_threads) {
    ThreadTeam team(num_threads);
    for (const int lanes : {0, 1, 2}) {
      for (int round = 0; round < 5; ++round) {
        check_run(team, lanes, layers(20, 7, 5, false), layers(20, 3, 9, true));
        check_run(team, lanes, layers(3, 1, 400, false), layers(3, 200, 1, true));
      }
    }
  }
}

void chains_may_have_nothing_to_do() {
  for (const int num_threads : {1, 2, 8}) {
    ThreadTeam team(num_threads);
    check_run(team, 0, {}, {});
    check_run(team, 0, layers(4, 3, 3, false), {});
    check_run(team, 0, {}, layers(4, 3, 3, false));
    check_run(team, 0, {{0}, {0}}, {{0}, {2, TileClass::kMemory, 2}});
    check_run(team, 1, {{0}, {5000, TileClass::kMemory}}, {{5000, TileClass::kMemory, 2}, {1}});
  }
}

void one_chain_runs_op_by_op() {
  for (const int num_threads : {1, 2, 8}) {
    ThreadTeam team(num_threads);
    Pipeline pipeline(team, {4096, 48, 0});
    FakeChains chains(layers(20, 7, 5, false), {});
    pipeline.run(chains, 1);
    CHECK(chains.is_done(0));
    CHECK(chains.num_fetched() == 0);  // there is nothing to hide
  }
}

void memory_tiles_are_fetched_beside_compute_tiles() {
  ThreadTeam team(1);
  Pipeline pipeline(team, {4096, 48, 0});
  // Both begin with compute; the first chain's memory tiles are then there beside the second one's compute tiles.
  FakeChains chains({{1}, {4, TileClass::kMemory}}, {{20, TileClass::kCompute, 1, 8}});
  pipeline.run(chains, 2);
  CHECK(chains.num_fetched() == 4 * 3, chains.num_fetched());  // 4 pieces are a chunk, a memory tile has 3
}

// Who gets no lane does not keep another from getting one: of two workers that always run matmul tiles at the same
// time, one holds memory tiles as long as there are some.
void lanes_limit_who_holds_memory_tiles() {
  for (const int num_threads : {2, 4, 12}) {
    for (const int lanes : {1, num_threads / 2, num_threads}) {
      ThreadTeam team(num_threads);
      Pipeline pipeline(team, {4096, 48, lanes});
      FakeChains chains({{1}, {100, TileClass::kMemory}}, {{400, TileClass::kCompute, 1, 8}});
      chains.meet_in_pairs();
      pipeline.run(chains, 2);
      CHECK(chains.most_holders() <= lanes, num_threads, " threads, ", lanes, " lanes: ", chains.most_holders());
      if (num_threads == 2) CHECK(chains.num_held() >= 80, lanes, " lanes: ", chains.num_held());
    }
  }
}

void a_run_never_allocates() {
  ThreadTeam team(3);
  Pipeline pipeline(team, {4096, 48, 0});
  FakeChains chains(layers(20, 7, 5, false), layers(20, 3, 9, true));
  const int64_t before = num_allocations.load();
  pipeline.run(chains, 2);
  CHECK(num_allocations.load() == before);
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(two_chains_run_every_tile_once);
  RUN(chains_may_have_nothing_to_do);
  RUN(one_chain_runs_op_by_op);
  RUN(memory_tiles_are_fetched_beside_compute_tiles);
  RUN(lanes_limit_who_holds_memory_tiles);
  RUN(a_run_never_allocates);
}
