// AVX-512 intrinsics: the processor's, or SIMDe's portable ones where BLENDSERVE_SIMDE asks to emulate them in tests.
#pragma once

#if defined(BLENDSERVE_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif
