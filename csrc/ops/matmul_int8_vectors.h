// Vectors of the int8 kernel in AVX2's registers, for AVX2 and AVX-VNNI. Private to csrc/ops/matmul_int8_*.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace blendserve::kernels {
namespace {

struct Avx2Vectors {
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int kWidth = 8;

  [[gnu::always_inline]] static Ints load(const int8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  [[gnu::always_inline]] static Ints repeat(const uint8_t* p) {
    int quad;
    __builtin_memcpy(&quad, p, sizeof(quad));
    return _mm256_set1_epi32(quad);
  }
  [[gnu::always_inline]] static Ints load(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  [[gnu::always_inline]] static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
  [[gnu::always_inline]] static Floats set(float a) { return _mm256_set1_ps(a); }
  [[gnu::always_inline]] static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  [[gnu::always_inline]] static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  [[gnu::always_inline]] static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  [[gnu::always_inline]] static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
};

}  // namespace
}  // namespace blendserve::kernels
