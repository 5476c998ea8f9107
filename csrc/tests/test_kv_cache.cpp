// Where keys and values of a token lie, and that writing them touches nothing else.
#include <cmath>
#include <vector>

#include "check.h"
#include "kv_cache.h"
#include "ops/bf16.h"

namespace blendserve {
namespace {

constexpr int64_t kLayers = 2, kBlocks = 3, kKvHeads = 2;
constexpr uint16_t kUntouched = 0x1234;

std::vector<float> random_row(int64_t n, uint32_t seed) {
  test::Random random(seed);
  std::vector<float> row(static_cast<size_t>(n));
  for (float& value : row) value = random.unit();
  row[0] = NAN;
  return row;
}

void a_token_lies_where_attention_looks_for_it() {
  for (const Isa isa : kAllIsas) {
    if (!is_supported(isa)) continue;
    for (const int64_t head_dim : {16, 64, 80, 144}) {
      for (int64_t offset = 0; offset < kBlockSize; ++offset) {
        KvCache cache(kLayers, kBlocks, kKvHeads, head_dim);
        const int64_t block_stride = cache.block_stride(), size = kLayers * kBlocks * block_stride;
        std::vector<uint16_t> expected(static_cast<size_t>(size), kUntouched);
        std::copy(expected.begin(), expected.end(), cache.head(0, 0));
        const auto key = random_row(head_dim, 1), value = random_row(head_dim, 2);
        cache.write(isa, 1, 1, 2, offset, key.data(), value.data());
        // The last layer, block and head are the end of the memory.
        const size_t keys = expected.size() - static_cast<size_t>(2 * kBlockSize * head_dim);
        const size_t values = expected.size() - static_cast<size_t>(kBlockSize * head_dim);
        for (int64_t i = 0; i < head_dim; ++i) {
          const auto at = static_cast<size_t>(i);
          expected[keys + static_cast<size_t>((i / 2 * kBlockSize + offset) * 2 + i % 2)] = bf16_from_float(key[at]);
          expected[values + static_cast<size_t>((offset / 2 * head_dim + i) * 2 + offset % 2)] =
              bf16_from_float(value[at]);
        }
        CHECK(std::equal(expected.begin(), expected.end(), cache.head(0, 0)), isa_name(isa), " head size ", head_dim,
              " offset ", offset);
      }
    }
  }
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(a_token_lies_where_attention_looks_for_it);
}
