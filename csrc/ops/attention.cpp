#include "ops/attention.h"

#include <algorithm>

#include "ops/attention_walk.h"

namespace blendserve {

namespace {

const AttentionKernels& kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return avx512bf16::attention_kernels;
    case Isa::kAvx512Vnni:
    case Isa::kAvxVnni:
    case Isa::kAvx2:
      return avx2::attention_kernels;
#endif
    default:
      return portable::attention_kernels;
  }
}

}  // namespace

int64_t attention_scratch_floats(int64_t group, int64_t head_dim) {
  const int64_t num_rows = std::max(attention_tile_tokens(group), max_group_members(group)) * group;
  return kAttentionScoreFloats + 3 * round_up(num_rows * head_dim, 16) + 2 * round_up(num_rows, 16) +
         2 * num_rows * kAttentionSumLanes;
}

void attention_tile(Isa isa, const AttentionTile& tile, float* scratch) { kernels_of(isa).tile(tile, scratch); }

void attention_group(Isa isa, std::span<const AttentionTile> members, int64_t num_shared_tokens, float* scratch) {
  kernels_of(isa).group(members.data(), static_cast<int64_t>(members.size()), num_shared_tokens, scratch);
}

void attention_segment(Isa isa, const AttentionTile& tile, int64_t segment, float* partial, float* scratch) {
  kernels_of(isa).segment(tile, segment, partial, scratch);
}

void merge_attention_segments(Isa isa, const AttentionTile& tile, int64_t num_segments, float* partials) {
  kernels_of(isa).merge_segments(tile, num_segments, partials);
}

}  // namespace blendserve
