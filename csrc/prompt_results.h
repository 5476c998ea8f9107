// What requests want of their prompts beside KV: log probabilities of the prompt's tokens, or one vector of its states.
// Both are kept with the KV blocks, so that a prefix that several requests share is computed once: a block holds the
// log probabilities of its own tokens and the state of its last one (which the log probability of the token after the
// block depends on), or the sum of its states. Sums go in the order of positions, first within blocks and then over
// them: no chunk, batch or prefix hit changes a bit.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "batch.h"
#include "ops/sample.h"
#include "shape.h"
#include "weights.h"
#include "workspace.h"

namespace blendserve {

enum class Pooling : int8_t { kNone, kLast, kMean };

struct PromptParams {
  int64_t num_prompt_tokens = 0;
  int32_t num_logprobs = -1;  // -1: none asked for; else of every token but the first, with so many best alternatives
  Pooling pooling = Pooling::kNone;  // of the states after the final norm
};

// A row of the residual whose next token is known, and where its log probabilities go.
struct ScoredRow {
  const float* residual;
  int32_t token;
  float* logprob;
  std::span<TokenLogit> top;
};

struct PromptLogprobs {
  int64_t num_top;
  std::vector<float> logprobs;  // [num_prompt_tokens], NaN for the first
  std::vector<TokenLogit> top;  // [num_prompt_tokens, num_top]; log probabilities, best first
};

class PromptResults {
 public:
  // Borrows the weights.
  PromptResults(Isa isa, const ModelShape& shape, const ModelLimits& limits, const ModelWeights& weights);

  // From the next step of this slot on. Throws std::invalid_argument for numbers out of range.
  void admit(int64_t slot, const PromptParams& params);
  void release(int64_t slot) { slots_[static_cast<size_t>(slot)] = {}; }
  // Throws std::invalid_argument where a checked plan lacks what the results of its slots depend on.
  void check(const StepInput& input);
  // Keeps what the rows of a step give, and returns those to score, valid until the next call. Mutates: the blocks.
  std::span<const ScoredRow> collect(const StepInput& input, std::span<const NanoBatch> nano_batches);

  // Of a slot that was admitted, whose whole prompt has been computed into `blocks`.
  PromptLogprobs logprobs(int64_t slot, std::span<const int32_t> blocks) const;
  std::vector<float> pooled(int64_t slot, std::span<const int32_t> blocks) const;

 private:
  struct Slot {
    PromptParams params;
    bool has_run = false;
    std::vector<float> last_state;
  };
  struct Block {
    std::vector<float> last_residual;
    std::array<float, kBlockSize> logprobs;
    std::vector<TokenLogit> top;  // [kBlockSize, num_logprobs]
    std::vector<double> state_sum;
  };

  bool wants_scores(int64_t slot) const { return slots_[static_cast<size_t>(slot)].params.num_logprobs >= 0; }
  Block& block(int32_t number) { return blocks_[static_cast<size_t>(number)]; }
  const Block& block(int32_t number) const { return blocks_[static_cast<size_t>(number)]; }
  bool keeps(int32_t block) const;
  void check_scored(const StepInput& input, size_t at) const;
  int64_t num_blocks_of(const Slot& slot, std::span<const int32_t> blocks) const;
  void keep_residuals(const BatchEntry& entry, const float* rows);
  void add_scored_rows(const StepInput& input, const BatchEntry& entry, const float* rows);
  void add_scored_row(const BatchEntry& entry, int64_t target, const float* residual);
  void pool(const BatchEntry& entry, const float* rows);

  Isa isa_;
  ModelShape shape_;
  int64_t max_num_seqs_;
  int64_t num_blocks_;
  const ModelWeights& weights_;
  bool is_used_ = false;
  std::vector<Slot> slots_;
  std::vector<Block> blocks_;  // made when the first request asks
  int64_t step_ = 0;
  std::vector<int64_t> kept_in_step_;  // by block: the latest step that keeps the state of its last token
  std::vector<float> state_;
  std::vector<ScoredRow> scored_;
};

}  // namespace blendserve
