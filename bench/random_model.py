"""Write a Llama of a given shape with random weights as a Q8_0 file, with the vocabulary of the default model.

    python bench/random_model.py llama-1b.Q8_0.gguf
    python bench/peers.py --model llama-1b.Q8_0.gguf --scale 0.2 --repeats 1

The default shape is that of Llama 3.2 1B but for its vocabulary: one billion weights, 1.1 GB. Every bench that takes
`--model` runs it; what it says is noise, how fast it says it is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from blendserve.host import cache_dir
from blendserve.models.hub import resolve

BLOCK = 32
"""Weights that share a scale in Q8_0: 2 bytes of scale and a byte for each."""
SCALE = 0.02 / 127
METADATA_OF_WRITER = ("general.architecture", "general.file_type", "general.quantization_version", "general.name")


def write(
    target: Path,
    source: Path,
    *,
    hidden: int = 2048,
    intermediate: int = 8192,
    num_layers: int = 16,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    max_position: int = 8192,
) -> None:
    """Write the file beside its place first. `source` is the GGUF file whose vocabulary is taken."""
    unfinished = target.with_suffix(".part")
    reader, writer = GGUFReader(source), GGUFWriter(unfinished, arch="llama")
    _copy_vocabulary(reader, writer)
    head_dim = hidden // num_heads
    writer.add_name(target.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(max_position)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_block_count(num_layers)
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    vocab_size = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(vocab_size)
    rng = np.random.default_rng(0)
    for name, rows, columns in _matrices(vocab_size, hidden, intermediate, num_layers, num_kv_heads * head_dim):
        writer.add_tensor(name, _random_q8_0(rng, rows, columns), raw_dtype=GGMLQuantizationType.Q8_0)
    for name in _norms(num_layers):
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(target)


def _copy_vocabulary(reader: GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "llama.")) or field.name in METADATA_OF_WRITER:
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)


def _matrices(
    vocab_size: int, hidden: int, intermediate: int, num_layers: int, kv_width: int
) -> Iterator[tuple[str, int, int]]:
    """Names, rows and columns; the head is the embedding."""
    yield "token_embd.weight", vocab_size, hidden
    for layer in range(num_layers):
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv_width, hidden),
            ("attn_v", kv_width, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", intermediate, hidden),
            ("ffn_up", intermediate, hidden),
            ("ffn_down", hidden, intermediate),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns


def _norms(num_layers: int) -> Iterator[str]:
    yield "output_norm.weight"
    for layer in range(num_layers):
        yield f"blk.{layer}.attn_norm.weight"
        yield f"blk.{layer}.ffn_norm.weight"


def _random_q8_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8[rows, bytes of a row]: blocks of a scale and random bytes from -127 to 127."""
    blocks = np.empty((rows, columns // BLOCK, 2 + BLOCK), dtype=np.uint8)
    blocks[..., :2] = np.array([SCALE], dtype=np.float16).view(np.uint8)
    blocks[..., 2:] = rng.integers(-127, 128, (rows, columns // BLOCK, BLOCK), dtype=np.int8).view(np.uint8)
    return blocks.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    for name in ("hidden", "intermediate", "num-layers", "num-heads", "num-kv-heads", "max-position"):
        parser.add_argument(f"--{name}", type=int, help="default: as in Llama 3.2 1B")
    arguments = vars(parser.parse_args())
    target = arguments.pop("target")
    shape = {name: value for name, value in arguments.items() if value is not None}
    write(target, resolve(None, cache_dir()).path, **shape)
    print(f"wrote {target}, {target.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
