#include "batch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops/attention.h"

namespace blendserve {
namespace {

// One long sequence is split where its tile alone exceeds this share of a thread's fair part of the work: the tail of
// the op is then at most that share of it.
constexpr int64_t kSharesPerThread = 4;
// The same of a group of sequences: larger ones read a prefix less often, smaller ones keep threads busy to the end.
constexpr int64_t kGroupsPerThread = 2;
// Time per KV token of a tile in units of one query row's arithmetic: loading and unpacking it costs about four rows.
constexpr int64_t kLoadCost = 4;
// A run of sequences shares its reads where that saves at least this many chunks per KV head.
constexpr int64_t kMinSavedChunks = 4;
// Partial results that a step may hold where long decodes are cut into chunks (1.6 MB at 3 heads of 64 per KV head);
// decodes beyond that stay whole.
constexpr int64_t kMaxChunkPartials = 2048;

// Query tokens that reuse what they load wait for arithmetic, one alone waits for memory.
bool is_compute(const AttentionTask& task) { return task.num_tokens > 1; }

void require(bool condition, const char* what, int64_t actual, int64_t limit) {
  if (condition) return;
  throw std::invalid_argument(std::string("a step's ") + what + " is " + std::to_string(actual) +
                              "; the executor was made for " + std::to_string(limit));
}

void require_at_least(const char* what, int64_t actual, int64_t least) {
  if (actual >= least) return;
  throw std::invalid_argument(std::string("a step's ") + what + " is " + std::to_string(actual) + "; it must be " +
                              std::to_string(least) + " or more");
}

void check_tokens(const StepInput& input, int64_t slot, int64_t begin, int64_t end, int64_t vocab_size) {
  const int32_t* tokens = input.token_ids + slot * input.token_stride;
  for (int64_t i = begin; i < end; ++i) {
    require(tokens[i] >= 0 && tokens[i] < vocab_size, "token id", tokens[i], vocab_size);
  }
}

void check_entry(const StepInput& input, const BatchLimits& limits, size_t at) {
  const int64_t slot = input.slots[at];
  const int64_t num_tokens = input.num_scheduled_tokens[at];
  const int64_t first = input.num_computed_tokens[at];
  const int64_t end = first + num_tokens;
  require(slot >= 0 && slot < input.num_slots, "slot", slot, input.num_slots);
  require_at_least("number of scheduled tokens of an entry", num_tokens, 1);
  require_at_least("number of computed tokens of an entry", first, 0);
  require(end <= limits.max_model_len, "sequence length", end, limits.max_model_len);
  require(end <= input.token_stride, "sequence length", end, input.token_stride);
  const int64_t num_blocks = div_up(end, kBlockSize);
  require(num_blocks <= input.block_stride, "block table length", num_blocks, input.block_stride);
  const int32_t* blocks = input.block_tables + slot * input.block_stride;
  for (int64_t b = 0; b < num_blocks; ++b) {
    require(blocks[b] >= 0 && blocks[b] < limits.num_blocks, "block number", blocks[b], limits.num_blocks);
  }
  check_tokens(input, slot, first, end, limits.vocab_size);
}

}  // namespace

void check_plan(const StepInput& input, const BatchLimits& limits) {
  const auto num_entries = static_cast<int64_t>(input.slots.size());
  require_at_least("number of sequences", num_entries, 1);
  require(num_entries <= limits.max_num_seqs, "number of sequences", num_entries, limits.max_num_seqs);
  int64_t num_rows = 0;
  for (size_t at = 0; at < input.slots.size(); ++at) {
    check_entry(input, limits, at);
    num_rows += input.num_scheduled_tokens[at];
    require(num_rows <= limits.max_num_batched_tokens, "number of tokens", num_rows, limits.max_num_batched_tokens);
  }
}

void check_computed_tokens(const StepInput& input, size_t at, int64_t vocab_size) {
  check_tokens(input, input.slots[at], 0, input.num_computed_tokens[at], vocab_size);
}

Batch::Batch(const BatchLimits& limits, const AttentionCut& cut)
    : limits_(limits), cut_(cut), sharing_(limits.max_num_seqs) {
  const int64_t max_segments = num_attention_segments(limits.max_model_len);
  max_partials_ = std::max(kSharesPerThread * cut.num_threads * max_segments, kMaxChunkPartials);
  const int64_t tile_tokens = attention_tile_tokens(cut.group);
  const int64_t max_tiles = limits.max_num_seqs + div_up(limits.max_num_batched_tokens, tile_tokens);
  rows_.reserve(static_cast<size_t>(limits.max_num_batched_tokens));
  entries_.reserve(static_cast<size_t>(limits.max_num_seqs));
  sampled_entries_.reserve(static_cast<size_t>(limits.max_num_seqs));
  tasks_.reserve(static_cast<size_t>(max_tiles * cut.num_kv_heads + max_partials_));
  splits_.reserve(static_cast<size_t>(max_partials_ / 2));  // each has two segments at least
  members_.reserve(static_cast<size_t>(limits.max_num_seqs));
  is_grouped_.reserve(static_cast<size_t>(limits.max_num_seqs));
}

void Batch::gather(const StepInput& input, std::span<const BatchPart> parts, int64_t max_tile_tokens) {
  rows_.clear();
  entries_.clear();
  sampled_entries_.clear();
  num_attended_tokens_ = num_read_tokens_ = 0;
  for (const BatchPart& part : parts) add_part(input, part);
  cut_attention(max_tile_tokens);
}

void Batch::add_part(const StepInput& input, const BatchPart& part) {
  const auto at = static_cast<size_t>(part.index);
  const int64_t slot = input.slots[at];
  const int64_t first = input.num_computed_tokens[at] + part.first;
  const int64_t end = first + part.count;
  const auto first_row = static_cast<int64_t>(rows_.size());
  const int32_t* tokens = input.token_ids + slot * input.token_stride;
  const int32_t* blocks = input.block_tables + slot * input.block_stride;
  for (int64_t position = first; position < end; ++position) {
    rows_.push_back({tokens[position], static_cast<int32_t>(position), blocks[position / kBlockSize]});
    num_attended_tokens_ += position + 1;
  }
  num_read_tokens_ += end;
  const bool is_sampled = input.is_sampled[at] && part.first + part.count == input.num_scheduled_tokens[at];
  if (is_sampled) sampled_entries_.push_back(static_cast<int32_t>(entries_.size()));
  entries_.push_back({part.index, slot, first_row, part.count, first, tokens, blocks});
}

int64_t Batch::cost(int64_t num_tokens, int64_t context) const {
  return (num_tokens * cut_.group + kLoadCost) * context;
}

int64_t Batch::entry_cost(const BatchEntry& entry) const {
  return cost(entry.num_rows, entry.first_position + entry.num_rows);
}

// Of one of a group, its share in loading the prefix left out.
int64_t Batch::member_cost(const SharedRun& run, int32_t member) const {
  const SharingCandidate& candidate = sharing_.members()[static_cast<size_t>(run.first + member)];
  const int64_t num_shared = run.num_chunks * kChunkTokens;
  const int64_t context = entries_[static_cast<size_t>(candidate.entry)].first_position + 1;
  return cut_.group * num_shared + cost(1, context - num_shared);
}

// Entries of one query token may share: longer chunks of a prompt reuse what they load often enough by themselves.
void Batch::find_sharing() {
  sharing_.clear();
  is_grouped_.assign(entries_.size(), 0);
  members_.clear();
  if (reads_shared_once_) {
    for (size_t e = 0; e < entries_.size(); ++e) {
      const auto num_chunks = static_cast<int32_t>(entries_[e].first_position / kChunkTokens);
      if (entries_[e].num_rows == 1 && num_chunks > 0) {
        sharing_.add({static_cast<int32_t>(e), num_chunks, entries_[e].block_table});
      }
    }
  }
  sharing_.find(kMinSavedChunks);
}

int64_t Batch::total_cost() const {
  int64_t total = 0;
  for (const BatchEntry& entry : entries_) total += entry_cost(entry);
  for (const SharedRun& run : sharing_.runs()) {
    total -= (run.num_members - 1) * kLoadCost * run.num_chunks * kChunkTokens;
  }
  return total * cut_.num_kv_heads;
}

void Batch::cut_attention(int64_t max_tile_tokens) {
  tasks_.clear();
  splits_.clear();
  num_partials_ = 0;
  find_sharing();
  const int64_t total = total_cost();
  const int64_t largest = total / (kSharesPerThread * cut_.num_threads);
  const int64_t largest_group = cut_.num_threads == 1 ? total : total / (kGroupsPerThread * cut_.num_threads);
  for (const SharedRun& run : sharing_.runs()) cut_run(run, largest_group);
  for (size_t e = 0; e < entries_.size(); ++e) {
    if (is_grouped_[e] == 0) cut_entry(static_cast<int32_t>(e), largest, max_tile_tokens);
  }
  std::sort(tasks_.begin(), tasks_.end(), [](const AttentionTask& a, const AttentionTask& b) {
    if (is_compute(a) != is_compute(b)) return is_compute(a);
    if (a.cost != b.cost) return a.cost > b.cost;
    return a.entry != b.entry ? a.entry < b.entry : a.kv_head < b.kv_head;
  });
  num_compute_tasks_ = std::count_if(tasks_.begin(), tasks_.end(), is_compute);
}

// Groups of equal numbers of members, as many as fit a tile and the largest cost; none where that is fewer than two,
// which is left to splitting over segments.
void Batch::cut_run(const SharedRun& run, int64_t largest) {
  const int64_t num_shared = run.num_chunks * kChunkTokens;
  int64_t members_cost = 0;
  for (int32_t m = 0; m < run.num_members; ++m) members_cost += member_cost(run, m);
  const int64_t by_cost = (largest - kLoadCost * num_shared) * run.num_members / members_cost;
  const int64_t most = std::min(max_group_members(cut_.group), std::max(by_cost, int64_t{1}));
  if (most < 2) return;
  const int64_t num_groups = div_up(run.num_members, most);
  for (int64_t g = 0; g < num_groups; ++g) {
    const auto first = static_cast<int32_t>(run.num_members * g / num_groups);
    const auto count = static_cast<int32_t>(run.num_members * (g + 1) / num_groups) - first;
    AttentionTask task = {-1,
                          0,
                          0,
                          1,
                          -1,
                          -1,
                          kLoadCost * num_shared,
                          static_cast<int32_t>(members_.size()),
                          count,
                          static_cast<int32_t>(num_shared)};
    for (int32_t m = first; m < first + count; ++m) {
      const int32_t e = sharing_.members()[static_cast<size_t>(run.first + m)].entry;
      members_.push_back(e);
      is_grouped_[static_cast<size_t>(e)] = 1;
      task.cost += member_cost(run, m);
    }
    task.entry = members_[static_cast<size_t>(task.first_member)];
    num_read_tokens_ -= (count - 1) * num_shared;
    for (; task.kv_head < cut_.num_kv_heads; ++task.kv_head) tasks_.push_back(task);
  }
}

// Tiles of consecutive query tokens; segments where one long decode would keep a thread alone to the end.
void Batch::cut_entry(int32_t e, int64_t largest, int64_t max_tile_tokens) {
  const BatchEntry& entry = entries_[static_cast<size_t>(e)];
  const int64_t tile_tokens = attention_tile_tokens(cut_.group);
  const int64_t context = entry.first_position + entry.num_rows;
  const int64_t num_segments = num_attention_segments(context);
  const bool is_long = cost(1, context) > largest || (max_tile_tokens > 0 && context > max_tile_tokens);
  const bool is_split = entry.num_rows == 1 && num_segments > 1 && is_long;
  for (int32_t head = 0; head < cut_.num_kv_heads; ++head) {
    if (is_split && num_partials_ + num_segments <= max_partials_) {
      splits_.push_back({e, head, num_partials_, static_cast<int32_t>(num_segments)});
      for (int32_t s = 0; s < num_segments; ++s) {
        const int64_t length = std::min(kSegmentTokens, context - s * kSegmentTokens);
        tasks_.push_back({e, head, 0, 1, s, num_partials_++, cost(1, length)});
      }
      continue;
    }
    for (int64_t token = 0; token < entry.num_rows; token += tile_tokens) {
      const int64_t count = std::min(tile_tokens, entry.num_rows - token);
      tasks_.push_back({e, head, static_cast<int32_t>(token), static_cast<int32_t>(count), -1, -1,
                        cost(count, entry.first_position + token + count)});
    }
  }
}

}  // namespace blendserve
