// Activations as 8-bit integers on AVX-512, sixteen at a time: the bits of int8_group_portable.
#include "ops/avx512.h"
#include "ops/matmul_kernels.h"

namespace blendserve::kernels {
namespace {

// As integers, absolute values are ordered like floats, with NaNs above everything.
__m512i magnitudes(__m512i bits) { return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)); }

uint32_t largest_lane(__m512i v) {
  alignas(64) uint32_t lanes[16];
  _mm512_storeu_si512(lanes, v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
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

// Integers of -127 to 127, moved up by kInt8Zero = 128: the flipped sign bit does that.
__m128i bytes_of(__m512 x, __m512 inverse) {
  const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
  return _mm_xor_si128(_mm512_cvtsepi32_epi8(integers), _mm_set1_epi8(-128));
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
  for (; i + 16 <= count; i += 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), bytes_of(_mm512_loadu_ps(x + i), inverse));
  }
  if (i < count) {
    alignas(16) uint8_t last[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(last), bytes_of(load_first(x + i, count - i), inverse));
    for (int64_t j = 0; i + j < count; ++j) bytes[i + j] = last[j];
  }
  return scale.scale;
}

}  // namespace blendserve::kernels
