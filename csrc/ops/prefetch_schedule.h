// When the kernels of matrix products ask for memory into L2: the weights of the next strip, and the runs of a caller.
// All kernels of all instruction sets follow this schedule. Private to csrc/ops/matmul*.cpp.
//
// A turn is kTurnSteps steps of a kernel's inner loop. Its addresses are chosen once, at its begin; its steps ask for
// lines at constant offsets from them, without a branch or a counter. Where there is nothing to ask for they ask for a
// line that is in cache, which costs nothing measurable beside 8 or more products per step.
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

// What one call of a kernel asks for.
struct PrefetchSchedule {
  const void* cached;       // the kernel's own weights
  const void* weights;      // those of the next strip, or `cached`
  int64_t weight_step = 0;  // bytes from one step to the next, at most kLines lines
  PrefetchRuns* runs = nullptr;
};

// The share that set `set` of `num_sets` sets of rows has in asking for a strip of `strip_bytes`, in `num_steps` steps.
[[gnu::always_inline]] constexpr PrefetchSchedule share_of_strip(const void* cached, const void* strip,
                                                                 int64_t strip_bytes, int64_t set, int64_t num_sets,
                                                                 int64_t num_steps) {
  const int64_t share = (strip_bytes / num_sets + kLineBytes - 1) / kLineBytes * kLineBytes;
  return {cached, static_cast<const char*>(strip) + set * share, (share + num_steps - 1) / num_steps};
}

// The schedule at work, in a kernel's registers.
template <int kLines>
class Prefetcher {
  static_assert(kLines == 1 || kLines == 2);

 public:
  [[gnu::always_inline]] explicit Prefetcher(const PrefetchSchedule& schedule)
      : runs_(schedule.runs),
        cached_(static_cast<const char*>(schedule.cached)),
        weights_(static_cast<const char*>(schedule.weights)),
        weight_step_(schedule.weight_step),
        second_weights_(schedule.weight_step > kLineBytes ? kLineBytes : 0) {}

  [[gnu::always_inline]] void begin_turn() {
    if (runs_ == nullptr) return;
    runs_->due_bytes += turn_bytes<kLines>(runs_->step_bytes);
    first_ = take();
    if constexpr (kLines > 1) second_ = take();
  }
  // `step` counts from 0 in every turn.
  [[gnu::always_inline]] void ask(int step) {
    __builtin_prefetch(first_ + step * kLineBytes, 0, 2);
    if constexpr (kLines > 1) __builtin_prefetch(second_ + step * kLineBytes, 0, 2);
    ask_for_weights();
  }
  // For the steps behind the last whole turn.
  [[gnu::always_inline]] void ask_for_weights() {
    __builtin_prefetch(weights_, 0, 2);
    if constexpr (kLines > 1) __builtin_prefetch(weights_ + second_weights_, 0, 2);
    weights_ += weight_step_;
  }

 private:
  [[gnu::always_inline]] const char* take() {
    if (runs_->due_bytes < kPrefetchRunBytes || runs_->begin == runs_->end) return cached_;
    runs_->due_bytes -= kPrefetchRunBytes;
    return reinterpret_cast<const char*>(*runs_->begin++);
  }

  PrefetchRuns* runs_;
  const char* cached_;
  const char* weights_;
  int64_t weight_step_;
  int64_t second_weights_;
  const char* first_ = cached_;
  const char* second_ = cached_;
};

}  // namespace blendserve::kernels
