#include "kv_cache.h"

#include <algorithm>

#include "ops/pointwise.h"

namespace blendserve {

KvCache::KvCache(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim)
    : num_blocks_(num_blocks),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      data_(num_layers * num_blocks * num_kv_heads * 2 * kBlockSize * head_dim) {}

// Rounding takes vectors. What it leaves is stored word by word: the neighbours belong to other tokens, which another
// thread may be writing.
void KvCache::write(Isa isa, int64_t layer, int64_t kv_head, int64_t block, int64_t offset, const float* key,
                    const float* value) {
  constexpr int64_t kChunk = 64;
  uint16_t rounded[kChunk];
  uint16_t* keys = head(layer, kv_head) + block * block_stride();
  uint16_t* values = keys + kBlockSize * head_dim_;
  uint16_t* key_pairs = keys + 2 * offset;
  uint16_t* value_halves = values + offset / 2 * 2 * head_dim_ + offset % 2;
  for (int64_t begin = 0; begin < head_dim_; begin += kChunk) {
    const int64_t count = std::min(kChunk, head_dim_ - begin);
    round_row(isa, key + begin, count, rounded);
    for (int64_t i = 0; i < count; i += 2) std::copy_n(rounded + i, 2, key_pairs + (begin + i) * kBlockSize);
    round_row(isa, value + begin, count, rounded);
    for (int64_t i = 0; i < count; ++i) value_halves[2 * (begin + i)] = rounded[i];
  }
}

}  // namespace blendserve
