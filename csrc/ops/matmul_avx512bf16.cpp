// bf16 dot products of AVX512-BF16 (vdpbf16ps): two neighbours in k per lane and step, summed into float32. Activations
// are rounded to bf16. An output element is one chain of these over rising k in every kernel here.
#include "ops/avx512.h"
#include "ops/bf16.h"
#include "ops/matmul_kernels.h"

namespace blendserve::kernels {
namespace {

constexpr int64_t kPanel = kWeightPanelAvx512Bf16;
// 12 rows x 32 columns: 24 accumulators, 2 weights and the activation of 32 registers. Fewer rows take more panels so
// that at least 8 independent sums cover the instruction's latency.
constexpr int64_t kMaxPanels = 4;

// Activations: panels of kRowPanel rows, [k / 2][kRowPanel][2] inside.
struct Block {
  const uint16_t* x;
  const uint16_t* w;
  int64_t panel_stride;
  int64_t num_pairs;
  float* y;
  int64_t ldy;
  bool is_loaded;               // start from y instead of 0
  const float* bias;            // added last; may be null
  const uint16_t* const* runs;  // to be fetched, the next one every `run_steps` pairs; null for none
  int64_t run_steps;
  int64_t prefetch_step;  // elements, per pair
};

template <int kRows, int kPanels>
void kernel(const Block& b) {
  constexpr int kVectors = 2 * kPanels;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = b.is_loaded ? _mm512_loadu_ps(b.y + r * b.ldy + v * 16) : _mm512_setzero_ps();
    }
  }
  const uint16_t* x = b.x;
  const uint16_t* w = b.w;
  const uint16_t* const* runs = b.runs;
  const uint16_t* prefetch = w;
  int64_t pairs_to_run = 0;
  for (int64_t pair = 0; pair < b.num_pairs; ++pair) {
    if (runs != nullptr && pairs_to_run-- == 0) {
      prefetch = *runs++;
      pairs_to_run = b.run_steps - 1;
    }
    _mm_prefetch(reinterpret_cast<const char*>(prefetch), _MM_HINT_T1);
    prefetch += b.prefetch_step;
    __m512bh weights[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const uint16_t* lanes = w + v / 2 * b.panel_stride + v % 2 * 32;
      weights[v] = (__m512bh)_mm512_loadu_si512(lanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      int lane;
      __builtin_memcpy(&lane, x + 2 * r, sizeof(lane));
      const __m512bh value = (__m512bh)_mm512_set1_epi32(lane);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], value, weights[v]);
    }
    x += 2 * kRowPanel;
    w += 2 * kPanel;
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    if (b.bias != nullptr) {
      const __m512 bias = _mm512_loadu_ps(b.bias + v * 16);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) sums[r][v] = _mm512_add_ps(sums[r][v], bias);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(b.y + r * b.ldy + v * 16, sums[r][v]);
  }
}

// Panels that `num_rows` rows take at once.
int64_t panels_at_once(int64_t num_rows) { return num_rows == 1 ? kMaxPanels : num_rows <= 3 ? 2 : 1; }

template <int kRows>
void run_panels(const Block& b, int64_t num_panels) {
  if constexpr (kRows == 1) {
    if (num_panels >= 3) return num_panels == 4 ? kernel<1, 4>(b) : kernel<1, 3>(b);
  }
  if constexpr (kRows <= 3) {
    if (num_panels == 2) return kernel<kRows, 2>(b);
  }
  return kernel<kRows, 1>(b);
}

void run(const Block& b, int64_t num_rows, int64_t num_panels) {
  switch (num_rows) {
    case 1:
      return run_panels<1>(b, num_panels);
    case 2:
      return run_panels<2>(b, num_panels);
    case 3:
      return run_panels<3>(b, num_panels);
    case 4:
      return run_panels<4>(b, num_panels);
    case 5:
      return run_panels<5>(b, num_panels);
    case 6:
      return run_panels<6>(b, num_panels);
    case 7:
      return run_panels<7>(b, num_panels);
    case 8:
      return run_panels<8>(b, num_panels);
    case 9:
      return run_panels<9>(b, num_panels);
    case 10:
      return run_panels<10>(b, num_panels);
    case 11:
      return run_panels<11>(b, num_panels);
    case 12:
      return run_panels<12>(b, num_panels);
    default:
      __builtin_unreachable();
  }
}

}  // namespace

// Every panel of rows but the first, on every panel of columns; none of three rows or fewer.
int64_t num_prefetch_runs_avx512bf16(const MatmulTile& tile, int64_t k, int64_t step_bytes) {
  const int64_t num_rows = tile.row_end - tile.row_begin;
  const int64_t last = (num_rows - 1) % kRowPanel + 1;
  const int64_t num_others = ceil_div(num_rows, kRowPanel) - (panels_at_once(last) > 1 ? 2 : 1);
  const int64_t num_panels = ceil_div(tile.col_end - tile.col_begin, kPanel);
  return num_others < 1 ? 0 : num_others * num_panels * ceil_div(round_up(k, 2) / 2, run_steps(step_bytes));
}

void tile_avx512bf16(const TileArgs& a) {
  const int64_t num_k = round_up(a.k, 2);
  const int64_t panel_stride = num_k * kPanel;
  const MatmulTile& t = a.tile;
  // Strips as wide as the kernel of the last, shortest row panel; all row panels visit a strip while its weights are
  // near.
  const int64_t num_runs = a.runs != nullptr ? ceil_div(num_k / 2, run_steps(a.runs->step_bytes)) : 0;
  const int64_t strip = panels_at_once((t.row_end - t.row_begin - 1) % kRowPanel + 1) * kPanel;
  for (int64_t begin = t.col_begin; begin < t.col_end; begin += strip) {
    const int64_t end = min64(begin + strip, t.col_end);
    for (int64_t row = t.row_begin; row < t.row_end; row += kRowPanel) {
      const int64_t num_rows = min64(kRowPanel, t.row_end - row);
      const int64_t step = min64(panels_at_once(num_rows) * kPanel, strip);
      for (int64_t col = begin; col < end; col += step) {
        const int64_t num_columns = min64(step, end - col);
        // The first rows wait for their weights.
        const bool can_fetch =
            num_runs > 0 && row > t.row_begin && panels_at_once(num_rows) == 1 && a.runs->left() >= num_runs;
        const Block b{.x = static_cast<const uint16_t*>(a.x) + row * num_k,
                      .w = a.w + col / kPanel * panel_stride,
                      .panel_stride = panel_stride,
                      .num_pairs = num_k / 2,
                      .y = a.y + row * a.ldy + col,
                      .ldy = a.ldy,
                      .is_loaded = a.accumulate,
                      .bias = a.bias != nullptr ? a.bias + col : nullptr,
                      .runs = can_fetch ? a.runs->take(num_runs) : nullptr,
                      .run_steps = can_fetch ? run_steps(a.runs->step_bytes) : 0,
                      .prefetch_step = can_fetch ? a.runs->step_bytes / 2 : 0};
        const int64_t num_panels = ceil_div(num_columns, kPanel);
        if (num_columns == num_panels * kPanel) {
          run(b, num_rows, num_panels);
        } else {
          run_padded<kRowPanel, kMaxPanels * kPanel>(b, num_rows, num_columns,
                                                     [=](const Block& p) { run(p, num_rows, num_panels); });
        }
      }
    }
  }
}

void pack_rows_avx512bf16(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k, void* packed) {
  const int64_t num_k = round_up(k, 2);
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint16_t* out = static_cast<uint16_t*>(packed) + row / kRowPanel * kRowPanel * num_k + row % kRowPanel * 2;
    for (int64_t i = 0; i < k; ++i) out[(i & ~int64_t{1}) * kRowPanel + (i & 1)] = bf16_from_float(x[row * ldx + i]);
    if (k % 2 != 0) out[(k - 1) * kRowPanel + 1] = 0;
  }
}

}  // namespace blendserve::kernels
