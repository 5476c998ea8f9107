// float32 arithmetic on AVX2 + FMA. An output element is one chain of fused multiply-adds over rising k in every kernel
// here, so that the choice of kernel never shows in a result.
#include <immintrin.h>

#include "ops/matmul_kernels.h"

namespace blendserve::kernels {
namespace {

// 6 rows x 16 columns = 12 accumulators, 2 weights, 1 activation, 1 mask fill the 16 registers; 12 independent chains
// also cover the FMA's latency (4 cycles x 2 per cycle = 8) with room to spare.
constexpr int kMaxRows = 6;
// k of one expanded block: 16 columns x 288 x 4 bytes (18 KiB) and 6 rows x 288 x 4 bytes (7 KiB) stay in a 32 KiB L1.
constexpr int64_t kBlockK = 288;
// Expanding costs about as much as one row of arithmetic and saves a third of the instructions of the others.
constexpr int64_t kExpandMinRows = 24;

// One block of output: kRows rows x kPanels panels of 16 columns, over `num_k` (even) steps of k.
struct Block {
  const float* x;
  int64_t ldx;
  const void* w;         // bf16 panel, or float32 [k][16] where expanded
  int64_t panel_stride;  // bf16 elements from one panel to the next
  int64_t num_k;
  float* y;
  int64_t ldy;
  bool is_loaded;            // start from y instead of 0
  const float* bias;         // added last; may be null
  const uint16_t* prefetch;  // one line per panel and two k is fetched into L2 from here ...
  int64_t prefetch_step;     // ... moving on by so many elements: 32, or 0 where there is nothing to fetch
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

template <int kRows, int kPanels>
void direct_kernel(const Block& b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const float* x = b.x;
  const int64_t ldx = b.ldx;
  const uint16_t* w = static_cast<const uint16_t*>(b.w);
  const int64_t panel_stride = b.panel_stride;
  const uint16_t* prefetch = b.prefetch;
  __m256 sums[kRows][2 * kPanels];
  load_sums<kRows, 2 * kPanels>(b, sums);
  for (int64_t pair = b.num_k / 2; pair > 0; --pair) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const __m256i* lanes = reinterpret_cast<const __m256i*>(w + p * panel_stride);
      _mm_prefetch(reinterpret_cast<const char*>(prefetch + p * panel_stride), _MM_HINT_T1);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m256i raw0 = _mm256_load_si256(lanes);
        const __m256i raw1 = _mm256_load_si256(lanes + 1);
        const __m256 w0 = _mm256_castsi256_ps(odd ? _mm256_and_si256(raw0, high) : _mm256_slli_epi32(raw0, 16));
        const __m256 w1 = _mm256_castsi256_ps(odd ? _mm256_and_si256(raw1, high) : _mm256_slli_epi32(raw1, 16));
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          const __m256 value = _mm256_broadcast_ss(x + r * ldx + odd);
          sums[r][2 * p] = _mm256_fmadd_ps(value, w0, sums[r][2 * p]);
          sums[r][2 * p + 1] = _mm256_fmadd_ps(value, w1, sums[r][2 * p + 1]);
        }
      }
    }
    x += 2;
    w += 2 * kWeightPanel;
    prefetch += b.prefetch_step;
  }
  store_sums<kRows, 2 * kPanels>(b, sums);
}

template <int kRows>
void expanded_kernel(const Block& b) {
  const float* x = b.x;
  const int64_t ldx = b.ldx;
  const float* w = static_cast<const float*>(b.w);
  const uint16_t* prefetch = b.prefetch;
  __m256 sums[kRows][2];
  load_sums<kRows, 2>(b, sums);
  for (int64_t pair = b.num_k / 2; pair > 0; --pair) {
    _mm_prefetch(reinterpret_cast<const char*>(prefetch), _MM_HINT_T1);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m256 w0 = _mm256_load_ps(w + odd * 16);
      const __m256 w1 = _mm256_load_ps(w + odd * 16 + 8);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256 value = _mm256_broadcast_ss(x + r * ldx + odd);
        sums[r][0] = _mm256_fmadd_ps(value, w0, sums[r][0]);
        sums[r][1] = _mm256_fmadd_ps(value, w1, sums[r][1]);
      }
    }
    x += 2;
    w += 2 * kWeightPanel;
    prefetch += b.prefetch_step;
  }
  store_sums<kRows, 2>(b, sums);
}

// bf16 panel [num_k / 2][16][2] -> float32 [num_k][16].
void expand_panel(const uint16_t* panel, int64_t num_k, float* out) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t k = 0; k < num_k; k += 2) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i raw = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + k * kWeightPanel) + half);
      float* even = out + k * kWeightPanel + half * 8;
      _mm256_store_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)));
      _mm256_store_ps(even + kWeightPanel, _mm256_castsi256_ps(_mm256_and_si256(raw, high)));
    }
  }
}

void run_direct(const Block& b, int64_t num_rows, int64_t num_panels) {
  switch (num_rows * 8 + num_panels) {
    case 1 * 8 + 1:
      return direct_kernel<1, 1>(b);
    case 1 * 8 + 2:
      return direct_kernel<1, 2>(b);
    case 1 * 8 + 3:
      return direct_kernel<1, 3>(b);
    case 1 * 8 + 4:
      return direct_kernel<1, 4>(b);
    case 2 * 8 + 1:
      return direct_kernel<2, 1>(b);
    case 2 * 8 + 2:
      return direct_kernel<2, 2>(b);
    case 3 * 8 + 1:
      return direct_kernel<3, 1>(b);
    case 3 * 8 + 2:
      return direct_kernel<3, 2>(b);
    case 4 * 8 + 1:
      return direct_kernel<4, 1>(b);
    case 5 * 8 + 1:
      return direct_kernel<5, 1>(b);
    case 6 * 8 + 1:
      return direct_kernel<6, 1>(b);
    default:
      __builtin_unreachable();
  }
}

void run_expanded(const Block& b, int64_t num_rows) {
  switch (num_rows) {
    case 1:
      return expanded_kernel<1>(b);
    case 2:
      return expanded_kernel<2>(b);
    case 3:
      return expanded_kernel<3>(b);
    case 4:
      return expanded_kernel<4>(b);
    case 5:
      return expanded_kernel<5>(b);
    case 6:
      return expanded_kernel<6>(b);
    default:
      __builtin_unreachable();
  }
}

// Rows of a tile cut into groups of at most kMaxRows whose sizes differ by one at most: 7 rows as 4 + 3, never as 6
// + 1.
struct RowGroups {
  explicit RowGroups(int64_t num_rows) : count(ceil_div(num_rows, kMaxRows)), num_rows(num_rows) {}
  int64_t begin(int64_t group) const { return group * num_rows / count; }
  int64_t count, num_rows;
};

void tile_direct(const TileArgs& a) {
  const int64_t num_k = round_up(a.k, 2);
  const int64_t panel_stride = num_k * kWeightPanel;
  const int64_t ldx = row_stride(a.k);
  const MatmulTile& t = a.tile;
  const RowGroups groups(t.row_end - t.row_begin);
  // Few rows need more columns for enough independent sums: 64 for one row, 32 for two and three.
  const int64_t strip_panels = groups.num_rows == 1 ? 4 : 2;
  for (int64_t col = t.col_begin; col < t.col_end; col += strip_panels * kWeightPanel) {
    const int64_t strip_columns = min64(strip_panels * kWeightPanel, t.col_end - col);
    const int64_t next_col = col + strip_columns;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t row = t.row_begin + groups.begin(group);
      const int64_t num_rows = t.row_begin + groups.begin(group + 1) - row;
      const int64_t step_panels = num_rows <= 3 ? strip_panels : 1;
      for (int64_t c = 0; c < strip_columns; c += step_panels * kWeightPanel) {
        const int64_t num_columns = min64(step_panels * kWeightPanel, strip_columns - c);
        const int64_t num_panels = ceil_div(num_columns, kWeightPanel);
        const uint16_t* w = a.w + (col + c) / kWeightPanel * panel_stride;
        const bool can_fetch = group == 0 && next_col + c < t.col_end;
        const Block b{.x = static_cast<const float*>(a.x) + row * ldx,
                      .ldx = ldx,
                      .w = w,
                      .panel_stride = panel_stride,
                      .num_k = num_k,
                      .y = a.y + row * a.ldy + col + c,
                      .ldy = a.ldy,
                      .is_loaded = a.accumulate,
                      .bias = a.bias != nullptr ? a.bias + col + c : nullptr,
                      .prefetch = can_fetch ? w + strip_panels * panel_stride : w,
                      .prefetch_step = can_fetch ? 2 * kWeightPanel : 0};
        if (num_columns == num_panels * kWeightPanel) {
          run_direct(b, num_rows, num_panels);
        } else {
          run_padded<kMaxRows, 4 * kWeightPanel>(b, num_rows, num_columns,
                                                 [=](const Block& p) { run_direct(p, num_rows, num_panels); });
        }
      }
    }
  }
}

// Fetches lines of y that a kernel will update: nobody else does, each row is on a page of its own.
void prefetch_rows(const float* y, int64_t ldy, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) _mm_prefetch(reinterpret_cast<const char*>(y + r * ldy), _MM_HINT_T0);
}

void tile_expanded(const TileArgs& a) {
  const int64_t num_k = round_up(a.k, 2);
  const int64_t block_k = round_up(ceil_div(num_k, ceil_div(num_k, kBlockK)), 2);
  const int64_t ldx = row_stride(a.k);
  const MatmulTile& t = a.tile;
  const RowGroups groups(t.row_end - t.row_begin);
  alignas(64) float expanded[kBlockK * kWeightPanel];
  for (int64_t k = 0; k < num_k; k += block_k) {
    const int64_t block_num_k = min64(block_k, num_k - k);
    const bool is_last = k + block_k >= num_k;
    for (int64_t col = t.col_begin; col < t.col_end; col += kWeightPanel) {
      const int64_t num_columns = min64(kWeightPanel, t.col_end - col);
      const uint16_t* w = a.w + col * num_k + k * kWeightPanel;
      const bool can_fetch = col + kWeightPanel < t.col_end;
      expand_panel(w, block_num_k, expanded);
      for (int64_t group = 0; group < groups.count; ++group) {
        const int64_t row = t.row_begin + groups.begin(group);
        const int64_t next_row = t.row_begin + groups.begin(group + 1);
        const int64_t num_rows = next_row - row;
        float* y = a.y + row * a.ldy + col;
        prefetch_rows(y + num_rows * a.ldy, a.ldy, min64(kMaxRows, t.row_end - next_row));
        const Block b{.x = static_cast<const float*>(a.x) + row * ldx + k,
                      .ldx = ldx,
                      .w = expanded,
                      .panel_stride = 0,
                      .num_k = block_num_k,
                      .y = y,
                      .ldy = a.ldy,
                      .is_loaded = a.accumulate || k > 0,
                      .bias = a.bias != nullptr && is_last ? a.bias + col : nullptr,
                      .prefetch = can_fetch ? w + num_k * kWeightPanel : w,
                      .prefetch_step = can_fetch && group == 0 ? 2 * kWeightPanel : 0};
        if (num_columns == kWeightPanel) {
          run_expanded(b, num_rows);
        } else {
          run_padded<kMaxRows, kWeightPanel>(b, num_rows, num_columns,
                                             [=](const Block& p) { run_expanded(p, num_rows); });
        }
      }
    }
  }
}

}  // namespace

void tile_avx2(const TileArgs& args, Path path) {
  const bool is_expanded =
      path == Path::kExpanded || (path == Path::kAuto && args.tile.row_end - args.tile.row_begin >= kExpandMinRows);
  is_expanded ? tile_expanded(args) : tile_direct(args);
}

}  // namespace blendserve::kernels
