#include "workspace.h"

#include <algorithm>

#include "ops/attention.h"

namespace blendserve {

NanoBatch::NanoBatch(const BatchLimits& limits, const AttentionCut& cut, int64_t partial_floats)
    : batch(limits, cut), partials(checked_product({batch.max_partials(), partial_floats})) {}

Workspace::Workspace(const ModelShape& shape, const ModelLimits& limits, MatmulFormat format, int num_threads)
    : shape_(shape),
      format_(format),
      widest_(std::max({shape.hidden_size, shape.q_width(), shape.intermediate_size})),
      panel_floats_(kRowPanel * RowPanel::stride_of(std::max(shape.hidden_size, shape.intermediate_size))),
      attention_floats_(attention_scratch_floats(shape.group(), shape.head_stride())) {
  // The second nano-batch begins at a row panel of its own.
  const int64_t rows = round_up(std::max(limits.max_num_batched_tokens, kHeadRows), kRowPanel) + kRowPanel;
  residual_ = Buffer<float>(checked_product({rows, shape.hidden_size}));
  qkv_ = Buffer<float>(checked_product({rows, shape.qkv_width()}));
  gate_up_ = Buffer<float>(checked_product({rows, 2, shape.intermediate_size}));
  packed_ = Buffer<uint8_t>(activation_bytes(format, rows, widest_));
  logits_ = Buffer<float>(checked_product({kHeadRows, shape.vocab_size}));
  panels_ = Buffer<float>(checked_product({num_threads, panel_floats_}));
  attention_scratch_ = Buffer<float>(checked_product({num_threads, attention_floats_}));
}

void Workspace::place(NanoBatch& nano, int64_t first_row) {
  nano.residual = residual_.data() + first_row * shape_.hidden_size;
  nano.qkv = qkv_.data() + first_row * shape_.qkv_width();
  nano.gate_up = gate_up_.data() + first_row * 2 * shape_.intermediate_size;
  nano.packed = packed_.data() + round_up(activation_bytes(format_, first_row, widest_), 64);
}

RowPanel Workspace::panel(int worker, int64_t width) {
  return {panels_.data() + worker * panel_floats_, width, RowPanel::stride_of(width)};
}

void Workspace::pack(const RowPanel& panel, int64_t num_rows, int64_t index, uint8_t* packed) const {
  pack_activations(format_, panel.data, panel.stride, 0, num_rows, panel.width,
                   packed + activation_bytes(format_, index * kRowPanel, panel.width));
}

int64_t Workspace::num_bytes() const {
  int64_t bytes = packed_.num_bytes();
  for (const auto* buffer : {&residual_, &qkv_, &gate_up_, &logits_, &panels_, &attention_scratch_}) {
    bytes += buffer->num_bytes();
  }
  return bytes;
}

}  // namespace blendserve
