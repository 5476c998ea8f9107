// Weights of several matrices in one piece of memory.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "matmul_cases.h"
#include "ops/weight_memory.h"

namespace blendserve {
namespace {

using test::for_each_format, test::name_of, test::random_floats;

// Matrices in shared memory do not touch each other and outlive it.
void matrices_share_memory() {
  for_each_format([](MatmulFormat format) {
    std::vector<PackedMatrix> apart, shared;
    {
      WeightMemory memory;
      for (const int64_t n : {7, 33, 64, 100}) {
        const std::vector<float> weights = random_floats(n * 50, static_cast<uint32_t>(n));
        apart.emplace_back(format, weights, n, 50);
        shared.emplace_back(format, weights, n, 50, &memory);
      }
    }
    for (size_t i = 0; i < apart.size(); ++i) {
      CHECK(reinterpret_cast<uintptr_t>(shared[i].data()) % 64 == 0);
      std::vector<float> expected(50), actual(50);
      for (int64_t row = 0; row < apart[i].n(); ++row) {
        apart[i].unpack_row(row, expected.data());
        shared[i].unpack_row(row, actual.data());
        CHECK(actual == expected, name_of(format), " matrix ", i, " row ", row);
      }
    }
  });
}

void weight_memory_hands_out_whole_pieces() {
  WeightMemory memory;
  const int64_t huge = int64_t{100} << 20;  // more than what is allocated at once
  std::vector<std::shared_ptr<void>> pieces;
  for (const int64_t size : {int64_t{1}, int64_t{65}, huge, int64_t{64}}) {
    pieces.push_back(memory.allocate(size));
    CHECK(reinterpret_cast<uintptr_t>(pieces.back().get()) % 64 == 0);
    std::memset(pieces.back().get(), static_cast<int>(pieces.size()), static_cast<size_t>(std::min(size, int64_t{65})));
  }
  for (size_t i = 0; i < pieces.size(); ++i)
    CHECK(*static_cast<const char*>(pieces[i].get()) == static_cast<char>(i + 1));
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(matrices_share_memory);
  RUN(weight_memory_hands_out_whole_pieces);
  return 0;
}
