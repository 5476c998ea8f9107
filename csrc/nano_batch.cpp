#include "nano_batch.h"

#include <algorithm>

#include "kv_cache.h"
#include "ops/matmul.h"

namespace blendserve {

NanoBatchSplit::NanoBatchSplit(const BatchLimits& limits) : limits_(limits) {
  const auto max_entries = static_cast<size_t>(limits.max_num_seqs);
  for (auto& parts : parts_) parts.reserve(max_entries);
  decodes_.reserve(max_entries);
  others_.reserve(max_entries);
  writer_by_block_.resize(static_cast<size_t>(limits.num_blocks));
}

StepWork NanoBatchSplit::look_at(const StepInput& input) {
  check_plan(input, limits_);
  decodes_.clear();
  others_.clear();
  work_ = {};
  has_reader_ = is_out_of_order_ = false;
  mark_writers(input);
  for (int32_t index = 0; index < static_cast<int32_t>(input.slots.size()); ++index) find_reader(input, index);
  return work_;
}

void NanoBatchSplit::mark_writers(const StepInput& input) {
  ++step_;
  for (size_t index = 0; index < input.slots.size(); ++index) {
    const int32_t* blocks = input.block_tables + input.slots[index] * input.block_stride;
    const int64_t first = input.num_computed_tokens[index];
    const int64_t end = first + input.num_scheduled_tokens[index];
    for (int64_t b = first / kBlockSize; b < div_up(end, kBlockSize); ++b) {
      writer_by_block_[static_cast<size_t>(blocks[b])] = step_ << 32 | index;
    }
  }
}

// Sorts an entry among decodes, which can go anywhere, or the others, whose order must stay.
void NanoBatchSplit::find_reader(const StepInput& input, int32_t index) {
  const auto at = static_cast<size_t>(index);
  const int32_t* blocks = input.block_tables + input.slots[at] * input.block_stride;
  const int64_t first = input.num_computed_tokens[at];
  const int64_t num_tokens = input.num_scheduled_tokens[at];
  bool is_reader = false;
  for (int64_t b = 0; b < div_up(first, kBlockSize); ++b) {
    const uint64_t writer = writer_by_block_[static_cast<size_t>(blocks[b])];
    if (writer >> 32 != step_ || (writer & 0xffffffffu) == at) continue;
    is_reader = true;
    const auto writer_index = static_cast<size_t>(writer & 0xffffffffu);
    // A writer of one token is among those that may go to the second part, its reader in the first.
    if (writer_index > at || input.num_scheduled_tokens[writer_index] == 1) is_out_of_order_ = true;
  }
  has_reader_ = has_reader_ || is_reader;
  work_.num_rows += num_tokens;
  if (num_tokens == 1) {
    work_.num_decode_tokens += first + 1;
  } else {
    work_.num_attended_tokens += num_tokens * first + num_tokens * (num_tokens + 1) / 2;
  }
  (num_tokens == 1 && !is_reader ? decodes_ : others_).push_back(index);
}

void NanoBatchSplit::keep_whole(const StepInput& input) {
  for (auto& parts : parts_) parts.clear();
  is_second_after_first_ = false;
  for (size_t index = 0; index < input.slots.size(); ++index) {
    parts_[0].push_back({static_cast<int32_t>(index), 0, input.num_scheduled_tokens[index]});
  }
}

bool NanoBatchSplit::split(const StepInput& input) {
  for (auto& parts : parts_) parts.clear();
  if (is_out_of_order_) return false;
  is_second_after_first_ = has_reader_;
  split_others(input, split_decodes(input));
  // The results of sampling are put into the plan's order by merging the parts.
  for (auto& parts : parts_) {
    std::sort(parts.begin(), parts.end(), [](const BatchPart& a, const BatchPart& b) { return a.index < b.index; });
  }
  return !parts_[0].empty() && !parts_[1].empty();
}

// Decodes go to the first part until it has half of what they read. Returns their number.
int64_t NanoBatchSplit::split_decodes(const StepInput& input) {
  int64_t total = 0, before = 0, num_first = 0;
  for (const int32_t index : decodes_) total += input.num_computed_tokens[static_cast<size_t>(index)] + 1;
  for (const int32_t index : decodes_) {
    const int64_t length = input.num_computed_tokens[static_cast<size_t>(index)] + 1;
    const bool is_first = 2 * before + length <= total;  // its middle lies in the first half
    parts_[is_first ? 0 : 1].push_back({index, 0, 1});
    num_first += is_first;
    before += length;
  }
  return num_first;
}

// All others in the plan's order: the first part until it has half of the rows. An entry is cut between blocks:
// attention loads whole blocks, and none of the first part's may be written by the second meanwhile.
void NanoBatchSplit::split_others(const StepInput& input, int64_t num_first_rows) {
  int64_t room = std::max<int64_t>(0, round_up(work_.num_rows / 2, kRowPanel) - num_first_rows);
  for (const int32_t index : others_) {
    const int64_t num_tokens = input.num_scheduled_tokens[static_cast<size_t>(index)];
    const int64_t computed = input.num_computed_tokens[static_cast<size_t>(index)];
    const int64_t cut = room == 0 ? 0 : round_up(computed + room, kBlockSize) - computed;
    const auto num_first = static_cast<int32_t>(std::min(cut, num_tokens));
    const auto num_second = static_cast<int32_t>(num_tokens) - num_first;
    room = std::max<int64_t>(0, room - num_first);
    if (num_first > 0) parts_[0].push_back({index, 0, num_first});
    if (num_second > 0) parts_[1].push_back({index, num_first, num_second});
    if (num_first > 0 && num_second > 0) is_second_after_first_ = true;
  }
}

}  // namespace blendserve
