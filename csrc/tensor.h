// Owned arrays and small integer arithmetic that every op shares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace blendserve {

constexpr int64_t div_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return div_up(value, multiple) * multiple; }

// The product of numbers that are not negative. Throws std::invalid_argument where it does not fit.
inline int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (factor < 0 || __builtin_mul_overflow(product, factor, &product)) {
      std::string text;
      for (const int64_t each : factors) text += (text.empty() ? "" : " x ") + std::to_string(each);
      throw std::invalid_argument("an array of " + text + " elements; the most is " +
                                  std::to_string(std::numeric_limits<int64_t>::max()));
    }
  }
  return product;
}

// A fixed-size array that starts on a cache line, on a huge page where it is large. Its elements are NOT initialised:
// a large one costs memory only where it is touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  // Throws std::invalid_argument for a size that no memory has, std::bad_alloc where this machine has not so much.
  explicit Buffer(int64_t size) : size_(size) {
    if (size < 0 || size > kMaxBytes / static_cast<int64_t>(sizeof(T))) {
      throw std::invalid_argument("an array of " + std::to_string(size) + " elements of " + std::to_string(sizeof(T)) +
                                  " bytes; the most is " + std::to_string(kMaxBytes) + " bytes");
    }
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
  static constexpr int64_t kMaxBytes = int64_t{1} << 62;  // can be rounded up to whole pages
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace blendserve
