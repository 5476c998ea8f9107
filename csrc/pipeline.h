// Runs one or two chains of ops at the same time on a team of threads: operator-level overlap. An op is a number of
// tiles of one class; it starts when the op before it in its chain is done, which a counter of unfinished tiles tells:
// there are no barriers. Knows nothing of models.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops/prefetch.h"
#include "threads.h"

namespace blendserve {

inline constexpr int kNumChains = 2;

// What a tile mostly waits for: arithmetic, or bytes from memory.
enum class TileClass { kCompute, kMemory };

struct OpTiles {
  int64_t num_tiles = 0;  // 0: nothing to do, the chain goes on
  TileClass tile_class = TileClass::kCompute;
  int32_t urgency = 0;  // of two compute ops, tiles of the higher one are taken first
};

// The ops of a step. All functions may be called by any worker; `begin` of an op happens before its tiles run, and
// those before `end`.
class Chains {
 public:
  virtual ~Chains() = default;
  virtual int64_t num_ops(int chain) const = 0;
  // How many ops of the other chain must be done before this one begins.
  virtual int64_t num_awaited_ops(int chain, int64_t op) const = 0;
  virtual OpTiles begin(int chain, int64_t op) = 0;
  // How many pieces of memory a compute tile can fetch beside its own work.
  virtual int64_t num_fetched_pieces(int chain, int64_t op, int64_t tile) const = 0;
  // `pieces` is memory to fetch meanwhile, null for none.
  virtual void run(int chain, int64_t op, int64_t tile, int worker, PrefetchPieces* pieces) = 0;
  virtual void end(int chain, int64_t op) = 0;
  // Lists up to `max_pieces` pieces that cover what a memory tile reads and returns their number.
  virtual int64_t list_pieces(int chain, int64_t op, int64_t tile, const uint16_t** pieces,
                              int64_t max_pieces) const = 0;
};

struct PipelineOptions {
  int64_t chunk_bytes;      // of memory tiles that a worker fetches beside one compute tile
  int64_t iteration_bytes;  // of that, per iteration of the matmul
  int memory_lanes;         // workers that may hold memory tiles while there are compute tiles; 0: all
};

class Pipeline {
 public:
  // Borrows the team. Allocates here and never again.
  Pipeline(ThreadTeam& team, const PipelineOptions& options);

  // Allocates.
  void set_options(const PipelineOptions& options);
  // Runs `num_chains` (1 or 2) chains to their ends. Not from inside a tile nor by two threads at once.
  void run(Chains& chains, int num_chains) noexcept;

 private:
  struct Claim {
    int chain;
    int64_t op;
    int64_t tile;
  };
  // Tiles that no worker took yet, beside the op's number and class, in one word: a worker that comes late cannot
  // take a tile of another op than it saw. Only a successful claim may read `op` and `num_tiles`.
  struct alignas(64) Chain {
    std::atomic<uint64_t> unclaimed{0};
    std::atomic<int32_t> urgency{0};
    std::atomic<uint32_t> published{0};  // when, in events
    alignas(64) std::atomic<int64_t> unfinished{0};
    alignas(64) std::atomic<int64_t> num_done{0};  // ops
    std::atomic<int64_t> awaited{0};               // ops of the other chain that it waits for; 0: it does not wait
    int64_t op = 0;
    int64_t num_tiles = 0;
  };
  struct Worker {
    std::vector<Claim> memory_tiles;
    std::vector<const uint16_t*> pieces;
  };

  void work(int worker);
  bool claim(int chain, TileClass tile_class, Claim& claim);
  bool claim_compute(Claim& claim);
  bool claim_memory(Claim& claim);
  bool take_lane();
  int64_t take_memory_tiles(Worker& mine, int64_t max_pieces);
  void run_compute_tile(const Claim& compute, int worker);
  void run_tile(const Claim& claim, int worker, PrefetchPieces* pieces);
  void go_on(int chain, int64_t op);
  void resume(int chain);
  void publish(int chain, int64_t op, const OpTiles& tiles);
  void signal();

  ThreadTeam& team_;
  PipelineOptions options_;
  Chains* chains_ = nullptr;
  int num_chains_ = 1;
  std::array<Chain, kNumChains> state_;
  alignas(64) std::atomic<uint32_t> events_{0};  // ops published and chains ended
  alignas(64) std::atomic<int> num_running_{0};  // chains that have not ended
  alignas(64) std::atomic<int> num_lanes_taken_{0};
  std::vector<Worker> workers_;
};

}  // namespace blendserve
