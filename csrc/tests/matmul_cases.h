// Operands of a product, in every format, for the tests of matmul.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "ops/matmul.h"

namespace blendserve::test {

// Every kernel: bf16 runs on AVX2's where there is VNNI.
inline const MatmulFormat kFormats[] = {{Isa::kPortable},
                                        {Isa::kAvx2},
                                        {Isa::kAvx512Bf16},
                                        {Isa::kPortable, Dtype::kInt8},
                                        {Isa::kAvx2, Dtype::kInt8},
                                        {Isa::kAvxVnni, Dtype::kInt8},
                                        {Isa::kAvx512Vnni, Dtype::kInt8}};

inline std::string name_of(MatmulFormat format) {
  return std::string(dtype_name(format.dtype)) + " on " + std::string(isa_name(format.isa));
}

inline std::vector<float> random_floats(int64_t count, uint32_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = random.unit();
  return values;
}

// Memory as kernels want it: aligned, exactly as large as asked for (so that AddressSanitizer sees the end).
struct Activations {
  Activations(MatmulFormat format, const std::vector<float>& x, int64_t m, int64_t k)
      : bytes(static_cast<size_t>(activation_bytes(format, m, k))), data(::operator new(bytes, std::align_val_t{64})) {
    std::memset(data, 0xff, bytes);  // NaNs wherever a kernel reads what nobody packed
    for (int64_t row = 0; row < m; row += kRowPanel) {
      pack_activations(format, x.data(), k, row, std::min(row + kRowPanel, m), k, data);
    }
  }
  ~Activations() { ::operator delete(data, std::align_val_t{64}); }
  Activations(const Activations&) = delete;
  Activations& operator=(const Activations&) = delete;

  size_t bytes;
  void* data;
};

struct Case {
  int64_t m, n, k;
  bool has_bias, accumulate;
};

struct Operands {
  Operands(MatmulFormat format, const Case& c)
      : c(c),
        x(random_floats(c.m * c.k, 1)),
        weights(random_floats(c.n * c.k, 2)),
        bias(random_floats(c.n, 3)),
        y(random_floats(c.m * c.n, 4)),
        w(format, weights, c.n, c.k) {}
  const float* bias_or_null() const { return c.has_bias ? bias.data() : nullptr; }

  Case c;
  std::vector<float> x, weights, bias, y;
  PackedMatrix w;
};

// All m rows under one grid.
inline std::vector<float> multiply(const Operands& o, const MatmulGrid& grid) {
  const Activations packed(o.w.format(), o.x, o.c.m, o.c.k);
  std::vector<float> y = o.y;
  for (int64_t i = 0; i < grid.size(); ++i) {
    matmul_tile(packed.data, o.w, grid.tile(i), o.bias_or_null(), o.c.accumulate, y.data(), o.c.n);
  }
  return y;
}

// Row by row, each alone in its matmul.
inline std::vector<float> multiply_rows_apart(const Operands& o) {
  std::vector<float> y = o.y;
  for (int64_t row = 0; row < o.c.m; ++row) {
    const std::vector<float> x(o.x.begin() + row * o.c.k, o.x.begin() + (row + 1) * o.c.k);
    const Activations packed(o.w.format(), x, 1, o.c.k);
    matmul_tile(packed.data, o.w, {0, 1, 0, o.c.n}, o.bias_or_null(), o.c.accumulate, y.data() + row * o.c.n, o.c.n);
  }
  return y;
}

inline void expect_same_bits(const std::vector<float>& actual, const std::vector<float>& expected, const Operands& o,
                             const char* what) {
  for (size_t i = 0; i < actual.size(); ++i) {
    CHECK(std::bit_cast<uint32_t>(actual[i]) == std::bit_cast<uint32_t>(expected[i]), what, " of ",
          name_of(o.w.format()), ", m ", o.c.m, " n ", o.c.n, " k ", o.c.k, " row ", static_cast<int64_t>(i) / o.c.n,
          " column ", static_cast<int64_t>(i) % o.c.n, ": ", actual[i], " against ", expected[i]);
  }
}

template <class F>
void for_each_format(F&& f) {
  for (const MatmulFormat format : kFormats) {
    if (is_supported(format.isa)) f(format);
  }
}

}  // namespace blendserve::test
