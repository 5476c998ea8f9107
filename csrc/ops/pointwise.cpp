#include "ops/pointwise.h"

#include "ops/bf16.h"
#include "ops/dispatch.h"

namespace blendserve {

BLENDSERVE_DECLARE_KERNEL(void, rms_norm_row, (const float*, const float*, float, int64_t, float*))
BLENDSERVE_DECLARE_KERNEL(void, silu_mul_row, (float*, const float*, int64_t))
BLENDSERVE_DECLARE_KERNEL(void, rotate_row, (float*, const float*, const float*, int64_t, float))
BLENDSERVE_DECLARE_KERNEL(void, exp_row, (const float*, int64_t, float*))

void embed_row(const uint16_t* row, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = float_from_bf16(row[i]);
}

void rms_norm_row(Isa isa, const float* x, const float* weight, float epsilon, int64_t n, float* y) {
  BLENDSERVE_CALL_KERNEL(isa, rms_norm_row, x, weight, epsilon, n, y);
}

void silu_mul_row(Isa isa, float* gate, const float* up, int64_t n) {
  BLENDSERVE_CALL_KERNEL(isa, silu_mul_row, gate, up, n);
}

void rotate_row(Isa isa, float* x, const float* cosine, const float* sine, int64_t half, float scale) {
  BLENDSERVE_CALL_KERNEL(isa, rotate_row, x, cosine, sine, half, scale);
}

void exp_row(Isa isa, const float* x, int64_t n, float* y) { BLENDSERVE_CALL_KERNEL(isa, exp_row, x, n, y); }

}  // namespace blendserve
