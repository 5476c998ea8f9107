#include "model.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <string>

#include "ops/pointwise.h"

namespace blendserve {
namespace {

// Rows whose logits exist at the same time: a multiple of the kernels' 12 rows, enough of them that reading the head's
// weights costs a small part of multiplying by them, few enough that logits stay in tens of megabytes.
constexpr int64_t kHeadRows = 8 * kRowPanel;
// Of a step and worker. Ops that run one after the other leave a few in each layer; side by side they alternate tile
// by tile: some 23,000 in 30 layers beside 256 decodes.
constexpr int64_t kMaxTraceSpans = 1 << 17;
constexpr int64_t kFallbackL2Bytes = 512 * 1024;

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return kFallbackL2Bytes;
}

void check_size(const char* what, int64_t actual, int64_t expected) {
  if (actual == expected) return;
  throw std::invalid_argument(std::string(what) + " has size " + std::to_string(actual) + ", expected " +
                              std::to_string(expected));
}

void check_matrix(const char* what, const PackedMatrix& matrix, MatmulFormat format, int64_t n, int64_t k) {
  if (matrix.isa() != format.isa || matrix.dtype() != format.dtype) {
    throw std::invalid_argument(std::string(what) + " is packed as " + std::string(dtype_name(matrix.dtype())) +
                                " for " + std::string(isa_name(matrix.isa())) + ", the model as " +
                                std::string(dtype_name(format.dtype)) + " for " + std::string(isa_name(format.isa)));
  }
  check_size(what, matrix.n(), n);
  check_size(what, matrix.k(), k);
}

void check_vector(const char* what, const std::vector<float>& vector, int64_t n) {
  check_size(what, static_cast<int64_t>(vector.size()), n);
}

ModelShape checked(const ModelShape& shape) {
  if (shape.num_kv_heads < 1 || shape.num_heads % shape.num_kv_heads != 0) {
    throw std::invalid_argument(std::to_string(shape.num_heads) + " query heads cannot share " +
                                std::to_string(shape.num_kv_heads) + " KV heads evenly");
  }
  if (shape.head_dim < 2 || shape.head_dim % 2 != 0) {
    throw std::invalid_argument("the head size is " + std::to_string(shape.head_dim) + "; it must be even");
  }
  return shape;
}

BatchLimits batch_limits(const ModelShape& shape, const ModelLimits& limits) {
  return {limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len, limits.num_blocks,
          shape.vocab_size};
}

NanoBatch nano_batch(const ModelShape& shape, const ModelLimits& limits, int num_threads) {
  return {batch_limits(shape, limits),
          {shape.num_kv_heads, shape.group(), num_threads},
          attention_partial_floats(shape.group(), shape.head_stride())};
}

WorkRates work_rates(const ModelShape& shape) {
  const int64_t parameters =
      shape.num_layers * shape.hidden_size * (shape.qkv_width() + shape.q_width() + 3 * shape.intermediate_size);
  const auto layers = static_cast<double>(shape.num_layers);
  return {.flop_per_row = 2.0 * static_cast<double>(parameters),
          .flop_per_attended_token = 4.0 * layers * static_cast<double>(shape.q_width()),
          .kv_bytes_per_token = 4.0 * layers * static_cast<double>(shape.kv_width()),
          .weight_bytes = 2.0 * static_cast<double>(parameters)};
}

}  // namespace

std::string_view op_name(Op op) {
  constexpr std::string_view kNames[] = {"embed",   "norm",     "qkv",  "rotate",    "attention", "pack",  "output",
                                         "gate_up", "activate", "down", "head_norm", "head",      "sample"};
  static_assert(std::size(kNames) == kNumOps);
  return kNames[static_cast<int>(op)];
}

Model::Model(Isa isa, const ModelShape& shape, const ModelLimits& limits, ModelWeights weights, int num_threads,
             const OverlapOptions& overlap)
    : isa_(isa),
      shape_(checked(shape)),
      limits_(limits),
      weights_(std::move(weights)),
      format_(isa, weights_.lm_head.dtype()),
      l2_bytes_(l2_bytes()),
      team_(num_threads),
      overlap_(overlap),
      pipeline_(team_, {overlap.chunk_bytes, overlap.step_bytes, overlap.memory_lanes}),
      cache_(shape.num_layers, limits.num_blocks, shape.num_kv_heads, shape.head_stride()),
      split_(batch_limits(shape, limits)),
      nano_batches_{nano_batch(shape, limits, num_threads), nano_batch(shape, limits, num_threads)},
      work_rates_(work_rates(shape)),
      trace_(num_threads, kMaxTraceSpans) {
  check_weights();
  make_rotary_tables();
  work_rates_.weight_bytes = static_cast<double>(num_layer_bytes());
  // The second nano-batch begins at a row panel of its own.
  const int64_t rows = round_up(std::max(limits.max_num_batched_tokens, kHeadRows), kRowPanel) + kRowPanel;
  const int64_t widest = std::max({shape.hidden_size, shape.q_width(), shape.intermediate_size});
  residual_ = Buffer<float>(rows * shape.hidden_size);
  qkv_ = Buffer<float>(rows * shape.qkv_width());
  gate_up_ = Buffer<float>(rows * 2 * shape.intermediate_size);
  packed_ = Buffer<uint8_t>(activation_bytes(format_, rows, widest));
  logits_ = Buffer<float>(kHeadRows * shape.vocab_size);
  panel_floats_ = kRowPanel * RowPanel::stride_of(std::max(shape.hidden_size, shape.intermediate_size));
  panels_ = Buffer<float>(num_threads * panel_floats_);
  attention_scratch_ = Buffer<float>(num_threads * attention_scratch_floats(shape.group(), shape.head_stride()));
  params_by_slot_.resize(static_cast<size_t>(limits.max_num_seqs));
  samples_.resize(static_cast<size_t>(limits.max_num_seqs));
  head_rows_.reserve(static_cast<size_t>(std::max(limits.max_num_seqs, kHeadRows)));
  head_entries_.reserve(static_cast<size_t>(limits.max_num_seqs));
  for (int i = 0; i < num_threads; ++i) sample_scratch_.emplace_back(shape.vocab_size);
}

void Model::check_weights() const {
  const ModelShape& s = shape_;
  check_size("the list of layers", static_cast<int64_t>(weights_.layers.size()), s.num_layers);
  check_matrix("lm_head", weights_.lm_head, format_, s.vocab_size, s.hidden_size);
  if (weights_.embedding.size() > 0) check_size("embedding", weights_.embedding.size(), s.vocab_size * s.hidden_size);
  check_vector("norm", weights_.norm, s.hidden_size);
  check_size("inverse_frequencies", static_cast<int64_t>(weights_.inverse_frequencies.size()), s.head_dim / 2);
  for (const LayerWeights& layer : weights_.layers) {
    check_matrix("qkv", layer.qkv, format_, s.qkv_width(), s.hidden_size);
    check_matrix("o", layer.o, format_, s.hidden_size, s.q_width());
    check_matrix("gate_up", layer.gate_up, format_, 2 * s.intermediate_size, s.hidden_size);
    check_matrix("down", layer.down, format_, s.hidden_size, s.intermediate_size);
    check_vector("input_norm", layer.input_norm, s.hidden_size);
    check_vector("post_attention_norm", layer.post_attention_norm, s.hidden_size);
    if (!layer.qkv_bias.empty()) check_vector("qkv_bias", layer.qkv_bias, s.qkv_width());
    if (!layer.q_norm.empty()) check_vector("q_norm", layer.q_norm, s.head_dim);
    check_size("k_norm", static_cast<int64_t>(layer.k_norm.size()), static_cast<int64_t>(layer.q_norm.size()));
  }
}

void Model::make_rotary_tables() {
  const int64_t half = shape_.head_dim / 2;
  cosine_ = Buffer<float>(limits_.max_model_len * half);
  sine_ = Buffer<float>(limits_.max_model_len * half);
  for (int64_t position = 0; position < limits_.max_model_len; ++position) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * weights_.inverse_frequencies[static_cast<size_t>(i)];
      cosine_[position * half + i] = static_cast<float>(std::cos(angle));
      sine_[position * half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void Model::admit(int64_t slot, SamplingParams params) {
  if (slot < 0 || slot >= limits_.max_num_seqs) {
    throw std::invalid_argument("slot " + std::to_string(slot) + " does not exist; there are " +
                                std::to_string(limits_.max_num_seqs));
  }
  for (const auto& [token, bias] : params.logit_bias) {
    if (token < 0 || token >= shape_.vocab_size) throw std::invalid_argument("logit_bias of an unknown token");
  }
  std::erase_if(params.stop_token_ids, [&](int32_t token) { return token < 0 || token >= shape_.vocab_size; });
  params_by_slot_[static_cast<size_t>(slot)] = std::move(params);
}

void Model::set_overlap(const OverlapOptions& overlap) {
  if (overlap.chunk_bytes < 1 || overlap.tile_flop < 1 || overlap.step_bytes < 1 || overlap.step_bytes > 64) {
    throw std::invalid_argument("overlap needs chunk_bytes, tile_flop and step_bytes (at most 64) of 1 or more; got " +
                                std::to_string(overlap.chunk_bytes) + ", " + std::to_string(overlap.tile_flop) +
                                " and " + std::to_string(overlap.step_bytes));
  }
  overlap_ = overlap;
  pipeline_.set_options({overlap.chunk_bytes, overlap.step_bytes, overlap.memory_lanes});
}

void Model::release(int64_t slot) {
  if (slot >= 0 && slot < limits_.max_num_seqs) params_by_slot_[static_cast<size_t>(slot)] = {};
}

std::span<const Sample> Model::step(const StepInput& input) {
  if (input.num_slots > limits_.max_num_seqs) {
    throw std::invalid_argument("the plan's table has " + std::to_string(input.num_slots) +
                                " slots; the executor was made for " + std::to_string(limits_.max_num_seqs));
  }
  const StepWork work = split_.look_at(input);
  const bool is_split = overlap_pays(work, work_rates_, overlap_) && split_.split(input);
  if (!is_split) split_.keep_whole(input);
  forward(input, cache_, is_split ? 2 : 1);
  gather_sampled();
  const std::span<const float* const> rows = head_rows_;
  const std::span<const BatchEntry* const> entries = head_entries_;
  for (size_t begin = 0; begin < rows.size(); begin += kHeadRows) {
    const size_t count = std::min<size_t>(kHeadRows, rows.size() - begin);
    sample_entries(entries.subspan(begin, count), rows.subspan(begin, count), samples_.data() + begin);
  }
  count_step(static_cast<int64_t>(rows.size()));
  return {samples_.data(), rows.size()};
}

// Entries that are sampled, in the order of the plan: each nano-batch has its own in that order.
void Model::gather_sampled() {
  head_rows_.clear();
  head_entries_.clear();
  std::array<std::span<const int32_t>, kNumChains> left;
  for (size_t n = 0; n < kNumChains; ++n) left[n] = nano_batches_[n].batch.sampled_entries();
  const auto first_of = [&](size_t n) -> const BatchEntry& {
    return nano_batches_[n].batch.entries()[static_cast<size_t>(left[n].front())];
  };
  while (!left[0].empty() || !left[1].empty()) {
    const size_t n = left[0].empty() || (!left[1].empty() && first_of(1).index < first_of(0).index) ? 1 : 0;
    const BatchEntry& entry = first_of(n);
    head_entries_.push_back(&entry);
    head_rows_.push_back(nano_batches_[n].residual + (entry.first_row + entry.num_rows - 1) * shape_.hidden_size);
    left[n] = left[n].subspan(1);
  }
}

void Model::sample_entries(std::span<const BatchEntry* const> entries, std::span<const float* const> rows,
                           Sample* samples) {
  head(rows);
  run(Op::kSample, static_cast<int64_t>(entries.size()), [&](int64_t i, int worker) {
    const BatchEntry& entry = *entries[static_cast<size_t>(i)];
    const std::span<float> row = {logits_.data() + i * shape_.vocab_size, static_cast<size_t>(shape_.vocab_size)};
    const auto num_tokens = static_cast<size_t>(entry.first_position + entry.num_rows);
    samples[i] = sample_row(isa_, row, params_by_slot_[static_cast<size_t>(entry.slot)], {entry.token_ids, num_tokens},
                            sample_scratch_[static_cast<size_t>(worker)]);
  });
}

void Model::logits(std::span<const int32_t> tokens, float* out) {
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  const int64_t num_blocks = div_up(num_tokens, kBlockSize);
  if (num_blocks > limits_.num_blocks) throw std::invalid_argument("more tokens than the executor's KV memory holds");
  KvCache cache(shape_.num_layers, num_blocks, shape_.num_kv_heads, shape_.head_stride());
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
    forward(input, cache, 1);
    for (int64_t row = 0; row < count; row += kHeadRows) {
      const int64_t end = std::min<int64_t>(count, row + kHeadRows);
      head_rows_.clear();
      for (int64_t i = row; i < end; ++i) head_rows_.push_back(residual_.data() + i * shape_.hidden_size);
      head(head_rows_);
      std::copy_n(logits_.data(), (end - row) * shape_.vocab_size, out + (begin + row) * shape_.vocab_size);
    }
  }
}

int64_t Model::num_layer_bytes() const {
  int64_t bytes = 0;
  for (const LayerWeights& layer : weights_.layers) {
    bytes += layer.qkv.num_bytes() + layer.o.num_bytes() + layer.gate_up.num_bytes() + layer.down.num_bytes();
  }
  return bytes;
}

int64_t Model::num_weight_bytes() const {
  return num_layer_bytes() + weights_.lm_head.num_bytes() + weights_.embedding.num_bytes();
}

int64_t Model::num_workspace_bytes() const {
  int64_t bytes = packed_.num_bytes();
  for (const NanoBatch& nano : nano_batches_) bytes += nano.partials.num_bytes();
  for (const auto* buffer : {&residual_, &qkv_, &gate_up_, &logits_, &panels_, &attention_scratch_, &cosine_, &sine_}) {
    bytes += buffer->num_bytes();
  }
  return bytes;
}

void Model::count_step(int64_t num_head_rows) {
  const ModelShape& s = shape_;
  const int64_t layer_parameters = s.hidden_size * (s.qkv_width() + s.q_width() + 3 * s.intermediate_size);
  int64_t num_tokens = 0, num_attended = 0, num_read = 0;
  for (const NanoBatch& nano : nano_batches_) {
    num_tokens += nano.num_rows();
    num_attended += nano.batch.num_attended_tokens();
    num_read += nano.batch.num_read_tokens();
  }
  const auto num_rows = static_cast<double>(num_tokens);
  const auto layers = static_cast<double>(s.num_layers);
  ++counters_.num_steps;
  if (num_nano_batches_ > 1) ++counters_.num_overlapped_steps;
  counters_.num_tokens += num_tokens;
  counters_.matmul_flop += 2.0 * num_rows * layers * static_cast<double>(layer_parameters);
  counters_.matmul_flop += 2.0 * static_cast<double>(num_head_rows * s.vocab_size * s.hidden_size);
  counters_.attention_flop += 4.0 * layers * static_cast<double>(num_attended * s.q_width());
  counters_.weight_bytes += static_cast<double>(num_layer_bytes());
  if (num_head_rows > 0) counters_.weight_bytes += static_cast<double>(weights_.lm_head.num_bytes());
  counters_.kv_bytes += 4.0 * layers * static_cast<double>(num_read * s.kv_width());
}

void Model::run(Op op, int64_t num_tiles, TileFn fn) {
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
  counters_.op_s[static_cast<size_t>(op)] += elapsed.count();
}

}  // namespace blendserve
