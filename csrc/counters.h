// What steps did and how long their ops took.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "shape.h"
#include "stages.h"
#include "weights.h"
#include "workspace.h"

namespace blendserve {

// Work since the model was made. `*_bytes` count what must come from memory: weights once per step, KV once per
// sequence, that of a prefix that sequences read together once for all of them. `op_s` is the time from an op's
// beginning to its end: where nano-batches overlap, ops of both count.
struct StepCounters {
  int64_t num_steps = 0;
  int64_t num_overlapped_steps = 0;
  int64_t num_tokens = 0;
  double matmul_flop = 0.0;
  double attention_flop = 0.0;
  double weight_bytes = 0.0;
  double kv_bytes = 0.0;
  OpSeconds op_s = {};

  // Adds a step's work; its time is added as its ops end.
  void add_step(const ModelShape& shape, KvDtype kv_dtype, const ModelWeights& weights,
                std::span<const NanoBatch> nano_batches, bool is_overlapped, int64_t num_head_rows);
};

}  // namespace blendserve
