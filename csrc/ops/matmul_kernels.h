// What matmul.cpp and the kernels of each instruction set share; private to csrc/ops/matmul*.cpp, tests and benchmarks.
//
// Weights: panels of kPanel<isa> columns, zero-padded; inside a panel [k / 2][columns][2], so that one 32-bit lane
// holds two neighbours in k of one column: `lane << 16` and `lane & 0xffff0000` are the two as float32, and a bf16 dot
// product takes the lane as it is.
#pragma once

#include <cstdint>

#include "ops/matmul.h"

namespace blendserve::kernels {

inline constexpr int64_t kWeightPanel = 16;            // kPortable, kAvx2: two AVX registers of float32
inline constexpr int64_t kWeightPanelAvx512Bf16 = 32;  // two AVX-512 registers of bf16 pairs

[[gnu::always_inline]] constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
[[gnu::always_inline]] constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
[[gnu::always_inline]] constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Floats from one packed row of activations to the next: k padded with zeros to whole cache lines, and an odd number of
// lines. An even one would map the rows of a block onto few cache sets where k is a multiple of 1024.
[[gnu::always_inline]] constexpr int64_t row_stride(int64_t k) { return (ceil_div(k, 16) | 1) * 16; }

// kAvx2 visits all columns of a tile with at most so many values of k of its rows at a time: longer sums are cut (and
// go on from y, which is exact), so that the rows of a tile stay in L2 and 16 columns of weights (24 KiB) in L1.
inline constexpr int64_t kMaxResidentK = 768;

// One call of matmul_tile, with the weights unwrapped.
struct TileArgs {
  const void* x;
  const uint16_t* w;
  int64_t k;
  MatmulTile tile;
  const float* bias;
  bool accumulate;
  float* y;
  int64_t ldy;
};

void tile_portable(const TileArgs& args);
void tile_avx2(const TileArgs& args);
void tile_avx512bf16(const TileArgs& args);
void pack_rows_avx512bf16(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k, void* packed);

// Runs a kernel on a block (y, ldy, is_loaded, bias) whose columns end before its last weight panel does: on copies
// that are as wide as whole panels.
template <int64_t kMaxRows, int64_t kWidth, class Block, class Run>
void run_padded(Block block, int64_t num_rows, int64_t num_columns, Run run) {
  alignas(64) float y[kMaxRows * kWidth] = {};
  alignas(64) float bias[kWidth] = {};
  float* const target = block.y;
  const int64_t ldy = block.ldy;
  for (int64_t r = 0; block.is_loaded && r < num_rows; ++r) {
    for (int64_t c = 0; c < num_columns; ++c) y[r * kWidth + c] = target[r * ldy + c];
  }
  for (int64_t c = 0; block.bias != nullptr && c < num_columns; ++c) bias[c] = block.bias[c];
  block.y = y;
  block.ldy = kWidth;
  if (block.bias != nullptr) block.bias = bias;
  run(block);
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t c = 0; c < num_columns; ++c) target[r * ldy + c] = y[r * kWidth + c];
  }
}

}  // namespace blendserve::kernels
