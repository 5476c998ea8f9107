// A decoder-only transformer of the Llama family (Llama, Qwen2, Qwen3) and its step: tokens in, sampled tokens out.
// A step goes through the layers (layers.h), as a whole or as two nano-batches that overlap, and through the head
// (head.h). Planning, KV block ownership and weight files are elsewhere.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "counters.h"
#include "head.h"
#include "kv_cache.h"
#include "layers.h"
#include "nano_batch.h"
#include "ops/sample.h"
#include "overlap.h"
#include "prompt_results.h"
#include "shape.h"
#include "threads.h"
#include "trace.h"
#include "weights.h"
#include "workspace.h"

namespace blendserve {

// Which tokens may come next in sampled rows: `row_of`[i] is the mask of sampled row i, -1 where all may; none at all
// where it is empty. Every mask has `num_words` words of kMaskBits tokens each.
struct TokenMasks {
  std::span<const int32_t> row_of;
  const int32_t* words = nullptr;
  int64_t num_rows = 0;
  int64_t num_words = 0;
};

class Model {
 public:
  // Throws std::invalid_argument for numbers out of range and for weights that do not fit the shape or differ in
  // format.
  Model(Isa isa, const ModelShape& shape, const ModelLimits& limits, ModelWeights weights, int num_threads);

  void admit(int64_t slot, SamplingParams params, const PromptParams& prompt = {});
  void release(int64_t slot);
  // From the next step on. Allocates.
  void set_overlap(const OverlapOptions& overlap);
  // Runs a step up to the rows that are sampled; returns how many these are. `sample` must follow, while the plan's
  // arrays stand. Mutates: the KV cache. Throws std::invalid_argument where the plan does not fit the limits, before
  // anything has run.
  int64_t forward(const StepInput& input);
  // Samples those rows, each among the tokens of its mask; results in the order of the plan's sampled entries, valid
  // until the next call. Throws std::invalid_argument where the masks do not fit.
  std::span<const Sample> sample(const TokenMasks& masks = {});
  // Both, without masks.
  std::span<const Sample> step(const StepInput& input) {
    forward(input);
    return sample();
  }
  // What requests asked of their prompts; of slots that were admitted and not released.
  const PromptResults& prompt_results() const { return prompt_results_; }
  // Whether attention reads the KV of a prefix that sequences share once per step (so at first) or for each of them.
  // Changes time, never tokens.
  void read_shared_once() { layers_.read_shared_once(); }
  void read_apart() { layers_.read_apart(); }
  // Whether the ops between two attentions run one after the other on all rows, never on blocks of rows (row_blocks.h).
  // Changes time, never tokens.
  void run_ops_apart() { layers_.run_ops_apart(); }
  bool was_in_blocks() const { return layers_.is_in_blocks(); }  // the last step
  // Logits after every token of one sequence: [tokens.size(), vocab_size]. Uses KV memory of its own.
  void logits(std::span<const int32_t> tokens, float* out);

  Isa isa() const { return weights_.format().isa; }
  Dtype dtype() const { return weights_.format().dtype; }
  KvDtype kv_dtype() const { return limits_.kv_dtype; }
  const ModelShape& shape() const { return shape_; }
  int num_threads() const { return team_.num_threads(); }
  int64_t num_weight_bytes() const { return weights_.num_bytes(); }
  int64_t num_kv_bytes() const { return cache_.num_bytes(); }
  int64_t num_workspace_bytes() const { return workspace_.num_bytes() + layers_.num_bytes(); }
  const StepCounters& counters() const { return counters_; }
  // Spans of tiles by worker, of the steps since it was started; `op` is an Op, `layer` -1 outside of layers.
  TraceRecorder& trace() { return trace_; }

 private:
  void check_masks(const TokenMasks& masks) const;
  void check_tokens_of_penalties(const StepInput& input) const;
  void gather_sampled();

  ModelShape shape_;
  ModelLimits limits_;
  ModelWeights weights_;
  ThreadTeam team_;
  TraceRecorder trace_;
  KvCache cache_;
  Workspace workspace_;
  NanoBatchSplit split_;
  Layers layers_;
  Head head_;
  PromptResults prompt_results_;
  OverlapOptions overlap_;
  WorkRates work_rates_;
  StepCounters counters_;
  std::vector<SamplingParams> params_by_slot_;
  std::vector<HeadRow> head_rows_;
  std::span<const ScoredRow> scored_;  // of the step that ran last
  bool is_split_ = false;
  std::vector<Sample> samples_;
};

}  // namespace blendserve
