// Owned arrays and small integer arithmetic that every op shares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace blendserve {

constexpr int64_t div_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return div_up(value, multiple) * multiple; }

// A fixed-size array that starts on a cache line, on a huge page where it is large. Its elements are NOT initialised:
// a large one costs memory only where it is touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    const size_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : kCacheLineBytes;
    void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (memory == nullptr && bytes > 0) throw std::bad_alloc();
    data_.reset(static_cast<T*>(memory));
#if defined(__linux__)
    if (alignment == kHugePageBytes) madvise(memory, bytes, MADV_HUGEPAGE);  // advice: refusal costs only speed
#endif
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  int64_t num_bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }
  std::span<const T> view() const { return {data_.get(), static_cast<size_t>(size_)}; }

 private:
  static constexpr size_t kCacheLineBytes = 64;
  static constexpr size_t kHugePageBytes = size_t{2} << 20;
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace blendserve
