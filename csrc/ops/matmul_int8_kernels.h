// The int8 kernel, written once over a struct Lanes that each instruction set's file defines in an unnamed namespace
// (so that no file lends its instructions to another): vectors of 32-bit integers and floats, and the sum of four
// products. Private to csrc/ops/matmul_int8_*.cpp.
#pragma once

#include "ops/matmul_kernels.h"

namespace blendserve::kernels {

// One block of output: kRows rows x kPanels panels of 16 columns.
struct Int8Block {
  const uint8_t* x;
  int64_t ldx;
  const int8_t* w;
  int64_t panel_stride;  // bytes from one panel to the next
  int64_t k;
  const float* scales;
  const int32_t* offsets;  // of the first group; the others are offset_stride apart
  int64_t offset_stride;
  float* y;
  int64_t ldy;
  bool is_loaded;                         // add to y
  const float* bias;                      // added last; may be null
  const int8_t* prefetch;                 // one line per panel and quad is fetched into L2 from here ...
  int64_t prefetch_stride;                // ... from one panel to the next ...
  int64_t prefetch_step;                  // ... moving on by so many bytes: 64, or 0 where there is nothing to fetch
  const uint16_t* const* runs = nullptr;  // instead, where not null: the next run every `run_steps` steps
  int64_t run_steps = 0;                  // of kInt8Step values of k
};

// sums += four values of each row by four weights of each column.
template <class Lanes, int kRows, int kVectors>
[[gnu::always_inline]] inline void add_int8_quad(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t panel_stride,
                                                 typename Lanes::Ints (&sums)[kRows][kVectors]) {
  constexpr int kVectorsPerPanel = static_cast<int>(kInt8Panel) / Lanes::kWidth;
  typename Lanes::Ints weights[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    weights[v] = Lanes::load(w + v / kVectorsPerPanel * panel_stride + v % kVectorsPerPanel * 4 * Lanes::kWidth);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const auto values = Lanes::repeat(x + r * ldx);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Lanes::add_products(sums[r][v], values, weights[v]);
  }
}

// total += scale of the rows * (sums - offsets) for one group.
template <class Lanes, int kRows, int kVectors>
[[gnu::always_inline]] inline void add_int8_group(const typename Lanes::Ints (&sums)[kRows][kVectors],
                                                  const int32_t* offsets, const uint8_t* x_scale, int64_t ldx,
                                                  float* total) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    float x;
    __builtin_memcpy(&x, x_scale + r * ldx, sizeof(x));
    const auto scale = Lanes::set(x);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto value = Lanes::to_floats(Lanes::subtract(sums[r][v], offsets + v * Lanes::kWidth));
      float* at = total + (r * kVectors + v) * Lanes::kWidth;
      Lanes::store(at, Lanes::add(Lanes::load(at), Lanes::multiply(value, scale)));
    }
  }
}

template <class Lanes, int kRows, int kVectors>
[[gnu::always_inline]] inline void store_int8_total(const Int8Block& b, const float* total) {
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * Lanes::kWidth;
      float* y = b.y + r * b.ldy + at;
      auto value = Lanes::multiply(Lanes::load(total + r * kVectors * Lanes::kWidth + at), Lanes::load(b.scales + at));
      if (b.is_loaded) value = Lanes::add(Lanes::load(y), value);
      if (b.bias != nullptr) value = Lanes::add(value, Lanes::load(b.bias + at));
      Lanes::store(y, value);
    }
  }
}

template <class Lanes, int kRows, int kPanels>
void int8_kernel(const Int8Block& b) {
  constexpr int kVectors = kPanels * static_cast<int>(kInt8Panel) / Lanes::kWidth;
  alignas(64) float totals[kRows * kVectors * Lanes::kWidth] = {};
  float* total = totals;
  asm("" : "+r"(total) : : "memory");  // in memory between groups: the registers are for the sums
  const uint8_t* x = b.x;
  const uint8_t* x_scale = x + int8_padded(b.k);
  const int64_t ldx = b.ldx;
  const int8_t* w = b.w;
  const int8_t* prefetch = b.prefetch;
  const int32_t* offsets = b.offsets;
  const int64_t group = int8_group(b.k);
  const uint16_t* const* runs = b.runs;
  int64_t steps_to_run = 0;
  for (int64_t k = b.k; k > 0; k -= group) {
    typename Lanes::Ints sums[kRows][kVectors] = {};
    for (int64_t step = ceil_div(min64(k, group), kInt8Step); step > 0; --step) {
      if (runs != nullptr && steps_to_run-- == 0) {
        prefetch = reinterpret_cast<const int8_t*>(*runs++);
        steps_to_run = b.run_steps - 1;
      }
#pragma GCC unroll 4
      for (int quad = 0; quad < static_cast<int>(kInt8Step) / 4; ++quad) {
        add_int8_quad<Lanes, kRows, kVectors>(x + 4 * quad, ldx, w + 4 * quad * kInt8Panel, b.panel_stride, sums);
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(prefetch + p * b.prefetch_stride, 0, 2);
        prefetch += b.prefetch_step;
      }
      x += kInt8Step;
      w += kInt8Step * kInt8Panel;
    }
    add_int8_group<Lanes, kRows, kVectors>(sums, offsets, x_scale, ldx, total);
    offsets += b.offset_stride;
    x_scale += sizeof(float);
  }
  store_int8_total<Lanes, kRows, kVectors>(b, total);
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

// Steps of kInt8Step values of k that one run of prefetches takes.
inline int64_t int8_run_steps(int64_t step_bytes) { return ceil_div(run_steps(step_bytes), kInt8Step / 4); }
// Runs that one block of kInt8Panel columns or more takes.
inline int64_t num_int8_block_runs(int64_t k, int64_t step_bytes) {
  return ceil_div(ceil_div(k, kInt8Step), int8_run_steps(step_bytes));
}

// Every set of rows but the first, which fetches weights, on every strip; none of one or two rows.
template <class Lanes>
int64_t num_int8_prefetch_runs(const MatmulTile& tile, int64_t k, int64_t step_bytes) {
  const int64_t num_rows = tile.row_end - tile.row_begin, num_sets = ceil_div(num_rows, Lanes::kMaxRows);
  if (num_rows <= 2 * num_sets) return 0;
  const int64_t num_strips = ceil_div(tile.col_end - tile.col_begin, Lanes::kMaxPanels * kInt8Panel);
  return (num_sets - 1) * num_strips * num_int8_block_runs(k, step_bytes);
}

// All rows of a tile visit a strip of kMaxPanels panels while its weights are near; the first ones fetch those of the
// strip that follows. Sets of rows differ by one row at most.
template <class Lanes>
void int8_tile_on(const Int8TileArgs& a) {
  constexpr int64_t kStrip = Lanes::kMaxPanels * kInt8Panel;
  const MatmulTile& t = a.tile;
  const int64_t num_rows = t.row_end - t.row_begin, num_sets = ceil_div(num_rows, Lanes::kMaxRows);
  const int64_t ldx = int8_row_stride(a.k), panel_stride = int8_padded(a.k) * kInt8Panel;
  for (int64_t col = t.col_begin; col < t.col_end; col += kStrip) {
    const int64_t num_columns = min64(kStrip, t.col_end - col), num_panels = ceil_div(num_columns, kInt8Panel);
    const int8_t* w = a.w + col / kInt8Panel * panel_stride;
    for (int64_t set = 0; set < num_sets; ++set) {
      const int64_t row = t.row_begin + set * num_rows / num_sets;
      const int64_t next_row = t.row_begin + (set + 1) * num_rows / num_sets;
      const bool can_fetch = set == 0 && num_rows > 1 && col + 2 * kStrip <= t.col_end;
      const int64_t num_runs = a.runs != nullptr ? num_int8_block_runs(a.k, a.runs->step_bytes) : 0;
      const bool can_fetch_runs = num_runs > 0 && set > 0 && next_row - row > 2 && a.runs->left() >= num_runs;
      const Int8Block b{.x = a.x + row * ldx,
                        .ldx = ldx,
                        .w = w,
                        .panel_stride = panel_stride,
                        .k = a.k,
                        .scales = a.scales + col,
                        .offsets = a.offsets + col,
                        .offset_stride = a.offset_stride,
                        .y = a.y + row * a.ldy + col,
                        .ldy = a.ldy,
                        .is_loaded = a.accumulate,
                        .bias = a.bias != nullptr ? a.bias + col : nullptr,
                        .prefetch = can_fetch ? w + Lanes::kMaxPanels * panel_stride : w,
                        .prefetch_stride = can_fetch_runs ? 0 : panel_stride,
                        .prefetch_step = can_fetch_runs ? a.runs->step_bytes
                                         : can_fetch    ? 4 * kInt8Panel
                                                        : 0,
                        .runs = can_fetch_runs ? a.runs->take(num_runs) : nullptr,
                        .run_steps = can_fetch_runs ? int8_run_steps(a.runs->step_bytes) : 0};
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
