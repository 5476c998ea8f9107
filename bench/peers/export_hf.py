"""Write a GGUF model as a Hugging Face directory in bf16, for peers that read nothing else. Runs in vLLM's environment.

Usage: export_hf.py MODEL.gguf TARGET_PARENT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def export(source: Path, target: Path) -> None:
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=dequantised
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


if __name__ == "__main__":
    gguf_file = Path(sys.argv[1])
    export(gguf_file, Path(sys.argv[2]) / f"{gguf_file.name.split('.')[0]}-hf")
