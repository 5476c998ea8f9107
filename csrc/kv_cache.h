// Keys and values of all tokens in blocks of 16, in bf16 or int8, in the order in which attention reads them.
// Which block belongs to whom is decided elsewhere (engine/blocks.py); here a block is a number.
#pragma once

#include <cstdint>
#include <string_view>

#include "ops/isa.h"
#include "tensor.h"

namespace blendserve {

inline constexpr int64_t kBlockSize = 16;  // tokens; config.py's BLOCK_SIZE

enum class KvDtype { kBf16, kInt8 };

// Throws std::invalid_argument for another name than bf16 and int8.
KvDtype kv_dtype_from_name(std::string_view name);
std::string_view kv_dtype_name(KvDtype dtype);

// 16-bit words of one block of one layer and KV head.
//
// kBf16: keys as [head_dim / 2][16 tokens][2], then values as [8 token pairs][head_dim][2].
// kInt8: keys as bytes with 128 added [head_dim / 4][16 tokens][4], values as bytes [4 token quads][head_dim][4], then
// in bf16 16 scales of keys and 16 logarithms (base 2) of scales of values. A token is quantised when it is written and
// by itself, so that its bits do not depend on its neighbours; keys and values are rotated first (rotation.h).
//
// Either way one 32-bit word holds the factors of neighbouring steps of the reduction, so that scores and outputs need
// no horizontal sums.
constexpr int64_t kv_block_words(KvDtype dtype, int64_t head_dim) {
  return dtype == KvDtype::kBf16 ? 2 * kBlockSize * head_dim : kBlockSize * head_dim + 2 * kBlockSize;
}

// Contents are undefined until written; attention never lets an unwritten token reach a result.
class KvCache {
 public:
  KvCache() = default;
  KvCache(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim,
          KvDtype dtype = KvDtype::kBf16);

  KvDtype dtype() const { return dtype_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_bytes() const { return data_.num_bytes(); }
  // Words of one block of one head, and from one block to the next of the same layer and head.
  int64_t head_stride() const { return kv_block_words(dtype_, head_dim_); }
  int64_t block_stride() const { return num_kv_heads_ * head_stride(); }
  // The first block of a layer and head.
  uint16_t* head(int64_t layer, int64_t kv_head) { return data_.data() + head_offset(layer, kv_head); }
  const uint16_t* head(int64_t layer, int64_t kv_head) const { return data_.data() + head_offset(layer, kv_head); }

  // Rounds and stores key[head_dim] and value[head_dim] of the token at `offset` in `block`. Different threads may
  // write tokens of one block.
  void write(Isa isa, int64_t layer, int64_t kv_head, int64_t block, int64_t offset, const float* key,
             const float* value);

 private:
  int64_t head_offset(int64_t layer, int64_t kv_head) const {
    return layer * num_blocks_ * block_stride() + kv_head * head_stride();
  }

  KvDtype dtype_ = KvDtype::kBf16;
  int64_t num_blocks_ = 0;
  int64_t num_kv_heads_ = 0;
  int64_t head_dim_ = 0;
  Buffer<uint16_t> data_;
};

}  // namespace blendserve
