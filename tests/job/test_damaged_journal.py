"""A journal with one bit turned over, anywhere: the job ends as it would have, or it is refused."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from batch_fakes import comparable, errors_of, run_fake, stop_after

from blendserve.errors import ConfigError
from blendserve.job.interrupts import JobInterrupted


def flip_bit(path: Path, source: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("num_flips", [150, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.thorough])])
def test_every_resume_from_a_damaged_journal_is_right_or_refused(
    tmp_path: Path, job_input: Path, whole: Path, num_flips: int
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    with pytest.raises(JobInterrupted):
        run_fake(job_input, begun / "out.jsonl", stop_after(60, KeyboardInterrupt()))
    files = [path.relative_to(begun) for path in sorted(begun.rglob("*")) if path.is_file() and path.stat().st_size]
    source, damaged = random.Random(17), tmp_path / "damaged"
    refused = set()
    for flip in range(num_flips):
        shutil.copytree(begun, damaged)
        name = files[flip % len(files)]
        flip_bit(damaged / name, source)
        try:
            run_fake(job_input, damaged / "out.jsonl")
        except ConfigError:
            refused.add(name.name)
        else:
            assert comparable(damaged / "out.jsonl") == comparable(whole)
            assert comparable(errors_of(damaged / "out.jsonl")) == comparable(errors_of(whole))
        shutil.rmtree(damaged)
    assert refused >= {"header.json", "tokens", "prompt_ends", "lines", "custom_ids", "sampling"}


@pytest.mark.parametrize("num_flips", [50])
def test_a_damaged_seal_is_refused(tmp_path: Path, job_input: Path, num_flips: int) -> None:
    output = tmp_path / "out.jsonl"
    run_fake(job_input, output)
    seal = tmp_path / "out.jsonl.journal" / "complete.json"
    content, source = seal.read_bytes(), random.Random(18)
    num_refused = 0
    for _ in range(num_flips):
        seal.write_bytes(content)
        flip_bit(seal, source)
        try:
            assert run_fake(job_input, output).was_complete
        except ConfigError:
            num_refused += 1
    assert num_refused > num_flips / 2
