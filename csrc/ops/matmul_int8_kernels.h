// The int8 kernel, written once over a struct Lanes that each instruction set's file defines in an unnamed namespace
// (so that no file lends its instructions to another): vectors of 32-bit integers and floats, and the sum of four
// products. Private to csrc/ops/matmul_int8_*.cpp.
#pragma once

#include "ops/matmul_kernels.h"
#include "ops/prefetch_schedule.h"

namespace blendserve::kernels {

// One block of output: kRows rows x kPanels panels of 16 columns.
struct Int8Block {
  const uint8_t* x;
  int64_t ldx;
  const int8_t* w;
  int64_t panel_stride;  // bytes from one panel to the next
  int64_t k, group;
  const float* scales;
  const int32_t* offsets;  // of the first group; the others are offset_stride apart
  int64_t offset_stride;
  float* y;
  int64_t ldy;
  bool is_loaded;     // add to y
  const float* bias;  // added last; may be null
  PrefetchSchedule schedule;
};

// One row waits for its own weights: hardware fetches those, and to ask for more costs time.
constexpr bool can_ask_int8(int64_t num_rows) { return num_rows > 1; }

// The rows of a block in k: every third has an address of its own, which hides the others' distance from GCC. It would
// keep multiples of `ldx` for all of them, in more registers than there are.
template <int kRows>
struct Int8Rows {
  static constexpr int kCount = (kRows + 2) / 3;
  [[gnu::always_inline]] Int8Rows(const uint8_t* x, int64_t ldx) : ldx(ldx) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      third[i] = x + 3 * i * ldx;
      asm("" : "+r"(third[i]));
    }
  }
  // Called before each quad: an address is then made where it is used, as part of the load.
  [[gnu::always_inline]] void hide() {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) asm("" : "+r"(third[i]));
    asm("" : "+r"(ldx));
  }
  [[gnu::always_inline]] const uint8_t* at(int row) const { return third[row / 3] + row % 3 * ldx; }
  [[gnu::always_inline]] void advance(int64_t k) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) third[i] += k;
  }

  const uint8_t* third[kCount];
  int64_t ldx;
};

// sums += four values of each row by four weights of each column.
template <class Lanes, int kRows, int kVectors>
[[gnu::always_inline]] inline void add_int8_quad(Int8Rows<kRows>& x, int quad, const int8_t* w, int64_t panel_stride,
                                                 typename Lanes::Ints (&sums)[kRows][kVectors]) {
  constexpr int kVectorsPerPanel = static_cast<int>(kInt8Panel) / Lanes::kWidth;
  typename Lanes::Ints weights[kVectors];
  x.hide();
  w += 4 * quad * kInt8Panel;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    weights[v] = Lanes::load(w + v / kVectorsPerPanel * panel_stride + v % kVectorsPerPanel * 4 * Lanes::kWidth);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const auto values = Lanes::repeat(x.at(r) + 4 * quad);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Lanes::add_products(sums[r][v], values, weights[v]);
  }
}

template <class Lanes>
[[gnu::always_inline]] inline typename Lanes::Floats load_int8_scale(const uint8_t* x_scale) {
  float scale;
  __builtin_memcpy(&scale, x_scale, sizeof(scale));
  return Lanes::set(scale);
}

// totals += scale of the rows * sums for one group; the first group writes them.
template <class Lanes, int kRows, int kVectors, bool kIsFirst>
[[gnu::always_inline]] inline void add_int8_group(const typename Lanes::Ints (&sums)[kRows][kVectors],
                                                  const uint8_t* x_scale, int64_t ldx, float* total) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r, x_scale += ldx) {
    const auto scale = load_int8_scale<Lanes>(x_scale);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v, total += Lanes::kWidth) {
      auto value = Lanes::multiply(Lanes::to_floats(sums[r][v]), scale);
      if constexpr (!kIsFirst) value = Lanes::add(Lanes::load(total), value);
      Lanes::store(total, value);
    }
  }
}

// As add_int8_group for the last group, but to y: the totals times the scales of the columns, added to y where that is
// loaded, and the bias.
template <class Lanes, int kRows, int kVectors, bool kIsFirst, bool kIsLoaded, bool kHasBias>
[[gnu::always_inline]] inline void finish_int8_block(const Int8Block& b,
                                                     const typename Lanes::Ints (&sums)[kRows][kVectors],
                                                     const uint8_t* x_scale, const float* total) {
  const int64_t ldx = b.ldx, ldy = b.ldy;
  float* y = b.y;
  typename Lanes::Floats scales[kVectors], bias[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    scales[v] = Lanes::load(b.scales + v * Lanes::kWidth);
    if constexpr (kHasBias) bias[v] = Lanes::load(b.bias + v * Lanes::kWidth);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r, x_scale += ldx, y += ldy) {
    const auto scale = load_int8_scale<Lanes>(x_scale);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v, total += Lanes::kWidth) {
      auto value = Lanes::multiply(Lanes::to_floats(sums[r][v]), scale);
      if constexpr (!kIsFirst) value = Lanes::add(Lanes::load(total), value);
      value = Lanes::multiply(value, scales[v]);
      if constexpr (kIsLoaded) value = Lanes::add(Lanes::load(y + v * Lanes::kWidth), value);
      if constexpr (kHasBias) value = Lanes::add(value, bias[v]);
      Lanes::store(y + v * Lanes::kWidth, value);
    }
  }
}

template <class Lanes, int kRows, int kVectors, bool kIsFirst>
[[gnu::always_inline]] inline void end_int8_group(const Int8Block& b,
                                                  const typename Lanes::Ints (&sums)[kRows][kVectors],
                                                  const uint8_t* x_scale, float* total, bool is_last) {
  if (!is_last) return add_int8_group<Lanes, kRows, kVectors, kIsFirst>(sums, x_scale, b.ldx, total);
  if (b.is_loaded) {
    b.bias == nullptr ? finish_int8_block<Lanes, kRows, kVectors, kIsFirst, true, false>(b, sums, x_scale, total)
                      : finish_int8_block<Lanes, kRows, kVectors, kIsFirst, true, true>(b, sums, x_scale, total);
  } else {
    b.bias == nullptr ? finish_int8_block<Lanes, kRows, kVectors, kIsFirst, false, false>(b, sums, x_scale, total)
                      : finish_int8_block<Lanes, kRows, kVectors, kIsFirst, false, true>(b, sums, x_scale, total);
  }
}

// Sums of one group: they start at the group's offsets, then take `num_quads` (a multiple of kInt8Unroll / 4) quads.
template <class Lanes, int kRows, int kPanels, int kVectors>
[[gnu::always_inline]] inline void sum_int8_group(const Int8Block& b, const int32_t* offsets, int64_t num_quads,
                                                  Int8Rows<kRows>& x, const int8_t*& w,
                                                  Prefetcher<Lanes::kMaxPanels>& prefetcher,
                                                  typename Lanes::Ints (&sums)[kRows][kVectors]) {
  constexpr int kQuads = static_cast<int>(kInt8Unroll) / 4;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const auto start = Lanes::load(offsets + v * Lanes::kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sums[r][v] = start;
  }
  for (; can_ask_int8(kRows) && num_quads >= kTurnIterations; num_quads -= kTurnIterations) {
    prefetcher.begin_turn(w);
    BLENDSERVE_UNROLL_TURN
    for (int quad = 0; quad < kTurnIterations; ++quad) {
      prefetcher.ask(quad, sums[0][0]);
      add_int8_quad<Lanes, kRows, kVectors>(x, quad, w, b.panel_stride, sums);
    }
    x.advance(4 * kTurnIterations);
    w += 4 * kTurnIterations * kInt8Panel;
  }
  for (; num_quads > 0; num_quads -= kQuads) {
#pragma GCC unroll 4
    for (int quad = 0; quad < kQuads; ++quad) {
      add_int8_quad<Lanes, kRows, kVectors>(x, quad, w, b.panel_stride, sums);
    }
    x.advance(kInt8Unroll);
    w += kInt8Unroll * kInt8Panel;
  }
}

template <class Lanes, int kRows, int kPanels>
void int8_kernel(const Int8Block& b) {
  constexpr int kVectors = kPanels * static_cast<int>(kInt8Panel) / Lanes::kWidth;
  alignas(64) float totals[kRows * kVectors * Lanes::kWidth];
  float* total = totals;
  asm("" : "+r"(total) : : "memory");  // in memory between groups: the registers are for the sums
  Int8Rows<kRows> x(b.x, b.ldx);
  const uint8_t* x_scale = b.x + int8_padded(b.k);
  const int8_t* w = b.w;
  const int32_t* offsets = b.offsets;
  const int64_t group = b.group;
  Prefetcher<Lanes::kMaxPanels> prefetcher(b.schedule);
  for (int64_t k = b.k; k > 0; k -= group) {
    typename Lanes::Ints sums[kRows][kVectors];
    sum_int8_group<Lanes, kRows, kPanels, kVectors>(b, offsets, int8_padded(min64(k, group)) / 4, x, w, prefetcher,
                                                    sums);
    k == b.k ? end_int8_group<Lanes, kRows, kVectors, true>(b, sums, x_scale, total, k <= group)
             : end_int8_group<Lanes, kRows, kVectors, false>(b, sums, x_scale, total, k <= group);
    offsets += b.offset_stride;
    x_scale += sizeof(float);
  }
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

// Turns of one kernel: groups of k are not cut inside a turn.
inline int64_t num_int8_turns(int64_t k) {
  const int64_t group = int8_group(k), num_whole = k / group;
  return num_whole * (group / 4 / kTurnIterations) + int8_padded(k - num_whole * group) / 4 / kTurnIterations;
}

// What all blocks of a tile share, computed once: a division takes as long as ten products. Sets of rows differ by one
// row at most, so that of several each has two or more.
template <class Lanes>
struct Int8Plan {
  static constexpr int64_t kStrip = Lanes::kMaxPanels * kInt8Panel;
  Int8Plan(const MatmulTile& t, int64_t k)
      : first(t.row_begin),
        num_sets(ceil_div(t.row_end - first, Lanes::kMaxRows)),
        set_rows((t.row_end - first) / num_sets),
        num_longer((t.row_end - first) % num_sets),
        ldx(int8_row_stride(k)),
        panel_stride(int8_padded(k) * kInt8Panel),
        group(int8_group(k)),
        shares(Lanes::kMaxPanels * panel_stride, num_sets, int8_padded(k) / 4) {}
  int64_t begin(int64_t set) const { return first + set * set_rows + min64(set, num_longer); }

  int64_t first, num_sets, set_rows, num_longer, ldx, panel_stride, group;
  StripShares shares;
};

// None beside one set of rows: that waits for its own weights.
template <class Lanes>
int64_t num_int8_prefetch_pieces(const MatmulTile& tile, int64_t k, int64_t iteration_bytes) {
  const Int8Plan<Lanes> plan(tile, k);
  if (plan.num_sets == 1) return 0;
  const int64_t num_strips = ceil_div(tile.col_end - tile.col_begin, plan.kStrip);
  return num_pieces_of_turns<Lanes::kMaxPanels>(plan.num_sets * num_strips * num_int8_turns(k), iteration_bytes);
}

// One set of rows on the columns of one strip.
template <class Lanes>
void run_int8_set(const Int8TileArgs& a, const Int8Plan<Lanes>& plan, int64_t set, int64_t col) {
  const int64_t num_columns = min64(plan.kStrip, a.tile.col_end - col), num_panels = ceil_div(num_columns, kInt8Panel);
  const int64_t row = plan.begin(set), num_rows = plan.begin(set + 1) - row;
  const void* next = weights_to_ask_for(a.tile, col, plan.kStrip, a.w, int8_padded(a.k));
  PrefetchSchedule schedule;
  if (next != nullptr) schedule = plan.shares.of_set(set, next);
  if (plan.num_sets > 1) schedule.pieces = a.pieces;
  const Int8Block b{.x = a.x + row * plan.ldx,
                    .ldx = plan.ldx,
                    .w = a.w + col / kInt8Panel * plan.panel_stride,
                    .panel_stride = plan.panel_stride,
                    .k = a.k,
                    .group = plan.group,
                    .scales = a.scales + col,
                    .offsets = a.offsets + col,
                    .offset_stride = a.offset_stride,
                    .y = a.y + row * a.ldy + col,
                    .ldy = a.ldy,
                    .is_loaded = a.accumulate,
                    .bias = a.bias != nullptr ? a.bias + col : nullptr,
                    .schedule = schedule};
  ask_for_outputs(b.y + num_rows * a.ldy, a.ldy, min64(Lanes::kMaxRows, a.tile.row_end - row - num_rows), num_columns);
  const auto run = [=](const Int8Block& block) { run_int8_block<Lanes>(block, num_rows, num_panels); };
  if (num_columns == num_panels * kInt8Panel) {
    run(b);
  } else {
    run_padded<Lanes::kMaxRows, Int8Plan<Lanes>::kStrip>(b, num_rows, num_columns, run);
  }
}

// All rows of a tile visit a strip of kMaxPanels panels while its weights are near, and ask for their share of the next
// one's.
template <class Lanes>
void int8_tile_on(const Int8TileArgs& a) {
  const Int8Plan<Lanes> plan(a.tile, a.k);
  for (int64_t col = a.tile.col_begin; col < a.tile.col_end; col += plan.kStrip) {
    for (int64_t set = 0; set < plan.num_sets; ++set) run_int8_set<Lanes>(a, plan, set, col);
  }
}

}  // namespace blendserve::kernels
