#include "ops/weight_memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace blendserve {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;
// What is not written takes no memory, so that a slab may be larger than what is left to load.
constexpr int64_t kSlabBytes = 32 * kHugePage;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::shared_ptr<void> allocate_slab(int64_t num_bytes) {
  void* memory = std::aligned_alloc(static_cast<size_t>(kHugePage), static_cast<size_t>(num_bytes));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  static_cast<void>(
      madvise(memory, static_cast<size_t>(num_bytes), MADV_HUGEPAGE));  // advice: refusal costs only speed
#endif
  return {memory, std::free};
}

}  // namespace

std::shared_ptr<void> WeightMemory::allocate(int64_t num_bytes) {
  const int64_t size = round_up(num_bytes, kCacheLine);
  const std::lock_guard lock(mutex_);
  if (slab_ == nullptr || num_used_ + size > num_bytes_) {
    num_bytes_ = std::max(kSlabBytes, round_up(size, kHugePage));
    slab_ = allocate_slab(num_bytes_);
    num_used_ = 0;
  }
  void* memory = static_cast<char*>(slab_.get()) + num_used_;
  num_used_ += size;
  return {slab_, memory};
}

}  // namespace blendserve
