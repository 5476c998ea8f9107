#include "head.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

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

void check_masks(const TokenMasks& masks, size_t num_rows, int64_t vocab_size) {
  if (masks.row_of.empty()) return;
  if (masks.row_of.size() != num_rows) {
    throw std::invalid_argument("there are masks for " + std::to_string(masks.row_of.size()) + " rows; the step has " +
                                std::to_string(num_rows));
  }
  if (masks.num_words * kMaskBits < vocab_size) {
    throw std::invalid_argument("a mask has " + std::to_string(masks.num_words) +
                                " words, which is too few for a vocabulary of " + std::to_string(vocab_size));
  }
  for (const int32_t row : masks.row_of) {
    if (row < masks.num_rows) continue;
    throw std::invalid_argument("mask " + std::to_string(row) + " does not exist; there are " +
                                std::to_string(masks.num_rows));
  }
}

void Head::sample(std::span<const HeadRow> rows, const SampleCheck& check, Sample* samples, OpSeconds& op_s) {
  for (size_t begin = 0; begin < rows.size(); begin += kHeadRows) {
    const auto some = rows.subspan(begin, std::min<size_t>(kHeadRows, rows.size() - begin));
    multiply(static_cast<int64_t>(some.size()), [&](int64_t i) { return some[static_cast<size_t>(i)].residual; }, op_s);
    run(Op::kSample, static_cast<int64_t>(some.size()), op_s, [&](int64_t i, int worker) {
      const HeadRow& row = some[static_cast<size_t>(i)];
      samples[begin + static_cast<size_t>(i)] = sample_here(row, i, row.mask, worker);
    });
    if (!check) continue;
    const TokenMasks masks = check(begin, {samples + begin, some.size()});
    check_masks(masks, some.size(), shape_.vocab_size);
    again_.clear();
    for (size_t i = 0; i < some.size(); ++i) {
      if (masks.mask_of(i) != nullptr) again_.push_back(static_cast<int64_t>(i));
    }
    run(Op::kSample, static_cast<int64_t>(again_.size()), op_s, [&](int64_t at, int worker) {
      const int64_t i = again_[static_cast<size_t>(at)];
      const auto row = static_cast<size_t>(i);
      samples[begin + row] = sample_here(some[row], i, masks.mask_of(row), worker);
    });
  }
}

Sample Head::sample_here(const HeadRow& row, int64_t i, const int32_t* mask, int worker) {
  return sample_row(isa_, row_logits(i), *row.params, row.tokens, scratch_[static_cast<size_t>(worker)], mask);
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
