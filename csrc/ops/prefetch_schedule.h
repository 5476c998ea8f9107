// When the kernels of matrix products ask for memory into L2: the weights of the next strip, and the pieces of a
// caller. All kernels of all instruction sets follow this schedule. Private to csrc/ops/matmul*.cpp.
//
// A turn is kTurnIterations iterations of a kernel's inner loop. Its addresses are chosen once, at its begin; its
// iterations ask for lines at constant offsets from them, without a branch or a counter. Where there is nothing to ask
// for they ask for weights that the kernel just read: a hit in L1 costs nothing measurable beside 8 or more products
// per iteration.
#pragma once

#include <cstdint>

#include "ops/matmul.h"

// Before the loop over the iterations of a turn: offsets become constants. Emulated intrinsics would compile for
// minutes.
#if defined(BLENDSERVE_SIMDE)
#define BLENDSERVE_UNROLL_TURN _Pragma("GCC unroll 1")
#else
#define BLENDSERVE_UNROLL_TURN _Pragma("GCC unroll 16")
#endif

namespace blendserve::kernels {

inline constexpr int kTurnIterations = 16;
inline constexpr int64_t kLineBytes = 64;
static_assert(kTurnIterations * kLineBytes == kPrefetchPieceBytes);

// Bytes per iteration that a kernel asks for, which takes at most kLines lines of pieces in each.
template <int kLines>
[[gnu::always_inline]] constexpr int64_t turn_bytes(int64_t iteration_bytes) {
  return kTurnIterations * (iteration_bytes < kLines * kLineBytes ? iteration_bytes : kLines * kLineBytes);
}

// Pieces that such kernels take in so many turns.
template <int kLines>
[[gnu::always_inline]] constexpr int64_t num_pieces_of_turns(int64_t num_turns, int64_t iteration_bytes) {
  return num_turns * turn_bytes<kLines>(iteration_bytes) / kPrefetchPieceBytes;
}

// What one call of a kernel asks for: pieces of a caller, and its share of the weights that are needed next. Where one
// set of rows asks for all of a strip, it has no other pieces.
struct PrefetchSchedule {
  const void* share = nullptr;
  int64_t share_iteration_bytes = 0;
  const void* strip = nullptr;
  PrefetchPieces* pieces = nullptr;
};

// The weights that are needed after those of the strip [col, col + width) of a tile; null for none.
[[gnu::always_inline]] inline const void* weights_to_ask_for(const MatmulTile& tile, int64_t col, int64_t width,
                                                             const void* weights, int64_t column_bytes) {
  const int64_t next = col + width < tile.col_end ? col + width : tile.next_col;
  return next >= 0 ? static_cast<const char*>(weights) + next * column_bytes : tile.next_weights;
}

// Asks for outputs that a kernel will soon update: each row is on a page of its own, where no hardware prefetcher
// follows.
[[gnu::always_inline]] inline void ask_for_outputs(const float* y, int64_t ldy, int64_t num_rows, int64_t num_columns) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t c = 0; c < num_columns; c += 16) __builtin_prefetch(y + r * ldy + c, 1, 2);
  }
}

// How the sets of rows of a tile share in asking for strips, which take each of them `num_iterations` iterations.
struct StripShares {
  [[gnu::always_inline]] StripShares(int64_t strip_bytes, int64_t num_sets, int64_t num_iterations)
      : is_whole(num_sets == 1),
        bytes((strip_bytes / num_sets + kPrefetchPieceBytes - 1) / kPrefetchPieceBytes * kPrefetchPieceBytes),
        iteration_bytes((bytes + num_iterations - 1) / num_iterations) {}
  [[gnu::always_inline]] PrefetchSchedule of_set(int64_t set, const void* strip) const {
    if (is_whole) return {.strip = strip};
    return {.share = static_cast<const char*>(strip) + set * bytes, .share_iteration_bytes = iteration_bytes};
  }

  bool is_whole;
  int64_t bytes, iteration_bytes;
};

// The schedule at work, in a kernel's registers.
template <int kLines>
class Prefetcher {
  static_assert(kLines == 1 || kLines == 2);

 public:
  [[gnu::always_inline]] explicit Prefetcher(const PrefetchSchedule& schedule)
      : pieces_(schedule.pieces),
        share_(static_cast<const char*>(schedule.share)),
        share_turn_bytes_(kTurnIterations * schedule.share_iteration_bytes),
        share_due_bytes_(kPrefetchPieceBytes - share_turn_bytes_),
        strip_(static_cast<const char*>(schedule.strip)) {}

  // `weights`: what the turn's iterations read.
  [[gnu::always_inline]] void begin_turn(const void* weights) {
    share_piece_ = first_ = second_ = static_cast<const char*>(weights);
    share_due_bytes_ += share_turn_bytes_;
    if (share_ != nullptr && share_due_bytes_ >= kPrefetchPieceBytes) {
      share_due_bytes_ -= kPrefetchPieceBytes;
      share_piece_ = share_;
      share_ += kPrefetchPieceBytes;
    }
    if (pieces_ != nullptr) {
      pieces_->due_bytes += turn_bytes<kLines>(pieces_->iteration_bytes);
      take(first_);
      if constexpr (kLines > 1) take(second_);
    } else if (strip_ != nullptr) {
      first_ = strip_;
      second_ = strip_ + kPrefetchPieceBytes;
      strip_ += kLines * kPrefetchPieceBytes;
    }
  }
  // `iteration` counts from 0 in every turn. `sum` is one that each adds to: GCC would issue all prefetches of a turn
  // at its begin, where they stall the products, if none depended on the iteration before.
  template <class Sum>
  [[gnu::always_inline]] void ask(int iteration, [[maybe_unused]] Sum& sum) {
#if !defined(BLENDSERVE_SIMDE)
    asm("" : "+r"(first_), "+r"(second_), "+r"(share_piece_), "+v"(sum));
#endif
    __builtin_prefetch(share_piece_ + iteration * kLineBytes, 0, 2);
    __builtin_prefetch(first_ + iteration * kLineBytes, 0, 2);
    if constexpr (kLines > 1) __builtin_prefetch(second_ + iteration * kLineBytes, 0, 2);
  }

 private:
  [[gnu::always_inline]] void take(const char*& address) {
    if (pieces_->due_bytes < kPrefetchPieceBytes || pieces_->begin == pieces_->end) return;
    pieces_->due_bytes -= kPrefetchPieceBytes;
    address = reinterpret_cast<const char*>(*pieces_->begin++);
  }

  PrefetchPieces* pieces_;
  const char* share_;
  int64_t share_turn_bytes_;
  int64_t share_due_bytes_;
  const char* strip_;
  const char* share_piece_ = nullptr;
  const char* first_ = nullptr;
  const char* second_ = nullptr;
};

}  // namespace blendserve::kernels
