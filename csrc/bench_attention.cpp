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

}  // namespace
}  // namespace blendserve

int main(int argc, char** argv) {
  using namespace blendserve;
  const Isa isa = argc > 1 ? isa_from_name(argv[1]) : best_isa();
  constexpr Shape kShapes[] = {{"group 3 head 64", 3, 64},   {"group 4 head 64", 4, 64},   {"group 1 head 64", 1, 64},
                               {"group 8 head 128", 8, 128}, {"group 7 head 128", 7, 128}, {"group 2 head 80", 2, 80},
                               {"group 5 head 96", 5, 96}};
  for (const Shape& shape : kShapes) {
    measure(isa, shape, 1, 1, 511);     // from L2
    measure(isa, shape, 3000, 1, 299);  // from memory
    measure(isa, shape, 1000, 1, 1023);
    measure(isa, shape, 1, 512, 0);
    measure(isa, shape, 1, 512, 1024);
  }
}
