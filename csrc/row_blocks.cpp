#include "row_blocks.h"

#include <algorithm>
#include <utility>

#include "ops/pointwise.h"

namespace blendserve {
namespace {

// Weights stream past the rows of a block. At 32 rows a core that makes 400 GOPS of int8, or 220 GFLOP/s of bf16, reads
// 6 to 7 GB/s of them, which is what each core of a server has when all are in use; at 16 rows twice that.
constexpr int64_t kMinRows = 32;
// More rows save no time: with 96 they are 2 GB/s, and the rows of a block leave L2.
constexpr int64_t kMaxRows = 96;
// Columns of the MLP that are activated at a time: a group of the int8 product that follows.
constexpr int64_t kChunk = 256;
constexpr int64_t kLineFloats = 16;

int64_t chunk_columns(MatmulFormat format, int64_t width) {
  const int64_t grain = activation_grain(format, width);
  if (format.dtype != Dtype::kInt8) return std::min(kChunk, width);
  return std::min(grain % kColumnPanel == 0 ? grain : 2 * grain, width);
}

void fetch(const void* weights, int64_t num_bytes) {
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(static_cast<const char*>(weights) + i, 0, 2);
}

int64_t strip_bytes(const PackedMatrix& w) {
  return static_cast<const char*>(w.weights_from(kColumnPanel)) - static_cast<const char*>(w.weights_from(0));
}

}  // namespace

RowBlocks::RowBlocks(Isa isa, const ModelShape& shape, const ModelLimits& limits, const ModelWeights& weights,
                     LayerOps& ops, TraceRecorder& trace, int num_threads, int64_t l2_bytes)
    : isa_(isa),
      shape_(shape),
      format_(weights.format()),
      weights_(weights),
      ops_(ops),
      trace_(trace),
      num_threads_(num_threads),
      chunk_(chunk_columns(format_, shape.intermediate_size)),
      products_stride_(2 * chunk_ + kLineFloats),
      max_pieces_(l2_bytes * 3 / 8 / kPrefetchPieceBytes),
      times_(static_cast<size_t>(num_threads)) {
  const int64_t width = std::max(shape.hidden_size, shape.q_width()), inner = shape.intermediate_size;
  const int64_t row_bytes = activation_bytes(format_, kRowPanel, width) / kRowPanel +
                            activation_bytes(format_, kRowPanel, inner) / kRowPanel +
                            static_cast<int64_t>(sizeof(float)) * (products_stride_ + shape.hidden_size);
  // Three quarters of L2 for rows; the rest for two strips of weights and what passes through.
  const int64_t fitting = l2_bytes / 4 * 3 / row_bytes / kRowPanel * kRowPanel;
  max_rows_ = inner % kColumnPanel == 0 && fitting >= kMinRows ? std::min(fitting, kMaxRows) : 0;
  max_rows_ = std::min(max_rows_, round_up(limits.max_num_batched_tokens, kRowPanel));
  packed_bytes_ = round_up(activation_bytes(format_, max_rows_, width), 64);
  activated_bytes_ = round_up(activation_bytes(format_, max_rows_, inner), 64);
  packed_ = Buffer<uint8_t>(checked_product({num_threads, packed_bytes_}));
  activated_ = Buffer<uint8_t>(checked_product({num_threads, activated_bytes_}));
  products_ = Buffer<float>(checked_product({num_threads, max_rows_, products_stride_}));
  pieces_ = Buffer<const uint16_t*>(checked_product({num_threads, max_pieces_}));
}

bool RowBlocks::are_for(int64_t num_rows) const { return max_rows_ > 0 && num_rows >= kMinRows * num_threads_; }

// As many for each thread.
int64_t RowBlocks::num_blocks(int64_t num_rows) const {
  return div_up(num_rows, max_rows_ * num_threads_) * num_threads_;
}

template <class Run>
void RowBlocks::timed(const Block& block, Op op, Run run) {
  const int64_t begin_ns = TraceRecorder::now_ns();
  run();
  const int64_t end_ns = TraceRecorder::now_ns();
  times_[static_cast<size_t>(block.worker)].op_s[static_cast<size_t>(op)] += static_cast<double>(end_ns - begin_ns);
  if (!trace_.is_on()) return;
  trace_.record(block.worker, static_cast<int32_t>(op), static_cast<int32_t>(block.layer), 0, begin_ns, end_ns);
}

void RowBlocks::share_out(double elapsed_s, OpSeconds& op_s) {
  OpSeconds sum = {};
  double total = 0.0;
  for (WorkerTime& time : times_) {
    for (size_t op = 0; op < kNumOps; ++op) {
      total += time.op_s[op];
      sum[op] += std::exchange(time.op_s[op], 0.0);
    }
  }
  for (size_t op = 0; op < kNumOps && total > 0.0; ++op) op_s[op] += elapsed_s * sum[op] / total;
}

void RowBlocks::run(NanoBatch& nano, int64_t layer, int64_t block, int worker) {
  const int64_t num_rows = nano.num_rows(), count = num_blocks(num_rows);
  Block b{nano,
          {block * num_rows / count, (block + 1) * num_rows / count},
          layer,
          worker,
          packed_.data() + worker * packed_bytes_,
          activated_.data() + worker * activated_bytes_,
          products_.data() + worker * max_rows_ * products_stride_,
          pieces_.data() + worker * max_pieces_};
  const LayerWeights* next = layer + 1 < shape_.num_layers ? &weights_.layers[static_cast<size_t>(layer + 1)] : nullptr;
  if (layer < 0) {
    timed(b, Op::kEmbed, [&] { ops_.embed(nano, b.rows); });
  } else {
    const LayerWeights& at = weights_.layers[static_cast<size_t>(layer)];
    run_attention_output(b, at, at.gate_up.weights_from(0));
    run_mlp(b, at, next != nullptr ? next->qkv.weights_from(0) : nullptr);
  }
  ++b.layer;
  if (next != nullptr) run_qkv(b, *next);
}

void RowBlocks::run_attention_output(const Block& b, const LayerWeights& layer, const void* next) {
  fetch(layer.o.weights_from(0), strip_bytes(layer.o));
  timed(b, Op::kPackAttention, [&] { ops_.pack_attention(b.nano, b.rows, b.packed); });
  const int64_t hidden = shape_.hidden_size;
  timed(b, Op::kOutput, [&] {
    matmul_tile(b.packed, layer.o, {.row_end = b.num_rows(), .col_end = hidden, .next_weights = next}, nullptr, true,
                b.nano.residual + b.rows.begin * hidden, hidden);
  });
}

void RowBlocks::run_mlp(const Block& b, const LayerWeights& layer, const void* next) {
  norm_and_pack(b, layer.post_attention_norm);
  const int64_t hidden = shape_.hidden_size, width = shape_.intermediate_size;
  for (int64_t begin = 0; begin < width; begin += chunk_) {
    const int64_t end = std::min(begin + chunk_, width);
    run_gate_up(b, layer, {begin, end}, end < width ? layer.gate_up.weights_from(end) : layer.down.weights_from(0));
  }
  timed(b, Op::kDown, [&] {
    matmul_tile(b.activated, layer.down, {.row_end = b.num_rows(), .col_end = hidden, .next_weights = next}, nullptr,
                true, b.nano.residual + b.rows.begin * hidden, hidden);
  });
}

// Gates and ups of some columns, activated and packed for down while they are in cache.
void RowBlocks::run_gate_up(const Block& b, const LayerWeights& layer, RowRange columns, const void* next) {
  const int64_t width = shape_.intermediate_size, count = columns.end - columns.begin;
  timed(b, Op::kGateUp, [&] {
    const auto multiply = [&](int64_t begin, float* y, const void* then) {
      matmul_tile(b.packed, layer.gate_up,
                  {.row_end = b.num_rows(), .col_begin = begin, .col_end = begin + count, .next_weights = then},
                  nullptr, false, y - begin, products_stride_);  // columns count from 0
    };
    multiply(columns.begin, b.products, layer.gate_up.weights_from(width + columns.begin));
    multiply(width + columns.begin, b.products + count, next);
  });
  timed(b, Op::kActivate, [&] {
    for (int64_t row = 0; row < b.num_rows(); ++row) {
      float* gate = b.products + row * products_stride_;
      silu_mul_row(isa_, gate, gate + count, count, gate);
    }
    pack_activation_columns(format_, b.products, products_stride_, b.num_rows(), columns.begin, columns.end, width,
                            b.activated);
  });
}

void RowBlocks::run_qkv(const Block& b, const LayerWeights& layer) {
  norm_and_pack(b, layer.input_norm);
  const int64_t width = shape_.qkv_width();
  const float* bias = layer.qkv_bias.empty() ? nullptr : layer.qkv_bias.data();
  PrefetchPieces pieces = {b.pieces, b.pieces + list_written(b)};
  timed(b, Op::kQkv, [&] {
    matmul_tile(b.packed, layer.qkv, {.row_end = b.num_rows(), .col_end = width}, bias, false,
                b.nano.qkv + b.rows.begin * width, width, &pieces);
  });
  timed(b, Op::kRotate, [&] { ops_.rotate_and_cache(b.nano, b.layer, b.rows); });
}

// Blocks of the KV cache that the rows write into, as many as a part of L2 holds: they are fetched beside the product.
int64_t RowBlocks::list_written(const Block& b) const {
  constexpr int64_t kPieceElements = kPrefetchPieceBytes / static_cast<int64_t>(sizeof(uint16_t));
  const KvCache& cache = *b.nano.cache;
  const int64_t per_block = std::max<int64_t>(cache.head_stride() / kPieceElements, 1);
  int64_t count = 0;
  int32_t last = -1;
  for (int64_t row = b.rows.begin; row < b.rows.end; ++row) {
    const int32_t block = b.nano.batch.rows()[static_cast<size_t>(row)].block;
    if (std::exchange(last, block) == block) continue;
    if (count + per_block * shape_.num_kv_heads > max_pieces_) break;
    for (int64_t h = 0; h < shape_.num_kv_heads; ++h) {
      const uint16_t* words = cache.head(b.layer, h) + block * cache.block_stride();
      for (int64_t piece = 0; piece < per_block; ++piece) b.pieces[count++] = words + piece * kPieceElements;
    }
  }
  return count;
}

void RowBlocks::norm_and_pack(const Block& b, const std::vector<float>& weight) {
  timed(b, Op::kNorm, [&] {
    for (int64_t begin = b.rows.begin; begin < b.rows.end; begin += kRowPanel) {
      ops_.norm_and_pack(b.nano, weight, {begin, std::min(begin + kRowPanel, b.rows.end)},
                         (begin - b.rows.begin) / kRowPanel, b.packed, b.worker);
    }
  });
}

}  // namespace blendserve
