// What a model tells of its steps: counters and traces.
#include <map>
#include <utility>

#include "check.h"
#include "model_runs.h"

namespace blendserve {
namespace {

using test::Run, test::kPlain;

void counters_add_up(KvDtype kv_dtype, double bytes_per_head) {
  Run run(best_isa(), kPlain, 1, kv_dtype);
  run.step({{0, 20}});
  run.step({{0, 1}, {1, 3}});
  const StepCounters& counters = run.model().counters();
  CHECK(counters.num_steps == 2 && counters.num_tokens == 24);
  const double per_token = 2.0 * 2 * 48 * (160 + 96 + 240), per_head_row = 2.0 * 97 * 48;
  CHECK(counters.matmul_flop == 24 * per_token + 3 * per_head_row);
  CHECK(counters.attention_flop == 4.0 * 2 * 96 * (210 + 21 + 6));
  CHECK(counters.kv_bytes == 2 * 2 * bytes_per_head * (20 + 21 + 3));
  CHECK(static_cast<double>(run.model().num_kv_bytes()) == 2 * 2 * bytes_per_head * 16 * test::kLimits.num_blocks);
}

// A head of 16 channels: two bytes per element of keys and of values, or one and two scales of two bytes per token.
void counters_add_up_with_kv_in_bf16() { counters_add_up(KvDtype::kBf16, 64); }
void counters_add_up_with_kv_in_int8() { counters_add_up(KvDtype::kInt8, 36); }

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
  RUN(counters_add_up_with_kv_in_bf16);
  RUN(counters_add_up_with_kv_in_int8);
  RUN(a_trace_holds_the_ops_of_a_step);
}
