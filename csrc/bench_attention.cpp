// Rates of the attention kernels on one thread, by processor time: decode (KV bytes) and prefill (flop).
//   build/dev/bench_attention [portable|avx2]
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "kv_cache.h"
#include "ops/attention.h"
#include "ops/bf16.h"

namespace blendserve {
namespace {

double cpu_s() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Shape {
  const char* name;
  int64_t group, head_dim;
};

// `num_sequences` times `num_tokens` query tokens after `context` others, each sequence with its own blocks.
void measure(Isa isa, const Shape& shape, int64_t num_sequences, int64_t num_tokens, int64_t context) {
  const int64_t length = context + num_tokens;
  const int64_t blocks_each = div_up(length, kBlockSize);
  KvCache cache(1, num_sequences * blocks_each, 1, shape.head_dim);
  std::fill_n(cache.head(0, 0), cache.num_bytes() / 2, bf16_from_float(0.01f));
  std::vector<int32_t> table(static_cast<size_t>(num_sequences * blocks_each));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  const int64_t stride = shape.group * shape.head_dim;
  std::vector<float> q(static_cast<size_t>(num_tokens * stride), 0.1f), out(q.size());
  Buffer<float> scratch(attention_scratch_floats(shape.group, shape.head_dim));
  const int64_t step = attention_tile_tokens(shape.group);
  double best_s = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const double start = cpu_s();
    for (int64_t s = 0; s < num_sequences; ++s) {
      for (int64_t token = 0; token < num_tokens; token += step) {
        const AttentionTile tile = {q.data() + token * stride,
                                    out.data() + token * stride,
                                    stride,
                                    std::min(step, num_tokens - token),
                                    context + token,
                                    shape.group,
                                    shape.head_dim,
                                    cache.head(0, 0),
                                    cache.block_stride(),
                                    table.data() + s * blocks_each};
        attention_tile(isa, tile, scratch.data());
      }
    }
    best_s = std::min(best_s, cpu_s() - start);
  }
  const double attended = static_cast<double>(num_sequences * num_tokens) *
                          (static_cast<double>(context) + 0.5 * static_cast<double>(num_tokens + 1));
  const double flop = 4.0 * attended * static_cast<double>(shape.group * shape.head_dim);
  const double bytes = 4.0 * static_cast<double>(num_sequences * length * shape.head_dim);
  std::printf("%-22s %4lld seqs x %4lld tokens after %4lld: %8.3f ms  %6.1f GFLOP/s  %6.1f GB/s\n", shape.name,
              static_cast<long long>(num_sequences), static_cast<long long>(num_tokens),
              static_cast<long long>(context), best_s * 1e3, flop / best_s * 1e-9, bytes / best_s * 1e-9);
}

// Decodes of `num_members` sequences at a time, 64 in all, that share `num_shared` positions and have 100 more each:
// in groups and one by one, in turn.
void measure_group(Isa isa, const Shape& shape, int64_t num_members, int64_t num_shared) {
  constexpr int64_t kSequences = 64, kOwnTokens = 100;
  const int64_t shared_blocks = num_shared / kBlockSize, own_blocks = div_up(kOwnTokens, kBlockSize);
  const int64_t blocks_each = shared_blocks + own_blocks;
  KvCache cache(1, kSequences * blocks_each, 1, shape.head_dim);
  std::fill_n(cache.head(0, 0), cache.num_bytes() / 2, bf16_from_float(0.01f));
  const int64_t width = shape.group * shape.head_dim;
  std::vector<float> q(static_cast<size_t>(kSequences * width), 0.1f), out(q.size());
  Buffer<float> scratch(attention_scratch_floats(shape.group, shape.head_dim));
  std::vector<int32_t> together(static_cast<size_t>(kSequences * blocks_each)), apart(together.size());
  for (int64_t s = 0; s < kSequences; ++s) {
    for (int64_t b = 0; b < blocks_each; ++b) {
      const auto own = static_cast<int32_t>(s * blocks_each + b);
      apart[static_cast<size_t>(own)] = own;
      together[static_cast<size_t>(own)] = b < shared_blocks ? static_cast<int32_t>(b) : own;
    }
  }
  const auto tiles_of = [&](const std::vector<int32_t>& table) {
    std::vector<AttentionTile> tiles;
    for (int64_t s = 0; s < kSequences; ++s) {
      tiles.push_back({q.data() + s * width, out.data() + s * width, width, 1, num_shared + kOwnTokens - 1, shape.group,
                       shape.head_dim, cache.head(0, 0), cache.block_stride(), table.data() + s * blocks_each});
    }
    return tiles;
  };
  const std::vector<AttentionTile> shared_tiles = tiles_of(together), own_tiles = tiles_of(apart);
  double grouped_s = 1e9, shared_s = 1e9, apart_s = 1e9;
  for (int repeat = 0; repeat < 15; ++repeat) {
    double start = cpu_s();
    for (int64_t s = 0; s < kSequences; s += num_members) {
      const auto count = static_cast<size_t>(std::min(num_members, kSequences - s));
      attention_group(isa, {shared_tiles.data() + s, count}, num_shared, scratch.data());
    }
    grouped_s = std::min(grouped_s, cpu_s() - start);
    start = cpu_s();
    for (const AttentionTile& tile : shared_tiles) attention_tile(isa, tile, scratch.data());
    shared_s = std::min(shared_s, cpu_s() - start);
    start = cpu_s();
    for (const AttentionTile& tile : own_tiles) attention_tile(isa, tile, scratch.data());
    apart_s = std::min(apart_s, cpu_s() - start);
  }
  std::printf(
      "%-22s 64 decodes that share %4lld of %4lld, in groups of %2lld: %6.3f ms; one by one %6.3f ms, %6.3f ms if "
      "each has its own copy\n",
      shape.name, static_cast<long long>(num_shared), static_cast<long long>(num_shared + kOwnTokens),
      static_cast<long long>(num_members), grouped_s * 1e3, shared_s * 1e3, apart_s * 1e3);
}

}  // namespace
}  // namespace blendserve

int main(int argc, char** argv) {
  using namespace blendserve;
  const Isa isa = argc > 1 ? isa_from_name(argv[1]) : best_isa();
  constexpr Shape kShapes[] = {{"group 3 head 64", 3, 64},   {"group 4 head 64", 4, 64},   {"group 1 head 64", 1, 64},
                               {"group 8 head 128", 8, 128}, {"group 7 head 128", 7, 128}, {"group 2 head 80", 2, 80},
                               {"group 5 head 96", 5, 96}};
  for (const Shape& shape : kShapes) {
    for (const int64_t num_members : {2, 8, 24}) {
      if (num_members <= max_group_members(shape.group)) measure_group(isa, shape, num_members, 1024);
    }
  }
  for (const Shape& shape : kShapes) {
    measure(isa, shape, 1, 1, 511);     // from L2
    measure(isa, shape, 3000, 1, 299);  // from memory
    measure(isa, shape, 1000, 1, 1023);
    measure(isa, shape, 1, 512, 0);
    measure(isa, shape, 1, 512, 1024);
  }
}
