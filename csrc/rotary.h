// The angles of rotary positions, computed once.
#pragma once

#include <cstdint>
#include <span>

#include "tensor.h"

namespace blendserve {

class RotaryTables {
 public:
  // Cosines and sines are multiplied by `factor`.
  RotaryTables(int64_t max_model_len, std::span<const double> inverse_frequencies, double factor);

  int64_t half() const { return half_; }  // pairs of a head
  const float* cosine(int64_t position) const { return cosine_.data() + position * half_; }
  const float* sine(int64_t position) const { return sine_.data() + position * half_; }
  int64_t num_bytes() const { return cosine_.num_bytes() + sine_.num_bytes(); }

 private:
  int64_t half_;
  Buffer<float> cosine_, sine_;  // [max_model_len, half]
};

}  // namespace blendserve
