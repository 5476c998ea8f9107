// Memory that a matmul fetches into L2 beside its own work, as runs of kPrefetchRunBytes.
#pragma once

#include <cstdint>

namespace blendserve {

// Taken from the front as far as the tile has steps (of two k in bf16, of four in int8) for them; each step asks for
// the next `step_bytes` (up to a line).
inline constexpr int64_t kPrefetchRunBytes = 1024;
struct PrefetchRuns {
  const uint16_t* const* begin = nullptr;
  const uint16_t* const* end = nullptr;
  int64_t step_bytes = 64;

  [[gnu::always_inline]] int64_t left() const { return end - begin; }
  [[gnu::always_inline]] const uint16_t* const* take(int64_t count) {
    const uint16_t* const* taken = begin;
    begin += count;
    return taken;
  }
};

// Steps of a kernel's inner loop that one run takes.
[[gnu::always_inline]] constexpr int64_t run_steps(int64_t step_bytes) {
  return (kPrefetchRunBytes + step_bytes - 1) / step_bytes;
}

}  // namespace blendserve
