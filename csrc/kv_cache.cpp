#include "kv_cache.h"

#include "ops/bf16.h"

namespace blendserve {

KvCache::KvCache(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim)
    : num_blocks_(num_blocks),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      data_(num_layers * num_blocks * num_kv_heads * 2 * kBlockSize * head_dim) {}

void KvCache::write(int64_t layer, int64_t kv_head, int64_t block, int64_t offset, const float* key,
                    const float* value) {
  uint16_t* keys = head(layer, kv_head) + block * block_stride();
  uint16_t* values = keys + kBlockSize * head_dim_;
  uint16_t* key_pair = keys + 2 * offset;
  for (int64_t i = 0; i < head_dim_; i += 2, key_pair += 2 * kBlockSize) {
    key_pair[0] = bf16_from_float(key[i]);
    key_pair[1] = bf16_from_float(key[i + 1]);
  }
  uint16_t* value_pair = values + offset / 2 * 2 * head_dim_ + offset % 2;
  for (int64_t i = 0; i < head_dim_; ++i) value_pair[2 * i] = bf16_from_float(value[i]);
}

}  // namespace blendserve
