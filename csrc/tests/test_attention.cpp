// Attention against a twin in double precision, and bit for bit against itself under any chunking.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "attention_cases.h"
#include "check.h"

namespace blendserve {
namespace {

// Decodes of sequences with common first blocks, each at its own number of positions past them; what was never written
// is NaN.
class Family {
 public:
  Family(Path path, Shape shape, int64_t num_shared, std::span<const int64_t> past)
      : path_(path),
        shape_(shape),
        num_shared_(num_shared),
        past_(past),
        cache_(1, num_blocks(), 1, shape.head_dim, path.dtype) {
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

  void attend_apart(float* out) const {
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    for (size_t m = 0; m < past_.size(); ++m) attention_tile(path_.isa, tile(m, out), scratch.data());
  }

  void attend_grouped(float* out) const {
    Buffer<float> scratch(attention_scratch_floats(shape_.group, shape_.head_dim));
    std::vector<AttentionTile> tiles;
    for (size_t m = 0; m < past_.size(); ++m) tiles.push_back(tile(m, out));
    attention_group(path_.isa, tiles, num_shared_, scratch.data());
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
    return {q_.data() + at,         out + at,          row(),           1,
            num_shared_ + past_[m], shape_.group,      shape_.head_dim, cache_.head(0, 0),
            cache_.block_stride(),  tables_[m].data(), path_.dtype};
  }

  Path path_;
  Shape shape_;
  int64_t num_shared_;
  std::span<const int64_t> past_;
  KvCache cache_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<float> q_;
};

void agrees_with_double_precision() {
  for (const Path path : paths()) {
    for (const Shape shape : kShapes) {
      Sequence sequence(path, shape, 201, 3);
      std::vector<float> out(static_cast<size_t>(201 * sequence.row()));
      sequence.attend(0, 201, attention_tile_tokens(shape.group), out.data());
      for (const int64_t position : {0, 1, 14, 15, 16, 17, 62, 63, 64, 100, 127, 200}) {
        const double error = sequence.worst_error(position, &out[static_cast<size_t>(position * sequence.row())]);
        CHECK(error <= 1.0, path, " group ", shape.group, " head ", shape.head_dim, " position ", position, ": ", error,
              " bounds");
      }
    }
  }
}

void long_context_agrees_with_double_precision() {
  for (const Path path : paths()) {
    Sequence sequence(path, {3, 64}, 2000, 5);
    std::vector<float> out(static_cast<size_t>(sequence.row()));
    for (const int64_t position : {510, 511, 512, 1023, 1024, 1998, 1999}) {
      sequence.attend(position, position + 1, 1, out.data());
      const double error = sequence.worst_error(position, out.data());
      CHECK(error <= 1.0, path, " position ", position, ": ", error, " bounds");
    }
  }
}

// Token by token as in decode, in one prefill, in uneven chunks and tiles: the same bits.
void does_not_depend_on_chunking() {
  for (const Path path : paths()) {
    for (const Shape shape : kShapes) {
      const int64_t length = shape.group == 3 ? 1100 : 150;  // past two segments once
      Sequence sequence(path, shape, length, 11);
      const auto size = static_cast<size_t>(length * sequence.row());
      std::vector<float> decoded(size), chunked(size);
      for (int64_t t = 0; t < length; ++t)
        sequence.attend(t, t + 1, 1, &decoded[static_cast<size_t>(t * sequence.row())]);
      for (const int64_t chunk : {length, int64_t{37}, int64_t{64}}) {
        sequence.forget();
        const int64_t step = std::min(attention_tile_tokens(shape.group), chunk == 64 ? int64_t{5} : length);
        for (int64_t begin = 0; begin < length; begin += chunk) {
          sequence.attend(begin, std::min(length, begin + chunk), step,
                          &chunked[static_cast<size_t>(begin * sequence.row())]);
        }
        CHECK(std::memcmp(decoded.data(), chunked.data(), size * sizeof(float)) == 0, path, " group ", shape.group,
              " head ", shape.head_dim, " chunk ", chunk);
      }
    }
  }
}

void does_not_depend_on_splitting() {
  for (const Path path : paths()) {
    for (const Shape shape : {Shape{1, 128}, Shape{3, 64}, Shape{8, 96}}) {
      Sequence sequence(path, shape, 1700, 13);
      std::vector<float> whole(static_cast<size_t>(sequence.row())), split(whole.size());
      for (const int64_t position : {100, 512, 513, 1535, 1699}) {
        sequence.attend(position, position + 1, 1, whole.data());
        sequence.attend_split(position, split.data());
        CHECK(std::memcmp(whole.data(), split.data(), whole.size() * sizeof(float)) == 0, path, " group ", shape.group,
              " position ", position);
      }
    }
  }
}

// Sequences that begin alike, their decodes in one group or each by itself: the same bits wherever the prefix ends
// within its segment and however far each of them is past it.
void does_not_depend_on_grouping() {
  constexpr Shape kGroupShapes[] = {{1, 64}, {3, 64}, {4, 128}, {7, 16}};
  constexpr int64_t kPastPrefix[] = {0, 1, 63, 64, 517, 300, 1040};
  for (const Path path : paths()) {
    for (const Shape shape : kGroupShapes) {
      for (const int64_t num_shared : {64, 448, 512, 1024, 1088}) {
        Family family(path, shape, num_shared, kPastPrefix);
        std::vector<float> apart(family.size()), grouped(family.size());
        family.attend_apart(apart.data());
        family.attend_grouped(grouped.data());
        CHECK(std::memcmp(apart.data(), grouped.data(), family.size() * sizeof(float)) == 0, path, " group ",
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

// What is read back is within a step of what was written, in each token by itself, and no byte is out of range.
void cache_rounds_to_int8() {
  test::Random random(23);
  for (const int64_t d : {16, 48, 64, 128}) {
    KvCache cache(1, 1, 1, d, KvDtype::kInt8);
    for (int64_t offset = 0; offset < kBlockSize; ++offset) {
      const float size = std::exp2(static_cast<float>(6 * offset) - 48.0f);
      std::vector<float> key(static_cast<size_t>(d)), value(key.size());
      for (auto* values : {&key, &value})
        for (float& x : *values) x = size * random.unit();
      value[5] *= 8.0f;
      cache.write(best_isa(), 0, 0, 0, offset, key.data(), value.data());
      const Token token = stored_token(cache.head(0, 0), KvDtype::kInt8, d, offset);
      const auto check = [&](const std::vector<float>& written, const std::vector<double>& stored, double slack) {
        const std::vector<double> exact = rotated({written.begin(), written.end()});
        double largest = 0.0, error = 0.0;
        for (const double x : exact) largest = std::max(largest, std::abs(x));
        for (size_t i = 0; i < exact.size(); ++i) error = std::max(error, std::abs(exact[i] - stored[i]));
        CHECK(error <= 0.5 * slack * largest / 127.0, "head ", d, " token ", offset, ": ", error / largest);
      };
      check(key, token.key, 1.01);
      check(value, token.value, std::exp2(0.008 * std::abs(std::log2(8.0f * size)) + 0.2));
    }
  }
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(cache_rounds_to_bf16_and_keeps_its_layout);
  RUN(cache_rounds_to_int8);
  RUN(agrees_with_double_precision);
  RUN(long_context_agrees_with_double_precision);
  RUN(does_not_depend_on_chunking);
  RUN(does_not_depend_on_splitting);
  RUN(does_not_depend_on_grouping);
}
