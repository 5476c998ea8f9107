// Memory for the weights of a model on huge pages, one matrix behind the other. A matrix on pages of 4 KiB loses a
// tenth of a product's rate: prefetches wait for page walks. Most matrices are too small for huge pages of their own.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

namespace blendserve {

class WeightMemory {
 public:
  // Aligned to a cache line and not initialised; it lives as long as it is held, beyond this object if need be. May be
  // called by several threads at once. Throws std::bad_alloc.
  std::shared_ptr<void> allocate(int64_t num_bytes);

 private:
  std::mutex mutex_;
  std::shared_ptr<void> slab_;
  int64_t num_used_ = 0, num_bytes_ = 0;  // of the slab
};

}  // namespace blendserve
