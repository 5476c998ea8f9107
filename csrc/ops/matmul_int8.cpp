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

// Puts one row of weights into its column of a panel; returns its scale and adds up the integers of each group. Two
// neighbours of one sign add up to kInt8Max before rounding and, rounding by half each, to one more after it.
float quantize_column(const float* row, int64_t k, int8_t* column, int32_t* sums, int64_t sum_stride) {
  const float bound = pair_bound(row, k);
  const float inverse = bound < 0x1p-100f ? 0.0f : kInt8Max / bound;
  for (int64_t i = 0; i < k; ++i) {
    const float scaled = row[i] * inverse;
    if (!(std::abs(scaled) < kInt8Max + 0.5f)) throw std::invalid_argument("weights for int8 must be finite");
    const auto value = static_cast<int8_t>(std::lrintf(scaled));
    column[i / 4 * kInt8Panel * 4 + i % 4] = value;
    sums[i / kernels::int8_group(k) * sum_stride] += value;
  }
  return bound / kInt8Max;
}

}  // namespace

void PackedMatrix::pack_int8(std::span<const float> weights, WeightMemory* memory) {
  const int64_t num_columns = round_up(n_, kInt8Panel);
  const int64_t panel_size = kernels::int8_padded(k_) * kInt8Panel;
  scales_.assign(static_cast<size_t>(num_columns), 0.0f);
  offsets_.assign(static_cast<size_t>(kernels::num_int8_groups(k_) * num_columns), 0);
  allocate(ceil_div(n_, kInt8Panel) * panel_size, memory);
  auto* out = static_cast<int8_t*>(data_.get());
  std::memset(out, 0, static_cast<size_t>(num_bytes_));
  for (int64_t i = 0; i < n_; ++i) {
    int8_t* column = out + i / kInt8Panel * panel_size + i % kInt8Panel * 4;
    scales_[static_cast<size_t>(i)] =
        quantize_column(weights.data() + i * k_, k_, column, offsets_.data() + i, num_columns);
  }
  for (int32_t& offset : offsets_) offset *= -kInt8Zero;
  num_bytes_ += static_cast<int64_t>(scales_.size() * sizeof(float) + offsets_.size() * sizeof(int32_t));
}

void PackedMatrix::unpack_int8_row(int64_t row, float* out) const {
  const int8_t* column = int8_data() + row / kInt8Panel * kernels::int8_padded(k_) * kInt8Panel + row % kInt8Panel * 4;
  const float scale = scales_[static_cast<size_t>(row)];
  for (int64_t i = 0; i < k_; ++i) out[i] = static_cast<float>(column[i / 4 * kInt8Panel * 4 + i % 4]) * scale;
}

namespace kernels {

float int8_group_portable(const float* x, int64_t count, uint8_t* bytes) {
  uint32_t max_bits = 0;  // of absolute values: as integers they are ordered like floats, with NaNs above everything
  for (int64_t i = 0; i < count; ++i) max_bits = std::max(max_bits, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  const Int8Scale scale = int8_scale(max_bits);
  for (int64_t i = 0; i < count; ++i) {
    bytes[i] = static_cast<uint8_t>(scale.is_finite ? kInt8Zero + std::lrintf(x[i] * scale.inverse) : kInt8Zero);
  }
  return scale.scale;
}

void int8_tile_portable(const Int8TileArgs& a) {
  const int64_t panel_size = int8_padded(a.k) * kInt8Panel, group = int8_group(a.k);
  for (int64_t row = a.tile.row_begin; row < a.tile.row_end; ++row) {
    const uint8_t* x = a.x + row * int8_row_stride(a.k);
    for (int64_t col = a.tile.col_begin; col < a.tile.col_end; col += kInt8Panel) {
      const int64_t num_columns = min64(kInt8Panel, a.tile.col_end - col);
      const int8_t* w = a.w + col / kInt8Panel * panel_size;
      float* y = a.y + row * a.ldy + col;
      float values[kInt8Panel] = {};
      for (int64_t begin = 0, g = 0; begin < a.k; begin += group, ++g) {
        int32_t sums[kInt8Panel] = {};
        for (int64_t k = begin; k < min64(begin + group, a.k); k += 4, w += 4 * kInt8Panel) {
          for (int64_t c = 0; c < kInt8Panel; ++c) {
            for (int64_t i = 0; i < 4; ++i) sums[c] += x[k + i] * w[4 * c + i];
          }
        }
        float x_scale;
        std::memcpy(&x_scale, x + int8_padded(a.k) + g * int64_t{sizeof(float)}, sizeof(x_scale));
        const int32_t* offsets = a.offsets + g * a.offset_stride + col;
        for (int64_t c = 0; c < num_columns; ++c) {
          values[c] += static_cast<float>(sums[c] + offsets[c]) * x_scale;
        }
      }
      for (int64_t c = 0; c < num_columns; ++c) {
        const float value = values[c] * a.scales[col + c], sum = a.accumulate ? y[c] + value : value;
        y[c] = a.bias == nullptr ? sum : sum + a.bias[col + c];
      }
    }
  }
}

void int8_rows(Isa isa, const float* x, int64_t ldx, int64_t num_rows, int64_t begin, int64_t end, int64_t k,
               void* packed) {
  const int64_t group = int8_group(k), padded = int8_padded(k);
  for (int64_t row = 0; row < num_rows; ++row) {
    uint8_t* out = static_cast<uint8_t*>(packed) + row * int8_row_stride(k);
    for (int64_t i = begin; i < end; i += group) {
      const int64_t count = min64(group, end - i);
#if defined(__x86_64__)
      const bool is_wide = isa == Isa::kAvx512Vnni || isa == Isa::kAvx512Bf16;
      const auto make_group = is_wide                 ? int8_group_avx512
                              : isa == Isa::kPortable ? int8_group_portable
                                                      : int8_group_avx2;
#else
      const auto make_group = int8_group_portable;
#endif
      const float scale = make_group(x + row * ldx + i - begin, count, out + i);
      std::memcpy(out + padded + i / group * int64_t{sizeof(float)}, &scale, sizeof(scale));
    }
    for (int64_t i = k; end == k && i < padded; ++i) out[i] = kInt8Zero;
  }
}

void int8_tile(const void* packed_x, const PackedMatrix& w, const MatmulTile& tile, const float* bias, bool accumulate,
               float* y, int64_t ldy, PrefetchPieces* pieces) {
  const Int8TileArgs args{static_cast<const uint8_t*>(packed_x),
                          w.int8_data(),
                          w.scales(),
                          w.offsets(),
                          round_up(w.n(), kInt8Panel),
                          w.k(),
                          tile,
                          bias,
                          accumulate,
                          y,
                          ldy,
                          pieces};
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

int64_t num_prefetch_pieces_int8([[maybe_unused]] Isa isa, [[maybe_unused]] const MatmulTile& tile,
                                 [[maybe_unused]] int64_t k, [[maybe_unused]] int64_t iteration_bytes) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return num_prefetch_pieces_int8_avx2(tile, k, iteration_bytes);
    case Isa::kAvxVnni:
      return num_prefetch_pieces_int8_avxvnni(tile, k, iteration_bytes);
    case Isa::kAvx512Vnni:
    case Isa::kAvx512Bf16:
      return num_prefetch_pieces_int8_avx512vnni(tile, k, iteration_bytes);
#endif
    default:
      return 0;
  }
}

}  // namespace kernels
}  // namespace blendserve
