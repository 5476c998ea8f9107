#include "model.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>

namespace blendserve {
namespace {

// Of a step and worker. Ops that run one after the other leave a few in each layer; side by side they alternate tile
// by tile: some 23,000 in 30 layers beside 256 decodes.
constexpr int64_t kMaxTraceSpans = 1 << 17;

WorkRates work_rates(const ModelShape& shape, KvDtype kv_dtype, const ModelWeights& weights) {
  const auto layers = static_cast<double>(shape.num_layers);
  return {.flop_per_row = 2.0 * layers * static_cast<double>(shape.parameters_per_layer()),
          .flop_per_attended_token = 4.0 * layers * static_cast<double>(shape.q_width()),
          .kv_bytes_per_token = static_cast<double>(shape.kv_bytes_per_token(kv_dtype)),
          .weight_bytes = static_cast<double>(weights.num_layer_bytes())};
}

}  // namespace

Model::Model(Isa isa, const ModelShape& shape, const ModelLimits& limits, ModelWeights weights, int num_threads)
    : shape_(checked(shape)),
      limits_(checked(limits)),
      weights_(checked(std::move(weights), shape, isa)),
      team_(checked_num_threads(num_threads)),
      trace_(num_threads, kMaxTraceSpans),
      cache_(shape.num_layers, limits.num_blocks, shape.num_kv_heads, shape.head_stride(), limits.kv_dtype),
      workspace_(shape, limits, weights_.format(), num_threads),
      split_(batch_limits(shape, limits)),
      layers_(isa, shape, limits, weights_, workspace_, team_, trace_),
      head_(isa, shape, weights_, workspace_, team_, trace_),
      prompt_results_(isa, shape, limits, weights_),
      work_rates_(work_rates(shape, limits.kv_dtype, weights_)) {
  params_by_slot_.resize(static_cast<size_t>(limits.max_num_seqs));
  samples_.resize(static_cast<size_t>(limits.max_num_seqs));
  head_rows_.reserve(static_cast<size_t>(limits.max_num_seqs));
}

void Model::admit(int64_t slot, SamplingParams params, const PromptParams& prompt) {
  if (slot < 0 || slot >= limits_.max_num_seqs) {
    throw std::invalid_argument("slot " + std::to_string(slot) + " does not exist; there are " +
                                std::to_string(limits_.max_num_seqs));
  }
  check_params(params, shape_.vocab_size);
  std::erase_if(params.stop_token_ids, [&](int32_t token) { return token < 0 || token >= shape_.vocab_size; });
  prompt_results_.admit(slot, prompt);
  params_by_slot_[static_cast<size_t>(slot)] = std::move(params);
}

void Model::release(int64_t slot) {
  if (slot < 0 || slot >= limits_.max_num_seqs) return;
  params_by_slot_[static_cast<size_t>(slot)] = {};
  prompt_results_.release(slot);
}

void Model::set_overlap(const OverlapOptions& overlap) {
  check_overlap(overlap);
  overlap_ = overlap;
  layers_.set_overlap(overlap);
}

int64_t Model::forward(const StepInput& input) {
  if (input.num_slots > limits_.max_num_seqs) {
    throw std::invalid_argument("the plan's table has " + std::to_string(input.num_slots) +
                                " slots; the executor was made for " + std::to_string(limits_.max_num_seqs));
  }
  const StepWork work = split_.look_at(input);
  check_tokens_of_penalties(input);
  prompt_results_.check(input);
  is_split_ = overlap_pays(work, work_rates_, overlap_) && split_.split(input);
  if (!is_split_) split_.keep_whole(input);
  layers_.forward(input, split_, cache_, is_split_ ? 2 : 1, counters_.op_s);
  gather_sampled();
  scored_ = prompt_results_.collect(input, layers_.nano_batches());
  return static_cast<int64_t>(head_rows_.size());
}

std::span<const Sample> Model::sample(const TokenMasks& masks, const SampleCheck& check) {
  check_masks(masks, head_rows_.size(), shape_.vocab_size);
  for (size_t i = 0; i < head_rows_.size(); ++i) head_rows_[i].mask = masks.mask_of(i);
  head_.sample(head_rows_, check, samples_.data(), counters_.op_s);
  head_.score(scored_, counters_.op_s);
  counters_.add_step(shape_, limits_.kv_dtype, weights_, layers_.nano_batches(), is_split_,
                     static_cast<int64_t>(head_rows_.size() + scored_.size()));
  return {samples_.data(), head_rows_.size()};
}

// Penalties and bad words look at tokens that earlier steps computed.
void Model::check_tokens_of_penalties(const StepInput& input) const {
  for (size_t at = 0; at < input.slots.size(); ++at) {
    const SamplingParams& params = params_by_slot_[static_cast<size_t>(input.slots[at])];
    if (input.is_sampled[at] && params.looks_at_tokens()) check_computed_tokens(input, at, shape_.vocab_size);
  }
}

// Rows that are sampled, in the order of the plan: each nano-batch has its own in that order.
void Model::gather_sampled() {
  head_rows_.clear();
  const std::span<const NanoBatch> nano_batches = layers_.nano_batches();
  std::array<std::span<const int32_t>, kNumChains> left;
  for (size_t n = 0; n < kNumChains; ++n) left[n] = nano_batches[n].batch.sampled_entries();
  const auto first_of = [&](size_t n) -> const BatchEntry& {
    return nano_batches[n].batch.entries()[static_cast<size_t>(left[n].front())];
  };
  while (!left[0].empty() || !left[1].empty()) {
    const size_t n = left[0].empty() || (!left[1].empty() && first_of(1).index < first_of(0).index) ? 1 : 0;
    const BatchEntry& entry = first_of(n);
    const int64_t last_row = entry.first_row + entry.num_rows - 1;
    head_rows_.push_back({nano_batches[n].residual + last_row * shape_.hidden_size,
                          &params_by_slot_[static_cast<size_t>(entry.slot)],
                          {entry.token_ids, static_cast<size_t>(entry.first_position + entry.num_rows)}});
    left[n] = left[n].subspan(1);
  }
}

void Model::logits(std::span<const int32_t> tokens, float* out) {
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  const int64_t num_blocks = div_up(num_tokens, kBlockSize);
  if (num_blocks > limits_.num_blocks) throw std::invalid_argument("more tokens than the executor's KV memory holds");
  KvCache cache(shape_.num_layers, num_blocks, shape_.num_kv_heads, shape_.head_stride(), limits_.kv_dtype);
  std::vector<int32_t> blocks(static_cast<size_t>(num_blocks));
  for (size_t b = 0; b < blocks.size(); ++b) blocks[b] = static_cast<int32_t>(b);
  for (int64_t begin = 0; begin < num_tokens; begin += limits_.max_num_batched_tokens) {
    const auto first = static_cast<int32_t>(begin);
    const auto count = static_cast<int32_t>(std::min(limits_.max_num_batched_tokens, num_tokens - begin));
    const int32_t slot = 0;
    const bool is_sampled = false;
    const StepInput input = {
        {&slot, 1}, {&count, 1}, {&first, 1}, &is_sampled, tokens.data(), num_tokens, blocks.data(), num_blocks, 1};
    check_plan(input, batch_limits(shape_, limits_));
    split_.keep_whole(input);
    layers_.forward(input, split_, cache, 1, counters_.op_s);
    head_.logits(workspace_.residual(), count, out + begin * shape_.vocab_size, counters_.op_s);
  }
}

}  // namespace blendserve
