// Attention against a twin in double precision, and bit for bit against itself under any chunking.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "check.h"
#include "kv_cache.h"
#include "ops/attention.h"
#include "ops/bf16.h"
#include "ops/pointwise.h"

namespace blendserve {
namespace {

constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Bf16};

struct Shape {
  int64_t group, head_dim;
};
constexpr Shape kShapes[] = {{1, 64}, {2, 80},  {3, 64},  {4, 128}, {5, 96},  {6, 16},
                             {8, 64}, {7, 128}, {8, 128}, {9, 112}, {11, 48}, {50, 32}};

// What the kernels of an instruction set round besides float32 arithmetic.
struct Rounding {
  bool is_query_bf16;  // queries times log2(e) are rounded to bf16
  double weight;       // relative error of a weight, the same in the sum of weights and in that of values
};
Rounding rounding_of(Isa isa) {
  constexpr double kHalfUlpBf16 = 0x1p-9, kExp2Error = 7.5e-5;
  return isa == Isa::kAvx512Bf16 ? Rounding{true, kHalfUlpBf16 + kExp2Error} : Rounding{false, 0.0};
}

// One sequence of one KV head: queries, keys and values of every position, and a cache in scattered blocks that holds
// NaNs where nothing was written.
class Sequence {
 public:
  Sequence(Shape shape, int64_t length, uint32_t seed)
      : shape_(shape), length_(length), cache_(2, 2 * num_blocks() + 1, 2, shape.head_dim) {
    test::Random random(seed);
    for (auto* values : {&q_, &k_, &v_}) {
      values->resize(static_cast<size_t>(length * shape.head_dim * (values == &q_ ? shape.group : 1)));
      for (float& value : *values) value = 2.0f * random.unit();
    }
    for (int64_t b = 0; b < num_blocks(); ++b)
      table_.push_back(static_cast<int32_t>((b * 7 + seed) % num_blocks() * 2 + 1));
    std::vector<int32_t> sorted = table_;
    std::sort(sorted.begin(), sorted.end());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    if (sorted.size() < table_.size()) {  // 7 divides the number of blocks
      for (int64_t b = 0; b < num_blocks(); ++b) table_[static_cast<size_t>(b)] = static_cast<int32_t>(2 * b);
    }
    forget();
  }

  void forget() {
    std::fill_n(cache_.head(0, 0), cache_.num_bytes() / 2, bf16_from_float(NAN));
    num_written_ = 0;
  }

  // Outputs of tokens [begin, end), as [token][group][head_dim], in tiles of `step`.
  void attend(Isa isa, int64_t begin, int64_t end, int64_t step, float* out) {
    write(end);
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    for (int64_t token = begin; token < end; token += step) {
      attention_tile(isa, tile(token, std::min(step, end - token), out + (token - begin) * row()), scratch.data());
    }
  }

  void attend_split(Isa isa, int64_t position, float* out) {
    write(position + 1);
    const int64_t num_segments = num_attention_segments(position + 1);
    const int64_t partial_floats = attention_partial_floats(shape_.group, shape_.head_dim);
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    Buffer<float> partials(num_segments * partial_floats);
    for (int64_t s = num_segments; s-- > 0;) {
      attention_segment(isa, tile(position, 1, out), s, partials.data() + s * partial_floats, scratch.data());
    }
    merge_attention_segments(isa, tile(position, 1, out), num_segments, partials.data());
  }

  int64_t row() const { return shape_.group * shape_.head_dim; }

  // Largest error of `out` over the bound of its element, for the query at `position`.
  double worst_error(Isa isa, int64_t position, const float* out) const {
    constexpr double kUnit = 0x1p-24;
    const Rounding rounding = rounding_of(isa);
    const int64_t d = shape_.head_dim, n = position + 1;
    double worst = 0.0;
    for (int64_t g = 0; g < shape_.group; ++g) {
      const float* q = &q_[static_cast<size_t>(position * row() + g * d)];
      std::vector<double> weights;
      double score_error = 0.0, largest = -INFINITY;
      for (int64_t t = 0; t < n; ++t) {
        double score = 0.0, magnitude = 0.0;
        for (int64_t i = 0; i < d; ++i) {
          const double product = as_read(q[i], rounding) * rounded(k_, t * d + i);
          score += product;
          magnitude += std::abs(product);
        }
        weights.push_back(score);
        largest = std::max(largest, score);
        score_error = std::max(score_error, magnitude * static_cast<double>(2 * d) * kUnit);
      }
      double total = 0.0;
      for (double& weight : weights) total += weight = std::exp(weight - largest);
      // Relative error of a weight: of its score and of the score it is compared with, of exp, and of the scalings by
      // every chunk and segment after it. Of a sum of n of them: n roundings more.
      const double chunks = static_cast<double>(n / kChunkTokens + 2);
      const double relative =
          rounding.weight + 2.0 * score_error + (chunks + 1.0) * (2.0 * kExpRelativeError + 2.0 * kUnit);
      const double sum = 2.0 * static_cast<double>(n) * kUnit;
      for (int64_t i = 0; i < d; ++i) {
        double expected = 0.0, magnitude = 0.0;
        for (int64_t t = 0; t < n; ++t) {
          const double product = weights[static_cast<size_t>(t)] / total * rounded(v_, t * d + i);
          expected += product;
          magnitude += std::abs(product);
        }
        const double bound = magnitude * 2.0 * (relative + sum) + 1e-30;
        const double error = std::abs(static_cast<double>(out[g * d + i]) - expected);
        if (!(error <= worst * bound)) worst = error / bound;
      }
    }
    return worst;
  }

 private:
  int64_t num_blocks() const { return div_up(length_, kBlockSize); }
  static double rounded(const std::vector<float>& values, int64_t i) {
    return float_from_bf16(bf16_from_float(values[static_cast<size_t>(i)]));
  }

  static double as_read(float q, Rounding rounding) {
    constexpr float kLog2E = 1.44269504f;
    if (!rounding.is_query_bf16) return static_cast<double>(q);
    return float_from_bf16(bf16_from_float(q * kLog2E)) * std::log(2.0);
  }

  void write(int64_t end) {
    for (; num_written_ < end; ++num_written_) {
      const auto at = static_cast<size_t>(num_written_ * shape_.head_dim);
      cache_.write(best_isa(), 1, 1, table_[static_cast<size_t>(num_written_ / kBlockSize)], num_written_ % kBlockSize,
                   &k_[at], &v_[at]);
    }
  }

  AttentionTile tile(int64_t first, int64_t count, float* out) const {
    return {&q_[static_cast<size_t>(first * row())],
            out,
            row(),
            count,
            first,
            shape_.group,
            shape_.head_dim,
            cache_.head(1, 1),
            cache_.block_stride(),
            table_.data()};
  }

  Shape shape_;
  int64_t length_;
  int64_t num_written_ = 0;
  std::vector<float> q_, k_, v_;
  KvCache cache_;
  std::vector<int32_t> table_;
};

// Decodes of sequences with common first blocks, each at its own number of positions past them; what was never written
// is NaN.
class Family {
 public:
  Family(Shape shape, int64_t num_shared, std::span<const int64_t> past)
      : shape_(shape), num_shared_(num_shared), past_(past), cache_(1, num_blocks(), 1, shape.head_dim) {
    std::fill_n(cache_.head(0, 0), cache_.num_bytes() / 2, bf16_from_float(NAN));
    test::Random random(17);
    std::vector<float> key(static_cast<size_t>(shape.head_dim)), value(key.size());
    int32_t next_block = static_cast<int32_t>(num_blocks());
    std::vector<int32_t> shared;
    for (size_t m = 0; m < past.size(); ++m) {
      std::vector<int32_t>& table = tables_.emplace_back(shared);
      for (int64_t position = m == 0 ? 0 : num_shared; position <= num_shared + past[m]; ++position) {
        if (position % kBlockSize == 0) table.push_back(--next_block);
        for (auto* values : {&key, &value})
          for (float& x : *values) x = 2.0f * random.unit();
        cache_.write(best_isa(), 0, 0, table.back(), position % kBlockSize, key.data(), value.data());
      }
      if (m == 0) shared.assign(table.begin(), table.begin() + num_shared / kBlockSize);
    }
    q_.resize(size());
    for (float& x : q_) x = 2.0f * random.unit();
  }

  size_t size() const { return past_.size() * static_cast<size_t>(row()); }

  void attend_apart(Isa isa, float* out) const {
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    for (size_t m = 0; m < past_.size(); ++m) attention_tile(isa, tile(m, out), scratch.data());
  }

  void attend_grouped(Isa isa, float* out) const {
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    std::vector<AttentionTile> tiles;
    for (size_t m = 0; m < past_.size(); ++m) tiles.push_back(tile(m, out));
    attention_group(isa, tiles, num_shared_, scratch.data());
  }

 private:
  int64_t row() const { return shape_.group * shape_.head_dim; }
  int64_t num_blocks() const {
    int64_t count = num_shared_ / kBlockSize;
    for (const int64_t past : past_) count += div_up(past + 1, kBlockSize);
    return count;
  }
  AttentionTile tile(size_t m, float* out) const {
    const auto at = static_cast<int64_t>(m) * row();
    return {q_.data() + at,         out + at,         row(),           1,
            num_shared_ + past_[m], shape_.group,     shape_.head_dim, cache_.head(0, 0),
            cache_.block_stride(),  tables_[m].data()};
  }

  Shape shape_;
  int64_t num_shared_;
  std::span<const int64_t> past_;
  KvCache cache_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<float> q_;
};

void agrees_with_double_precision() {
  for (const Isa isa : kIsas) {
    if (!is_supported(isa)) continue;
    for (const Shape shape : kShapes) {
      Sequence sequence(shape, 201, 3);
      std::vector<float> out(static_cast<size_t>(201 * sequence.row()));
      sequence.attend(isa, 0, 201, attention_tile_tokens(shape.group), out.data());
      for (const int64_t position : {0, 1, 14, 15, 16, 17, 62, 63, 64, 100, 127, 200}) {
        const double error = sequence.worst_error(isa, position, &out[static_cast<size_t>(position * sequence.row())]);
        CHECK(error <= 1.0, isa_name(isa), " group ", shape.group, " head ", shape.head_dim, " position ", position,
              ": ", error, " bounds");
      }
    }
  }
}

void long_context_agrees_with_double_precision() {
  for (const Isa isa : kIsas) {
    if (!is_supported(isa)) continue;
    Sequence sequence({3, 64}, 2000, 5);
    std::vector<float> out(static_cast<size_t>(sequence.row()));
    for (const int64_t position : {510, 511, 512, 1023, 1024, 1998, 1999}) {
      sequence.attend(isa, position, position + 1, 1, out.data());
      const double error = sequence.worst_error(isa, position, out.data());
      CHECK(error <= 1.0, isa_name(isa), " position ", position, ": ", error, " bounds");
    }
  }
}

// Token by token as in decode, in one prefill, in uneven chunks and tiles: the same bits.
void does_not_depend_on_chunking() {
  for (const Isa isa : kIsas) {
    if (!is_supported(isa)) continue;
    for (const Shape shape : kShapes) {
      const int64_t length = shape.group == 3 ? 1100 : 150;  // past two segments once
      Sequence sequence(shape, length, 11);
      const auto size = static_cast<size_t>(length * sequence.row());
      std::vector<float> decoded(size), chunked(size);
      for (int64_t t = 0; t < length; ++t)
        sequence.attend(isa, t, t + 1, 1, &decoded[static_cast<size_t>(t * sequence.row())]);
      for (const int64_t chunk : {length, int64_t{37}, int64_t{64}}) {
        sequence.forget();
        const int64_t step = std::min(attention_tile_tokens(shape.group), chunk == 64 ? int64_t{5} : length);
        for (int64_t begin = 0; begin < length; begin += chunk) {
          sequence.attend(isa, begin, std::min(length, begin + chunk), step,
                          &chunked[static_cast<size_t>(begin * sequence.row())]);
        }
        CHECK(std::memcmp(decoded.data(), chunked.data(), size * sizeof(float)) == 0, isa_name(isa), " group ",
              shape.group, " head ", shape.head_dim, " chunk ", chunk);
      }
    }
  }
}

void does_not_depend_on_splitting() {
  for (const Isa isa : kIsas) {
    if (!is_supported(isa)) continue;
    for (const Shape shape : {Shape{1, 128}, Shape{3, 64}, Shape{8, 96}}) {
      Sequence sequence(shape, 1700, 13);
      std::vector<float> whole(static_cast<size_t>(sequence.row())), split(whole.size());
      for (const int64_t position : {100, 512, 513, 1535, 1699}) {
        sequence.attend(isa, position, position + 1, 1, whole.data());
        sequence.attend_split(isa, position, split.data());
        CHECK(std::memcmp(whole.data(), split.data(), whole.size() * sizeof(float)) == 0, isa_name(isa), " group ",
              shape.group, " position ", position);
      }
    }
  }
}

// Sequences that begin alike, their decodes in one group or each by itself: the same bits wherever the prefix ends
// within its segment and however far each of them is past it.
void does_not_depend_on_grouping() {
  constexpr Shape kGroupShapes[] = {{1, 64}, {3, 64}, {4, 128}, {7, 16}};
  constexpr int64_t kPastPrefix[] = {0, 1, 63, 64, 517, 300, 1040};
  for (const Isa isa : kIsas) {
    if (!is_supported(isa)) continue;
    for (const Shape shape : kGroupShapes) {
      for (const int64_t num_shared : {64, 448, 512, 1024, 1088}) {
        Family family(shape, num_shared, kPastPrefix);
        std::vector<float> apart(family.size()), grouped(family.size());
        family.attend_apart(isa, apart.data());
        family.attend_grouped(isa, grouped.data());
        CHECK(std::memcmp(apart.data(), grouped.data(), family.size() * sizeof(float)) == 0, isa_name(isa), " group ",
              shape.group, " head ", shape.head_dim, " shared ", num_shared);
      }
    }
  }
}

void cache_rounds_to_bf16_and_keeps_its_layout() {
  KvCache cache(2, 3, 2, 16);
  std::vector<float> key(16), value(16);
  for (int i = 0; i < 16; ++i) {
    key[static_cast<size_t>(i)] = 1.0f + static_cast<float>(i) / 3.0f;
    value[static_cast<size_t>(i)] = -key[static_cast<size_t>(i)];
  }
  cache.write(best_isa(), 1, 1, 2, 5, key.data(), value.data());
  const uint16_t* keys = cache.head(1, 1) + 2 * cache.block_stride();
  const uint16_t* values = keys + kBlockSize * 16;
  for (int64_t i = 0; i < 16; ++i) {
    CHECK(keys[i / 2 * 32 + 5 * 2 + i % 2] == bf16_from_float(key[static_cast<size_t>(i)]));
    CHECK(values[5 / 2 * 32 + 2 * i + 1] == bf16_from_float(value[static_cast<size_t>(i)]));
  }
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(cache_rounds_to_bf16_and_keeps_its_layout);
  RUN(agrees_with_double_precision);
  RUN(long_context_agrees_with_double_precision);
  RUN(does_not_depend_on_chunking);
  RUN(does_not_depend_on_splitting);
  RUN(does_not_depend_on_grouping);
}
