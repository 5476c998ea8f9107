"""Batch files that several tests of jobs run."""

from __future__ import annotations

import os
import signal
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from batch_fakes import NUM_JOB_LINES, mixed_lines, run_fake, write_lines
from parallel_cases import pending_of, plan_of_pending

from blendserve.engines.replicas.part import SharedJob
from blendserve.host import cache_dir
from blendserve.job.pending import PendingRequests

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell Ctrl-C is ignored, and children would inherit that: tests that send one would wait.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_CACHE = tempfile.TemporaryDirectory(prefix="blendserve-cache-")
"""What this machine was measured to do must not decide how a test ends: tests see the user's models, nothing else."""
_models = cache_dir() / "models"
_models.mkdir(parents=True, exist_ok=True)
Path(_CACHE.name, "models").symlink_to(_models.resolve())
os.environ["BLENDSERVE_CACHE"] = _CACHE.name

collect_ignore = [] if find_spec("pyarrow") and find_spec("fsspec") else ["tables"]
"""Tests of tables need the extra `data`, which `dev` has."""


@pytest.fixture
def job_input(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", mixed_lines(NUM_JOB_LINES))


@pytest.fixture
def whole(tmp_path: Path, job_input: Path) -> Path:
    """The output of an uninterrupted run, ordered; its errors lie beside it."""
    run_fake(job_input, tmp_path / "whole.jsonl", is_ordered=True)
    return tmp_path / "whole.jsonl"


@pytest.fixture
def pending(tmp_path: Path, job_input: Path) -> PendingRequests:
    """The valid requests of `job_input`, as the driver of replicas holds them."""
    return pending_of(tmp_path / "store", job_input)


@pytest.fixture
def shared_job(pending: PendingRequests) -> SharedJob:
    """What replicas share of `pending`."""
    return SharedJob.of(pending, plan_of_pending(pending))
