// What attention is tested with: one sequence over any kind of cache, and its twin in double precision.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <ostream>
#include <span>
#include <vector>

#include "check.h"
#include "kv_cache.h"
#include "ops/attention.h"
#include "ops/bf16.h"
#include "ops/pointwise.h"
#include "ops/rotation.h"

namespace blendserve {
namespace {

// One kernel: an instruction set over one kind of cache.
struct Path {
  Isa isa;
  KvDtype dtype;
};
std::vector<Path> paths() {
  std::vector<Path> result;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAvx512Bf16}) {
    if (!is_supported(isa)) continue;
    for (const KvDtype dtype : {KvDtype::kBf16, KvDtype::kInt8}) result.push_back({isa, dtype});
  }
  return result;
}
std::ostream& operator<<(std::ostream& out, Path path) {
  return out << isa_name(path.isa) << (path.dtype == KvDtype::kInt8 ? " int8" : " bf16");
}

struct Shape {
  int64_t group, head_dim;
};
constexpr Shape kShapes[] = {{1, 64}, {2, 80},  {3, 64},  {4, 128}, {5, 96},  {6, 16},
                             {8, 64}, {7, 128}, {8, 128}, {9, 112}, {11, 48}, {50, 32}};

// What the kernels of an instruction set round besides float32 arithmetic.
struct Rounding {
  bool is_query_bf16 = false;  // queries times log2(e) are rounded to bf16
  double weight = 0.0;         // relative error of a weight, the same in the sum of weights and in that of values
  double query_step = 0.0;     // of elements of a query, over its largest one
  double weight_step = 0.0;    // of weights times scales of values, over the largest one of any token before
};
Rounding rounding_of(Path path) {
  constexpr double kUnitBf16 = 0x1p-8, kExp2Error = 7.5e-5;
  if (path.isa == Isa::kAvx512Bf16 && path.dtype == KvDtype::kBf16)
    return {.is_query_bf16 = true, .weight = kUnitBf16 + kExp2Error};
  const bool is_vnni = path.isa == Isa::kAvx512Vnni || path.isa == Isa::kAvx512Bf16;
  if (path.dtype == KvDtype::kInt8 && is_vnni) return {.query_step = 1.0 / 32512.0, .weight_step = 0x1.01p-16};
  return {};
}

// Keys and values as attention reads them; int8 keeps them rotated.
struct Token {
  std::vector<double> key, value;
  double value_scale = 1.0;
};
bool is_smaller(double a, double b) { return std::abs(a) < std::abs(b); }
Token stored_token(const uint16_t* block, KvDtype dtype, int64_t head_dim, int64_t offset) {
  Token token;
  const uint16_t* values = block + kBlockSize * head_dim;
  const auto* bytes = reinterpret_cast<const uint8_t*>(block);
  const auto* value_bytes = reinterpret_cast<const int8_t*>(values) - kBlockSize * head_dim;
  for (int64_t i = 0; i < head_dim; ++i) {
    if (dtype == KvDtype::kBf16) {
      token.key.push_back(float_from_bf16(block[i / 2 * 32 + offset * 2 + i % 2]));
      token.value.push_back(float_from_bf16(values[offset / 2 * 2 * head_dim + 2 * i + offset % 2]));
    } else {
      const double scale = float_from_bf16(values[offset]), log = float_from_bf16(values[kBlockSize + offset]);
      token.key.push_back(scale * (bytes[i / 4 * 64 + offset * 4 + i % 4] - 128));
      token.value_scale = std::exp2(log);
      token.value.push_back(token.value_scale * value_bytes[offset / 4 * 4 * head_dim + 4 * i + offset % 4]);
    }
  }
  return token;
}

// x times a Hadamard matrix, the plain way: element j of row i is -1 to the number of bits that i and j share.
std::vector<double> rotated(const std::vector<double>& x) {
  const auto size = static_cast<size_t>(rotation_size(static_cast<int64_t>(x.size())));
  std::vector<double> result(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    for (size_t j = 0; j < size; ++j) {
      result[i] += (std::popcount(i % size & j) % 2 == 0 ? 1.0 : -1.0) * x[i / size * size + j];
    }
  }
  return result;
}
std::vector<double> times(std::vector<double> x, double factor) {
  for (double& value : x) value *= factor;
  return x;
}

// One sequence of one KV head: queries, keys and values of every position, and a cache in scattered blocks that holds
// NaNs where nothing was written.
class Sequence {
 public:
  Sequence(Path path, Shape shape, int64_t length, uint32_t seed)
      : path_(path), shape_(shape), length_(length), cache_(2, 2 * num_blocks() + 1, 2, shape.head_dim, path.dtype) {
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
    tokens_.clear();
  }

  // Outputs of tokens [begin, end), as [token][group][head_dim], in tiles of `step`.
  void attend(int64_t begin, int64_t end, int64_t step, float* out) {
    write(end);
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    for (int64_t token = begin; token < end; token += step) {
      attention_tile(path_.isa, tile(token, std::min(step, end - token), out + (token - begin) * row()),
                     scratch.data());
    }
  }

  void attend_split(int64_t position, float* out) {
    write(position + 1);
    const int64_t num_segments = num_attention_segments(position + 1);
    const int64_t partial_floats = attention_partial_floats(shape_.group, shape_.head_dim);
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    Buffer<float> partials(num_segments * partial_floats);
    for (int64_t s = num_segments; s-- > 0;) {
      attention_segment(path_.isa, tile(position, 1, out), s, partials.data() + s * partial_floats, scratch.data());
    }
    merge_attention_segments(path_.isa, tile(position, 1, out), num_segments, partials.data());
  }

  int64_t row() const { return shape_.group * shape_.head_dim; }

  // Largest error of `out` over the bound of its element, for the query at `position`.
  double worst_error(int64_t position, const float* out) const {
    double worst = 0.0;
    for (int64_t g = 0; g < shape_.group; ++g) {
      const Bounded expected = twin(&q_[static_cast<size_t>(position * row() + g * shape_.head_dim)], position + 1);
      for (size_t i = 0; i < expected.out.size(); ++i) {
        const double found = out[static_cast<size_t>(g * shape_.head_dim) + i];
        const double error = std::abs(found - expected.out[i]);
        if (!(error <= worst * expected.bound[i])) worst = error / expected.bound[i];
      }
    }
    return worst;
  }

 private:
  struct Bounded {
    std::vector<double> out, bound;
  };

  int64_t num_blocks() const { return div_up(length_, kBlockSize); }

  // The attention of one query to the first n tokens in double precision, and how far each element may be off.
  Bounded twin(const float* q, int64_t n) const {
    constexpr double kUnit = 0x1p-24;
    const Rounding rounding = rounding_of(path_);
    const std::vector<double> query = as_read(q, rounding);
    const auto num_steps = static_cast<double>(2 * shape_.head_dim);
    const double query_error =
        0.5 * rounding.query_step * std::abs(*std::max_element(query.begin(), query.end(), is_smaller));
    std::vector<double> weights;
    double score_error = 0.0, largest = -INFINITY;
    for (int64_t t = 0; t < n; ++t) {
      const std::vector<double>& key = tokens_[static_cast<size_t>(t)].key;
      double score = 0.0, magnitude = 0.0, keys = 0.0;
      for (size_t i = 0; i < key.size(); ++i) {
        score += query[i] * key[i];
        magnitude += std::abs(query[i] * key[i]);
        keys += std::abs(key[i]);
      }
      weights.push_back(score);
      largest = std::max(largest, score);
      score_error = std::max(score_error, magnitude * num_steps * kUnit + keys * query_error);
    }
    double total = 0.0;
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    // Relative error of a weight: of its score and of the score it is compared with, of exp, and of the scalings by
    // every chunk and segment after it. Of a sum of n of them: n roundings more.
    const double chunks = static_cast<double>(n / kChunkTokens + 2);
    const double relative =
        rounding.weight + 2.0 * score_error + (chunks + 1.0) * (2.0 * kExpRelativeError + 2.0 * kUnit);
    const double sum = 2.0 * static_cast<double>(n) * kUnit;
    double largest_scaled = 0.0;  // weight times scale of a value
    for (int64_t t = 0; t < n; ++t) {
      const auto at = static_cast<size_t>(t);
      largest_scaled = std::max(largest_scaled, weights[at] / total * tokens_[at].value_scale);
    }
    Bounded result{std::vector<double>(query.size()), std::vector<double>(query.size(), 1e-30)};
    for (int64_t t = 0; t < n; ++t) {
      for (size_t i = 0; i < query.size(); ++i) {
        const double product = weights[static_cast<size_t>(t)] / total * tokens_[static_cast<size_t>(t)].value[i];
        result.out[i] += product;
        result.bound[i] += std::abs(product) * 2.0 * (relative + sum);
        // A byte of a value times the step of its weight.
        result.bound[i] +=
            0.5 * rounding.weight_step * largest_scaled *
            std::abs(tokens_[static_cast<size_t>(t)].value[i] / tokens_[static_cast<size_t>(t)].value_scale);
      }
    }
    return path_.dtype == KvDtype::kInt8 ? rotated_back(result) : result;
  }

  // Errors add up: an element is a sum of rotation_size others, and as many roundings.
  Bounded rotated_back(const Bounded& of) const {
    const auto size = static_cast<size_t>(rotation_size(shape_.head_dim));
    Bounded result{times(rotated(of.out), 1.0 / static_cast<double>(size)), std::vector<double>(of.out.size())};
    for (size_t i = 0; i < of.out.size(); ++i) {
      const size_t first = i / size * size;
      for (size_t j = first; j < first + size; ++j) {
        result.bound[i] += of.bound[j] / static_cast<double>(size) + std::abs(of.out[j]) * 0x1p-24;
      }
    }
    return result;
  }

  // The query as the kernel rounds it, rotated if keys are.
  std::vector<double> as_read(const float* q, Rounding rounding) const {
    constexpr float kLog2E = 1.44269504f;
    std::vector<double> query(q, q + shape_.head_dim);
    if (rounding.is_query_bf16) {
      for (double& x : query) {
        x = float_from_bf16(bf16_from_float(static_cast<float>(x) * kLog2E)) * std::log(2.0);
      }
    }
    if (path_.dtype == KvDtype::kBf16) return query;
    return times(rotated(query), 1.0 / static_cast<double>(rotation_size(shape_.head_dim)));
  }

  void write(int64_t end) {
    for (; num_written_ < end; ++num_written_) {
      const auto at = static_cast<size_t>(num_written_ * shape_.head_dim);
      const int64_t block = table_[static_cast<size_t>(num_written_ / kBlockSize)];
      cache_.write(path_.isa, 1, 1, block, num_written_ % kBlockSize, &k_[at], &v_[at]);
      tokens_.push_back(stored_token(cache_.head(1, 1) + block * cache_.block_stride(), path_.dtype, shape_.head_dim,
                                     num_written_ % kBlockSize));
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
            table_.data(),
            path_.dtype};
  }

  Path path_;
  Shape shape_;
  int64_t length_;
  int64_t num_written_ = 0;
  std::vector<float> q_, k_, v_;
  std::vector<Token> tokens_;
  KvCache cache_;
  std::vector<int32_t> table_;
};

}  // namespace
}  // namespace blendserve
