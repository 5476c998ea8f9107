// The fallback for every processor: multiplies and adds apart (never fused), four floats at a time through the
// compiler's vector extension.
#include <cstring>

#include "ops/bf16.h"
#include "ops/matmul_kernels.h"

namespace blendserve::kernels {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

constexpr int kVectors = 4;      // of 4 columns: one weight panel
constexpr int64_t kMaxRows = 2;  // 8 accumulators, 4 weights and a few more fill 16 registers

template <int kRows>
void block(const float* x, int64_t ldx, const uint16_t* w, int64_t num_k, Floats (&sums)[kRows][kVectors]) {
  for (int64_t k = 0; k < num_k; k += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Words raw;
      std::memcpy(&raw, w + k * kWeightPanel + v * 8, sizeof(raw));
      const Floats even = reinterpret_cast<Floats>(raw << 16);
      const Floats odd = reinterpret_cast<Floats>(raw & 0xffff0000u);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] += x[r * ldx + k] * even;
        sums[r][v] += x[r * ldx + k + 1] * odd;
      }
    }
  }
}

// Row by row and column by column at the edges of memory: only here can a panel be partly outside the output.
template <int kRows>
void run(const TileArgs& a, int64_t row, int64_t col) {
  const int64_t num_k = round_up(a.k, 2);
  const int64_t ldx = row_stride(a.k);
  const int64_t num_columns = min64(kWeightPanel, a.tile.col_end - col);
  float sums[kRows][kWeightPanel] = {};
  float* y = a.y + row * a.ldy + col;
  for (int r = 0; a.accumulate && r < kRows; ++r) {
    std::memcpy(sums[r], y + r * a.ldy, static_cast<size_t>(num_columns) * sizeof(float));
  }
  Floats vectors[kRows][kVectors];
  std::memcpy(vectors, sums, sizeof(sums));
  block<kRows>(static_cast<const float*>(a.x) + row * ldx, ldx, a.w + col * num_k, num_k, vectors);
  std::memcpy(sums, vectors, sizeof(sums));
  for (int r = 0; r < kRows; ++r) {
    for (int64_t c = 0; a.bias != nullptr && c < num_columns; ++c) sums[r][c] += a.bias[col + c];
    std::memcpy(y + r * a.ldy, sums[r], static_cast<size_t>(num_columns) * sizeof(float));
  }
}

}  // namespace

void tile_portable(const TileArgs& args) {
  const MatmulTile& t = args.tile;
  for (int64_t col = t.col_begin; col < t.col_end; col += kWeightPanel) {
    int64_t row = t.row_begin;
    for (; row + kMaxRows <= t.row_end; row += kMaxRows) run<kMaxRows>(args, row, col);
    if (row < t.row_end) run<1>(args, row, col);
  }
}

}  // namespace blendserve::kernels
