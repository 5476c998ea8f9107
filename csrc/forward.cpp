// The layers of a step: the ops of each nano-batch and their tiles. One row of a batch is one token.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "model.h"
#include "ops/pointwise.h"

namespace blendserve {
namespace {

constexpr int64_t kRotateRows = 4;  // rows of a tile: a few microseconds

// Tiles of kRowPanel rows, the grain of pack_activations.
int64_t num_panels(int64_t num_rows) { return div_up(num_rows, kRowPanel); }

struct RowRange {
  int64_t begin, end;
};
RowRange panel_rows(int64_t panel, int64_t num_rows) {
  return {panel * kRowPanel, std::min(num_rows, (panel + 1) * kRowPanel)};
}

// Op number 0 is kEmbed; then the other stages follow each other, layer by layer.
int64_t layer_of(int64_t op) { return (op - 1) / kStagesPerLayer; }
Stage stage_of(int64_t op) { return op == 0 ? Stage::kEmbed : static_cast<Stage>(1 + (op - 1) % kStagesPerLayer); }
int64_t op_of(int64_t layer, Stage stage) { return layer * kStagesPerLayer + static_cast<int64_t>(stage); }

Op counted_op(Stage stage) {
  constexpr Op kOps[] = {Op::kEmbed,     Op::kNorm,      Op::kQkv,           Op::kRotate, Op::kAttention,
                         Op::kAttention, Op::kAttention, Op::kPackAttention, Op::kOutput, Op::kNorm,
                         Op::kGateUp,    Op::kActivate,  Op::kDown};
  static_assert(std::size(kOps) == 1 + kStagesPerLayer);
  return kOps[static_cast<int>(stage)];
}

// How near an op is to the attention after it: the nearer one goes first, so that there is attention to hide again.
int32_t urgency_of(Stage stage) {
  const int stages_since_attention = (static_cast<int>(stage) - static_cast<int>(Stage::kMerge));
  return static_cast<int32_t>((stages_since_attention + kStagesPerLayer) % kStagesPerLayer);
}

}  // namespace

void Model::forward(const StepInput& input, KvCache& cache, int num_nano_batches) {
  step_cache_ = &cache;
  num_nano_batches_ = num_nano_batches;
  const int64_t max_tile_tokens = num_nano_batches > 1 ? 2 * kSegmentTokens : 0;
  for (int n = 0; n < kNumChains; ++n) {
    nano_batches_[static_cast<size_t>(n)].batch.gather(input, split_.parts(n), max_tile_tokens);
  }
  place(nano_batches_[0], 0);
  place(nano_batches_[1], round_up(nano_batches_[0].num_rows(), kRowPanel));
  pipeline_.run(*this, num_nano_batches);
  for (NanoBatch& nano : nano_batches_) {
    for (size_t op = 0; op < kNumOps; ++op) counters_.op_s[op] += std::exchange(nano.op_s[op], 0.0);
  }
}

void Model::place(NanoBatch& nano, int64_t first_row) {
  const int64_t widest = std::max({shape_.hidden_size, shape_.q_width(), shape_.intermediate_size});
  nano.residual = residual_.data() + first_row * shape_.hidden_size;
  nano.qkv = qkv_.data() + first_row * shape_.qkv_width();
  nano.gate_up = gate_up_.data() + first_row * 2 * shape_.intermediate_size;
  nano.packed = packed_.data() + round_up(activation_bytes(format_, first_row, widest), 64);
}

int64_t Model::num_ops(int) const { return 1 + shape_.num_layers * kStagesPerLayer; }

int64_t Model::num_awaited_ops(int chain, int64_t op) const {
  if (chain == 0 || op == 0 || stage_of(op) != Stage::kAttendCompute || !split_.is_second_after_first()) return 0;
  return op_of(layer_of(op), Stage::kRotate) + 1;
}

OpTiles Model::begin(int chain, int64_t op) {
  NanoBatch& nano = nano_batches_[static_cast<size_t>(chain)];
  nano.started = std::chrono::steady_clock::now();
  const Stage stage = stage_of(op);
  const LayerWeights& layer = weights_.layers[static_cast<size_t>(op == 0 ? 0 : layer_of(op))];
  const auto num_tasks = static_cast<int64_t>(nano.batch.tasks().size());
  const auto compute = [&](int64_t num_tiles) { return OpTiles{num_tiles, TileClass::kCompute, urgency_of(stage)}; };
  switch (stage) {
    case Stage::kRotate:
      return compute(div_up(nano.num_rows(), kRotateRows));
    case Stage::kQkv:
      return cut_matmul(nano, layer.qkv, stage);
    case Stage::kOutput:
      return cut_matmul(nano, layer.o, stage);
    case Stage::kGateUp:
      return cut_matmul(nano, layer.gate_up, stage);
    case Stage::kDown:
      return cut_matmul(nano, layer.down, stage);
    case Stage::kAttendCompute:  // all of it where nothing runs beside
      return compute(num_nano_batches_ == 1 ? num_tasks : nano.batch.num_compute_tasks());
    case Stage::kAttendMemory:
      if (num_nano_batches_ == 1) return {};
      return {num_tasks - nano.batch.num_compute_tasks(), TileClass::kMemory, 0};
    case Stage::kMerge:
      return compute(static_cast<int64_t>(nano.batch.splits().size()));
    default:
      return compute(num_panels(nano.num_rows()));
  }
}

void Model::end(int chain, int64_t op) {
  NanoBatch& nano = nano_batches_[static_cast<size_t>(chain)];
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - nano.started;
  nano.op_s[static_cast<size_t>(counted_op(stage_of(op)))] += elapsed.count();
}

const PackedMatrix* Model::matrix_of(int64_t op) const {
  if (op == 0) return nullptr;
  const LayerWeights& layer = weights_.layers[static_cast<size_t>(layer_of(op))];
  switch (stage_of(op)) {
    case Stage::kQkv:
      return &layer.qkv;
    case Stage::kOutput:
      return &layer.o;
    case Stage::kGateUp:
      return &layer.gate_up;
    case Stage::kDown:
      return &layer.down;
    default:
      return nullptr;
  }
}

int64_t Model::num_fetched_runs(int chain, int64_t op, int64_t tile) const {
  const PackedMatrix* w = matrix_of(op);
  if (w == nullptr) return 0;
  const MatmulGrid& grid = nano_batches_[static_cast<size_t>(chain)].grid;
  return num_prefetch_runs(format_, grid.tile(tile), w->k(), overlap_.step_bytes);
}

// The first columns of weights of the tile that this worker takes next, if the others take theirs as fast; those after
// them the matmul fetches itself.
int64_t Model::list_next_runs(int chain, int64_t op, int64_t tile, const uint16_t** runs, int64_t max_runs) const {
  const MatmulGrid& grid = nano_batches_[static_cast<size_t>(chain)].grid;
  const int64_t next = tile + team_.num_threads();
  if (next >= grid.size() || grid.tile(next).col_begin == grid.tile(tile).col_begin) return 0;
  const std::span<const uint16_t> columns = matrix_of(op)->columns(grid.tile(next).col_begin);
  constexpr size_t kRunElements = kPrefetchRunBytes / sizeof(uint16_t);
  int64_t count = 0;
  for (size_t i = 0; i < columns.size() && count < max_runs; i += kRunElements) runs[count++] = columns.data() + i;
  return count;
}

void Model::run(int chain, int64_t op, int64_t tile, int worker, PrefetchRuns* runs) {
  if (!trace_.is_on()) return run_tile(chain, op, tile, worker, runs);
  const int64_t begin_ns = TraceRecorder::now_ns();
  run_tile(chain, op, tile, worker, runs);
  const auto layer = static_cast<int32_t>(op == 0 ? -1 : layer_of(op));
  trace_.record(worker, static_cast<int32_t>(counted_op(stage_of(op))), layer, chain, begin_ns,
                TraceRecorder::now_ns());
}

void Model::run_tile(int chain, int64_t op, int64_t tile, int worker, PrefetchRuns* runs) {
  NanoBatch& nano = nano_batches_[static_cast<size_t>(chain)];
  const Stage stage = stage_of(op);
  const int64_t i = op == 0 ? 0 : layer_of(op);
  const LayerWeights& layer = weights_.layers[static_cast<size_t>(i)];
  const auto multiply = [&](const PackedMatrix& w, const std::vector<float>& bias, bool accumulate, float* y,
                            int64_t ldy) {
    matmul_tile(nano.packed, w, nano.grid.tile(tile), bias.empty() ? nullptr : bias.data(), accumulate, y, ldy, runs);
  };
  switch (stage) {
    case Stage::kEmbed:
      return embed(nano, tile);
    case Stage::kInputNorm:
      return norm_and_pack(nano, layer.input_norm, tile, worker);
    case Stage::kQkv:
      return multiply(layer.qkv, layer.qkv_bias, false, nano.qkv, shape_.qkv_width());
    case Stage::kRotate:
      return rotate_and_cache(nano, i, tile);
    case Stage::kAttendCompute:
      return attend(nano, i, nano.batch.tasks()[static_cast<size_t>(tile)], worker);
    case Stage::kAttendMemory:
      return attend(nano, i, memory_task(nano, tile), worker);
    case Stage::kMerge:
      return merge_segments(nano, i, nano.batch.splits()[static_cast<size_t>(tile)]);
    case Stage::kPackAttention:
      return pack_attention(nano, tile);
    case Stage::kOutput:
      return multiply(layer.o, {}, true, nano.residual, shape_.hidden_size);
    case Stage::kPostNorm:
      return norm_and_pack(nano, layer.post_attention_norm, tile, worker);
    case Stage::kGateUp:
      return multiply(layer.gate_up, {}, false, nano.gate_up, 2 * shape_.intermediate_size);
    case Stage::kActivate:
      return activate_and_pack(nano, tile, worker);
    case Stage::kDown:
      return multiply(layer.down, {}, true, nano.residual, shape_.hidden_size);
  }
}

// Of a group: what is shared, then what each member reads alone.
int64_t Model::list_runs(int chain, int64_t op, int64_t tile, const uint16_t** runs, int64_t max_runs) const {
  const NanoBatch& nano = nano_batches_[static_cast<size_t>(chain)];
  const AttentionTask& task = memory_task(nano, tile);
  const std::span<const BatchEntry> entries = nano.batch.entries();
  const uint16_t* head = step_cache_->head(layer_of(op), task.kv_head);
  int64_t count = 0;
  const auto add = [&](const BatchEntry& entry, int64_t begin, int64_t end) {
    count += list_block_runs(head, entry.block_table, begin, std::min(end, entry.first_position + 1), runs + count,
                             max_runs - count);
  };
  const BatchEntry& entry = entries[static_cast<size_t>(task.entry)];
  if (task.segment >= 0) {
    add(entry, task.segment * kSegmentTokens, (task.segment + 1) * kSegmentTokens);
  } else {
    add(entry, 0, entry.first_position + 1);
  }
  for (int32_t m = 1; m < task.num_members; ++m) {
    const auto member = nano.batch.members()[static_cast<size_t>(task.first_member + m)];
    const BatchEntry& other = entries[static_cast<size_t>(member)];
    add(other, task.num_shared_tokens, other.first_position + 1);
  }
  return count;
}

// Runs over the blocks of positions [begin, end) of one layer and head.
int64_t Model::list_block_runs(const uint16_t* head, const int32_t* blocks, int64_t begin, int64_t end,
                               const uint16_t** runs, int64_t max_runs) const {
  constexpr int64_t kRunElements = kPrefetchRunBytes / static_cast<int64_t>(sizeof(uint16_t));
  const int64_t per_block = 2 * kBlockSize * shape_.head_stride() / kRunElements;  // whole, since heads are padded
  int64_t count = 0;
  for (int64_t block = begin / kBlockSize; block < div_up(end, kBlockSize); ++block) {
    const uint16_t* start = head + blocks[block] * step_cache_->block_stride();
    for (int64_t run = 0; run < per_block && count < max_runs; ++run) runs[count++] = start + run * kRunElements;
    if (count == max_runs) return count;
  }
  return count;
}

const AttentionTask& Model::memory_task(const NanoBatch& nano, int64_t tile) const {
  return nano.batch.tasks()[static_cast<size_t>(nano.batch.num_compute_tasks() + tile)];
}

void Model::embed(NanoBatch& nano, int64_t panel) {
  const int64_t hidden = shape_.hidden_size;
  const RowRange rows = panel_rows(panel, nano.num_rows());
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int32_t token = nano.batch.rows()[static_cast<size_t>(row)].token;
    float* x = nano.residual + row * hidden;
    if (weights_.embedding.size() > 0) {
      embed_row(weights_.embedding.data() + token * hidden, hidden, x);
    } else {
      weights_.lm_head.unpack_row(token, x);
    }
  }
}

RowPanel Model::row_panel(int worker, int64_t width) {
  return {panels_.data() + worker * panel_floats_, width, RowPanel::stride_of(width)};
}

void Model::pack_panel(const RowPanel& rows, int64_t num_rows, int64_t panel, uint8_t* packed) const {
  pack_activations(format_, rows.data, rows.stride, 0, num_rows, rows.width,
                   packed + activation_bytes(format_, panel * kRowPanel, rows.width));
}

void Model::norm_and_pack(NanoBatch& nano, const std::vector<float>& weight, int64_t panel, int worker) {
  const int64_t hidden = shape_.hidden_size;
  const RowRange rows = panel_rows(panel, nano.num_rows());
  const RowPanel normed = row_panel(worker, hidden);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    rms_norm_row(isa_, nano.residual + row * hidden, weight.data(), shape_.rms_norm_eps, hidden,
                 normed.row(row - rows.begin));
  }
  pack_panel(normed, rows.end - rows.begin, panel, nano.packed);
}

// Beside attention a tile takes as long as fetching one chunk, else the grid is that of the matmul alone.
OpTiles Model::cut_matmul(NanoBatch& nano, const PackedMatrix& w, Stage stage) {
  nano.grid = suggest_grid(format_, nano.num_rows(), w.n(), w.k(), team_.num_threads(), l2_bytes_);
  if (num_nano_batches_ > 1) {
    const int64_t columns = overlap_.tile_flop / (2 * nano.grid.row_tile * w.k());
    nano.grid.col_tile = std::min(nano.grid.col_tile, round_up(std::max<int64_t>(columns, 1), kColumnPanel));
  }
  return {nano.grid.size(), TileClass::kCompute, urgency_of(stage)};
}

void Model::rotate_and_cache(NanoBatch& nano, int64_t layer, int64_t tile) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  const int64_t stride = shape_.head_stride(), half = shape_.head_dim / 2;
  const float q_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  const int64_t end = std::min(nano.num_rows(), (tile + 1) * kRotateRows);
  for (int64_t row = tile * kRotateRows; row < end; ++row) {
    const BatchRow& at = nano.batch.rows()[static_cast<size_t>(row)];
    const float* cosine = cosine_.data() + at.position * half;
    const float* sine = sine_.data() + at.position * half;
    float* head = nano.qkv + row * shape_.qkv_width();
    const auto norm_and_rotate = [&](const std::vector<float>& norm, float scale) {
      if (!norm.empty()) rms_norm_row(isa_, head, norm.data(), shape_.rms_norm_eps, shape_.head_dim, head);
      rotate_row(isa_, head, cosine, sine, half, scale);
    };
    for (int64_t h = 0; h < shape_.num_heads; ++h, head += stride) norm_and_rotate(weights.q_norm, q_scale);
    for (int64_t h = 0; h < shape_.num_kv_heads; ++h, head += stride) {
      norm_and_rotate(weights.k_norm, 1.0f);
      step_cache_->write(isa_, layer, h, at.block, at.position % kBlockSize, head, head + shape_.kv_width());
    }
  }
}

AttentionTile Model::attention_of(const NanoBatch& nano, const AttentionTask& task, int64_t layer) const {
  const BatchEntry& entry = nano.batch.entries()[static_cast<size_t>(task.entry)];
  float* q = nano.qkv + (entry.first_row + task.first_token) * shape_.qkv_width() +
             task.kv_head * shape_.group() * shape_.head_stride();
  return {.q = q,
          .out = q,
          .row_stride = shape_.qkv_width(),
          .num_tokens = task.num_tokens,
          .first_position = entry.first_position + task.first_token,
          .group = shape_.group(),
          .head_dim = shape_.head_stride(),
          .cache = step_cache_->head(layer, task.kv_head),
          .block_stride = step_cache_->block_stride(),
          .block_table = entry.block_table};
}

void Model::attend(NanoBatch& nano, int64_t layer, const AttentionTask& task, int worker) {
  const int64_t partial_floats = attention_partial_floats(shape_.group(), shape_.head_stride());
  float* scratch = attention_scratch_.data() + worker * attention_scratch_floats(shape_.group(), shape_.head_stride());
  if (task.num_members > 0) return attend_group(nano, layer, task, scratch);
  const AttentionTile tile = attention_of(nano, task, layer);
  if (task.segment < 0) {
    attention_tile(isa_, tile, scratch);
  } else {
    attention_segment(isa_, tile, task.segment, nano.partials.data() + task.partial * partial_floats, scratch);
  }
}

void Model::attend_group(NanoBatch& nano, int64_t layer, const AttentionTask& task, float* scratch) {
  std::array<AttentionTile, kMaxGroupRows> tiles;
  const auto members =
      nano.batch.members().subspan(static_cast<size_t>(task.first_member), static_cast<size_t>(task.num_members));
  for (size_t m = 0; m < members.size(); ++m) {
    tiles[m] = attention_of(nano, {members[m], task.kv_head, 0, 1, -1, -1, 0}, layer);
  }
  attention_group(isa_, {tiles.data(), members.size()}, task.num_shared_tokens, scratch);
}

void Model::merge_segments(NanoBatch& nano, int64_t layer, const AttentionSplit& split) {
  const int64_t partial_floats = attention_partial_floats(shape_.group(), shape_.head_stride());
  const AttentionTask task = {split.entry, split.kv_head, 0, 1, -1, -1, 0};
  merge_attention_segments(isa_, attention_of(nano, task, layer), split.num_segments,
                           nano.partials.data() + split.first_partial * partial_floats);
}

void Model::pack_attention(NanoBatch& nano, int64_t panel) {
  const RowRange rows = panel_rows(panel, nano.num_rows());
  pack_activations(format_, nano.qkv, shape_.qkv_width(), rows.begin, rows.end, shape_.q_width(), nano.packed);
}

void Model::activate_and_pack(NanoBatch& nano, int64_t panel, int worker) {
  const int64_t width = shape_.intermediate_size;
  const RowRange rows = panel_rows(panel, nano.num_rows());
  const RowPanel activated = row_panel(worker, width);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* gate = nano.gate_up + row * 2 * width;
    silu_mul_row(isa_, gate, gate + width, width, activated.row(row - rows.begin));
  }
  pack_panel(activated, rows.end - rows.begin, panel, nano.packed);
}

void Model::head(std::span<const float* const> rows) {
  const auto num_rows = static_cast<int64_t>(rows.size());
  const int64_t hidden = shape_.hidden_size;
  run(Op::kHeadNorm, num_panels(num_rows), [&](int64_t panel, int worker) {
    const RowRange range = panel_rows(panel, num_rows);
    const RowPanel normed = row_panel(worker, hidden);
    for (int64_t row = range.begin; row < range.end; ++row) {
      rms_norm_row(isa_, rows[static_cast<size_t>(row)], weights_.norm.data(), shape_.rms_norm_eps, hidden,
                   normed.row(row - range.begin));
    }
    pack_panel(normed, range.end - range.begin, panel, packed_.data());
  });
  const PackedMatrix& w = weights_.lm_head;
  const MatmulGrid grid = suggest_grid(format_, num_rows, w.n(), w.k(), team_.num_threads(), l2_bytes_);
  run(Op::kHead, grid.size(), [&](int64_t tile, int) {
    matmul_tile(packed_.data(), w, grid.tile(tile), nullptr, false, logits_.data(), shape_.vocab_size);
  });
}

}  // namespace blendserve
