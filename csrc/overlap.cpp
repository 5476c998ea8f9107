#include "overlap.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops/prefetch.h"

namespace blendserve {
namespace {

// An overlapped step has to be better by so much of its time: an estimate is not exact, and the step must not be
// slower.
constexpr double kMargin = 0.01;

// Decodes whose KV takes less of the time of products leave nothing to gain, and two halves cost more than one step:
// 0.94 to 0.98 times its speed at 0 to 3%, 1.02 at 12%.
constexpr double kMinMemoryShare = 1.0 / 16;

}  // namespace

void check_overlap(const OverlapOptions& options) {
  const bool is_iteration_fit = options.iteration_bytes >= 1 && options.iteration_bytes <= kMaxPrefetchIterationBytes;
  if (options.chunk_bytes >= 1 && options.tile_flop >= 1 && is_iteration_fit) return;
  throw std::invalid_argument("overlap needs chunk_bytes, tile_flop and iteration_bytes (at most " +
                              std::to_string(kMaxPrefetchIterationBytes) + ") of 1 or more; got " +
                              std::to_string(options.chunk_bytes) + ", " + std::to_string(options.tile_flop) + " and " +
                              std::to_string(options.iteration_bytes));
}

bool overlap_pays(const StepWork& work, const WorkRates& rates, const OverlapOptions& options) {
  if (options.mode == OverlapMode::kOff || work.num_rows < 2) return false;
  if (work.num_decode_tokens == 0) return false;  // nothing to fetch: two halves would only read the weights twice
  const double matmul_s = static_cast<double>(work.num_rows) * rates.flop_per_row / options.gemm_flop_per_s;
  const double memory_s =
      static_cast<double>(work.num_decode_tokens) * rates.kv_bytes_per_token / options.kv_bytes_per_s;
  if (options.mode == OverlapMode::kOn) return memory_s >= kMinMemoryShare * matmul_s;
  const double weights_s = rates.weight_bytes / options.weight_bytes_per_s;
  // Two nano-batches read the weights twice, which arithmetic hides once each has enough rows.
  const double whole_s = std::max(matmul_s, weights_s), again_s = 2 * std::max(matmul_s / 2, weights_s) - whole_s;
  const double compute_s = whole_s + static_cast<double>(work.num_attended_tokens) * rates.flop_per_attended_token /
                                         options.attention_flop_per_s;
  const double apart_s = compute_s + memory_s;
  const double overlapped_s =
      std::max(compute_s + options.compute_delay * memory_s, memory_s + options.memory_delay * compute_s) + again_s;
  return overlapped_s < (1.0 - kMargin) * apart_s;
}

}  // namespace blendserve
