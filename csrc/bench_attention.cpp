// Rates of the attention kernels: decode (GB/s of KV memory read), prefill (GFLOP/s of attended pairs), groups.
//   build/dev/bench_attention [portable|avx2|avx512vnni|avx512bf16] [bf16|int8]     default: all that this machine has
//   build/dev/bench_attention groups [ISA]                           decodes that share a prefix, together and apart
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <thread>
#include <vector>

#include "kv_cache.h"
#include "ops/attention.h"
#include "ops/bf16.h"

namespace blendserve {
namespace {

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}
double cpu_s() { return seconds(CLOCK_THREAD_CPUTIME_ID); }

// Best of `repeats` of work(thread) on `num_threads` pinned threads that start together: processor time on one thread,
// the wall's on more.
template <class Work>
double best_s(int num_threads, int repeats, Work work) {
  std::barrier sync(num_threads);
  double best = 1e9;
  const auto run = [&](int thread) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(thread, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
    const clockid_t clock = num_threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      sync.arrive_and_wait();
      const double start = seconds(clock);
      work(thread);
      sync.arrive_and_wait();
      if (thread == 0) best = std::min(best, seconds(clock) - start);
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) threads.emplace_back(run, t);
  for (std::thread& thread : threads) thread.join();
  return best;
}

struct Shape {
  int64_t group, head_dim, num_kv_heads;
};
struct Path {
  Isa isa;
  KvDtype dtype;
};

// KV memory of finite contents, with the blocks of each layer in random order.
struct Memory {
  KvCache cache;
  std::vector<int32_t> table;

  Memory(const Shape& shape, KvDtype dtype, int64_t num_layers, int64_t num_blocks)
      : cache(num_layers, num_blocks, shape.num_kv_heads, shape.head_dim, dtype) {
    std::fill_n(cache.head(0, 0), cache.num_bytes() / 2, bf16_from_float(0.01f));
    uint32_t state = 1;
    for (int64_t b = 0; b < num_blocks; ++b) table.push_back(static_cast<int32_t>(b));
    for (size_t b = table.size() - 1; b > 0; --b) {
      state = state * 1664525u + 1013904223u;
      std::swap(table[b], table[static_cast<uint64_t>(state) * (b + 1) >> 32]);
    }
  }
};

class Bench {
 public:
  Bench(Path path, Shape shape)
      : path_(path),
        shape_(shape),
        width_(shape.group * shape.head_dim),
        q_(static_cast<size_t>(kPrefill * width_), 0.1f),
        out_{q_, q_} {
    for (auto& scratch : scratch_) scratch = Buffer<float>(attention_scratch_floats(shape.group, shape.head_dim));
  }

  // 512 tokens of head size 64 again and again.
  double l2_bytes_per_s() {
    const int64_t num_tokens = 512 * 64 / shape_.head_dim, repeats = 200;
    const Memory memory({shape_.group, shape_.head_dim, 1}, path_.dtype, 1, num_tokens / kBlockSize);
    const double s = best_s(1, 7, [&](int thread) {
      for (int64_t i = 0; i < repeats; ++i) attend(memory, 0, 0, memory.table.data(), num_tokens - 1, 1, thread);
    });
    return static_cast<double>(repeats * memory.cache.num_bytes()) / s;
  }

  // 64 sequences of 1024 tokens, layer after layer: 3.2 GB in bf16.
  double memory_bytes_per_s(int num_threads) {
    constexpr int64_t kSequences = 64, kTokens = 1024, kBlocks = kTokens / kBlockSize;
    const int64_t num_layers = 12288 / (shape_.head_dim * shape_.num_kv_heads);
    const Memory memory(shape_, path_.dtype, num_layers, kSequences * kBlocks);
    const double s = best_s(num_threads, 4, [&](int thread) {
      for (int64_t layer = 0; layer < num_layers; ++layer) {
        for (int64_t sequence = thread; sequence < kSequences; sequence += num_threads) {
          for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
            attend(memory, layer, head, memory.table.data() + sequence * kBlocks, kTokens - 1, 1, thread);
          }
        }
      }
    });
    return static_cast<double>(memory.cache.num_bytes()) / s;
  }

  double prefill_flop_per_s(int64_t position) {
    const Memory memory({shape_.group, shape_.head_dim, 1}, path_.dtype, 1, (position + kPrefill) / kBlockSize);
    const int64_t step = attention_tile_tokens(shape_.group);
    const double s = best_s(1, 9, [&](int thread) {
      for (int64_t token = 0; token < kPrefill; token += step) {
        attend(memory, 0, 0, memory.table.data(), position + token, std::min(step, kPrefill - token), thread);
      }
    });
    const double attended = kPrefill * (static_cast<double>(position) + 0.5 * (kPrefill + 1));
    return 4.0 * attended * static_cast<double>(width_) / s;
  }

 private:
  static constexpr int64_t kPrefill = 512;

  void attend(const Memory& memory, int64_t layer, int64_t head, const int32_t* table, int64_t position,
              int64_t num_tokens, int thread) {
    const auto t = static_cast<size_t>(thread);
    attention_tile(path_.isa,
                   {q_.data(), out_[t].data(), width_, num_tokens, position, shape_.group, shape_.head_dim,
                    memory.cache.head(layer, head), memory.cache.block_stride(), table, path_.dtype},
                   scratch_[t].data());
  }

  Path path_;
  Shape shape_;
  int64_t width_;
  std::vector<float> q_;
  std::vector<float> out_[2];
  Buffer<float> scratch_[2];
};

void print_rates(Path path, const Shape& shape) {
  Bench bench(path, shape);
  std::printf("%-10s %s (%lld,%3lld): decode GB/s L2 %5.1f", isa_name(path.isa).data(),
              path.dtype == KvDtype::kInt8 ? "int8" : "bf16", static_cast<long long>(shape.group),
              static_cast<long long>(shape.head_dim), bench.l2_bytes_per_s() * 1e-9);
  for (const int num_threads : {1, 2}) {
    if (num_threads > static_cast<int>(std::thread::hardware_concurrency())) break;
    std::printf("%s %5.1f", num_threads == 1 ? ", memory" : " /", bench.memory_bytes_per_s(num_threads) * 1e-9);
    std::fflush(stdout);
  }
  std::printf("; prefill GFLOP/s at 0 %6.1f, at 1024 %6.1f\n", bench.prefill_flop_per_s(0) * 1e-9,
              bench.prefill_flop_per_s(1024) * 1e-9);
  std::fflush(stdout);
}

// Decodes of `num_members` sequences at a time, 64 in all, that share `num_shared` positions and have 100 more each:
// in groups and one by one, in turn.
void print_groups(Isa isa, const Shape& shape, int64_t num_members, int64_t num_shared) {
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
      "(%lld,%3lld) 64 decodes that share %4lld of %4lld, in groups of %2lld: %6.3f ms; one by one %6.3f ms, %6.3f ms "
      "if "
      "each has its own copy\n",
      static_cast<long long>(shape.group), static_cast<long long>(shape.head_dim), static_cast<long long>(num_shared),
      static_cast<long long>(num_shared + kOwnTokens), static_cast<long long>(num_members), grouped_s * 1e3,
      shared_s * 1e3, apart_s * 1e3);
}

}  // namespace
}  // namespace blendserve

int main(int argc, char** argv) {
  using namespace blendserve;
  constexpr Shape kShapes[] = {{3, 64, 3}, {1, 64, 3}, {4, 128, 2}, {8, 128, 2}, {7, 128, 2}, {5, 96, 4}, {2, 80, 4}};
  if (argc > 1 && std::strcmp(argv[1], "groups") == 0) {
    const Isa isa = argc > 2 ? isa_from_name(argv[2]) : best_isa();
    for (const Shape& shape : kShapes) {
      for (const int64_t num_members : {2, 8, 24}) {
        if (num_members <= max_group_members(shape.group)) print_groups(isa, shape, num_members, 1024);
      }
    }
    return 0;
  }
  for (const KvDtype dtype : {KvDtype::kBf16, KvDtype::kInt8}) {
    if (argc > 2 && (std::string_view(argv[2]) == "int8") != (dtype == KvDtype::kInt8)) continue;
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAvx512Bf16}) {
      if (!is_supported(isa) || (argc > 1 && isa_from_name(argv[1]) != isa)) continue;
      for (const Shape& shape : kShapes) print_rates({isa, dtype}, shape);
    }
  }
}
