#include "kv_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "ops/bf16.h"
#include "ops/pointwise.h"
#include "ops/rotation.h"

namespace blendserve {
namespace {

// Rounding takes vectors. What it leaves is stored word by word: the neighbours belong to other tokens, which another
// thread may be writing.
void write_bf16(Isa isa, uint16_t* block, int64_t head_dim, int64_t offset, const float* key, const float* value) {
  constexpr int64_t kChunk = 64;
  uint16_t rounded[kChunk];
  uint16_t* key_pairs = block + 2 * offset;
  uint16_t* value_halves = block + kBlockSize * head_dim + offset / 2 * 2 * head_dim + offset % 2;
  for (int64_t begin = 0; begin < head_dim; begin += kChunk) {
    const int64_t count = std::min(kChunk, head_dim - begin);
    round_row(isa, key + begin, count, rounded);
    for (int64_t i = 0; i < count; i += 2) std::copy_n(rounded + i, 2, key_pairs + (begin + i) * kBlockSize);
    round_row(isa, value + begin, count, rounded);
    for (int64_t i = 0; i < count; ++i) value_halves[2 * (begin + i)] = rounded[i];
  }
}

// The largest magnitude, not below what makes sums of weights over scales overflow; a NaN anywhere makes it NaN.
float largest_magnitude(const float* x, int64_t size) {
  float largest = 0x1p-60f, poison = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::abs(x[i]));
    poison += x[i] * 0.0f;
  }
  return largest + poison;
}

// The low byte of the nearest integer, ties to even: adding 1.5 * 2^23 leaves it in the low bits.
uint8_t to_byte(float value) { return static_cast<uint8_t>(std::bit_cast<uint32_t>(value + 12582912.0f)); }

// The scale is largest / 127, raised by what rounding to bf16 may take.
void write_int8_keys(uint8_t* keys, uint16_t* scales, int64_t head_dim, int64_t offset, const float* key) {
  scales[offset] = bf16_from_float(largest_magnitude(key, head_dim) * (1.004f / 127.0f));
  const float inverse = 1.0f / float_from_bf16(scales[offset]);
  if (!std::isfinite(inverse)) return;  // the scale says so
  for (int64_t i = 0; i < head_dim; ++i) {
    keys[i / 4 * 4 * kBlockSize + offset * 4 + i % 4] = to_byte(key[i] * inverse + 128.0f);
  }
}

void write_int8_values(uint8_t* values, uint16_t* logs, int64_t head_dim, int64_t offset, const float* value) {
  // Raised by what rounding to bf16 may take, 2^-8 of it, so that no byte leaves [-127, 127].
  const float exact = std::log2(largest_magnitude(value, head_dim) / 127.0f);
  logs[offset] = bf16_from_float(exact + 0.004f * std::abs(exact) + 0.001f);
  const float inverse = std::exp2(-float_from_bf16(logs[offset]));
  if (!std::isfinite(inverse)) return;
  for (int64_t i = 0; i < head_dim; ++i) {
    values[offset / 4 * 4 * head_dim + 4 * i + offset % 4] = to_byte(value[i] * inverse);
  }
}

}  // namespace

KvDtype kv_dtype_from_name(std::string_view name) {
  for (const KvDtype dtype : {KvDtype::kBf16, KvDtype::kInt8}) {
    if (name == kv_dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("unknown KV dtype '" + std::string(name) + "'; use bf16 or int8");
}

std::string_view kv_dtype_name(KvDtype dtype) { return dtype == KvDtype::kInt8 ? "int8" : "bf16"; }

KvCache::KvCache(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim, KvDtype dtype)
    : dtype_(dtype),
      num_blocks_(num_blocks),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      data_(checked_product({num_layers, num_blocks, num_kv_heads, kv_block_words(dtype, head_dim)})) {
  if (dtype == KvDtype::kInt8 && head_dim > kMaxRotatedHead) {
    throw std::invalid_argument("KV memory in int8 takes heads of at most " + std::to_string(kMaxRotatedHead) +
                                " elements, this model has " + std::to_string(head_dim) + "; use bf16");
  }
}

void KvCache::write(Isa isa, int64_t layer, int64_t kv_head, int64_t block, int64_t offset, const float* key,
                    const float* value) {
  uint16_t* words = head(layer, kv_head) + block * block_stride();
  if (dtype_ == KvDtype::kBf16) return write_bf16(isa, words, head_dim_, offset, key, value);
  float rotated[kMaxRotatedHead];
  auto* bytes = reinterpret_cast<uint8_t*>(words);
  uint16_t* scales = words + kBlockSize * head_dim_;
  std::copy_n(key, head_dim_, rotated);
  rotate_head(rotated, head_dim_);
  write_int8_keys(bytes, scales, head_dim_, offset, rotated);
  std::copy_n(value, head_dim_, rotated);
  rotate_head(rotated, head_dim_);
  write_int8_values(bytes + kBlockSize * head_dim_, scales + kBlockSize, head_dim_, offset, rotated);
}

}  // namespace blendserve
