// A decoder-only transformer of the Llama family (Llama, Qwen2, Qwen3) and its step: tokens in, sampled tokens out.
// Every op of a step is a number of tiles and a function of a tile's index. A step runs as one chain of ops or, with
// overlap, as two nano-batches side by side (pipeline.h).
// Planning, KV block ownership and weight files are elsewhere.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "batch.h"
#include "kv_cache.h"
#include "nano_batch.h"
#include "ops/attention.h"
#include "ops/matmul.h"
#include "ops/sample.h"
#include "overlap.h"
#include "pipeline.h"
#include "tensor.h"
#include "threads.h"
#include "trace.h"

namespace blendserve {

struct ModelShape {
  int64_t vocab_size;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t num_layers;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float rms_norm_eps;

  int64_t group() const { return num_heads / num_kv_heads; }
  // Heads are stored head_stride() apart, the rest of each is zero.
  int64_t head_stride() const { return round_up(head_dim, kHeadMultiple); }
  int64_t q_width() const { return num_heads * head_stride(); }
  int64_t kv_width() const { return num_kv_heads * head_stride(); }
  int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
};

// Matrices are [outputs, inputs]; heads are padded to head_stride() in the outputs of qkv and the inputs of o.
struct LayerWeights {
  PackedMatrix qkv, o, gate_up, down;
  std::vector<float> input_norm, post_attention_norm;
  std::vector<float> qkv_bias, q_norm, k_norm;  // empty where the architecture has none
};

struct ModelWeights {
  PackedMatrix lm_head;
  Buffer<uint16_t> embedding;  // bf16 [vocab_size, hidden_size]; empty where it is read from lm_head
  std::vector<float> norm;
  std::vector<double> inverse_frequencies;  // [head_dim / 2], radians per position
  std::vector<LayerWeights> layers;
};

enum class Op {
  kEmbed,
  kNorm,
  kQkv,
  kRotate,
  kAttention,
  kPackAttention,
  kOutput,
  kGateUp,
  kActivate,
  kDown,
  kHeadNorm,
  kHead,
  kSample
};
inline constexpr int kNumOps = static_cast<int>(Op::kSample) + 1;
std::string_view op_name(Op op);

// Ops of a chain: one kEmbed, then the others once per layer.
enum class Stage {
  kEmbed,
  kInputNorm,
  kQkv,
  kRotate,
  kAttendCompute,
  kAttendMemory,
  kMerge,
  kPackAttention,
  kOutput,
  kPostNorm,
  kGateUp,
  kActivate,
  kDown
};
inline constexpr int64_t kStagesPerLayer = static_cast<int64_t>(Stage::kDown);  // all but kEmbed

// Work since the model was made. `*_bytes` count what must come from memory: weights once per step, KV once per
// sequence, that of a prefix that sequences read together once for all of them. `op_s` is the time from an op's
// beginning to its end: where nano-batches overlap, ops of both count.
struct StepCounters {
  int64_t num_steps = 0;
  int64_t num_overlapped_steps = 0;
  int64_t num_tokens = 0;
  double matmul_flop = 0.0;
  double attention_flop = 0.0;
  double weight_bytes = 0.0;
  double kv_bytes = 0.0;
  std::array<double, kNumOps> op_s = {};
};

struct ModelLimits {
  int64_t max_num_seqs;
  int64_t max_num_batched_tokens;
  int64_t max_model_len;
  int64_t num_blocks;
};

// What a nano-batch works on: its rows of the step, and where its activations are.
struct NanoBatch {
  NanoBatch(const BatchLimits& limits, const AttentionCut& cut, int64_t partial_floats)
      : batch(limits, cut), partials(batch.max_partials() * partial_floats) {}

  int64_t num_rows() const { return static_cast<int64_t>(batch.rows().size()); }

  Batch batch;
  Buffer<float> partials;  // of split sequences
  float* residual = nullptr;
  float* qkv = nullptr;
  float* gate_up = nullptr;
  uint8_t* packed = nullptr;
  MatmulGrid grid = {};  // of the matmul at hand
  std::chrono::steady_clock::time_point started;
  std::array<double, kNumOps> op_s = {};
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

class Model : private Chains {
 public:
  // Throws std::invalid_argument for weights that do not fit the shape or differ in format.
  Model(Isa isa, const ModelShape& shape, const ModelLimits& limits, ModelWeights weights, int num_threads,
        const OverlapOptions& overlap = {});

  void admit(int64_t slot, SamplingParams params);
  void release(int64_t slot);
  // From the next step on. Allocates.
  void set_overlap(const OverlapOptions& overlap);
  // Runs one step; results in the order of the plan's sampled entries, valid until the next call. Mutates: the KV
  // cache. Throws std::invalid_argument where the plan does not fit the limits, before anything has run.
  std::span<const Sample> step(const StepInput& input);
  // Whether attention reads the KV of a prefix that sequences share once per step (so at first) or for each of them.
  // Changes time, never tokens.
  void read_shared_once() {
    for (NanoBatch& nano : nano_batches_) nano.batch.read_shared_once();
  }
  void read_apart() {
    for (NanoBatch& nano : nano_batches_) nano.batch.read_apart();
  }
  // Logits after every token of one sequence: [tokens.size(), vocab_size]. Uses KV memory of its own.
  void logits(std::span<const int32_t> tokens, float* out);

  Isa isa() const { return isa_; }
  Dtype dtype() const { return format_.dtype; }
  const ModelShape& shape() const { return shape_; }
  int num_threads() const { return team_.num_threads(); }
  int64_t num_weight_bytes() const;
  int64_t num_kv_bytes() const { return cache_.num_bytes(); }
  int64_t num_workspace_bytes() const;
  const StepCounters& counters() const { return counters_; }
  // Spans of tiles by worker, of the steps since it was started; `op` is an Op, `layer` -1 outside of layers.
  TraceRecorder& trace() { return trace_; }

 private:
  // Chains: the layers of a nano-batch.
  int64_t num_ops(int chain) const override;
  int64_t num_awaited_ops(int chain, int64_t op) const override;
  OpTiles begin(int chain, int64_t op) override;
  int64_t num_fetched_runs(int chain, int64_t op, int64_t tile) const override;
  int64_t list_next_runs(int chain, int64_t op, int64_t tile, const uint16_t** runs, int64_t max_runs) const override;
  void run(int chain, int64_t op, int64_t tile, int worker, PrefetchRuns* runs) override;
  void end(int chain, int64_t op) override;
  int64_t list_runs(int chain, int64_t op, int64_t tile, const uint16_t** runs, int64_t max_runs) const override;

  // Runs all layers on the parts that the split has.
  void forward(const StepInput& input, KvCache& cache, int num_nano_batches);
  void run_tile(int chain, int64_t op, int64_t tile, int worker, PrefetchRuns* runs);
  int64_t list_block_runs(const uint16_t* head, const int32_t* blocks, int64_t begin, int64_t end,
                          const uint16_t** runs, int64_t max_runs) const;
  void place(NanoBatch& nano, int64_t first_row);
  void embed(NanoBatch& nano, int64_t panel);
  void norm_and_pack(NanoBatch& nano, const std::vector<float>& weight, int64_t panel, int worker);
  void rotate_and_cache(NanoBatch& nano, int64_t layer, int64_t tile);
  void attend(NanoBatch& nano, int64_t layer, const AttentionTask& task, int worker);
  void attend_group(NanoBatch& nano, int64_t layer, const AttentionTask& task, float* scratch);
  void merge_segments(NanoBatch& nano, int64_t layer, const AttentionSplit& split);
  void pack_attention(NanoBatch& nano, int64_t panel);
  void activate_and_pack(NanoBatch& nano, int64_t panel, int worker);
  RowPanel row_panel(int worker, int64_t width);
  void pack_panel(const RowPanel& rows, int64_t num_rows, int64_t panel, uint8_t* packed) const;
  const PackedMatrix* matrix_of(int64_t op) const;  // null where the op is no matmul
  OpTiles cut_matmul(NanoBatch& nano, const PackedMatrix& w, Stage stage);
  AttentionTile attention_of(const NanoBatch& nano, const AttentionTask& task, int64_t layer) const;
  const AttentionTask& memory_task(const NanoBatch& nano, int64_t tile) const;

  // Logits of some rows of the residual, at most kHeadRows.
  void head(std::span<const float* const> rows);
  void gather_sampled();
  void sample_entries(std::span<const BatchEntry* const> entries, std::span<const float* const> rows, Sample* samples);
  void run(Op op, int64_t num_tiles, TileFn fn);
  void count_step(int64_t num_head_rows);
  int64_t num_layer_bytes() const;
  void check_weights() const;
  void make_rotary_tables();

  Isa isa_;
  ModelShape shape_;
  ModelLimits limits_;
  ModelWeights weights_;
  MatmulFormat format_;  // of all matrices
  int64_t l2_bytes_;
  ThreadTeam team_;
  OverlapOptions overlap_;
  Pipeline pipeline_;
  KvCache cache_;
  KvCache* step_cache_ = nullptr;  // of the step at hand
  NanoBatchSplit split_;
  std::array<NanoBatch, kNumChains> nano_batches_;
  int num_nano_batches_ = 1;  // of the step at hand
  WorkRates work_rates_;
  TraceRecorder trace_;
  StepCounters counters_;
  std::vector<SamplingParams> params_by_slot_;
  std::vector<Sample> samples_;
  std::vector<const float*> head_rows_;
  std::vector<const BatchEntry*> head_entries_;
  Buffer<float> cosine_, sine_;  // [max_model_len, head_dim / 2]
  // Rows of one step, those of the second nano-batch after those of the first.
  Buffer<float> residual_;  // [rows, hidden_size]
  Buffer<float> qkv_;       // [rows, qkv_width]; attention leaves its output in place of q
  Buffer<float> gate_up_;   // [rows, 2 * intermediate_size]
  Buffer<uint8_t> packed_;  // the input of the matmul at hand
  Buffer<float> logits_;    // [kHeadRows, vocab_size]
  int64_t panel_floats_;
  Buffer<float> panels_;             // per worker: a panel of rows on their way into packed_
  Buffer<float> attention_scratch_;  // per worker
  std::vector<SampleScratch> sample_scratch_;
};

}  // namespace blendserve
