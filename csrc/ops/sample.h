// Choosing the next token of one sequence from its logits; executors/sampling.py is the specification. In this order:
// mask; raw log probabilities; allowed tokens, bad words, bias, banned tokens, penalties; greedy, or temperature,
// min_p, top_k, top_p and one draw by inverse CDF in token order. Depends on the logits, the parameters, the sequence's
// tokens and its seed, on nothing else.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "ops/isa.h"

namespace blendserve {

struct SamplingParams {
  float temperature = 1.0f;  // 0: the most likely token, the lowest id of equals
  float top_p = 1.0f;
  float min_p = 0.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;
  int32_t top_k = 0;          // 0: all
  int32_t num_logprobs = -1;  // -1: none asked for
  int64_t min_tokens = 0;     // stop_token_ids are banned before so many tokens were sampled
  int64_t num_prompt_tokens = 0;
  uint64_t seed = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;
  std::vector<int32_t> stop_token_ids;
  std::vector<int32_t> allowed_token_ids;       // empty: all
  std::vector<std::vector<int32_t>> bad_words;  // the last token of one is banned after the others

  // Does the choice depend on tokens of the sequence, and not on the logits alone?
  bool looks_at_tokens() const {
    return repetition_penalty != 1.0f || frequency_penalty != 0.0f || presence_penalty != 0.0f || !bad_words.empty();
  }
};

// Throws std::invalid_argument for a number out of range and for a token that is none in a bias, in what is allowed or
// in a bad word.
void check_params(const SamplingParams& params, int64_t vocab_size);

// Tokens whose probabilities are summed in float32 before they meet the double-precision total.
inline constexpr int64_t kWeightBlock = 256;

struct TokenLogit {
  int32_t token;
  float logit;
};

// Working memory of one thread.
struct SampleScratch {
  explicit SampleScratch(int64_t vocab_size);
  std::vector<int32_t> counts;         // [vocab_size], all 0 between calls
  std::vector<TokenLogit> candidates;  // capacity vocab_size
  std::vector<float> weights;          // [vocab_size]
  std::vector<double> block_sums;      // of weights
  std::vector<TokenLogit> changed;     // raw logits of tokens that bias, bans or penalties touched
};

struct Sample {
  int32_t token = 0;
  bool has_logprob = false;
  float logprob = 0.0f;
  std::vector<TokenLogit> top;  // log probabilities, best first
};

// Tokens of a mask's word.
inline constexpr int64_t kMaskBits = 32;

// Samples the token after `tokens`, prompt and output so far. `mask` is null where every token may come; else bit
// token % kMaskBits of word token / kMaskBits says which may. Where bias, bans and penalties leave none of them, it is
// the first that the mask has. Mutates: `logits`, by what the mask and allowed tokens leave out; all else is put back.
Sample sample_row(Isa isa, std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                  SampleScratch& scratch, const int32_t* mask = nullptr);

// Log probability of `token`; `top` becomes the best alternatives, at most all tokens, best first.
void score_row(Isa isa, std::span<float> logits, int32_t token, float& logprob, std::span<TokenLogit> top,
               SampleScratch& scratch);

// Philox4x32-10 (Salmon et al., SC 2011): four random words from a counter and a key.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);
// Uniform in [0, 1), 24 bits, for one output position (0: the first sampled token) of a seed.
double uniform_at(uint64_t seed, uint64_t position);

}  // namespace blendserve
