"""A batch file as a plan needs it: tokens and limits of every request, without a job or a journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.endpoint import Codec
from blendserve.dialect.extras import native_abilities
from blendserve.dialect.schema import ServedModel
from blendserve.errors import ConfigError
from blendserve.job.door import Lines
from blendserve.job.ingest import encode_lines
from blendserve.job.pending import PendingRequests
from blendserve.job.reader import DEFAULT_LIMITS, BadLine, BatchReader, ReadLimits
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.models.chat_settings import DEFAULT_CHAT, ChatSettings
from blendserve.models.spec import ModelSpec
from blendserve.models.tokenizer import Tokenizer
from blendserve.planner.base import RequestTable
from blendserve.planner.sorting import FlatPrompts


@dataclass(frozen=True, slots=True)
class BatchInput:
    """The requests of a file. `num_refused_by_code` counts the lines that a run would refuse."""

    num_lines: int
    num_refused_by_code: Mapping[str, int]
    prompts: FlatPrompts
    table: RequestTable


@contextmanager
def read_batch(
    path: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    limits: ReadLimits = DEFAULT_LIMITS,
    chat: ChatSettings = DEFAULT_CHAT,
    default_sampling: Mapping[str, Any] | None = None,
) -> Iterator[BatchInput]:
    """Tokenize a file into a temporary store that is gone afterwards. `default_sampling`: of lines that give none.

    Raises: ConfigError when it cannot be read, or holds no request.
    """
    tokenizer = chat.applied(tokenizer)
    formats = chat.formats(tokenizer)
    served = ServedModel(
        (spec.name,),
        accepts_any_name=True,
        vocab_size=0,
        max_model_len=spec.max_position,
        abilities=native_abilities(spec.hidden_size, formats),
        default_sampling=default_sampling or {},
    )
    codec = ModelCodec(tokenizer, spec.max_position, formats, obeys_control_tokens=chat.obeys_control_tokens)
    reader = BatchReader(path, served, limits)
    with read_lines(reader, codec, spec.max_position) as (pending, refused):
        if not len(pending):
            codes = ", ".join(f"{code} {count}" for code, count in sorted(refused.items()))
            raise ConfigError(
                f"{path} holds no line that can be answered ({codes}); `blendserve check {path}` says why"
            )
        yield BatchInput(reader.num_lines, dict(sorted(refused.items())), pending.flat_prompts(), pending.table())


@contextmanager
def read_lines(lines: Lines, codec: Codec, max_model_len: int) -> Iterator[tuple[PendingRequests, Mapping[str, int]]]:
    """Tokenize lines into a temporary store. Yields: their requests, and how many lines were refused by code."""
    refused: Counter[str] = Counter()

    def refuse(line: BadLine) -> None:
        refused[line.error.code] += 1

    with TemporaryDirectory(prefix="blendserve-") as name:
        directory = Path(name) / "store"
        writer = StoreWriter(directory)
        try:
            encode_lines(lines, codec, max_model_len, writer.add, refuse)
            files = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        store = TokenStore.open(directory, files, max_model_len)
        yield PendingRequests(store, np.arange(store.num_requests)), refused
