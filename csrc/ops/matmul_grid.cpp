// Cutting a matmul into tiles. Results do not depend on it; only time does.
#include <algorithm>

#include "ops/matmul.h"
#include "ops/matmul_kernels.h"

namespace blendserve {
namespace {

using kernels::ceil_div;
using kernels::round_up;

// A tile should take 10 us or more (claiming one takes about 0.1 us): at 100 GFLOP/s that is 1 MFLOP, of int8 2 MFLOP.
// Up to 8 rows a tile takes as long as reading its weights does, whatever the number of rows.
constexpr int64_t kMinTileFlop = 1000000;
constexpr int64_t kMinInt8TileFlop = 2000000;
constexpr int64_t kBandwidthRows = 8;
// More tiles than threads, so that a thread that its core's neighbours slow down leaves tiles to the others.
constexpr int64_t kMaxTilesPerThread = 8;
// Strips of a tile where shares stay equal: the first strip of a tile waits for its weights, the others were asked for.
constexpr int64_t kMinTileStrips = 4;

// Bytes of a row that a kernel comes back to for every column of a tile.
int64_t resident_row_bytes(MatmulFormat format, int64_t k) {
  if (format.dtype == Dtype::kInt8) return k;
  return format.isa == Isa::kAvx512Bf16 ? 2 * k : 4 * std::min(k, kernels::kMaxResidentK);
}

// Strips of a tile: the busiest thread has as few as can be, and then there are as many tiles as useful.
int64_t strips_per_tile(int64_t num_strips, int64_t num_row_tiles, int64_t max_rounds, int num_threads) {
  int64_t best = num_strips, fewest = num_strips * num_row_tiles;
  for (int64_t round = 1; round <= max_rounds; ++round) {
    const int64_t strips = ceil_div(num_strips, ceil_div(round * num_threads, num_row_tiles));
    const int64_t num_tiles = ceil_div(num_strips, strips) * num_row_tiles;
    const int64_t busiest = ceil_div(num_tiles, num_threads) * strips;
    if (busiest > fewest || (busiest == fewest && strips < kMinTileStrips)) continue;
    best = strips;
    fewest = busiest;
  }
  return best;
}

}  // namespace

MatmulTile MatmulGrid::tile(int64_t index) const {
  const int64_t row = index % num_row_tiles() * row_tile;
  const int64_t col = index / num_row_tiles() * col_tile;
  const int64_t next = index + num_threads, next_col = next / num_row_tiles() * col_tile;
  const bool has_next = next < size() && next_col != col;
  return {row, std::min(row + row_tile, m), col, std::min(col + col_tile, n), has_next ? next_col : -1};
}

MatmulGrid suggest_grid(MatmulFormat format, int64_t m, int64_t n, int64_t k, int num_threads, int64_t l2_bytes) {
  // Half of the cache for the rows; the other half for weights, outputs and what the cache keeps of the past.
  const int64_t max_rows = std::max(kRowPanel, l2_bytes / 2 / resident_row_bytes(format, k) / kRowPanel * kRowPanel);
  const int64_t row_tile = round_up(ceil_div(m, ceil_div(m, max_rows)), kRowPanel);
  const int64_t num_row_tiles = ceil_div(m, row_tile);
  const int64_t flop = 2 * std::max(m, kBandwidthRows) * n * k;
  const int64_t min_flop = format.dtype == Dtype::kInt8 ? kMinInt8TileFlop : kMinTileFlop;
  const int64_t max_rounds = std::clamp<int64_t>(flop / min_flop / num_threads, 1, kMaxTilesPerThread);
  const int64_t strip_width = m == 1 ? 2 * kColumnPanel : kColumnPanel;  // one row runs on strips of 64 columns
  return {m, n, row_tile,
          strips_per_tile(ceil_div(n, strip_width), num_row_tiles, max_rounds, num_threads) * strip_width, num_threads};
}

}  // namespace blendserve
