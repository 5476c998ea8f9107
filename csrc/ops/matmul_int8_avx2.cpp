// int8 products on AVX2: vpmaddubsw adds two products in 16 bits, vpmaddwd with ones two of those in 32. Three
// instructions for 32 multiply-adds, two of them multiplies, of which a core starts two per cycle: twice the rate of
// float32's fused multiply-add. Weights widened to 16 bits (vpmaddwd alone) ran no faster than float32.
#include <immintrin.h>

#include "ops/matmul_int8_kernels.h"
#include "ops/matmul_int8_vectors.h"

namespace blendserve::kernels {
namespace {

struct Lanes : Avx2Vectors {
  // 4 rows x 16 columns = 8 sums, 2 weights, 1 activation, the ones and 2 intermediate results; 5 and 6 rows, with the
  // registers full, were a tenth slower.
  static constexpr int kMaxRows = 4;
  static constexpr int kMaxPanels = 1;

  [[gnu::always_inline]] static void add_products(Ints& sum, Ints bytes, Ints weights) {
    const __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, weights), _mm256_set1_epi16(1));
    // In so many words, since GCC 12 would start all products of an iteration before it adds any, and run out of
    // registers.
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
  }
};

}  // namespace

void int8_tile_avx2(const Int8TileArgs& args) { int8_tile_on<Lanes>(args); }
int64_t num_prefetch_pieces_int8_avx2(const MatmulTile& tile, int64_t k, int64_t iteration_bytes) {
  return num_int8_prefetch_pieces<Lanes>(tile, k, iteration_bytes);
}

float int8_group_avx2(const float* x, int64_t count, uint8_t* bytes) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i max8 = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    max8 = _mm256_max_epu32(max8, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)), magnitude));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), max8);
  uint32_t max_bits = 0;
  for (const uint32_t lane : lanes) max_bits = lane > max_bits ? lane : max_bits;
  for (; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffffu;
    max_bits = bits > max_bits ? bits : max_bits;
  }
  const Int8Scale scale = int8_scale(max_bits);
  if (!scale.is_finite) {
    for (i = 0; i < count; ++i) bytes[i] = kInt8Zero;
    return scale.scale;
  }
  const __m256 inverse = _mm256_set1_ps(scale.inverse);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes that packing works in halves
  const auto integers = [&](int64_t at) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + at), inverse)); };
  for (i = 0; i + 32 <= count; i += 32) {
    const __m256i low = _mm256_packs_epi32(integers(i), integers(i + 8));
    const __m256i high = _mm256_packs_epi32(integers(i + 16), integers(i + 24));
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i), _mm256_xor_si256(packed, _mm256_set1_epi8(-128)));
  }
  for (; i < count; ++i) {
    bytes[i] = static_cast<uint8_t>(kInt8Zero + _mm_cvtss_si32(_mm_set_ss(x[i] * scale.inverse)));
  }
  return scale.scale;
}

}  // namespace blendserve::kernels
