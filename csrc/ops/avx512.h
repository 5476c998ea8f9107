// AVX-512 intrinsics: the processor's, or SIMDe's portable ones where BLENDSERVE_SIMDE asks to emulate them in tests.
#pragma once

#if defined(BLENDSERVE_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "ops/bf16.h"

// What SIMDe 0.8.2 lacks. These round as bf16_from_float does; the instructions also take denormal numbers for 0.
static inline __m512bh emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
  float floats[32];
  uint16_t rounded[32];
  _mm512_storeu_ps(floats, low);
  _mm512_storeu_ps(floats + 16, high);
  for (int i = 0; i < 32; ++i) rounded[i] = blendserve::bf16_from_float(floats[i]);
  return (__m512bh)_mm512_loadu_si512(rounded);
}
static inline __m256bh emulated_cvtneps_pbh(__m512 values) {
  float floats[16];
  uint16_t rounded[16];
  _mm512_storeu_ps(floats, values);
  for (int i = 0; i < 16; ++i) rounded[i] = blendserve::bf16_from_float(floats[i]);
  return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded));
}
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#else
#include <immintrin.h>
#endif
