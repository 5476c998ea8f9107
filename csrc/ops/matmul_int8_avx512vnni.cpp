// int8 products on AVX512-VNNI: vpdpbusd adds four products to a 32-bit sum, in sixteen lanes.
#include "ops/avx512.h"
#include "ops/matmul_int8_kernels.h"

// GCC 12 takes the undefined operand in its own _mm512_cvtepi32_ps for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace blendserve::kernels {
namespace {

struct Lanes {
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kWidth = 16;
  // 12 rows x 32 columns = 24 sums, 2 weights and 1 activation of 32 registers.
  static constexpr int kMaxRows = 12;
  static constexpr int kMaxPanels = 2;

  [[gnu::always_inline]] static Ints load(const int8_t* p) { return _mm512_loadu_si512(p); }
  [[gnu::always_inline]] static Ints repeat(const uint8_t* p) {
    int quad;
    __builtin_memcpy(&quad, p, sizeof(quad));
    return _mm512_set1_epi32(quad);
  }
  [[gnu::always_inline]] static Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
  [[gnu::always_inline]] static void add_products(Ints& sum, Ints bytes, Ints weights) {
#if defined(BLENDSERVE_SIMDE)
    sum = _mm512_dpbusd_epi32(sum, bytes, weights);
#else
    // Written out: GCC 12 copies and spills sums around its intrinsic, which halves the rate.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
#endif
  }
  [[gnu::always_inline]] static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  [[gnu::always_inline]] static Floats set(float a) { return _mm512_set1_ps(a); }
  [[gnu::always_inline]] static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  [[gnu::always_inline]] static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  [[gnu::always_inline]] static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  [[gnu::always_inline]] static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
};

}  // namespace

void int8_tile_avx512vnni(const Int8TileArgs& args) { int8_tile_on<Lanes>(args); }
int64_t num_prefetch_pieces_int8_avx512vnni(const MatmulTile& tile, int64_t k, int64_t iteration_bytes) {
  return num_int8_prefetch_pieces<Lanes>(tile, k, iteration_bytes);
}

}  // namespace blendserve::kernels
