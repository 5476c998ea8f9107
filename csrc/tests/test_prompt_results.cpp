// Log probabilities and pooled states of prompts: the bits of the model's own logits, under any chunks and prefix hits.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "model_runs.h"
#include "prompt_results.h"

namespace blendserve::test {
namespace {

constexpr int64_t kPrompt = 100;
constexpr int64_t kNumTop = 3;

// Prompts of four slots that begin alike, stepped by hand; none is sampled.
class Prompts {
 public:
  Prompts(MatmulFormat format, KvDtype kv_dtype, Pooling pooling, int num_threads = 2)
      : model_(format.isa, kPlain, limits_of(kv_dtype), Weights(format, kPlain).make(false), num_threads),
        pooling_(pooling) {
    Random random(1);
    for (int64_t i = 0; i < kPrompt; ++i) tokens_[static_cast<size_t>(i)] = static_cast<int32_t>(random.bits() % 97);
    for (int64_t slot = 1; slot < 4; ++slot) std::copy_n(tokens_.begin(), kPrompt, tokens_.begin() + slot * kPrompt);
    std::iota(blocks_.begin(), blocks_.end(), 5);
    for (int64_t slot = 0; slot < 4; ++slot) admit(slot, kPrompt);
  }

  void admit(int64_t slot, int64_t num_tokens) {
    const int32_t num_logprobs = pooling_ == Pooling::kNone ? static_cast<int32_t>(kNumTop) : -1;
    model_.admit(slot, {}, {num_tokens, num_logprobs, pooling_});
  }
  // Lets a slot begin with blocks of slot 0.
  void share(int32_t slot, int64_t num_blocks) {
    std::copy_n(blocks_.begin(), num_blocks, blocks_.begin() + slot * kStride);
    computed_[static_cast<size_t>(slot)] = static_cast<int32_t>(num_blocks * kBlockSize);
  }
  void step(const std::vector<std::pair<int32_t, int32_t>>& entries) {
    std::vector<int32_t> slots, scheduled, computed;
    for (const auto& [slot, count] : entries) {
      slots.push_back(slot);
      scheduled.push_back(count);
      computed.push_back(computed_[static_cast<size_t>(slot)]);
    }
    const bool is_sampled[4] = {};
    CHECK(model_.step({slots, scheduled, computed, is_sampled, tokens_.data(), kPrompt, blocks_.data(), kStride, 4})
              .empty());
    for (const auto& [slot, count] : entries) computed_[static_cast<size_t>(slot)] += count;
  }
  void finish(int32_t slot, int32_t chunk) {
    while (computed_[static_cast<size_t>(slot)] < kPrompt) {
      step({{slot, std::min(chunk, static_cast<int32_t>(kPrompt) - computed_[static_cast<size_t>(slot)])}});
    }
  }

  std::span<const int32_t> blocks(int32_t slot) const { return std::span(blocks_).subspan(slot * kStride, kStride); }
  PromptLogprobs logprobs(int32_t slot) const { return model_.prompt_results().logprobs(slot, blocks(slot)); }
  std::vector<float> pooled(int32_t slot) const { return model_.prompt_results().pooled(slot, blocks(slot)); }
  std::span<int32_t> prompt(int32_t slot) { return std::span(tokens_).subspan(slot * kPrompt, kPrompt); }
  Model& model() { return model_; }

 private:
  static constexpr int64_t kStride = 8;
  Model model_;
  Pooling pooling_;
  std::vector<int32_t> tokens_ = std::vector<int32_t>(4 * kPrompt);
  std::vector<int32_t> blocks_ = std::vector<int32_t>(4 * kStride);
  std::vector<int32_t> computed_ = std::vector<int32_t>(4);
};

bool same(const PromptLogprobs& a, const PromptLogprobs& b) {
  if (a.logprobs.size() != b.logprobs.size() || a.top.size() != b.top.size()) return false;
  for (size_t i = 1; i < a.logprobs.size(); ++i) {
    if (a.logprobs[i] != b.logprobs[i]) return false;
  }
  for (size_t i = kNumTop; i < a.top.size(); ++i) {
    if (a.top[i].token != b.top[i].token || a.top[i].logit != b.top[i].logit) return false;
  }
  return true;
}

template <class F>
bool is_refused(F&& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void logprobs_are_those_of_logits() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    Prompts prompts(format, kv_dtype, Pooling::kNone);
    prompts.finish(0, 1000);
    const PromptLogprobs found = prompts.logprobs(0);
    const auto vocab_size = static_cast<size_t>(kPlain.vocab_size);
    std::vector<float> logits(kPrompt * vocab_size);
    prompts.model().logits(prompts.prompt(0), logits.data());
    CHECK(std::isnan(found.logprobs[0]));
    for (size_t i = 1; i < kPrompt; ++i) {
      const float* row = logits.data() + (i - 1) * vocab_size;
      double total = 0.0;
      for (size_t v = 0; v < vocab_size; ++v) total += std::exp(static_cast<double>(row[v]));
      const double expected = row[prompts.prompt(0)[i]] - std::log(total);
      CHECK(std::abs(found.logprobs[i] - expected) < 1e-5);
      const TokenLogit* top = &found.top[i * kNumTop];
      CHECK(top[0].token == std::max_element(row, row + vocab_size) - row);
      CHECK(top[0].logit >= top[1].logit && top[1].logit >= top[2].logit);
    }
  });
}

void chunks_and_hits_change_no_bit() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    Prompts alone(format, kv_dtype, Pooling::kNone, 1), shared(format, kv_dtype, Pooling::kNone);
    alone.finish(0, 1000);
    shared.share(1, 3);
    shared.share(2, 6);
    shared.step({{0, 50}, {1, 9}});  // slot 1 follows slot 0 within the step
    shared.step({{1, 20}, {0, 50}, {2, 2}});
    for (const int32_t slot : {1, 2, 3}) shared.finish(slot, 7);
    for (const int32_t slot : {0, 1, 2, 3}) CHECK(same(shared.logprobs(slot), alone.logprobs(0)));
  });
}

void pooled_states_change_no_bit() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    for (const Pooling pooling : {Pooling::kLast, Pooling::kMean}) {
      Prompts alone(format, kv_dtype, pooling, 1), shared(format, kv_dtype, pooling);
      alone.finish(0, 1000);
      shared.share(1, 3);
      shared.share(2, 6);
      shared.step({{0, 50}, {1, 9}});
      shared.step({{1, 20}, {0, 50}, {2, 2}});
      for (const int32_t slot : {1, 2, 3}) shared.finish(slot, 7);
      for (const int32_t slot : {0, 1, 2, 3}) CHECK(shared.pooled(slot) == alone.pooled(0));
    }
  });
}

void slots_begin_anew() {
  const MatmulFormat format = {Isa::kPortable};
  Prompts prompts(format, KvDtype::kBf16, Pooling::kNone);
  prompts.finish(0, 1000);
  const PromptLogprobs before = prompts.logprobs(0);
  prompts.model().release(0);
  CHECK(is_refused([&] { prompts.logprobs(0); }));
  prompts.share(3, 0);
  prompts.admit(3, kPrompt);
  prompts.finish(3, 30);
  CHECK(same(prompts.logprobs(3), before));
}

void what_does_not_fit_is_refused() {
  const MatmulFormat format = {Isa::kPortable};
  Prompts prompts(format, KvDtype::kBf16, Pooling::kNone);
  CHECK(is_refused([&] { prompts.admit(0, -1); }));
  CHECK(is_refused([&] { prompts.logprobs(0); }));
  CHECK(is_refused([&] { prompts.pooled(0); }));
  prompts.prompt(0)[16] = 97;
  CHECK(is_refused([&] { prompts.step({{0, 16}}); }));
  prompts.prompt(0)[16] = -1;
  CHECK(is_refused([&] { prompts.step({{0, 16}}); }));
  prompts.share(1, 2);
  CHECK(is_refused([&] { prompts.step({{1, 16}}); }));
  CHECK(is_refused([&] { prompts.model().prompt_results().logprobs(1, std::vector<int32_t>{1, 2}); }));
  CHECK(is_refused([&] { prompts.model().prompt_results().logprobs(1, std::vector<int32_t>(8, -1)); }));
}

}  // namespace
}  // namespace blendserve::test

int main() {
  using namespace blendserve::test;
  RUN(logprobs_are_those_of_logits);
  RUN(chunks_and_hits_change_no_bit);
  RUN(pooled_states_change_no_bit);
  RUN(slots_begin_anew);
  RUN(what_does_not_fit_is_refused);
}
