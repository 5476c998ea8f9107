// What a model and the memory of its steps measure. Numbers only; model.h says what they are for.
#pragma once

#include <cstdint>

#include "batch.h"
#include "kv_cache.h"
#include "ops/attention.h"
#include "tensor.h"

namespace blendserve {

struct ModelShape {
  int64_t vocab_size;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_layers;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float rms_norm_eps;

  int64_t group() const { return num_heads / num_kv_heads; }
  // Heads are stored head_stride() apart, the rest of each is zero.
  int64_t head_stride() const { return round_up(head_dim, kHeadMultiple); }
  int64_t q_width() const { return num_heads * head_stride(); }
  int64_t kv_width() const { return num_kv_heads * head_stride(); }
  int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  int64_t kv_bytes_per_token(KvDtype dtype) const {  // over all layers
    const int64_t block_words = kv_block_words(dtype, head_stride());
    return num_layers * num_kv_heads * block_words * static_cast<int64_t>(sizeof(uint16_t)) / kBlockSize;
  }
  int64_t parameters_per_layer() const { return hidden_size * (qkv_width() + q_width() + 3 * intermediate_size); }
};

struct ModelLimits {
  int64_t max_num_seqs;
  int64_t max_num_batched_tokens;
  int64_t max_model_len;
  int64_t num_blocks;
  KvDtype kv_dtype = KvDtype::kBf16;
};

// Return what they are given. Throw std::invalid_argument where a number is out of range or two do not go together.
int64_t checked_num_layers(int64_t num_layers);
int checked_num_threads(int num_threads);
ModelShape checked(const ModelShape& shape);
ModelLimits checked(const ModelLimits& limits);

BatchLimits batch_limits(const ModelShape& shape, const ModelLimits& limits);

}  // namespace blendserve
