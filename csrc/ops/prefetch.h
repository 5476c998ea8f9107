// Memory that a matmul fetches into L2 beside its own work, as runs of kPrefetchRunBytes.
#pragma once

#include <cstdint>

namespace blendserve {

inline constexpr int64_t kPrefetchRunBytes = 1024;
// Bytes per step of a kernel (two k in bf16, four in int8), at most: two lines. That is all that one core gets from
// memory in the time of a step of 24 AVX-512 products.
inline constexpr int64_t kMaxPrefetchStepBytes = 128;

// Runs are taken from the front, as fast as `step_bytes` says, until none is left.
struct PrefetchRuns {
  const uint16_t* const* begin = nullptr;
  const uint16_t* const* end = nullptr;
  int64_t step_bytes = 64;
  int64_t due_bytes = 0;  // what the steps so far may still ask for

  [[gnu::always_inline]] int64_t left() const { return end - begin; }
};

}  // namespace blendserve
