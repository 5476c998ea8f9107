// The source of sample_<isa>.cpp: passes over a vocabulary, compiled once for each instruction set, see simd.h.
#include <math.h>

#include "ops/sample.h"
#include "ops/simd.h"

namespace blendserve::BLENDSERVE_KERNELS {

// NaNs are passed over; -infinity where nothing is left.
float largest(const float* x, int64_t n) {
  constexpr int kChains = 4;
  Vec best[kChains];
  for (Vec& v : best) v = set(-INFINITY);
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) best[c] = max(load(x + i + c * kWidth), best[c]);
  }
  float result = max_lanes(max(max(best[0], best[1]), max(best[2], best[3])));
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// The first token with x >= bound; 0 where there is none.
int32_t first_at_least(const float* x, int64_t n, float bound) {
  const Vec limit = set(bound);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const uint32_t mask = mask_at_least(load(x + i), limit);
    if (mask != 0) return static_cast<int32_t>(i + __builtin_ctz(mask));
  }
  for (; i < n; ++i) {
    if (x[i] >= bound) return static_cast<int32_t>(i);
  }
  return 0;
}

// Writes the tokens with x >= bound, in order; returns how many.
int64_t collect_at_least(const float* x, int64_t n, float bound, TokenLogit* out) {
  const Vec limit = set(bound);
  int64_t count = 0, i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (uint32_t mask = mask_at_least(load(x + i), limit); mask != 0; mask &= mask - 1) {
      const int64_t token = i + __builtin_ctz(mask);
      out[count++] = {static_cast<int32_t>(token), x[token]};
    }
  }
  for (; i < n; ++i) {
    if (x[i] >= bound) out[count++] = {static_cast<int32_t>(i), x[i]};
  }
  return count;
}

namespace {

inline bool is_allowed(const int32_t* mask, int64_t token) {
  return ((static_cast<uint32_t>(mask[token / kMaskBits]) >> (token % kMaskBits)) & 1u) != 0;
}

}  // namespace

// -infinity for tokens that the mask leaves out.
void hide_masked(float* x, int64_t n, const int32_t* mask) {
  const Vec hidden = set(-INFINITY);
  int64_t i = 0;
  for (; i + kMaskBits <= n; i += kMaskBits) {
    const int32_t word = mask[i / kMaskBits];
    if (word == -1) continue;
    if (word == 0) {
      for (int64_t j = 0; j < kMaskBits; j += kWidth) store(x + i + j, hidden);
      continue;
    }
    for (int64_t j = i; j < i + kMaskBits; ++j) x[j] = is_allowed(mask, j) ? x[j] : -INFINITY;
  }
  for (; i < n; ++i) x[i] = is_allowed(mask, i) ? x[i] : -INFINITY;
}

// The best token that the mask leaves, the first of equals; -1 where all of them are -infinity or NaN.
int32_t best_allowed(const float* x, int64_t n, const int32_t* mask) {
  float best = -INFINITY;
  int64_t token = -1, i = 0;
  for (; i + kMaskBits <= n; i += kMaskBits) {
    const int32_t word = mask[i / kMaskBits];
    if (word == 0) continue;
    if (word == -1) {
      const float here = largest(x + i, kMaskBits);
      if (!(here > best)) continue;
      best = here;
      token = i + first_at_least(x + i, kMaskBits, here);
      continue;
    }
    for (uint32_t left = static_cast<uint32_t>(word); left != 0; left &= left - 1) {
      const int64_t j = i + __builtin_ctz(left);
      if (x[j] > best) best = x[j], token = j;
    }
  }
  for (; i < n; ++i) {
    if (is_allowed(mask, i) && x[i] > best) best = x[i], token = i;
  }
  return static_cast<int32_t>(token);
}

// weights[i] = e^((x[i] - largest) * inverse_temperature); sums of blocks of kWeightBlock of them.
void weigh(const float* x, int64_t n, float largest, float inverse_temperature, float* weights, double* block_sums) {
  const Vec shift = set(largest), scale = set(inverse_temperature);
  for (int64_t block = 0; block * kWeightBlock < n; ++block) {
    const int64_t end = (block + 1) * kWeightBlock < n ? (block + 1) * kWeightBlock : n;
    int64_t i = block * kWeightBlock;
    Vec sum = {};
    for (; i + kWidth <= end; i += kWidth) {
      const Vec weight = exp((load(x + i) - shift) * scale);
      store(weights + i, weight);
      sum = sum + weight;
    }
    double total = sum_lanes(sum);
    for (; i < end; ++i) {
      weights[i] = first_lane(exp((set(x[i]) - shift) * scale));
      total += weights[i];
    }
    block_sums[block] = total;
  }
}

}  // namespace blendserve::BLENDSERVE_KERNELS
