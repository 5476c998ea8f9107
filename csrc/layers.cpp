#include "layers.h"

#include <algorithm>
#include <utility>

#include "machine.h"

namespace blendserve {
namespace {

NanoBatch nano_batch(const ModelShape& shape, const ModelLimits& limits, int num_threads) {
  return {batch_limits(shape, limits),
          {shape.num_kv_heads, shape.group(), num_threads},
          attention_partial_floats(shape.group(), shape.head_stride())};
}

PipelineOptions pipeline_options(const OverlapOptions& overlap) {
  return {overlap.chunk_bytes, overlap.iteration_bytes, overlap.memory_lanes};
}

const AttentionTask& memory_task(const NanoBatch& nano, int64_t tile) {
  return nano.batch.tasks()[static_cast<size_t>(nano.batch.num_compute_tasks() + tile)];
}

// Pieces of the blocks of positions [begin, end) of one layer and head.
int64_t list_block_pieces(const KvCache& cache, const uint16_t* head, const int32_t* blocks, int64_t begin, int64_t end,
                          const uint16_t** pieces, int64_t max_pieces) {
  constexpr int64_t kPieceElements = kPrefetchPieceBytes / static_cast<int64_t>(sizeof(uint16_t));
  // Whole in bf16, since heads are padded; in int8 the line of scales is left out.
  const int64_t per_block = std::max<int64_t>(cache.head_stride() / kPieceElements, 1);
  int64_t count = 0;
  for (int64_t block = begin / kBlockSize; block < div_up(end, kBlockSize); ++block) {
    const uint16_t* start = head + blocks[block] * cache.block_stride();
    for (int64_t piece = 0; piece < per_block && count < max_pieces; ++piece)
      pieces[count++] = start + piece * kPieceElements;
    if (count == max_pieces) return count;
  }
  return count;
}

}  // namespace

Layers::Layers(Isa isa, const ModelShape& shape, const ModelLimits& limits, const ModelWeights& weights,
               Workspace& workspace, ThreadTeam& team, TraceRecorder& trace)
    : shape_(shape),
      weights_(weights),
      workspace_(workspace),
      team_(team),
      trace_(trace),
      ops_(isa, shape, limits.max_model_len, weights, workspace, team.num_threads()),
      l2_bytes_(l2_bytes()),
      blocks_(isa, shape, limits, weights, ops_, trace, team.num_threads(), l2_bytes_),
      pipeline_(team, pipeline_options(overlap_)),
      nano_batches_{nano_batch(shape, limits, team.num_threads()), nano_batch(shape, limits, team.num_threads())} {}

void Layers::set_overlap(const OverlapOptions& overlap) {
  overlap_ = overlap;
  pipeline_.set_options(pipeline_options(overlap));
}

void Layers::read_shared_once() {
  for (NanoBatch& nano : nano_batches_) nano.batch.read_shared_once();
}

void Layers::read_apart() {
  for (NanoBatch& nano : nano_batches_) nano.batch.read_apart();
}

int64_t Layers::num_bytes() const {
  int64_t bytes = ops_.num_table_bytes() + blocks_.num_bytes();
  for (const NanoBatch& nano : nano_batches_) bytes += nano.partials.num_bytes();
  return bytes;
}

void Layers::forward(const StepInput& input, const NanoBatchSplit& split, KvCache& cache, int num_nano_batches,
                     OpSeconds& op_s) {
  num_nano_batches_ = num_nano_batches;
  is_second_after_first_ = split.is_second_after_first();
  const int64_t max_tile_tokens = num_nano_batches > 1 ? 2 * kSegmentTokens : 0;
  for (int n = 0; n < kNumChains; ++n) {
    nano(n).batch.gather(input, split.parts(n), max_tile_tokens);
    nano(n).cache = &cache;
  }
  is_in_blocks_ = num_nano_batches == 1 && blocks_are_allowed_ && blocks_.are_for(nano(0).num_rows());
  workspace_.place(nano(0), 0);
  workspace_.place(nano(1), round_up(nano(0).num_rows(), kRowPanel));
  pipeline_.run(*this, num_nano_batches);
  for (NanoBatch& nano : nano_batches_) {
    for (size_t op = 0; op < kNumOps; ++op) op_s[op] += std::exchange(nano.op_s[op], 0.0);
  }
}

int64_t Layers::num_ops(int) const { return num_chain_ops(shape_.num_layers); }

int64_t Layers::num_awaited_ops(int chain, int64_t op) const {
  if (chain == 0 || stage_of(op) != Stage::kAttendCompute || !is_second_after_first_) return 0;
  return op_of(layer_of(op), Stage::kRotate) + 1;
}

OpTiles Layers::begin(int chain, int64_t op) {
  NanoBatch& nano = this->nano(chain);
  nano.started = std::chrono::steady_clock::now();
  const Stage stage = stage_of(op);
  if (is_in_blocks_ && RowBlocks::have(stage)) {
    return {RowBlocks::begin_with(stage) ? blocks_.num_blocks(nano.num_rows()) : 0, TileClass::kCompute, 0};
  }
  if (const PackedMatrix* w = matrix_of(op)) return cut_matmul(nano, *w, stage);
  const auto num_tasks = static_cast<int64_t>(nano.batch.tasks().size());
  const auto compute = [&](int64_t num_tiles) { return OpTiles{num_tiles, TileClass::kCompute, urgency_of(stage)}; };
  switch (stage) {
    case Stage::kRotate:
      return compute(ops_.num_rotate_tiles(nano.num_rows()));
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

void Layers::end(int chain, int64_t op) {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - nano(chain).started;
  if (is_in_blocks_ && RowBlocks::begin_with(stage_of(op))) return blocks_.share_out(elapsed.count(), nano(chain).op_s);
  nano(chain).op_s[static_cast<size_t>(counted_op(stage_of(op)))] += elapsed.count();
}

const PackedMatrix* Layers::matrix_of(int64_t op) const {
  switch (stage_of(op)) {
    case Stage::kQkv:
      return &layer(op).qkv;
    case Stage::kOutput:
      return &layer(op).o;
    case Stage::kGateUp:
      return &layer(op).gate_up;
    case Stage::kDown:
      return &layer(op).down;
    default:
      return nullptr;
  }
}

// Beside attention a tile takes as long as fetching one chunk, else the grid is that of the matmul alone.
OpTiles Layers::cut_matmul(NanoBatch& nano, const PackedMatrix& w, Stage stage) {
  nano.grid = suggest_grid(w.format(), nano.num_rows(), w.n(), w.k(), team_.num_threads(), l2_bytes_);
  if (num_nano_batches_ > 1) {
    const int64_t columns = overlap_.tile_flop / (2 * nano.grid.row_tile * w.k());
    nano.grid.col_tile = std::min(nano.grid.col_tile, round_up(std::max<int64_t>(columns, 1), kColumnPanel));
  }
  return {nano.grid.size(), TileClass::kCompute, urgency_of(stage)};
}

void Layers::run(int chain, int64_t op, int64_t tile, int worker, PrefetchPieces* pieces) {
  if (is_in_blocks_ && RowBlocks::begin_with(stage_of(op))) {
    return blocks_.run(nano(chain), op == 0 ? -1 : layer_of(op), tile, worker);
  }
  if (!trace_.is_on()) return run_tile(nano(chain), op, tile, worker, pieces);
  const int64_t begin_ns = TraceRecorder::now_ns();
  run_tile(nano(chain), op, tile, worker, pieces);
  const auto layer = static_cast<int32_t>(op == 0 ? -1 : layer_of(op));
  trace_.record(worker, static_cast<int32_t>(counted_op(stage_of(op))), layer, chain, begin_ns,
                TraceRecorder::now_ns());
}

void Layers::run_tile(NanoBatch& nano, int64_t op, int64_t tile, int worker, PrefetchPieces* pieces) {
  const int64_t i = layer_of(op);
  const LayerWeights& layer = this->layer(op);
  switch (stage_of(op)) {
    case Stage::kEmbed:
      return ops_.embed(nano, panel_rows(tile, nano.num_rows()));
    case Stage::kInputNorm:
      return ops_.norm_and_pack(nano, layer.input_norm, panel_rows(tile, nano.num_rows()), tile, nano.packed, worker);
    case Stage::kQkv:
      return ops_.multiply(nano, layer.qkv, tile, layer.qkv_bias, nano.qkv, shape_.qkv_width(), pieces);
    case Stage::kRotate:
      return ops_.rotate_and_cache(nano, i, ops_.rotate_rows(tile, nano.num_rows()));
    case Stage::kAttendCompute:
      return ops_.attend(nano, i, nano.batch.tasks()[static_cast<size_t>(tile)], worker);
    case Stage::kAttendMemory:
      return ops_.attend(nano, i, memory_task(nano, tile), worker);
    case Stage::kMerge:
      return ops_.merge_segments(nano, i, nano.batch.splits()[static_cast<size_t>(tile)]);
    case Stage::kPackAttention:
      return ops_.pack_attention(nano, panel_rows(tile, nano.num_rows()),
                                 nano.packed + activation_bytes(weights_.format(), tile * kRowPanel, shape_.q_width()));
    case Stage::kOutput:
      return ops_.multiply_and_add(nano, layer.o, tile, pieces);
    case Stage::kPostNorm:
      return ops_.norm_and_pack(nano, layer.post_attention_norm, panel_rows(tile, nano.num_rows()), tile, nano.packed,
                                worker);
    case Stage::kGateUp:
      return ops_.multiply(nano, layer.gate_up, tile, {}, nano.gate_up, 2 * shape_.intermediate_size, pieces);
    case Stage::kActivate:
      return ops_.activate_and_pack(nano, tile, worker);
    case Stage::kDown:
      return ops_.multiply_and_add(nano, layer.down, tile, pieces);
  }
}

int64_t Layers::num_fetched_pieces(int chain, int64_t op, int64_t tile) const {
  const PackedMatrix* w = matrix_of(op);
  if (w == nullptr) return 0;
  return num_prefetch_pieces(w->format(), nano(chain).grid.tile(tile), w->k(), overlap_.iteration_bytes);
}

// Of a group: what is shared, then what each member reads alone.
int64_t Layers::list_pieces(int chain, int64_t op, int64_t tile, const uint16_t** pieces, int64_t max_pieces) const {
  const NanoBatch& nano = this->nano(chain);
  const AttentionTask& task = memory_task(nano, tile);
  const std::span<const BatchEntry> entries = nano.batch.entries();
  const uint16_t* head = nano.cache->head(layer_of(op), task.kv_head);
  int64_t count = 0;
  const auto add = [&](const BatchEntry& entry, int64_t begin, int64_t end) {
    count += list_block_pieces(*nano.cache, head, entry.block_table, begin, std::min(end, entry.first_position + 1),
                               pieces + count, max_pieces - count);
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

}  // namespace blendserve
