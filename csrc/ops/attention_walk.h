// How attention walks over the positions of a tile, a group or a segment, written once for the kernels of every
// instruction set: a Kernel says how queries are packed and how one chunk is added. Private to csrc/ops/attention*.
//
// A Kernel has
//   kSumLanes, kMaxPassRows   partial sums per row, rows that one pass over a chunk may take
//   pass_rows(n)              how many of n rows the next pass takes
//   Query                     the packed queries of all rows; lay_out(memory, num_rows, head_dim), pack(tile, row,
//   query) add_chunk(...)            adds a chunk to the softmax of some rows merge_rows, write_row     of finished
//   segments
#pragma once

#include <math.h>
#include <string.h>

#include "ops/attention.h"

namespace blendserve {

// The functions of attention.h, compiled for one instruction set.
struct AttentionKernels {
  void (*tile)(const AttentionTile&, float* scratch);
  void (*group)(const AttentionTile* members, int64_t num_members, int64_t num_shared_tokens, float* scratch);
  void (*segment)(const AttentionTile&, int64_t segment, float* partial, float* scratch);
  void (*merge_segments)(const AttentionTile&, int64_t num_segments, float* partials);
};
namespace portable {
extern const AttentionKernels attention_kernels;
}
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512bf16 {
extern const AttentionKernels attention_kernels;
}

namespace {

// Running softmax of some rows, each one query of one head: weighted values, largest score, sum of weights.
struct Softmax {
  float* out;  // [rows][head_dim]
  float* max;  // [rows]; eight floats may be read from any row on
  float* sum;  // [rows][kSumLanes]
};

struct Chunk {
  const uint16_t* blocks[kChunkBlocks];
  const uint16_t* next[kChunkBlocks];  // of the following chunk, to be prefetched
  bool is_next_wanted;                 // by this pass; a tile's other passes over the chunk need not ask again
  int64_t num_blocks;                  // that hold tokens this tile may see; blocks[] repeats the last one
  int64_t num_tokens;
};

[[gnu::always_inline]] inline float* take(float*& memory, int64_t count) {
  float* start = memory;
  memory += round_up(count, 16);
  return start;
}

template <class Kernel>
struct Scratch {
  float* scores;
  typename Kernel::Query query;
  Softmax total, part;

  Scratch(float* memory, int64_t num_rows, int64_t head_dim) {
    scores = take(memory, kAttentionScoreFloats);
    query = Kernel::lay_out(memory, num_rows, head_dim);
    for (Softmax* softmax : {&total, &part}) {
      softmax->out = take(memory, num_rows * head_dim);
      softmax->max = take(memory, num_rows);
      softmax->sum = take(memory, num_rows * Kernel::kSumLanes);
    }
  }
};

template <class Kernel>
Softmax rows_from(Softmax softmax, int64_t row, int64_t head_dim) {
  return {softmax.out + row * head_dim, softmax.max + row, softmax.sum + row * Kernel::kSumLanes};
}

template <class Kernel>
void clear(Softmax softmax, int64_t first_row, int64_t num_rows, int64_t head_dim) {
  for (int64_t row = first_row; row < num_rows; ++row) softmax.max[row] = Kernel::kNoScore;
  const Softmax from = rows_from<Kernel>(softmax, first_row, head_dim);
  const int64_t count = num_rows - first_row;
  memset(from.sum, 0, static_cast<size_t>(count * Kernel::kSumLanes) * sizeof(float));
  memset(from.out, 0, static_cast<size_t>(count * head_dim) * sizeof(float));
}

// The chunk at `begin` of positions that end at `end`; the next chunk may reach to `last_end`.
inline Chunk chunk_at(const AttentionTile& tile, int64_t begin, int64_t end, int64_t last_end) {
  Chunk chunk;
  const int64_t first = begin / kBlockSize;
  const int64_t last = (end - 1) / kBlockSize;
  const int64_t last_next = (last_end - 1) / kBlockSize;
  chunk.is_next_wanted = first + kChunkBlocks <= last_next;
  chunk.num_tokens = end - begin < kChunkTokens ? end - begin : kChunkTokens;
  chunk.num_blocks = div_up(chunk.num_tokens, kBlockSize);
  for (int64_t b = 0; b < kChunkBlocks; ++b) {
    const int64_t here = first + b < last ? first + b : last;
    const int64_t next = first + kChunkBlocks + b < last_next ? first + kChunkBlocks + b : last_next;
    chunk.blocks[b] = tile.cache + tile.block_table[here] * tile.block_stride;
    chunk.next[b] = tile.cache + tile.block_table[next] * tile.block_stride;
  }
  return chunk;
}

// Adds positions [begin, end) to the softmax of all rows of the tile, which are those of `query` from `first_row` on;
// asks for blocks up to `last_end`.
template <class Kernel>
void add_positions(const AttentionTile& tile, const typename Kernel::Query& query, int64_t first_row, int64_t begin,
                   int64_t end, int64_t last_end, Softmax softmax, float* scores) {
  const int64_t num_rows = tile.num_tokens * tile.group;
  for (int64_t start = begin; start < end; start += kChunkTokens) {
    Chunk chunk = chunk_at(tile, start, end, last_end);
    const int64_t first_token = start > tile.first_position ? start - tile.first_position : 0;
    for (int64_t row = first_token * tile.group; row < num_rows;) {
      const int64_t rows = Kernel::pass_rows(num_rows - row);
      int64_t num_visible[Kernel::kMaxPassRows];  // never falls from row to row
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = tile.first_position + (row + r) / tile.group + 1 - start;
        num_visible[r] = visible < kChunkTokens ? visible : kChunkTokens;
      }
      Kernel::add_chunk(query, first_row + row, rows, tile.head_dim, chunk, num_visible,
                        rows_from<Kernel>(softmax, row, tile.head_dim), scores);
      row += rows;
      chunk.is_next_wanted = false;
    }
  }
}

// total = total merged with part, which holds later positions.
template <class Kernel>
void merge(Softmax total, Softmax part, int64_t first_row, int64_t num_rows, int64_t head_dim) {
  for (int64_t row = first_row; row < num_rows; ++row) {
    Kernel::merge_row(rows_from<Kernel>(total, row, head_dim), rows_from<Kernel>(part, row, head_dim), head_dim);
  }
}

template <class Kernel>
void write_out(const AttentionTile& tile, Softmax softmax) {
  for (int64_t row = 0; row < tile.num_tokens * tile.group; ++row) {
    float* to = tile.out + row / tile.group * tile.row_stride + row % tile.group * tile.head_dim;
    Kernel::write_row(rows_from<Kernel>(softmax, row, tile.head_dim), tile.head_dim, to);
  }
}

// Adds what the tile sees from position `begin` on and writes its result; its rows are those of the scratch from
// `first_row` on. The segment in which `begin` lies has been started unless it starts there.
template <class Kernel>
void attend_from(const AttentionTile& tile, int64_t begin, const Scratch<Kernel>& scratch, int64_t first_row) {
  const int64_t num_rows = tile.num_tokens * tile.group;
  const int64_t end = tile.first_position + tile.num_tokens;
  const Softmax total = rows_from<Kernel>(scratch.total, first_row, tile.head_dim);
  const Softmax part = rows_from<Kernel>(scratch.part, first_row, tile.head_dim);
  while (begin < end) {
    const int64_t segment = begin / kSegmentTokens * kSegmentTokens;
    const int64_t segment_end = segment + kSegmentTokens < end ? segment + kSegmentTokens : end;
    const int64_t first = segment > tile.first_position ? (segment - tile.first_position) * tile.group : 0;
    const Softmax softmax = segment == 0 ? total : part;
    if (begin == segment) clear<Kernel>(softmax, first, num_rows, tile.head_dim);
    add_positions<Kernel>(tile, scratch.query, first_row, begin, segment_end, end, softmax, scratch.scores);
    if (segment > 0) merge<Kernel>(total, part, first, num_rows, tile.head_dim);
    begin = segment_end;
  }
  write_out<Kernel>(tile, total);
}

template <class Kernel>
Softmax partial_at(const AttentionTile& tile, float* partials, int64_t segment) {
  float* start = partials + segment * attention_partial_floats(tile.group, tile.head_dim);
  float* max = start + tile.group * tile.head_dim;
  return {start, max, max + round_up(tile.group, 16)};
}

template <class Kernel>
void walk_tile(const AttentionTile& tile, float* memory) {
  const Scratch<Kernel> scratch(memory, tile.num_tokens * tile.group, tile.head_dim);
  Kernel::pack(tile, 0, scratch.query);
  attend_from<Kernel>(tile, 0, scratch, 0);
}

template <class Kernel>
void walk_group(const AttentionTile* members, int64_t num_members, int64_t num_shared_tokens, float* memory) {
  AttentionTile together = members[0];  // as a tile of so many tokens, all of which see the whole prefix
  together.num_tokens = num_members;
  together.first_position = num_shared_tokens;
  const int64_t num_rows = num_members * together.group;
  const Scratch<Kernel> scratch(memory, num_rows, together.head_dim);
  for (int64_t m = 0; m < num_members; ++m) Kernel::pack(members[m], m * together.group, scratch.query);
  for (int64_t begin = 0; begin < num_shared_tokens; begin += kSegmentTokens) {
    const Softmax softmax = begin == 0 ? scratch.total : scratch.part;
    const int64_t end = begin + kSegmentTokens;
    clear<Kernel>(softmax, 0, num_rows, together.head_dim);
    add_positions<Kernel>(together, scratch.query, 0, begin, end < num_shared_tokens ? end : num_shared_tokens,
                          num_shared_tokens, softmax, scratch.scores);
    if (begin > 0 && end <= num_shared_tokens) {
      merge<Kernel>(scratch.total, scratch.part, 0, num_rows, together.head_dim);
    }
  }
  for (int64_t m = 0; m < num_members; ++m) {
    attend_from<Kernel>(members[m], num_shared_tokens, scratch, m * together.group);
  }
}

template <class Kernel>
void walk_segment(const AttentionTile& tile, int64_t segment, float* partial, float* memory) {
  const Scratch<Kernel> scratch(memory, tile.group, tile.head_dim);
  const Softmax softmax = partial_at<Kernel>(tile, partial, 0);
  Kernel::pack(tile, 0, scratch.query);
  clear<Kernel>(softmax, 0, tile.group, tile.head_dim);
  const int64_t begin = segment * kSegmentTokens;
  const int64_t seen = tile.first_position + 1;
  const int64_t end = begin + kSegmentTokens < seen ? begin + kSegmentTokens : seen;
  add_positions<Kernel>(tile, scratch.query, 0, begin, end, end, softmax, scratch.scores);
}

template <class Kernel>
void walk_merge(const AttentionTile& tile, int64_t num_segments, float* partials) {
  const Softmax total = partial_at<Kernel>(tile, partials, 0);
  for (int64_t segment = 1; segment < num_segments; ++segment) {
    merge<Kernel>(total, partial_at<Kernel>(tile, partials, segment), 0, tile.group, tile.head_dim);
  }
  write_out<Kernel>(tile, total);
}

template <class Kernel>
constexpr AttentionKernels kWalk = {walk_tile<Kernel>, walk_group<Kernel>, walk_segment<Kernel>, walk_merge<Kernel>};

}  // namespace
}  // namespace blendserve
