// Causal attention of query tokens over blocks of cached keys and values, grouped-query or not.
//
// Every query is reduced in one order, whatever is computed beside it: softmax runs online over chunks of 4 blocks from
// the start of its segment, segments of 512 tokens are merged in order. So decode, any chunk of a prefill, any tile and
// any number of threads give the same bits, with keys and values of a chunk loaded once for all queries of a tile.
#pragma once

#include <cstdint>
#include <span>

#include "kv_cache.h"
#include "ops/isa.h"

namespace blendserve {

inline constexpr int64_t kChunkBlocks = 4;
inline constexpr int64_t kChunkTokens = kChunkBlocks * kBlockSize;
// The unit in which one long sequence is split over threads: 128 KB of keys and values at head size 64, so a share of
// an L2; long enough that merging costs under 1% of it.
inline constexpr int64_t kSegmentTokens = 8 * kChunkTokens;
inline constexpr int64_t kHeadMultiple = 16;  // head_dim is padded (with zeros) to a multiple of this

// One tile: some consecutive query tokens of one sequence, all query heads of one KV head.
struct AttentionTile {
  const float* q;      // first query token; its heads side by side, head_dim apart, already divided by sqrt(head size)
  float* out;          // same shape as q and may be q
  int64_t row_stride;  // elements from one token to the next in q and out
  int64_t num_tokens;
  int64_t first_position;  // of the first query token; it attends to positions [0, first_position]
  int64_t group;           // query heads of the KV head
  int64_t head_dim;
  const uint16_t* cache;  // KvCache::head of the layer and KV head
  int64_t block_stride;
  const int32_t* block_table;
};

// How many tokens a tile should have: enough query rows to reuse each load of keys and values about 8 times.
constexpr int64_t attention_tile_tokens(int64_t group) { return group >= 48 ? 1 : 48 / group; }
inline constexpr int64_t kAttentionSumLanes = 16;                    // partial sums that a kernel may keep per row
inline constexpr int64_t kAttentionScoreFloats = 12 * kChunkTokens;  // scores and weights of 8 rows
// Floats of working memory that a tile needs.
int64_t attention_scratch_floats(int64_t group, int64_t head_dim);
void attention_tile(Isa isa, const AttentionTile& tile, float* scratch);

// Several tiles of one query token each over the same KV head, of sequences whose tables begin with the same blocks:
// those of the first `num_shared_tokens` positions, a multiple of kChunkTokens that no query lies before, are read once
// for all. Bitwise equal to attention_tile of each.
inline constexpr int64_t kMaxGroupRows =
    192;  // queries and sums of a group: 144 KB at head size 64, so a share of an L2
constexpr int64_t max_group_members(int64_t group) { return group >= kMaxGroupRows ? 1 : kMaxGroupRows / group; }
void attention_group(Isa isa, std::span<const AttentionTile> members, int64_t num_shared_tokens, float* scratch);

// The same for one query token, segment by segment: each writes one partial result, the merge writes `out`. Bitwise
// equal to attention_tile.
constexpr int64_t attention_partial_floats(int64_t group, int64_t head_dim) {
  return group * (head_dim + kAttentionSumLanes) + round_up(group, 16);
}
constexpr int64_t num_attention_segments(int64_t num_tokens) { return div_up(num_tokens, kSegmentTokens); }
void attention_segment(Isa isa, const AttentionTile& tile, int64_t segment, float* partial, float* scratch);
void merge_attention_segments(Isa isa, const AttentionTile& tile, int64_t num_segments, float* partials);

}  // namespace blendserve
