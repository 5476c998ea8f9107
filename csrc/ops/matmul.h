// Y = X W^T with bf16 or int8 weights packed once. Every output element is reduced over k in one fixed order that does
// not depend on the number of rows, the tile or the thread, so results are bitwise equal under any batching (bf16: on
// one Isa, since different instruction sets round differently; int8: on all of them, since integers add up alike).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "ops/isa.h"
#include "ops/prefetch.h"
#include "ops/weight_memory.h"

namespace blendserve {

// How weights are kept and what they are multiplied by. kBf16: bfloat16 by float32 (kAvx512Bf16: by bfloat16). kInt8:
// one scale per output column, by 8-bit activations with a scale per row and group of k, made of float32 rows as they
// come.
enum class Dtype { kBf16, kInt8 };
Dtype dtype_from_name(std::string_view);  // "bf16", "int8"; throws std::invalid_argument
std::string_view dtype_name(Dtype dtype);

// What decides how the operands of a product lie in memory.
struct MatmulFormat {
  MatmulFormat(Isa isa, Dtype dtype = Dtype::kBf16) : isa(isa), dtype(dtype) {}  // NOLINT: an Isa alone means bf16
  Isa isa;
  Dtype dtype;
};

// Weights [n, k] of one linear layer, packed for one format. k and n are padded with zeros to the kernel's multiples.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // Row-major [n, k]; float32 is rounded to bf16, to nearest even. Throws std::invalid_argument where sizes disagree.
  // int8 rounds to the nearest multiple of the row's scale. The matrices of a model share `memory`; without it a matrix
  // allocates for itself.
  PackedMatrix(MatmulFormat format, std::span<const float> weights, int64_t n, int64_t k,
               WeightMemory* memory = nullptr);
  PackedMatrix(Isa isa, std::span<const uint16_t> bf16_weights, int64_t n, int64_t k);

  Isa isa() const { return format_.isa; }
  Dtype dtype() const { return format_.dtype; }
  MatmulFormat format() const { return format_; }
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int64_t num_bytes() const { return num_bytes_; }
  // Aligned to 64 bytes; layout in matmul_kernels.h.
  const uint16_t* data() const { return static_cast<const uint16_t*>(data_.get()); }
  const int8_t* int8_data() const { return static_cast<const int8_t*>(data_.get()); }
  const float* scales() const { return scales_.data(); }      // int8: per column, padded to whole panels
  const int32_t* offsets() const { return offsets_.data(); }  // int8: what sums start from, per group and column
  // Where the weights of the columns from `col` on begin, a multiple of kColumnPanel.
  const void* weights_from(int64_t col) const;
  // Writes row `row` (k values) as float32: the embedding of a token where the head is tied to it.
  void unpack_row(int64_t row, float* out) const;

 private:
  template <class T>
  void pack(std::span<const T> weights, WeightMemory* memory);
  void check_size(size_t num_weights) const;
  void allocate(int64_t num_bytes, WeightMemory* memory);
  void pack_int8(std::span<const float> weights, WeightMemory* memory);
  void unpack_int8_row(int64_t row, float* out) const;

  MatmulFormat format_ = Isa::kPortable;
  int64_t n_ = 0;
  int64_t k_ = 0;
  int64_t num_bytes_ = 0;
  std::shared_ptr<void> data_;  // never written once it is packed
  std::vector<float> scales_;
  std::vector<int32_t> offsets_;
};

// Activations in the form a kernel reads: float32 rows, bf16 in panels of rows (kAvx512Bf16) or rows of 8-bit integers
// with their scale (kInt8). Bytes needed for m rows of k columns; allocate them aligned to 64 bytes.
int64_t activation_bytes(MatmulFormat format, int64_t m, int64_t k);
// Row panels are kRowPanel rows: callers split work for pack_activations at multiples of it.
inline constexpr int64_t kRowPanel = 12;
// Packs rows [row_begin, row_end) of x (float32, leading dimension ldx) into `packed`, which holds all m rows.
// row_begin is a multiple of kRowPanel, row_end too or m.
void pack_activations(MatmulFormat format, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k,
                      void* packed);

// Packs columns [begin, end) of `num_rows` rows of k columns: `x` has those columns alone, `packed` begins with the
// rows' first one. `begin` and `end` are multiples of activation_grain() or k.
void pack_activation_columns(MatmulFormat format, const float* x, int64_t ldx, int64_t num_rows, int64_t begin,
                             int64_t end, int64_t k, void* packed);
int64_t activation_grain(MatmulFormat format, int64_t k);

// Column tiles are multiples of this many columns (the last one may be shorter).
inline constexpr int64_t kColumnPanel = 32;
// y[row, col] = (accumulate ? y[row, col] : 0) + sum_k x[row, k] * w[col, k] (+ bias[col] where bias is not null) for
// rows [row_begin, row_end) and columns [col_begin, col_end); row_begin a multiple of kRowPanel, col_begin of
// kColumnPanel. The sum starts from y where it accumulates; bias is added last and counts columns from 0, as y does.
struct MatmulTile {
  int64_t row_begin = 0, row_end = 0, col_begin = 0, col_end = 0;
  // First column that the same thread probably multiplies by next: the tile asks for its weights. None by default.
  int64_t next_col = -1;
  // Where that is another matrix: its first weights.
  const void* next_weights = nullptr;
};
// How many pieces a tile takes at most; 0 where its kernel takes none.
int64_t num_prefetch_pieces(MatmulFormat format, const MatmulTile& tile, int64_t k, int64_t iteration_bytes);
void matmul_tile(const void* packed_x, const PackedMatrix& w, const MatmulTile& tile, const float* bias,
                 bool accumulate, float* y, int64_t ldy, PrefetchPieces* pieces = nullptr);

// How to cut one matmul into tiles: tile i of size() covers tile(i). Tiles that share weights follow each other, so
// that the threads that run them at the same time read those weights from memory once.
struct MatmulGrid {
  int64_t m, n, row_tile, col_tile;
  int64_t num_threads = 1;  // that take tiles in turn
  int64_t num_row_tiles() const { return (m + row_tile - 1) / row_tile; }
  int64_t num_col_tiles() const { return (n + col_tile - 1) / col_tile; }
  int64_t size() const { return num_row_tiles() * num_col_tiles(); }
  MatmulTile tile(int64_t index) const;
};
// A grid whose tiles keep their operands in l2_bytes (one core's second-level cache) and give every thread equal work.
MatmulGrid suggest_grid(MatmulFormat format, int64_t m, int64_t n, int64_t k, int num_threads, int64_t l2_bytes);

}  // namespace blendserve
