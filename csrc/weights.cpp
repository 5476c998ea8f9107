#include "weights.h"

#include <stdexcept>
#include <string>

namespace blendserve {
namespace {

void check_size(const char* what, int64_t actual, int64_t expected) {
  if (actual == expected) return;
  throw std::invalid_argument(std::string(what) + " has size " + std::to_string(actual) + ", expected " +
                              std::to_string(expected));
}

void check_matrix(const char* what, const PackedMatrix& matrix, MatmulFormat format, int64_t n, int64_t k) {
  if (matrix.isa() != format.isa || matrix.dtype() != format.dtype) {
    throw std::invalid_argument(std::string(what) + " is packed as " + std::string(dtype_name(matrix.dtype())) +
                                " for " + std::string(isa_name(matrix.isa())) + ", the model as " +
                                std::string(dtype_name(format.dtype)) + " for " + std::string(isa_name(format.isa)));
  }
  check_size(what, matrix.n(), n);
  check_size(what, matrix.k(), k);
}

void check_vector(const char* what, const std::vector<float>& vector, int64_t n) {
  check_size(what, static_cast<int64_t>(vector.size()), n);
}

void check_layer(const LayerWeights& layer, const ModelShape& s, MatmulFormat format) {
  check_matrix("qkv", layer.qkv, format, s.qkv_width(), s.hidden_size);
  check_matrix("o", layer.o, format, s.hidden_size, s.q_width());
  check_matrix("gate_up", layer.gate_up, format, 2 * s.intermediate_size, s.hidden_size);
  check_matrix("down", layer.down, format, s.hidden_size, s.intermediate_size);
  check_vector("input_norm", layer.input_norm, s.hidden_size);
  check_vector("post_attention_norm", layer.post_attention_norm, s.hidden_size);
  if (!layer.qkv_bias.empty()) check_vector("qkv_bias", layer.qkv_bias, s.qkv_width());
  if (!layer.q_norm.empty()) check_vector("q_norm", layer.q_norm, s.head_dim);
  check_size("k_norm", static_cast<int64_t>(layer.k_norm.size()), static_cast<int64_t>(layer.q_norm.size()));
}

}  // namespace

int64_t ModelWeights::num_layer_bytes() const {
  int64_t bytes = 0;
  for (const LayerWeights& layer : layers) bytes += layer.num_matrix_bytes();
  return bytes;
}

ModelWeights checked(ModelWeights weights, const ModelShape& shape, Isa isa) {
  const MatmulFormat format(isa, weights.lm_head.dtype());
  check_size("the list of layers", static_cast<int64_t>(weights.layers.size()), shape.num_layers);
  check_matrix("lm_head", weights.lm_head, format, shape.vocab_size, shape.hidden_size);
  if (weights.embedding.size() > 0) {
    check_size("embedding", weights.embedding.size(), shape.vocab_size * shape.hidden_size);
  }
  check_vector("norm", weights.norm, shape.hidden_size);
  check_size("inverse_frequencies", static_cast<int64_t>(weights.inverse_frequencies.size()), shape.head_dim / 2);
  for (const LayerWeights& layer : weights.layers) check_layer(layer, shape, format);
  return weights;
}

}  // namespace blendserve
