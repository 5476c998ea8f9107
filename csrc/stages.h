// The order of a step: which stages a nano-batch goes through, and under which op each one's time is counted.
#pragma once

#include <cstdint>
#include <string_view>

namespace blendserve {

// What counters and traces tell apart.
enum class Op {
  kEmbed,
  kNorm,
  kQkv,
  kRotate,
  kAttention,
  kPackAttention,
  kOutput,
  kGateUp,
  kActivate,
  kDown,
  kHeadNorm,
  kHead,
  kSample
};
inline constexpr int kNumOps = static_cast<int>(Op::kSample) + 1;
std::string_view op_name(Op op);

// Ops of a chain: one kEmbed, then the others once per layer.
enum class Stage {
  kEmbed,
  kInputNorm,
  kQkv,
  kRotate,
  kAttendCompute,
  kAttendMemory,
  kMerge,
  kPackAttention,
  kOutput,
  kPostNorm,
  kGateUp,
  kActivate,
  kDown
};
inline constexpr int64_t kStagesPerLayer = static_cast<int64_t>(Stage::kDown);  // all but kEmbed

// Number 0 of a chain is kEmbed; then the other stages follow each other, layer by layer.
constexpr int64_t num_chain_ops(int64_t num_layers) { return 1 + num_layers * kStagesPerLayer; }
constexpr int64_t layer_of(int64_t op) { return op == 0 ? 0 : (op - 1) / kStagesPerLayer; }
constexpr Stage stage_of(int64_t op) {
  return op == 0 ? Stage::kEmbed : static_cast<Stage>(1 + (op - 1) % kStagesPerLayer);
}
constexpr int64_t op_of(int64_t layer, Stage stage) { return layer * kStagesPerLayer + static_cast<int64_t>(stage); }

Op counted_op(Stage stage);

// How near a stage is to the attention after it: the nearer one goes first, so that there is attention to hide again.
int32_t urgency_of(Stage stage);

}  // namespace blendserve
