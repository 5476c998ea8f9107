// bfloat16 as uint16_t: the upper half of a float32. Always inlined, so that files compiled for one instruction set
// never lend their copy to others.
#pragma once

#include <bit>
#include <cstdint>

namespace blendserve {

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
[[gnu::always_inline]] inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

[[gnu::always_inline]] inline float float_from_bf16(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

}  // namespace blendserve
