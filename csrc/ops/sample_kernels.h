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
