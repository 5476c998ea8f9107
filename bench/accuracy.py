"""What the rounding of kernels costs in likelihood: `python bench/accuracy.py [--tokens 8000] [--text FILE]`.

Mean negative log likelihood of a text under the native engine, for each instruction set of this machine, precision of
weights and precision of the KV cache, over that of the float32 specification. The text is this project's own pages
unless a file is given; it is read in windows, since one long context would take the specification hours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray

from blendserve import _native
from blendserve.config import KV_DTYPES, Dtype, EngineConfig, KvDtype
from blendserve.executors.native import NativeExecutor
from blendserve.executors.reference import ReferenceModel, prompt_logits
from blendserve.host import cache_dir
from blendserve.models.hub import resolve
from blendserve.models.load import LoadedModel, load_model
from blendserve.request import TokenIds

KERNELS: tuple[tuple[Dtype, str], ...] = (
    ("bf16", "portable"),
    ("bf16", "avx2"),
    ("bf16", "avx512bf16"),
    ("int8", "avx2"),
    ("int8", "avx512vnni"),
    ("int8", "avx512bf16"),
)
Logits = Callable[[TokenIds], NDArray[np.floating[Any]]]


def windows(token_ids: TokenIds, size: int) -> Iterator[TokenIds]:
    for begin in range(0, len(token_ids), size):
        if len(part := token_ids[begin : begin + size]) > 1:
            yield part


def total_nll(logits: Logits, token_ids: TokenIds) -> float:
    """Negative log likelihood of every token after the first."""
    rows = logits(token_ids)[:-1].astype(np.float64)
    peak = rows.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(rows - peak).sum(axis=1)) + peak[:, 0]
    return float((log_total - rows[np.arange(len(rows)), token_ids[1:]]).sum())


def mean_nll(logits: Logits, token_ids: TokenIds, size: int) -> float:
    parts = list(windows(token_ids, size))
    return sum(total_nll(logits, part) for part in parts) / sum(len(part) - 1 for part in parts)


def native_nll(model: LoadedModel, dtype: Dtype, kv_dtype: KvDtype, isa: str, token_ids: TokenIds, size: int) -> float:
    config = EngineConfig(
        max_num_seqs=1, max_num_batched_tokens=512, max_model_len=size, dtype=dtype, kv_dtype=kv_dtype
    )
    executor = NativeExecutor(model.spec, model.weights, config, num_blocks=-(-size // 16), isa=isa)
    try:
        return mean_nll(executor.logits, token_ids, size)
    finally:
        executor.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="directory, GGUF file or hub id (default: the default model)")
    parser.add_argument("--text", type=Path, action="append", help="text to read (default: docs/*.md)")
    parser.add_argument("--tokens", type=int, default=8000, help="tokens of it (default: 8000)")
    parser.add_argument("--context", type=int, default=1000, help="tokens of one context (default: 1000)")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, action="append", help="of the KV cache (default: each)")
    args = parser.parse_args()
    common.print_header()
    model = load_model(resolve(args.model, cache_dir()))
    paths = args.text or sorted((common.ROOT / "docs").glob("*.md"))
    token_ids = model.tokenizer.encode("\n\n".join(path.read_text() for path in paths))[: args.tokens]
    specification = ReferenceModel(model.spec, model.weights)
    exact = mean_nll(lambda ids: prompt_logits(specification, ids), token_ids, args.context)
    rows = [["float32 specification", "", "", f"{exact:.5f}", ""]]
    for dtype, isa in (kernels for kernels in KERNELS if _native.is_supported(kernels[1])):
        for kv_dtype in args.kv_dtype or KV_DTYPES:
            nll = native_nll(model, dtype, kv_dtype, isa, token_ids, args.context)
            rows.append([dtype, kv_dtype, isa, f"{nll:.5f}", f"{nll / exact - 1:+.3%}"])
    print(f"{model.spec.name}, {len(token_ids)} tokens in contexts of {args.context}\n")
    print(common.table(["weights", "KV", "instruction set", "mean NLL", "against float32"], rows))


if __name__ == "__main__":
    main()
