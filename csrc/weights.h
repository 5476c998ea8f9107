// The weights of a model, packed for its matrix products. Which files they came from is Python's business.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/matmul.h"
#include "shape.h"
#include "tensor.h"

namespace blendserve {

// Matrices are [outputs, inputs]; heads are padded to head_stride() in the outputs of qkv and the inputs of o.
struct LayerWeights {
  PackedMatrix qkv, o, gate_up, down;
  std::vector<float> input_norm, post_attention_norm;
  std::vector<float> qkv_bias, q_norm, k_norm;  // empty where the architecture has none

  int64_t num_matrix_bytes() const { return qkv.num_bytes() + o.num_bytes() + gate_up.num_bytes() + down.num_bytes(); }
};

struct ModelWeights {
  PackedMatrix lm_head;
  Buffer<uint16_t> embedding;  // bf16 [vocab_size, hidden_size]; empty where it is read from lm_head
  std::vector<float> norm;
  std::vector<double> inverse_frequencies;  // [head_dim / 2], radians per position
  double rotary_factor = 1.0;               // of cosines and sines
  std::vector<LayerWeights> layers;

  MatmulFormat format() const { return lm_head.format(); }  // of all matrices
  int64_t num_layer_bytes() const;
  int64_t num_bytes() const { return num_layer_bytes() + lm_head.num_bytes() + embedding.num_bytes(); }
};

// Returns the weights. Throws std::invalid_argument where they do not fit the shape or differ in format.
ModelWeights checked(ModelWeights weights, const ModelShape& shape, Isa isa);

}  // namespace blendserve
