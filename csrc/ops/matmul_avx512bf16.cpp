// bf16 dot products of AVX512-BF16 (vdpbf16ps): two neighbours in k per lane and instruction, summed into float32.
// Activations are rounded to bf16. An output element is one chain of these over rising k in every kernel here.
#include "ops/avx512.h"
#include "ops/matmul_kernels.h"
#include "ops/prefetch_schedule.h"

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
  bool is_loaded;     // start from y instead of 0
  const float* bias;  // added last; may be null
  PrefetchSchedule schedule;
};

// Panels that `num_rows` rows take at once.
constexpr int64_t panels_at_once(int64_t num_rows) { return num_rows == 1 ? kMaxPanels : num_rows <= 3 ? 2 : 1; }

// Few rows wait for their own weights: hardware fetches those, and to ask for more costs time.
constexpr bool can_ask(int64_t num_rows) { return num_rows > 3; }

// sums += two values of each row by two weights of each column.
template <int kRows, int kVectors>
[[gnu::always_inline]] inline void add_pair(const uint16_t* x, const uint16_t* w, int64_t panel_stride,
                                            __m512 (&sums)[kRows][kVectors]) {
  __m512bh weights[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    weights[v] = (__m512bh)_mm512_loadu_si512(w + v / 2 * panel_stride + v % 2 * 32);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    int lane;
    __builtin_memcpy(&lane, x + 2 * r, sizeof(lane));
    const __m512bh value = (__m512bh)_mm512_set1_epi32(lane);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], value, weights[v]);
  }
}

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
  int64_t pairs = b.num_pairs;
  Prefetcher<2> prefetcher(b.schedule);
  for (; can_ask(kRows) && pairs >= kTurnIterations; pairs -= kTurnIterations) {
    prefetcher.begin_turn(w);
    BLENDSERVE_UNROLL_TURN
    for (int iteration = 0; iteration < kTurnIterations; ++iteration) {
      prefetcher.ask(iteration, sums[0][0]);
      add_pair<kRows, kVectors>(x + iteration * 2 * kRowPanel, w + iteration * 2 * kPanel, b.panel_stride, sums);
    }
    x += kTurnIterations * 2 * kRowPanel;
    w += kTurnIterations * 2 * kPanel;
  }
  for (; pairs > 0; --pairs) {
    add_pair<kRows, kVectors>(x, w, b.panel_stride, sums);
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

// 16 pairs of four rows, each as one vector, become [16][kRowPanel][2] from `out` on; the first `num_pairs` are
// written.
[[gnu::always_inline]] inline void store_pairs(const __m512i (&rows)[4], int64_t num_pairs, uint16_t* out) {
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  // Lane l of 128 bits in pairs[j] is pair 4 l + j of the four rows.
  const __m512i pairs[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                            _mm512_unpackhi_epi64(b, d)};
  const auto store = [&](int64_t pair, __m128i lane) {
    if (pair < num_pairs) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + pair * 2 * kRowPanel), lane);
  };
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(j, _mm512_castsi512_si128(pairs[j]));
    store(j + 4, _mm512_extracti32x4_epi32(pairs[j], 1));
    store(j + 8, _mm512_extracti32x4_epi32(pairs[j], 2));
    store(j + 12, _mm512_extracti32x4_epi32(pairs[j], 3));
  }
}

// The first `count` of 32 floats, rounded; zeros behind them.
[[gnu::always_inline]] inline __m512i rounded(const float* x, int64_t count) {
  const uint32_t mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// How the rows of a tile are cut. Strips are as wide as the kernel of the last, shortest panel of rows.
struct RowSets {
  RowSets(const MatmulTile& t, int64_t k)
      : count(ceil_div(t.row_end - t.row_begin, kRowPanel)),
        num_last((t.row_end - t.row_begin - 1) % kRowPanel + 1),
        num_asking(count - (can_ask(num_last) ? 0 : 1)),
        strip(panels_at_once(num_last) * kPanel),
        shares(round_up(k, 2) * kPanel * int64_t{sizeof(uint16_t)}, num_asking > 0 ? num_asking : 1, ceil_div(k, 2)) {}

  int64_t count, num_last, num_asking, strip;
  StripShares shares;
};

// One set of rows on the columns of a strip.
void run_rows(const TileArgs& a, const RowSets& sets, int64_t set, int64_t begin, int64_t end) {
  const int64_t num_k = round_up(a.k, 2), num_pairs = num_k / 2, panel_stride = num_k * kPanel;
  const int64_t row = a.tile.row_begin + set * kRowPanel, num_rows = min64(kRowPanel, a.tile.row_end - row);
  const int64_t width = min64(panels_at_once(num_rows) * kPanel, sets.strip);
  for (int64_t col = begin; col < end; col += width) {
    const int64_t num_columns = min64(width, end - col), num_panels = ceil_div(num_columns, kPanel);
    const uint16_t* w = a.w + col / kPanel * panel_stride;
    PrefetchSchedule schedule;
    const void* next = weights_to_ask_for(a.tile, col, sets.strip, a.w, num_k * int64_t{sizeof(uint16_t)});
    if (set < sets.num_asking && next != nullptr) schedule = sets.shares.of_set(set, next);
    if (sets.count > 1) schedule.pieces = a.pieces;
    const Block b{.x = static_cast<const uint16_t*>(a.x) + row * num_k,
                  .w = w,
                  .panel_stride = panel_stride,
                  .num_pairs = num_pairs,
                  .y = a.y + row * a.ldy + col,
                  .ldy = a.ldy,
                  .is_loaded = a.accumulate,
                  .bias = a.bias != nullptr ? a.bias + col : nullptr,
                  .schedule = schedule};
    ask_for_outputs(b.y + num_rows * a.ldy, a.ldy, min64(kRowPanel, a.tile.row_end - row - num_rows), num_columns);
    if (num_columns == num_panels * kPanel) {
      run(b, num_rows, num_panels);
    } else {
      run_padded<kRowPanel, kMaxPanels * kPanel>(b, num_rows, num_columns,
                                                 [=](const Block& p) { run(p, num_rows, num_panels); });
    }
  }
}

}  // namespace

// None beside one panel of rows: that waits for its own weights.
int64_t num_prefetch_pieces_avx512bf16(const MatmulTile& tile, int64_t k, int64_t iteration_bytes) {
  const RowSets sets(tile, k);
  if (sets.count == 1) return 0;
  const int64_t num_panels = ceil_div(tile.col_end - tile.col_begin, kPanel);
  return num_pieces_of_turns<2>(sets.num_asking * num_panels * (ceil_div(k, 2) / kTurnIterations), iteration_bytes);
}

// All sets of rows visit a strip while its weights are near, and ask for their share of the next one's.
void tile_avx512bf16(const TileArgs& a) {
  const RowSets sets(a.tile, a.k);
  for (int64_t begin = a.tile.col_begin; begin < a.tile.col_end; begin += sets.strip) {
    const int64_t end = min64(begin + sets.strip, a.tile.col_end);
    for (int64_t set = 0; set < sets.count; ++set) run_rows(a, sets, set, begin, end);
  }
}

// Four rows of 32 values at a time. Rows of a panel that are not there become zeros.
void pack_rows_avx512bf16(const float* x, int64_t ldx, int64_t num_rows, int64_t begin, int64_t end, int64_t k,
                          void* packed) {
  const int64_t num_k = round_up(k, 2);
  for (int64_t row = 0; row < num_rows; row += 4) {
    uint16_t* out = static_cast<uint16_t*>(packed) + row / kRowPanel * kRowPanel * num_k + row % kRowPanel * 2;
    out += begin * kRowPanel;
    const float* from = x + row * ldx;
    for (int64_t i = begin; i < end; i += 32, from += 32, out += 32 * kRowPanel) {
      __m512i rows[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        rows[r] = row + r < num_rows ? rounded(from + r * ldx, end - i) : _mm512_setzero_si512();
      }
      store_pairs(rows, (round_up(end, 2) - i) / 2, out);
    }
  }
}

}  // namespace blendserve::kernels
