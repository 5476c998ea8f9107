// Steps as two nano-batches: when they are, and that it never shows in a result.
#include <array>
#include <stdexcept>

#include "check.h"
#include "model_runs.h"

namespace blendserve {
namespace {

using test::Run, test::kPlain, test::kPadded, test::name_of, test::on_each_format;

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

void overlap_changes_no_bit() {
  OverlapOptions overlap;
  overlap.mode = OverlapMode::kOn;
  overlap.kv_bytes_per_s = 1.0;  // any decode has much to fetch
  on_each_format([&](MatmulFormat format, KvDtype kv_dtype) {
    for (const ModelShape& shape : {kPlain, kPadded}) {
      Run apart(format, shape, 1, kv_dtype);
      run_all_kinds_of_steps(apart);
      CHECK(apart.model().counters().num_overlapped_steps == 0);
      for (const int num_threads : {1, 2, 5, 8}) {
        Run run(format, shape, num_threads, kv_dtype);
        overlap.tile_flop = num_threads == 5 ? 1 : 5'000'000;
        overlap.memory_lanes = num_threads / 2;
        run.model().set_overlap(overlap);
        run_all_kinds_of_steps(run);
        CHECK(run.model().counters().num_overlapped_steps >= 3, run.model().counters().num_overlapped_steps);
        CHECK(run.results() == apart.results(), name_of(format, kv_dtype), " on ", num_threads, " threads");
      }
    }
  });
}

void overlap_reads_only_what_is_written() {
  OverlapOptions overlap;
  overlap.mode = OverlapMode::kOn;
  overlap.kv_bytes_per_s = 1.0;  // any decode has much to fetch
  on_each_format([&](MatmulFormat format, KvDtype kv_dtype) {
    Run apart(format, kPlain, 1, kv_dtype);
    complete_blocks_for_a_reader(apart);
    for (const int num_threads : {1, 2, 5}) {
      Run run(format, kPlain, num_threads, kv_dtype);
      run.model().set_overlap(overlap);
      complete_blocks_for_a_reader(run);
      CHECK(run.results() == apart.results(), name_of(format, kv_dtype), " on ", num_threads, " threads");
    }
  });
}

void overlap_that_cannot_be_is_refused() {
  Run run({Isa::kPortable}, kPlain, 1);
  for (const auto& [chunk, flop, iteration] : {std::array<int64_t, 3>{0, 1, 1}, {1, 0, 1}, {1, 1, 0}, {1, 1, 129}}) {
    OverlapOptions overlap;
    overlap.chunk_bytes = chunk;
    overlap.tile_flop = flop;
    overlap.iteration_bytes = iteration;
    CHECK(test::throws<std::invalid_argument>([&] { run.model().set_overlap(overlap); }));
  }
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
  CHECK(overlap_pays(decode, rates, options));
  CHECK(!overlap_pays(prefill, rates, options));  // there is nothing to fetch
  // Products of 500 rows take 100e9 / 165e9 s; a sixteenth of that is 34,091 tokens of KV at 18e9 bytes/s.
  CHECK(!overlap_pays({500, 34'000, 0}, rates, options) && overlap_pays({500, 34'200, 0}, rates, options));
  options.mode = OverlapMode::kOff;
  CHECK(!overlap_pays(balanced, rates, options));
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(overlap_changes_no_bit);
  RUN(overlap_reads_only_what_is_written);
  RUN(overlap_that_cannot_be_is_refused);
  RUN(overlap_is_for_steps_where_it_pays);
}
