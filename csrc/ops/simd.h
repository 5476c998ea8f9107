// A small vector of floats, in the instruction set of the file that includes it: define BLENDSERVE_USE_AVX512 first to
// get AVX-512 (16 lanes), or BLENDSERVE_USE_AVX2 to get AVX2 + FMA (8 lanes), else GCC's generic vectors (4 lanes).
// Kernels are written once against it, in namespace blendserve::BLENDSERVE_KERNELS; everything here has internal
// linkage, so no file lends its instructions to another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(BLENDSERVE_USE_AVX512)
#include "ops/avx512.h"
#define BLENDSERVE_KERNELS avx512
#elif defined(BLENDSERVE_USE_AVX2)
#include <immintrin.h>
#define BLENDSERVE_KERNELS avx2
#else
#define BLENDSERVE_KERNELS portable
#endif

#define BLENDSERVE_INLINE [[gnu::always_inline]] static inline

namespace blendserve::BLENDSERVE_KERNELS {

#if defined(BLENDSERVE_USE_AVX512)

using Vec = __m512;
using Bits = __m512i;
constexpr int kWidth = 16;

BLENDSERVE_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
BLENDSERVE_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
BLENDSERVE_INLINE Vec set(float x) { return _mm512_set1_ps(x); }
BLENDSERVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
// Where either is a NaN the result is b.
BLENDSERVE_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
BLENDSERVE_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
BLENDSERVE_INLINE Bits bits(Vec v) { return _mm512_castps_si512(v); }
BLENDSERVE_INLINE Vec floats(Bits v) { return _mm512_castsi512_ps(v); }
BLENDSERVE_INLINE Bits load_bits(const void* p) { return _mm512_loadu_si512(p); }
BLENDSERVE_INLINE Bits set_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
template <int kShift>
BLENDSERVE_INLINE Bits shift_left(Bits v) {
  return _mm512_slli_epi32(v, kShift);
}
template <int kShift>
BLENDSERVE_INLINE Bits shift_right(Bits v) {
  return _mm512_srli_epi32(v, kShift);
}
BLENDSERVE_INLINE Bits add_bits(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
BLENDSERVE_INLINE Bits and_bits(Bits a, Bits b) { return _mm512_and_si512(a, b); }
BLENDSERVE_INLINE Bits or_bits(Bits a, Bits b) { return _mm512_or_si512(a, b); }
// v where x >= bound or x is a NaN, else 0.
BLENDSERVE_INLINE Vec keep_if_not_below(Vec v, Vec x, Vec bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), v);
}
// a where x is a NaN, else b.
BLENDSERVE_INLINE Bits choose_if_nan(Vec x, Bits a, Bits b) {
  return _mm512_mask_mov_epi32(b, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), a);
}
// One bit per lane: a >= b.
BLENDSERVE_INLINE uint32_t mask_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// Stores the upper half of each lane.
BLENDSERVE_INLINE void store_upper_halves(uint16_t* p, Bits v) {
  const __m256i halves = _mm512_cvtsepi32_epi16(_mm512_srai_epi32(v, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}

#elif defined(BLENDSERVE_USE_AVX2)

using Vec = __m256;
using Bits = __m256i;
constexpr int kWidth = 8;

BLENDSERVE_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
BLENDSERVE_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
BLENDSERVE_INLINE Vec set(float x) { return _mm256_set1_ps(x); }
BLENDSERVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
BLENDSERVE_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
BLENDSERVE_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
BLENDSERVE_INLINE Bits bits(Vec v) { return _mm256_castps_si256(v); }
BLENDSERVE_INLINE Vec floats(Bits v) { return _mm256_castsi256_ps(v); }
BLENDSERVE_INLINE Bits load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
BLENDSERVE_INLINE Bits set_bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
template <int kShift>
BLENDSERVE_INLINE Bits shift_left(Bits v) {
  return _mm256_slli_epi32(v, kShift);
}
template <int kShift>
BLENDSERVE_INLINE Bits shift_right(Bits v) {
  return _mm256_srli_epi32(v, kShift);
}
BLENDSERVE_INLINE Bits add_bits(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
BLENDSERVE_INLINE Bits and_bits(Bits a, Bits b) { return _mm256_and_si256(a, b); }
BLENDSERVE_INLINE Bits or_bits(Bits a, Bits b) { return _mm256_or_si256(a, b); }
BLENDSERVE_INLINE Vec keep_if_not_below(Vec v, Vec x, Vec bound) {
  return _mm256_and_ps(v, _mm256_cmp_ps(x, bound, _CMP_NLT_UQ));
}
BLENDSERVE_INLINE Bits choose_if_nan(Vec x, Bits a, Bits b) {
  const Vec is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return bits(_mm256_blendv_ps(floats(b), floats(a), is_nan));
}
BLENDSERVE_INLINE uint32_t mask_at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
BLENDSERVE_INLINE void store_upper_halves(uint16_t* p, Bits v) {
  const Bits halves = shift_right<16>(v);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

#else

typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int kWidth = 4;

BLENDSERVE_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
BLENDSERVE_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
BLENDSERVE_INLINE Vec set(float x) { return Vec{x, x, x, x}; }
BLENDSERVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
BLENDSERVE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
BLENDSERVE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
BLENDSERVE_INLINE Bits bits(Vec v) { return (Bits)v; }
BLENDSERVE_INLINE Vec floats(Bits v) { return (Vec)v; }
BLENDSERVE_INLINE Bits load_bits(const void* p) {
  Bits v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
BLENDSERVE_INLINE Bits set_bits(uint32_t x) { return Bits{x, x, x, x}; }
template <int kShift>
BLENDSERVE_INLINE Bits shift_left(Bits v) {
  return v << kShift;
}
template <int kShift>
BLENDSERVE_INLINE Bits shift_right(Bits v) {
  return v >> kShift;
}
BLENDSERVE_INLINE Bits add_bits(Bits a, Bits b) { return a + b; }
BLENDSERVE_INLINE Bits and_bits(Bits a, Bits b) { return a & b; }
BLENDSERVE_INLINE Bits or_bits(Bits a, Bits b) { return a | b; }
BLENDSERVE_INLINE Vec keep_if_not_below(Vec v, Vec x, Vec bound) { return floats(bits(v) & ~(Bits)(x < bound)); }
BLENDSERVE_INLINE Bits choose_if_nan(Vec x, Bits a, Bits b) {
  const Bits is_number = (Bits)(x == x);
  return (b & is_number) | (a & ~is_number);
}
BLENDSERVE_INLINE uint32_t mask_at_least(Vec a, Vec b) {
  const auto is_set = a >= b;
  return (is_set[0] & 1u) | (is_set[1] & 2u) | (is_set[2] & 4u) | (is_set[3] & 8u);
}
BLENDSERVE_INLINE void store_upper_halves(uint16_t* p, Bits v) {
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint16_t>(v[i] >> 16);
}

#endif

// The two bf16 of each 32-bit word, as floats.
BLENDSERVE_INLINE Vec low_bf16(Bits v) { return floats(shift_left<16>(v)); }
BLENDSERVE_INLINE Vec high_bf16(Bits v) { return floats(and_bits(v, set_bits(0xffff0000u))); }

// Lanes that hold the nearest bf16 in their upper halves, ties to even; a NaN stays a quiet NaN. As bf16_from_float.
BLENDSERVE_INLINE Bits round_to_bf16(Vec v) {
  const Bits exact = bits(v);
  const Bits is_odd = and_bits(shift_right<16>(exact), set_bits(1));
  const Bits rounded = add_bits(add_bits(exact, set_bits(0x7fff)), is_odd);
  return choose_if_nan(v, or_bits(exact, set_bits(0x00400000u)), rounded);
}

// Reductions over the lanes, halves first: one order for each width.
#if defined(BLENDSERVE_USE_AVX2) || defined(BLENDSERVE_USE_AVX512)
BLENDSERVE_INLINE float sum_eight(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
BLENDSERVE_INLINE float max_eight(__m256 v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#endif

#if defined(BLENDSERVE_USE_AVX512)
BLENDSERVE_INLINE __m256 low_half(Vec v) { return _mm512_castps512_ps256(v); }
BLENDSERVE_INLINE __m256 high_half(Vec v) { return _mm512_extractf32x8_ps(v, 1); }
BLENDSERVE_INLINE float sum_lanes(Vec v) { return sum_eight(_mm256_add_ps(low_half(v), high_half(v))); }
BLENDSERVE_INLINE float max_lanes(Vec v) { return max_eight(_mm256_max_ps(low_half(v), high_half(v))); }
BLENDSERVE_INLINE float first_lane(Vec v) { return _mm256_cvtss_f32(low_half(v)); }
#elif defined(BLENDSERVE_USE_AVX2)
BLENDSERVE_INLINE float sum_lanes(Vec v) { return sum_eight(v); }
BLENDSERVE_INLINE float max_lanes(Vec v) { return max_eight(v); }
BLENDSERVE_INLINE float first_lane(Vec v) { return _mm256_cvtss_f32(v); }
#else
BLENDSERVE_INLINE float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
BLENDSERVE_INLINE float max_lanes(Vec v) {
  const float low = v[0] > v[1] ? v[0] : v[1];
  const float high = v[2] > v[3] ? v[2] : v[3];
  return low > high ? low : high;
}
BLENDSERVE_INLINE float first_lane(Vec v) { return v[0]; }
#endif

// Loads the first count < kWidth floats, the other lanes are 0; and the store that matches.
BLENDSERVE_INLINE Vec load_first(const float* p, int64_t count) {
  float lanes[kWidth] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}
BLENDSERVE_INLINE void store_first(float* p, Vec v, int64_t count) {
  float lanes[kWidth];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

// e^x within kExpRelativeError (pointwise.h) for x in [-87.33, 88]; 0 below, e^88 above, NaN for NaN; e^0 is exactly 1.
// x = n ln2 + r with |r| <= ln2 / 2; e^r = 1 + r + r^2 q(r), q of degree 4 fitted (Lawson) to 3.7e-9 relative.
BLENDSERVE_INLINE Vec exp(Vec x) {
  const Vec smallest = set(-87.33f);  // e^x is still a normal number
  x = min(set(88.0f), x);
  const Vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const Vec shifted = fma(x, set(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, set(-0.693359375f), x);  // ln2 in two parts, the first exact in few bits
  r = fma(n, set(2.12194440e-4f), r);
  Vec q = set(0x1.6a23cep-10f);
  q = fma(q, r, set(0x1.123a2p-7f));
  q = fma(q, r, set(0x1.5558f2p-5f));
  q = fma(q, r, set(0x1.555492p-3f));
  q = fma(q, r, set(0x1.fffffcp-2f));
  const Vec power = fma(q, r * r, r) + set(1.0f);
  const Vec scaled = floats(add_bits(bits(power), shift_left<23>(bits(shifted))));
  return keep_if_not_below(scaled, x, smallest);
}

}  // namespace blendserve::BLENDSERVE_KERNELS
