// Activations as 8-bit integers on AVX-512, sixteen at a time: the bits of int8_group_portable.
#include "ops/avx512.h"
#include "ops/matmul_kernels.h"

namespace blendserve::kernels {
namespace {

// As integers, absolute values are ordered like floats, with NaNs above everything.
__m512i magnitudes(__m512i bits) { return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)); }

uint32_t largest_lane(__m512i v) {
  const __m256i eight = _mm256_max_epu32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 1))));
}

// The first `count` < 16 floats, the others are 0.
__m512 load_first(const float* x, int64_t count) {
  alignas(64) float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = x[i];
  return _mm512_loadu_ps(lanes);
}

uint32_t largest_magnitude(const float* x, int64_t count) {
  __m512i largest = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) largest = _mm512_max_epu32(largest, magnitudes(_mm512_loadu_si512(x + i)));
  if (i < count) largest = _mm512_max_epu32(largest, magnitudes(_mm512_castps_si512(load_first(x + i, count - i))));
  return largest_lane(largest);
}

// Of -127 to 127.
__m512i integers_of(__m512 x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)); }

// Moved up by kInt8Zero = 128: the flipped sign bit does that.
__m128i bytes_of(__m512i integers) { return _mm_xor_si128(_mm512_cvtsepi32_epi8(integers), _mm_set1_epi8(-128)); }

// Of 64 floats.
__m512i bytes_of_four(const float* x, __m512 inverse) {
  const auto integers = [&](int64_t at) { return integers_of(_mm512_loadu_ps(x + at), inverse); };
  const __m512i low = _mm512_packs_epi32(integers(0), integers(16));
  const __m512i high = _mm512_packs_epi32(integers(32), integers(48));
  // Packing works in quarters: lane l of the result has the l-th quads of all four vectors.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  return _mm512_xor_si512(packed, _mm512_set1_epi8(-128));
}

}  // namespace

float int8_group_avx512(const float* x, int64_t count, uint8_t* bytes) {
  const Int8Scale scale = int8_scale(largest_magnitude(x, count));
  if (!scale.is_finite) {
    for (int64_t i = 0; i < count; ++i) bytes[i] = kInt8Zero;
    return scale.scale;
  }
  const __m512 inverse = _mm512_set1_ps(scale.inverse);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) _mm512_storeu_si512(bytes + i, bytes_of_four(x + i, inverse));
  for (; i + 16 <= count; i += 16) {
    const __m128i some = bytes_of(integers_of(_mm512_loadu_ps(x + i), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), some);
  }
  if (i < count) {
    alignas(16) uint8_t last[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(last), bytes_of(integers_of(load_first(x + i, count - i), inverse)));
    for (int64_t j = 0; i + j < count; ++j) bytes[i + j] = last[j];
  }
  return scale.scale;
}

}  // namespace blendserve::kernels
