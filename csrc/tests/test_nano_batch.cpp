// How steps are split: every row once, decodes by what they read, nobody before whom it reads from.
#include <cstdlib>
#include <memory>
#include <vector>

#include "check.h"
#include "kv_cache.h"
#include "nano_batch.h"
#include "ops/matmul.h"

namespace blendserve {
namespace {

constexpr int64_t kMaxSeqs = 2000;
constexpr int64_t kLength = 256;
constexpr int64_t kBlocksEach = kLength / kBlockSize;
constexpr BatchLimits kLimits = {kMaxSeqs, 8192, kLength, kMaxSeqs * kBlocksEach, 100};

struct Plan {
  std::vector<int32_t> slots, scheduled, computed;
  std::vector<int32_t> tokens = std::vector<int32_t>(kMaxSeqs * kLength, 1);
  std::vector<int32_t> blocks;
  std::unique_ptr<bool[]> is_sampled = std::make_unique<bool[]>(kMaxSeqs);

  Plan() {
    for (int32_t b = 0; b < kMaxSeqs * kBlocksEach; ++b) blocks.push_back(b);
  }
  void add(int32_t num_tokens, int32_t num_computed) {
    slots.push_back(static_cast<int32_t>(slots.size()));
    scheduled.push_back(num_tokens);
    computed.push_back(num_computed);
  }
  int32_t& block(int64_t slot, int64_t index) { return blocks[static_cast<size_t>(slot * kBlocksEach + index)]; }
  // The first blocks of a slot are another's.
  void share(int64_t slot, int64_t other, int64_t num_blocks) {
    for (int64_t b = 0; b < num_blocks; ++b) block(slot, b) = block(other, b);
  }
  StepInput input() const {
    return {slots, scheduled, computed, is_sampled.get(), tokens.data(), kLength, blocks.data(), kBlocksEach, kMaxSeqs};
  }
};

// Every row of the plan is in one part, in order.
void check_parts(const NanoBatchSplit& split, const Plan& plan) {
  std::vector<int32_t> num_seen(plan.slots.size());
  for (int n = 0; n < 2; ++n) {
    int32_t last = -1;
    for (const BatchPart& part : split.parts(n)) {
      CHECK(part.index > last && part.count > 0);
      last = part.index;
      CHECK(num_seen[static_cast<size_t>(part.index)] == part.first);
      num_seen[static_cast<size_t>(part.index)] += part.count;
    }
  }
  CHECK(num_seen == plan.scheduled);
}

int64_t num_rows(const NanoBatchSplit& split, int n) {
  int64_t rows = 0;
  for (const BatchPart& part : split.parts(n)) rows += part.count;
  return rows;
}

void both_parts_have_half_of_the_work() {
  NanoBatchSplit split(kLimits);
  Plan plan;
  for (int32_t i = 0; i < 40; ++i) plan.add(1, 100 + 3 * i);
  plan.add(200, 0);
  plan.add(100, 50);
  const StepWork work = split.look_at(plan.input());
  CHECK(work.num_rows == 340);
  CHECK(work.num_decode_tokens == 40 * 101 + 3 * 39 * 40 / 2);
  CHECK(work.num_attended_tokens == 200 * 201 / 2 + 100 * 50 + 100 * 101 / 2);
  CHECK(split.split(plan.input()));
  check_parts(split, plan);
  // Half of 340, up to the next row panel and block.
  CHECK(num_rows(split, 0) >= 170 && num_rows(split, 0) < 170 + kRowPanel + kBlockSize, num_rows(split, 0));
  CHECK(split.is_second_after_first());  // the prompt of 200 is cut
  int64_t num_read[2] = {0, 0};
  for (int n = 0; n < 2; ++n) {
    for (const BatchPart& part : split.parts(n)) {
      if (part.index < 40) num_read[n] += plan.computed[static_cast<size_t>(part.index)] + 1;
    }
  }
  CHECK(std::abs(num_read[0] - num_read[1]) <= 220, num_read[0], " ", num_read[1]);
}

// The attention of the first part loads whole blocks while the second part writes its own.
void entries_are_cut_between_blocks() {
  NanoBatchSplit split(kLimits);
  for (int32_t computed = 0; computed < 40; ++computed) {
    Plan plan;
    plan.add(1, 30);
    plan.add(200, computed);
    split.look_at(plan.input());
    CHECK(split.split(plan.input()));
    check_parts(split, plan);
    const BatchPart& last = split.parts(0).back();
    CHECK(last.index == 1 && last.count < 200 && (computed + last.count) % kBlockSize == 0, last.count);
  }
}

void decodes_alone_need_no_order() {
  NanoBatchSplit split(kLimits);
  Plan plan;
  for (int32_t i = 0; i < kMaxSeqs; ++i) plan.add(1, i % 250);
  split.look_at(plan.input());
  CHECK(split.split(plan.input()));
  CHECK(!split.is_second_after_first());
  check_parts(split, plan);
}

void one_row_cannot_be_split() {
  NanoBatchSplit split(kLimits);
  Plan plan;
  plan.add(1, 80);
  split.look_at(plan.input());
  CHECK(!split.split(plan.input()));
  split.keep_whole(plan.input());
  check_parts(split, plan);
  CHECK(split.parts(1).empty());
}

// A sequence whose last prompt token is all that is left to compute looks like a decode; what it reads is written in
// the same step.
void readers_do_not_go_before_writers() {
  NanoBatchSplit split(kLimits);
  Plan plan;
  plan.add(1, 200);  // a decode
  plan.add(64, 0);   // writes four blocks
  plan.add(1, 64);   // reads them
  plan.share(2, 1, 4);
  split.look_at(plan.input());
  CHECK(split.split(plan.input()));
  CHECK(split.is_second_after_first());
  check_parts(split, plan);
  for (const BatchPart& part : split.parts(0)) CHECK(part.index != 2);
}

// The last token of a prompt looks like a decode, which may go to the second part; who reads what it writes must not
// be in the first.
void a_reader_of_what_a_single_token_completes_keeps_the_step_whole() {
  NanoBatchSplit split(kLimits);
  Plan plan;
  plan.add(1, 200);  // a decode
  plan.add(1, 63);   // completes four blocks
  plan.add(80, 64);  // reads them
  plan.share(2, 1, 4);
  split.look_at(plan.input());
  CHECK(!split.split(plan.input()));
}

void a_reader_before_its_writer_keeps_the_step_whole() {
  NanoBatchSplit split(kLimits);
  Plan plan;
  plan.add(1, 64);
  plan.add(64, 0);
  plan.share(0, 1, 4);
  split.look_at(plan.input());
  CHECK(!split.split(plan.input()));
  // The next step has forgotten who wrote what.
  Plan next;
  next.add(1, 64);
  next.add(1, 64);
  split.look_at(next.input());
  CHECK(split.split(next.input()));
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(both_parts_have_half_of_the_work);
  RUN(entries_are_cut_between_blocks);
  RUN(decodes_alone_need_no_order);
  RUN(one_row_cannot_be_split);
  RUN(readers_do_not_go_before_writers);
  RUN(a_reader_of_what_a_single_token_completes_keeps_the_step_whole);
  RUN(a_reader_before_its_writer_keeps_the_step_whole);
}
