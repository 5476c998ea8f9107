// What one tile of each stage computes. Knows neither the order of stages nor who runs them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention.h"
#include "ops/matmul.h"
#include "rotary.h"
#include "shape.h"
#include "weights.h"
#include "workspace.h"

namespace blendserve {

// Tiles of kRowPanel rows, the grain of pack_activations.
inline int64_t num_panels(int64_t num_rows) { return div_up(num_rows, kRowPanel); }
struct RowRange {
  int64_t begin, end;
};
RowRange panel_rows(int64_t panel, int64_t num_rows);

class LayerOps {
 public:
  // Borrows weights and workspace.
  LayerOps(Isa isa, const ModelShape& shape, int64_t max_model_len, const ModelWeights& weights, Workspace& workspace,
           int num_threads);

  void embed(NanoBatch& nano, RowRange rows);
  // At most kRowPanel rows, as panel number `index` of `packed`.
  void norm_and_pack(const NanoBatch& nano, const std::vector<float>& weight, RowRange rows, int64_t index,
                     uint8_t* packed, int worker);
  void multiply(NanoBatch& nano, const PackedMatrix& w, int64_t tile, const std::vector<float>& bias, float* y,
                int64_t ldy, PrefetchPieces* pieces);
  void multiply_and_add(NanoBatch& nano, const PackedMatrix& w, int64_t tile,
                        PrefetchPieces* pieces);  // to the residual
  int64_t num_rotate_tiles(int64_t num_rows) const;
  RowRange rotate_rows(int64_t tile, int64_t num_rows) const;
  void rotate_and_cache(NanoBatch& nano, int64_t layer, RowRange rows);
  void attend(NanoBatch& nano, int64_t layer, const AttentionTask& task, int worker);
  void merge_segments(NanoBatch& nano, int64_t layer, const AttentionSplit& split);
  void pack_attention(const NanoBatch& nano, RowRange rows, uint8_t* packed);  // `packed` begins with the first row
  void activate_and_pack(NanoBatch& nano, int64_t panel, int worker);

  int64_t num_partial_floats() const { return attention_partial_floats(shape_.group(), shape_.head_stride()); }
  int64_t num_table_bytes() const { return rotary_.num_bytes(); }

 private:
  int64_t num_rotate_rows(int64_t num_rows) const;
  void attend_group(NanoBatch& nano, int64_t layer, const AttentionTask& task, float* scratch);
  AttentionTile tile_of(const NanoBatch& nano, const AttentionTask& task, int64_t layer) const;

  Isa isa_;
  ModelShape shape_;
  const ModelWeights& weights_;
  Workspace& workspace_;
  int num_threads_;
  RotaryTables rotary_;
};

}  // namespace blendserve
