// Which entries of a step begin with the same blocks, so that attention reads those once for all of them.
// Compares block numbers only; knows nothing of what is in them, nor of kernels.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace blendserve {

// A sequence that may share: `num_chunks` chunks of kChunkBlocks blocks at the start of its table are seen in full.
struct SharingCandidate {
  int32_t entry;
  int32_t num_chunks;
  const int32_t* block_table;
};

// Members [first, first + num_members) of the finder begin with the same `num_chunks` chunks.
struct SharedRun {
  int32_t first;
  int32_t num_members;
  int32_t num_chunks;
};

class SharingFinder {
 public:
  explicit SharingFinder(int64_t max_candidates);  // allocates for so many

  void clear() { candidates_.clear(); }
  void add(const SharingCandidate& candidate) { candidates_.push_back(candidate); }
  // Cuts the candidates into runs; one of n members that share c chunks saves (n - 1) c. Deepest common prefixes come
  // first: their members form a run where that saves more than leaving them to the next shallower prefix would. Runs
  // that save fewer than `min_saved_chunks` are left out. Time: that of sorting.
  void find(int64_t min_saved_chunks);

  std::span<const SharingCandidate> members() const { return members_; }  // of all runs
  std::span<const SharedRun> runs() const { return runs_; }

 private:
  // Candidates from `first` on have these chunks in common; `num_left` of them are in no run yet.
  struct Node {
    int32_t first;
    int32_t num_chunks;
    int32_t num_left;
  };
  void close(Node& node, int32_t last, int32_t num_parent_chunks, int64_t min_saved_chunks);

  std::vector<SharingCandidate> candidates_;
  std::vector<uint8_t> is_taken_;  // by candidate
  std::vector<Node> open_;         // those that the next candidate may join, deeper ones later
  std::vector<SharingCandidate> members_;
  std::vector<SharedRun> runs_;
};

}  // namespace blendserve
