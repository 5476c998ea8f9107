// When the kernels of matrix products ask for memory into L2: the weights of the next strip, and the runs of a caller.
// All kernels of all instruction sets follow this schedule. Private to csrc/ops/matmul*.cpp.
//
// A turn is kTurnSteps steps of a kernel's inner loop. Its addresses are chosen once, at its begin; its steps ask for
// lines at constant offsets from them, without a branch or a counter. Where there is nothing to ask for they ask for
// weights that the kernel just read: a hit in L1 costs nothing measurable beside 8 or more products per step.
#pragma once

#include <cstdint>

#include "ops/prefetch.h"

namespace blendserve::kernels {

inline constexpr int kTurnSteps = 16;
inline constexpr int64_t kLineBytes = 64;
static_assert(kTurnSteps * kLineBytes == kPrefetchRunBytes);

// Bytes per step that a kernel asks for, which takes at most kLines lines of runs per step.
template <int kLines>
[[gnu::always_inline]] constexpr int64_t turn_bytes(int64_t step_bytes) {
  return kTurnSteps * (step_bytes < kLines * kLineBytes ? step_bytes : kLines * kLineBytes);
}

// Runs that such kernels take in so many turns.
template <int kLines>
[[gnu::always_inline]] constexpr int64_t num_runs_of_turns(int64_t num_turns, int64_t step_bytes) {
  return num_turns * turn_bytes<kLines>(step_bytes) / kPrefetchRunBytes;
}

// What one call of a kernel asks for: a share of the next strip's weights, in every step some bytes further, and either
// runs or, where one set of rows asks for all of a strip, that strip.
struct PrefetchSchedule {
  const void* share = nullptr;
  int64_t share_step = 0;
  const void* strip = nullptr;
  PrefetchRuns* runs = nullptr;
};

// For set `set` of `num_sets` sets of rows, which all have `num_steps` steps per strip. `cached`: the kernel's weights.
[[gnu::always_inline]] constexpr PrefetchSchedule ask_for_strip(const void* strip, int64_t strip_bytes, int64_t set,
                                                                int64_t num_sets, int64_t num_steps,
                                                                const void* cached) {
  if (num_sets == 1) return {.share = cached, .strip = strip};
  const int64_t share = (strip_bytes / num_sets + kLineBytes - 1) / kLineBytes * kLineBytes;
  return {.share = static_cast<const char*>(strip) + set * share, .share_step = (share + num_steps - 1) / num_steps};
}

// The schedule at work, in a kernel's registers.
template <int kLines>
class Prefetcher {
  static_assert(kLines == 1 || kLines == 2);

 public:
  [[gnu::always_inline]] explicit Prefetcher(const PrefetchSchedule& schedule)
      : runs_(schedule.runs),
        share_(static_cast<const char*>(schedule.share)),
        share_step_(schedule.share_step),
        strip_(static_cast<const char*>(schedule.strip)) {}

  // `weights`: what the turn's steps read.
  [[gnu::always_inline]] void begin_turn(const void* weights) {
    first_ = second_ = static_cast<const char*>(weights);
    if (runs_ != nullptr) {
      runs_->due_bytes += turn_bytes<kLines>(runs_->step_bytes);
      take(first_);
      if constexpr (kLines > 1) take(second_);
    } else if (strip_ != nullptr) {
      first_ = strip_;
      second_ = strip_ + kPrefetchRunBytes;
      strip_ += kLines * kPrefetchRunBytes;
    }
  }
  // `step` counts from 0 in every turn. `sum` is one that each step adds to: GCC would issue all prefetches of a turn at
  // its begin, where they stall the products, if none depended on the step before.
  template <class Sum>
  [[gnu::always_inline]] void ask(int step, [[maybe_unused]] Sum& sum) {
#if !defined(BLENDSERVE_SIMDE)
    asm("" : "+r"(first_), "+r"(second_), "+r"(share_), "+v"(sum));
#endif
    __builtin_prefetch(first_ + step * kLineBytes, 0, 2);
    if constexpr (kLines > 1) __builtin_prefetch(second_ + step * kLineBytes, 0, 2);
    ask_for_share();
  }
  // For the steps behind the last whole turn.
  [[gnu::always_inline]] void ask_for_share() {
    __builtin_prefetch(share_, 0, 2);
    share_ += share_step_;
  }

 private:
  [[gnu::always_inline]] void take(const char*& address) {
    if (runs_->due_bytes < kPrefetchRunBytes || runs_->begin == runs_->end) return;
    runs_->due_bytes -= kPrefetchRunBytes;
    address = reinterpret_cast<const char*>(*runs_->begin++);
  }

  PrefetchRuns* runs_;
  const char* share_;
  int64_t share_step_;
  const char* strip_;
  const char* first_ = nullptr;
  const char* second_ = nullptr;
};

}  // namespace blendserve::kernels
