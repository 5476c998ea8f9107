// A tiny random model, and sequences that tests step by hand.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "model.h"

namespace blendserve::test {

inline const MatmulFormat kFormats[] = {{Isa::kPortable},           {Isa::kAvx2},
                                        {Isa::kAvx512Bf16},         {Isa::kPortable, Dtype::kInt8},
                                        {Isa::kAvx2, Dtype::kInt8}, {Isa::kAvx512Vnni, Dtype::kInt8}};
inline constexpr int64_t kMaxLength = 1300;  // three attention segments
inline constexpr int64_t kMaxBlocks = div_up(kMaxLength, kBlockSize);
inline constexpr ModelLimits kLimits = {4, 1400, kMaxLength, 4 * kMaxBlocks};
constexpr ModelLimits limits_of(KvDtype kv_dtype) { return {4, 1400, kMaxLength, 4 * kMaxBlocks, kv_dtype}; }
inline constexpr ModelShape kPlain = {97, 48, 80, 2, 6, 2, 16, 1e-5f};
inline constexpr ModelShape kPadded = {97, 40, 72, 2, 4, 4, 10, 1e-5f};  // head size 10, with q/k norm and bias

class Weights {
 public:
  Weights(MatmulFormat format, const ModelShape& shape) : format_(format), shape_(shape) {}

  ModelWeights make(bool has_bias_and_norm) {
    ModelWeights weights;
    const ModelShape& s = shape_;
    weights.lm_head = matrix(s.vocab_size, s.hidden_size, s.hidden_size);
    weights.norm = vector(s.hidden_size, 1.0f);
    for (int64_t i = 0; i < s.head_dim / 2; ++i) {
      weights.inverse_frequencies.push_back(
          std::pow(1e-3, static_cast<double>(i) / static_cast<double>(s.head_dim / 2)));
    }
    for (int64_t i = 0; i < s.num_layers; ++i) {
      LayerWeights layer;
      layer.qkv = matrix(s.qkv_width(), s.hidden_size, s.hidden_size, true);
      layer.o = matrix(s.hidden_size, s.q_width(), s.q_width());
      layer.gate_up = matrix(2 * s.intermediate_size, s.hidden_size, s.hidden_size);
      layer.down = matrix(s.hidden_size, s.intermediate_size, s.intermediate_size);
      layer.input_norm = layer.post_attention_norm = vector(s.hidden_size, 1.0f);
      if (has_bias_and_norm) {
        layer.q_norm = layer.k_norm = vector(s.head_dim, 1.0f);
        layer.qkv_bias.assign(static_cast<size_t>(s.qkv_width()), 0.0f);
      }
      weights.layers.push_back(std::move(layer));
    }
    return weights;
  }

 private:
  PackedMatrix matrix(int64_t n, int64_t k, int64_t fan_in, bool has_heads = false) {
    std::vector<float> values(static_cast<size_t>(n * k));
    const float scale = 2.0f / std::sqrt(static_cast<float>(fan_in));
    for (int64_t row = 0; row < n; ++row) {
      const bool is_padding = has_heads && row % shape_.head_stride() >= shape_.head_dim;
      for (int64_t i = 0; i < k; ++i)
        values[static_cast<size_t>(row * k + i)] = is_padding ? 0.0f : scale * random_.unit();
    }
    return {format_, values, n, k};
  }
  std::vector<float> vector(int64_t n, float around) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = around + 0.2f * random_.unit();
    return values;
  }

  MatmulFormat format_;
  ModelShape shape_;
  Random random_{42};
};

// Sequences of four slots, stepped by hand. Two slots may share blocks.
class Run {
 public:
  Run(MatmulFormat format, const ModelShape& shape, int num_threads, KvDtype kv_dtype = KvDtype::kBf16)
      : model_(format.isa, shape, limits_of(kv_dtype), Weights(format, shape).make(shape.head_dim == kPadded.head_dim),
               num_threads) {
    for (int64_t slot = 0; slot < kLimits.max_num_seqs; ++slot) {
      Random random(static_cast<uint32_t>(slot + 1));
      for (int64_t i = 0; i < kMaxLength; ++i)
        token(slot, i) = static_cast<int32_t>(random.bits() % static_cast<uint32_t>(shape.vocab_size));
      for (int64_t b = 0; b < kMaxBlocks; ++b) block(slot, b) = static_cast<int32_t>(b * 4 + slot);
      SamplingParams params;
      params.temperature = slot % 2 == 0 ? 0.0f : 0.8f;
      params.seed = static_cast<uint64_t>(slot);
      params.num_logprobs = 2;
      model_.admit(slot, params);
    }
  }

  int32_t& token(int64_t slot, int64_t position) { return tokens_[static_cast<size_t>(slot * kMaxLength + position)]; }
  int32_t& block(int64_t slot, int64_t index) { return blocks_[static_cast<size_t>(slot * kMaxBlocks + index)]; }
  Model& model() { return model_; }

  struct Entry {
    int32_t slot, num_tokens;
  };
  // Runs the next tokens of some slots, all sampled; remembers the log probabilities after each last token.
  void step(const std::vector<Entry>& entries) {
    std::vector<int32_t> slots, scheduled, computed;
    const auto is_sampled = std::make_unique<bool[]>(entries.size());
    for (size_t i = 0; i < entries.size(); ++i) {
      slots.push_back(entries[i].slot);
      scheduled.push_back(entries[i].num_tokens);
      computed.push_back(static_cast<int32_t>(num_computed_[entries[i].slot]));
      is_sampled[i] = true;
    }
    const auto samples = model_.step(
        {slots, scheduled, computed, is_sampled.get(), tokens_.data(), kMaxLength, blocks_.data(), kMaxBlocks, 4});
    CHECK(samples.size() == entries.size());
    for (size_t i = 0; i < entries.size(); ++i) {
      const int32_t slot = entries[i].slot;
      num_computed_[slot] += entries[i].num_tokens;
      results_[{slot, num_computed_[slot]}] = {samples[i].token, samples[i].logprob, samples[i].top[0].logit,
                                               samples[i].top[1].logit};
    }
  }
  // Pretends that the first tokens of a slot are already in its blocks.
  void skip(int32_t slot, int64_t num_tokens) { num_computed_[slot] = num_tokens; }

  struct Result {
    int32_t token;
    float logprob, best, second;
    bool operator==(const Result&) const = default;
  };
  const std::map<std::pair<int32_t, int64_t>, Result>& results() const { return results_; }
  Result result(int32_t slot, int64_t num_tokens) const { return results_.at({slot, num_tokens}); }

 private:
  Model model_;
  std::vector<int32_t> tokens_ = std::vector<int32_t>(static_cast<size_t>(4 * kMaxLength));
  std::vector<int32_t> blocks_ = std::vector<int32_t>(static_cast<size_t>(4 * kMaxBlocks));
  std::map<int32_t, int64_t> num_computed_;
  std::map<std::pair<int32_t, int64_t>, Result> results_;
};

inline std::string name_of(MatmulFormat format, KvDtype kv_dtype) {
  return std::string(dtype_name(format.dtype)) + " on " + std::string(isa_name(format.isa)) + " with KV in " +
         std::string(kv_dtype_name(kv_dtype));
}

// Attention over KV in int8 has three kernels, which the formats of weights in bf16 reach.
template <class F>
void on_each_format(F&& test) {
  for (const MatmulFormat format : kFormats) {
    if (!is_supported(format.isa)) continue;
    test(format, KvDtype::kBf16);
    if (format.dtype == Dtype::kBf16) test(format, KvDtype::kInt8);
  }
}

}  // namespace blendserve::test
