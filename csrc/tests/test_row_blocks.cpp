// Ops from one attention to the next on blocks of rows: the bits of the same ops one by one.
#include <vector>

#include "check.h"
#include "model_runs.h"

namespace blendserve {
namespace {

using test::Run, test::name_of, test::on_each_format;

// Widths of MLPs whose int8 groups are 192 and 208 inputs: chunks of one group and of two, the last one shorter. Small
// enough for an L2 cache of 256 KiB.
constexpr ModelShape kOneGroup = {97, 48, 544, 2, 6, 2, 16, 1e-5f};
constexpr ModelShape kTwoGroups = {97, 40, 608, 2, 4, 4, 10, 1e-5f};  // head size 10, with q/k norm and bias
constexpr ModelShape kUneven = {97, 48, 80, 2, 6, 2, 16, 1e-5f};      // the ups begin inside a panel

// Chunks of prompts and decodes, few rows and many.
int run_steps(Run& run) {
  int num_in_blocks = 0;
  const auto step = [&](const std::vector<Run::Entry>& entries) {
    run.step(entries);
    num_in_blocks += run.model().was_in_blocks();
  };
  step({{0, 32}, {1, 1}});
  step({{0, 1}, {1, 64}, {2, 3}});
  step({{0, 1}, {1, 1}, {2, 1}});
  step({{0, 200}, {1, 1}, {2, 1}, {3, 337}});
  step({{0, 1}, {3, 1}, {2, 700}});
  return num_in_blocks;
}

void blocks_change_no_bit() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    for (const ModelShape& shape : {kOneGroup, kTwoGroups}) {
      Run apart(format, shape, 1, kv_dtype);
      apart.model().run_ops_apart();
      CHECK(run_steps(apart) == 0);
      for (const int num_threads : {1, 2, 5}) {
        Run run(format, shape, num_threads, kv_dtype);
        CHECK(run_steps(run) == (num_threads == 1 ? 4 : num_threads == 2 ? 3 : 2), num_threads, " threads");
        CHECK(run.results() == apart.results(), name_of(format, kv_dtype), " on ", num_threads, " threads");
      }
    }
  });
}

void all_logits_are_the_same() {
  on_each_format([](MatmulFormat format, KvDtype kv_dtype) {
    for (const ModelShape& shape : {kOneGroup, kTwoGroups}) {
      std::vector<float> logits[2];
      for (const int num_threads : {1, 3}) {
        Run run(format, shape, num_threads, kv_dtype);
        if (num_threads == 1) run.model().run_ops_apart();
        std::vector<float>& out = logits[num_threads == 1 ? 0 : 1];
        out.resize(static_cast<size_t>(301 * shape.vocab_size));
        run.model().logits({&run.token(0, 0), 301}, out.data());
      }
      CHECK(logits[0] == logits[1], name_of(format, kv_dtype));
    }
  });
}

void time_is_counted_by_op() {
  Run run(best_isa(), kOneGroup, 2);
  run.step({{0, 300}});
  CHECK(run.model().was_in_blocks());
  for (const Op op : {Op::kEmbed, Op::kNorm, Op::kQkv, Op::kRotate, Op::kPackAttention, Op::kOutput, Op::kGateUp,
                      Op::kActivate, Op::kDown}) {
    CHECK(run.model().counters().op_s[static_cast<size_t>(op)] > 0.0, op_name(op));
  }
}

void spans_are_traced_by_op() {
  Run run(best_isa(), kOneGroup, 2);
  run.model().trace().start();
  run.step({{0, 300}});
  bool has_down_of_last_layer = false;
  for (int worker = 0; worker < 2; ++worker) {
    for (const TraceSpan& span : run.model().trace().spans(worker)) {
      CHECK(span.begin_ns <= span.end_ns);
      CHECK(span.layer < kOneGroup.num_layers, span.layer);
      has_down_of_last_layer |= span.op == static_cast<int32_t>(Op::kDown) && span.layer == kOneGroup.num_layers - 1;
    }
  }
  CHECK(has_down_of_last_layer);
}

void other_widths_go_op_by_op() {
  Run run(best_isa(), kUneven, 1);
  run.step({{0, 300}});
  CHECK(!run.model().was_in_blocks());
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(blocks_change_no_bit);
  RUN(all_logits_are_the_same);
  RUN(time_is_counted_by_op);
  RUN(spans_are_traced_by_op);
  RUN(other_widths_go_op_by_op);
}
