// The end of a step: logits of chosen rows, and the tokens that are sampled from them.
#pragma once

#include <cstdint>
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

class Head {
 public:
  // Borrows everything but the numbers.
  Head(Isa isa, const ModelShape& shape, const ModelWeights& weights, Workspace& workspace, ThreadTeam& team,
       TraceRecorder& trace);

  // Writes one sample for each row. Mutates: `op_s` by what each op took.
  void sample(std::span<const HeadRow> rows, Sample* samples, OpSeconds& op_s);
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

  Isa isa_;
  ModelShape shape_;
  const ModelWeights& weights_;
  Workspace& workspace_;
  ThreadTeam& team_;
  TraceRecorder& trace_;
  int64_t l2_bytes_;
  std::vector<SampleScratch> scratch_;  // by worker
};

}  // namespace blendserve
