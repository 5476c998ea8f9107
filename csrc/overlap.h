// When and how a step runs as two nano-batches: what calibration found for this machine.
#pragma once

#include <cstdint>

#include "nano_batch.h"

namespace blendserve {

// kOn: wherever a step has some KV to fetch for its decodes and can be split. kAuto: where that saves time.
enum class OverlapMode { kOff, kOn, kAuto };

// The defaults but the mode and the rates are what served best on a 2-core Zen 4 with 1 MiB of L2 per core
// (docs/log.md).
struct OverlapOptions {
  OverlapMode mode = OverlapMode::kOff;
  // Of memory that a worker fetches beside one compute tile: a share of L2.
  int64_t chunk_bytes = 256 * 1024;
  // Of a matmul tile: as long as it takes to fetch a chunk.
  int64_t tile_flop = 3'500'000;
  // Bytes fetched per iteration (two k) of a matmul; kernels of AVX2 take a line at most.
  int64_t iteration_bytes = 128;
  int memory_lanes = 0;  // 0: all workers
  // Rates of this machine on all threads, for kAuto.
  double gemm_flop_per_s = 165e9;
  double attention_flop_per_s = 120e9;
  double kv_bytes_per_s = 18e9;
  double weight_bytes_per_s = 20e9;
  // Time of c seconds of compute and m of memory, overlapped: max(c + compute_delay m, m + memory_delay c).
  double compute_delay = 1.0;
  double memory_delay = 1.0;
};

// What a step costs per unit of its work.
struct WorkRates {
  double flop_per_row;
  double flop_per_attended_token;
  double kv_bytes_per_token;
  double weight_bytes;
};

// Throws std::invalid_argument for sizes of nothing.
void check_overlap(const OverlapOptions& options);

bool overlap_pays(const StepWork& work, const WorkRates& rates, const OverlapOptions& options);

}  // namespace blendserve
