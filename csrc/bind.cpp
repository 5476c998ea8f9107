// The Python face of the core: arrays in, arrays out, no logic. src/blendserve/_native.pyi describes it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model.h"
#include "ops/bf16.h"

namespace nb = nanobind;

namespace blendserve {
namespace {

template <class T, int kDimensions>
using Array = nb::ndarray<const T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
using Matrix = Array<float, 2>;
using Vector = Array<float, 1>;

template <class AnyArray>
auto view(const AnyArray& array) {
  return std::span(array.data(), array.size());
}

std::vector<float> copy(const Vector& vector) { return {vector.data(), vector.data() + vector.size()}; }

std::vector<float> copy(const std::optional<Vector>& vector) { return vector ? copy(*vector) : std::vector<float>(); }

// Weights on their way from files to a model, packed layer by layer so that float32 copies never add up.
class WeightLoader {
 public:
  WeightLoader(std::string_view isa, std::string_view dtype, int64_t num_layers)
      : format_(isa_from_name(isa), dtype_from_name(dtype)) {
    if (!is_supported(format_.isa)) {
      throw std::invalid_argument("this processor has no " + std::string(isa) + "; use 'auto'");
    }
    weights_.layers.resize(static_cast<size_t>(checked_num_layers(num_layers)));
  }

  void set_layer(size_t index, const Matrix& qkv, const Matrix& output, const Matrix& gate_up, const Matrix& down,
                 const Vector& input_norm, const Vector& post_attention_norm, const std::optional<Vector>& qkv_bias,
                 const std::optional<Vector>& q_norm, const std::optional<Vector>& k_norm) {
    LayerWeights layer;
    layer.input_norm = copy(input_norm);
    layer.post_attention_norm = copy(post_attention_norm);
    layer.qkv_bias = copy(qkv_bias);
    layer.q_norm = copy(q_norm);
    layer.k_norm = copy(k_norm);
    layer.qkv = pack(qkv);
    layer.o = pack(output);
    layer.gate_up = pack(gate_up);
    layer.down = pack(down);
    weights_.layers.at(index) = std::move(layer);
  }

  // Where `embedding` is absent, it is read from the head.
  void set_ends(const std::optional<Matrix>& embedding, const Matrix& lm_head, const Vector& norm,
                const Array<double, 1>& inverse_frequencies, double rotary_factor) {
    weights_.norm = copy(norm);
    weights_.inverse_frequencies.assign(inverse_frequencies.data(),
                                        inverse_frequencies.data() + inverse_frequencies.size());
    weights_.rotary_factor = rotary_factor;
    weights_.lm_head = pack(lm_head);
    if (!embedding) return;
    nb::gil_scoped_release release;
    weights_.embedding = Buffer<uint16_t>(static_cast<int64_t>(embedding->size()));
    std::transform(embedding->data(), embedding->data() + embedding->size(), weights_.embedding.data(),
                   bf16_from_float);
  }

  Isa isa() const { return format_.isa; }
  ModelWeights take() { return std::exchange(weights_, {}); }

 private:
  PackedMatrix pack(const Matrix& matrix) {
    nb::gil_scoped_release release;
    return {format_, view(matrix), static_cast<int64_t>(matrix.shape(0)), static_cast<int64_t>(matrix.shape(1)),
            &memory_};
  }

  MatmulFormat format_;
  WeightMemory memory_;
  ModelWeights weights_;
};

template <class T, size_t kDimensions>
auto own(std::vector<T> values, const std::array<size_t, kDimensions>& shape) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owned->data();
  nb::capsule owner(owned.release(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<kDimensions>>(data, kDimensions, shape.data(), owner);
}

int64_t forward(Model& model, const Array<int32_t, 1>& slots, const Array<int32_t, 1>& num_scheduled_tokens,
                const Array<int32_t, 1>& num_computed_tokens, const Array<bool, 1>& is_sampled,
                const Array<int32_t, 2>& token_ids, const Array<int32_t, 2>& block_tables) {
  if (num_scheduled_tokens.size() != slots.size() || num_computed_tokens.size() != slots.size() ||
      is_sampled.size() != slots.size() || token_ids.shape(0) != block_tables.shape(0)) {
    throw std::invalid_argument("the arrays of a plan differ in length");
  }
  const StepInput input = {view(slots),
                           view(num_scheduled_tokens),
                           view(num_computed_tokens),
                           is_sampled.data(),
                           token_ids.data(),
                           static_cast<int64_t>(token_ids.shape(1)),
                           block_tables.data(),
                           static_cast<int64_t>(block_tables.shape(1)),
                           static_cast<int64_t>(token_ids.shape(0))};
  nb::gil_scoped_release release;
  return model.forward(input);
}

TokenMasks view_masks(const Array<int32_t, 1>& mask_rows, const Array<int32_t, 2>& masks) {
  return {view(mask_rows), masks.data(), static_cast<int64_t>(masks.shape(0)), static_cast<int64_t>(masks.shape(1))};
}

// A function of Python's, (first, tokens) -> None or (mask_rows, masks). It keeps what the last call returned.
class PythonCheck {
 public:
  explicit PythonCheck(const nb::callable& function) : function_(function) {}

  TokenMasks operator()(size_t first, std::span<const Sample> samples) {
    nb::gil_scoped_acquire acquire;
    std::vector<int32_t> tokens;
    for (const Sample& sample : samples) tokens.push_back(sample.token);
    const size_t count = tokens.size();
    const nb::object found = function_(first, own<int32_t, 1>(std::move(tokens), {count}));
    kept_.reset();
    if (found.is_none()) return {};
    kept_ = nb::cast<std::pair<Array<int32_t, 1>, Array<int32_t, 2>>>(found, false);
    return view_masks(kept_->first, kept_->second);
  }

 private:
  const nb::callable& function_;
  std::optional<std::pair<Array<int32_t, 1>, Array<int32_t, 2>>> kept_;
};

auto sample(Model& model, const std::optional<Array<int32_t, 1>>& mask_rows,
            const std::optional<Array<int32_t, 2>>& masks, const std::optional<nb::callable>& refused) {
  TokenMasks allowed;
  if (mask_rows && masks) allowed = view_masks(*mask_rows, *masks);
  std::optional<PythonCheck> check;  // outlives the step, and goes when the GIL is held again
  if (refused) check.emplace(*refused);
  std::span<const Sample> samples;
  {
    nb::gil_scoped_release release;
    samples = model.sample(allowed, check ? SampleCheck(std::ref(*check)) : SampleCheck());
  }
  std::vector<int32_t> tokens;
  std::vector<std::tuple<int64_t, float, std::vector<std::pair<int32_t, float>>>> logprobs;
  for (const Sample& sample : samples) {
    if (sample.has_logprob) {
      std::vector<std::pair<int32_t, float>> top;
      for (const TokenLogit& best : sample.top) top.emplace_back(best.token, best.logit);
      logprobs.emplace_back(static_cast<int64_t>(tokens.size()), sample.logprob, std::move(top));
    }
    tokens.push_back(sample.token);
  }
  return std::make_pair(own<int32_t, 1>(std::move(tokens), {samples.size()}), std::move(logprobs));
}

// Log probabilities [n], best alternatives [n, num_top] as tokens and as log probabilities.
auto prompt_logprobs(const Model& model, int64_t slot, const Array<int32_t, 1>& blocks) {
  PromptLogprobs found = model.prompt_results().logprobs(slot, view(blocks));
  const size_t num_tokens = found.logprobs.size(), num_top = static_cast<size_t>(found.num_top);
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  for (const TokenLogit& best : found.top) {
    tokens.push_back(best.token);
    logprobs.push_back(best.logit);
  }
  return std::make_tuple(own<float, 1>(std::move(found.logprobs), {num_tokens}),
                         own<int32_t, 2>(std::move(tokens), {num_tokens, num_top}),
                         own<float, 2>(std::move(logprobs), {num_tokens, num_top}));
}

auto pooled(const Model& model, int64_t slot, const Array<int32_t, 1>& blocks) {
  std::vector<float> state = model.prompt_results().pooled(slot, view(blocks));
  const size_t size = state.size();
  return own<float, 1>(std::move(state), {size});
}

auto logits(Model& model, const Array<int32_t, 1>& token_ids) {
  const auto vocab_size = static_cast<size_t>(model.shape().vocab_size);
  std::vector<float> result(token_ids.size() * vocab_size);
  {
    nb::gil_scoped_release release;
    model.logits(view(token_ids), result.data());
  }
  return own<float, 2>(std::move(result), {token_ids.size(), vocab_size});
}

nb::dict counters(const Model& model) {
  const StepCounters& counters = model.counters();
  nb::dict seconds, result;
  for (int op = 0; op < kNumOps; ++op) {
    const std::string_view name = op_name(static_cast<Op>(op));
    seconds[nb::str(name.data(), name.size())] = counters.op_s[static_cast<size_t>(op)];
  }
  result["num_steps"] = counters.num_steps;
  result["num_overlapped_steps"] = counters.num_overlapped_steps;
  result["num_tokens"] = counters.num_tokens;
  result["matmul_flop"] = counters.matmul_flop;
  result["attention_flop"] = counters.attention_flop;
  result["weight_bytes"] = counters.weight_bytes;
  result["kv_bytes"] = counters.kv_bytes;
  result["op_s"] = seconds;
  return result;
}

// Spans since the trace was started as int64 [number of spans, 7], in the order of _native.pyi.
auto spans(Model& model) {
  const TraceRecorder& trace = model.trace();
  std::vector<int64_t> values;
  for (int worker = 0; worker < trace.num_workers(); ++worker) {
    for (const TraceSpan& span : trace.spans(worker)) {
      values.insert(values.end(),
                    {worker, span.op, span.layer, span.nano_batch, span.begin_ns, span.end_ns, span.busy_ns});
    }
  }
  const size_t num_spans = values.size() / 7;
  return own<int64_t, 2>(std::move(values), {num_spans, 7});
}

std::vector<std::string> op_names() {
  std::vector<std::string> names;
  for (int op = 0; op < kNumOps; ++op) names.emplace_back(op_name(static_cast<Op>(op)));
  return names;
}

// What OverlapOptions are where nothing else is known of a machine.
nb::dict default_overlap() {
  constexpr OverlapOptions kDefault;
  nb::dict result;
  result["chunk_bytes"] = kDefault.chunk_bytes;
  result["tile_flop"] = kDefault.tile_flop;
  result["iteration_bytes"] = kDefault.iteration_bytes;
  result["memory_lanes"] = kDefault.memory_lanes;
  result["gemm_flop_per_s"] = kDefault.gemm_flop_per_s;
  result["attention_flop_per_s"] = kDefault.attention_flop_per_s;
  result["kv_bytes_per_s"] = kDefault.kv_bytes_per_s;
  result["weight_bytes_per_s"] = kDefault.weight_bytes_per_s;
  result["compute_delay"] = kDefault.compute_delay;
  result["memory_delay"] = kDefault.memory_delay;
  return result;
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("BLOCK_SIZE") = kBlockSize;
  m.attr("DEFAULT_OVERLAP") = default_overlap();

  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
  m.def("op_names", &op_names);
  m.def("is_supported", [](std::string_view name) { return is_supported(isa_from_name(name)); }, nb::arg("isa"));

  nb::class_<WeightLoader>(m, "WeightLoader")
      .def(nb::init<std::string_view, std::string_view, int64_t>(), nb::arg("isa"), nb::arg("dtype"),
           nb::arg("num_layers"))
      .def("set_layer", &WeightLoader::set_layer, nb::arg("index"), nb::kw_only(), nb::arg("qkv"), nb::arg("output"),
           nb::arg("gate_up"), nb::arg("down"), nb::arg("input_norm"), nb::arg("post_attention_norm"),
           nb::arg("qkv_bias").none() = nb::none(), nb::arg("q_norm").none() = nb::none(),
           nb::arg("k_norm").none() = nb::none())
      .def("set_ends", &WeightLoader::set_ends, nb::kw_only(), nb::arg("embedding").none(), nb::arg("lm_head"),
           nb::arg("norm"), nb::arg("inverse_frequencies"), nb::arg("rotary_factor") = 1.0);

  nb::class_<ModelShape>(m, "ModelShape")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float>(), nb::kw_only(),
           nb::arg("vocab_size"), nb::arg("hidden_size"), nb::arg("intermediate_size"), nb::arg("num_layers"),
           nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("rms_norm_eps"))
      .def_prop_ro("head_stride", &ModelShape::head_stride);

  nb::class_<ModelLimits>(m, "ModelLimits")
      .def(
          "__init__",
          [](ModelLimits* self, int64_t max_num_seqs, int64_t max_num_batched_tokens, int64_t max_model_len,
             int64_t num_blocks, std::string_view kv_dtype) {
            new (self) ModelLimits{max_num_seqs, max_num_batched_tokens, max_model_len, num_blocks,
                                   kv_dtype_from_name(kv_dtype)};
          },
          nb::kw_only(), nb::arg("max_num_seqs"), nb::arg("max_num_batched_tokens"), nb::arg("max_model_len"),
          nb::arg("num_blocks"), nb::arg("kv_dtype"));

  nb::enum_<OverlapMode>(m, "OverlapMode")
      .value("off", OverlapMode::kOff)
      .value("on", OverlapMode::kOn)
      .value("auto", OverlapMode::kAuto);

  nb::class_<OverlapOptions>(m, "OverlapOptions")
      .def(nb::init<OverlapMode, int64_t, int64_t, int64_t, int, double, double, double, double, double, double>(),
           nb::arg("mode"), nb::kw_only(), nb::arg("chunk_bytes"), nb::arg("tile_flop"), nb::arg("iteration_bytes"),
           nb::arg("memory_lanes"), nb::arg("gemm_flop_per_s"), nb::arg("attention_flop_per_s"),
           nb::arg("kv_bytes_per_s"), nb::arg("weight_bytes_per_s"), nb::arg("compute_delay"), nb::arg("memory_delay"));

  nb::class_<SamplingParams>(m, "SamplingParams")
      .def(nb::init<float, float, float, float, float, float, int32_t, int32_t, int64_t, int64_t, uint64_t,
                    std::vector<std::pair<int32_t, float>>, std::vector<int32_t>, std::vector<int32_t>,
                    std::vector<std::vector<int32_t>>>(),
           nb::kw_only(), nb::arg("temperature"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("presence_penalty"),
           nb::arg("frequency_penalty"), nb::arg("repetition_penalty"), nb::arg("top_k"), nb::arg("num_logprobs"),
           nb::arg("min_tokens"), nb::arg("num_prompt_tokens"), nb::arg("seed"), nb::arg("logit_bias"),
           nb::arg("stop_token_ids"), nb::arg("allowed_token_ids"), nb::arg("bad_words"));

  nb::enum_<Pooling>(m, "Pooling")
      .value("none", Pooling::kNone)
      .value("last", Pooling::kLast)
      .value("mean", Pooling::kMean);

  nb::class_<PromptParams>(m, "PromptParams")
      .def(nb::init<int64_t, int32_t, Pooling>(), nb::kw_only(), nb::arg("num_prompt_tokens"), nb::arg("num_logprobs"),
           nb::arg("pooling"));

  nb::class_<Model>(m, "Model")
      .def(
          "__init__",
          [](Model* self, WeightLoader& loader, const ModelShape& shape, const ModelLimits& limits, int num_threads) {
            new (self) Model(loader.isa(), shape, limits, loader.take(), num_threads);
          },
          nb::arg("weights"), nb::arg("shape"), nb::arg("limits"), nb::kw_only(), nb::arg("num_threads"))
      .def("set_overlap", &Model::set_overlap, nb::arg("options"))
      .def("admit", &Model::admit, nb::arg("slot"), nb::arg("params"), nb::arg("prompt") = PromptParams())
      .def("release", &Model::release, nb::arg("slot"))
      // A wrong dtype is an error: converting would copy whole tables at every step.
      .def("forward", &forward, nb::arg("slots").noconvert(), nb::arg("num_scheduled_tokens").noconvert(),
           nb::arg("num_computed_tokens").noconvert(), nb::arg("is_sampled").noconvert(),
           nb::arg("token_ids").noconvert(), nb::arg("block_tables").noconvert())
      .def("sample", &sample, nb::arg("mask_rows").noconvert().none() = nb::none(),
           nb::arg("masks").noconvert().none() = nb::none(), nb::arg("refused").none() = nb::none())
      .def("prompt_logprobs", &prompt_logprobs, nb::arg("slot"), nb::arg("blocks").noconvert())
      .def("pooled", &pooled, nb::arg("slot"), nb::arg("blocks").noconvert())
      .def("logits", &logits, nb::arg("token_ids"))
      .def("counters", &counters)
      .def("start_trace", [](Model& model) { model.trace().start(); })
      .def("stop_trace", [](Model& model) { model.trace().stop(); })
      .def("spans", &spans)
      .def_prop_ro("isa", [](const Model& model) { return std::string(isa_name(model.isa())); })
      .def_prop_ro("dtype", [](const Model& model) { return std::string(dtype_name(model.dtype())); })
      .def_prop_ro("kv_dtype", [](const Model& model) { return std::string(kv_dtype_name(model.kv_dtype())); })
      .def_prop_ro("num_threads", &Model::num_threads)
      .def_prop_ro("num_weight_bytes", &Model::num_weight_bytes)
      .def_prop_ro("num_kv_bytes", &Model::num_kv_bytes)
      .def_prop_ro("num_workspace_bytes", &Model::num_workspace_bytes);
}

}  // namespace blendserve
