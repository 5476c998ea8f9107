// Y = X W^T with bf16 weights packed once. Every output element is reduced over k in one fixed order that does
// not depend on the number of rows, the tile or the thread, so results are bitwise equal under any batching.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace blendserve {

// Instruction sets with their own kernels, in rising order of preference.
enum class Isa { kPortable, kAvx2, kAvx512Bf16 };

Isa best_isa();                       // the best one this processor (and operating system) runs
bool is_supported(Isa isa);           // may its kernels run here?
Isa isa_from_name(std::string_view);  // "portable", "avx2", "avx512bf16"; throws std::invalid_argument
std::string_view isa_name(Isa isa);

// Weights [n, k] of one linear layer, packed for one Isa. k and n are padded with zeros to the kernel's multiples.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // Rounds float32 weights (row-major [n, k]) to bf16, to nearest even.
  PackedMatrix(Isa isa, std::span<const float> weights, int64_t n, int64_t k);

  Isa isa() const { return isa_; }
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int64_t num_bytes() const { return static_cast<int64_t>(data_.size()) * 2; }
  const uint16_t* data() const { return data_.data(); }

 private:
  Isa isa_ = Isa::kPortable;
  int64_t n_ = 0;
  int64_t k_ = 0;
  std::vector<uint16_t> data_;  // layout is private to matmul_<isa>.cpp; aligned allocation is up to the implementation
};

// Activations in the form a kernel reads: float32 (kPortable, kAvx2) or bf16 (kAvx512Bf16), rows possibly in panels.
// Bytes needed for m rows of k columns.
int64_t activation_bytes(Isa isa, int64_t m, int64_t k);
// Row panels are kRowPanel rows: callers split work for pack_activations at multiples of it.
inline constexpr int64_t kRowPanel = 12;
// Packs rows [row_begin, row_end) of x (float32, leading dimension ldx) into `packed`, which holds all m rows.
void pack_activations(Isa isa, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k, void* packed);

// Column tiles are multiples of this many columns (the last one may be shorter).
inline constexpr int64_t kColumnPanel = 32;
// y[row, col] = (accumulate ? y[row, col] : 0) + sum_k x[row, k] * w[col, k] (+ bias[col] where bias is not null) for rows [row_begin, row_end)
// and columns [col_begin, col_end); row_begin a multiple of kRowPanel, col_begin of kColumnPanel.
struct MatmulTile {
  int64_t row_begin, row_end, col_begin, col_end;
};
void matmul_tile(const void* packed_x, const PackedMatrix& w, const MatmulTile& tile, const float* bias, bool accumulate, float* y,
                 int64_t ldy);

}  // namespace blendserve
