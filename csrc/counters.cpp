#include "counters.h"

namespace blendserve {

void StepCounters::add_step(const ModelShape& shape, KvDtype kv_dtype, const ModelWeights& weights,
                            std::span<const NanoBatch> nano_batches, bool is_overlapped, int64_t num_head_rows) {
  int64_t num_rows = 0, num_attended = 0, num_read = 0;
  for (const NanoBatch& nano : nano_batches) {
    num_rows += nano.num_rows();
    num_attended += nano.batch.num_attended_tokens();
    num_read += nano.batch.num_read_tokens();
  }
  const auto layers = static_cast<double>(shape.num_layers);
  ++num_steps;
  if (is_overlapped) ++num_overlapped_steps;
  num_tokens += num_rows;
  matmul_flop += 2.0 * static_cast<double>(num_rows) * layers * static_cast<double>(shape.parameters_per_layer());
  matmul_flop += 2.0 * static_cast<double>(num_head_rows * shape.vocab_size * shape.hidden_size);
  attention_flop += 4.0 * layers * static_cast<double>(num_attended * shape.q_width());
  weight_bytes += static_cast<double>(weights.num_layer_bytes());
  if (num_head_rows > 0) weight_bytes += static_cast<double>(weights.lm_head.num_bytes());
  kv_bytes += static_cast<double>(num_read * shape.kv_bytes_per_token(kv_dtype));
}

}  // namespace blendserve
