// Splits the rows of a step into two nano-batches of about equal work, so that the matrix products of one can hide the
// attention of the other. Which split is chosen never shows in a result.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "batch.h"

namespace blendserve {

// Work of a step in units that a cost model prices.
struct StepWork {
  int64_t num_rows = 0;
  int64_t num_decode_tokens = 0;    // KV tokens that one-row entries read: memory
  int64_t num_attended_tokens = 0;  // positions seen by the rows of all others: compute
};

class NanoBatchSplit {
 public:
  explicit NanoBatchSplit(const BatchLimits& limits);  // allocates for the largest step

  // Looks at a step: its work, and which entries read blocks that others write in it. Throws std::invalid_argument
  // where it does not fit the limits.
  StepWork look_at(const StepInput& input);
  // The whole step as one part.
  void keep_whole(const StepInput& input);
  // Two parts: half of what decodes read and half of the rows each. False where the step cannot be split: an entry
  // reads what a later one writes, or one that computes a single token.
  bool split(const StepInput& input);

  std::span<const BatchPart> parts(int nano_batch) const { return parts_[static_cast<size_t>(nano_batch)]; }
  // Does the second one read keys or values that the first one writes in this step?
  bool is_second_after_first() const { return is_second_after_first_; }

 private:
  void mark_writers(const StepInput& input);
  void find_reader(const StepInput& input, int32_t index);
  int64_t split_decodes(const StepInput& input);
  void split_others(const StepInput& input, int64_t num_first_rows);

  BatchLimits limits_;
  std::array<std::vector<BatchPart>, 2> parts_;
  std::vector<int32_t> decodes_, others_;  // plan indices
  std::vector<uint64_t> writer_by_block_;  // number of the step << 32 | plan index
  uint64_t step_ = 0;
  StepWork work_;
  bool has_reader_ = false;       // an entry reads what an earlier one writes
  bool is_out_of_order_ = false;  // or a later one, or one that goes anywhere
  bool is_second_after_first_ = false;
};

}  // namespace blendserve
