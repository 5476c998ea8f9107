#include "layer_ops.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "ops/pointwise.h"

namespace blendserve {
namespace {

// Rows of a tile of kRotate. Two blocks of tokens or more, so that few lines of the cache are written by two workers,
// but enough tiles for all.
constexpr int64_t kMaxRotateRows = 32;
constexpr int64_t kRotateTilesPerThread = 4;

// Asks for a row that another core wrote, while this core works on the one before it.
void fetch_row(const float* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(row + i, 1, 2);
}

}  // namespace

RowRange panel_rows(int64_t panel, int64_t num_rows) {
  return {panel * kRowPanel, std::min(num_rows, (panel + 1) * kRowPanel)};
}

LayerOps::LayerOps(Isa isa, const ModelShape& shape, int64_t max_model_len, const ModelWeights& weights,
                   Workspace& workspace, int num_threads)
    : isa_(isa),
      shape_(shape),
      weights_(weights),
      workspace_(workspace),
      num_threads_(num_threads),
      rotary_(max_model_len, weights.inverse_frequencies, weights.rotary_factor) {}

void LayerOps::embed(NanoBatch& nano, RowRange rows) {
  const int64_t hidden = shape_.hidden_size;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int32_t token = nano.batch.rows()[static_cast<size_t>(row)].token;
    float* x = nano.residual + row * hidden;
    if (weights_.embedding.size() > 0) {
      embed_row(weights_.embedding.data() + token * hidden, hidden, x);
    } else {
      weights_.lm_head.unpack_row(token, x);
    }
  }
}

void LayerOps::norm_and_pack(const NanoBatch& nano, const std::vector<float>& weight, RowRange rows, int64_t index,
                             uint8_t* packed, int worker) {
  const int64_t hidden = shape_.hidden_size;
  const RowPanel normed = workspace_.panel(worker, hidden);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    rms_norm_row(isa_, nano.residual + row * hidden, weight.data(), shape_.rms_norm_eps, hidden,
                 normed.row(row - rows.begin));
  }
  workspace_.pack(normed, rows.end - rows.begin, index, packed);
}

void LayerOps::multiply(NanoBatch& nano, const PackedMatrix& w, int64_t tile, const std::vector<float>& bias, float* y,
                        int64_t ldy, PrefetchPieces* pieces) {
  matmul_tile(nano.packed, w, nano.grid.tile(tile), bias.empty() ? nullptr : bias.data(), false, y, ldy, pieces);
}

void LayerOps::multiply_and_add(NanoBatch& nano, const PackedMatrix& w, int64_t tile, PrefetchPieces* pieces) {
  matmul_tile(nano.packed, w, nano.grid.tile(tile), nullptr, true, nano.residual, shape_.hidden_size, pieces);
}

int64_t LayerOps::num_rotate_rows(int64_t num_rows) const {
  return std::clamp<int64_t>(num_rows / (kRotateTilesPerThread * num_threads_), 1, kMaxRotateRows);
}

int64_t LayerOps::num_rotate_tiles(int64_t num_rows) const { return div_up(num_rows, num_rotate_rows(num_rows)); }

RowRange LayerOps::rotate_rows(int64_t tile, int64_t num_rows) const {
  const int64_t rows = num_rotate_rows(num_rows);
  return {tile * rows, std::min(num_rows, (tile + 1) * rows)};
}

void LayerOps::rotate_and_cache(NanoBatch& nano, int64_t layer, RowRange rows) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  const int64_t stride = shape_.head_stride(), width = shape_.qkv_width();
  const float q_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const BatchRow& at = nano.batch.rows()[static_cast<size_t>(row)];
    float* head = nano.qkv + row * width;
    if (row + 1 < rows.end) fetch_row(head + width, width);
    const auto norm_and_rotate = [&](const std::vector<float>& norm, float scale) {
      if (!norm.empty()) rms_norm_row(isa_, head, norm.data(), shape_.rms_norm_eps, shape_.head_dim, head);
      rotate_row(isa_, head, rotary_.cosine(at.position), rotary_.sine(at.position), rotary_.half(), scale);
    };
    for (int64_t h = 0; h < shape_.num_heads; ++h, head += stride) norm_and_rotate(weights.q_norm, q_scale);
    for (int64_t h = 0; h < shape_.num_kv_heads; ++h, head += stride) {
      norm_and_rotate(weights.k_norm, 1.0f);
      nano.cache->write(isa_, layer, h, at.block, at.position % kBlockSize, head, head + shape_.kv_width());
    }
  }
}

AttentionTile LayerOps::tile_of(const NanoBatch& nano, const AttentionTask& task, int64_t layer) const {
  const BatchEntry& entry = nano.batch.entries()[static_cast<size_t>(task.entry)];
  float* q = nano.qkv + (entry.first_row + task.first_token) * shape_.qkv_width() +
             task.kv_head * shape_.group() * shape_.head_stride();
  return {.q = q,
          .out = q,
          .row_stride = shape_.qkv_width(),
          .num_tokens = task.num_tokens,
          .first_position = entry.first_position + task.first_token,
          .group = shape_.group(),
          .head_dim = shape_.head_stride(),
          .cache = nano.cache->head(layer, task.kv_head),
          .block_stride = nano.cache->block_stride(),
          .block_table = entry.block_table,
          .kv_dtype = nano.cache->dtype()};
}

void LayerOps::attend(NanoBatch& nano, int64_t layer, const AttentionTask& task, int worker) {
  float* scratch = workspace_.attention_scratch(worker);
  if (task.num_members > 0) return attend_group(nano, layer, task, scratch);
  const AttentionTile tile = tile_of(nano, task, layer);
  if (task.segment < 0) {
    attention_tile(isa_, tile, scratch);
  } else {
    attention_segment(isa_, tile, task.segment, nano.partials.data() + task.partial * num_partial_floats(), scratch);
  }
}

void LayerOps::attend_group(NanoBatch& nano, int64_t layer, const AttentionTask& task, float* scratch) {
  std::array<AttentionTile, kMaxGroupRows> tiles;
  const auto members =
      nano.batch.members().subspan(static_cast<size_t>(task.first_member), static_cast<size_t>(task.num_members));
  for (size_t m = 0; m < members.size(); ++m) {
    tiles[m] = tile_of(nano, {members[m], task.kv_head, 0, 1, -1, -1, 0}, layer);
  }
  attention_group(isa_, {tiles.data(), members.size()}, task.num_shared_tokens, scratch);
}

void LayerOps::merge_segments(NanoBatch& nano, int64_t layer, const AttentionSplit& split) {
  const AttentionTask task = {split.entry, split.kv_head, 0, 1, -1, -1, 0};
  merge_attention_segments(isa_, tile_of(nano, task, layer), split.num_segments,
                           nano.partials.data() + split.first_partial * num_partial_floats());
}

void LayerOps::pack_attention(const NanoBatch& nano, RowRange rows, uint8_t* packed) {
  const int64_t width = shape_.qkv_width(), k = shape_.q_width();
  for (int64_t row = rows.begin; row < rows.end; row += kRowPanel) {
    const int64_t next = std::min(row + kRowPanel, rows.end), after = std::min(next + kRowPanel, rows.end);
    for (int64_t i = next; i < after; ++i) fetch_row(nano.qkv + i * width, k);
    pack_activations(weights_.format(), nano.qkv + row * width, width, 0, next - row, k,
                     packed + activation_bytes(weights_.format(), row - rows.begin, k));
  }
}

void LayerOps::activate_and_pack(NanoBatch& nano, int64_t panel, int worker) {
  const int64_t width = shape_.intermediate_size;
  const RowRange rows = panel_rows(panel, nano.num_rows());
  const RowPanel activated = workspace_.panel(worker, width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* gate = nano.gate_up + row * 2 * width;
    silu_mul_row(isa_, gate, gate + width, width, activated.row(row - rows.begin));
  }
  workspace_.pack(activated, rows.end - rows.begin, panel, nano.packed);
}

}  // namespace blendserve
