"""Write a Hugging Face directory again with int8 weights, as vLLM computes them with int8 activations (W8A8).

A scale for each row of a matrix, activations scaled token by token while it runs; embeddings and head stay as they are.
The format is that of `compressed-tensors`. Runs in vLLM's environment. Usage: int8_hf.py SOURCE TARGET
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LARGEST = 127
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def quantize(source: Path, target: Path) -> None:
    """Write `target` beside its final place first, so that an interrupted run leaves no half directory."""
    unfinished = target.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, values in load_file(path).items():
            tensors |= _int8(name, values) if name.endswith("proj.weight") else {name: values}
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (unfinished / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}, indent=1))
    unfinished.rename(target)


def _int8(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = values.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / LARGEST
    rounded = (values.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return {name: rounded, f"{name}_scale": scale}


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]))
