// int8 products on AVX-VNNI: vpdpbusd adds four products to a 32-bit sum, the instruction of AVX512-VNNI in AVX2's
// registers.
#include "ops/avx512.h"
#include "ops/matmul_int8_kernels.h"
#include "ops/matmul_int8_vectors.h"

namespace blendserve::kernels {
namespace {

struct Lanes : Avx2Vectors {
  // 6 rows x 16 columns = 12 sums, 2 weights and 1 activation: enough independent sums for a latency of 5 cycles, two
  // instructions per cycle.
  static constexpr int kMaxRows = 6;
  static constexpr int kMaxPanels = 1;

  [[gnu::always_inline]] static void add_products(Ints& sum, Ints bytes, Ints weights) {
#if defined(BLENDSERVE_SIMDE)
    sum = _mm256_dpbusd_epi32(sum, bytes, weights);
#else
    // Written out: GCC 12 copies and spills sums around its intrinsic.
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(bytes), "x"(weights));
#endif
  }
};

}  // namespace

void int8_tile_avxvnni(const Int8TileArgs& args) { int8_tile_on<Lanes>(args); }
int64_t num_prefetch_pieces_int8_avxvnni(const MatmulTile& tile, int64_t k, int64_t iteration_bytes) {
  return num_int8_prefetch_pieces<Lanes>(tile, k, iteration_bytes);
}

}  // namespace blendserve::kernels
