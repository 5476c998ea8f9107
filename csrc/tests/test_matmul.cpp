// Matmul against a twin in double precision, and bit for bit against itself under any batching.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "matmul_cases.h"
#include "ops/bf16.h"
#include "ops/matmul.h"
#include "ops/matmul_kernels.h"
#include "ops/matmul_shapes.h"
#include "threads.h"

namespace blendserve {
namespace {

using test::Activations, test::Operands, test::expect_same_bits, test::for_each_format, test::multiply,
    test::multiply_rows_apart, test::name_of, test::random_floats;

void expect_near_twin(const std::vector<float>& actual, const Operands& o) {
  const auto activation = [&](int64_t index) {
    const float value = o.x[static_cast<size_t>(index)];
    return double{o.w.isa() == Isa::kAvx512Bf16 ? float_from_bf16(bf16_from_float(value)) : value};
  };
  for (int64_t row = 0; row < o.c.m; ++row) {
    for (int64_t col = 0; col < o.c.n; ++col) {
      const size_t at = static_cast<size_t>(row * o.c.n + col);
      double sum = o.c.accumulate ? o.y[at] : 0.0;
      double magnitude = std::abs(sum);
      for (int64_t i = 0; i < o.c.k; ++i) {
        const double weight = float_from_bf16(bf16_from_float(o.weights[static_cast<size_t>(col * o.c.k + i)]));
        sum += activation(row * o.c.k + i) * weight;
        magnitude += std::abs(activation(row * o.c.k + i) * weight);
      }
      if (o.c.has_bias) {
        sum += o.bias[static_cast<size_t>(col)];
        magnitude += std::abs(o.bias[static_cast<size_t>(col)]);
      }
      const double bound = matmul_error_bound(o.c.k, magnitude);
      CHECK(std::abs(actual[at] - sum) <= bound, name_of(o.w.format()), ", m ", o.c.m, " n ", o.c.n, " k ", o.c.k,
            " row ", row, " column ", col, ": ", actual[at], " against ", sum, " +- ", bound);
    }
  }
}

template <class F>
void for_each_isa(F&& f) {
  for (const Isa isa : kAllIsas) {
    if (is_supported(isa)) f(isa);
  }
}

void matches_the_twin() {
  for_each_isa([](Isa isa) {
    for (const int64_t n : {1, 16, 31, 33, 70}) {
      for (const int64_t k : {1, 2, 17, 64, 290, 577}) {
        for (const int64_t m : {1, 2, 3, 6, 13, 25}) {
          for (const int flags : {0, 1, 2, 3}) {
            const Operands o(isa, {m, n, k, (flags & 1) != 0, (flags & 2) != 0});
            expect_near_twin(multiply(o, suggest_grid(isa, m, n, k, 2, 512 << 10)), o);
          }
        }
      }
    }
  });
}

void model_shapes_match_the_twin() {
  for_each_isa([](Isa isa) {
    for (const MatmulShape& shape : kSmolLm2Shapes) {
      const int64_t n = std::min<int64_t>(shape.n, 96);
      for (const int64_t m : {1, 30}) {
        const Operands o(isa, {m, n, shape.k, false, true});
        expect_near_twin(multiply(o, suggest_grid(isa, m, n, shape.k, 2, 512 << 10)), o);
      }
    }
  });
}

void any_number_of_rows_gives_the_same_bits() {
  for_each_format([](MatmulFormat format) {
    for (const int64_t k : {1, 7, 64, 301, 600}) {
      for (const int64_t n : {5, 32, 81, 112}) {
        const Operands all(format, {50, n, k, true, k == 64});
        const std::vector<float> expected = multiply_rows_apart(all);
        for (int64_t m = 1; m <= all.c.m; ++m) {
          Operands o = Operands(format, {m, n, k, true, k == 64});
          const std::vector<float> rows(expected.begin(), expected.begin() + m * n);
          expect_same_bits(multiply(o, {m, n, m, n}), rows, o, "row count");
        }
      }
    }
  });
}

void any_tiling_gives_the_same_bits() {
  for_each_format([](MatmulFormat format) {
    for (const int64_t m : {1, 5, 24, 67}) {
      for (const int64_t n : {40, 160, 225}) {
        const Operands o(format, {m, n, 330, true, true});
        const std::vector<float> expected = multiply_rows_apart(o);
        for (const int64_t row_tile : {12, 24, 36, 72}) {
          for (const int64_t col_tile : {32, 64, 96, 256}) {
            expect_same_bits(multiply(o, {m, n, row_tile, col_tile}), expected, o, "tiling");
          }
        }
      }
    }
  });
}

// A row's neighbours and its place among them do not matter, not even if they are not numbers.
void any_place_gives_the_same_bits() {
  for_each_format([](MatmulFormat format) {
    const int64_t n = 49, k = 130;
    for (const int64_t m : {7, 12, 26, 41}) {
      Operands o(format, {m, n, k, false, false});
      const std::vector<float> row = random_floats(k, 9);
      for (int64_t place = 0; place < m; ++place) {
        o.x.assign(o.x.size(), std::bit_cast<float>(0x7fc00000u));
        std::copy(row.begin(), row.end(), o.x.begin() + place * k);
        const std::vector<float> y = multiply(o, {m, n, 24, 32});
        o.x = row;
        o.c.m = 1;
        const std::vector<float> alone = multiply(o, {1, n, 12, 64});
        o.c.m = m;
        o.x.resize(static_cast<size_t>(m * k));
        expect_same_bits({y.begin() + place * n, y.begin() + (place + 1) * n}, {alone.begin(), alone.begin() + n}, o,
                         "place");
      }
    }
  });
}

void any_number_of_threads_gives_the_same_bits() {
  for_each_format([](MatmulFormat format) {
    const Operands o(format, {61, 300, 576, true, true});
    const std::vector<float> expected = multiply_rows_apart(o);
    for (int num_threads = 1; num_threads <= 8; ++num_threads) {
      ThreadTeam team(num_threads);
      const Activations packed(format, o.x, o.c.m, o.c.k);
      const MatmulGrid grid = suggest_grid(format, o.c.m, o.c.n, o.c.k, num_threads, 64 << 10);
      std::vector<float> y = o.y;
      team.run(grid.size(), [&](int64_t tile, int) {
        matmul_tile(packed.data, o.w, grid.tile(tile), o.bias_or_null(), o.c.accumulate, y.data(), o.c.n);
      });
      expect_same_bits(y, expected, o, "threads");
    }
  });
}

// Sums longer than a kernel's block of k are cut there: many rows (cut) against one (whole).
void long_sums_give_the_same_bits() {
  for_each_format([](MatmulFormat format) {
    for (const int64_t k : {767, 768, 769, 1540, 2350}) {
      for (const bool accumulate : {false, true}) {
        for (const int64_t m : {26, 51}) {  // each group of rows expands weights for itself; the first for all
          const Operands o(format, {m, 34, k, true, accumulate});
          expect_same_bits(multiply(o, {m, 34, 60, 64}), multiply_rows_apart(o), o, "long sum");
        }
      }
    }
  });
}

void writes_only_its_tile() {
  for_each_format([](MatmulFormat format) {
    const int64_t m = 40, n = 100, k = 48, ldy = 131;
    const Operands o(format, {m, n, k, true, false});
    const Activations packed(format, o.x, m, k);
    for (const MatmulTile tile : {MatmulTile{12, 17, 32, 64}, {24, 40, 64, 100}, {0, 36, 96, 100}, {36, 37, 32, 96}}) {
      std::vector<float> y(static_cast<size_t>(m * ldy), 77.0f);
      matmul_tile(packed.data, o.w, tile, o.bias.data(), false, y.data(), ldy);
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t col = 0; col < ldy; ++col) {
          const bool is_inside =
              row >= tile.row_begin && row < tile.row_end && col >= tile.col_begin && col < tile.col_end;
          CHECK((y[static_cast<size_t>(row * ldy + col)] != 77.0f) == is_inside, name_of(format), " row ", row,
                " column ", col);
        }
      }
    }
  });
}

void weights_round_to_nearest_even_and_unpack() {
  for_each_isa([](Isa isa) {
    const int64_t n = 37, k = 9;
    std::vector<float> weights = random_floats(n * k, 5);
    weights[0] = std::bit_cast<float>(0x3f808000u);  // halfway, to even below
    weights[1] = std::bit_cast<float>(0x3f818000u);  // halfway, to even above
    const PackedMatrix w(isa, weights, n, k);
    CHECK(w.n() == n && w.k() == k && w.isa() == isa && w.num_bytes() >= 2 * n * k);
    CHECK(reinterpret_cast<uintptr_t>(w.data()) % 64 == 0);
    std::vector<float> row(static_cast<size_t>(k));
    std::vector<uint16_t> rounded;
    for (int64_t i = 0; i < n; ++i) {
      w.unpack_row(i, row.data());
      for (int64_t j = 0; j < k; ++j) {
        rounded.push_back(bf16_from_float(weights[static_cast<size_t>(i * k + j)]));
        CHECK(row[static_cast<size_t>(j)] == float_from_bf16(rounded.back()));
      }
    }
    CHECK(rounded[0] == 0x3f80 && rounded[1] == 0x3f82);
    const PackedMatrix same(isa, std::span<const uint16_t>(rounded), n, k);
    CHECK(std::memcmp(same.data(), w.data(), static_cast<size_t>(w.num_bytes())) == 0);
  });
  CHECK(std::isnan(float_from_bf16(bf16_from_float(std::bit_cast<float>(0x7f800001u)))));
  CHECK(std::isinf(float_from_bf16(bf16_from_float(std::bit_cast<float>(0x7f7fffffu)))));
}

void large_matrices_pack_whole() {
  const int64_t n = 2100, k = 700;  // more than one huge page and a tail
  const std::vector<float> weights = random_floats(n * k, 6);
  const PackedMatrix w(Isa::kPortable, weights, n, k);
  std::vector<float> row(static_cast<size_t>(k));
  for (int64_t i = 0; i < n; i += 97) {
    w.unpack_row(i, row.data());
    for (int64_t j = 0; j < k; ++j) {
      CHECK(row[static_cast<size_t>(j)] == float_from_bf16(bf16_from_float(weights[static_cast<size_t>(i * k + j)])));
    }
  }
}

void grids_cover_every_output_once() {
  for_each_format([](MatmulFormat format) {
    for (const int64_t m : {1, 2, 11, 12, 13, 100, 640, 2048}) {
      for (const int64_t n : {1, 31, 576, 960, 3072}) {
        for (const int64_t k : {3, 576, 8192}) {
          for (const int num_threads : {1, 2, 7}) {
            const MatmulGrid grid = suggest_grid(format, m, n, k, num_threads, 512 << 10);
            CHECK(grid.row_tile % kRowPanel == 0 && grid.col_tile % kColumnPanel == 0);
            std::vector<int> visits(static_cast<size_t>(m * n), 0);
            for (int64_t i = 0; i < grid.size(); ++i) {
              const MatmulTile tile = grid.tile(i);
              CHECK(tile.row_begin < tile.row_end && tile.col_begin < tile.col_end);
              for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
                for (int64_t col = tile.col_begin; col < tile.col_end; ++col)
                  ++visits[static_cast<size_t>(row * n + col)];
              }
            }
            for (const int count : visits) CHECK(count == 1, "m ", m, " n ", n, " k ", k);
          }
        }
      }
    }
  });
}

void names_and_limits() {
  for (const Isa isa : kAllIsas) CHECK(isa_from_name(isa_name(isa)) == isa);
  for (const Dtype dtype : {Dtype::kBf16, Dtype::kInt8}) CHECK(dtype_from_name(dtype_name(dtype)) == dtype);
  CHECK(test::throws<std::invalid_argument>([] { dtype_from_name("int9"); }));
  CHECK(test::throws<std::invalid_argument>([] { isa_from_name("sse9"); }));
  CHECK(is_supported(best_isa()) && is_supported(Isa::kPortable));
  const std::vector<float> weights(10);
  CHECK(test::throws<std::invalid_argument>([&] { PackedMatrix(Isa::kPortable, weights, 3, 4); }));
  CHECK(test::throws<std::invalid_argument>([&] { PackedMatrix(Isa::kPortable, std::vector<float>(), 0, 4); }));
}

// Every thread gets as few columns as whole strips allow, and each tile but a thread's last names the one after it.
void grids_give_threads_equal_shares() {
  for_each_format([](MatmulFormat format) {
    for (const int64_t n : {576, 960, 3072}) {
      for (const int num_threads : {1, 2, 3, 8}) {
        const MatmulGrid grid = suggest_grid(format, 64, n, 576, num_threads, 512 << 10);
        std::vector<int64_t> columns(static_cast<size_t>(num_threads), 0);
        for (int64_t i = 0; i < grid.size(); ++i) {
          const MatmulTile tile = grid.tile(i);
          columns[static_cast<size_t>(i % num_threads)] += tile.col_end - tile.col_begin;
          const bool has_next = i + num_threads < grid.size();
          CHECK(tile.next_col == (has_next ? grid.tile(i + num_threads).col_begin : -1));
        }
        const int64_t share = (n / kColumnPanel + num_threads - 1) / num_threads * kColumnPanel;
        CHECK(*std::max_element(columns.begin(), columns.end()) == share, name_of(format), " n ", n, ", ", num_threads,
              " threads: ", columns[0], " columns instead of ", share);
      }
    }
  });
}

// bf16 panels hold what rounding value by value gives, whatever is left over of four rows and of 32 values.
void packed_rows_are_rounded_one_by_one() {
  if (!is_supported(Isa::kAvx512Bf16)) return;
  for (const int64_t m : {1, 3, 4, 6, 12, 13, 23}) {
    for (const int64_t k : {1, 2, 31, 32, 33, 64, 97}) {
      std::vector<float> x = random_floats(m * k, 7);
      x.front() = std::bit_cast<float>(0x7f800001u);  // a NaN
      x.back() = std::bit_cast<float>(0x3f808000u);   // halfway
      const Activations packed(Isa::kAvx512Bf16, x, m, k);
      const auto* bits = static_cast<const uint16_t*>(packed.data);
      const int64_t num_k = (k + 1) / 2 * 2;
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t i = 0; i < num_k; ++i) {
          const uint16_t expected = i < k ? bf16_from_float(x[static_cast<size_t>(row * k + i)]) : uint16_t{0};
          const int64_t at = row / kRowPanel * kRowPanel * num_k + i / 2 * 2 * kRowPanel + row % kRowPanel * 2 + i % 2;
          CHECK(bits[at] == expected, "m ", m, " k ", k, " row ", row, " value ", i);
        }
      }
    }
  }
}

// A tile takes as many pieces as its kernel says, or all where there are fewer, and computes the same.
void fetching_beside_it_changes_nothing() {
  const std::vector<uint16_t> memory(kPrefetchPieceBytes / sizeof(uint16_t));
  const std::vector<const uint16_t*> list(5000, memory.data());
  for_each_format([&](MatmulFormat format) {
    for (const int64_t m : {2, 12, 25, 27, 64}) {
      const int64_t n = 70, k = 577;
      const Operands o(format, {m, n, k, true, true});
      const Activations packed(format, o.x, m, k);
      MatmulTile tile = {0, m, 0, n};
      const auto run = [&](PrefetchPieces* pieces) {
        std::vector<float> y = o.y;
        matmul_tile(packed.data, o.w, tile, o.bias_or_null(), true, y.data(), n, pieces);
        return y;
      };
      const std::vector<float> alone = run(nullptr);
      tile.next_col = 32;
      expect_same_bits(run(nullptr), alone, o, "beside weights that come next");
      for (const int64_t iteration_bytes : {16, 48, 64, 100, 128}) {
        const int64_t num_taken = num_prefetch_pieces(format, tile, k, iteration_bytes);
        if (m == 2 || format.isa == Isa::kPortable) CHECK(num_taken == 0, name_of(format), " m ", m);
        if (m == 64 && format.isa != Isa::kPortable) CHECK(num_taken > 0, name_of(format), " m ", m);
        PrefetchPieces many = {list.data(), list.data() + list.size(), iteration_bytes};
        expect_same_bits(run(&many), alone, o, "beside many runs");
        CHECK(many.begin - list.data() == num_taken, name_of(format), " m ", m, " takes ", many.begin - list.data(),
              " of ", num_taken);
        PrefetchPieces few = {list.data(), list.data() + num_taken / 2, iteration_bytes};
        expect_same_bits(run(&few), alone, o, "beside few runs");
        CHECK(few.left() == 0, name_of(format), " m ", m, " leaves ", few.left(), " of ", num_taken / 2);
      }
    }
  });
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(names_and_limits);
  RUN(weights_round_to_nearest_even_and_unpack);
  RUN(large_matrices_pack_whole);
  RUN(grids_cover_every_output_once);
  RUN(grids_give_threads_equal_shares);
  RUN(packed_rows_are_rounded_one_by_one);
  RUN(matches_the_twin);
  RUN(model_shapes_match_the_twin);
  RUN(any_number_of_rows_gives_the_same_bits);
  RUN(any_tiling_gives_the_same_bits);
  RUN(any_place_gives_the_same_bits);
  RUN(any_number_of_threads_gives_the_same_bits);
  RUN(writes_only_its_tile);
  RUN(long_sums_give_the_same_bits);
  RUN(fetching_beside_it_changes_nothing);
  return 0;
}
