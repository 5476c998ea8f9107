#include "ops/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ops/dispatch.h"
#include "tensor.h"

namespace blendserve {

BLENDSERVE_DECLARE_WIDE_KERNEL(float, largest, (const float*, int64_t))
BLENDSERVE_DECLARE_WIDE_KERNEL(int32_t, first_at_least, (const float*, int64_t, float))
BLENDSERVE_DECLARE_WIDE_KERNEL(int64_t, collect_at_least, (const float*, int64_t, float, TokenLogit*))
BLENDSERVE_DECLARE_WIDE_KERNEL(void, hide_masked, (float*, int64_t, const int32_t*))
BLENDSERVE_DECLARE_WIDE_KERNEL(int32_t, best_allowed, (const float*, int64_t, const int32_t*))
BLENDSERVE_DECLARE_WIDE_KERNEL(void, weigh, (const float*, int64_t, float, float, float*, double*))

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Depth below the best logit, in units of temperature, to which candidates are collected first; it doubles until the
// filters are satisfied, so the answer does not depend on it. Real text rarely needs the second round.
constexpr float kFirstDepth = 8.0f;
constexpr float kLastDepth = 512.0f;  // e^-512 is 0 in float32 many times over: beyond it, take everything

bool is_better(const TokenLogit& a, const TokenLogit& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// One row of logits on its way to a token.
class RowSampler {
 public:
  RowSampler(Isa isa, std::span<float> logits, const SamplingParams& params, SampleScratch& scratch,
             const int32_t* mask)
      : isa_(isa), logits_(logits), params_(params), scratch_(scratch), mask_(mask) {}

  // Gives tokens that the mask leaves out no probability. Greedy sampling needs it only beside log probabilities.
  void hide_masked() { BLENDSERVE_CALL_WIDE_KERNEL(isa_, hide_masked, logits_.data(), size(), mask_); }

  void adjust(std::span<const int32_t> prompt, std::span<const int32_t> output) {
    scratch_.changed.clear();
    if (!params_.allowed_token_ids.empty()) keep_only(params_.allowed_token_ids);
    for (const std::vector<int32_t>& word : params_.bad_words) {
      if (would_complete(word, output)) change(word.back(), -kInfinity);
    }
    for (const auto& [token, bias] : params_.logit_bias) change(token, at(token) + bias);
    if (static_cast<int64_t>(output.size()) < params_.min_tokens) {
      for (const int32_t token : params_.stop_token_ids) change(token, -kInfinity);
    }
    if (params_.repetition_penalty != 1.0f) {
      for (const auto tokens : {prompt, output}) penalise_repetition(tokens);
      for (const auto tokens : {prompt, output}) forget(tokens);
    }
    if (params_.frequency_penalty != 0.0f || params_.presence_penalty != 0.0f) {
      for (const int32_t token : output) ++scratch_.counts[static_cast<size_t>(token)];
      for (const int32_t token : output) penalise_presence(token);
    }
  }

  int32_t greedy() {
    if (mask_ == nullptr) return first_of(call_largest());
    const int32_t best = BLENDSERVE_CALL_WIDE_KERNEL(isa_, best_allowed, logits_.data(), size(), mask_);
    return best < 0 ? first_allowed() : best;
  }

  int32_t draw(double uniform) {
    const float best = call_largest();
    if (mask_ != nullptr && best == -kInfinity) return first_allowed();
    if (!(std::abs(best) < kInfinity)) return first_of(best);
    if (params_.top_k <= 0 && params_.top_p >= 1.0f && params_.min_p <= 0.0f) return draw_from_all(best, uniform);
    const int64_t count = filter(best);
    std::sort(candidates(), candidates() + count, [](const auto& a, const auto& b) { return a.token < b.token; });
    return draw_from_candidates(best, count, uniform);
  }

  // Undoes bias, bans and penalties.
  void restore() {
    while (!scratch_.changed.empty()) {
      at(scratch_.changed.back().token) = scratch_.changed.back().logit;
      scratch_.changed.pop_back();
    }
  }

  float raw_logit(int32_t token) const {
    for (const TokenLogit& before : scratch_.changed) {
      if (before.token == token) return before.logit;
    }
    return logits_[static_cast<size_t>(token)];
  }

  // log of the sum of e^logit.
  double log_total() {
    const float best = call_largest();
    return static_cast<double>(best) + std::log(weigh_all(best, 1.0f));
  }

  void best_logits(int32_t count, std::vector<TokenLogit>& best) {
    const auto wanted = std::min(static_cast<int64_t>(count), size());
    if (wanted <= 0) return;
    for (int64_t i = 0; i < size(); ++i) {
      const TokenLogit here = {static_cast<int32_t>(i), logits_[static_cast<size_t>(i)]};
      if (mask_ != nullptr && here.logit == -kInfinity) continue;
      const bool is_full = static_cast<int64_t>(best.size()) == wanted;
      if (is_full && !(here.logit > best.back().logit)) continue;
      if (is_full) best.pop_back();
      best.insert(std::upper_bound(best.begin(), best.end(), here, is_better), here);
    }
  }

 private:
  int64_t size() const { return static_cast<int64_t>(logits_.size()); }
  float& at(int32_t token) { return logits_[static_cast<size_t>(token)]; }
  TokenLogit* candidates() { return scratch_.candidates.data(); }

  // 0 where the mask is empty.
  int32_t first_allowed() const {
    for (int32_t token = 0; token < static_cast<int32_t>(logits_.size()); ++token) {
      if ((static_cast<uint32_t>(mask_[token / kMaskBits]) >> (token % kMaskBits)) & 1u) return token;
    }
    return 0;
  }

  float call_largest() { return BLENDSERVE_CALL_WIDE_KERNEL(isa_, largest, logits_.data(), size()); }

  int64_t collect(float bound) {
    return BLENDSERVE_CALL_WIDE_KERNEL(isa_, collect_at_least, logits_.data(), size(), bound, candidates());
  }

  double weigh_all(float best, float inverse_temperature) {
    BLENDSERVE_CALL_WIDE_KERNEL(isa_, weigh, logits_.data(), size(), best, inverse_temperature, scratch_.weights.data(),
                                scratch_.block_sums.data());
    double total = 0.0;
    for (const double sum : scratch_.block_sums) total += sum;
    return total;
  }

  double weight(const TokenLogit& candidate, float best) const {
    return std::exp((static_cast<double>(candidate.logit) - best) / params_.temperature);
  }

  int32_t first_of(float logit) const {
    return BLENDSERVE_CALL_WIDE_KERNEL(isa_, first_at_least, logits_.data(), size(), logit);
  }

  void change(int32_t token, float logit) {
    scratch_.changed.push_back({token, at(token)});
    at(token) = logit;
  }

  // What is left out is not noted as changed: no such token is sampled.
  void keep_only(std::span<const int32_t> tokens) {
    TokenLogit* end = candidates();
    for (const int32_t token : tokens) *end++ = {token, at(token)};
    std::fill(logits_.begin(), logits_.end(), -kInfinity);
    for (const TokenLogit* kept = candidates(); kept != end; ++kept) at(kept->token) = kept->logit;
  }

  static bool would_complete(std::span<const int32_t> word, std::span<const int32_t> output) {
    const std::span<const int32_t> before = word.first(word.size() - 1);
    return before.size() <= output.size() && std::ranges::equal(before, output.last(before.size()));
  }

  void penalise_repetition(std::span<const int32_t> tokens) {
    for (const int32_t token : tokens) {
      if (scratch_.counts[static_cast<size_t>(token)]++ > 0) continue;
      const float logit = at(token);
      change(token, logit > 0.0f ? logit / params_.repetition_penalty : logit * params_.repetition_penalty);
    }
  }

  void forget(std::span<const int32_t> tokens) {
    for (const int32_t token : tokens) scratch_.counts[static_cast<size_t>(token)] = 0;
  }

  void penalise_presence(int32_t token) {
    int32_t& count = scratch_.counts[static_cast<size_t>(token)];
    if (count == 0) return;
    change(token, at(token) - params_.frequency_penalty * static_cast<float>(count) - params_.presence_penalty);
    count = 0;
  }

  // Leaves the tokens that may be drawn at the front of the candidates, best first; returns how many.
  int64_t filter(float best) {
    const float least = params_.min_p > 0.0f ? best + params_.temperature * std::log(params_.min_p) : -kInfinity;
    // With top_k the total of top_p is that of the k best; without, of all tokens that min_p leaves.
    const bool needs_total = params_.top_k <= 0 && params_.top_p < 1.0f && params_.min_p <= 0.0f;
    const double total = needs_total ? weigh_all(best, 1.0f / params_.temperature) : -1.0;
    for (float depth = params_.min_p > 0.0f && params_.top_k <= 0 ? kLastDepth : kFirstDepth;; depth *= 2.0f) {
      const bool is_last = depth >= kLastDepth;
      const float bound = is_last ? least : std::max(least, best - depth * params_.temperature);
      int64_t count = collect(std::max(bound, -std::numeric_limits<float>::max()));
      const bool is_complete = is_last || bound == least;
      if (params_.top_k > 0 && count < params_.top_k && !is_complete) continue;
      if (params_.top_k > 0 && count > params_.top_k) {
        std::nth_element(candidates(), candidates() + params_.top_k, candidates() + count, is_better);
        count = params_.top_k;
      }
      std::sort(candidates(), candidates() + count, is_better);
      if (params_.top_p >= 1.0f) return count;
      const int64_t kept = cut_top_p(best, count, total);
      if (kept < count || is_complete || params_.top_k > 0) return kept;
    }
  }

  // How many of the ranked candidates it takes to hold top_p of `total` (of their own sum where it is negative).
  int64_t cut_top_p(float best, int64_t count, double total) {
    if (total < 0.0) {
      total = 0.0;
      for (int64_t i = 0; i < count; ++i) total += weight(candidates()[i], best);
    }
    double before = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0 && before >= static_cast<double>(params_.top_p) * total) return i;
      before += weight(candidates()[i], best);
    }
    return count;
  }

  int32_t draw_from_candidates(float best, int64_t count, double uniform) {
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += weight(candidates()[i], best);
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      sum += weight(candidates()[i], best);
      if (sum > uniform * total) return candidates()[i].token;
    }
    return candidates()[count - 1].token;
  }

  int32_t draw_from_all(float best, double uniform) {
    const double target = uniform * weigh_all(best, 1.0f / params_.temperature);
    double sum = 0.0;
    size_t block = 0;
    while (block + 1 < scratch_.block_sums.size() && sum + scratch_.block_sums[block] <= target) {
      sum += scratch_.block_sums[block++];
    }
    int32_t last = first_of(best);  // rounding may place the target at the very end of a block
    const int64_t begin = static_cast<int64_t>(block) * kWeightBlock;
    for (int64_t i = begin; i < std::min(begin + kWeightBlock, size()); ++i) {
      const float weight = scratch_.weights[static_cast<size_t>(i)];
      if (weight > 0.0f) last = static_cast<int32_t>(i);
      sum += weight;
      if (sum > target) return last;
    }
    return last;
  }

  Isa isa_;
  std::span<float> logits_;
  const SamplingParams& params_;
  SampleScratch& scratch_;
  const int32_t* mask_;
};

void check_range(const char* what, double value, double least, double most) {
  if (value >= least && value <= most) return;  // no NaN is
  std::ostringstream message;
  message << what << " is " << value << "; it must be from " << least << " to " << most;
  throw std::invalid_argument(message.str());
}

void check_token(const char* where, int32_t token, int64_t vocab_size) {
  if (token >= 0 && token < vocab_size) return;
  throw std::invalid_argument(std::string(where) + " names token " + std::to_string(token) + "; the vocabulary has " +
                              std::to_string(vocab_size) + " tokens");
}

}  // namespace

void check_params(const SamplingParams& params, int64_t vocab_size) {
  constexpr double kMost = std::numeric_limits<float>::max();
  check_range("temperature", params.temperature, 0.0, kMost);
  check_range("top_p", params.top_p, 0.0, 1.0);
  check_range("min_p", params.min_p, 0.0, 1.0);
  check_range("presence_penalty", params.presence_penalty, -kMost, kMost);
  check_range("frequency_penalty", params.frequency_penalty, -kMost, kMost);
  check_range("repetition_penalty", params.repetition_penalty, std::numeric_limits<float>::min(), kMost);
  if (params.num_prompt_tokens < 0) {
    throw std::invalid_argument("num_prompt_tokens is " + std::to_string(params.num_prompt_tokens) +
                                "; it must be 0 or more");
  }
  for (const auto& [token, bias] : params.logit_bias) check_token("logit_bias", token, vocab_size);
  for (const int32_t token : params.allowed_token_ids) check_token("allowed_token_ids", token, vocab_size);
  if (static_cast<int64_t>(params.allowed_token_ids.size()) > vocab_size) {
    throw std::invalid_argument("allowed_token_ids has " + std::to_string(params.allowed_token_ids.size()) +
                                " tokens; the vocabulary has " + std::to_string(vocab_size));
  }
  for (const std::vector<int32_t>& word : params.bad_words) {
    if (word.empty()) throw std::invalid_argument("a word of bad_words has no tokens");
    for (const int32_t token : word) check_token("bad_words", token, vocab_size);
  }
}

SampleScratch::SampleScratch(int64_t vocab_size)
    : counts(static_cast<size_t>(vocab_size)),
      candidates(static_cast<size_t>(vocab_size)),
      weights(static_cast<size_t>(vocab_size)),
      block_sums(static_cast<size_t>(div_up(vocab_size, kWeightBlock))) {}

Sample sample_row(Isa isa, std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                  SampleScratch& scratch, const int32_t* mask) {
  RowSampler row(isa, logits, params, scratch, mask);
  Sample result;
  if (mask != nullptr && (params.temperature != 0.0f || params.num_logprobs >= 0)) row.hide_masked();
  double log_total = 0.0;
  if (params.num_logprobs >= 0) {
    log_total = row.log_total();
    row.best_logits(params.num_logprobs, result.top);
    for (TokenLogit& top : result.top) top.logit = static_cast<float>(top.logit - log_total);
  }
  const auto num_prompt_tokens = std::min(static_cast<size_t>(params.num_prompt_tokens), tokens.size());
  const auto output = tokens.subspan(num_prompt_tokens);
  row.adjust(tokens.first(num_prompt_tokens), output);
  result.token = params.temperature == 0.0f ? row.greedy() : row.draw(uniform_at(params.seed, output.size()));
  result.has_logprob = params.num_logprobs >= 0;
  if (result.has_logprob) result.logprob = static_cast<float>(row.raw_logit(result.token) - log_total);
  row.restore();
  return result;
}

void score_row(Isa isa, std::span<float> logits, int32_t token, float& logprob, std::span<TokenLogit> top,
               SampleScratch& scratch) {
  scratch.changed.clear();
  const SamplingParams params;
  RowSampler row(isa, logits, params, scratch, nullptr);
  const double log_total = row.log_total();
  logprob = static_cast<float>(row.raw_logit(token) - log_total);
  if (top.empty()) return;
  std::vector<TokenLogit> best;
  row.best_logits(static_cast<int32_t>(top.size()), best);
  for (size_t i = 0; i < top.size(); ++i) {
    top[i] = i < best.size() ? TokenLogit{best[i].token, static_cast<float>(best[i].logit - log_total)}
                             : TokenLogit{-1, -kInfinity};
  }
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  constexpr int kRounds = 10;
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = kMultiplier0 * counter[0];
    const uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key = {key[0] + kWeyl0, key[1] + kWeyl1};
  }
  return counter;
}

double uniform_at(uint64_t seed, uint64_t position) {
  const auto words = philox({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0},
                            {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return static_cast<double>(words[0] >> 8) * 0x1p-24;
}

}  // namespace blendserve
