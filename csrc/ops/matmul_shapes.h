// Matrix products of real models with their flop, bytes and error bounds. Tests, benchmarks and calibration read
// it.
#pragma once

#include <cstdint>
#include <string_view>

namespace blendserve {

// One matmul [m, k] x [n, k]^T of a model; m is the caller's.
struct MatmulShape {
  std::string_view name;
  int64_t n, k;

  constexpr int64_t flop(int64_t m) const { return 2 * m * n * k; }
  constexpr int64_t weight_bytes() const { return 2 * n * k; }  // bf16
  // Bytes that have to move at least once: weights, float32 activations and outputs.
  constexpr int64_t bytes(int64_t m) const { return weight_bytes() + 4 * m * (n + k); }
};

inline constexpr MatmulShape kSmolLm2Shapes[] = {
    {"qkv", 960, 576}, {"o", 576, 576}, {"gate_up", 3072, 576}, {"down", 576, 1536}, {"lm_head", 49152, 576},
};
inline constexpr MatmulShape kLlama1bShapes[] = {
    {"1b.qkv", 3072, 2048},
    {"1b.o", 2048, 2048},
    {"1b.gate_up", 16384, 2048},
    {"1b.down", 2048, 8192},
};
inline constexpr int64_t kMatmulRows[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048};

// Bound of the error of a float32 sum over k products and two more terms whose absolute values sum to `magnitude`:
// every product and every addition rounds by at most half a unit in the last place (fused or in pairs they round less
// often).
constexpr double matmul_error_bound(int64_t k, double magnitude) {
  constexpr double kHalfUlp = 1.0 / (1 << 24);
  return magnitude * static_cast<double>(2 * k + 2) * kHalfUlp;
}

}  // namespace blendserve
