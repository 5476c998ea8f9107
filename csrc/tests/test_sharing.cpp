// Runs of sequences that begin alike, against trying every way to cut them.
#include <algorithm>
#include <vector>

#include "check.h"
#include "ops/attention.h"
#include "sharing.h"

namespace blendserve {
namespace {

using Tables = std::vector<std::vector<int32_t>>;

// Tables of random length whose chunks repeat those of an earlier table up to a random depth.
Tables random_tables(test::Random& random, size_t count) {
  Tables tables;
  int32_t next_block = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto num_chunks = static_cast<int64_t>(1 + random.bits() % 6);
    std::vector<int32_t> table;
    if (i > 0 && random.bits() % 4 != 0) {
      const std::vector<int32_t>& other = tables[random.bits() % i];
      const auto depth = std::min<size_t>(random.bits() % 24, other.size());  // may end inside of a chunk
      table.assign(other.begin(), other.begin() + static_cast<int64_t>(depth));
    }
    while (static_cast<int64_t>(table.size()) < num_chunks * kChunkBlocks) table.push_back(next_block++);
    table.resize(static_cast<size_t>(num_chunks * kChunkBlocks));
    tables.push_back(table);
  }
  return tables;
}

int64_t num_common(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  size_t i = 0;
  while (i < std::min(a.size(), b.size()) && a[i] == b[i]) ++i;
  return static_cast<int64_t>(i) / kChunkBlocks;
}

// Most chunks saved by any partition of tables [from, end) into sets, tried one by one.
int64_t most_saved(const Tables& tables, size_t from, std::vector<std::vector<size_t>>& sets) {
  if (from == tables.size()) {
    int64_t saved = 0;
    for (const auto& set : sets) {
      int64_t common = static_cast<int64_t>(tables[set[0]].size()) / kChunkBlocks;
      for (const size_t member : set) common = std::min(common, num_common(tables[set[0]], tables[member]));
      saved += static_cast<int64_t>(set.size() - 1) * common;
    }
    return saved;
  }
  int64_t best = 0;
  for (size_t s = 0; s < sets.size(); ++s) {
    sets[s].push_back(from);
    best = std::max(best, most_saved(tables, from + 1, sets));
    sets[s].pop_back();
  }
  sets.push_back({from});
  best = std::max(best, most_saved(tables, from + 1, sets));
  sets.pop_back();
  return best;
}

int64_t find_saved(const Tables& tables, SharingFinder& finder, int64_t min_saved) {
  finder.clear();
  for (size_t i = 0; i < tables.size(); ++i) {
    finder.add({static_cast<int32_t>(i), static_cast<int32_t>(tables[i].size()) / static_cast<int32_t>(kChunkBlocks),
                tables[i].data()});
  }
  finder.find(min_saved);
  int64_t saved = 0;
  std::vector<bool> is_taken(tables.size());
  for (const SharedRun& run : finder.runs()) {
    CHECK(run.num_members >= 2 && run.num_chunks >= 1);
    const auto& first = tables[static_cast<size_t>(finder.members()[static_cast<size_t>(run.first)].entry)];
    for (int32_t m = run.first; m < run.first + run.num_members; ++m) {
      const auto entry = static_cast<size_t>(finder.members()[static_cast<size_t>(m)].entry);
      CHECK(num_common(first, tables[entry]) >= run.num_chunks);
      CHECK(!is_taken[entry]);
      is_taken[entry] = true;
    }
    CHECK(int64_t{run.num_members - 1} * run.num_chunks >= min_saved);
    saved += int64_t{run.num_members - 1} * run.num_chunks;
  }
  return saved;
}

// The choice is greedy: over many trees it comes close to the most that any cut saves, and is never far from it.
void runs_save_nearly_the_most() {
  test::Random random(5);
  SharingFinder finder(8);
  int64_t all_found = 0, all_best = 0;
  for (int trial = 0; trial < 300; ++trial) {
    const Tables tables = random_tables(random, random.bits() % 8);
    std::vector<std::vector<size_t>> sets;
    const int64_t found = find_saved(tables, finder, 1), best = most_saved(tables, 0, sets);
    CHECK(found <= best && 2 * found >= best, "trial ", trial, ": ", found, " of ", best, " chunks");
    all_found += found;
    all_best += best;
  }
  CHECK(all_best > 500 && 100 * all_found >= 97 * all_best, all_found, " of ", all_best, " chunks");
}

// A common beginning of all and a longer one of some: each is read once for those whom it serves best.
void nested_prefixes_are_cut_apart() {
  Tables tables;
  for (int32_t i = 0; i < 5; ++i) tables.push_back({1, 2, 3, 4, 100 + i, 0, 0, 0});
  for (int32_t i = 0; i < 2; ++i) tables.push_back({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 200 + i, 0, 0, 0});
  SharingFinder finder(7);
  CHECK(find_saved(tables, finder, 1) == 4 + 3);
  CHECK(finder.runs().size() == 2);
}

void small_savings_are_left() {
  const Tables tables = {{1, 2, 3, 4, 5, 6, 7, 8}, {1, 2, 3, 4, 9, 9, 9, 9}, {1, 2, 3, 4, 8, 8, 8, 8}};
  SharingFinder finder(3);
  CHECK(find_saved(tables, finder, 2) == 2);
  CHECK(find_saved(tables, finder, 3) == 0);
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(runs_save_nearly_the_most);
  RUN(nested_prefixes_are_cut_apart);
  RUN(small_savings_are_left);
}
