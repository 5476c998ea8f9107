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

// Two ways through the same arithmetic: convert weights in registers, or expand them to float32 once per block of rows.
enum class Path { kAuto, kDirect, kExpanded };

void tile_portable(const TileArgs& args);
void tile_avx2(const TileArgs& args, Path path);
void tile_avx512bf16(const TileArgs& args);
void pack_rows_avx512bf16(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k, void* packed);

}  // namespace blendserve::kernels
