// The layers of a step, as one chain of ops or, with overlap, as two nano-batches side by side (pipeline.h): which ops
// follow each other, in how many tiles, and what each asks from memory meanwhile.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "layer_ops.h"
#include "nano_batch.h"
#include "overlap.h"
#include "pipeline.h"
#include "row_blocks.h"
#include "threads.h"
#include "trace.h"
#include "workspace.h"

namespace blendserve {

class Layers : private Chains {
 public:
  // Borrows everything but the numbers.
  Layers(Isa isa, const ModelShape& shape, const ModelLimits& limits, const ModelWeights& weights, Workspace& workspace,
         ThreadTeam& team, TraceRecorder& trace);

  // From the next step on. Allocates.
  void set_overlap(const OverlapOptions& overlap);
  void read_shared_once();
  void read_apart();
  // From the next step on: never rows in blocks, every op for itself. Changes time, never tokens.
  void run_ops_apart() { blocks_are_allowed_ = false; }
  // Runs all layers on the parts that the split has. Mutates: the cache, `op_s` by what each op took.
  void forward(const StepInput& input, const NanoBatchSplit& split, KvCache& cache, int num_nano_batches,
               OpSeconds& op_s);

  // Of the last step; residuals hold its result.
  bool is_in_blocks() const { return is_in_blocks_; }
  std::span<const NanoBatch> nano_batches() const { return nano_batches_; }
  int64_t num_bytes() const;

 private:
  // Chains: the layers of a nano-batch.
  int64_t num_ops(int chain) const override;
  int64_t num_awaited_ops(int chain, int64_t op) const override;
  OpTiles begin(int chain, int64_t op) override;
  int64_t num_fetched_pieces(int chain, int64_t op, int64_t tile) const override;
  void run(int chain, int64_t op, int64_t tile, int worker, PrefetchPieces* pieces) override;
  void end(int chain, int64_t op) override;
  int64_t list_pieces(int chain, int64_t op, int64_t tile, const uint16_t** pieces, int64_t max_pieces) const override;

  NanoBatch& nano(int chain) { return nano_batches_[static_cast<size_t>(chain)]; }
  const NanoBatch& nano(int chain) const { return nano_batches_[static_cast<size_t>(chain)]; }
  const LayerWeights& layer(int64_t op) const { return weights_.layers[static_cast<size_t>(layer_of(op))]; }
  const PackedMatrix* matrix_of(int64_t op) const;  // null where the op is no matmul
  OpTiles cut_matmul(NanoBatch& nano, const PackedMatrix& w, Stage stage);
  void run_tile(NanoBatch& nano, int64_t op, int64_t tile, int worker, PrefetchPieces* pieces);

  ModelShape shape_;
  const ModelWeights& weights_;
  Workspace& workspace_;
  ThreadTeam& team_;
  TraceRecorder& trace_;
  LayerOps ops_;
  int64_t l2_bytes_;
  RowBlocks blocks_;
  OverlapOptions overlap_;
  Pipeline pipeline_;
  std::array<NanoBatch, kNumChains> nano_batches_;
  int num_nano_batches_ = 1;            // of the step at hand
  bool is_second_after_first_ = false;  // does its second nano-batch read what the first one writes?
  bool is_in_blocks_ = false;           // are its rows taken in blocks between attentions?
  bool blocks_are_allowed_ = true;
};

}  // namespace blendserve
