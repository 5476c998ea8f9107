// float32 arithmetic on AVX2 + FMA. An output element is one chain of fused multiply-adds over rising k in every kernel
// here, so that the choice of kernel never shows in a result.
#include <immintrin.h>

#include "ops/matmul_kernels.h"
#include "ops/prefetch_schedule.h"

namespace blendserve::kernels {
namespace {

// 6 rows x 16 columns = 12 accumulators, 2 weights, 1 activation, 1 mask fill the 16 registers; 12 independent chains
// also cover the FMA's latency (4 cycles x 2 per cycle = 8) with room to spare.
constexpr int kMaxRows = 6;
constexpr int64_t kMaxPanels = 4;

// Where a kernel finds its weights: packed bf16, which it expands to float32 as it goes; or expanded by the first group
// of rows for all others of a tile. Expanding takes a sixth of the instructions, and a core that shares its front end
// with another thread has none to spare.
enum class Source { kPacked, kPackedAndKept, kKept };
// Fewer groups of rows expand for themselves: to write and read 36 KiB pays from about 8 groups (43 rows) on.
constexpr int64_t kMinKeptGroups = 8;

// One block of output: kRows rows x kPanels panels of 16 columns, over `num_k` (even) elements of k.
struct Block {
  const float* x;
  int64_t ldx;
  const uint16_t* w;
  int64_t panel_stride;  // bf16 elements from one panel to the next
  int64_t num_k;
  float* y;
  int64_t ldy;
  float* kept;        // one panel as float32, [num_k][16]; null where nothing is kept
  bool is_loaded;     // start from y instead of 0
  const float* bias;  // added last; may be null
  PrefetchSchedule schedule;
};

template <int kRows, int kVectors>
[[gnu::always_inline]] inline void load_sums(const Block& b, __m256 (&sums)[kRows][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = b.is_loaded ? _mm256_loadu_ps(b.y + r * b.ldy + v * 8) : _mm256_setzero_ps();
    }
  }
}

template <int kRows, int kVectors>
[[gnu::always_inline]] inline void store_sums(const Block& b, __m256 (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    if (b.bias != nullptr) {
      const __m256 bias = _mm256_loadu_ps(b.bias + v * 8);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) sums[r][v] = _mm256_add_ps(sums[r][v], bias);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) _mm256_storeu_ps(b.y + r * b.ldy + v * 8, sums[r][v]);
  }
}

alignas(32) constexpr uint32_t kHighHalves[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};

// Where a kernel stands in k.
struct Cursor {
  const float* x;
  const uint16_t* w;
  float* kept;
};

// sums += two values of each row by two weights of each column.
template <int kRows, int kPanels, Source kSource>
[[gnu::always_inline]] inline void add_pair(const Block& b, Cursor& at, __m256 (&sums)[kRows][2 * kPanels]) {
  const uint32_t* high_halves = kHighHalves;
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) {
    const __m256i* lanes = reinterpret_cast<const __m256i*>(at.w + p * b.panel_stride);
    // With 12 sums there is no register for the mask: hide that it stays the same, so that it is read from memory.
    if constexpr (kRows * kPanels >= kMaxRows) asm("" : "+r"(high_halves));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(high_halves));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      __m256 w0, w1;
      if constexpr (kSource == Source::kKept) {
        w0 = _mm256_load_ps(at.kept + odd * kWeightPanel);
        w1 = _mm256_load_ps(at.kept + odd * kWeightPanel + 8);
      } else {
        const __m256i raw0 = _mm256_load_si256(lanes);
        const __m256i raw1 = _mm256_load_si256(lanes + 1);
        w0 = _mm256_castsi256_ps(odd ? _mm256_and_si256(raw0, high) : _mm256_slli_epi32(raw0, 16));
        w1 = _mm256_castsi256_ps(odd ? _mm256_and_si256(raw1, high) : _mm256_slli_epi32(raw1, 16));
      }
      if constexpr (kSource == Source::kPackedAndKept) {
        _mm256_store_ps(at.kept + odd * kWeightPanel, w0);
        _mm256_store_ps(at.kept + odd * kWeightPanel + 8, w1);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256 value = _mm256_broadcast_ss(at.x + r * b.ldx + odd);
        sums[r][2 * p] = _mm256_fmadd_ps(value, w0, sums[r][2 * p]);
        sums[r][2 * p + 1] = _mm256_fmadd_ps(value, w1, sums[r][2 * p + 1]);
      }
    }
  }
  at.x += 2;
  at.w += 2 * kWeightPanel;
  if constexpr (kSource != Source::kPacked) at.kept += 2 * kWeightPanel;
}

// One row reads as fast as memory gives, on four panels at once, and is slower with prefetches.
constexpr bool can_ask(int64_t num_rows) { return num_rows > 1; }

template <int kRows, int kPanels, Source kSource>
void kernel(const Block& b) {
  Cursor at = {b.x, b.w, b.kept};
  __m256 sums[kRows][2 * kPanels];
  load_sums<kRows, 2 * kPanels>(b, sums);
  int64_t pairs = b.num_k / 2;
  Prefetcher<kPanels <= 2 ? kPanels : 2> prefetcher(b.schedule);
  for (; can_ask(kRows) && pairs >= kTurnIterations; pairs -= kTurnIterations) {
    prefetcher.begin_turn(at.w);
    for (int iteration = 0; iteration < kTurnIterations; ++iteration) {
      prefetcher.ask(iteration, sums[0][0]);
      add_pair<kRows, kPanels, kSource>(b, at, sums);
    }
  }
  for (; pairs > 0; --pairs) {
    add_pair<kRows, kPanels, kSource>(b, at, sums);
  }
  store_sums<kRows, 2 * kPanels>(b, sums);
}

void run(const Block& b, int64_t num_rows, int64_t num_panels) {
  switch (num_rows * 8 + num_panels) {
    case 1 * 8 + 1:
      return kernel<1, 1, Source::kPacked>(b);
    case 1 * 8 + 2:
      return kernel<1, 2, Source::kPacked>(b);
    case 1 * 8 + 3:
      return kernel<1, 3, Source::kPacked>(b);
    case 1 * 8 + 4:
      return kernel<1, 4, Source::kPacked>(b);
    case 2 * 8 + 1:
      return kernel<2, 1, Source::kPacked>(b);
    case 2 * 8 + 2:
      return kernel<2, 2, Source::kPacked>(b);
    case 3 * 8 + 1:
      return kernel<3, 1, Source::kPacked>(b);
    case 4 * 8 + 1:
      return kernel<4, 1, Source::kPacked>(b);
    case 5 * 8 + 1:
      return kernel<5, 1, Source::kPacked>(b);
    case 6 * 8 + 1:
      return kernel<6, 1, Source::kPacked>(b);
    default:
      __builtin_unreachable();
  }
}

// One panel, 5 or 6 rows: what groups hold where there are kMinKeptGroups of them or more.
void run_kept(const Block& b, int64_t num_rows, bool is_first_group) {
  if (is_first_group) {
    return num_rows == 6 ? kernel<6, 1, Source::kPackedAndKept>(b) : kernel<5, 1, Source::kPackedAndKept>(b);
  }
  return num_rows == 6 ? kernel<6, 1, Source::kKept>(b) : kernel<5, 1, Source::kKept>(b);
}

// Panels that so many rows take at once: few rows need more columns for enough independent sums.
int64_t num_strip_panels(int64_t num_rows) { return num_rows == 1 ? kMaxPanels : num_rows == 2 ? 2 : 1; }

// Rows of a tile cut into groups of at most kMaxRows whose sizes differ by one at most: 7 rows as 4 + 3, never as 6
// + 1.
struct RowGroups {
  explicit RowGroups(int64_t num_rows) : count(ceil_div(num_rows, kMaxRows)), num_rows(num_rows) {}
  int64_t begin(int64_t group) const { return group * num_rows / count; }
  int64_t count, num_rows;
};

// Columns [col, col_end) of a strip, for all row groups of the tile and `block_num_k` values of k from `k` on.
void run_strip(const TileArgs& a, const RowGroups& groups, int64_t k, int64_t block_num_k, int64_t col,
               int64_t col_end) {
  const int64_t num_k = round_up(a.k, 2), panel_stride = num_k * kWeightPanel, ldx = row_stride(a.k);
  const int64_t num_columns = col_end - col, num_panels = ceil_div(num_columns, kWeightPanel);
  const uint16_t* w = a.w + col / kWeightPanel * panel_stride + k * kWeightPanel;
  alignas(32) float kept[kMaxResidentK * kWeightPanel];
  const bool is_kept = groups.count >= kMinKeptGroups;
  const StripShares shares(num_panels * kWeightPanel * block_num_k * int64_t{sizeof(*w)}, groups.count,
                           block_num_k / 2);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t row = a.tile.row_begin + groups.begin(group);
    const int64_t next_row = a.tile.row_begin + groups.begin(group + 1);
    PrefetchSchedule schedule;
    const uint16_t* from = a.w + k * kWeightPanel;
    const void* next = weights_to_ask_for(a.tile, col, num_columns, from, num_k * int64_t{sizeof(*w)});
    if (next != nullptr) schedule = shares.of_set(group, next);
    if (groups.count > 1) schedule.pieces = a.pieces;
    float* y = a.y + row * a.ldy + col;
    ask_for_outputs(y + (next_row - row) * a.ldy, a.ldy, min64(kMaxRows, a.tile.row_end - next_row), num_columns);
    const Block b{.x = static_cast<const float*>(a.x) + row * ldx + k,
                  .ldx = ldx,
                  .w = w,
                  .panel_stride = panel_stride,
                  .num_k = block_num_k,
                  .y = y,
                  .ldy = a.ldy,
                  .kept = is_kept ? kept : nullptr,
                  .is_loaded = a.accumulate || k > 0,
                  .bias = a.bias != nullptr && k + block_num_k == num_k ? a.bias + col : nullptr,
                  .schedule = schedule};
    const auto run_block = [rows = next_row - row, num_panels, group](const Block& block) {
      return block.kept != nullptr ? run_kept(block, rows, group == 0) : run(block, rows, num_panels);
    };
    if (num_columns == num_panels * kWeightPanel) {
      run_block(b);
    } else {
      run_padded<kMaxRows, kMaxPanels * kWeightPanel>(b, next_row - row, num_columns, run_block);
    }
  }
}

// Values of k that a tile of so many rows visits at a time.
int64_t block_size(int64_t num_rows, int64_t k) {
  const int64_t num_k = round_up(k, 2);
  const int64_t num_blocks = num_rows <= kRowPanel ? 1 : ceil_div(num_k, kMaxResidentK);
  return round_up(ceil_div(num_k, num_blocks), 2);
}

}  // namespace

// None beside one group of rows: that waits for its own weights.
int64_t num_prefetch_pieces_avx2(const MatmulTile& tile, int64_t k, int64_t iteration_bytes) {
  const RowGroups groups(tile.row_end - tile.row_begin);
  if (groups.count == 1) return 0;
  const int64_t num_k = round_up(k, 2), block_k = block_size(groups.num_rows, k);
  const int64_t num_turns = num_k / block_k * (block_k / 2 / kTurnIterations) + num_k % block_k / 2 / kTurnIterations;
  const int64_t num_panels = ceil_div(tile.col_end - tile.col_begin, kWeightPanel);
  return num_pieces_of_turns<1>(groups.count * num_panels * num_turns, iteration_bytes);
}

void tile_avx2(const TileArgs& args) {
  const MatmulTile& t = args.tile;
  const RowGroups groups(t.row_end - t.row_begin);
  const int64_t num_k = round_up(args.k, 2);
  const int64_t block_k = block_size(groups.num_rows, args.k);
  const int64_t strip = num_strip_panels(groups.num_rows) * kWeightPanel;
  for (int64_t k = 0; k < num_k; k += block_k) {
    for (int64_t col = t.col_begin; col < t.col_end; col += strip) {
      run_strip(args, groups, k, min64(block_k, num_k - k), col, min64(col + strip, t.col_end));
    }
  }
}

}  // namespace blendserve::kernels
