// Pointwise ops against twins in double precision.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "ops/bf16.h"
#include "ops/pointwise.h"

namespace blendserve {
namespace {

constexpr double kUnit = 0x1p-24;  // half a unit in the last place, relative
constexpr int64_t kSizes[] = {1, 3, 8, 31, 64, 65, 576, 1537};

std::vector<float> random_floats(int64_t count, float scale, uint32_t seed) {
  test::Random random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = scale * random.unit();
  return values;
}

template <class F>
void on_each_isa(F&& test) {
  for (const Isa isa : kAllIsas) {
    if (is_supported(isa)) test(isa);
  }
}

void exp_is_within_its_bound() {
  on_each_isa([](Isa isa) {
    std::vector<float> x, y;
    for (double at = -87.3; at < 88.0; at += 0.0007) x.push_back(static_cast<float>(at));
    y.resize(x.size());
    exp_row(isa, x.data(), static_cast<int64_t>(x.size()), y.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = std::exp(static_cast<double>(x[i]));
      CHECK(std::abs(y[i] - expected) <= kExpRelativeError * expected, isa_name(isa), " e^", x[i], " = ", y[i]);
    }
  });
}

void exp_knows_the_special_values() {
  on_each_isa([](Isa isa) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const float x[] = {0.0f, -0.0f, -kInfinity, -88.0f, -1e30f, 1e30f, kInfinity, NAN, -NAN};
    float y[std::size(x)];
    exp_row(isa, x, std::size(x), y);
    CHECK(y[0] == 1.0f && y[1] == 1.0f);
    CHECK(y[2] == 0.0f && y[3] == 0.0f && y[4] == 0.0f);
    CHECK(y[5] > 1e38f && y[5] < kInfinity && y[6] == y[5]);
    CHECK(std::isnan(y[7]) && std::isnan(y[8]));
  });
}

void rms_norm_agrees_with_double_precision() {
  on_each_isa([](Isa isa) {
    for (const int64_t n : kSizes) {
      const auto x = random_floats(n, 3.0f, 1), weight = random_floats(n, 1.0f, 2);
      std::vector<float> y(x.size());
      rms_norm_row(isa, x.data(), weight.data(), 1e-5f, n, y.data());
      double sum = 0.0;
      for (const float value : x) sum += static_cast<double>(value) * value;
      const double scale = 1.0 / std::sqrt(sum / static_cast<double>(n) + static_cast<double>(1e-5f));
      for (size_t i = 0; i < x.size(); ++i) {
        const double expected = x[i] * scale * weight[i];
        // A sum of n squares errs by 2 n units at most, the root halves that; then six more operations.
        const double bound = std::abs(expected) * (static_cast<double>(n) + 6.0) * kUnit;
        CHECK(std::abs(y[i] - expected) <= bound, isa_name(isa), " n ", n, " at ", i);
      }
      std::vector<float> in_place = x;
      rms_norm_row(isa, in_place.data(), weight.data(), 1e-5f, n, in_place.data());
      CHECK(std::memcmp(in_place.data(), y.data(), y.size() * sizeof(float)) == 0);
    }
  });
}

void silu_agrees_with_double_precision() {
  on_each_isa([](Isa isa) {
    for (const int64_t n : kSizes) {
      const auto gate = random_floats(n, 30.0f, 3), up = random_floats(n, 2.0f, 4);
      std::vector<float> y(gate.size());
      silu_mul_row(isa, gate.data(), up.data(), n, y.data());
      for (size_t i = 0; i < y.size(); ++i) {
        const double expected = gate[i] / (1.0 + std::exp(-static_cast<double>(gate[i]))) * up[i];
        const double bound = std::abs(expected) * (kExpRelativeError + 4.0 * kUnit);
        CHECK(std::abs(y[i] - expected) <= bound, isa_name(isa), " silu of ", gate[i], " is ", y[i]);
      }
      std::vector<float> in_place = gate;
      silu_mul_row(isa, in_place.data(), up.data(), n, in_place.data());
      CHECK(std::memcmp(in_place.data(), y.data(), y.size() * sizeof(float)) == 0);
    }
    float extremes[] = {-200.0f, 200.0f, NAN};
    const float ones[] = {1.0f, 1.0f, 1.0f};
    silu_mul_row(isa, extremes, ones, 3, extremes);
    CHECK(std::abs(extremes[0]) < 1e-30f && extremes[1] == 200.0f && std::isnan(extremes[2]));
  });
}

void rotation_agrees_with_double_precision() {
  on_each_isa([](Isa isa) {
    for (const int64_t half : {1, 8, 13, 32, 40, 64}) {
      const auto x = random_floats(2 * half, 2.0f, 5);
      std::vector<float> cosine, sine, y = x;
      for (int64_t i = 0; i < half; ++i) {
        cosine.push_back(std::cos(static_cast<float>(i) * 0.7f));
        sine.push_back(std::sin(static_cast<float>(i) * 0.7f));
      }
      rotate_row(isa, y.data(), cosine.data(), sine.data(), half, 0.125f);
      for (int64_t i = 0; i < half; ++i) {
        const auto a = static_cast<size_t>(i), b = static_cast<size_t>(i + half);
        const double c = cosine[a], s = sine[a];
        const double bound = (std::abs(x[a]) + std::abs(x[b])) * 0.125 * 3.0 * kUnit;
        CHECK(std::abs(y[a] - (x[a] * c - x[b] * s) * 0.125) <= bound);
        CHECK(std::abs(y[b] - (x[b] * c + x[a] * s) * 0.125) <= bound);
      }
    }
  });
}

// Random bits hold numbers of every size, infinities and NaNs.
void rounding_to_bf16_gives_the_same_bits_everywhere() {
  on_each_isa([](Isa isa) {
    test::Random random(6);
    for (const int64_t n : kSizes) {
      std::vector<float> x(static_cast<size_t>(n));
      for (float& value : x) value = std::bit_cast<float>(random.bits());
      x[0] = std::bit_cast<float>(0x7f800001u);  // a NaN whose upper half is an infinity's
      x[x.size() / 2] = std::bit_cast<float>((random.bits() & 0xffff0000u) | 0x8000u);  // a tie
      std::vector<uint16_t> y(x.size() + 1, 0xabcd);
      round_row(isa, x.data(), n, y.data());
      for (size_t i = 0; i < x.size(); ++i) {
        CHECK(y[i] == bf16_from_float(x[i]), isa_name(isa), " n ", n, ": ", x[i], " at ", i);
      }
      CHECK(y.back() == 0xabcd, isa_name(isa), " n ", n);
    }
  });
}

void embedding_is_exact() {
  const float values[] = {1.0f, -2.5f, 0.0f, 3.140625f};
  uint16_t row[4];
  std::transform(std::begin(values), std::end(values), row, bf16_from_float);
  float y[4];
  embed_row(row, 4, y);
  CHECK(std::memcmp(values, y, sizeof(y)) == 0);
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(exp_is_within_its_bound);
  RUN(exp_knows_the_special_values);
  RUN(rms_norm_agrees_with_double_precision);
  RUN(silu_agrees_with_double_precision);
  RUN(rotation_agrees_with_double_precision);
  RUN(rounding_to_bf16_gives_the_same_bits_everywhere);
  RUN(embedding_is_exact);
}
