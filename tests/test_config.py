"""Sizes, and what a machine or a container leaves to a process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from blendserve.config import BLOCK_SIZE, EngineConfig, parse_bytes
from blendserve.errors import ConfigError
from blendserve.host import available_memory_bytes, cache_dir, usable_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1073741824", 2**30),
        ("512MiB", 2**29),
        ("2G", 2 * 10**9),
        ("2gb", 2 * 10**9),
        (" 1.5 GiB ", 3 * 2**29),
        ("0.1G", 10**8),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_sizes_are_read_exactly(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_an_absurd_size_is_a_size() -> None:
    assert parse_bytes("9" * 400) > 2**1000


def test_a_kv_dtype_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_dtype is 'fp8'; it must be one of bf16, int8"):
        EngineConfig(kv_dtype="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1 GiBB", "nan", "1,5G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 100\ninactive_file 700\n"},
        {
            "memory/memory.limit_in_bytes": "1000\n",
            "memory/memory.usage_in_bytes": "900\n",
            "memory/memory.stat": "cache 5\ninactive_file 1\ntotal_inactive_file 700\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_containers_memory_is_what_it_may_still_take(files: dict[str, str], tmp_path: Path) -> None:
    """Files that the kernel keeps only because nobody needs the memory do not count as used."""
    assert available_memory_bytes(write(tmp_path, files)) == 800


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    unlimited = write(tmp_path, {"memory.max": "max\n", "memory.current": "900\n", "cpu.max": "max 100000\n"})
    nowhere = tmp_path / "nowhere"
    assert available_memory_bytes(unlimited) > 2**20
    assert available_memory_bytes(nowhere) > 2**20
    assert usable_cores(unlimited) == usable_cores(nowhere) >= 1


def test_a_container_that_is_over_its_limit_has_no_memory_left(tmp_path: Path) -> None:
    assert available_memory_bytes(write(tmp_path, {"memory.max": "10", "memory.current": "900"})) == 0


@pytest.mark.parametrize(
    "files",
    [{"cpu.max": "50000 100000\n"}, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}],
    ids=["version 2", "version 1"],
)
def test_half_a_core_is_one_thread(files: dict[str, str], tmp_path: Path) -> None:
    assert usable_cores(write(tmp_path, files)) == 1


def test_no_quota_in_version_1_is_minus_one(tmp_path: Path) -> None:
    files = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert usable_cores(write(tmp_path, files)) == usable_cores(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"num_threads": -1}, "num_threads is -1"),
        ({"kv_memory_bytes": -1}, "kv_memory_bytes is -1"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "below max_num_seqs 8"),
    ],
)
def test_limits_that_cannot_work_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**limits)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("BLENDSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "blendserve"


def test_the_block_size_is_that_of_the_compiled_core() -> None:
    header = (Path(__file__).parent.parent / "csrc" / "kv_cache.h").read_text()
    (size,) = re.findall(r"kBlockSize = (\d+);", header)
    assert int(size) == BLOCK_SIZE
