// When and how a step runs as two nano-batches: what calibration found for this machine.
#pragma once

#include <cstdint>

#include "nano_batch.h"

namespace blendserve {

enum class OverlapMode { kOff, kOn, kAuto };  // kOn: wherever a step can be split; kAuto: where that saves time

// The defaults were measured on a 2-core Zen 3 with 512 KiB of L2 per core (docs/log.md).
struct OverlapOptions {
  OverlapMode mode = OverlapMode::kOff;
  // KV that a worker fetches beside one compute tile: with the tile's operands it has to fit into L2.
  int64_t chunk_bytes = 192 * 1024;
  // Of a matmul tile: as long as it takes to fetch a chunk.
  int64_t tile_flop = 2'500'000;
  // Bytes fetched per step of two k of a matmul: as fast as memory answers, no faster.
  int64_t step_bytes = 32;
  int memory_lanes = 0;  // 0: all workers
  // Rates of this machine on all threads, for kAuto.
  double gemm_flop_per_s = 165e9;
  double attention_flop_per_s = 125e9;
  double kv_bytes_per_s = 18e9;
  double weight_bytes_per_s = 20e9;
  // Time of c seconds of compute and m of memory, overlapped: max(c + compute_delay m, m + memory_delay c).
  double compute_delay = 0.6;
  double memory_delay = 0.4;
};

// What a step costs per unit of its work.
struct WorkRates {
  double flop_per_row;
  double flop_per_attended_token;
  double kv_bytes_per_token;
  double weight_bytes;
};

bool overlap_pays(const StepWork& work, const WorkRates& rates, const OverlapOptions& options);

}  // namespace blendserve
