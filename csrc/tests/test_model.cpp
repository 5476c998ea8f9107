// Whole steps of a tiny random model: the same bits whatever is computed beside a sequence, in whatever chunks, on any
// number of threads. That the arithmetic is the model's is tests/executors' business, against the NumPy reference.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "model_runs.h"

namespace blendserve {
namespace {

using test::Run, test::Weights, test::kLimits, test::kPlain, test::kPadded, test::name_of, test::on_each_format;

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

void steps_do_not_depend_on_batch_chunks_or_threads() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    for (const ModelShape& shape : {kPlain, kPadded}) {
      Run whole(format, shape, 1, kv_dtype);
      for (int32_t slot = 0; slot < 4; ++slot) {
        whole.step({{slot, 70 + 9 * slot}});
        for (int i = 0; i < 3; ++i) whole.step({{slot, 1}});
      }
      for (const int num_threads : {1, 2, 3, 4}) {
        Run mixed(format, shape, num_threads, kv_dtype);
        mixed.step({{3, 97}, {0, 13}, {1, 64}});
        mixed.step({{0, 57}, {3, 1}, {1, 15}});
        mixed.step({{2, 88}, {3, 1}, {1, 1}, {0, 1}});
        mixed.step({{0, 1}, {1, 1}, {2, 1}, {3, 1}});
        for (int32_t slot = 0; slot < 4; ++slot) {
          const int64_t length = 70 + 9 * slot;
          for (int64_t n = length; n < length + (slot == 2 ? 2 : 3); ++n) {
            CHECK(whole.result(slot, n) == mixed.result(slot, n), name_of(format, kv_dtype), " threads ", num_threads,
                  " slot ", slot, " length ", n);
          }
        }
      }
    }
  });
}

// One long sequence alone is split over segments, beside others it is not; in a prefill it never is.
void splitting_a_long_sequence_changes_nothing() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    Run alone(format, kPlain, 4, kv_dtype), beside(format, kPlain, 1, kv_dtype), prefilled(format, kPlain, 2, kv_dtype);
    alone.step({{0, 1200}});
    alone.step({{0, 1}});
    beside.step({{0, 700}, {1, 600}});
    beside.step({{0, 500}, {1, 600}});
    beside.step({{0, 1}, {1, 1}});
    prefilled.step({{0, 1201}});
    CHECK(alone.result(0, 1201) == beside.result(0, 1201) && alone.result(0, 1201) == prefilled.result(0, 1201),
          name_of(format, kv_dtype));
  });
}

// A later entry reads blocks that an earlier entry of the same step computes.
void shared_blocks_of_one_step_are_read_after_they_are_written() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    for (const int num_threads : {1, 3}) {
      Run apart(format, kPlain, 1, kv_dtype), shared(format, kPlain, num_threads, kv_dtype);
      for (Run* run : {&apart, &shared}) {
        for (int64_t i = 0; i < 64; ++i) run->token(1, i) = run->token(0, i);
      }
      for (int64_t b = 0; b < 4; ++b) shared.block(1, b) = shared.block(0, b);
      apart.step({{0, 70}});
      apart.step({{1, 90}});
      shared.skip(1, 64);
      shared.step({{0, 70}, {1, 26}});
      CHECK(apart.result(0, 70) == shared.result(0, 70) && apart.result(1, 90) == shared.result(1, 90),
            name_of(format, kv_dtype));
    }
  });
}

// Decodes of sequences that begin with the same blocks are grouped, except where there is nothing to gain; beside them
// a prompt is prefilled.
void shared_prefixes_are_read_once_without_a_difference() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    for (const ModelShape& shape : {kPlain, kPadded}) {
      Run apart(format, shape, 1, kv_dtype);
      apart.model().read_apart();
      decode_with_common_prefix(apart);
      const double bytes_apart = apart.model().counters().kv_bytes;
      for (const int num_threads : {1, 2, 3}) {
        Run together(format, shape, num_threads, kv_dtype);
        decode_with_common_prefix(together);
        for (int32_t slot = 0; slot < 4; ++slot) {
          const int64_t last = 702 + (slot > 0 ? 1 : 0) + (slot > 2 ? 1 : 0);
          for (const int64_t n : {last - 1, last}) {
            CHECK(apart.result(slot, n) == together.result(slot, n), name_of(format, kv_dtype), " threads ",
                  num_threads, " slot ", slot, " length ", n);
          }
        }
        const auto per_token = static_cast<double>(shape.kv_bytes_per_token(kv_dtype));
        const double saved = (bytes_apart - together.model().counters().kv_bytes) / per_token;
        // Of 700 common tokens 10 chunks are whole. In one step slot 1 reads them along with slot 0, in the next all
        // do.
        if (num_threads == 1) CHECK(saved == (1 + 3) * 640, name_of(format, kv_dtype), " saved ", saved);
        CHECK(saved >= 0.0);
      }
    }
  });
}

void logits_agree_with_steps() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    Run run(format, kPlain, 2, kv_dtype);
    std::vector<float> logits(static_cast<size_t>(150 * kPlain.vocab_size));
    run.model().logits({&run.token(0, 0), 150}, logits.data());
    for (const int32_t length : {40, 150}) {
      run.skip(0, 0);
      run.step({{0, length}});
      const float* row = &logits[static_cast<size_t>((length - 1) * kPlain.vocab_size)];
      const float* best = std::max_element(row, row + kPlain.vocab_size);
      CHECK(run.result(0, length).token == best - row, name_of(format, kv_dtype));
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

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(steps_do_not_depend_on_batch_chunks_or_threads);
  RUN(splitting_a_long_sequence_changes_nothing);
  RUN(shared_blocks_of_one_step_are_read_after_they_are_written);
  RUN(shared_prefixes_are_read_once_without_a_difference);
  RUN(logits_agree_with_steps);
  RUN(one_poisoned_sequence_spares_the_others);
}
