#include "machine.h"

#include <unistd.h>

namespace blendserve {

int64_t l2_bytes() {
  constexpr int64_t kFallback = 512 * 1024;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return kFallback;
}

}  // namespace blendserve
