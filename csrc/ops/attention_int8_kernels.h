// Attention over a cache in int8, for the instruction sets without a kernel of its own for it. The second half of
// attention_kernels.h, whose passes it uses.
#pragma once

#include "ops/attention_walk.h"
#include "ops/bf16.h"
#include "ops/rotation.h"
#include "ops/simd.h"

namespace blendserve::BLENDSERVE_KERNELS {
namespace {

BLENDSERVE_INLINE void multiply(float* x, float factor, int64_t size) {
  for (int64_t i = 0; i < size; i += kWidth) store(x + i, load(x + i) * set(factor));
}

// Scales of a block's keys, and kChunkTokens further of its values; 0 for what may never have been written.
BLENDSERVE_INLINE void read_int8_scales(const uint16_t* block, int64_t head_dim, int64_t num_tokens, float* scales) {
  constexpr float kLn2 = 0.693147181f;
  const uint16_t* stored = block + kBlockSize * head_dim;
  float* of_values = scales + kChunkTokens;
  for (int64_t t = 0; t < kBlockSize; ++t) {
    scales[t] = float_from_bf16(stored[t]);
    of_values[t] = float_from_bf16(stored[kBlockSize + t]) * kLn2;
  }
  for (int64_t t = 0; t < kBlockSize; t += kWidth) store(of_values + t, exp(load(of_values + t)));
  for (int64_t t = num_tokens; t < kBlockSize; ++t) scales[t] = of_values[t] = 0.0f;
}

// The integers of a block of int8 as a block of bf16.
BLENDSERVE_INLINE void read_int8_block(const uint8_t* bytes, int64_t head_dim, uint16_t* words) {
  const int64_t half = kBlockSize * head_dim;
  const auto split = [&](int offset, int64_t group, int64_t quads) __attribute__((always_inline)) {
    // Groups of `quads` quads become two groups of as many pairs.
    for (int64_t begin = 0; begin < half; begin += group) {
      for (int64_t i = 0; i < quads; ++i) {
        for (int64_t j = 0; j < 4; ++j) {
          const int byte = offset == 0 ? static_cast<int8_t>(bytes[begin + 4 * i + j]) : bytes[begin + 4 * i + j];
          words[begin + j / 2 * 2 * quads + 2 * i + j % 2] = bf16_from_float(static_cast<float>(byte - offset));
        }
      }
    }
    bytes += half;
    words += half;
  };
  split(128, 4 * kBlockSize, kBlockSize);
  split(0, 4 * head_dim, head_dim);
}

// Over int8: a chunk becomes bf16, in which its integers are exact, before its passes; scales join scores and weights.
struct Int8Kernel : Kernel {
  static int64_t chunk_floats(int64_t head_dim) { return kChunkTokens * (head_dim + 2); }

  static void read_chunk(Chunk& chunk, int64_t head_dim, float* memory) {
    float* scales = memory;
    auto* words = reinterpret_cast<uint16_t*>(memory + 2 * kChunkTokens);
    for (int64_t b = 0; b < chunk.num_blocks; ++b, words += 2 * kBlockSize * head_dim) {
      const int64_t num_tokens = chunk.num_tokens - b * kBlockSize;
      read_int8_scales(chunk.blocks[b], head_dim, num_tokens, scales + b * kBlockSize);
      read_int8_block(reinterpret_cast<const uint8_t*>(chunk.blocks[b]), head_dim, words);
      for (int64_t i = 0; chunk.is_next_wanted && i < kv_block_words(KvDtype::kInt8, head_dim); i += 32) {
        prefetch(chunk.next[b] + i);
      }
      chunk.blocks[b] = words;
    }
    for (int64_t b = chunk.num_blocks; b < kChunkBlocks; ++b) chunk.blocks[b] = chunk.blocks[chunk.num_blocks - 1];
    chunk.is_next_wanted = false;
    chunk.scales = scales;
  }

  static void pack(const AttentionTile& tile, int64_t first_row, Query query) {
    Kernel::pack(tile, first_row, query);
    for (int64_t row = 0; row < tile.num_tokens * tile.group; ++row) {
      float* q = query + (first_row + row) * tile.head_dim;
      rotate_head(q, tile.head_dim);
      multiply(q, 1.0f / static_cast<float>(rotation_size(tile.head_dim)), tile.head_dim);
    }
  }

  static void write_row(Softmax row, int64_t head_dim, float* to) {
    Kernel::write_row(row, head_dim, to);
    rotate_head(to, head_dim);
    multiply(to, 1.0f / static_cast<float>(rotation_size(head_dim)), head_dim);
  }
};

}  // namespace

const AttentionKernels attention_kernels = kWalk<Kernel>;
const AttentionKernels attention_kernels_int8 = kWalk<Int8Kernel>;

}  // namespace blendserve::BLENDSERVE_KERNELS
