// int8 products: making the integers of weights and activations, and the kernel for every processor. All kernels give
// the same bits: integer sums are exact, and what follows them is a fixed sequence of float32 operations.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops/matmul_kernels.h"

namespace blendserve {
namespace {

using kernels::ceil_div;
using kernels::kInt8Max;
using kernels::kInt8Panel;
using kernels::kInt8Zero;
using kernels::min64;
using kernels::round_up;

// The largest positive or negative part of the sum of two neighbours in k. Units: those of the weights.
float pair_bound(const float* row, int64_t k) {
  float bound = 0.0f;
  for (int64_t i = 0; i < k; i += 2) {
    const float a = row[i], b = i + 1 < k ? row[i + 1] : 0.0f;
    bound = std::max({bound, std::abs(a), std::abs(b), std::abs(a + b)});
  }
  return bound;
}

// Puts one row of weights into its column of a panel; returns its scale and adds up its integers. Two neighbours of one
// sign add up to kInt8Max before rounding and, rounding by half each, to one more after it.
float quantize_column(const float* row, int64_t k, int8_t* column, int32_t* sum) {
  const float bound = pair_bound(row, k);
  const float inverse = bound < 0x1p-100f ? 0.0f : kInt8Max / bound;
  for (int64_t i = 0; i < k; ++i) {
    const float scaled = row[i] * inverse;
    if (!(std::abs(scaled) < kInt8Max + 0.5f)) throw std::invalid_argument("weights for int8 must be finite");
    const auto value = static_cast<int8_t>(std::lrintf(scaled));
    column[i / 4 * kInt8Panel * 4 + i % 4] = value;
    *sum += value;
  }
  return bound / kInt8Max;
}

}  // namespace

void PackedMatrix::pack_int8(std::span<const float> weights) {
  if (k_ > kernels::kMaxInt8K) {
    throw std::invalid_argument("int8 sums may have " + std::to_string(kernels::kMaxInt8K) + " terms, not " +
                                std::to_string(k_) + "; use bf16");
  }
  const int64_t num_columns = round_up(n_, kInt8Panel);
  const int64_t panel_size = round_up(k_, 4) * kInt8Panel;
  scales_.assign(static_cast<size_t>(num_columns), 0.0f);
  offsets_.assign(static_cast<size_t>(num_columns), 0);
  allocate(ceil_div(n_, kInt8Panel) * panel_size);
  auto* out = static_cast<int8_t*>(data_.get());
  std::memset(out, 0, static_cast<size_t>(num_bytes_));
  for (int64_t i = 0; i < n_; ++i) {
    int32_t sum = 0;
    int8_t* column = out + i / kInt8Panel * panel_size + i % kInt8Panel * 4;
    scales_[static_cast<size_t>(i)] = quantize_column(weights.data() + i * k_, k_, column, &sum);
    offsets_[static_cast<size_t>(i)] = kInt8Zero * sum;
  }
  num_bytes_ += num_columns * static_cast<int64_t>(sizeof(float) + sizeof(int32_t));
}

void PackedMatrix::unpack_int8_row(int64_t row, float* out) const {
  const int8_t* column = int8_data() + row / kInt8Panel * round_up(k_, 4) * kInt8Panel + row % kInt8Panel * 4;
  const float scale = scales_[static_cast<size_t>(row)];
  for (int64_t i = 0; i < k_; ++i) out[i] = static_cast<float>(column[i / 4 * kInt8Panel * 4 + i % 4]) * scale;
}

namespace kernels {

void int8_row_portable(const float* x, int64_t k, uint8_t* row) {
  uint32_t max_bits = 0;  // of absolute values: as integers they are ordered like floats, with NaNs above everything
  for (int64_t i = 0; i < k; ++i) max_bits = std::max(max_bits, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  const Int8Scale scale = int8_scale(max_bits);
  for (int64_t i = 0; i < k; ++i) {
    row[i] = static_cast<uint8_t>(scale.is_finite ? kInt8Zero + std::lrintf(x[i] * scale.inverse) : kInt8Zero);
  }
  int8_finish_row(scale, k, row);
}

void int8_tile_portable(const Int8TileArgs& a) {
  const int64_t panel_size = round_up(a.k, 4) * kInt8Panel;
  for (int64_t row = a.tile.row_begin; row < a.tile.row_end; ++row) {
    const uint8_t* x = a.x + row * int8_row_stride(a.k);
    const float x_scale = int8_row_scale(x, a.k);
    for (int64_t col = a.tile.col_begin; col < a.tile.col_end; col += kInt8Panel) {
      const int8_t* w = a.w + col / kInt8Panel * panel_size;
      int32_t sums[kInt8Panel] = {};
      for (int64_t k = 0; k < a.k; k += 4, w += 4 * kInt8Panel) {
        for (int64_t c = 0; c < kInt8Panel; ++c) {
          for (int64_t i = 0; i < 4; ++i) sums[c] += x[k + i] * w[4 * c + i];
        }
      }
      for (int64_t c = 0; c < min64(kInt8Panel, a.tile.col_end - col); ++c) {
        float* y = a.y + row * a.ldy + col + c;
        float value = static_cast<float>(sums[c] - a.offsets[col + c]) * (x_scale * a.scales[col + c]);
        if (a.accumulate) value = *y + value;
        *y = a.bias == nullptr ? value : value + a.bias[col + c];
      }
    }
  }
}

void int8_rows(Isa isa, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k, void* packed) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint8_t* out = static_cast<uint8_t*>(packed) + row * int8_row_stride(k);
#if defined(__x86_64__)
    if (isa != Isa::kPortable) {
      int8_row_avx2(x + row * ldx, k, out);
      continue;
    }
#endif
    int8_row_portable(x + row * ldx, k, out);
  }
}

void int8_tile(const void* packed_x, const PackedMatrix& w, const MatmulTile& tile, const float* bias, bool accumulate,
               float* y, int64_t ldy) {
  const Int8TileArgs args{static_cast<const uint8_t*>(packed_x),
                          w.int8_data(),
                          w.scales(),
                          w.offsets(),
                          w.k(),
                          tile,
                          bias,
                          accumulate,
                          y,
                          ldy};
  switch (w.isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return int8_tile_avx2(args);
    case Isa::kAvxVnni:
      return int8_tile_avxvnni(args);
    case Isa::kAvx512Vnni:
    case Isa::kAvx512Bf16:
      return int8_tile_avx512vnni(args);
#endif
    default:
      return int8_tile_portable(args);
  }
}

}  // namespace kernels
}  // namespace blendserve
