#include "ops/attention.h"

#include <algorithm>

#include "ops/dispatch.h"

namespace blendserve {

BLENDSERVE_DECLARE_KERNEL(void, attention_tile, (const AttentionTile&, float*))
BLENDSERVE_DECLARE_KERNEL(void, attention_group, (const AttentionTile*, int64_t, int64_t, float*))
BLENDSERVE_DECLARE_KERNEL(void, attention_segment, (const AttentionTile&, int64_t, float*, float*))
BLENDSERVE_DECLARE_KERNEL(void, merge_attention_segments, (const AttentionTile&, int64_t, float*))

int64_t attention_scratch_floats(int64_t group, int64_t head_dim) {
  const int64_t num_rows = std::max(attention_tile_tokens(group), max_group_members(group)) * group;
  constexpr int64_t kScores = 6 * kChunkTokens;
  return kScores + 3 * round_up(num_rows * head_dim, 16) + 4 * round_up(num_rows, 16);
}

void attention_tile(Isa isa, const AttentionTile& tile, float* scratch) {
  BLENDSERVE_CALL_KERNEL(isa, attention_tile, tile, scratch);
}

void attention_group(Isa isa, std::span<const AttentionTile> members, int64_t num_shared_tokens, float* scratch) {
  const auto num_members = static_cast<int64_t>(members.size());
  BLENDSERVE_CALL_KERNEL(isa, attention_group, members.data(), num_members, num_shared_tokens, scratch);
}

void attention_segment(Isa isa, const AttentionTile& tile, int64_t segment, float* partial, float* scratch) {
  BLENDSERVE_CALL_KERNEL(isa, attention_segment, tile, segment, partial, scratch);
}

void merge_attention_segments(Isa isa, const AttentionTile& tile, int64_t num_segments, float* partials) {
  BLENDSERVE_CALL_KERNEL(isa, merge_attention_segments, tile, num_segments, partials);
}

}  // namespace blendserve
