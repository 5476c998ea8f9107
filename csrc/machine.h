// What the kernels' callers need to know of the machine beside its instruction set.
#pragma once

#include <cstdint>

namespace blendserve {

// One core's second-level cache, by the operating system; a cautious guess where that does not say.
int64_t l2_bytes();

}  // namespace blendserve
