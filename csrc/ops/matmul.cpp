#include "ops/matmul.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "ops/bf16.h"
#include "ops/matmul_kernels.h"

namespace blendserve {
namespace {

using kernels::ceil_div;
using kernels::round_up;

constexpr int64_t kCacheLine = 64;

int64_t weight_panel(Isa isa) {
  return isa == Isa::kAvx512Bf16 ? kernels::kWeightPanelAvx512Bf16 : kernels::kWeightPanel;
}

uint16_t to_bf16(float value) { return bf16_from_float(value); }
uint16_t to_bf16(uint16_t value) { return value; }

// One panel: [k / 2][width][2] from `num_columns` rows of the source; what is beyond the source stays zero.
template <class T>
void pack_panel(const T* source, int64_t num_columns, int64_t k, int64_t width, uint16_t* panel) {
  constexpr int64_t kChunk = 64;  // k per visit of a source row: whole cache lines in, and the lines written stay in L1
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, k);
    for (int64_t column = 0; column < num_columns; ++column) {
      const T* row = source + column * k;
      uint16_t* out = panel + column * 2;
      for (int64_t i = begin; i < end; ++i) out[(i & ~int64_t{1}) * width + (i & 1)] = to_bf16(row[i]);
    }
  }
}

}  // namespace

Dtype dtype_from_name(std::string_view name) {
  for (const Dtype dtype : {Dtype::kBf16, Dtype::kInt8}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("unknown dtype '" + std::string(name) + "'; use bf16 or int8");
}

std::string_view dtype_name(Dtype dtype) { return dtype == Dtype::kInt8 ? "int8" : "bf16"; }

PackedMatrix::PackedMatrix(MatmulFormat format, std::span<const float> weights, int64_t n, int64_t k,
                           WeightMemory* memory)
    : format_(format), n_(n), k_(k) {
  check_size(weights.size());
  if (format.dtype == Dtype::kInt8) {
    pack_int8(weights, memory);
  } else {
    pack(weights, memory);
  }
}

PackedMatrix::PackedMatrix(Isa isa, std::span<const uint16_t> bf16_weights, int64_t n, int64_t k)
    : format_(isa), n_(n), k_(k) {
  check_size(bf16_weights.size());
  pack(bf16_weights, nullptr);
}

void PackedMatrix::check_size(size_t num_weights) const {
  if (n_ >= 1 && k_ >= 1 && static_cast<int64_t>(num_weights) == n_ * k_) return;
  throw std::invalid_argument("a packed matrix needs n >= 1, k >= 1 and n * k weights; got n = " + std::to_string(n_) +
                              ", k = " + std::to_string(k_) + " and " + std::to_string(num_weights) + " weights");
}

void PackedMatrix::allocate(int64_t num_bytes, WeightMemory* memory) {
  num_bytes_ = num_bytes;
  if (memory != nullptr) {
    data_ = memory->allocate(num_bytes);
    return;
  }
  const int64_t size = round_up(num_bytes, kCacheLine);
  data_ = {std::aligned_alloc(static_cast<size_t>(kCacheLine), static_cast<size_t>(size)), std::free};
  if (data_ == nullptr) throw std::bad_alloc();
}

template <class T>
void PackedMatrix::pack(std::span<const T> weights, WeightMemory* memory) {
  const int64_t width = weight_panel(format_.isa);
  const int64_t panel_size = width * round_up(k_, 2);
  allocate(ceil_div(n_, width) * panel_size * static_cast<int64_t>(sizeof(uint16_t)), memory);
  for (int64_t panel = 0; panel * width < n_; ++panel) {
    const int64_t num_columns = std::min(width, n_ - panel * width);
    uint16_t* out = static_cast<uint16_t*>(data_.get()) + panel * panel_size;
    if (num_columns < width || k_ % 2 != 0) std::memset(out, 0, static_cast<size_t>(panel_size) * sizeof(uint16_t));
    pack_panel(weights.data() + panel * width * k_, num_columns, k_, width, out);
  }
}

const void* PackedMatrix::weights_from(int64_t col) const {
  if (format_.dtype == Dtype::kInt8) return int8_data() + col * kernels::int8_padded(k_);
  return data() + col * round_up(k_, 2);
}

void PackedMatrix::unpack_row(int64_t row, float* out) const {
  if (format_.dtype == Dtype::kInt8) return unpack_int8_row(row, out);
  const int64_t width = weight_panel(format_.isa);
  const uint16_t* first = data() + row / width * width * round_up(k_, 2) + row % width * 2;
  for (int64_t i = 0; i < k_; ++i) out[i] = float_from_bf16(first[(i & ~int64_t{1}) * width + (i & 1)]);
}

int64_t activation_bytes(MatmulFormat format, int64_t m, int64_t k) {
  if (format.dtype == Dtype::kInt8) return m * kernels::int8_row_stride(k);
  if (format.isa == Isa::kAvx512Bf16) return round_up(m, kRowPanel) * round_up(k, 2) * int64_t{sizeof(uint16_t)};
  return m * kernels::row_stride(k) * int64_t{sizeof(float)};
}

void pack_activations(MatmulFormat format, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k,
                      void* packed) {
  pack_activation_columns(format, x + row_begin * ldx, ldx, row_end - row_begin, 0, k, k,
                          static_cast<uint8_t*>(packed) + activation_bytes(format, row_begin, k));
}

void pack_activation_columns(MatmulFormat format, const float* x, int64_t ldx, int64_t num_rows, int64_t begin,
                             int64_t end, int64_t k, void* packed) {
  if (format.dtype == Dtype::kInt8) return kernels::int8_rows(format.isa, x, ldx, num_rows, begin, end, k, packed);
#if defined(__x86_64__)
  if (format.isa == Isa::kAvx512Bf16) return kernels::pack_rows_avx512bf16(x, ldx, num_rows, begin, end, k, packed);
#endif
  const int64_t stride = kernels::row_stride(k), num_padding = end == k ? stride - k : 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    float* out = static_cast<float*>(packed) + row * stride;
    std::memcpy(out + begin, x + row * ldx, static_cast<size_t>(end - begin) * sizeof(float));
    std::memset(out + end, 0, static_cast<size_t>(num_padding) * sizeof(float));
  }
}

int64_t activation_grain(MatmulFormat format, int64_t k) {
  return format.dtype == Dtype::kInt8 ? kernels::int8_group(k) : 2;
}

int64_t num_prefetch_pieces([[maybe_unused]] MatmulFormat format, [[maybe_unused]] const MatmulTile& tile,
                            [[maybe_unused]] int64_t k, [[maybe_unused]] int64_t iteration_bytes) {
#if defined(__x86_64__)
  if (format.dtype == Dtype::kInt8) return kernels::num_prefetch_pieces_int8(format.isa, tile, k, iteration_bytes);
  if (format.isa == Isa::kAvx512Bf16) return kernels::num_prefetch_pieces_avx512bf16(tile, k, iteration_bytes);
  if (format.isa != Isa::kPortable) return kernels::num_prefetch_pieces_avx2(tile, k, iteration_bytes);
#endif
  return 0;
}

void matmul_tile(const void* packed_x, const PackedMatrix& w, const MatmulTile& tile, const float* bias,
                 bool accumulate, float* y, int64_t ldy, PrefetchPieces* pieces) {
  if (w.dtype() == Dtype::kInt8) return kernels::int8_tile(packed_x, w, tile, bias, accumulate, y, ldy, pieces);
  const kernels::TileArgs args{packed_x, w.data(), w.k(), tile, bias, accumulate, y, ldy, pieces};
  switch (w.isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
    case Isa::kAvxVnni:
    case Isa::kAvx512Vnni:
      return kernels::tile_avx2(args);
    case Isa::kAvx512Bf16:
      return kernels::tile_avx512bf16(args);
#endif
    default:
      return kernels::tile_portable(args);
  }
}

}  // namespace blendserve
