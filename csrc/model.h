// A decoder-only transformer of the Llama family (Llama, Qwen2, Qwen3) and its step: tokens in, sampled tokens out.
// Every op of a step is a number of tiles and a function of a tile's index; here they run op by op on all threads.
// Planning, KV block ownership and weight files are elsewhere.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "batch.h"
#include "kv_cache.h"
#include "ops/attention.h"
#include "ops/matmul.h"
#include "ops/sample.h"
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
inline constexpr int kNumOps = 13;
std::string_view op_name(Op op);

// Work since the model was made. `*_bytes` count what must come from memory: weights once per step, KV once per
// sequence, that of a prefix that sequences read together once for all of them.
struct StepCounters {
  int64_t num_steps = 0;
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

class Model {
 public:
  // Throws std::invalid_argument for weights that do not fit the shape or differ in format.
  Model(Isa isa, const ModelShape& shape, const ModelLimits& limits, ModelWeights weights, int num_threads);

  void admit(int64_t slot, SamplingParams params);
  void release(int64_t slot);
  // Runs one step; results in the order of the plan's sampled entries, valid until the next call. Mutates: the KV
  // cache. Throws std::invalid_argument where the plan does not fit the limits, before anything has run.
  std::span<const Sample> step(const StepInput& input);
  // Whether attention reads the KV of a prefix that sequences share once per step (so at first) or for each of them.
  // Changes time, never tokens.
  void read_shared_once() { batch_.read_shared_once(); }
  void read_apart() { batch_.read_apart(); }
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
  void forward(KvCache& cache);
  void embed();
  void norm_and_pack(const std::vector<float>& weight);
  void rotate_and_cache(int64_t layer, KvCache& cache);
  void attend(int64_t layer, const KvCache& cache);
  void pack_attention();
  void activate_and_pack();
  void multiply(Op op, int64_t num_rows, const PackedMatrix& w, const std::vector<float>& bias, bool accumulate,
                float* y, int64_t ldy);
  // Logits of some rows of the batch, at most kHeadRows.
  void head(std::span<const int64_t> rows);
  void sample_entries(std::span<const int32_t> entries, Sample* samples);
  void run(Op op, int64_t num_tiles, TileFn fn);
  void count_step(int64_t num_head_rows);
  int64_t num_layer_bytes() const;
  void check_weights() const;
  void make_rotary_tables();

  AttentionTile attention_of(const AttentionTask& task, int64_t layer, const KvCache& cache);
  void attend_group(const AttentionTask& task, int64_t layer, const KvCache& cache, float* scratch);

  Isa isa_;
  ModelShape shape_;
  ModelLimits limits_;
  ModelWeights weights_;
  MatmulFormat format_;  // of all matrices
  int64_t l2_bytes_;
  ThreadTeam team_;
  KvCache cache_;
  Batch batch_;
  TraceRecorder trace_;
  int32_t layer_ = -1;  // being run, -1: none
  StepCounters counters_;
  std::vector<SamplingParams> params_by_slot_;
  std::vector<Sample> samples_;
  std::vector<int64_t> head_rows_;
  Buffer<float> cosine_, sine_;  // [max_model_len, head_dim / 2]
  // Rows of one step.
  Buffer<float> residual_;           // [rows, hidden_size]
  Buffer<float> normed_;             // [rows, hidden_size]
  Buffer<float> qkv_;                // [rows, qkv_width]; attention leaves its output in place of q
  Buffer<float> gate_up_;            // [rows, 2 * intermediate_size]
  Buffer<uint8_t> packed_;           // the input of the matmul at hand
  Buffer<float> logits_;             // [kHeadRows, vocab_size]
  Buffer<float> partials_;           // of split sequences
  Buffer<float> attention_scratch_;  // per worker
  std::vector<SampleScratch> sample_scratch_;
};

}  // namespace blendserve
