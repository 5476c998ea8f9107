// The end of a step: logits of chosen rows, and the tokens that are sampled from them.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "ops/sample.h"
#include "prompt_results.h"
#include "shape.h"
#include "stages.h"
#include "threads.h"
#include "trace.h"
#include "weights.h"
#include "workspace.h"

namespace blendserve {

// A row of the residual, and what its next token depends on.
struct HeadRow {
  const float* residual;
  const SamplingParams* params;
  std::span<const int32_t> tokens;  // of the sequence, up to this row
  const int32_t* mask = nullptr;    // which tokens may come, see sample_row; null: all
};

// Which tokens may come next in sampled rows: `row_of`[i] is the mask of sampled row i, -1 where all may; none at all
// where it is empty. Every mask has `num_words` words of kMaskBits tokens each.
struct TokenMasks {
  std::span<const int32_t> row_of;
  const int32_t* words = nullptr;
  int64_t num_rows = 0;
  int64_t num_words = 0;

  const int32_t* mask_of(size_t i) const {
    return row_of.empty() || row_of[i] < 0 ? nullptr : words + row_of[i] * num_words;
  }
};

// Throws std::invalid_argument where masks do not fit rows or a vocabulary.
void check_masks(const TokenMasks& masks, size_t num_rows, int64_t vocab_size);

// Looks at the samples of rows that follow each other from `first`, and gives masks to those that have to be sampled
// again. Masks are borrowed until the next call.
using SampleCheck = std::function<TokenMasks(size_t first, std::span<const Sample> samples)>;

class Head {
 public:
  // Borrows everything but the numbers.
  Head(Isa isa, const ModelShape& shape, const ModelWeights& weights, Workspace& workspace, ThreadTeam& team,
       TraceRecorder& trace);

  // Writes one sample for each row; those that `check` (where there is one) gives a mask are sampled again under it. A
  // row to which that may happen has no mask before and no allowed tokens. Mutates: `op_s` by what each op took. Throws
  // what `check` throws, and std::invalid_argument for masks that do not fit.
  void sample(std::span<const HeadRow> rows, const SampleCheck& check, Sample* samples, OpSeconds& op_s);
  // Writes the log probabilities that the rows ask for.
  void score(std::span<const ScoredRow> rows, OpSeconds& op_s);
  // Writes logits [num_rows, vocab_size] of rows that follow each other.
  void logits(const float* residual, int64_t num_rows, float* out, OpSeconds& op_s);

 private:
  std::span<float> row_logits(int64_t i) {
    return {workspace_.logits() + i * shape_.vocab_size, static_cast<size_t>(shape_.vocab_size)};
  }
  // Fills the workspace's logits for at most kHeadRows rows.
  template <class RowOf>
  void multiply(int64_t num_rows, RowOf row_of, OpSeconds& op_s);
  void run(Op op, int64_t num_tiles, OpSeconds& op_s, TileFn fn);
  // Samples row i of those whose logits stand in the workspace.
  Sample sample_here(const HeadRow& row, int64_t i, const int32_t* mask, int worker);

  Isa isa_;
  ModelShape shape_;
  const ModelWeights& weights_;
  Workspace& workspace_;
  ThreadTeam& team_;
  TraceRecorder& trace_;
  int64_t l2_bytes_;
  std::vector<SampleScratch> scratch_;  // by worker
  std::vector<int64_t> again_;          // rows that are sampled again
};

}  // namespace blendserve
