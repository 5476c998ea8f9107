"""Who runs in the peers' race, and with which settings: the best that we found for each on the machines we measured.

Every entry names its precision, because the peers do not compute alike. `docs/benchmarks.md` says what was tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine

BENCH = Path(__file__).resolve().parent
PEERS_DIR = Path(os.environ.get("BLENDSERVE_PEERS_DIR", "~/.cache/blendserve-peers")).expanduser()
"""Environments and converted weights of the peers; `scripts/setup-peers` fills it."""

KV_BYTES = 4 << 30
"""KV cache of every engine but transformers."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """One engine with its settings, ready to start as a process."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    settings: Mapping[str, Any]


def entrant(name: str, model: Path, threads: int, overrides: Mapping[str, Any]) -> Entrant:
    """The entrant called `name`: an engine, or an engine and the storage type of its weights, as in `openvino-f16`.

    `overrides` replaces settings, by dotted path. Raises: SystemExit when its environment is not set up.
    """
    engine, _, weights = name.partition("-")
    builders = {
        "ours": _ours,
        "openvino": _openvino,
        "llamacpp": _llamacpp,
        "vllm": _vllm,
        "transformers": _transformers,
    }
    if engine not in builders:
        raise SystemExit(
            f"unknown peer {name!r}; known: {', '.join(builders)}, with -q8_0, -f16 or -f32 for other weights, "
            "ours-int8, vllm-int8"
        )
    settings = builders[engine](model, threads, weights)
    for path, value in overrides.items():
        _replace(settings, path.split("."), value)
    # transformers and torch are dev dependencies of the project itself
    is_own = engine in ("ours", "transformers")
    python = Path(sys.executable) if is_own else PEERS_DIR / engine / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{name}: no environment in {python.parent.parent}; run: scripts/setup-peers {engine}")
    environment = {"OMP_NUM_THREADS": str(threads), **settings.pop("environment", {})}
    return Entrant(name, (str(python), str(BENCH / "peers" / f"{engine}_worker.py")), environment, settings)


def parse_override(text: str) -> tuple[str, str, Any]:
    """`openvino.scheduler.max_num_seqs=64` as (entrant, path of the setting, value); a value is JSON or plain text."""
    path, separator, value = text.partition("=")
    name, dot, setting = path.partition(".")
    if not separator or not dot:
        raise SystemExit(f"--set {text!r}: expected ENTRANT.SETTING=VALUE")
    try:
        return name, setting, json.loads(value)
    except json.JSONDecodeError:
        return name, setting, value


def _ours(model: Path, threads: int, weights: str) -> dict[str, Any]:
    # int8 is a storage and compute type of the engine itself, not another file.
    arguments = {"model": str(model), "num_threads": threads, "kv_memory_bytes": KV_BYTES}
    if weights:
        arguments["dtype"] = weights
    return {"precision": f"{weights or 'bf16'} weights, bf16 KV", "arguments": arguments}


def _openvino(model: Path, threads: int, weights: str) -> dict[str, Any]:
    kv = weights if weights in ("f16", "f32") else "u8"  # its own choice, seen in how much of the cache a prompt fills
    return {
        "model": str(_weights(model, weights)),
        "threads": threads,
        "precision": f"{weights or 'u4 (Q4_1)'} weights, compute as it chooses, {kv} KV",
        "scheduler": {
            "cache_size": KV_BYTES >> 30,
            "max_num_batched_tokens": 512,
            "max_num_seqs": 256,
            "dynamic_split_fuse": True,
            "enable_prefix_caching": True,
        },
        "properties": {},
    }


def _llamacpp(model: Path, threads: int, weights: str) -> dict[str, Any]:
    return {
        "model": str(_weights(model, weights)),
        "threads": threads,
        "precision": f"{weights or 'Q4_1'} weights, f16 KV",
        "num_slots": 32,
        "tokens_per_slot": 1280,
        "params": {"n_batch": 2048, "n_ubatch": 512, "kv_unified": False, "cont_batching": True},
    }


def _vllm(model: Path, threads: int, weights: str) -> dict[str, Any]:
    is_int8 = weights == "int8"
    dtype = "bfloat16" if is_int8 or not weights else weights
    return {
        "model": str(_int8_directory(model) if is_int8 else _hf_directory(model)),
        "precision": "int8 weights and activations, bf16 KV" if is_int8 else f"{dtype} weights and KV",
        "arguments": {
            "dtype": dtype,
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 2048,
            "enable_prefix_caching": True,
        },
        "environment": {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES >> 30),
            "OMP_NUM_THREADS": str(threads),
            "VLLM_LOGGING_LEVEL": "WARNING",
        },
    }


def _transformers(model: Path, threads: int, weights: str) -> dict[str, Any]:
    # Without instructions for bf16 torch emulates it, ten times slower. A larger cache slows every step down: on a CPU
    # attention runs over all of it.
    dtype = weights or ("bfloat16" if "avx512_bf16" in machine().isa_flags else "float32")
    return {
        "model": str(_hf_directory(model)),
        "threads": threads,
        "dtype": dtype,
        "precision": f"{dtype} weights and KV",
        "batching": {"page_size": 256, "num_blocks": 64, "max_batch_tokens": 512},
    }


def _hf_directory(model: Path) -> Path:
    return PEERS_DIR / "weights" / f"{model.name.split('.')[0]}-hf"


def _int8_directory(model: Path) -> Path:
    """The same with int8 weights, made on first use."""
    source = _hf_directory(model)
    target = source.with_name(f"{source.name}-int8")
    if not target.exists():
        python = PEERS_DIR / "vllm" / "bin" / "python"
        subprocess.run([python, str(BENCH / "peers" / "int8_hf.py"), source, target], check=True)
    return target


def _weights(model: Path, kind: str) -> Path:
    """The model's file, or the same weights in another storage type, made on first use."""
    if not kind:
        return model
    target = PEERS_DIR / "weights" / f"{model.name.split('.')[0]}.{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(BENCH / "peers" / "convert_gguf.py"), model, target, kind], check=True)
    return target


def _replace(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        settings = settings.setdefault(key, {})
    settings[path[-1]] = value
