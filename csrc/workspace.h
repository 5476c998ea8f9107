// The buffers of a step, and the nano-batches that share them. Allocated once, for the largest step.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <vector>

#include "batch.h"
#include "kv_cache.h"
#include "ops/matmul.h"
#include "shape.h"
#include "stages.h"
#include "tensor.h"

namespace blendserve {

using OpSeconds = std::array<double, kNumOps>;

// Rows whose logits exist at the same time: a multiple of the kernels' 12 rows, enough of them that reading the head's
// weights costs a small part of multiplying by them, few enough that logits stay in tens of megabytes.
inline constexpr int64_t kHeadRows = 8 * kRowPanel;

// What a nano-batch works on: its rows of the step, and where its activations are.
struct NanoBatch {
  NanoBatch(const BatchLimits& limits, const AttentionCut& cut, int64_t partial_floats);

  int64_t num_rows() const { return static_cast<int64_t>(batch.rows().size()); }

  Batch batch;
  Buffer<float> partials;  // of split sequences
  KvCache* cache = nullptr;
  float* residual = nullptr;
  float* qkv = nullptr;
  float* gate_up = nullptr;
  uint8_t* packed = nullptr;
  MatmulGrid grid = {};  // of the matmul at hand
  std::chrono::steady_clock::time_point started;
  OpSeconds op_s = {};
};

// A panel of rows that stays in cache between an op and its packing.
struct RowPanel {
  // An odd number of cache lines: rows a multiple of 4 KiB apart would share few cache sets.
  static constexpr int64_t stride_of(int64_t width) { return (div_up(width, 16) | 1) * 16; }

  float* row(int64_t i) const { return data + i * stride; }

  float* data;
  int64_t width;
  int64_t stride;
};

class Workspace {
 public:
  Workspace(const ModelShape& shape, const ModelLimits& limits, MatmulFormat format, int num_threads);

  // Points a nano-batch to its rows, which begin at `first_row` of the step.
  void place(NanoBatch& nano, int64_t first_row);
  RowPanel panel(int worker, int64_t width);
  // Packs a panel's first `num_rows` rows as panel number `index` of `packed`.
  void pack(const RowPanel& panel, int64_t num_rows, int64_t index, uint8_t* packed) const;

  float* residual() { return residual_.data(); }
  uint8_t* packed() { return packed_.data(); }
  float* logits() { return logits_.data(); }
  float* attention_scratch(int worker) { return attention_scratch_.data() + worker * attention_floats_; }
  int64_t num_bytes() const;

 private:
  ModelShape shape_;
  MatmulFormat format_;
  int64_t widest_;  // input of a matmul in layers
  int64_t panel_floats_;
  int64_t attention_floats_;
  // Rows of one step, those of the second nano-batch after those of the first.
  Buffer<float> residual_;  // [rows, hidden_size]
  Buffer<float> qkv_;       // [rows, qkv_width]; attention leaves its output in place of q
  Buffer<float> gate_up_;   // [rows, 2 * intermediate_size]
  Buffer<uint8_t> packed_;  // the input of the matmul at hand
  Buffer<float> logits_;    // [kHeadRows, vocab_size]
  // Per worker.
  Buffer<float> panels_;
  Buffer<float> attention_scratch_;
};

}  // namespace blendserve
