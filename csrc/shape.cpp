#include "shape.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace blendserve {
namespace {

// Far beyond any model, and small enough that products of two dimensions and a number of rows fit into 64 bits.
constexpr int64_t kMaxDimension = int64_t{1} << 24;
constexpr int64_t kMaxLayers = int64_t{1} << 16;
constexpr int64_t kMaxThreads = int64_t{1} << 16;
// Rows, positions, blocks and slots of a step are 32-bit numbers.
constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();

void check_range(const char* what, int64_t value, int64_t max) {
  if (value >= 1 && value <= max) return;
  throw std::invalid_argument(std::string(what) + " is " + std::to_string(value) + "; it must be from 1 to " +
                              std::to_string(max));
}

}  // namespace

int64_t checked_num_layers(int64_t num_layers) {
  check_range("num_layers", num_layers, kMaxLayers);
  return num_layers;
}

int checked_num_threads(int num_threads) {
  check_range("num_threads", num_threads, kMaxThreads);
  return num_threads;
}

ModelShape checked(const ModelShape& shape) {
  checked_num_layers(shape.num_layers);
  check_range("vocab_size", shape.vocab_size, kMaxDimension);
  check_range("hidden_size", shape.hidden_size, kMaxDimension);
  check_range("intermediate_size", shape.intermediate_size, kMaxDimension);
  check_range("num_heads", shape.num_heads, kMaxDimension);
  check_range("num_kv_heads", shape.num_kv_heads, kMaxDimension);
  check_range("head_dim", shape.head_dim, kMaxDimension);
  if (shape.num_heads % shape.num_kv_heads != 0) {
    throw std::invalid_argument(std::to_string(shape.num_heads) + " query heads cannot share " +
                                std::to_string(shape.num_kv_heads) + " KV heads evenly");
  }
  if (shape.head_dim % 2 != 0) {
    throw std::invalid_argument("head_dim is " + std::to_string(shape.head_dim) + "; it must be even");
  }
  return shape;
}

ModelLimits checked(const ModelLimits& limits) {
  check_range("max_num_seqs", limits.max_num_seqs, kMaxCount);
  check_range("max_num_batched_tokens", limits.max_num_batched_tokens, kMaxCount);
  check_range("max_model_len", limits.max_model_len, kMaxCount);
  check_range("num_blocks", limits.num_blocks, kMaxCount);
  return limits;
}

BatchLimits batch_limits(const ModelShape& shape, const ModelLimits& limits) {
  return {limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len, limits.num_blocks,
          shape.vocab_size};
}

}  // namespace blendserve
