#include "prompt_results.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "ops/pointwise.h"

namespace blendserve {
namespace {

constexpr int32_t kMaxLogprobs = 1024;

}  // namespace

PromptResults::PromptResults(Isa isa, const ModelShape& shape, const ModelLimits& limits, const ModelWeights& weights)
    : isa_(isa),
      shape_(shape),
      max_num_seqs_(limits.max_num_seqs),
      num_blocks_(limits.num_blocks),
      weights_(weights),
      slots_(static_cast<size_t>(limits.max_num_seqs)),
      state_(static_cast<size_t>(shape.hidden_size)) {}

void PromptResults::admit(int64_t slot, const PromptParams& params) {
  if (params.num_prompt_tokens < 0 || params.num_logprobs > kMaxLogprobs) {
    throw std::invalid_argument("a prompt of " + std::to_string(params.num_prompt_tokens) + " tokens and " +
                                std::to_string(params.num_logprobs) + " log probabilities each; at most " +
                                std::to_string(kMaxLogprobs));
  }
  slots_[static_cast<size_t>(slot)] = {params, false, {}};
  const bool is_used = params.num_logprobs >= 0 || params.pooling != Pooling::kNone;
  if (is_used && blocks_.empty()) {
    blocks_.resize(static_cast<size_t>(num_blocks_));
    kept_in_step_.resize(static_cast<size_t>(num_blocks_));
  }
  is_used_ = is_used_ || is_used;
}

bool PromptResults::keeps(int32_t number) const {
  return kept_in_step_[static_cast<size_t>(number)] == step_ || !block(number).last_residual.empty();
}

// A chunk's last row is scored by the token that follows the chunk, the first row after a prefix hit by what the block
// before it keeps, which an entry of the same step may have to compute first.
void PromptResults::check(const StepInput& input) {
  if (!is_used_) return;
  ++step_;
  for (size_t at = 0; at < input.slots.size(); ++at) {
    if (!wants_scores(input.slots[at])) continue;
    const int32_t* blocks = input.block_tables + input.slots[at] * input.block_stride;
    const int64_t first = input.num_computed_tokens[at], end = first + input.num_scheduled_tokens[at];
    for (int64_t b = first / kBlockSize; b < end / kBlockSize; ++b)
      kept_in_step_[static_cast<size_t>(blocks[b])] = step_;
  }
  for (size_t at = 0; at < input.slots.size(); ++at) {
    if (wants_scores(input.slots[at])) check_scored(input, at);
  }
}

void PromptResults::check_scored(const StepInput& input, size_t at) const {
  const int64_t slot_number = input.slots[at];
  const Slot& slot = slots_[static_cast<size_t>(slot_number)];
  const int64_t first = input.num_computed_tokens[at];
  const int64_t end = first + input.num_scheduled_tokens[at];
  const int32_t* blocks = input.block_tables + slot_number * input.block_stride;
  if (!slot.has_run && first > 0 && first < slot.params.num_prompt_tokens &&
      (first % kBlockSize != 0 || !keeps(blocks[first / kBlockSize - 1]))) {
    throw std::invalid_argument("a prompt's log probabilities begin at token " + std::to_string(first) +
                                ", before which nothing was kept");
  }
  if (end >= slot.params.num_prompt_tokens) return;
  const bool is_inside = end < input.token_stride && end / kBlockSize < input.block_stride;
  const int32_t token = is_inside ? input.token_ids[slot_number * input.token_stride + end] : -1;
  const int32_t last = is_inside ? blocks[end / kBlockSize] : -1;
  if (token < 0 || token >= shape_.vocab_size || last < 0 || last >= num_blocks_) {
    throw std::invalid_argument("a prompt's token " + std::to_string(end) + " is " + std::to_string(token) +
                                " in block " + std::to_string(last) + "; there are " +
                                std::to_string(shape_.vocab_size) + " tokens and " + std::to_string(num_blocks_) +
                                " blocks");
  }
}

std::span<const ScoredRow> PromptResults::collect(const StepInput& input, std::span<const NanoBatch> nano_batches) {
  scored_.clear();
  if (!is_used_) return scored_;
  const auto for_each_entry = [&](auto visit) {
    for (const NanoBatch& nano : nano_batches) {
      for (const BatchEntry& entry : nano.batch.entries()) {
        visit(entry, nano.residual + entry.first_row * shape_.hidden_size);
      }
    }
  };
  // Everything is kept before any of it is read: an entry may follow another's blocks within the step.
  for_each_entry([&](const BatchEntry& entry, const float* rows) {
    if (wants_scores(entry.slot)) keep_residuals(entry, rows);
    pool(entry, rows);
  });
  for_each_entry([&](const BatchEntry& entry, const float* rows) {
    if (wants_scores(entry.slot)) add_scored_rows(input, entry, rows);
  });
  for (const int32_t slot : input.slots) slots_[static_cast<size_t>(slot)].has_run = true;
  return scored_;
}

void PromptResults::keep_residuals(const BatchEntry& entry, const float* rows) {
  const Slot& slot = slots_[static_cast<size_t>(entry.slot)];
  const int64_t end = std::min(entry.first_position + entry.num_rows, slot.params.num_prompt_tokens);
  for (int64_t position = entry.first_position; position < end; ++position) {
    if (position % kBlockSize != kBlockSize - 1) continue;
    const float* row = rows + (position - entry.first_position) * shape_.hidden_size;
    block(entry.block_table[position / kBlockSize]).last_residual.assign(row, row + shape_.hidden_size);
  }
}

void PromptResults::add_scored_rows(const StepInput& input, const BatchEntry& entry, const float* rows) {
  const Slot& slot = slots_[static_cast<size_t>(entry.slot)];
  const int64_t first = entry.first_position;
  const bool is_first_part = first == input.num_computed_tokens[static_cast<size_t>(entry.index)];
  if (!slot.has_run && is_first_part && first > 0 && first < slot.params.num_prompt_tokens) {
    add_scored_row(entry, first, block(entry.block_table[first / kBlockSize - 1]).last_residual.data());
  }
  const int64_t end = std::min(first + entry.num_rows, slot.params.num_prompt_tokens - 1);
  for (int64_t position = first; position < end; ++position) {
    add_scored_row(entry, position + 1, rows + (position - first) * shape_.hidden_size);
  }
}

void PromptResults::add_scored_row(const BatchEntry& entry, int64_t target, const float* residual) {
  const auto num_top = static_cast<size_t>(slots_[static_cast<size_t>(entry.slot)].params.num_logprobs);
  Block& kept = block(entry.block_table[target / kBlockSize]);
  const auto at = static_cast<size_t>(target % kBlockSize);
  if (kept.top.size() != num_top * kBlockSize) kept.top.resize(num_top * kBlockSize);
  scored_.push_back(
      {residual, entry.token_ids[target], &kept.logprobs[at], std::span(kept.top).subspan(at * num_top, num_top)});
}

void PromptResults::pool(const BatchEntry& entry, const float* rows) {
  Slot& slot = slots_[static_cast<size_t>(entry.slot)];
  const Pooling pooling = slot.params.pooling;
  if (pooling == Pooling::kNone) return;
  const int64_t end = std::min(entry.first_position + entry.num_rows, slot.params.num_prompt_tokens);
  const int64_t first = pooling == Pooling::kMean ? entry.first_position
                                                  : std::max(entry.first_position, slot.params.num_prompt_tokens - 1);
  for (int64_t position = first; position < end; ++position) {
    const float* row = rows + (position - entry.first_position) * shape_.hidden_size;
    rms_norm_row(isa_, row, weights_.norm.data(), shape_.rms_norm_eps, shape_.hidden_size, state_.data());
    if (pooling == Pooling::kLast) {
      slot.last_state = state_;
      continue;
    }
    std::vector<double>& sum = block(entry.block_table[position / kBlockSize]).state_sum;
    if (position % kBlockSize == 0) sum.assign(state_.size(), 0.0);
    for (size_t i = 0; i < state_.size(); ++i) sum[i] += static_cast<double>(state_[i]);
  }
}

int64_t PromptResults::num_blocks_of(const Slot& slot, std::span<const int32_t> blocks) const {
  const int64_t count = div_up(slot.params.num_prompt_tokens, kBlockSize);
  if (count > static_cast<int64_t>(blocks.size()) || slot.params.num_prompt_tokens == 0 || blocks_.empty()) {
    throw std::invalid_argument("a prompt of " + std::to_string(slot.params.num_prompt_tokens) + " tokens and " +
                                std::to_string(blocks.size()) + " blocks");
  }
  for (const int32_t number : blocks.first(static_cast<size_t>(count))) {
    if (number < 0 || number >= num_blocks_) {
      throw std::invalid_argument("block number is " + std::to_string(number) + "; there are " +
                                  std::to_string(num_blocks_));
    }
  }
  return count;
}

PromptLogprobs PromptResults::logprobs(int64_t slot_number, std::span<const int32_t> blocks) const {
  const Slot& slot = slots_.at(static_cast<size_t>(slot_number));
  num_blocks_of(slot, blocks);
  const auto num_top = static_cast<size_t>(std::max(slot.params.num_logprobs, 0));
  const auto num_tokens = static_cast<size_t>(slot.params.num_prompt_tokens);
  PromptLogprobs result = {static_cast<int64_t>(num_top), std::vector<float>(num_tokens),
                           std::vector<TokenLogit>(num_tokens * num_top)};
  result.logprobs[0] = std::numeric_limits<float>::quiet_NaN();
  for (size_t position = 1; position < num_tokens; ++position) {
    const Block& kept = block(blocks[position / kBlockSize]);
    const size_t at = position % kBlockSize;
    result.logprobs[position] = kept.logprobs[at];
    if (kept.top.size() < kBlockSize * num_top) throw std::invalid_argument("a block without log probabilities");
    std::copy_n(kept.top.begin() + static_cast<int64_t>(at * num_top), num_top,
                result.top.begin() + static_cast<int64_t>(position * num_top));
  }
  return result;
}

std::vector<float> PromptResults::pooled(int64_t slot_number, std::span<const int32_t> blocks) const {
  const Slot& slot = slots_.at(static_cast<size_t>(slot_number));
  if (slot.params.pooling != Pooling::kMean) {
    if (slot.last_state.empty())
      throw std::invalid_argument("the state of the last token of a prompt was not computed");
    return slot.last_state;
  }
  const int64_t count = num_blocks_of(slot, blocks);
  std::vector<double> total(state_.size(), 0.0);
  for (int64_t b = 0; b < count; ++b) {
    const std::vector<double>& sum = block(blocks[static_cast<size_t>(b)]).state_sum;
    if (sum.empty()) throw std::invalid_argument("a block without the sum of its states");
    for (size_t i = 0; i < total.size(); ++i) total[i] += sum[i];
  }
  std::vector<float> mean(total.size());
  for (size_t i = 0; i < mean.size(); ++i) {
    mean[i] = static_cast<float>(total[i] / static_cast<double>(slot.params.num_prompt_tokens));
  }
  return mean;
}

}  // namespace blendserve
