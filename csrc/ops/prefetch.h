// Memory that a matmul fetches into L2 beside its own work, in pieces of kPrefetchPieceBytes.
#pragma once

#include <cstdint>

namespace blendserve {

inline constexpr int64_t kPrefetchPieceBytes = 1024;
// Bytes per iteration of an inner loop (two k in bf16, four in int8), at most: two lines. That is all that one core
// gets from memory in the time of an iteration of 24 AVX-512 products.
inline constexpr int64_t kMaxPrefetchIterationBytes = 128;

// Pieces are taken from the front, as fast as `iteration_bytes` says, until none is left.
struct PrefetchPieces {
  const uint16_t* const* begin = nullptr;
  const uint16_t* const* end = nullptr;
  int64_t iteration_bytes = 64;
  int64_t due_bytes = 0;  // what the iterations so far may still ask for

  [[gnu::always_inline]] int64_t left() const { return end - begin; }
};

}  // namespace blendserve
