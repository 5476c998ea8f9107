// Sampling against a slow twin in double precision that sorts the whole vocabulary, and the generator's known answers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "ops/sample.h"

namespace blendserve {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kVocabSize = 1003;

std::vector<float> random_logits(uint32_t seed, float scale, int64_t n = kVocabSize) {
  test::Random random(seed);
  std::vector<float> logits(static_cast<size_t>(n));
  for (float& logit : logits) logit = scale * random.unit();
  return logits;
}

Sample sample_copy(Isa isa, std::vector<float> logits, const SamplingParams& params, std::vector<int32_t> tokens = {},
                   const int32_t* mask = nullptr) {
  SampleScratch scratch(static_cast<int64_t>(logits.size()));
  const Sample first = sample_row(isa, std::span(logits), params, tokens, scratch, mask);
  CHECK(std::all_of(scratch.counts.begin(), scratch.counts.end(), [](int32_t count) { return count == 0; }));
  return first;
}

template <class F>
void on_each_isa(F&& test) {
  for (const Isa isa : kAllIsas) {
    if (is_supported(isa)) test(isa);
  }
}

void philox_gives_the_known_answers() {  // Random123's kat_vectors, philox4x32 10 rounds
  using Words = std::array<uint32_t, 4>;
  CHECK(philox({0, 0, 0, 0}, {0, 0}) == (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) == (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  CHECK(uniform_at(0, 0) == (0x6627e8d5 >> 8) * 0x1p-24);
  CHECK(uniform_at(1, 0) != uniform_at(uint64_t{1} << 32, 0) && uniform_at(0, 1) != uniform_at(0, uint64_t{1} << 32));
}

void greedy_takes_the_lowest_of_equals() {
  on_each_isa([](Isa isa) {
    SamplingParams params;
    params.temperature = 0.0f;
    for (const size_t n : {1u, 7u, 8u, 16u, 33u, 1003u}) {
      for (size_t best = 0; best < n; best += 5) {
        auto logits = random_logits(static_cast<uint32_t>(n), 1.0f, static_cast<int64_t>(n));
        logits[best] = 2.0f;
        if (best + 3 < n) logits[best + 3] = 2.0f;
        CHECK(sample_copy(isa, logits, params).token == static_cast<int32_t>(best), isa_name(isa), " n ", n);
      }
    }
    CHECK(sample_copy(isa, {NAN, -1.0f, NAN, 3.0f, NAN}, params).token == 3);
    CHECK(sample_copy(isa, {-kInfinity, -kInfinity}, params).token == 0);
  });
}

// The rule of executors/sampling.py after penalties: which tokens may be drawn, then inverse CDF in token order.
// `margin` is how far the drawn number is from the nearest boundary, as a share of the total.
int32_t slow_draw(const std::vector<float>& logits, const SamplingParams& params, double uniform, double& margin) {
  std::vector<size_t> ranked(logits.size());
  std::iota(ranked.begin(), ranked.end(), 0);
  std::stable_sort(ranked.begin(), ranked.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  const auto weight = [&](size_t i) {
    return std::exp((static_cast<double>(logits[i]) - logits[ranked[0]]) / params.temperature);
  };
  std::erase_if(ranked, [&](size_t i) { return weight(i) < params.min_p || logits[i] == -kInfinity; });
  if (params.top_k > 0 && ranked.size() > static_cast<size_t>(params.top_k))
    ranked.resize(static_cast<size_t>(params.top_k));
  double total = 0.0, before = 0.0;
  for (const size_t i : ranked) total += weight(i);
  margin = 1.0;
  if (params.top_p < 1.0f) {
    size_t kept = 0;
    while (kept < ranked.size() && before < params.top_p * total) {
      before += weight(ranked[kept++]);
      margin = std::min(margin, std::abs(before / total - params.top_p));
    }
    ranked.resize(kept);
  }
  std::sort(ranked.begin(), ranked.end());
  double sum = 0.0;
  total = 0.0;
  for (const size_t i : ranked) total += weight(i);
  size_t drawn = ranked.back();
  for (const size_t i : ranked) {
    sum += weight(i);
    margin = std::min(margin, std::abs(sum / total - uniform));
    if (sum > uniform * total && drawn == ranked.back()) drawn = i;
  }
  return static_cast<int32_t>(drawn);
}

void draws_agree_with_the_slow_twin() {
  on_each_isa([](Isa isa) {
    // float32 weights err by e^(2^-23 * |scaled logit|) and exp's own error; a draw closer to a boundary may fall
    // either way.
    constexpr double kMargin = 2e-5;
    int compared = 0;
    for (uint32_t trial = 0; trial < 400; ++trial) {
      SamplingParams params;
      params.seed = trial;
      params.temperature = trial % 3 == 0 ? 1.0f : 0.3f + 0.01f * static_cast<float>(trial % 97);
      params.top_k = trial % 4 == 1 ? static_cast<int32_t>(1 + trial % 50) : trial % 8 == 3 ? 5000 : 0;
      params.top_p = trial % 2 == 1 ? 0.05f + 0.009f * static_cast<float>(trial % 100) : 1.0f;
      params.min_p = trial % 5 == 2 ? 0.02f : 0.0f;
      auto logits = random_logits(trial, trial % 7 == 0 ? 0.2f : 12.0f);
      if (trial % 6 == 0) logits[trial % 17] = -kInfinity;
      double margin;
      const int32_t expected = slow_draw(logits, params, uniform_at(trial, 0), margin);
      if (margin < kMargin) continue;
      ++compared;
      CHECK(sample_copy(isa, logits, params).token == expected, isa_name(isa), " trial ", trial);
    }
    CHECK(compared > 380, "only ", compared, " trials are clear of boundaries");
  });
}

void ties_at_the_cut_go_to_the_lowest_tokens() {
  on_each_isa([](Isa isa) {
    const std::vector<float> logits(64, 1.5f);
    for (const bool by_k : {true, false}) {
      std::vector<int> counts(logits.size());
      for (uint64_t seed = 0; seed < 300; ++seed) {
        SamplingParams params;
        params.seed = seed;
        if (by_k) params.top_k = 3;
        if (!by_k) params.top_p = 0.04f;  // 2.56 of 64 equals: three of them
        ++counts[static_cast<size_t>(sample_copy(isa, logits, params).token)];
      }
      CHECK(counts[0] > 60 && counts[1] > 60 && counts[2] > 60 && counts[0] + counts[1] + counts[2] == 300);
    }
  });
}

void draws_follow_the_distribution() {
  const std::vector<float> logits = {0.0f, std::log(2.0f), -kInfinity, std::log(5.0f)};
  std::vector<int> counts(4);
  constexpr int kDraws = 8000;
  for (int seed = 0; seed < kDraws; ++seed) {
    SamplingParams params;
    params.seed = static_cast<uint64_t>(seed);
    ++counts[static_cast<size_t>(sample_copy(best_isa(), logits, params).token)];
  }
  const double expected[] = {1.0 / 8, 2.0 / 8, 0.0, 5.0 / 8};
  for (size_t i = 0; i < 4; ++i) {
    const double deviation = std::sqrt(kDraws * expected[i] * (1 - expected[i]));
    CHECK(std::abs(counts[i] - kDraws * expected[i]) <= 4.0 * deviation, "token ", i, " drawn ", counts[i], " times");
  }
}

void penalties_bias_and_bans_change_the_choice() {
  on_each_isa([](Isa isa) {
    SamplingParams greedy;
    greedy.temperature = 0.0f;
    greedy.num_prompt_tokens = 2;
    const std::vector<float> logits = {1.0f, 0.9f, 0.5f, -0.2f};
    const std::vector<int32_t> tokens = {1, 1, 0, 0, 2};  // prompt 1 1, output 0 0 2
    CHECK(sample_copy(isa, logits, greedy, tokens).token == 0);

    SamplingParams params = greedy;
    params.presence_penalty = 0.2f;  // 0.8 0.9 0.3: the prompt does not count
    CHECK(sample_copy(isa, logits, params, tokens).token == 1);
    params = greedy;
    params.frequency_penalty = 0.04f;  // 0.92 0.9
    CHECK(sample_copy(isa, logits, params, tokens).token == 0);
    params.frequency_penalty = 0.06f;  // 0.88 0.9: twice for token 0
    CHECK(sample_copy(isa, logits, params, tokens).token == 1);
    params = greedy;
    params.repetition_penalty = 3.0f;  // 0.33 0.3 0.17 -0.2: prompt and output, once each
    CHECK(sample_copy(isa, logits, params, tokens).token == 0);
    CHECK(sample_copy(isa, {-1.0f, -1.1f, -2.0f, -2.5f}, params, tokens).token == 3);  // -3 -3.3 -6 -2.5
    params = greedy;
    params.logit_bias = {{3, 2.0f}, {0, -1.0f}};
    CHECK(sample_copy(isa, logits, params, tokens).token == 3);
    params = greedy;
    params.stop_token_ids = {0, 1};
    params.min_tokens = 4;
    CHECK(sample_copy(isa, logits, params, tokens).token == 2);
    params.min_tokens = 3;
    CHECK(sample_copy(isa, logits, params, tokens).token == 0);
    params = greedy;
    params.allowed_token_ids = {3, 2};
    params.num_logprobs = 1;
    CHECK(sample_copy(isa, logits, params, tokens).token == 2);
    CHECK(sample_copy(isa, logits, params, tokens).top[0].token == 0);  // log probabilities are the model's own
    params = greedy;
    params.bad_words = {{0}, {0, 2, 1}, {1, 1, 0, 0, 2, 2}, {0, 3}};  // the output is 0 0 2; the prompt does not count
    CHECK(sample_copy(isa, logits, params, tokens).token == 2);
    params.bad_words = {{0, 0, 0, 2, 0}};  // longer than all that was sampled
    CHECK(sample_copy(isa, logits, params, tokens).token == 0);
  });
}

void logprobs_are_those_of_the_raw_distribution() {
  on_each_isa([](Isa isa) {
    auto logits = random_logits(9, 8.0f);
    logits[700] = logits[20] = 9.0f;
    double total = 0.0;
    for (const float logit : logits) total += std::exp(static_cast<double>(logit));
    SamplingParams params;
    params.temperature = 0.0f;
    params.num_logprobs = 3;
    params.logit_bias = {{5, 100.0f}, {5, 1.0f}};
    const Sample sample = sample_copy(isa, logits, params);
    // The largest value rounds by 2^-21; the sum of float32 weights by a few units per block of 256.
    constexpr double kBound = 4e-6;
    CHECK(sample.token == 5 && sample.has_logprob && sample.top.size() == 3);
    CHECK(std::abs(sample.logprob - (logits[5] - std::log(total))) < kBound);
    CHECK(sample.top[0].token == 20 && sample.top[1].token == 700);
    CHECK(std::abs(sample.top[0].logit - (9.0 - std::log(total))) < kBound);
    CHECK(sample.top[2].logit <= sample.top[1].logit);
    params.num_logprobs = 0;
    CHECK(sample_copy(isa, logits, params).top.empty() && sample_copy(isa, logits, params).has_logprob);
    params.num_logprobs = -1;
    CHECK(!sample_copy(isa, logits, params).has_logprob);
    params.num_logprobs = 2000;
    CHECK(sample_copy(isa, logits, params).top.size() == logits.size());
  });
}

using Mask = std::vector<int32_t>;

Mask empty_mask(size_t n) { return Mask((n + 31) / 32, 0); }

void allow(Mask& mask, size_t token) { mask[token / 32] |= static_cast<int32_t>(uint32_t{1} << (token % 32)); }

bool allows(const Mask& mask, size_t token) {
  return ((static_cast<uint32_t>(mask[token / 32]) >> (token % 32)) & 1u) != 0;
}

// Every word of a mask is empty, full or mixed, about as often.
Mask random_mask(uint32_t seed, size_t n) {
  test::Random random(seed);
  Mask mask = empty_mask(n);
  for (size_t word = 0; word < mask.size(); ++word) {
    const float kind = random.unit();
    for (size_t token = 32 * word; token < std::min(n, 32 * (word + 1)); ++token) {
      if (kind > 0.3f || (kind > -0.3f && random.unit() > 0.0f)) allow(mask, token);
    }
  }
  return mask;
}

void masked_sampling_agrees_with_logits_of_minus_infinity() {
  on_each_isa([](Isa isa) {
    for (const size_t n : {1u, 31u, 32u, 33u, 64u, 1003u}) {
      for (uint32_t seed = 0; seed < 40; ++seed) {
        const auto logits = random_logits(seed, 4.0f, static_cast<int64_t>(n));
        Mask mask = random_mask(seed + 1000, n);
        allow(mask, seed % n);
        auto hidden = logits;
        for (size_t token = 0; token < n; ++token) {
          if (!allows(mask, token)) hidden[token] = -kInfinity;
        }
        SamplingParams params;
        params.seed = seed;
        params.temperature = seed % 2 == 0 ? 0.0f : 1.5f;
        params.num_logprobs = seed % 3 == 0 ? 4 : -1;
        if (seed % 4 == 1) params.top_p = 0.8f;
        if (seed % 5 == 1) params.top_k = 3;
        if (seed % 3 == 1) params.repetition_penalty = 1.3f;
        if (seed % 7 == 1) params.logit_bias = {{static_cast<int32_t>(n - 1), 30.0f}};
        const std::vector<int32_t> tokens = {static_cast<int32_t>(n / 2), 0};
        const Sample masked = sample_copy(isa, logits, params, tokens, mask.data());
        const Sample expected = sample_copy(isa, hidden, params, tokens);
        CHECK(allows(mask, static_cast<size_t>(masked.token)), isa_name(isa), " n ", n, " seed ", seed);
        CHECK(masked.token == expected.token, isa_name(isa), " n ", n, " seed ", seed);
        CHECK(masked.logprob == expected.logprob);
        for (size_t i = 0; i < masked.top.size(); ++i) {
          CHECK(masked.top[i].token == expected.top[i].token && masked.top[i].logit == expected.top[i].logit);
          CHECK(allows(mask, static_cast<size_t>(masked.top[i].token)));
        }
      }
    }
  });
}

void a_mask_of_banned_tokens_still_gives_one_of_them() {
  on_each_isa([](Isa isa) {
    Mask mask = empty_mask(kVocabSize);
    allow(mask, 700);
    allow(mask, 701);
    for (const float temperature : {0.0f, 1.0f}) {
      SamplingParams params;
      params.temperature = temperature;
      params.min_tokens = 5;
      params.stop_token_ids = {700, 701};
      CHECK(sample_copy(isa, random_logits(1, 1.0f), params, {}, mask.data()).token == 700);
      params.stop_token_ids = {700};
      CHECK(sample_copy(isa, random_logits(1, 1.0f), params, {}, mask.data()).token == 701);
    }
  });
}

void what_was_adjusted_is_put_back() {
  on_each_isa([](Isa isa) {
    const auto before = random_logits(7, 3.0f);
    const std::vector<int32_t> tokens = {3, 3, 8, 900, 8, 8};
    SamplingParams params;
    params.temperature = 0.0f;
    params.num_prompt_tokens = 2;
    params.logit_bias = {{3, 2.0f}, {900, -1.0f}, {3, 1.0f}};
    params.bad_words = {{8, 11}};
    params.min_tokens = 9;
    params.stop_token_ids = {1, 8};
    params.repetition_penalty = 1.7f;
    params.frequency_penalty = 0.5f;
    auto logits = before;
    SampleScratch scratch(kVocabSize);
    sample_row(isa, std::span(logits), params, tokens, scratch);
    CHECK(logits == before, isa_name(isa));
  });
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(philox_gives_the_known_answers);
  RUN(greedy_takes_the_lowest_of_equals);
  RUN(draws_agree_with_the_slow_twin);
  RUN(ties_at_the_cut_go_to_the_lowest_tokens);
  RUN(draws_follow_the_distribution);
  RUN(penalties_bias_and_bans_change_the_choice);
  RUN(logprobs_are_those_of_the_raw_distribution);
  RUN(masked_sampling_agrees_with_logits_of_minus_infinity);
  RUN(a_mask_of_banned_tokens_still_gives_one_of_them);
  RUN(what_was_adjusted_is_put_back);
}
