// The layers of a step, op by op. One row of the batch is one token.
#include <algorithm>
#include <cmath>

#include "model.h"
#include "ops/pointwise.h"

namespace blendserve {
namespace {

constexpr int64_t kRotateRows = 4;  // rows of a tile: a few microseconds

// Tiles of kRowPanel rows, the grain of pack_activations.
int64_t num_panels(int64_t num_rows) { return div_up(num_rows, kRowPanel); }

}  // namespace

void Model::forward(KvCache& cache) {
  const auto num_rows = static_cast<int64_t>(batch_.rows().size());
  const int64_t hidden = shape_.hidden_size;
  embed();
  for (int64_t i = 0; i < shape_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers[static_cast<size_t>(i)];
    layer_ = static_cast<int32_t>(i);
    norm_and_pack(layer.input_norm);
    multiply(Op::kQkv, num_rows, layer.qkv, layer.qkv_bias, false, qkv_.data(), shape_.qkv_width());
    rotate_and_cache(i, cache);
    attend(i, cache);
    pack_attention();
    multiply(Op::kOutput, num_rows, layer.o, {}, true, residual_.data(), hidden);
    norm_and_pack(layer.post_attention_norm);
    multiply(Op::kGateUp, num_rows, layer.gate_up, {}, false, gate_up_.data(), 2 * shape_.intermediate_size);
    activate_and_pack();
    multiply(Op::kDown, num_rows, layer.down, {}, true, residual_.data(), hidden);
  }
  layer_ = -1;
}

void Model::embed() {
  const std::span<const BatchRow> rows = batch_.rows();
  const int64_t hidden = shape_.hidden_size;
  run(Op::kEmbed, num_panels(static_cast<int64_t>(rows.size())), [&](int64_t panel, int) {
    const auto end = std::min(rows.size(), static_cast<size_t>((panel + 1) * kRowPanel));
    for (auto row = static_cast<size_t>(panel * kRowPanel); row < end; ++row) {
      float* x = residual_.data() + static_cast<int64_t>(row) * hidden;
      if (weights_.embedding.size() > 0) {
        embed_row(weights_.embedding.data() + rows[row].token * hidden, hidden, x);
      } else {
        weights_.lm_head.unpack_row(rows[row].token, x);
      }
    }
  });
}

void Model::norm_and_pack(const std::vector<float>& weight) {
  const auto num_rows = static_cast<int64_t>(batch_.rows().size());
  const int64_t hidden = shape_.hidden_size;
  run(Op::kNorm, num_panels(num_rows), [&](int64_t panel, int) {
    const int64_t begin = panel * kRowPanel;
    const int64_t end = std::min(num_rows, begin + kRowPanel);
    for (int64_t row = begin; row < end; ++row) {
      rms_norm_row(isa_, residual_.data() + row * hidden, weight.data(), shape_.rms_norm_eps, hidden,
                   normed_.data() + row * hidden);
    }
    pack_activations(format_, normed_.data(), hidden, begin, end, hidden, packed_.data());
  });
}

void Model::multiply(Op op, int64_t num_rows, const PackedMatrix& w, const std::vector<float>& bias, bool accumulate,
                     float* y, int64_t ldy) {
  const MatmulGrid grid = suggest_grid(format_, num_rows, w.n(), w.k(), team_.num_threads(), l2_bytes_);
  const float* bias_data = bias.empty() ? nullptr : bias.data();
  run(op, grid.size(),
      [&](int64_t tile, int) { matmul_tile(packed_.data(), w, grid.tile(tile), bias_data, accumulate, y, ldy); });
}

void Model::rotate_and_cache(int64_t layer, KvCache& cache) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  const std::span<const BatchRow> rows = batch_.rows();
  const auto num_rows = static_cast<int64_t>(rows.size());
  const int64_t stride = shape_.head_stride(), half = shape_.head_dim / 2;
  const float q_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  run(Op::kRotate, div_up(num_rows, kRotateRows), [&](int64_t tile, int) {
    const int64_t end = std::min(num_rows, (tile + 1) * kRotateRows);
    for (int64_t row = tile * kRotateRows; row < end; ++row) {
      const BatchRow& at = rows[static_cast<size_t>(row)];
      const float* cosine = cosine_.data() + at.position * half;
      const float* sine = sine_.data() + at.position * half;
      float* head = qkv_.data() + row * shape_.qkv_width();
      const auto norm_and_rotate = [&](const std::vector<float>& norm, float scale) {
        if (!norm.empty()) rms_norm_row(isa_, head, norm.data(), shape_.rms_norm_eps, shape_.head_dim, head);
        rotate_row(isa_, head, cosine, sine, half, scale);
      };
      for (int64_t h = 0; h < shape_.num_heads; ++h, head += stride) norm_and_rotate(weights.q_norm, q_scale);
      for (int64_t h = 0; h < shape_.num_kv_heads; ++h, head += stride) {
        norm_and_rotate(weights.k_norm, 1.0f);
        cache.write(layer, h, at.block, at.position % kBlockSize, head, head + shape_.kv_width());
      }
    }
  });
}

AttentionTile Model::attention_of(const AttentionTask& task, int64_t layer, const KvCache& cache) {
  const BatchEntry& entry = batch_.entries()[static_cast<size_t>(task.entry)];
  float* q = qkv_.data() + (entry.first_row + task.first_token) * shape_.qkv_width() +
             task.kv_head * shape_.group() * shape_.head_stride();
  return {.q = q,
          .out = q,
          .row_stride = shape_.qkv_width(),
          .num_tokens = task.num_tokens,
          .first_position = entry.first_position + task.first_token,
          .group = shape_.group(),
          .head_dim = shape_.head_stride(),
          .cache = cache.head(layer, task.kv_head),
          .block_stride = cache.block_stride(),
          .block_table = entry.block_table};
}

void Model::attend_group(const AttentionTask& task, int64_t layer, const KvCache& cache, float* scratch) {
  std::array<AttentionTile, kMaxGroupRows> tiles;
  const auto members =
      batch_.members().subspan(static_cast<size_t>(task.first_member), static_cast<size_t>(task.num_members));
  for (size_t m = 0; m < members.size(); ++m) {
    tiles[m] = attention_of({members[m], task.kv_head, 0, 1, -1, -1, 0}, layer, cache);
  }
  attention_group(isa_, {tiles.data(), members.size()}, task.num_shared_tokens, scratch);
}

void Model::attend(int64_t layer, const KvCache& cache) {
  const std::span<const AttentionTask> tasks = batch_.tasks();
  const int64_t scratch_floats = attention_scratch_floats(shape_.group(), shape_.head_stride());
  const int64_t partial_floats = attention_partial_floats(shape_.group(), shape_.head_stride());
  run(Op::kAttention, static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    const AttentionTask& task = tasks[static_cast<size_t>(i)];
    float* scratch = attention_scratch_.data() + worker * scratch_floats;
    if (task.num_members > 0) return attend_group(task, layer, cache, scratch);
    const AttentionTile tile = attention_of(task, layer, cache);
    if (task.segment < 0) {
      attention_tile(isa_, tile, scratch);
    } else {
      attention_segment(isa_, tile, task.segment, partials_.data() + task.partial * partial_floats, scratch);
    }
  });
  const std::span<const AttentionSplit> splits = batch_.splits();
  if (splits.empty()) return;
  run(Op::kAttention, static_cast<int64_t>(splits.size()), [&](int64_t i, int) {
    const AttentionSplit& split = splits[static_cast<size_t>(i)];
    const AttentionTask task = {split.entry, split.kv_head, 0, 1, -1, -1, 0};
    const AttentionTile tile = attention_of(task, layer, cache);
    merge_attention_segments(isa_, tile, split.num_segments, partials_.data() + split.first_partial * partial_floats);
  });
}

void Model::pack_attention() {
  const auto num_rows = static_cast<int64_t>(batch_.rows().size());
  run(Op::kPackAttention, num_panels(num_rows), [&](int64_t panel, int) {
    const int64_t begin = panel * kRowPanel;
    pack_activations(format_, qkv_.data(), shape_.qkv_width(), begin, std::min(num_rows, begin + kRowPanel),
                     shape_.q_width(), packed_.data());
  });
}

void Model::activate_and_pack() {
  const auto num_rows = static_cast<int64_t>(batch_.rows().size());
  const int64_t width = shape_.intermediate_size;
  run(Op::kActivate, num_panels(num_rows), [&](int64_t panel, int) {
    const int64_t begin = panel * kRowPanel;
    const int64_t end = std::min(num_rows, begin + kRowPanel);
    for (int64_t row = begin; row < end; ++row) {
      float* gate = gate_up_.data() + row * 2 * width;
      silu_mul_row(isa_, gate, gate + width, width);
    }
    pack_activations(format_, gate_up_.data(), 2 * width, begin, end, width, packed_.data());
  });
}

void Model::head(std::span<const int64_t> rows) {
  const auto num_rows = static_cast<int64_t>(rows.size());
  const int64_t hidden = shape_.hidden_size;
  run(Op::kHeadNorm, num_panels(num_rows), [&](int64_t panel, int) {
    const int64_t begin = panel * kRowPanel;
    const int64_t end = std::min(num_rows, begin + kRowPanel);
    for (int64_t row = begin; row < end; ++row) {
      rms_norm_row(isa_, residual_.data() + rows[static_cast<size_t>(row)] * hidden, weights_.norm.data(),
                   shape_.rms_norm_eps, hidden, normed_.data() + row * hidden);
    }
    pack_activations(format_, normed_.data(), hidden, begin, end, hidden, packed_.data());
  });
  multiply(Op::kHead, num_rows, weights_.lm_head, {}, false, logits_.data(), shape_.vocab_size);
}

}  // namespace blendserve
