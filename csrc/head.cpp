#include "head.h"

#include <algorithm>
#include <chrono>

#include "layer_ops.h"
#include "machine.h"
#include "ops/pointwise.h"

namespace blendserve {

Head::Head(Isa isa, const ModelShape& shape, const ModelWeights& weights, Workspace& workspace, ThreadTeam& team,
           TraceRecorder& trace)
    : isa_(isa),
      shape_(shape),
      weights_(weights),
      workspace_(workspace),
      team_(team),
      trace_(trace),
      l2_bytes_(l2_bytes()) {
  for (int i = 0; i < team.num_threads(); ++i) scratch_.emplace_back(shape.vocab_size);
}

void Head::sample(std::span<const HeadRow> rows, Sample* samples, OpSeconds& op_s) {
  for (size_t begin = 0; begin < rows.size(); begin += kHeadRows) {
    const auto some = rows.subspan(begin, std::min<size_t>(kHeadRows, rows.size() - begin));
    multiply(static_cast<int64_t>(some.size()), [&](int64_t i) { return some[static_cast<size_t>(i)].residual; }, op_s);
    run(Op::kSample, static_cast<int64_t>(some.size()), op_s, [&](int64_t i, int worker) {
      const HeadRow& row = some[static_cast<size_t>(i)];
      samples[begin + static_cast<size_t>(i)] =
          sample_row(isa_, row_logits(i), *row.params, row.tokens, scratch_[static_cast<size_t>(worker)], row.mask);
    });
  }
}

void Head::score(std::span<const ScoredRow> rows, OpSeconds& op_s) {
  for (size_t begin = 0; begin < rows.size(); begin += kHeadRows) {
    const auto some = rows.subspan(begin, std::min<size_t>(kHeadRows, rows.size() - begin));
    multiply(static_cast<int64_t>(some.size()), [&](int64_t i) { return some[static_cast<size_t>(i)].residual; }, op_s);
    run(Op::kSample, static_cast<int64_t>(some.size()), op_s, [&](int64_t i, int worker) {
      const ScoredRow& row = some[static_cast<size_t>(i)];
      score_row(isa_, row_logits(i), row.token, *row.logprob, row.top, scratch_[static_cast<size_t>(worker)]);
    });
  }
}

void Head::logits(const float* residual, int64_t num_rows, float* out, OpSeconds& op_s) {
  for (int64_t begin = 0; begin < num_rows; begin += kHeadRows) {
    const int64_t count = std::min(kHeadRows, num_rows - begin);
    multiply(count, [&](int64_t i) { return residual + (begin + i) * shape_.hidden_size; }, op_s);
    std::copy_n(workspace_.logits(), count * shape_.vocab_size, out + begin * shape_.vocab_size);
  }
}

template <class RowOf>
void Head::multiply(int64_t num_rows, RowOf row_of, OpSeconds& op_s) {
  const int64_t hidden = shape_.hidden_size;
  run(Op::kHeadNorm, num_panels(num_rows), op_s, [&](int64_t panel, int worker) {
    const RowRange range = panel_rows(panel, num_rows);
    const RowPanel normed = workspace_.panel(worker, hidden);
    for (int64_t row = range.begin; row < range.end; ++row) {
      rms_norm_row(isa_, row_of(row), weights_.norm.data(), shape_.rms_norm_eps, hidden, normed.row(row - range.begin));
    }
    workspace_.pack(normed, range.end - range.begin, panel, workspace_.packed());
  });
  const PackedMatrix& w = weights_.lm_head;
  const MatmulGrid grid = suggest_grid(w.format(), num_rows, w.n(), w.k(), team_.num_threads(), l2_bytes_);
  run(Op::kHead, grid.size(), op_s, [&](int64_t tile, int) {
    matmul_tile(workspace_.packed(), w, grid.tile(tile), nullptr, false, workspace_.logits(), shape_.vocab_size);
  });
}

void Head::run(Op op, int64_t num_tiles, OpSeconds& op_s, TileFn fn) {
  const auto start = std::chrono::steady_clock::now();
  if (trace_.is_on()) {
    team_.run(num_tiles, [&](int64_t tile, int worker) {
      const int64_t begin_ns = TraceRecorder::now_ns();
      fn(tile, worker);
      trace_.record(worker, static_cast<int32_t>(op), -1, 0, begin_ns, TraceRecorder::now_ns());
    });
  } else {
    team_.run(num_tiles, fn);
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  op_s[static_cast<size_t>(op)] += elapsed.count();
}

}  // namespace blendserve
