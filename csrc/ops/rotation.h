// The rotation of a head before its keys and values are rounded to int8: it spreads channels that are large in every
// token, which real models have, over all channels. Queries are rotated as keys are, which leaves scores as they were;
// outputs are rotated back. Always inlined, so that files compiled for one instruction set never lend their copy.
#pragma once

#include <cstdint>

namespace blendserve {

inline constexpr int64_t kMaxRotatedHead = 512;  // of larger ones integer sums of scores could overflow

// Channels that are mixed with each other: the largest power of two that divides head_dim.
[[gnu::always_inline]] constexpr int64_t rotation_size(int64_t head_dim) { return head_dim & -head_dim; }

// Multiplies each group of rotation_size channels by a Hadamard matrix. Doing it twice multiplies by rotation_size,
// which is a power of two. Every operation is one addition of two floats: the same bits on every instruction set.
[[gnu::always_inline]] inline void rotate_head(float* x, int64_t head_dim) {
  const int64_t size = rotation_size(head_dim);
  for (int64_t half = 1; half < size; half *= 2) {
    for (int64_t begin = 0; begin < head_dim; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = low + high;
        x[i + half] = low - high;
      }
    }
  }
}

}  // namespace blendserve
