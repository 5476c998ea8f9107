// The int8 kernel, written once over a struct Lanes that each instruction set's file defines in an unnamed namespace
// (so that no file lends its instructions to another): vectors of 32-bit integers and floats, and the sum of four
// products. Private to csrc/ops/matmul_int8_*.cpp.
#pragma once

#include "ops/matmul_kernels.h"

namespace blendserve::kernels {

// One block of output: kRows rows x kPanels panels of 16 columns, over all of k.
struct Int8Block {
  const uint8_t* x;
  int64_t ldx;
  const int8_t* w;
  int64_t panel_stride;  // bytes from one panel to the next
  int64_t num_quads;
  const uint8_t* x_scale;  // a float, of the first row; the others are ldx bytes apart
  const float* scales;
  const int32_t* offsets;
  float* y;
  int64_t ldy;
  bool is_loaded;          // add to y
  const float* bias;       // added last; may be null
  const int8_t* prefetch;  // one line per panel and quad is fetched into L2 from here ...
  int64_t prefetch_step;   // ... moving on by so many bytes: 64, or 0 where there is nothing to fetch
};

template <class Lanes, int kRows, int kVectors>
[[gnu::always_inline]] inline void store_int8_sums(const Int8Block& b,
                                                   const typename Lanes::Ints (&sums)[kRows][kVectors]) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    float x_scale;
    __builtin_memcpy(&x_scale, b.x_scale + r * b.ldx, sizeof(x_scale));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * Lanes::kWidth;
      float* y = b.y + r * b.ldy + at;
      const auto scale = Lanes::multiply(Lanes::set(x_scale), Lanes::load(b.scales + at));
      auto value = Lanes::multiply(Lanes::to_floats(Lanes::subtract(sums[r][v], b.offsets + at)), scale);
      if (b.is_loaded) value = Lanes::add(Lanes::load(y), value);
      if (b.bias != nullptr) value = Lanes::add(value, Lanes::load(b.bias + at));
      Lanes::store(y, value);
    }
  }
}

template <class Lanes, int kRows, int kPanels>
void int8_kernel(const Int8Block& b) {
  constexpr int kVectorsPerPanel = static_cast<int>(kInt8Panel) / Lanes::kWidth;
  constexpr int kVectors = kPanels * kVectorsPerPanel;
  typename Lanes::Ints sums[kRows][kVectors] = {};
  const uint8_t* x = b.x;
  const int64_t ldx = b.ldx;
  const int8_t* w = b.w;
  const int8_t* prefetch = b.prefetch;
  for (int64_t quad = b.num_quads; quad > 0; --quad) {
    typename Lanes::Ints weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = Lanes::load(w + v / kVectorsPerPanel * b.panel_stride + v % kVectorsPerPanel * 4 * Lanes::kWidth);
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) __builtin_prefetch(prefetch + p * b.panel_stride, 0, 2);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const auto values = Lanes::repeat(x + r * ldx);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Lanes::add_products(sums[r][v], values, weights[v]);
    }
    x += 4;
    w += 4 * kInt8Panel;
    prefetch += b.prefetch_step;
  }
  store_int8_sums<Lanes, kRows, kVectors>(b, sums);
}

template <class Lanes, int kPanels, int kRows = Lanes::kMaxRows>
void run_int8_rows(const Int8Block& b, int64_t num_rows) {
  if (num_rows == kRows) return int8_kernel<Lanes, kRows, kPanels>(b);
  if constexpr (kRows > 1) return run_int8_rows<Lanes, kPanels, kRows - 1>(b, num_rows);
  __builtin_unreachable();
}

template <class Lanes>
void run_int8_block(const Int8Block& b, int64_t num_rows, int64_t num_panels) {
  if constexpr (Lanes::kMaxPanels == 2) {
    if (num_panels == 2) return run_int8_rows<Lanes, 2>(b, num_rows);
  }
  return run_int8_rows<Lanes, 1>(b, num_rows);
}

// All rows of a tile visit a strip of kMaxPanels panels while its weights are near; the first ones fetch those of the
// strip that follows. Groups of rows differ by one row at most.
template <class Lanes>
void int8_tile_on(const Int8TileArgs& a) {
  constexpr int64_t kStrip = Lanes::kMaxPanels * kInt8Panel;
  const MatmulTile& t = a.tile;
  const int64_t num_rows = t.row_end - t.row_begin, num_groups = ceil_div(num_rows, Lanes::kMaxRows);
  const int64_t ldx = int8_row_stride(a.k), panel_stride = round_up(a.k, 4) * kInt8Panel;
  for (int64_t col = t.col_begin; col < t.col_end; col += kStrip) {
    const int64_t num_columns = min64(kStrip, t.col_end - col), num_panels = ceil_div(num_columns, kInt8Panel);
    const int8_t* w = a.w + col / kInt8Panel * panel_stride;
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t row = t.row_begin + group * num_rows / num_groups;
      const int64_t next_row = t.row_begin + (group + 1) * num_rows / num_groups;
      const bool can_fetch = group == 0 && num_rows > 1 && col + 2 * kStrip <= t.col_end;
      const uint8_t* x = a.x + row * ldx;
      const Int8Block b{.x = x,
                        .ldx = ldx,
                        .w = w,
                        .panel_stride = panel_stride,
                        .num_quads = ceil_div(a.k, 4),
                        .x_scale = x + ldx - sizeof(float),
                        .scales = a.scales + col,
                        .offsets = a.offsets + col,
                        .y = a.y + row * a.ldy + col,
                        .ldy = a.ldy,
                        .is_loaded = a.accumulate,
                        .bias = a.bias != nullptr ? a.bias + col : nullptr,
                        .prefetch = can_fetch ? w + Lanes::kMaxPanels * panel_stride : w,
                        .prefetch_step = can_fetch ? 4 * kInt8Panel : 0};
      const auto run = [num_rows = next_row - row, num_panels](const Int8Block& block) {
        run_int8_block<Lanes>(block, num_rows, num_panels);
      };
      if (num_columns == num_panels * kInt8Panel) {
        run(b);
      } else {
        run_padded<Lanes::kMaxRows, kStrip>(b, next_row - row, num_columns, run);
      }
    }
  }
}

}  // namespace blendserve::kernels
