// Calls the copy of a kernel that was compiled for an instruction set. Processors with AVX-512 run the AVX2 copies:
// what attention and the pointwise ops wait for is memory, not lanes.
#pragma once

#include "ops/isa.h"

// Declares RESULT name PARAMETERS in the namespace of each instruction set.
#if defined(__x86_64__)
#define BLENDSERVE_DECLARE_KERNEL(RESULT, name, PARAMETERS) \
  namespace portable {                                      \
  RESULT name PARAMETERS;                                   \
  }                                                         \
  namespace avx2 {                                          \
  RESULT name PARAMETERS;                                   \
  }
#define BLENDSERVE_CALL_KERNEL(isa, name, ...) \
  ((isa) == Isa::kPortable ? portable::name(__VA_ARGS__) : avx2::name(__VA_ARGS__))
#else
#define BLENDSERVE_DECLARE_KERNEL(RESULT, name, PARAMETERS) \
  namespace portable {                                      \
  RESULT name PARAMETERS;                                   \
  }
#define BLENDSERVE_CALL_KERNEL(isa, name, ...) (static_cast<void>(isa), portable::name(__VA_ARGS__))
#endif
