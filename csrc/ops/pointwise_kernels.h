// The source of pointwise_<isa>.cpp: compiled once for each instruction set, see simd.h.
#include <cmath>

#include "ops/simd.h"

namespace blendserve::BLENDSERVE_KERNELS {

float mean_square(const float* x, int64_t n) {
  constexpr int kChains = 4;  // independent sums, so that additions do not wait for each other
  Vec sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) {
      const Vec v = load(x + i + c * kWidth);
      sum[c] = fma(v, v, sum[c]);
    }
  }
  for (; i + kWidth <= n; i += kWidth) {
    const Vec v = load(x + i);
    sum[0] = fma(v, v, sum[0]);
  }
  if (i < n) {
    const Vec v = load_first(x + i, n - i);
    sum[1] = fma(v, v, sum[1]);
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(n);
}

void rms_norm_row(const float* x, const float* weight, float epsilon, int64_t n, float* y) {
  const Vec inverse = set(1.0f / sqrtf(mean_square(x, n) + epsilon));
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(x + i) * inverse * load(weight + i));
  if (i < n) store_first(y + i, load_first(x + i, n - i) * inverse * load_first(weight + i, n - i), n - i);
}

BLENDSERVE_INLINE Vec silu(Vec x) { return x / (set(1.0f) + exp(Vec{} - x)); }

void silu_mul_row(const float* gate, const float* up, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, silu(load(gate + i)) * load(up + i));
  if (i < n) store_first(y + i, silu(load_first(gate + i, n - i)) * load_first(up + i, n - i), n - i);
}

void rotate_row(float* x, const float* cosine, const float* sine, int64_t half, float scale) {
  const Vec factor = set(scale);
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Vec a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
    store(x + i, (a * c - b * s) * factor);
    store(x + half + i, (b * c + a * s) * factor);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = (a * cosine[i] - b * sine[i]) * scale;
    x[half + i] = (b * cosine[i] + a * sine[i]) * scale;
  }
}

void round_row(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_upper_halves(y + i, round_to_bf16(load(x + i)));
  if (i == n) return;
  uint16_t lanes[kWidth];
  store_upper_halves(lanes, round_to_bf16(load_first(x + i, n - i)));
  std::memcpy(y + i, lanes, static_cast<size_t>(n - i) * sizeof(uint16_t));
}

void exp_row(const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, exp(load(x + i)));
  if (i < n) store_first(y + i, exp(load_first(x + i, n - i)), n - i);
}

}  // namespace blendserve::BLENDSERVE_KERNELS
