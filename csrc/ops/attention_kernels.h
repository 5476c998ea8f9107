// The source of attention_<isa>.cpp: compiled once for each instruction set, see simd.h.
#include "ops/attention_walk.h"
#include "ops/simd.h"

namespace blendserve::BLENDSERVE_KERNELS {
namespace {

// Rows of query heads that share one pass over keys or values, and vectors of a pass by its rows: 8 to 12 accumulators
// hide the 4-cycle latency of two multiply-adds per cycle and leave registers for operands (16 in all).
constexpr int kPassRows = 6;
constexpr int kPassVectors[kPassRows + 1] = {0, 8, 4, 4, 2, 2, 2};
constexpr int kBlockVectors = kBlockSize / kWidth;

// The two loop bodies that use all 16 registers are written out for AVX2: compilers load ahead of them and spill sums.
BLENDSERVE_INLINE void add_products_of_row(const float* x, Vec v0, Vec v1, Vec& sum0, Vec& sum1) {
#if defined(BLENDSERVE_USE_AVX2)
  Vec factor;
  asm("vbroadcastss %[x], %[factor]\n\tvfmadd231ps %[v0], %[factor], %[sum0]\n\tvfmadd231ps %[v1], %[factor], %[sum1]"
      : [sum0] "+x"(sum0), [sum1] "+x"(sum1), [factor] "=&x"(factor)
      : [x] "m"(*x), [v0] "x"(v0), [v1] "x"(v1));
#else
  const Vec factor = set(*x);
  sum0 = fma(factor, v0, sum0);
  sum1 = fma(factor, v1, sum1);
#endif
}

// `words` holds kWidth pairs of bf16: kHalf 0 multiplies by the first of each pair, 1 by the second.
template <int kHalf>
BLENDSERVE_INLINE Vec half_of(const uint16_t* words) {
  return kHalf == 0 ? low_bf16(load_bits(words)) : high_bf16(load_bits(words));
}

#if defined(BLENDSERVE_USE_AVX2)
alignas(32) constexpr uint32_t kHighHalves[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
#endif

template <int kHalf>
BLENDSERVE_INLINE void add_products_of_vector(const uint16_t* words, Vec f0, Vec f1, Vec f2, Vec& sum0, Vec& sum1,
                                              Vec& sum2) {
#if defined(BLENDSERVE_USE_AVX2)
  Vec v;
  const auto& pairs = *reinterpret_cast<const uint16_t (*)[16]>(words);
  if constexpr (kHalf == 0) {
    asm("vmovups %[pairs], %[v]\n\tvpslld $16, %[v], %[v]\n\t"
        "vfmadd231ps %[f0], %[v], %[sum0]\n\tvfmadd231ps %[f1], %[v], %[sum1]\n\tvfmadd231ps %[f2], %[v], %[sum2]"
        : [sum0] "+x"(sum0), [sum1] "+x"(sum1), [sum2] "+x"(sum2), [v] "=&x"(v)
        : [f0] "x"(f0), [f1] "x"(f1), [f2] "x"(f2), [pairs] "m"(pairs));
  } else {
    asm("vmovaps %[mask], %[v]\n\tvandps %[pairs], %[v], %[v]\n\t"
        "vfmadd231ps %[f0], %[v], %[sum0]\n\tvfmadd231ps %[f1], %[v], %[sum1]\n\tvfmadd231ps %[f2], %[v], %[sum2]"
        : [sum0] "+x"(sum0), [sum1] "+x"(sum1), [sum2] "+x"(sum2), [v] "=&x"(v)
        : [f0] "x"(f0), [f1] "x"(f1), [f2] "x"(f2), [pairs] "m"(pairs), [mask] "m"(kHighHalves));
  }
#else
  const Vec v = half_of<kHalf>(words);
  sum0 = fma(f0, v, sum0);
  sum1 = fma(f1, v, sum1);
  sum2 = fma(f2, v, sum2);
#endif
}

// Into L2: there are fewer outstanding requests for L1, which made decodes from memory wait a third longer.
BLENDSERVE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
BLENDSERVE_INLINE const uint16_t* asked(const Chunk& chunk, int64_t block) {
  return chunk.is_next_wanted ? chunk.next[block] : chunk.blocks[block];
}

// acc[r][c] += x[r * stride] * half of words(c). The shorter side is held in registers (12 accumulators leave 4), the
// longer one streams.
template <int kHalf, int kRows, int kVectors, class Words>
BLENDSERVE_INLINE void add_products(const float* x, int64_t stride, Words words, Vec (&acc)[kRows][kVectors]) {
  if constexpr (kRows >= kVectors) {
    Vec v[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) v[c] = half_of<kHalf>(words(c));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kVectors == 2) {
        add_products_of_row(x + r * stride, v[0], v[1], acc[r][0], acc[r][1]);
      } else {
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) acc[r][c] = fma(set(x[r * stride]), v[c], acc[r][c]);
      }
    }
  } else {
    Vec factor[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) factor[r] = set(x[r * stride]);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      if constexpr (kRows == 3) {
        add_products_of_vector<kHalf>(words(c), factor[0], factor[1], factor[2], acc[0][c], acc[1][c], acc[2][c]);
      } else {
        const Vec v = half_of<kHalf>(words(c));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][c] = fma(factor[r], v, acc[r][c]);
      }
    }
  }
}

// scores[row][0, kVectors * kWidth) of the tokens from vector `first` of the chunk on: sum over head_dim in order.
template <int kRows, int kVectors>
BLENDSERVE_INLINE void score_pass(const float* q, int64_t head_dim, const Chunk& chunk, int64_t first, float* scores) {
  constexpr int kPerBlock = kVectors < kBlockVectors ? kVectors : kBlockVectors;
  constexpr int kBlocks = kVectors / kPerBlock;
  Vec acc[kRows][kVectors] = {};
  const uint16_t* keys[kBlocks];
  const uint16_t* next[kBlocks];
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
    keys[b] = chunk.blocks[first / kBlockVectors + b] + first % kBlockVectors * 2 * kWidth;
    next[b] = asked(chunk, first / kBlockVectors + b);
  }
  for (int64_t i = 0; i < head_dim; i += 2) {
    const int64_t offset = i * kBlockSize;
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) prefetch(next[b] + offset);
    const auto words = [&](int c) { return keys[c / kPerBlock] + offset + c % kPerBlock * 2 * kWidth; };
    add_products<0>(q + i, head_dim, words, acc);
    add_products<1>(q + i + 1, head_dim, words, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(scores + r * kChunkTokens + c * kWidth, acc[r][c]);
  }
}

// out[row][column, column + kVectors * kWidth) = out * decay[row] + sum over tokens in order of weight * value.
template <int kRows, int kVectors>
BLENDSERVE_INLINE void value_pass(const float* weights, const float* decay, const Chunk& chunk, int64_t head_dim,
                                  int64_t column, float* out) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      acc[r][c] = load(out + r * head_dim + column + c * kWidth) * set(decay[r]);
    }
  }
  const int64_t first = kBlockSize * head_dim + 2 * column;
  for (int64_t block = 0; block < chunk.num_blocks; ++block) {
    const uint16_t* values = chunk.blocks[block] + first;
    const uint16_t* next = asked(chunk, block) + first;
    const int64_t begin = block * kBlockSize;
    const int64_t end = begin + kBlockSize < chunk.num_tokens ? begin + kBlockSize : chunk.num_tokens;
    for (int64_t t = begin; t < end; t += 2, values += 2 * head_dim, next += 2 * head_dim) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors * kWidth; c += 16) prefetch(next + 2 * c);
      const auto words = [&](int c) { return values + 2 * c * kWidth; };
      add_products<0>(weights + t, kChunkTokens, words, acc);
      if (t + 1 == end) break;  // the word's other half was never written
      add_products<1>(weights + t + 1, kChunkTokens, words, acc);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) store(out + r * head_dim + column + c * kWidth, acc[r][c]);
  }
}

// Scores of one query become weights relative to its new largest score. Returns the factor for what was summed before.
BLENDSERVE_INLINE float softmax_row(float* scores, int64_t num_visible, float& row_max, float& row_sum) {
  for (int64_t t = num_visible; t < kChunkTokens; ++t) scores[t] = -INFINITY;
  Vec largest = load(scores);
#pragma GCC unroll 16
  for (int64_t t = kWidth; t < kChunkTokens; t += kWidth) largest = max(largest, load(scores + t));
  const float chunk_max = max_lanes(largest);
  const float new_max = chunk_max > row_max ? chunk_max : row_max;
  const float decay = first_lane(exp(set(row_max - new_max)));
  Vec sum = {};
#pragma GCC unroll 4
  for (int64_t t = 0; t < kChunkTokens; t += kWidth) {
    const Vec weight = exp(load(scores + t) - set(new_max));
    store(scores + t, weight);
    sum = sum + weight;
  }
  row_max = new_max;
  row_sum = row_sum * decay + sum_lanes(sum);
  return decay;
}

// factors[t] of each token, times the scores or weights of each row.
template <int kRows>
BLENDSERVE_INLINE void scale_tokens(const float* factors, float* scores) {
  for (int64_t t = 0; t < kRows * kChunkTokens; t += kWidth) {
    store(scores + t, load(scores + t) * load(factors + t % kChunkTokens));
  }
}

// One chunk for kRows query rows.
template <int kRows>
void chunk_pass(const float* q, int64_t head_dim, const Chunk& chunk, const int64_t* num_visible, Softmax softmax,
                float* scores) {
  constexpr int kVectors = kPassVectors[kRows];
  for (int64_t v = 0; v < chunk.num_blocks * kBlockVectors; v += kVectors) {
    score_pass<kRows, kVectors>(q, head_dim, chunk, v, scores + v * kWidth);
  }
  if (chunk.scales != nullptr) scale_tokens<kRows>(chunk.scales, scores);
  float decay[kRows];
  for (int r = 0; r < kRows; ++r) {
    decay[r] = softmax_row(scores + r * kChunkTokens, num_visible[r], softmax.max[r], softmax.sum[r]);
  }
  if (chunk.scales != nullptr) scale_tokens<kRows>(chunk.scales + kChunkTokens, scores);
  int64_t column = 0;
  for (; column + kVectors * kWidth <= head_dim; column += kVectors * kWidth) {
    value_pass<kRows, kVectors>(scores, decay, chunk, head_dim, column, softmax.out);
  }
  for (; column < head_dim; column += 2 * kWidth) {
    value_pass<kRows, 2>(scores, decay, chunk, head_dim, column, softmax.out);
  }
}

using ChunkPass = void (*)(const float*, int64_t, const Chunk&, const int64_t*, Softmax, float*);
constexpr ChunkPass kChunkPasses[kPassRows + 1] = {nullptr,       chunk_pass<1>, chunk_pass<2>, chunk_pass<3>,
                                                   chunk_pass<4>, chunk_pass<5>, chunk_pass<6>};

struct Kernel {
  static constexpr int64_t kSumLanes = 1;
  static constexpr int64_t kMaxPassRows = kPassRows;
  static constexpr float kNoScore = -INFINITY;
  using Query = float*;  // [rows][head_dim]

  static int64_t pass_rows(int64_t num_rows) { return num_rows < kPassRows ? num_rows : kPassRows; }

  static Query lay_out(float*& memory, int64_t num_rows, int64_t head_dim) { return take(memory, num_rows * head_dim); }

  static int64_t chunk_floats(int64_t) { return 0; }
  static void read_chunk(const Chunk&, int64_t, float*) {}

  static void pack(const AttentionTile& tile, int64_t first_row, Query query) {
    const int64_t count = tile.group * tile.head_dim;
    float* to = query + first_row * tile.head_dim;
    for (int64_t token = 0; token < tile.num_tokens; ++token) {
      memcpy(to + token * count, tile.q + token * tile.row_stride, static_cast<size_t>(count) * sizeof(float));
    }
  }

  static void add_chunk(Query query, int64_t row, int64_t num_rows, int64_t head_dim, const Chunk& chunk,
                        const int64_t* num_visible, Softmax softmax, float* scores) {
    kChunkPasses[num_rows](query + row * head_dim, head_dim, chunk, num_visible, softmax, scores);
  }

  static void merge_row(Softmax total, Softmax part, int64_t head_dim) {
    const float new_max = *part.max > *total.max ? *part.max : *total.max;
    const Vec keep = exp(set(*total.max - new_max));
    const Vec add = exp(set(*part.max - new_max));
    *total.max = new_max;
    *total.sum = *total.sum * first_lane(keep) + *part.sum * first_lane(add);
    for (int64_t i = 0; i < head_dim; i += kWidth) {
      store(total.out + i, load(total.out + i) * keep + load(part.out + i) * add);
    }
  }

  static void write_row(Softmax row, int64_t head_dim, float* to) {
    const Vec inverse = set(1.0f / *row.sum);
    // + 0: a masked token's 0 * value may have turned a -0 into 0, depending on the tile; here all zeros become +0.
    for (int64_t i = 0; i < head_dim; i += kWidth) store(to + i, load(row.out + i) * inverse + Vec{});
  }
};

}  // namespace
}  // namespace blendserve::BLENDSERVE_KERNELS

#include "ops/attention_int8_kernels.h"
