// The ops between matrix products and attention, row by row: embedding, RMSNorm, SwiGLU's activation, rotary positions.
// Each row's result depends on that row alone. All arrays are float32; rows are `ld` elements apart.
#pragma once

#include <cstdint>

#include "ops/isa.h"

namespace blendserve {

// Largest relative error of the vectorised exp: 3.7e-9 of its polynomial and five roundings of at most 2^-24.
inline constexpr double kExpRelativeError = 3e-7;

// y[0, n) = bf16 row as floats.
void embed_row(const uint16_t* row, int64_t n, float* y);

// y = x / sqrt(mean(x^2) + epsilon) * weight; y may be x.
void rms_norm_row(Isa isa, const float* x, const float* weight, float epsilon, int64_t n, float* y);

// y = gate / (1 + e^-gate) * up; y may be gate.
void silu_mul_row(Isa isa, const float* gate, const float* up, int64_t n, float* y);

// x[i], x[i + half] = the pair turned by the angle of (cosine[i], sine[i]) and multiplied by `scale`, in place.
void rotate_row(Isa isa, float* x, const float* cosine, const float* sine, int64_t half, float scale);

// y = x rounded to bf16 as bf16_from_float does; the same bits on every Isa.
void round_row(Isa isa, const float* x, int64_t n, uint16_t* y);

// y = e^x element by element, for tests and sampling.
void exp_row(Isa isa, const float* x, int64_t n, float* y);

}  // namespace blendserve
