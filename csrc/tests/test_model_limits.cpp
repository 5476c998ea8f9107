// What a model refuses: plans, shapes, limits and weights that do not go together.
#include <limits>
#include <stdexcept>
#include <utility>

#include "check.h"
#include "model_runs.h"

namespace blendserve {
namespace {

using test::Run, test::Weights, test::kLimits, test::kPlain;

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

template <class Change>
bool refuses_limits(Change change) {
  ModelLimits limits = kLimits;
  change(limits);
  return test::throws<std::invalid_argument>(
      [&] { Model(best_isa(), kPlain, limits, Weights(best_isa(), kPlain).make(false), 1); });
}

template <class Change>
bool refuses_shape(Change change) {
  ModelShape shape = kPlain;
  change(shape);
  return test::throws<std::invalid_argument>(
      [&] { Model(best_isa(), shape, kLimits, Weights(best_isa(), kPlain).make(false), 1); });
}

// Before memory is taken: none of these may reach an allocation, a division or a loop.
void numbers_out_of_range_are_refused() {
  constexpr int64_t kHuge = int64_t{1} << 58;
  for (const int64_t wrong : {int64_t{0}, int64_t{-1}, kHuge}) {
    CHECK(refuses_limits([=](ModelLimits& limits) { limits.max_num_seqs = wrong; }), wrong);
    CHECK(refuses_limits([=](ModelLimits& limits) { limits.max_num_batched_tokens = wrong; }), wrong);
    CHECK(refuses_limits([=](ModelLimits& limits) { limits.max_model_len = wrong; }), wrong);
    CHECK(refuses_limits([=](ModelLimits& limits) { limits.num_blocks = wrong; }), wrong);
    CHECK(refuses_shape([=](ModelShape& shape) { shape.vocab_size = wrong; }), wrong);
    CHECK(refuses_shape([=](ModelShape& shape) { shape.num_layers = wrong; }), wrong);
    CHECK(refuses_shape([=](ModelShape& shape) { shape.num_heads = wrong; }), wrong);
    CHECK(refuses_shape([=](ModelShape& shape) { shape.num_kv_heads = wrong; }), wrong);
    CHECK(refuses_shape([=](ModelShape& shape) { shape.head_dim = wrong; }), wrong);
  }
  CHECK(refuses_shape([](ModelShape& shape) { shape.head_dim = 15; }));
  CHECK(refuses_shape([](ModelShape& shape) { shape.num_kv_heads = 4; }));  // of 6 query heads
  CHECK(test::throws<std::invalid_argument>(
      [&] { Model(best_isa(), kPlain, kLimits, Weights(best_isa(), kPlain).make(false), 0); }));
}

void arrays_that_no_memory_has_are_refused() {
  using Error = std::invalid_argument;
  CHECK(test::throws<Error>([] { Buffer<float>(-1); }));
  CHECK(test::throws<Error>([] { Buffer<double>(int64_t{1} << 61); }));  // 2^64 bytes: 0 where they wrap
  CHECK(test::throws<Error>([] { checked_product({int64_t{1} << 32, int64_t{1} << 31}); }));
  CHECK(test::throws<Error>([] { checked_product({2, -1}); }));
  CHECK(checked_product({}) == 1 && checked_product({3, 5, 7}) == 105 && checked_product({int64_t{1} << 40, 0}) == 0);
}

void empty_steps_are_refused() {
  Run run(best_isa(), kPlain, 1);
  CHECK(test::throws<std::invalid_argument>([&] { run.step({}); }));
  run.step({{1, 16}});
}

// Their penalties count tokens that earlier steps computed; other sequences never look at those.
void penalties_over_unknown_tokens_are_refused() {
  Run run(best_isa(), kPlain, 1);
  run.step({{0, 20}, {1, 20}});
  SamplingParams params;
  params.frequency_penalty = 0.5f;
  run.model().admit(0, params);
  for (const int32_t unknown : {97, -1, 1'000'000'000}) {
    run.token(0, 3) = unknown;
    run.token(1, 3) = unknown;
    CHECK(test::throws<std::invalid_argument>([&] { run.step({{0, 1}}); }), unknown);
  }
  run.step({{1, 1}});
}

void sampling_params_out_of_range_are_refused() {
  Run run(best_isa(), kPlain, 1);
  const auto is_refused = [&](auto change) {
    SamplingParams params;
    change(params);
    return test::throws<std::invalid_argument>([&] { run.model().admit(0, params); });
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  CHECK(is_refused([](SamplingParams& params) { params.temperature = kNan; }));
  CHECK(is_refused([](SamplingParams& params) { params.temperature = -1.0f; }));
  CHECK(is_refused([](SamplingParams& params) { params.top_p = kNan; }));
  CHECK(is_refused([](SamplingParams& params) { params.min_p = 1.5f; }));
  CHECK(is_refused([](SamplingParams& params) { params.repetition_penalty = 0.0f; }));
  CHECK(is_refused([](SamplingParams& params) { params.presence_penalty = kNan; }));
  CHECK(is_refused([](SamplingParams& params) { params.frequency_penalty = kNan; }));
  CHECK(is_refused([](SamplingParams& params) { params.num_prompt_tokens = -1; }));
  CHECK(is_refused([](SamplingParams& params) { params.logit_bias = {{-1, 1.0f}}; }));
  CHECK(is_refused([](SamplingParams& params) { params.allowed_token_ids = {0, 97}; }));
  CHECK(is_refused([](SamplingParams& params) { params.allowed_token_ids = std::vector<int32_t>(98, 1); }));
  CHECK(is_refused([](SamplingParams& params) { params.bad_words = {{1}, {}}; }));
  CHECK(is_refused([](SamplingParams& params) { params.bad_words = {{1, -1}}; }));
  CHECK(!is_refused([](SamplingParams&) {}));
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(plans_that_do_not_fit_are_refused);
  RUN(numbers_out_of_range_are_refused);
  RUN(arrays_that_no_memory_has_are_refused);
  RUN(empty_steps_are_refused);
  RUN(penalties_over_unknown_tokens_are_refused);
  RUN(sampling_params_out_of_range_are_refused);
}
