#include "stages.h"

#include <iterator>

namespace blendserve {

std::string_view op_name(Op op) {
  constexpr std::string_view kNames[] = {"embed",   "norm",     "qkv",  "rotate",    "attention", "pack",  "output",
                                         "gate_up", "activate", "down", "head_norm", "head",      "sample"};
  static_assert(std::size(kNames) == kNumOps);
  return kNames[static_cast<int>(op)];
}

Op counted_op(Stage stage) {
  constexpr Op kOps[] = {Op::kEmbed,     Op::kNorm,      Op::kQkv,           Op::kRotate, Op::kAttention,
                         Op::kAttention, Op::kAttention, Op::kPackAttention, Op::kOutput, Op::kNorm,
                         Op::kGateUp,    Op::kActivate,  Op::kDown};
  static_assert(std::size(kOps) == 1 + kStagesPerLayer);
  return kOps[static_cast<int>(stage)];
}

int32_t urgency_of(Stage stage) {
  const int stages_since_attention = static_cast<int>(stage) - static_cast<int>(Stage::kMerge);
  return static_cast<int32_t>((stages_since_attention + kStagesPerLayer) % kStagesPerLayer);
}

}  // namespace blendserve
