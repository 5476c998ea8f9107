// Calls the copy of a kernel that was compiled for an instruction set. Kernels come in copies for every processor and
// for AVX2, which processors with AVX-512 run too; wide kernels have a copy for AVX-512 as well.
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

// The same for wide kernels. The copy for AVX-512 serves both instruction sets that have it.
#if defined(__x86_64__)
#define BLENDSERVE_DECLARE_WIDE_KERNEL(RESULT, name, PARAMETERS) \
  BLENDSERVE_DECLARE_KERNEL(RESULT, name, PARAMETERS)            \
  namespace avx512 {                                             \
  RESULT name PARAMETERS;                                        \
  }
#define BLENDSERVE_CALL_WIDE_KERNEL(isa, name, ...)                                   \
  ((isa) == Isa::kAvx512Vnni || (isa) == Isa::kAvx512Bf16 ? avx512::name(__VA_ARGS__) \
                                                          : BLENDSERVE_CALL_KERNEL(isa, name, __VA_ARGS__))
#else
#define BLENDSERVE_DECLARE_WIDE_KERNEL BLENDSERVE_DECLARE_KERNEL
#define BLENDSERVE_CALL_WIDE_KERNEL BLENDSERVE_CALL_KERNEL
#endif
