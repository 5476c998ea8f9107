#include "ops/attention.h"

#include <algorithm>

#include "ops/attention_walk.h"

namespace blendserve {

namespace {

const AttentionKernels& kernels_of(Isa isa, KvDtype dtype) {
  const bool is_int8 = dtype == KvDtype::kInt8;
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return is_int8 ? avx512vnni::attention_kernels_int8 : avx512bf16::attention_kernels;
    case Isa::kAvx512Vnni:
      return is_int8 ? avx512vnni::attention_kernels_int8 : avx2::attention_kernels;
    case Isa::kAvxVnni:
    case Isa::kAvx2:
      return is_int8 ? avx2::attention_kernels_int8 : avx2::attention_kernels;
#endif
    default:
      return is_int8 ? portable::attention_kernels_int8 : portable::attention_kernels;
  }
}

}  // namespace

int64_t attention_scratch_floats(int64_t group, int64_t head_dim) {
  const int64_t num_rows = std::max(attention_tile_tokens(group), max_group_members(group)) * group;
  const int64_t chunk = kChunkTokens * (head_dim + 2);  // one of int8 as bf16, with two scales per token
  return kAttentionScoreFloats + chunk + 3 * round_up(num_rows * head_dim, 16) + 2 * round_up(num_rows, 16) +
         2 * num_rows * kAttentionSumLanes;
}

void attention_tile(Isa isa, const AttentionTile& tile, float* scratch) {
  kernels_of(isa, tile.kv_dtype).tile(tile, scratch);
}

void attention_group(Isa isa, std::span<const AttentionTile> members, int64_t num_shared_tokens, float* scratch) {
  kernels_of(isa, members[0].kv_dtype)
      .group(members.data(), static_cast<int64_t>(members.size()), num_shared_tokens, scratch);
}

void attention_segment(Isa isa, const AttentionTile& tile, int64_t segment, float* partial, float* scratch) {
  kernels_of(isa, tile.kv_dtype).segment(tile, segment, partial, scratch);
}

void merge_attention_segments(Isa isa, const AttentionTile& tile, int64_t num_segments, float* partials) {
  kernels_of(isa, tile.kv_dtype).merge_segments(tile, num_segments, partials);
}

}  // namespace blendserve
