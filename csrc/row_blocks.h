// The ops from one attention to the next as one, on a block of rows at a time: all of them work on each row by itself,
// so that a worker takes its rows through every product of a layer without waiting for others. What an op leaves for
// the next one stays in that core's L2 cache; a step that runs op by op sends it through memory or to other cores. The
// price is that every block reads all weights. Results are those of the ops one by one.
#pragma once

#include <cstdint>
#include <vector>

#include "layer_ops.h"
#include "stages.h"
#include "tensor.h"
#include "trace.h"
#include "workspace.h"

namespace blendserve {

class RowBlocks {
 public:
  // Borrows everything but the numbers. Allocates here and never again.
  RowBlocks(Isa isa, const ModelShape& shape, const ModelLimits& limits, const ModelWeights& weights, LayerOps& ops,
            TraceRecorder& trace, int num_threads, int64_t l2_bytes);

  // Is a step of so many rows to go in blocks?
  bool are_for(int64_t num_rows) const;
  int64_t num_blocks(int64_t num_rows) const;
  // Stages that blocks run, and of these the ones where they begin: with the step, and after each attention.
  static bool have(Stage stage) { return begin_with(stage) || !is_attention(stage); }
  static bool begin_with(Stage stage) { return stage == Stage::kEmbed || stage == Stage::kPackAttention; }
  // Runs one block from attention in `layer` (-1: from the step's begin) to the next attention.
  void run(NanoBatch& nano, int64_t layer, int64_t block, int worker);
  // Adds `elapsed_s`, which all blocks since the last call took, to their ops. No block may run meanwhile.
  void share_out(double elapsed_s, OpSeconds& op_s);

  int64_t num_bytes() const {
    return packed_.num_bytes() + activated_.num_bytes() + products_.num_bytes() + pieces_.num_bytes();
  }

 private:
  struct alignas(64) WorkerTime {
    OpSeconds op_s = {};
  };
  // A block at work.
  struct Block {
    NanoBatch& nano;
    RowRange rows;
    int64_t layer;  // -1: none yet
    int worker;
    uint8_t* packed;
    uint8_t* activated;
    float* products;
    const uint16_t** pieces;

    int64_t num_rows() const { return rows.end - rows.begin; }
  };

  static bool is_attention(Stage stage) {
    return stage == Stage::kAttendCompute || stage == Stage::kAttendMemory || stage == Stage::kMerge;
  }
  template <class Run>
  void timed(const Block& block, Op op, Run run);
  void run_attention_output(const Block& block, const LayerWeights& layer, const void* next);
  void run_mlp(const Block& block, const LayerWeights& layer, const void* next);
  void run_gate_up(const Block& block, const LayerWeights& layer, RowRange columns, const void* next);
  void run_qkv(const Block& block, const LayerWeights& layer);
  int64_t list_written(const Block& block) const;
  void norm_and_pack(const Block& block, const std::vector<float>& weight);

  Isa isa_;
  ModelShape shape_;
  MatmulFormat format_;
  const ModelWeights& weights_;
  LayerOps& ops_;
  TraceRecorder& trace_;
  int num_threads_;
  int64_t chunk_;  // columns of the MLP that are activated at a time
  int64_t products_stride_;
  int64_t max_rows_;  // of a block; 0: there are none
  int64_t max_pieces_;
  // Per worker.
  int64_t packed_bytes_ = 0, activated_bytes_ = 0;
  Buffer<uint8_t> packed_;          // the input of the product at hand
  Buffer<uint8_t> activated_;       // the input of down
  Buffer<float> products_;          // gates and ups of a chunk
  Buffer<const uint16_t*> pieces_;  // of the KV cache
  std::vector<WorkerTime> times_;
};

}  // namespace blendserve
