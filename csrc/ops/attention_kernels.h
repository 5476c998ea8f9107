// The source of attention_<isa>.cpp: compiled once for each instruction set, see simd.h.
#include <math.h>

#include "ops/attention.h"
#include "ops/simd.h"

namespace blendserve::BLENDSERVE_KERNELS {
namespace {

// Rows of query heads that share one pass over keys or values, and vectors of a pass by its rows: 8 to 12 accumulators
// hide the 4-cycle latency of two multiply-adds per cycle and leave registers for operands (16 in all).
constexpr int kPassRows = 6;
constexpr int kPassVectors[kPassRows + 1] = {0, 8, 4, 4, 2, 2, 2};
constexpr int kBlockVectors = kBlockSize / kWidth;

// Running softmax of `rows` queries: weighted values, largest score, sum of weights.
struct Softmax {
  float* out;  // [rows][head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

struct Chunk {
  const uint16_t* blocks[kChunkBlocks];
  const uint16_t* next[kChunkBlocks];  // of the following chunk, to be prefetched
  int64_t num_blocks;                  // that hold tokens this tile may see; blocks[] repeats the last one
  int64_t num_tokens;
};

// The two steps that use all 16 registers are written out for AVX2: compilers load ahead of them and spill sums.
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
    next[b] = chunk.next[first / kBlockVectors + b];
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
    const uint16_t* next = chunk.next[block] + first;
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

// One chunk for kRows query rows.
template <int kRows>
void chunk_pass(const float* q, int64_t head_dim, const Chunk& chunk, const int64_t* num_visible, Softmax softmax,
                float* scores) {
  constexpr int kVectors = kPassVectors[kRows];
  for (int64_t v = 0; v < chunk.num_blocks * kBlockVectors; v += kVectors) {
    score_pass<kRows, kVectors>(q, head_dim, chunk, v, scores + v * kWidth);
  }
  float decay[kRows];
  for (int r = 0; r < kRows; ++r) {
    decay[r] = softmax_row(scores + r * kChunkTokens, num_visible[r], softmax.max[r], softmax.sum[r]);
  }
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

Chunk chunk_at(const AttentionTile& tile, int64_t begin, int64_t end) {
  Chunk chunk;
  const int64_t first = begin / kBlockSize;
  const int64_t last = (end - 1) / kBlockSize;
  chunk.num_tokens = end - begin < kChunkTokens ? end - begin : kChunkTokens;
  chunk.num_blocks = div_up(chunk.num_tokens, kBlockSize);
  for (int64_t b = 0; b < kChunkBlocks; ++b) {
    const int64_t here = first + b < last ? first + b : last;
    const int64_t next = here + kChunkBlocks < last ? here + kChunkBlocks : last;
    chunk.blocks[b] = tile.cache + tile.block_table[here] * tile.block_stride;
    chunk.next[b] = tile.cache + tile.block_table[next] * tile.block_stride;
  }
  return chunk;
}

Softmax rows_from(Softmax softmax, int64_t row, int64_t head_dim) {
  return {softmax.out + row * head_dim, softmax.max + row, softmax.sum + row};
}

// Adds positions [begin, end) to the softmax of all rows of the tile; q is [rows][head_dim].
void add_positions(const AttentionTile& tile, const float* q, int64_t begin, int64_t end, Softmax softmax,
                   float* scores) {
  const int64_t num_rows = tile.num_tokens * tile.group;
  for (int64_t start = begin; start < end; start += kChunkTokens) {
    Chunk chunk = chunk_at(tile, start, end);
    const int64_t first_token = start > tile.first_position ? start - tile.first_position : 0;
    for (int64_t row = first_token * tile.group; row < num_rows;) {
      const int64_t rows = num_rows - row < kPassRows ? num_rows - row : kPassRows;
      int64_t num_visible[kPassRows];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = tile.first_position + (row + r) / tile.group + 1 - start;
        num_visible[r] = visible < kChunkTokens ? visible : kChunkTokens;
      }
      kChunkPasses[rows](q + row * tile.head_dim, tile.head_dim, chunk, num_visible,
                         rows_from(softmax, row, tile.head_dim), scores);
      row += rows;
      for (int64_t b = 0; b < kChunkBlocks; ++b) chunk.next[b] = chunk.blocks[b];  // one pass has prefetched it
    }
  }
}

void clear(Softmax softmax, int64_t first_row, int64_t num_rows, int64_t head_dim) {
  for (int64_t row = first_row; row < num_rows; ++row) {
    softmax.max[row] = -INFINITY;
    softmax.sum[row] = 0.0f;
  }
  for (int64_t i = first_row * head_dim; i < num_rows * head_dim; i += kWidth) store(softmax.out + i, Vec{});
}

// total = total merged with part, which holds later positions.
void merge(Softmax total, Softmax part, int64_t first_row, int64_t num_rows, int64_t head_dim) {
  for (int64_t row = first_row; row < num_rows; ++row) {
    const float new_max = part.max[row] > total.max[row] ? part.max[row] : total.max[row];
    const Vec keep = exp(set(total.max[row] - new_max));
    const Vec add = exp(set(part.max[row] - new_max));
    total.max[row] = new_max;
    total.sum[row] = total.sum[row] * first_lane(keep) + part.sum[row] * first_lane(add);
    float* out = total.out + row * head_dim;
    const float* more = part.out + row * head_dim;
    for (int64_t i = 0; i < head_dim; i += kWidth) store(out + i, load(out + i) * keep + load(more + i) * add);
  }
}

void write_out(const AttentionTile& tile, Softmax softmax) {
  for (int64_t row = 0; row < tile.num_tokens * tile.group; ++row) {
    const Vec inverse = set(1.0f / softmax.sum[row]);
    const float* from = softmax.out + row * tile.head_dim;
    float* to = tile.out + row / tile.group * tile.row_stride + row % tile.group * tile.head_dim;
    // + 0: a masked token's 0 * value may have turned a -0 into 0, depending on the tile; here all zeros become +0.
    for (int64_t i = 0; i < tile.head_dim; i += kWidth) store(to + i, load(from + i) * inverse + Vec{});
  }
}

struct Scratch {
  float* q;
  Softmax total, part;
  float* scores;
};

BLENDSERVE_INLINE float* take(float*& memory, int64_t count) {
  float* start = memory;
  memory += round_up(count, 16);
  return start;
}

Scratch lay_out(float* memory, int64_t num_rows, int64_t head_dim) {
  Scratch scratch;
  scratch.scores = take(memory, kPassRows * kChunkTokens);
  scratch.q = take(memory, num_rows * head_dim);
  for (Softmax* softmax : {&scratch.total, &scratch.part}) {
    softmax->out = take(memory, num_rows * head_dim);
    softmax->max = take(memory, num_rows);
    softmax->sum = take(memory, num_rows);
  }
  return scratch;
}

// Adds what the tile sees from position `begin` on and writes its result; its rows are those of the scratch from
// `first_row` on. The segment in which `begin` lies has been started unless it starts there.
void attend_from(const AttentionTile& tile, int64_t begin, const Scratch& scratch, int64_t first_row) {
  const int64_t num_rows = tile.num_tokens * tile.group;
  const int64_t end = tile.first_position + tile.num_tokens;
  const Softmax total = rows_from(scratch.total, first_row, tile.head_dim);
  const Softmax part = rows_from(scratch.part, first_row, tile.head_dim);
  while (begin < end) {
    const int64_t segment = begin / kSegmentTokens * kSegmentTokens;
    const int64_t segment_end = segment + kSegmentTokens < end ? segment + kSegmentTokens : end;
    const int64_t first = segment > tile.first_position ? (segment - tile.first_position) * tile.group : 0;
    const Softmax softmax = segment == 0 ? total : part;
    if (begin == segment) clear(softmax, first, num_rows, tile.head_dim);
    add_positions(tile, scratch.q + first_row * tile.head_dim, begin, segment_end, softmax, scratch.scores);
    if (segment > 0) merge(total, part, first, num_rows, tile.head_dim);
    begin = segment_end;
  }
  write_out(tile, total);
}

Softmax partial_at(const AttentionTile& tile, float* partials, int64_t segment) {
  float* start = partials + segment * attention_partial_floats(tile.group, tile.head_dim);
  return {start, start + tile.group * tile.head_dim, start + tile.group * (tile.head_dim + 1)};
}

}  // namespace

void attention_tile(const AttentionTile& tile, float* memory) {
  const Scratch scratch = lay_out(memory, tile.num_tokens * tile.group, tile.head_dim);
  for (int64_t token = 0; token < tile.num_tokens; ++token) {
    const int64_t count = tile.group * tile.head_dim;
    memcpy(scratch.q + token * count, tile.q + token * tile.row_stride, static_cast<size_t>(count) * sizeof(float));
  }
  attend_from(tile, 0, scratch, 0);
}

void attention_group(const AttentionTile* members, int64_t num_members, int64_t num_shared_tokens, float* memory) {
  AttentionTile together = members[0];  // as a tile of so many tokens, all of which see the whole prefix
  together.num_tokens = num_members;
  together.first_position = num_shared_tokens;
  const int64_t num_rows = num_members * together.group;
  const Scratch scratch = lay_out(memory, num_rows, together.head_dim);
  const int64_t count = together.group * together.head_dim;
  for (int64_t m = 0; m < num_members; ++m) {
    memcpy(scratch.q + m * count, members[m].q, static_cast<size_t>(count) * sizeof(float));
  }
  for (int64_t begin = 0; begin < num_shared_tokens; begin += kSegmentTokens) {
    const Softmax softmax = begin == 0 ? scratch.total : scratch.part;
    const int64_t end = begin + kSegmentTokens;
    clear(softmax, 0, num_rows, together.head_dim);
    add_positions(together, scratch.q, begin, end < num_shared_tokens ? end : num_shared_tokens, softmax,
                  scratch.scores);
    if (begin > 0 && end <= num_shared_tokens) merge(scratch.total, scratch.part, 0, num_rows, together.head_dim);
  }
  for (int64_t m = 0; m < num_members; ++m) attend_from(members[m], num_shared_tokens, scratch, m * together.group);
}

void attention_segment(const AttentionTile& tile, int64_t segment, float* partial, float* memory) {
  const Softmax softmax = partial_at(tile, partial, 0);
  clear(softmax, 0, tile.group, tile.head_dim);
  const int64_t begin = segment * kSegmentTokens;
  const int64_t end = tile.first_position + 1;
  add_positions(tile, tile.q, begin, begin + kSegmentTokens < end ? begin + kSegmentTokens : end, softmax, memory);
}

void merge_attention_segments(const AttentionTile& tile, int64_t num_segments, float* partials) {
  const Softmax total = partial_at(tile, partials, 0);
  for (int64_t segment = 1; segment < num_segments; ++segment) {
    merge(total, partial_at(tile, partials, segment), 0, tile.group, tile.head_dim);
  }
  write_out(tile, total);
}

}  // namespace blendserve::BLENDSERVE_KERNELS
