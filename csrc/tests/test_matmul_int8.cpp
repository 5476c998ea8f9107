// int8 products: the same bits from every kernel, those of a twin that adds up in 64 bits.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "matmul_cases.h"
#include "ops/matmul_kernels.h"
#include "ops/matmul_shapes.h"

namespace blendserve {
namespace {

using test::Operands, test::expect_same_bits, test::multiply, test::random_floats;

// Written apart from the kernels' code: integers in 64 bits, then the same few float operations, hence the same bits.
struct Int8Twin {
  explicit Int8Twin(int64_t k) {
    const int64_t num_groups = (k + kernels::kMaxInt8Group - 1) / kernels::kMaxInt8Group;
    group = ((k + num_groups - 1) / num_groups + 15) / 16 * 16;
  }

  struct Row {
    std::vector<int64_t> values;
    std::vector<float> scales;
  };
  Row activations(const float* x, int64_t k) const {
    Row row;
    for (int64_t begin = 0; begin < k; begin += group) {
      const int64_t end = std::min(begin + group, k);
      float max = 0;
      for (int64_t i = begin; i < end; ++i) max = std::max(max, std::abs(x[i]));
      for (int64_t i = begin; i < end; ++i) {
        row.values.push_back(static_cast<int64_t>(std::nearbyint(x[i] * (127 / max))));
      }
      row.scales.push_back(max / 127);
    }
    return row;
  }
  static Row weights(const float* w, int64_t k) {
    float max = 0;
    for (int64_t i = 0; i < k; ++i) {
      max = std::max(max, std::abs(w[i]));
      if (i % 2 == 1) max = std::max(max, std::abs(w[i - 1] + w[i]));
    }
    Row row{{}, {max / 127}};
    for (int64_t i = 0; i < k; ++i) row.values.push_back(static_cast<int64_t>(std::nearbyint(w[i] * (127 / max))));
    return row;
  }
  float product(const Row& x, const Row& w, const Operands& o, size_t at, size_t col) const {
    float total = 0.0f;
    for (size_t g = 0; g < x.scales.size(); ++g) {
      int64_t sum = 0;
      const size_t begin = g * static_cast<size_t>(group);
      for (size_t i = begin; i < std::min(begin + static_cast<size_t>(group), x.values.size()); ++i) {
        sum += x.values[i] * w.values[i];
      }
      total = total + static_cast<float>(sum) * x.scales[g];
    }
    const float y = o.c.accumulate ? o.y[at] + total * w.scales[0] : total * w.scales[0];
    return o.c.has_bias ? y + o.bias[col] : y;
  }

  int64_t group;
};

void expect_int8_twin(const std::vector<float>& actual, const Operands& o) {
  const Int8Twin twin(o.c.k);
  std::vector<Int8Twin::Row> columns;
  for (int64_t col = 0; col < o.c.n; ++col)
    columns.push_back(Int8Twin::weights(&o.weights[static_cast<size_t>(col * o.c.k)], o.c.k));
  std::vector<float> expected;
  for (int64_t row = 0; row < o.c.m; ++row) {
    const Int8Twin::Row x = twin.activations(&o.x[static_cast<size_t>(row * o.c.k)], o.c.k);
    for (size_t col = 0; col < columns.size(); ++col) {
      expected.push_back(twin.product(x, columns[col], o, expected.size(), col));
    }
  }
  expect_same_bits(actual, expected, o, "int8 twin");
}

template <class F>
void for_each_kernel(F&& f) {
  test::for_each_format([&](MatmulFormat format) {
    if (format.dtype == Dtype::kInt8) f(format);
  });
}

void matches_the_twin() {
  for_each_kernel([](MatmulFormat format) {
    for (const int64_t n : {1, 16, 31, 33, 70}) {
      for (const int64_t k : {1, 2, 17, 64, 290, 577}) {
        for (const int64_t m : {1, 2, 3, 6, 13, 25}) {
          for (const int flags : {0, 1, 2, 3}) {
            const Operands o(format, {m, n, k, (flags & 1) != 0, (flags & 2) != 0});
            expect_int8_twin(multiply(o, suggest_grid(format, m, n, k, 2, 512 << 10)), o);
          }
        }
      }
    }
  });
}

void model_shapes_match_the_twin() {
  for_each_kernel([](MatmulFormat format) {
    for (const MatmulShape& shape : kSmolLm2Shapes) {
      const int64_t n = std::min<int64_t>(shape.n, 96);
      for (const int64_t m : {1, 30}) {
        const Operands o(format, {m, n, shape.k, false, true});
        expect_int8_twin(multiply(o, suggest_grid(format, m, n, shape.k, 2, 512 << 10)), o);
      }
    }
  });
}

// Lengths that leave a tail, values from tiny to infinite.
void activations_become_the_same_bytes_everywhere() {
  for_each_kernel([](MatmulFormat format) {
    for (const int64_t k : {1, 15, 16, 17, 64, 290, 577}) {
      const auto bytes = static_cast<size_t>(activation_bytes(format, 6, k));
      std::vector<float> x = random_floats(6 * k, 11);
      for (int64_t i = 0; i < k; ++i) x[static_cast<size_t>(k + i)] = 0.0f;
      for (int64_t i = 0; i < k; ++i) x[static_cast<size_t>(2 * k + i)] *= 0x1p-101f;
      x[static_cast<size_t>(4 * k - 1)] = std::numeric_limits<float>::infinity();
      x[static_cast<size_t>(4 * k)] = NAN;
      std::vector<uint8_t> expected(bytes), actual(bytes);
      pack_activations({Isa::kPortable, Dtype::kInt8}, x.data(), k, 0, 6, k, expected.data());
      pack_activations(format, x.data(), k, 0, 6, k, actual.data());
      CHECK(actual == expected, isa_name(format.isa), " k ", k);
    }
  });
}

// The largest integers of one sign next to each other: what would saturate in 16 bits if scales allowed it.
void sums_of_extremes_are_exact() {
  for_each_kernel([](MatmulFormat format) {
    const int64_t k = 64;
    Operands o(format, {9, 48, k, false, false});
    for (const float x : {1.0f, -1.0f}) {
      std::fill(o.x.begin(), o.x.end(), x);
      for (int64_t col = 0; col < o.c.n; ++col) {
        for (int64_t i = 0; i < k; ++i) {
          const bool is_paired = col % 3 == 0 || i % 2 == col % 3 - 1;  // both of a pair, or one and nearly nothing
          o.weights[static_cast<size_t>(col * k + i)] = (col % 2 == 0 ? 1.0f : -1.0f) * (is_paired ? 1.0f : 0.003f);
        }
      }
      o.w = PackedMatrix(format, o.weights, o.c.n, k);
      expect_int8_twin(multiply(o, {9, 48, 12, 64}), o);
    }
  });
}

void weights_round_to_half_a_step_and_unpack() {
  for_each_kernel([](MatmulFormat format) {
    const int64_t n = 19, k = 21;
    const std::vector<float> weights = random_floats(n * k, 5);
    const PackedMatrix w(format, weights, n, k);
    CHECK(w.num_bytes() >= n * k && w.num_bytes() < 2 * 32 * 24);
    std::vector<float> row(static_cast<size_t>(k));
    for (int64_t i = 0; i < n; ++i) {
      w.unpack_row(i, row.data());
      const float step = Int8Twin::weights(&weights[static_cast<size_t>(i * k)], k).scales[0];
      CHECK(step <= 2.0f / 127);
      for (int64_t j = 0; j < k; ++j) {
        CHECK(std::abs(row[static_cast<size_t>(j)] - weights[static_cast<size_t>(i * k + j)]) <= 0.5001f * step);
      }
    }
    std::vector<float> bad = weights;
    bad[7] = std::bit_cast<float>(0x7fc00000u);
    CHECK(test::throws<std::invalid_argument>([&] { PackedMatrix(format, bad, n, k); }));
    bad[7] = std::bit_cast<float>(0x7f800000u);
    CHECK(test::throws<std::invalid_argument>([&] { PackedMatrix(format, bad, n, k); }));
  });
}

// A row of zeros gives zeros, one that is not finite gives NaNs; the rows beside it are as they would be.
void rows_stand_alone() {
  for_each_kernel([](MatmulFormat format) {
    const int64_t n = 33, k = 70;
    for (const uint32_t bits : {0x00000000u, 0x00000001u, 0x7fc00000u, 0xff800000u}) {
      Operands o(format, {5, n, k, false, false});
      const std::vector<float> before = multiply(o, {5, n, 12, 64});
      const bool is_finite = (bits & 0x7fffffffu) < 0x7f800000u;
      std::fill_n(o.x.begin() + 2 * k, is_finite ? k : 1, std::bit_cast<float>(bits));
      const std::vector<float> after = multiply(o, {5, n, 12, 64});
      for (size_t i = 0; i < after.size(); ++i) {
        if (static_cast<int64_t>(i) / n != 2) {
          CHECK(after[i] == before[i]);
        } else {
          CHECK(is_finite ? after[i] == 0.0f : std::isnan(after[i]));
        }
      }
    }
  });
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(activations_become_the_same_bytes_everywhere);
  RUN(matches_the_twin);
  RUN(model_shapes_match_the_twin);
  RUN(sums_of_extremes_are_exact);
  RUN(weights_round_to_half_a_step_and_unpack);
  RUN(rows_stand_alone);
  return 0;
}
