#include "sharing.h"

#include <algorithm>
#include <cstring>

#include "ops/attention.h"

namespace blendserve {
namespace {

size_t table_bytes(int64_t num_chunks) { return static_cast<size_t>(num_chunks * kChunkBlocks) * sizeof(int32_t); }

// Any order will do in which equal beginnings are neighbours: that of bytes.
bool is_before(const SharingCandidate& a, const SharingCandidate& b) {
  const int order = std::memcmp(a.block_table, b.block_table, table_bytes(std::min(a.num_chunks, b.num_chunks)));
  if (order != 0) return order < 0;
  return a.num_chunks != b.num_chunks ? a.num_chunks < b.num_chunks : a.entry < b.entry;
}

int32_t num_common_chunks(const SharingCandidate& a, const SharingCandidate& b) {
  const int32_t most = std::min(a.num_chunks, b.num_chunks);
  int32_t chunk = 0;
  while (chunk < most &&
         std::memcmp(a.block_table + chunk * kChunkBlocks, b.block_table + chunk * kChunkBlocks, table_bytes(1)) == 0) {
    ++chunk;
  }
  return chunk;
}

}  // namespace

SharingFinder::SharingFinder(int64_t max_candidates) {
  const auto size = static_cast<size_t>(max_candidates);
  candidates_.reserve(size);
  is_taken_.reserve(size);
  open_.reserve(size + 1);
  members_.reserve(size);
  runs_.reserve(size / 2);
}

void SharingFinder::find(int64_t min_saved_chunks) {
  std::sort(candidates_.begin(), candidates_.end(), is_before);
  is_taken_.assign(candidates_.size(), 0);
  open_.clear();
  members_.clear();
  runs_.clear();
  const auto count = static_cast<int32_t>(candidates_.size());
  for (int32_t i = 1; i <= count; ++i) {
    const auto at = static_cast<size_t>(i);
    const int32_t common = i < count ? num_common_chunks(candidates_[at - 1], candidates_[at]) : 0;
    int32_t first = i - 1, num_left = 1;
    while (!open_.empty() && open_.back().num_chunks > common) {
      Node node = open_.back();
      open_.pop_back();
      node.num_left += num_left;
      close(node, i, std::max(common, open_.empty() ? 0 : open_.back().num_chunks), min_saved_chunks);
      first = node.first;
      num_left = node.num_left;
    }
    if (common == 0) continue;
    if (open_.empty() || open_.back().num_chunks < common) open_.push_back({first, common, 0});
    open_.back().num_left += num_left;
  }
}

// All candidates [node.first, last) are known: makes those that are left a run, or leaves them to the parent.
void SharingFinder::close(Node& node, int32_t last, int32_t num_parent_chunks, int64_t min_saved_chunks) {
  const int64_t saved = int64_t{node.num_left - 1} * node.num_chunks;
  if (saved < min_saved_chunks || saved <= int64_t{node.num_left} * num_parent_chunks) return;
  runs_.push_back({static_cast<int32_t>(members_.size()), node.num_left, node.num_chunks});
  for (auto i = static_cast<size_t>(node.first); i < static_cast<size_t>(last); ++i) {
    if (is_taken_[i] != 0) continue;
    is_taken_[i] = 1;
    members_.push_back(candidates_[i]);
  }
  node.num_left = 0;
}

}  // namespace blendserve
