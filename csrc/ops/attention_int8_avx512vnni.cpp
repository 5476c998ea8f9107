// Attention over a cache in int8 on AVX512-VNNI (vpdpbusd): four neighbours of a reduction per lane and instruction,
// summed into int32. Queries are rotated as keys are and rounded to 16 bits, in two planes of signed bytes with a scale
// per row.
//
// The logarithm of a value's scale is added to the token's score, so that the weight 2^(score - max + 16) holds it;
// weights are rounded to 16 bits, in two planes of unsigned bytes. Integer sums are exact: the rows beside a query
// never change its bits.
#include "ops/attention_avx512.h"
#include "ops/rotation.h"

namespace blendserve::avx512vnni {
namespace {

constexpr float kQueryTop = 32512.0f;      // 127 * 256: both planes fit in signed bytes
constexpr float kWeightTopLog2 = 15.999f;  // and weights in unsigned ones

// Queries as [head_dim / 4][2 planes][rows][4], high bytes first.
struct PackedQuery {
  int8_t* data;
  float* scales;     // [rows], with log2(e)
  int32_t* offsets;  // [2][rows]: what the 128 in keys adds, negated
  int64_t num_rows;

  PackedQuery from(int64_t row) const { return {data + 4 * row, scales + row, offsets + row, num_rows}; }
};

// The compiler copies and spills sums around the intrinsic.
#if defined(BLENDSERVE_SIMDE)
[[gnu::noinline]] void add_products(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  sum = _mm512_dpbusd_epi32(sum, bytes, signed_bytes);
}
#else
BLENDSERVE_INLINE void add_products(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  asm("vpdpbusd %[b], %[a], %[sum]" : [sum] "+v"(sum) : [a] "v"(bytes), [b] "v"(signed_bytes));
}
#endif

BLENDSERVE_INLINE __m512i repeat_quad(const void* p) { return _mm512_set1_epi32(load_int(p)); }
BLENDSERVE_INLINE __m512i combine(__m512i high, __m512i low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
BLENDSERVE_INLINE const uint8_t* bytes_of(const uint16_t* block) { return reinterpret_cast<const uint8_t*>(block); }
BLENDSERVE_INLINE __m512 load_scales(const uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
// Of values: their logarithms.
BLENDSERVE_INLINE __m512 load_logs(const uint16_t* block, int64_t head_dim) {
  return load_scales(block + kBlockSize * head_dim + kBlockSize);
}

// As rotate_head, bit for bit.
BLENDSERVE_INLINE void rotate(float* x, int64_t head_dim) {
  const auto mix = [](__m512 low, __m512 other, int half) __attribute__((always_inline)) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 is_high = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(half));
    return _mm512_fmadd_ps(low, _mm512_mask_blend_ps(is_high, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f)), other);
  };
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    __m512 v = _mm512_loadu_ps(x + i);
    v = mix(v, _mm512_shuffle_ps(v, v, 0xb1), 1);
    v = mix(v, _mm512_shuffle_ps(v, v, 0x4e), 2);
    v = mix(v, _mm512_shuffle_f32x4(v, v, 0xb1), 4);
    v = mix(v, _mm512_shuffle_f32x4(v, v, 0x4e), 8);
    _mm512_storeu_ps(x + i, v);
  }
  for (int64_t half = kLanes; half < rotation_size(head_dim); half *= 2) {
    for (int64_t begin = 0; begin < head_dim; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; i += kLanes) {
        const __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + i + half);
        _mm512_storeu_ps(x + i, _mm512_add_ps(low, high));
        _mm512_storeu_ps(x + i + half, _mm512_sub_ps(low, high));
      }
    }
  }
}

// scores[row][block] of kBlocks blocks, the logarithms of values' scales included.
template <int kRows, int kBlocks, bool kPrefetch>
void add_scores(const PackedQuery& q, int64_t head_dim, const Chunk& chunk, int64_t first, float* scores) {
  __m512i sums[2 * kRows][kBlocks];
  const uint8_t* keys[kBlocks];
  const uint8_t* next[kBlocks];
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    keys[b] = bytes_of(chunk.blocks[first + b]);
    next[b] = bytes_of(chunk.next[first + b]);
#pragma GCC unroll 16
    for (int r = 0; r < 2 * kRows; ++r) {
      sums[r][b] = _mm512_set1_epi32(q.offsets[r / kRows * q.num_rows + r % kRows]);
    }
  }
  const int8_t* high = q.data;
  const int8_t* low = q.data + 4 * q.num_rows;
  for (int64_t i = 0; i < kBlockSize * head_dim; i += 64, high += 8 * q.num_rows, low += 8 * q.num_rows) {
    __m512i key[kBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      key[b] = _mm512_loadu_si512(keys[b] + i);
      if constexpr (kPrefetch) prefetch(next[b] + i);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 2 * kRows; ++r) {
      const __m512i value = repeat_quad((r < kRows ? high : low) + r % kRows * 4);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) add_products(sums[r][b], key[b], value);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const uint16_t* block = chunk.blocks[first + b];
    const __m512 scale = load_scales(block + kBlockSize * head_dim), log = load_logs(block, head_dim);
    if constexpr (kPrefetch) prefetch(chunk.next[first + b] + kBlockSize * head_dim);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 sum = _mm512_cvtepi32_ps(combine(sums[r][b], sums[kRows + r][b]));
      const __m512 score = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(q.scales[r])), log);
      _mm512_store_ps(scores + r * kChunkTokens + (first + b) * kLanes, score);
    }
  }
}

// Scores become weights, [2 planes][rows][kChunkTokens], low bytes first. `num_tokens` may have been written.
template <int kRows, bool kMasked>
void weigh(float* scores, const int64_t* visible, const Chunk& chunk, int64_t num_tokens, int64_t head_dim,
           Softmax softmax, float* decay, uint8_t* weights) {
  alignas(32) float lanes[kMaxRows];
  raise_max<kRows, kMasked>(scores, visible, softmax.max, lanes, decay);
  __m512 inverse[kChunkBlocks];  // of the values' scales
#pragma GCC unroll 4
  for (int v = 0; v < kChunkBlocks; ++v) {
    const __m512 log = load_logs(chunk.blocks[v], head_dim);
    inverse[v] = exp2<5>(_mm512_sub_ps(_mm512_setzero_ps(), log));
    if constexpr (kMasked) inverse[v] = _mm512_maskz_mov_ps(first_lanes(num_tokens - v * kLanes), inverse[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512 base = _mm512_set1_ps(lanes[r] - kWeightTopLog2);
    float* sums = softmax.sum + r * kLanes;
    __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(decay[r]));
#pragma GCC unroll 4
    for (int v = 0; v < kChunkBlocks; ++v) {
      const int at = r * static_cast<int>(kChunkTokens) + v * kLanes;
      __m512 weight = exp2<5>(_mm512_sub_ps(_mm512_load_ps(scores + at), base));
      if constexpr (kMasked) weight = _mm512_maskz_mov_ps(first_lanes(visible[r] - v * kLanes), weight);
      sum = _mm512_fmadd_ps(weight, inverse[v], sum);
      const __m512i rounded = _mm512_cvtps_epi32(weight);
      uint8_t* low = weights + at;
      _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(rounded));
      _mm_store_si128(reinterpret_cast<__m128i*>(low + kRows * kChunkTokens),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(rounded, 8)));
    }
    _mm512_storeu_ps(sums, sum);
  }
}

// out[row][column, column + 16 kVectors) = out * decay[row] + weights by the values of the first `num_quads` quads.
template <int kRows, int kVectors, bool kPrefetch>
void add_values(const uint8_t* weights, const float* decay, const Chunk& chunk, int64_t num_quads, int64_t head_dim,
                int64_t column, float* out) {
  __m512i sums[2 * kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < 2 * kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_si512();
  }
  const int64_t first = kBlockSize * head_dim + 4 * column;
  for (int64_t quad = 0; quad < num_quads; ++quad) {
    const int64_t at = first + quad % 4 * 4 * head_dim;
    const uint8_t* values = bytes_of(chunk.blocks[quad / 4]) + at;
    const uint8_t* next = bytes_of(chunk.next[quad / 4]) + at;
    __m512i value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      value[v] = _mm512_loadu_si512(values + 64 * v);
      if constexpr (kPrefetch) prefetch(next + 64 * v);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 2 * kRows; ++r) {
      const __m512i weight = repeat_quad(weights + 4 * quad + r * kChunkTokens);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add_products(sums[r][v], weight, value[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * head_dim + column + v * kLanes;
      const __m512 sum = _mm512_cvtepi32_ps(combine(sums[kRows + r][v], sums[r][v]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(decay[r]), sum));
    }
  }
}

template <int kRows, bool kMasked, bool kPrefetch>
BLENDSERVE_INLINE void add_chunk(const PackedQuery& q, int64_t head_dim, const Chunk& chunk, const int64_t* visible,
                                 Softmax softmax, float* memory) {
  auto* weights = reinterpret_cast<uint8_t*>(memory + kMaxRows * kChunkTokens);
  alignas(32) float decay[kMaxRows];
  constexpr int kWide = kRows <= 3 ? 4 : kRows <= 6 ? 2 : 1;  // blocks or vectors at once: at most 24 sums
  const int64_t num_tokens = kMasked ? visible[kRows - 1] : kChunkTokens;
  const int64_t num_blocks = div_up(num_tokens, kBlockSize);
  int64_t block = 0;
  for (; block + kWide <= num_blocks; block += kWide) {
    add_scores<kRows, kWide, kPrefetch>(q, head_dim, chunk, block, memory);
  }
  for (; block < num_blocks; ++block) add_scores<kRows, 1, kPrefetch>(q, head_dim, chunk, block, memory);
  weigh<kRows, kMasked>(memory, visible, chunk, num_tokens, head_dim, softmax, decay, weights);
  const int64_t num_quads = div_up(num_tokens, 4);
  int64_t column = 0;
  for (; column + kWide * kLanes <= head_dim; column += kWide * kLanes) {
    add_values<kRows, kWide, kPrefetch>(weights, decay, chunk, num_quads, head_dim, column, softmax.out);
  }
  for (; column < head_dim; column += kLanes) {
    add_values<kRows, 1, kPrefetch>(weights, decay, chunk, num_quads, head_dim, column, softmax.out);
  }
}

template <int kRows>
void chunk_of_rows(const PackedQuery& q, int64_t head_dim, const Chunk& chunk, const int64_t* visible, Softmax softmax,
                   float* memory) {
  if (visible[0] < kChunkTokens) {
    add_chunk<kRows, true, false>(q, head_dim, chunk, visible, softmax, memory);
  } else if (chunk.is_next_wanted) {
    add_chunk<kRows, false, true>(q, head_dim, chunk, visible, softmax, memory);
  } else {
    add_chunk<kRows, false, false>(q, head_dim, chunk, visible, softmax, memory);
  }
}

using ChunkOfRows = void (*)(const PackedQuery&, int64_t, const Chunk&, const int64_t*, Softmax, float*);
constexpr ChunkOfRows kChunkOfRows[kMaxRows + 1] = {nullptr,          chunk_of_rows<1>, chunk_of_rows<2>,
                                                    chunk_of_rows<3>, chunk_of_rows<4>, chunk_of_rows<5>,
                                                    chunk_of_rows<6>, chunk_of_rows<7>, chunk_of_rows<8>};

// The largest magnitude of a row, not below a number whose reciprocal is finite; NaN if any element is.
BLENDSERVE_INLINE float largest_magnitude(const float* x, int64_t size) {
  __m512 largest = _mm512_set1_ps(0x1p-100f), poison = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kLanes) {
    const __m512 v = _mm512_loadu_ps(x + i);
    largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
    poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison);
  }
  float lanes[kLanes], poisons[kLanes];
  _mm512_storeu_ps(lanes, largest);
  _mm512_storeu_ps(poisons, poison);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0] + sum_of_lanes(poisons);
}

BLENDSERVE_INLINE int32_t sum_of_ints(__m512i v) {
  int32_t lanes[kLanes], sum = 0;
  _mm512_storeu_si512(lanes, v);
  for (const int32_t lane : lanes) sum += lane;
  return sum;
}

void pack_row(const float* rotated, int64_t head_dim, const PackedQuery& to) {
  const float top = largest_magnitude(rotated, head_dim);
  *to.scales = top / kQueryTop * (kLog2E / static_cast<float>(rotation_size(head_dim)));
  const __m512 inverse = _mm512_set1_ps(kQueryTop / top);
  __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(rotated + i), inverse));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 8));
    high_sum = _mm512_add_epi32(high_sum, high);
    low_sum = _mm512_add_epi32(low_sum, low);
    alignas(16) int8_t planes[2][kLanes];
    _mm_store_si128(reinterpret_cast<__m128i*>(planes[0]), _mm512_cvtepi32_epi8(high));
    _mm_store_si128(reinterpret_cast<__m128i*>(planes[1]), _mm512_cvtepi32_epi8(low));
    int8_t* at = to.data + i / 4 * 8 * to.num_rows;
    for (int64_t quad = 0; quad < 4; ++quad, at += 8 * to.num_rows) {
      __builtin_memcpy(at, planes[0] + 4 * quad, 4);
      __builtin_memcpy(at + 4 * to.num_rows, planes[1] + 4 * quad, 4);
    }
  }
  to.offsets[0] = -128 * sum_of_ints(high_sum);
  to.offsets[to.num_rows] = -128 * sum_of_ints(low_sum);
}

struct Kernel {
  static constexpr int64_t kSumLanes = kLanes;
  static constexpr int64_t kMaxPassRows = kMaxRows;
  static constexpr float kNoScore = kLowest;
  using Query = PackedQuery;

  static int64_t pass_rows(int64_t num_rows) { return base2_pass_rows(num_rows); }

  static Query lay_out(float*& memory, int64_t num_rows, int64_t head_dim) {
    auto* data = reinterpret_cast<int8_t*>(take(memory, num_rows * head_dim / 2));
    float* scales = take(memory, num_rows);
    return {data, scales, reinterpret_cast<int32_t*>(take(memory, 2 * num_rows)), num_rows};
  }

  static int64_t chunk_floats(int64_t) { return 0; }
  static void read_chunk(const Chunk&, int64_t, float*) {}

  static void pack(const AttentionTile& tile, int64_t first_row, Query query) {
    alignas(64) float rotated[kMaxRotatedHead];
    for (int64_t row = 0; row < tile.num_tokens * tile.group; ++row) {
      const float* q = tile.q + row / tile.group * tile.row_stride + row % tile.group * tile.head_dim;
      memcpy(rotated, q, static_cast<size_t>(tile.head_dim) * sizeof(float));
      rotate(rotated, tile.head_dim);
      pack_row(rotated, tile.head_dim, query.from(first_row + row));
    }
  }

  static void add_chunk(const Query& query, int64_t row, int64_t num_rows, int64_t head_dim, const Chunk& chunk,
                        const int64_t* num_visible, Softmax softmax, float* scores) {
    kChunkOfRows[num_rows](query.from(row), head_dim, chunk, num_visible, softmax, scores);
  }

  static void merge_row(Softmax total, Softmax part, int64_t head_dim) { merge_base2_row(total, part, head_dim); }
  static void write_row(Softmax row, int64_t head_dim, float* to) {
    rotate(row.out, head_dim);
    write_base2_row(row, head_dim, static_cast<float>(rotation_size(head_dim)), to);
  }
};

}  // namespace

const AttentionKernels attention_kernels_int8 = kWalk<Kernel>;

}  // namespace blendserve::avx512vnni
