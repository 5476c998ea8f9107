"""What planning needs to know of a model that vLLM runs, from its Hugging Face config: costs, and tokens of pictures.

Counted from shapes, not from a number of parameters, so experts that a token does not visit cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blendserve.costs.hardware import A100_80G, HARDWARE_BY_NAME, HardwareSpec, peak_cost_model
from blendserve.costs.model_cost import CostModel, ModelCost
from blendserve.dialect.images import Picture
from blendserve.engines.vllm.inflight import StepLoad
from blendserve.errors import ConfigError
from blendserve.models.foreign_config import MAX_WHOLE, text_config_of, whole_number
from blendserve.models.spec import brief

CPU = HardwareSpec("cpu", 90e9, 12e9, 0.0)
"""One core with 256-bit vectors, as for the native engine: only the ratio matters to an order."""
DEFAULT_PICTURE_TOKENS = 576
"""Of a picture whose model does not say: what a 336-pixel square makes in patches of 14."""
MAX_PICTURE_TOKENS = 1 << 16
DEFAULT_PICTURE_SIDE = 896
"""Pixels, where a picture's size is not known."""


def model_cost_of(name: str, config: Mapping[str, Any]) -> ModelCost:
    """Costs of a decoder: attention with grouped or latent KV, dense or mixed layers. Raises: ConfigError naming the
    field that is missing.
    """
    text = text_config_of(config)
    hidden, layers, heads = (
        _field(name, text, field) for field in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    head_dim = whole_number(text, "head_dim", hidden // heads)
    vocabulary = hidden * whole_number(text, "vocab_size", whole_number(config, "vocab_size"))
    if latent := whole_number(text, "kv_lora_rank"):
        kv_width, attention, attention_width = _latent_attention(text, hidden, heads, latent)
    else:
        kv_heads = whole_number(text, "num_key_value_heads", heads)
        kv_width, attention_width = 2 * kv_heads * head_dim, heads * head_dim
        attention = hidden * (2 * attention_width + kv_width)
    active, stored = _feed_forward(text, hidden, layers)
    ties = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    embeddings = vocabulary * (1 if ties else 2)
    return ModelCost(
        name=name,
        num_parameters=layers * attention + active + embeddings,
        num_matmul_parameters=layers * attention + active,
        num_layers=layers,
        attention_width=attention_width,
        kv_bytes_per_token=2.0 * layers * kv_width,
        weight_bytes=2.0 * (layers * attention + stored + embeddings),
        num_head_parameters=vocabulary,
    )


def _latent_attention(text: Mapping[str, Any], hidden: int, heads: int, latent: int) -> tuple[int, int, int]:
    """KV elements of a token in a layer, parameters of a layer's attention, and its width (DeepSeek's MLA)."""
    rope, nope = whole_number(text, "qk_rope_head_dim", 64), whole_number(text, "qk_nope_head_dim", 128)
    value, query_rank = whole_number(text, "v_head_dim", 128), whole_number(text, "q_lora_rank")
    query_width = heads * (nope + rope)
    query = query_rank * (hidden + query_width) if query_rank else hidden * query_width
    key_value = hidden * (latent + rope) + latent * heads * (nope + value)
    return latent + rope, query + key_value + heads * value * hidden, query_width


def _feed_forward(text: Mapping[str, Any], hidden: int, layers: int) -> tuple[int, int]:
    """Parameters of all layers that a token is multiplied by, and those that are stored."""
    intermediate = whole_number(text, "intermediate_size", 4 * hidden)
    dense = 3 * hidden * intermediate
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((number for name in names if (number := whole_number(text, name))), 0)
    if not experts:
        return layers * dense, layers * dense
    width = whole_number(text, "moe_intermediate_size", intermediate)
    shared = whole_number(text, "shared_expert_intermediate_size", width * whole_number(text, "n_shared_experts"))
    visited = whole_number(text, "num_experts_per_tok", 1)
    num_dense = min(whole_number(text, "first_k_dense_replace"), layers)
    mixed = layers - num_dense
    active = num_dense * dense + mixed * 3 * hidden * (visited * width + shared)
    stored = num_dense * dense + mixed * 3 * hidden * (experts * width + shared)
    return active, stored


def _field(name: str, text: Mapping[str, Any], field: str) -> int:
    value = text.get(field)
    if type(value) is not int or not 1 <= value <= MAX_WHOLE:
        raise ConfigError(f"{name}: {field} is {brief(value)} in config.json; planning needs a positive number there")
    return value


def cost_model_of(model: ModelCost, device_name: str) -> CostModel:
    """Compute and memory seconds on a device as its datasheet has it; an unknown one is taken for an A100."""
    lowered = device_name.lower().replace(" ", "-")
    if lowered == CPU.name:
        return peak_cost_model(model, CPU)
    chip = next((spec for key, spec in HARDWARE_BY_NAME.items() if key.split("-")[0] in lowered), A100_80G)
    return peak_cost_model(model, chip)


@dataclass(slots=True)
class LoadTotals:
    """Flop and bytes of a run by our cost model, step by step, for comparison with vLLM's own count."""

    model: ModelCost
    num_steps: int = 0
    num_flop: float = 0.0
    num_bytes: float = 0.0

    def add(self, load: StepLoad) -> None:
        """Every token passes all layers, those that are sampled after the output layer too; a step reads all weights
        once, and each decode its KV."""
        model = self.model
        num_tokens = load.num_prefill_tokens + load.num_decode_tokens
        self.num_steps += 1
        pair_flop = 4 * model.attention_width * model.num_layers
        self.num_flop += 2 * model.num_matmul_parameters * num_tokens
        self.num_flop += 2 * model.num_head_parameters * load.num_sampled_tokens
        self.num_flop += pair_flop * (load.num_pairs + load.num_kv_tokens)
        self.num_bytes += model.weight_bytes + model.kv_bytes_per_token * (num_tokens + load.num_kv_tokens)


def picture_tokens(picture: Picture, config: Mapping[str, Any]) -> int:
    """Tokens that a picture is likely to become: patches over merging for models that take any size, else what the
    config's own square makes. Values that cannot be are passed over.
    """
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return DEFAULT_PICTURE_TOKENS
    if fixed := _side(config.get("image_seq_length", config.get("mm_tokens_per_image"))):
        return fixed
    patch = _side(vision.get("patch_size") or config.get("patch_size"))
    if not patch:
        return DEFAULT_PICTURE_TOKENS
    if merge := _side(vision.get("spatial_merge_size")):
        width, height = picture.width or DEFAULT_PICTURE_SIDE, picture.height or DEFAULT_PICTURE_SIDE
        num_tokens = math.ceil(width / (patch * merge)) * math.ceil(height / (patch * merge))
        return min(max(1, num_tokens), MAX_PICTURE_TOKENS)
    side = _side(vision.get("image_size"))
    if not side:
        return DEFAULT_PICTURE_TOKENS
    scale = _side(config.get("scale_factor")) or 1
    return min(max(1, (side // patch) ** 2 // (scale * scale)), MAX_PICTURE_TOKENS)


def _side(value: object) -> int:
    """A number of pixels or tokens; 0 where it is none, or more than any model has."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_PICTURE_TOKENS else 0
