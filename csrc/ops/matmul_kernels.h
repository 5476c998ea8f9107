// What matmul.cpp and the kernels of each instruction set share; private to csrc/ops/matmul*.cpp, tests and benchmarks.
//
// Weights: panels of kPanel<isa> columns, zero-padded; inside a panel [k / 2][columns][2], so that one 32-bit lane
// holds two neighbours in k of one column: `lane << 16` and `lane & 0xffff0000` are the two as float32, and a bf16 dot
// product takes the lane as it is.
//
// int8 weights: panels of kInt8Panel columns on every Isa, inside a panel [k / 4][columns][4], so that one 32-bit lane
// holds four neighbours in k of one column. Activations are x = scale * (u - kInt8Zero) with u an unsigned byte, since
// the instructions multiply unsigned by signed, and a scale for each group of k of each row. The sum of u w over a
// group starts from its offset, -kInt8Zero sum w, which is packed with the weights, and is exact; groups are added up
// in float32, in rising order. vpmaddubsw saturates sums of two products at 16 bits: a column's scale is chosen such
// that of its neighbours (2 i, 2 i + 1) neither their positive nor their negative part adds up to more than 128, and
// 255 * 128 < 2^15.
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
  PrefetchPieces* pieces;  // may be null
};

inline constexpr int64_t kInt8Panel = 16;  // two AVX registers or one AVX-512 register of 32-bit lanes
inline constexpr int32_t kInt8Zero = 128;
inline constexpr float kInt8Max = 127.0f;
// Kernels take k by so many, zeros behind the last: a loop of 48 turns for a group of 192 would end with a branch that
// nobody predicts, one of 12 turns does not.
inline constexpr int64_t kInt8Unroll = 16;
[[gnu::always_inline]] constexpr int64_t int8_padded(int64_t k) { return round_up(k, kInt8Unroll); }
// Values of one row that share a scale, at most: outliers cost precision to their own group only. On the default model
// one scale per row moves the likelihood of text twice as far.
inline constexpr int64_t kMaxInt8Group = 256;

[[gnu::always_inline]] constexpr int64_t int8_group(int64_t k) {
  return round_up(ceil_div(k, ceil_div(k, kMaxInt8Group)), kInt8Unroll);
}
[[gnu::always_inline]] constexpr int64_t num_int8_groups(int64_t k) { return ceil_div(k, int8_group(k)); }
// Bytes from one row of 8-bit activations to the next: k padded to whole iterations, then
// the scales of its groups; an odd number of cache lines.
[[gnu::always_inline]] constexpr int64_t int8_row_stride(int64_t k) {
  return (ceil_div(int8_padded(k) + num_int8_groups(k) * int64_t{sizeof(float)}, 64) | 1) * 64;
}

// How one group becomes bytes. A group of (nearly) nothing has scale 0, one with an infinity or a NaN has a NaN for a
// scale, which makes the products of its row NaNs and nobody else's.
struct Int8Scale {
  float inverse, scale;
  bool is_finite;
};
// From the largest absolute value of the group, as bits.
[[gnu::always_inline]] inline Int8Scale int8_scale(uint32_t max_bits) {
  if (max_bits >= 0x7f800000u) return {0.0f, __builtin_nanf(""), false};
  float max;
  __builtin_memcpy(&max, &max_bits, sizeof(max));
  if (max < 0x1p-100f) return {0.0f, 0.0f, true};  // 127 / max might be infinite
  return {kInt8Max / max, max / kInt8Max, true};
}
// One call of matmul_tile on int8 weights.
struct Int8TileArgs {
  const uint8_t* x;
  const int8_t* w;
  const float* scales;
  const int32_t* offsets;  // [groups][offset_stride]
  int64_t offset_stride;
  int64_t k;
  MatmulTile tile;
  const float* bias;
  bool accumulate;
  float* y;
  int64_t ldy;
  PrefetchPieces* pieces;  // may be null
};

void int8_tile_portable(const Int8TileArgs& args);
void int8_tile_avx2(const Int8TileArgs& args);
void int8_tile_avxvnni(const Int8TileArgs& args);
void int8_tile_avx512vnni(const Int8TileArgs& args);
// Dispatch of the int8 halves of pack_activations, matmul_tile and num_prefetch_pieces.
void int8_rows(Isa isa, const float* x, int64_t ldx, int64_t num_rows, int64_t begin, int64_t end, int64_t k,
               void* packed);
void int8_tile(const void* packed_x, const PackedMatrix& w, const MatmulTile& tile, const float* bias, bool accumulate,
               float* y, int64_t ldy, PrefetchPieces* pieces);
int64_t num_prefetch_pieces_int8(Isa isa, const MatmulTile& tile, int64_t k, int64_t iteration_bytes);
// Some floats of a row as bytes; returns their scale.
float int8_group_portable(const float* x, int64_t count, uint8_t* bytes);
float int8_group_avx2(const float* x, int64_t count, uint8_t* bytes);
float int8_group_avx512(const float* x, int64_t count, uint8_t* bytes);

void tile_portable(const TileArgs& args);
void tile_avx2(const TileArgs& args);
// How many pieces a tile of a kernel takes.
int64_t num_prefetch_pieces_avx2(const MatmulTile& tile, int64_t k, int64_t iteration_bytes);
int64_t num_prefetch_pieces_avx512bf16(const MatmulTile& tile, int64_t k, int64_t iteration_bytes);
int64_t num_prefetch_pieces_int8_avx2(const MatmulTile& tile, int64_t k, int64_t iteration_bytes);
int64_t num_prefetch_pieces_int8_avxvnni(const MatmulTile& tile, int64_t k, int64_t iteration_bytes);
int64_t num_prefetch_pieces_int8_avx512vnni(const MatmulTile& tile, int64_t k, int64_t iteration_bytes);
void tile_avx512bf16(const TileArgs& args);
void pack_rows_avx512bf16(const float* x, int64_t ldx, int64_t num_rows, int64_t begin, int64_t end, int64_t k,
                          void* packed);

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
