// Attention on AVX512-BF16 (vdpbf16ps): two neighbours of a reduction per lane and instruction, summed into float32.
// Queries, with log2(e) folded in, and weights are rounded to bf16; the sum of weights is that of the rounded ones, so
// that their rounding cancels in part.
//
// A score is one chain over rising dimensions, an output one chain over rising pairs of tokens from (output before the
// chunk) * decay on. A weight that does not count is +0. So the rows beside a query never change its bits.
#include "ops/attention_avx512.h"

namespace blendserve::avx512bf16 {
namespace {

constexpr int kScoreUnroll = 4;  // of two dimensions, unrolled; head_dim is a multiple of 16

// Queries as [head_dim / 2][rows][2].
struct PackedQuery {
  uint16_t* data;
  int64_t num_rows;
};

BLENDSERVE_INLINE __m512bh load_pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
BLENDSERVE_INLINE __m512bh repeat_pair(const uint16_t* p) { return (__m512bh)_mm512_set1_epi32(load_int(p)); }

// Inlined into every unrolled iteration, the emulation takes minutes to compile.
#if defined(BLENDSERVE_SIMDE)
[[gnu::noinline]] __m512 add_products(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
#else
BLENDSERVE_INLINE __m512 add_products(__m512 sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

// scores[row][block] of kBlocks blocks: kRows x kBlocks sums, kBlocks keys and 1 query of 32 registers.
template <int kRows, int kBlocks, bool kPrefetch>
void add_scores(const uint16_t* q, int64_t q_stride, int64_t head_dim, const Chunk& chunk, int64_t first,
                float* scores) {
  __m512 sums[kRows][kBlocks];
  const uint16_t* keys[kBlocks];
  const uint16_t* next[kBlocks];
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    keys[b] = chunk.blocks[first + b];
    next[b] = chunk.next[first + b];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r][b] = _mm512_setzero_ps();
  }
  for (int64_t begin = 0; begin < kBlockSize * head_dim; begin += 32 * kScoreUnroll) {
#pragma GCC unroll 4
    for (int unrolled = 0; unrolled < kScoreUnroll; ++unrolled, q += q_stride) {
      __m512bh key[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        key[b] = load_pairs(keys[b] + begin + 32 * unrolled);
        if constexpr (kPrefetch) prefetch(next[b] + begin + 32 * unrolled);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512bh value = repeat_pair(q + 2 * r);
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) sums[r][b] = add_products(sums[r][b], value, key[b]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(scores + r * kChunkTokens + (first + b) * kLanes, sums[r][b]);
  }
}

// Scores become weights relative to the new largest score.
template <int kRows, bool kMasked>
void weigh(float* scores, const int64_t* visible, Softmax softmax, float* decay, uint16_t* weights) {
  alignas(32) float lanes[kMaxRows];
  raise_max<kRows, kMasked>(scores, visible, softmax.max, lanes, decay);
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512 max = _mm512_set1_ps(lanes[r]);
    float* sums = softmax.sum + r * kLanes;
    __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(decay[r]));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 weight[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int v = 2 * half + i;
        weight[i] = exp2<3>(_mm512_sub_ps(_mm512_load_ps(scores + r * kChunkTokens + v * kLanes), max));
        if constexpr (kMasked) weight[i] = _mm512_maskz_mov_ps(first_lanes(visible[r] - v * kLanes), weight[i]);
      }
      const __m512bh pairs = _mm512_cvtne2ps_pbh(weight[1], weight[0]);
      _mm512_store_si512(weights + r * kChunkTokens + half * 2 * kLanes, (__m512i)pairs);
      sum = add_products(sum, pairs, ones);
    }
    _mm512_storeu_ps(sums, sum);
  }
}

// out[row][column, column + 16 kVectors) = out * decay[row] + weights by the values of the first `num_tokens` tokens.
template <int kRows, int kVectors, bool kPrefetch>
void add_values(const uint16_t* weights, const float* decay, const Chunk& chunk, int64_t num_tokens, int64_t head_dim,
                int64_t column, float* out) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = _mm512_mul_ps(_mm512_loadu_ps(out + r * head_dim + column + v * kLanes), _mm512_set1_ps(decay[r]));
    }
  }
  const int64_t first = kBlockSize * head_dim + 2 * column;
  const auto add_pair = [&](const uint16_t* values, const uint16_t* next, const uint16_t* weight,
                            __m512i used) __attribute__((always_inline)) {
    __m512bh value[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      value[v] = (__m512bh)_mm512_and_si512(_mm512_loadu_si512(values + 2 * v * kLanes), used);
      if constexpr (kPrefetch) prefetch(next + 2 * v * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh pair = repeat_pair(weight + r * kChunkTokens);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = add_products(sums[r][v], pair, value[v]);
    }
  };
  const __m512i both = _mm512_set1_epi32(-1);
  int64_t block = 0;
  for (; (block + 1) * kBlockSize <= num_tokens; ++block) {
    const uint16_t* values = chunk.blocks[block] + first;
    const uint16_t* next = chunk.next[block] + first;
#pragma GCC unroll 8
    for (int pair = 0; pair < kBlockSize / 2; ++pair, values += 2 * head_dim, next += 2 * head_dim) {
      add_pair(values, next, weights + block * kBlockSize + 2 * pair, both);
    }
  }
  for (int64_t token = block * kBlockSize; token < num_tokens; token += 2) {
    // The other half of the last pair may never have been written, and 0 * NaN would reach the sum.
    const __m512i used = token + 1 < num_tokens ? both : _mm512_set1_epi32(0x0000ffff);
    const int64_t at = first + token % kBlockSize * head_dim;
    add_pair(chunk.blocks[block] + at, chunk.next[block] + at, weights + token, used);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * head_dim + column + v * kLanes, sums[r][v]);
  }
}

template <int kRows, int kVectors, bool kPrefetch>
BLENDSERVE_INLINE int64_t add_columns(const uint16_t* weights, const float* decay, const Chunk& chunk,
                                      int64_t num_tokens, int64_t head_dim, int64_t column, float* out) {
  for (; column + kVectors * kLanes <= head_dim; column += kVectors * kLanes) {
    add_values<kRows, kVectors, kPrefetch>(weights, decay, chunk, num_tokens, head_dim, column, out);
  }
  return column;
}

// The blocks that any row sees; the scores of others are masked later.
template <int kRows, bool kPrefetch>
BLENDSERVE_INLINE void add_chunk_scores(const uint16_t* q, int64_t q_stride, int64_t head_dim, const Chunk& chunk,
                                        int64_t num_blocks, float* scores) {
  constexpr int kBlocks = kRows <= 6 ? 4 : 2;  // at most 24 sums
  int64_t block = 0;
  for (; block + kBlocks <= num_blocks; block += kBlocks) {
    add_scores<kRows, kBlocks, kPrefetch>(q, q_stride, head_dim, chunk, block, scores);
  }
  if constexpr (kBlocks == 4) {
    if (block + 2 <= num_blocks) {
      add_scores<kRows, 2, kPrefetch>(q, q_stride, head_dim, chunk, block, scores);
      block += 2;
    }
  }
  if (block < num_blocks) add_scores<kRows, 1, kPrefetch>(q, q_stride, head_dim, chunk, block, scores);
}

template <int kRows, bool kMasked, bool kPrefetch>
BLENDSERVE_INLINE void add_chunk(const uint16_t* q, int64_t q_stride, int64_t head_dim, const Chunk& chunk,
                                 const int64_t* visible, Softmax softmax, float* memory) {
  auto* weights = reinterpret_cast<uint16_t*>(memory + kMaxRows * kChunkTokens);
  alignas(32) float decay[kMaxRows];
  const int64_t num_tokens = kMasked ? visible[kRows - 1] : kChunkTokens;
  add_chunk_scores<kRows, kPrefetch>(q, q_stride, head_dim, chunk, div_up(num_tokens, kBlockSize), memory);
  weigh<kRows, kMasked>(memory, visible, softmax, decay, weights);
  constexpr int kVectors = kRows <= 2 ? 8 : kRows <= 6 ? 4 : 2;  // at most 24 sums
  const auto add = [&]<int kWidth>(int64_t column) __attribute__((always_inline)) {
    return add_columns<kRows, kWidth, kPrefetch>(weights, decay, chunk, num_tokens, head_dim, column, softmax.out);
  };
  int64_t column = add.template operator()<kVectors>(0);
  if constexpr (kVectors > 4) column = add.template operator()<4>(column);
  if constexpr (kVectors > 2) column = add.template operator()<2>(column);
  add.template operator()<1>(column);
}

template <int kRows>
void chunk_of_rows(const uint16_t* q, int64_t q_stride, int64_t head_dim, const Chunk& chunk, const int64_t* visible,
                   Softmax softmax, float* memory) {
  if (visible[0] < kChunkTokens) {
    add_chunk<kRows, true, false>(q, q_stride, head_dim, chunk, visible, softmax, memory);
  } else if (chunk.is_next_wanted) {
    add_chunk<kRows, false, true>(q, q_stride, head_dim, chunk, visible, softmax, memory);
  } else {
    add_chunk<kRows, false, false>(q, q_stride, head_dim, chunk, visible, softmax, memory);
  }
}

using ChunkOfRows = void (*)(const uint16_t*, int64_t, int64_t, const Chunk&, const int64_t*, Softmax, float*);
constexpr ChunkOfRows kChunkOfRows[kMaxRows + 1] = {nullptr,          chunk_of_rows<1>, chunk_of_rows<2>,
                                                    chunk_of_rows<3>, chunk_of_rows<4>, chunk_of_rows<5>,
                                                    chunk_of_rows<6>, chunk_of_rows<7>, chunk_of_rows<8>};

struct Kernel {
  static constexpr int64_t kSumLanes = kLanes;
  static constexpr int64_t kMaxPassRows = kMaxRows;
  static constexpr float kNoScore = kLowest;
  using Query = PackedQuery;

  static int64_t pass_rows(int64_t num_rows) { return base2_pass_rows(num_rows); }

  static Query lay_out(float*& memory, int64_t num_rows, int64_t head_dim) {
    return {reinterpret_cast<uint16_t*>(take(memory, num_rows * head_dim / 2)), num_rows};
  }

  static int64_t chunk_floats(int64_t) { return 0; }
  static void read_chunk(const Chunk&, int64_t, float*) {}

  static void pack(const AttentionTile& tile, int64_t first_row, Query query) {
    const int64_t stride = 2 * query.num_rows;
    const __m512 scale = _mm512_set1_ps(kLog2E);
    for (int64_t row = 0; row < tile.num_tokens * tile.group; ++row) {
      const float* q = tile.q + row / tile.group * tile.row_stride + row % tile.group * tile.head_dim;
      uint16_t* to = query.data + 2 * (first_row + row);
      for (int64_t i = 0; i < tile.head_dim; i += 2 * kLanes) {
        const bool is_whole = i + kLanes < tile.head_dim;
        const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(q + i), scale);
        const __m512 high = is_whole ? _mm512_mul_ps(_mm512_loadu_ps(q + i + kLanes), scale) : low;
        alignas(64) uint16_t pairs[2 * kLanes];
        _mm512_store_si512(pairs, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        const int64_t num_pairs = is_whole ? kLanes : kLanes / 2;
        for (int64_t pair = 0; pair < num_pairs; ++pair, to += stride) __builtin_memcpy(to, pairs + 2 * pair, 4);
      }
    }
  }

  static void add_chunk(Query query, int64_t row, int64_t num_rows, int64_t head_dim, const Chunk& chunk,
                        const int64_t* num_visible, Softmax softmax, float* scores) {
    kChunkOfRows[num_rows](query.data + 2 * row, 2 * query.num_rows, head_dim, chunk, num_visible, softmax, scores);
  }

  static void merge_row(Softmax total, Softmax part, int64_t head_dim) { merge_base2_row(total, part, head_dim); }
  static void write_row(Softmax row, int64_t head_dim, float* to) { write_base2_row(row, head_dim, 1.0f, to); }
};

}  // namespace

const AttentionKernels attention_kernels = kWalk<Kernel>;

}  // namespace blendserve::avx512bf16
