// Whole steps of a tiny random model: the same bits whatever is computed beside a sequence, in whatever chunks, on any
// number of threads. That the arithmetic is the model's is tests/executors' business, against the NumPy reference.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "model.h"

namespace blendserve {
namespace {

const MatmulFormat kFormats[] = {
    {Isa::kPortable}, {Isa::kAvx2}, {Isa::kAvx512Bf16}, {Isa::kPortable, Dtype::kInt8}, {Isa::kAvx2, Dtype::kInt8}};
constexpr int64_t kMaxLength = 1300;  // three attention segments
constexpr int64_t kMaxBlocks = div_up(kMaxLength, kBlockSize);
constexpr ModelLimits kLimits = {4, 1400, kMaxLength, 4 * kMaxBlocks};
constexpr ModelShape kPlain = {97, 48, 80, 2, 6, 2, 16, 1e-5f};
constexpr ModelShape kPadded = {97, 40, 72, 2, 4, 4, 10, 1e-5f};  // head size 10, with q/k norm and bias

class Weights {
 public:
  Weights(MatmulFormat format, const ModelShape& shape) : format_(format), shape_(shape) {}

  ModelWeights make(bool has_bias_and_norm) {
    ModelWeights weights;
    const ModelShape& s = shape_;
    weights.lm_head = matrix(s.vocab_size, s.hidden_size, s.hidden_size);
    weights.norm = vector(s.hidden_size, 1.0f);
    for (int64_t i = 0; i < s.head_dim / 2; ++i) {
      weights.inverse_frequencies.push_back(
          std::pow(1e-3, static_cast<double>(i) / static_cast<double>(s.head_dim / 2)));
    }
    for (int64_t i = 0; i < s.num_layers; ++i) {
      LayerWeights layer;
      layer.qkv = matrix(s.qkv_width(), s.hidden_size, s.hidden_size, true);
      layer.o = matrix(s.hidden_size, s.q_width(), s.q_width());
      layer.gate_up = matrix(2 * s.intermediate_size, s.hidden_size, s.hidden_size);
      layer.down = matrix(s.hidden_size, s.intermediate_size, s.intermediate_size);
      layer.input_norm = layer.post_attention_norm = vector(s.hidden_size, 1.0f);
      if (has_bias_and_norm) {
        layer.q_norm = layer.k_norm = vector(s.head_dim, 1.0f);
        layer.qkv_bias.assign(static_cast<size_t>(s.qkv_width()), 0.0f);
      }
      weights.layers.push_back(std::move(layer));
    }
    return weights;
  }

 private:
  PackedMatrix matrix(int64_t n, int64_t k, int64_t fan_in, bool has_heads = false) {
    std::vector<float> values(static_cast<size_t>(n * k));
    const float scale = 2.0f / std::sqrt(static_cast<float>(fan_in));
    for (int64_t row = 0; row < n; ++row) {
      const bool is_padding = has_heads && row % shape_.head_stride() >= shape_.head_dim;
      for (int64_t i = 0; i < k; ++i)
        values[static_cast<size_t>(row * k + i)] = is_padding ? 0.0f : scale * random_.unit();
    }
    return {format_, values, n, k};
  }
  std::vector<float> vector(int64_t n, float around) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = around + 0.2f * random_.unit();
    return values;
  }

  MatmulFormat format_;
  ModelShape shape_;
  test::Random random_{42};
};

// Sequences of four slots, stepped by hand. Two slots may share blocks.
class Run {
 public:
  Run(MatmulFormat format, const ModelShape& shape, int num_threads)
      : model_(format.isa, shape, kLimits, Weights(format, shape).make(shape.head_dim == kPadded.head_dim),
               num_threads) {
    for (int64_t slot = 0; slot < kLimits.max_num_seqs; ++slot) {
      test::Random random(static_cast<uint32_t>(slot + 1));
      for (int64_t i = 0; i < kMaxLength; ++i)
        token(slot, i) = static_cast<int32_t>(random.bits() % static_cast<uint32_t>(shape.vocab_size));
      for (int64_t b = 0; b < kMaxBlocks; ++b) block(slot, b) = static_cast<int32_t>(b * 4 + slot);
      SamplingParams params;
      params.temperature = slot % 2 == 0 ? 0.0f : 0.8f;
      params.seed = static_cast<uint64_t>(slot);
      params.num_logprobs = 2;
      model_.admit(slot, params);
    }
  }

  int32_t& token(int64_t slot, int64_t position) { return tokens_[static_cast<size_t>(slot * kMaxLength + position)]; }
  int32_t& block(int64_t slot, int64_t index) { return blocks_[static_cast<size_t>(slot * kMaxBlocks + index)]; }
  Model& model() { return model_; }

  struct Entry {
    int32_t slot, num_tokens;
  };
  // Runs the next tokens of some slots, all sampled; remembers the log probabilities after each last token.
  void step(const std::vector<Entry>& entries) {
    std::vector<int32_t> slots, scheduled, computed;
    const auto is_sampled = std::make_unique<bool[]>(entries.size());
    for (size_t i = 0; i < entries.size(); ++i) {
      slots.push_back(entries[i].slot);
      scheduled.push_back(entries[i].num_tokens);
      computed.push_back(static_cast<int32_t>(num_computed_[entries[i].slot]));
      is_sampled[i] = true;
    }
    const auto samples = model_.step(
        {slots, scheduled, computed, is_sampled.get(), tokens_.data(), kMaxLength, blocks_.data(), kMaxBlocks, 4});
    CHECK(samples.size() == entries.size());
    for (size_t i = 0; i < entries.size(); ++i) {
      const int32_t slot = entries[i].slot;
      num_computed_[slot] += entries[i].num_tokens;
      results_[{slot, num_computed_[slot]}] = {samples[i].token, samples[i].logprob, samples[i].top[0].logit,
                                               samples[i].top[1].logit};
    }
  }
  // Pretends that the first tokens of a slot are already in its blocks.
  void skip(int32_t slot, int64_t num_tokens) { num_computed_[slot] = num_tokens; }

  struct Result {
    int32_t token;
    float logprob, best, second;
    bool operator==(const Result&) const = default;
  };
  const std::map<std::pair<int32_t, int64_t>, Result>& results() const { return results_; }
  Result result(int32_t slot, int64_t num_tokens) const { return results_.at({slot, num_tokens}); }

 private:
  Model model_;
  std::vector<int32_t> tokens_ = std::vector<int32_t>(static_cast<size_t>(4 * kMaxLength));
  std::vector<int32_t> blocks_ = std::vector<int32_t>(static_cast<size_t>(4 * kMaxBlocks));
  std::map<int32_t, int64_t> num_computed_;
  std::map<std::pair<int32_t, int64_t>, Result> results_;
};

std::string name_of(MatmulFormat format) {
  return std::string(dtype_name(format.dtype)) + " on " + std::string(isa_name(format.isa));
}

// All four slots begin with 700 tokens, 43 blocks of them shared; two are decoded while others are prefilled, then all.
void decode_with_common_prefix(Run& run) {
  for (int32_t slot = 1; slot < 4; ++slot) {
    for (int64_t i = 0; i < 700; ++i) run.token(slot, i) = run.token(0, i);
    for (int64_t b = 0; b < 43; ++b) run.block(slot, b) = run.block(0, b);
    run.skip(slot, 688);
  }
  run.step({{0, 700}});
  run.step({{1, 13}});
  run.step({{0, 1}, {1, 1}, {2, 14}, {3, 15}});
  run.step({{3, 1}, {2, 1}, {1, 1}, {0, 1}});
}

template <class F>
void on_each_format(F&& test) {
  for (const MatmulFormat format : kFormats) {
    if (is_supported(format.isa)) test(format);
  }
}

void steps_do_not_depend_on_batch_chunks_or_threads() {
  on_each_format([](MatmulFormat format) {
    for (const ModelShape& shape : {kPlain, kPadded}) {
      Run whole(format, shape, 1);
      for (int32_t slot = 0; slot < 4; ++slot) {
        whole.step({{slot, 70 + 9 * slot}});
        for (int i = 0; i < 3; ++i) whole.step({{slot, 1}});
      }
      for (const int num_threads : {1, 2, 3, 4}) {
        Run mixed(format, shape, num_threads);
        mixed.step({{3, 97}, {0, 13}, {1, 64}});
        mixed.step({{0, 57}, {3, 1}, {1, 15}});
        mixed.step({{2, 88}, {3, 1}, {1, 1}, {0, 1}});
        mixed.step({{0, 1}, {1, 1}, {2, 1}, {3, 1}});
        for (int32_t slot = 0; slot < 4; ++slot) {
          const int64_t length = 70 + 9 * slot;
          for (int64_t n = length; n < length + (slot == 2 ? 2 : 3); ++n) {
            CHECK(whole.result(slot, n) == mixed.result(slot, n), name_of(format), " threads ", num_threads, " slot ",
                  slot, " length ", n);
          }
        }
      }
    }
  });
}

// One long sequence alone is split over segments, beside others it is not; in a prefill it never is.
void splitting_a_long_sequence_changes_nothing() {
  on_each_format([](MatmulFormat format) {
    Run alone(format, kPlain, 4), beside(format, kPlain, 1), prefilled(format, kPlain, 2);
    alone.step({{0, 1200}});
    alone.step({{0, 1}});
    beside.step({{0, 700}, {1, 600}});
    beside.step({{0, 500}, {1, 600}});
    beside.step({{0, 1}, {1, 1}});
    prefilled.step({{0, 1201}});
    CHECK(alone.result(0, 1201) == beside.result(0, 1201) && alone.result(0, 1201) == prefilled.result(0, 1201),
          name_of(format));
  });
}

// A later entry reads blocks that an earlier entry of the same step computes.
void shared_blocks_of_one_step_are_read_after_they_are_written() {
  on_each_format([](MatmulFormat format) {
    for (const int num_threads : {1, 3}) {
      Run apart(format, kPlain, 1), shared(format, kPlain, num_threads);
      for (Run* run : {&apart, &shared}) {
        for (int64_t i = 0; i < 64; ++i) run->token(1, i) = run->token(0, i);
      }
      for (int64_t b = 0; b < 4; ++b) shared.block(1, b) = shared.block(0, b);
      apart.step({{0, 70}});
      apart.step({{1, 90}});
      shared.skip(1, 64);
      shared.step({{0, 70}, {1, 26}});
      CHECK(apart.result(0, 70) == shared.result(0, 70) && apart.result(1, 90) == shared.result(1, 90),
            name_of(format));
    }
  });
}

// Decodes of sequences that begin with the same blocks are grouped, except where there is nothing to gain; beside them
// a prompt is prefilled.
void shared_prefixes_are_read_once_without_a_difference() {
  on_each_format([](MatmulFormat format) {
    for (const ModelShape& shape : {kPlain, kPadded}) {
      Run apart(format, shape, 1);
      apart.model().read_apart();
      decode_with_common_prefix(apart);
      const double bytes_apart = apart.model().counters().kv_bytes;
      for (const int num_threads : {1, 2, 3}) {
        Run together(format, shape, num_threads);
        decode_with_common_prefix(together);
        for (int32_t slot = 0; slot < 4; ++slot) {
          const int64_t last = 702 + (slot > 0 ? 1 : 0) + (slot > 2 ? 1 : 0);
          for (const int64_t n : {last - 1, last}) {
            CHECK(apart.result(slot, n) == together.result(slot, n), name_of(format), " threads ", num_threads,
                  " slot ", slot, " length ", n);
          }
        }
        const double per_token = 4.0 * static_cast<double>(shape.num_layers * shape.kv_width());
        const double saved = (bytes_apart - together.model().counters().kv_bytes) / per_token;
        // Of 700 common tokens 10 chunks are whole. In one step slot 1 reads them along with slot 0, in the next all
        // do.
        if (num_threads == 1) CHECK(saved == (1 + 3) * 640, name_of(format), " saved ", saved);
        CHECK(saved >= 0.0);
      }
    }
  });
}

// Steps of all kinds: prompts beside decodes, long decodes in segments, blocks written and read in one step, a prefix
// that is shared, a single sequence.
void run_all_kinds_of_steps(Run& run) {
  for (int64_t b = 0; b < 2; ++b) run.block(2, b) = run.block(1, b);
  for (int64_t i = 0; i < 32; ++i) run.token(2, i) = run.token(1, i);
  run.skip(2, 32);
  run.step({{1, 40}, {2, 1}, {0, 1250}});  // slot 2 reads what slot 1 writes
  run.step({{0, 1}, {1, 1}, {2, 1}, {3, 600}});
  run.step({{0, 1}, {1, 1}, {2, 1}, {3, 1}});
  run.step({{2, 2}});
  run.step({{0, 1}, {3, 30}});
  run.step({{3, 1}});
}

// One token completes blocks that a prompt in the same step reads, beside a longer decode.
void complete_blocks_for_a_reader(Run& run) {
  for (int64_t b = 0; b < 4; ++b) run.block(2, b) = run.block(1, b);
  for (int64_t i = 0; i < 64; ++i) run.token(2, i) = run.token(1, i);
  run.skip(2, 64);
  run.step({{0, 200}, {1, 63}});
  run.step({{0, 1}, {1, 1}, {2, 80}});
}

void overlap_that_cannot_be_is_refused() {
  Run run({Isa::kPortable}, kPlain, 1);
  for (const auto& [chunk, flop, step] : {std::array<int64_t, 3>{0, 1, 1}, {1, 0, 1}, {1, 1, 0}, {1, 1, 129}}) {
    OverlapOptions overlap;
    overlap.chunk_bytes = chunk;
    overlap.tile_flop = flop;
    overlap.step_bytes = step;
    CHECK(test::throws<std::invalid_argument>([&] { run.model().set_overlap(overlap); }));
  }
}

void overlap_reads_only_what_is_written() {
  OverlapOptions overlap;
  overlap.mode = OverlapMode::kOn;
  on_each_format([&](MatmulFormat format) {
    Run apart(format, kPlain, 1);
    complete_blocks_for_a_reader(apart);
    for (const int num_threads : {1, 2, 5}) {
      Run run(format, kPlain, num_threads);
      run.model().set_overlap(overlap);
      complete_blocks_for_a_reader(run);
      CHECK(run.results() == apart.results(), name_of(format), " on ", num_threads, " threads");
    }
  });
}

void overlap_changes_no_bit() {
  OverlapOptions overlap;
  overlap.mode = OverlapMode::kOn;
  on_each_format([&](MatmulFormat format) {
    for (const ModelShape& shape : {kPlain, kPadded}) {
      Run apart(format, shape, 1);
      run_all_kinds_of_steps(apart);
      CHECK(apart.model().counters().num_overlapped_steps == 0);
      for (const int num_threads : {1, 2, 5, 8}) {
        Run run(format, shape, num_threads);
        overlap.tile_flop = num_threads == 5 ? 1 : 5'000'000;
        overlap.memory_lanes = num_threads / 2;
        run.model().set_overlap(overlap);
        run_all_kinds_of_steps(run);
        CHECK(run.model().counters().num_overlapped_steps >= 4, run.model().counters().num_overlapped_steps);
        CHECK(run.results() == apart.results(), name_of(format), " on ", num_threads, " threads");
      }
    }
  });
}

void overlap_is_for_steps_where_it_pays() {
  const WorkRates rates = {
      .flop_per_row = 2e8, .flop_per_attended_token = 7e4, .kv_bytes_per_token = 2e4, .weight_bytes = 2e8};
  OverlapOptions options;
  options.mode = OverlapMode::kAuto;
  options.compute_delay = options.memory_delay = 0.6;
  const StepWork balanced = {500, 1'000'000, 0}, prefill = {1000, 0, 500'000}, decode = {8, 4000, 0};
  CHECK(overlap_pays(balanced, rates, options));
  CHECK(!overlap_pays(prefill, rates, options));
  CHECK(!overlap_pays(decode, rates, options));  // reading the weights again costs more
  options.weight_bytes_per_s = 1e15;
  CHECK(overlap_pays(decode, rates, options));
  // 2 x 10 ms for the weights; from 20 ms of arithmetic on, which is 17 rows, they are hidden twice.
  options.weight_bytes_per_s = 20e9;
  const StepWork few = {8, 20'000, 0}, many = {20, 20'000, 0};
  CHECK(!overlap_pays(few, rates, options));
  CHECK(overlap_pays(many, rates, options));
  options.compute_delay = options.memory_delay = 1.0;
  CHECK(!overlap_pays(balanced, rates, options));
  options.mode = OverlapMode::kOn;
  CHECK(overlap_pays(prefill, rates, options));
  options.mode = OverlapMode::kOff;
  CHECK(!overlap_pays(balanced, rates, options));
}

void logits_agree_with_steps() {
  on_each_format([](MatmulFormat format) {
    Run run(format, kPlain, 2);
    std::vector<float> logits(static_cast<size_t>(150 * kPlain.vocab_size));
    run.model().logits({&run.token(0, 0), 150}, logits.data());
    for (const int32_t length : {40, 150}) {
      run.skip(0, 0);
      run.step({{0, length}});
      const float* row = &logits[static_cast<size_t>((length - 1) * kPlain.vocab_size)];
      const float* best = std::max_element(row, row + kPlain.vocab_size);
      CHECK(run.result(0, length).token == best - row, name_of(format));
    }
  });
}

void one_poisoned_sequence_spares_the_others() {
  ModelWeights weights = Weights(best_isa(), kPlain).make(false);
  weights.embedding = Buffer<uint16_t>(kPlain.vocab_size * kPlain.hidden_size);
  std::fill_n(weights.embedding.data(), weights.embedding.size(), uint16_t{0x3f80});
  std::fill_n(weights.embedding.data(), kPlain.hidden_size, uint16_t{0x7fc0});  // token 0 is not a number
  Model model(best_isa(), kPlain, kLimits, std::move(weights), 2);
  SamplingParams params;
  params.temperature = 0.0f;
  params.num_logprobs = 0;
  model.admit(0, params);
  model.admit(1, params);
  const std::vector<int32_t> tokens = {0, 0, 0, 0, 5, 6, 7, 8}, blocks = {0, 1}, slots = {0, 1}, counts = {4, 3},
                             zeros = {0, 0};
  const bool is_sampled[] = {true, true};
  const auto samples = model.step({slots, counts, zeros, is_sampled, tokens.data(), 4, blocks.data(), 1, 2});
  CHECK(std::isnan(samples[0].logprob) && !std::isnan(samples[1].logprob));
  const float before = samples[1].logprob;
  const std::vector<int32_t> reused = {1, 0};  // now the block of the poisoned sequence holds the clean one
  const auto again = model.step({slots, counts, zeros, is_sampled, tokens.data(), 4, reused.data(), 1, 2});
  CHECK(again[1].logprob == before);
}

void plans_that_do_not_fit_are_refused() {
  Run run(best_isa(), kPlain, 1);
  using Error = std::invalid_argument;
  CHECK(test::throws<Error>([&] { run.step({{0, 1301}}); }));
  CHECK(test::throws<Error>([&] { run.step({{0, 1300}, {1, 101}}); }));
  CHECK(test::throws<Error>([&] { run.step({{4, 1}}); }));
  CHECK(test::throws<Error>([&] { run.step({{0, 0}}); }));
  CHECK(test::throws<Error>([&] { run.step({{0, 1}, {1, 1}, {2, 1}, {3, 1}, {0, 1}}); }));
  run.token(0, 5) = 97;
  CHECK(test::throws<Error>([&] { run.step({{0, 6}}); }));
  run.block(1, 1) = static_cast<int32_t>(kLimits.num_blocks);
  CHECK(test::throws<Error>([&] { run.step({{1, 17}}); }));
  CHECK(test::throws<Error>([&] { run.model().admit(4, {}); }));
  SamplingParams params;
  params.logit_bias = {{97, 1.0f}};
  CHECK(test::throws<Error>([&] { run.model().admit(0, params); }));
  CHECK(test::throws<Error>([&] {
    ModelShape other = kPlain;
    other.hidden_size = 64;
    Model(best_isa(), other, kLimits, Weights(best_isa(), kPlain).make(false), 1);
  }));
  CHECK(test::throws<Error>([&] {  // one matrix in another format
    ModelWeights weights = Weights(best_isa(), kPlain).make(false);
    weights.layers[1].o = std::move(Weights({best_isa(), Dtype::kInt8}, kPlain).make(false).layers[1].o);
    Model(best_isa(), kPlain, kLimits, std::move(weights), 1);
  }));
  run.step({{1, 16}});  // and the model still works
}

void counters_add_up() {
  Run run(best_isa(), kPlain, 1);
  run.step({{0, 20}});
  run.step({{0, 1}, {1, 3}});
  const StepCounters& counters = run.model().counters();
  CHECK(counters.num_steps == 2 && counters.num_tokens == 24);
  const double per_token = 2.0 * 2 * 48 * (160 + 96 + 240), per_head_row = 2.0 * 97 * 48;
  CHECK(counters.matmul_flop == 24 * per_token + 3 * per_head_row);
  CHECK(counters.attention_flop == 4.0 * 2 * 96 * (210 + 21 + 6));
  CHECK(counters.kv_bytes == 4.0 * 2 * 32 * (20 + 21 + 3));
}

// Every op of every layer once per worker at most, and all time in them within the step.
void a_trace_holds_the_ops_of_a_step() {
  Run run(best_isa(), kPlain, 2);
  run.step({{0, 70}});
  CHECK(run.model().trace().spans(0).empty());
  run.model().trace().start();
  const int64_t begin = TraceRecorder::now_ns();
  run.step({{0, 1}, {1, 30}});
  const int64_t end = TraceRecorder::now_ns();
  run.model().trace().stop();
  std::map<std::pair<int32_t, int32_t>, int> seen;  // by op and layer
  for (int worker = 0; worker < 2; ++worker) {
    for (const TraceSpan& span : run.model().trace().spans(worker)) {
      CHECK(begin <= span.begin_ns && span.begin_ns <= span.end_ns && span.end_ns <= end);
      CHECK(span.busy_ns <= span.end_ns - span.begin_ns);
      ++seen[{span.op, span.layer}];
    }
  }
  for (int op = 0; op < kNumOps; ++op) {
    const bool is_of_layer = op >= static_cast<int>(Op::kNorm) && op <= static_cast<int>(Op::kDown);
    for (int32_t layer = is_of_layer ? 0 : -1; layer < (is_of_layer ? 2 : 0); ++layer) {
      CHECK(seen.contains({op, layer}), op_name(static_cast<Op>(op)), " layer ", layer);
    }
  }
  run.step({{0, 1}});
  CHECK(run.model().trace().num_lost() == 0);
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(steps_do_not_depend_on_batch_chunks_or_threads);
  RUN(splitting_a_long_sequence_changes_nothing);
  RUN(shared_blocks_of_one_step_are_read_after_they_are_written);
  RUN(shared_prefixes_are_read_once_without_a_difference);
  RUN(overlap_changes_no_bit);
  RUN(overlap_reads_only_what_is_written);
  RUN(overlap_that_cannot_be_is_refused);
  RUN(overlap_is_for_steps_where_it_pays);
  RUN(logits_agree_with_steps);
  RUN(one_poisoned_sequence_spares_the_others);
  RUN(plans_that_do_not_fit_are_refused);
  RUN(counters_add_up);
  RUN(a_trace_holds_the_ops_of_a_step);
}
