#include "ops/matmul.h"

#include <sys/mman.h>

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
constexpr int64_t kHugePage = int64_t{2} << 20;

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

Isa best_isa() {
  if (is_supported(Isa::kAvx512Bf16)) return Isa::kAvx512Bf16;
  if (is_supported(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kPortable;
}

// The compiler's run-time checks read CPUID and, through XGETBV, whether the operating system saves the registers.
bool is_supported(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(BLENDSERVE_SIMDE)
    case Isa::kAvx512Bf16:
      return is_supported(Isa::kAvx2);  // emulated
#else
    case Isa::kAvx512Bf16:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bf16");
#endif
#endif
    default:
      return false;
  }
}

Isa isa_from_name(std::string_view name) {
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Bf16}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("unknown instruction set '" + std::string(name) + "'; use portable, avx2 or avx512bf16");
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
  }
  return "unknown";
}

void PackedMatrix::Free::operator()(uint16_t* data) const noexcept { std::free(data); }

PackedMatrix::PackedMatrix(Isa isa, std::span<const float> weights, int64_t n, int64_t k) : isa_(isa), n_(n), k_(k) {
  pack(weights);
}

PackedMatrix::PackedMatrix(Isa isa, std::span<const uint16_t> bf16_weights, int64_t n, int64_t k)
    : isa_(isa), n_(n), k_(k) {
  pack(bf16_weights);
}

template <class T>
void PackedMatrix::pack(std::span<const T> weights) {
  if (n_ < 1 || k_ < 1 || static_cast<int64_t>(weights.size()) != n_ * k_) {
    throw std::invalid_argument(
        "a packed matrix needs n >= 1, k >= 1 and n * k weights; got n = " + std::to_string(n_) +
        ", k = " + std::to_string(k_) + " and " + std::to_string(weights.size()) + " weights");
  }
  const int64_t width = weight_panel(isa_);
  const int64_t panel_size = width * round_up(k_, 2);
  num_bytes_ = ceil_div(n_, width) * panel_size * static_cast<int64_t>(sizeof(uint16_t));
  // Large matrices lie on huge pages: streaming them at one row would otherwise miss the TLB every 4 KiB.
  const int64_t alignment = num_bytes_ >= kHugePage ? kHugePage : kCacheLine;
  void* memory =
      std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(round_up(num_bytes_, alignment)));
  if (memory == nullptr) throw std::bad_alloc();
  data_.reset(static_cast<uint16_t*>(memory));
#if defined(MADV_HUGEPAGE)
  // Only whole huge pages, so that a tail does not take 2 MiB. The advice may be refused: it is speed only.
  const int64_t huge_bytes = num_bytes_ / kHugePage * kHugePage;
  if (huge_bytes > 0) static_cast<void>(madvise(memory, static_cast<size_t>(huge_bytes), MADV_HUGEPAGE));
#endif
  for (int64_t panel = 0; panel * width < n_; ++panel) {
    const int64_t num_columns = std::min(width, n_ - panel * width);
    uint16_t* out = data_.get() + panel * panel_size;
    if (num_columns < width || k_ % 2 != 0) std::memset(out, 0, static_cast<size_t>(panel_size) * sizeof(uint16_t));
    pack_panel(weights.data() + panel * width * k_, num_columns, k_, width, out);
  }
}

void PackedMatrix::unpack_row(int64_t row, float* out) const {
  const int64_t width = weight_panel(isa_);
  const uint16_t* first = data() + row / width * width * round_up(k_, 2) + row % width * 2;
  for (int64_t i = 0; i < k_; ++i) out[i] = float_from_bf16(first[(i & ~int64_t{1}) * width + (i & 1)]);
}

int64_t activation_bytes(Isa isa, int64_t m, int64_t k) {
  if (isa == Isa::kAvx512Bf16) return round_up(m, kRowPanel) * round_up(k, 2) * int64_t{sizeof(uint16_t)};
  return m * kernels::row_stride(k) * int64_t{sizeof(float)};
}

void pack_activations(Isa isa, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, int64_t k,
                      void* packed) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) return kernels::pack_rows_avx512bf16(x, ldx, row_begin, row_end, k, packed);
#endif
  const int64_t stride = kernels::row_stride(k);
  const size_t num_padding = static_cast<size_t>(stride - k);
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* out = static_cast<float*>(packed) + row * stride;
    std::memcpy(out, x + row * ldx, static_cast<size_t>(k) * sizeof(float));
    std::memset(out + k, 0, num_padding * sizeof(float));
  }
}

void matmul_tile(const void* packed_x, const PackedMatrix& w, const MatmulTile& tile, const float* bias,
                 bool accumulate, float* y, int64_t ldy) {
  const kernels::TileArgs args{packed_x, w.data(), w.k(), tile, bias, accumulate, y, ldy};
  switch (w.isa()) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kernels::tile_avx2(args);
    case Isa::kAvx512Bf16:
      return kernels::tile_avx512bf16(args);
#endif
    default:
      return kernels::tile_portable(args);
  }
}

}  // namespace blendserve
