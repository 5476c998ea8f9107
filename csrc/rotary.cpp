#include "rotary.h"

#include <cmath>

namespace blendserve {

RotaryTables::RotaryTables(int64_t max_model_len, std::span<const double> inverse_frequencies, double factor)
    : half_(static_cast<int64_t>(inverse_frequencies.size())),
      cosine_(checked_product({max_model_len, half_})),
      sine_(checked_product({max_model_len, half_})) {
  for (int64_t position = 0; position < max_model_len; ++position) {
    for (int64_t i = 0; i < half_; ++i) {
      const double angle = static_cast<double>(position) * inverse_frequencies[static_cast<size_t>(i)];
      cosine_[position * half_ + i] = static_cast<float>(factor * std::cos(angle));
      sine_[position * half_ + i] = static_cast<float>(factor * std::sin(angle));
    }
  }
}

}  // namespace blendserve
