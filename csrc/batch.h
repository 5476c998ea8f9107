// The rows of one step, gathered from a plan: which token at which position of which sequence, what attention has to
// read, and which rows are sampled. Knows nothing of weights.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sharing.h"

namespace blendserve {

// A plan as it arrives (engine/step.py's StepPlan): borrowed arrays, one entry per scheduled sequence.
struct StepInput {
  std::span<const int32_t> slots;
  std::span<const int32_t> num_scheduled_tokens;
  std::span<const int32_t> num_computed_tokens;
  const bool* is_sampled;
  const int32_t* token_ids;  // [num_slots][token_stride]
  int64_t token_stride;
  const int32_t* block_tables;  // [num_slots][block_stride]
  int64_t block_stride;
  int64_t num_slots;
};

// Rows [first, first + count) of what one entry of a plan is scheduled for.
struct BatchPart {
  int32_t index;
  int32_t first;
  int32_t count;
};

struct BatchLimits {
  int64_t max_num_seqs;
  int64_t max_num_batched_tokens;
  int64_t max_model_len;
  int64_t num_blocks;
  int64_t vocab_size;
};

// Throws std::invalid_argument where the plan does not fit the limits.
void check_plan(const StepInput& input, const BatchLimits& limits);

// Throws std::invalid_argument where a token before those that entry `at` of a checked plan is scheduled for is none.
void check_computed_tokens(const StepInput& input, size_t at, int64_t vocab_size);

// What attention needs of the model and the machine in order to cut tiles.
struct AttentionCut {
  int64_t num_kv_heads;
  int64_t group;  // query heads per KV head
  int64_t num_threads;
};

struct BatchRow {
  int32_t token;
  int32_t position;
  int32_t block;  // that holds this position
};

struct BatchEntry {
  int32_t index;  // in the plan
  int64_t slot;
  int64_t first_row;
  int64_t num_rows;
  int64_t first_position;
  const int32_t* token_ids;
  const int32_t* block_table;
};

// Query tokens [first_token, first_token + num_tokens) of one entry and one KV head; `segment` >= 0: that segment only,
// into partial result `partial`. Or, where `num_members` > 0, the only query tokens of members [first_member,
// first_member + num_members), whose first `num_shared_tokens` are read once.
struct AttentionTask {
  int32_t entry;
  int32_t kv_head;
  int32_t first_token;
  int32_t num_tokens;
  int32_t segment;
  int32_t partial;
  int64_t cost;
  int32_t first_member = 0;
  int32_t num_members = 0;
  int32_t num_shared_tokens = 0;
};

// A sequence and KV head whose segments are computed apart; merged when all are done.
struct AttentionSplit {
  int32_t entry;
  int32_t kv_head;
  int32_t first_partial;
  int32_t num_segments;
};

class Batch {
 public:
  Batch(const BatchLimits& limits, const AttentionCut& cut);  // allocates for the largest step
  // Replaces the contents by some parts of a checked plan. `max_tile_tokens` of KV: longer decodes are cut into
  // segments even where threads do not need it, 0 for never.
  void gather(const StepInput& input, std::span<const BatchPart> parts, int64_t max_tile_tokens);

  std::span<const BatchRow> rows() const { return rows_; }
  std::span<const BatchEntry> entries() const { return entries_; }
  std::span<const int32_t> sampled_entries() const { return sampled_entries_; }
  // Those of class compute (several query tokens), then those that read KV for one query token; each by falling cost.
  std::span<const AttentionTask> tasks() const { return tasks_; }
  int64_t num_compute_tasks() const { return num_compute_tasks_; }
  std::span<const AttentionSplit> splits() const { return splits_; }
  std::span<const int32_t> members() const { return members_; }  // entries of all grouped tasks
  int64_t max_partials() const { return max_partials_; }
  int64_t num_attended_tokens() const { return num_attended_tokens_; }  // sum over rows of the positions they see
  // Positions that are read for each KV head: all of every entry, those that a task shares once.
  int64_t num_read_tokens() const { return num_read_tokens_; }

  // Whether sequences that begin with the same blocks have them read once (so at first) or for each of them.
  void read_shared_once() { reads_shared_once_ = true; }
  void read_apart() { reads_shared_once_ = false; }

 private:
  void add_part(const StepInput& input, const BatchPart& part);
  void cut_attention(int64_t max_tile_tokens);
  void find_sharing();
  void cut_run(const SharedRun& run, int64_t largest);
  void cut_entry(int32_t e, int64_t largest, int64_t max_tile_tokens);
  int64_t cost(int64_t num_tokens, int64_t context) const;
  int64_t member_cost(const SharedRun& run, int32_t member) const;
  int64_t entry_cost(const BatchEntry& entry) const;
  int64_t total_cost() const;

  BatchLimits limits_;
  AttentionCut cut_;
  int64_t max_partials_;
  int64_t num_compute_tasks_ = 0;
  int64_t num_attended_tokens_ = 0;
  int64_t num_read_tokens_ = 0;
  bool reads_shared_once_ = true;
  SharingFinder sharing_;
  int32_t num_partials_ = 0;
  std::vector<BatchRow> rows_;
  std::vector<BatchEntry> entries_;
  std::vector<int32_t> sampled_entries_;
  std::vector<AttentionTask> tasks_;
  std::vector<AttentionSplit> splits_;
  std::vector<int32_t> members_;
  std::vector<uint8_t> is_grouped_;  // by entry
};

}  // namespace blendserve
