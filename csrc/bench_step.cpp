// Time of one step by op, on random weights of SmolLM2-135M's shape.
//   build/dev/bench_step [threads] [isa] [dtype] [rounds of shared prefixes, instead of the rest]
//   build/dev/bench_step THREADS ISA DTYPE apart      every op on all rows before the next, never on blocks of rows
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "model.h"

namespace blendserve {
namespace {

constexpr ModelShape kShape = {49152, 576, 1536, 30, 9, 3, 64, 1e-5f};
constexpr ModelLimits kLimits = {64, 2048, 2048, 64 * 128};
constexpr int64_t kBlocksEach = 128;
constexpr int64_t kSharedBlocks = 62;  // of a prefix of 1000 tokens

PackedMatrix random_matrix(MatmulFormat format, int64_t n, int64_t k, WeightMemory& memory) {
  std::vector<float> values(static_cast<size_t>(n * k));
  uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) * 0.1f;
  }
  return {format, values, n, k, &memory};
}

ModelWeights random_weights(MatmulFormat format) {
  ModelWeights weights;
  WeightMemory memory;
  weights.lm_head = random_matrix(format, kShape.vocab_size, kShape.hidden_size, memory);
  weights.norm.assign(static_cast<size_t>(kShape.hidden_size), 1.0f);
  weights.inverse_frequencies.assign(static_cast<size_t>(kShape.head_dim / 2), 0.01);
  for (int64_t i = 0; i < kShape.num_layers; ++i) {
    LayerWeights layer;
    layer.qkv = random_matrix(format, kShape.qkv_width(), kShape.hidden_size, memory);
    layer.o = random_matrix(format, kShape.hidden_size, kShape.q_width(), memory);
    layer.gate_up = random_matrix(format, 2 * kShape.intermediate_size, kShape.hidden_size, memory);
    layer.down = random_matrix(format, kShape.hidden_size, kShape.intermediate_size, memory);
    layer.input_norm = layer.post_attention_norm = weights.norm;
    weights.layers.push_back(std::move(layer));
  }
  return weights;
}

// `num_sequences` times `num_tokens` tokens after `num_computed` others; the fastest of some repeats.
void measure(Model& model, const char* name, int32_t num_sequences, int32_t num_tokens, int32_t num_computed) {
  const auto n = static_cast<size_t>(num_sequences);
  std::vector<int32_t> slots(n), scheduled(n, num_tokens), computed(n, num_computed);
  std::iota(slots.begin(), slots.end(), 0);
  const auto is_sampled = std::make_unique<bool[]>(n);
  std::fill_n(is_sampled.get(), n, true);
  std::vector<int32_t> tokens(static_cast<size_t>(kLimits.max_num_seqs * kLimits.max_model_len));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7919 % 49152);
  std::vector<int32_t> blocks(static_cast<size_t>(kLimits.num_blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  StepCounters best;
  double best_s = 1e9;
  for (int repeat = 0; repeat < 4; ++repeat) {
    const StepCounters before = model.counters();
    model.step({slots, scheduled, computed, is_sampled.get(), tokens.data(), kLimits.max_model_len, blocks.data(),
                kBlocksEach, kLimits.max_num_seqs});
    StepCounters spent = model.counters();
    for (size_t op = 0; op < kNumOps; ++op) spent.op_s[op] -= before.op_s[op];
    spent.matmul_flop -= before.matmul_flop;
    spent.attention_flop -= before.attention_flop;
    spent.kv_bytes -= before.kv_bytes;
    const double total_s = std::accumulate(spent.op_s.begin(), spent.op_s.end(), 0.0);
    if (total_s >= best_s) continue;
    best_s = total_s;
    best = spent;
  }
  const auto at = [&](Op op) { return best.op_s[static_cast<size_t>(op)]; };
  const double matmul_s = at(Op::kQkv) + at(Op::kOutput) + at(Op::kGateUp) + at(Op::kDown) + at(Op::kHead);
  const double others_s = best_s - matmul_s - at(Op::kAttention);
  std::printf(
      "%s: %.1f ms, %.1f%% beside matmul and attention; matmul %.1f GFLOP/s, attention %.1f GFLOP/s, %.1f GB/s of "
      "KV\n ",
      name, best_s * 1e3, 100.0 * others_s / best_s, best.matmul_flop / matmul_s * 1e-9,
      best.attention_flop / at(Op::kAttention) * 1e-9, best.kv_bytes / at(Op::kAttention) * 1e-9);
  for (int op = 0; op < kNumOps; ++op) {
    std::printf(" %s %.2f", op_name(static_cast<Op>(op)).data(), best.op_s[static_cast<size_t>(op)] * 1e3);
  }
  std::printf("\n");
}

// Decodes that share 1000 of 1100 tokens, the prefix read once and for each of them, in turn: medians.
void measure_shared_prefix(Model& model, int32_t num_sequences, int num_rounds) {
  const auto n = static_cast<size_t>(num_sequences);
  std::vector<int32_t> slots(n), scheduled(n, 1), computed(n, 1099), blocks(static_cast<size_t>(kLimits.num_blocks));
  std::iota(slots.begin(), slots.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  for (size_t s = 1; s < n; ++s) std::iota(&blocks[s * kBlocksEach], &blocks[s * kBlocksEach + kSharedBlocks], 0);
  const auto is_sampled = std::make_unique<bool[]>(n);
  const std::vector<int32_t> tokens(static_cast<size_t>(kLimits.max_num_seqs * kLimits.max_model_len), 1);
  const auto run = [&] {
    const StepCounters before = model.counters();
    model.step({slots, scheduled, computed, is_sampled.get(), tokens.data(), kLimits.max_model_len, blocks.data(),
                kBlocksEach, kLimits.max_num_seqs});
    StepCounters spent = model.counters();
    for (size_t op = 0; op < kNumOps; ++op) spent.op_s[op] -= before.op_s[op];
    spent.kv_bytes -= before.kv_bytes;
    return spent;
  };
  struct Samples {
    std::vector<double> step_s, attention_s;
    double kv_bytes = 0.0;
  } once, apart;
  run();
  for (int round = 0; round < num_rounds; ++round) {
    for (Samples* samples : {&once, &apart}) {
      samples == &once ? model.read_shared_once() : model.read_apart();
      const StepCounters spent = run();
      samples->step_s.push_back(std::accumulate(spent.op_s.begin(), spent.op_s.end(), 0.0));
      samples->attention_s.push_back(spent.op_s[static_cast<size_t>(Op::kAttention)]);
      samples->kv_bytes = spent.kv_bytes;
    }
  }
  model.read_shared_once();
  const auto median = [](std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  };
  for (const Samples* samples : {&apart, &once}) {
    std::printf(
        "decode of %d sequences that share 1000 of 1100, prefix read %s: step %.1f ms (%.1f..%.1f), attention "
        "%.1f ms, %.0f MB of KV\n",
        num_sequences, samples == &once ? "once" : "apart", median(samples->step_s) * 1e3,
        *std::min_element(samples->step_s.begin(), samples->step_s.end()) * 1e3,
        *std::max_element(samples->step_s.begin(), samples->step_s.end()) * 1e3, median(samples->attention_s) * 1e3,
        samples->kv_bytes * 1e-6);
  }
}

}  // namespace
}  // namespace blendserve

int main(int argc, char** argv) {
  using namespace blendserve;
  const int num_threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const Isa isa = argc > 2 ? isa_from_name(argv[2]) : best_isa();
  const Dtype dtype = argc > 3 ? dtype_from_name(argv[3]) : Dtype::kBf16;
  Model model(isa, kShape, kLimits, random_weights({isa, dtype}), num_threads);
  const bool is_apart = argc > 4 && std::strcmp(argv[4], "apart") == 0;
  if (is_apart) model.run_ops_apart();
  if (argc > 4 && !is_apart) {
    for (const int num_sequences : {2, 4, 8, 16, 64}) measure_shared_prefix(model, num_sequences, std::atoi(argv[4]));
    return 0;
  }
  measure(model, "prefill of 512 tokens", 1, 512, 0);
  measure(model, "prefill of 1000 tokens", 1, 1000, 0);
  measure(model, "prefill of 2048 tokens", 1, 2048, 0);
  measure(model, "decode of 64 sequences at 300", 64, 1, 299);
  measure(model, "decode of 64 sequences at 1200", 64, 1, 1199);
  measure(model, "decode of 1 sequence at 1200", 1, 1, 1199);
}
