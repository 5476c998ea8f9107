#include "ops/pointwise.h"

#include "ops/bf16.h"
#include "ops/dispatch.h"

namespace blendserve {

BLENDSERVE_DECLARE_WIDE_KERNEL(void, rms_norm_row, (const float*, const float*, float, int64_t, float*))
BLENDSERVE_DECLARE_WIDE_KERNEL(void, silu_mul_row, (const float*, const float*, int64_t, float*))
BLENDSERVE_DECLARE_WIDE_KERNEL(void, rotate_row, (float*, const float*, const float*, int64_t, float))
BLENDSERVE_DECLARE_WIDE_KERNEL(void, round_row, (const float*, int64_t, uint16_t*))
BLENDSERVE_DECLARE_WIDE_KERNEL(void, exp_row, (const float*, int64_t, float*))

void embed_row(const uint16_t* row, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = float_from_bf16(row[i]);
}

void rms_norm_row(Isa isa, const float* x, const float* weight, float epsilon, int64_t n, float* y) {
  BLENDSERVE_CALL_WIDE_KERNEL(isa, rms_norm_row, x, weight, epsilon, n, y);
}

void silu_mul_row(Isa isa, const float* gate, const float* up, int64_t n, float* y) {
  BLENDSERVE_CALL_WIDE_KERNEL(isa, silu_mul_row, gate, up, n, y);
}

void rotate_row(Isa isa, float* x, const float* cosine, const float* sine, int64_t half, float scale) {
  BLENDSERVE_CALL_WIDE_KERNEL(isa, rotate_row, x, cosine, sine, half, scale);
}

void round_row(Isa isa, const float* x, int64_t n, uint16_t* y) {
  BLENDSERVE_CALL_WIDE_KERNEL(isa, round_row, x, n, y);
}

void exp_row(Isa isa, const float* x, int64_t n, float* y) { BLENDSERVE_CALL_WIDE_KERNEL(isa, exp_row, x, n, y); }

}  // namespace blendserve
