// The softmax of attention in AVX-512: of one chunk, all rows of a pass together, in powers of two. Private to
// csrc/ops/attention_avx512*.cpp; everything has internal linkage.
#pragma once

#include "ops/attention_walk.h"
#include "ops/avx512.h"

// GCC 12 takes the undefined operand in its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define BLENDSERVE_INLINE [[gnu::always_inline]] static inline

namespace blendserve {
namespace {

constexpr int kMaxRows = 8;  // of a pass
constexpr int kLanes = 16;   // tokens of a block and of a vector
constexpr float kLog2E = 1.44269504f;
constexpr float kLowest = -3.40282347e38f;  // a score that was not seen; finite, so that lowest - lowest is 0

// 2^x for x <= 0; 2^-126 below -126, NaN for NaN, 2^0 is 1 with the fifth degree. x = n + f with |f| <= 1/2; the
// polynomial in f is fitted to 2e-7 relative (kDegree 5) or 7.5e-5 (3), where the result is rounded to bf16.
template <int kDegree>
BLENDSERVE_INLINE __m512 exp2_below_zero(__m512 x) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);     // a NaN in x stays
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 p;
  if constexpr (kDegree == 3) {
    p = _mm512_fmadd_ps(_mm512_set1_ps(0.0551716685f), f, _mm512_set1_ps(0.2426111400f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6932609677f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999280572f));
  } else {
    p = _mm512_fmadd_ps(_mm512_set1_ps(0.00132647285f), f, _mm512_set1_ps(0.00967151299f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555073358f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240222424f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147004f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  }
  // The exponent is added as an integer: vscalefps takes two cycles.
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

// The largest lane of each of eight vectors, in lane r that of row r: 25 instructions instead of 8 x 9.
BLENDSERVE_INLINE __m512 largest_lanes(const __m512 (&rows)[kMaxRows]) {
  __m512 four[4], two[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    four[i] = _mm512_max_ps(_mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0x44),
                            _mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0xee));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    two[i] = _mm512_max_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  }
  const __m512 one = _mm512_max_ps(_mm512_unpacklo_ps(two[0], two[1]), _mm512_unpackhi_ps(two[0], two[1]));
  const __m512 all = _mm512_max_ps(one, _mm512_shuffle_ps(one, one, 0x4e));
  const __m512i lane_of_row = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
  return _mm512_permutexvar_ps(lane_of_row, all);
}

BLENDSERVE_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << (count < 0 ? 0 : count > kLanes ? kLanes : count)) - 1u);
}

// Raises the largest score of kRows rows to that of the chunk and returns the factors for what was summed before, which
// `decay` gets too. Of row r the first visible[r] tokens count; the others' scores become kLowest.
template <int kRows, bool kMasked>
BLENDSERVE_INLINE void raise_max(float* scores, const int64_t* visible, float* max, float* decay) {
  __m512 largest[kMaxRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    __m512 s[kChunkBlocks];
#pragma GCC unroll 4
    for (int v = 0; v < kChunkBlocks; ++v) {
      float* at = scores + r * kChunkTokens + v * kLanes;
      s[v] = _mm512_load_ps(at);
      if constexpr (kMasked) {
        s[v] = _mm512_mask_blend_ps(first_lanes(visible[r] - v * kLanes), _mm512_set1_ps(kLowest), s[v]);
        _mm512_store_ps(at, s[v]);
      }
    }
    largest[r] = _mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]));
  }
#pragma GCC unroll 8
  for (int r = kRows; r < kMaxRows; ++r) largest[r] = largest[kRows - 1];
  const __m512 old_max = _mm512_castps256_ps512(_mm256_loadu_ps(max));
  const __m512 new_max = _mm512_max_ps(old_max, largest_lanes(largest));
  alignas(32) float lanes[kMaxRows];
  _mm256_store_ps(lanes, _mm512_castps512_ps256(new_max));
  __builtin_memcpy(max, lanes, kRows * sizeof(float));
  _mm256_store_ps(decay, _mm512_castps512_ps256(exp2_below_zero<5>(_mm512_sub_ps(old_max, new_max))));
}

// The sum of all lanes, in one fixed tree.
BLENDSERVE_INLINE float sum_of_lanes(const float* lanes) {
  float sums[kLanes];
  __builtin_memcpy(sums, lanes, sizeof(sums));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

BLENDSERVE_INLINE void merge_base2_row(Softmax total, Softmax part, int64_t head_dim) {
  const __m512 old_max = _mm512_set1_ps(*total.max), part_max = _mm512_set1_ps(*part.max);
  const __m512 new_max = _mm512_max_ps(old_max, part_max);
  const __m512 keep = exp2_below_zero<5>(_mm512_sub_ps(old_max, new_max));
  const __m512 add = exp2_below_zero<5>(_mm512_sub_ps(part_max, new_max));
  const auto merge = [&](float* to, const float* from) __attribute__((always_inline)) {
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(from), add, _mm512_mul_ps(_mm512_loadu_ps(to), keep)));
  };
  *total.max = *part.max > *total.max ? *part.max : *total.max;
  merge(total.sum, part.sum);
  for (int64_t i = 0; i < head_dim; i += kLanes) merge(total.out + i, part.out + i);
}

BLENDSERVE_INLINE void write_base2_row(Softmax row, int64_t head_dim, float* to) {
  const __m512 inverse = _mm512_set1_ps(1.0f / sum_of_lanes(row.sum));
  // + 0: a masked token's 0 * value may have turned a -0 into 0, depending on the tile; here all zeros become +0.
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    _mm512_storeu_ps(to + i, _mm512_fmadd_ps(_mm512_loadu_ps(row.out + i), inverse, _mm512_setzero_ps()));
  }
}

// As few passes as rows allow, since each one reads the chunk, but no shorter last one than needed.
constexpr int64_t base2_pass_rows(int64_t num_rows) {
  return num_rows <= kMaxRows ? num_rows : num_rows <= 12 ? (num_rows + 1) / 2 : 6;
}

BLENDSERVE_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

BLENDSERVE_INLINE int load_int(const void* p) {
  int value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}

}  // namespace
}  // namespace blendserve
