"""Ingestion writes the requests of a job into a store: prompts as token ids, sampling parameters interned."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blendserve.dialect.schema import BatchLine
from blendserve.dialect.values import MAX_INT32
from blendserve.job.disk import sync_directory, writing_to
from blendserve.job.sampling_json import given_fields
from blendserve.job.store_layout import (
    EMBEDS,
    FILES,
    HAS_KNOWN_LENGTH,
    HAS_SCORES,
    HAS_SEED,
    HAS_STRUCTURE,
    LINE_STRUCT,
    MAX_INTERNED_BYTES,
    NO_LIMIT,
    URL_SHIFT,
    StoredFile,
)
from blendserve.planner.table import known_output_tokens
from blendserve.request import SamplingParams, TokenIds

if TYPE_CHECKING:
    from typing_extensions import Buffer

_OWN_FIELDS = ("seed", "max_tokens", "logit_bias")
_INTERNED_FIELDS = (*(field.name for field in fields(SamplingParams) if field.name not in _OWN_FIELDS), "logit_bias")
_interned_values = attrgetter(*_INTERNED_FIELDS)


class _HashedFile(io.FileIO):
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))
        self.sha256 = hashlib.sha256()

    def write(self, data: Buffer, /) -> int:
        num_bytes = super().write(data)
        self.sha256.update(memoryview(data)[:num_bytes])
        return num_bytes


class StoreWriter:
    """Writes a store into a new directory. Raises: CapacityError when the disk is full."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sizes = dict.fromkeys(FILES, 0)
        self._interned: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._num_interned_bytes = 0
        self._number_by_url: dict[str, int] = {}
        self._num_prompts = 0
        with ExitStack() as stack, writing_to(directory):
            directory.mkdir(mode=0o700)
            self._hashed = {name: stack.enter_context(_HashedFile(directory / name)) for name in FILES}
            self._files = {name: io.BufferedWriter(file, 1 << 20) for name, file in self._hashed.items()}
            self._stack = stack.pop_all()

    def add(self, line: BatchLine, token_ids: Sequence[Sequence[int] | TokenIds]) -> None:
        """Append one line. `token_ids` holds one list per prompt."""
        with writing_to(self._directory):
            first_prompt = self._num_prompts
            for prompt in token_ids:
                self._write("tokens", np.asarray(prompt, np.int32).tobytes())
                self._write("prompt_ends", (self._sizes["tokens"] // 4).to_bytes(8, "little"))
            self._num_prompts += len(token_ids)
            custom_id = line.custom_id.encode()
            id_offset = self._write("custom_ids", custom_id)
            sampling_offset, sampling_bytes = self._intern(line.sampling)
            sampling = line.sampling
            body_offset = self._write("bodies", line.body)
            record = LINE_STRUCT.pack(
                line.line_number,
                first_prompt,
                id_offset,
                sampling_offset,
                body_offset,
                len(line.body),
                sampling.seed or 0,
                len(custom_id),
                sampling_bytes,
                NO_LIMIT if sampling.max_tokens is None else sampling.max_tokens,
                len(token_ids),
                sampling.n,
                _flags(line) | self._url_number(line.url) << URL_SHIFT,
                line.digest,
            )
            self._write("lines", record)

    def finish(self) -> dict[str, StoredFile]:
        """Make the store survive a power cut and close it. Returns: what every file holds, for `TokenStore`."""
        with writing_to(self._directory):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self._directory)
            sync_directory(self._directory.parent)  # before a header counts on it
        self._stack.close()
        return {name: StoredFile(self._sizes[name], file.sha256.hexdigest()) for name, file in self._hashed.items()}

    def abandon(self) -> None:
        """Close the files whatever state they are in."""
        for file in self._hashed.values():
            file.close()

    def _write(self, name: str, data: bytes) -> int:
        offset = self._sizes[name]
        self._files[name].write(data)
        self._sizes[name] = offset + len(data)
        return offset

    def _url_number(self, url: str) -> int:
        if url not in self._number_by_url:
            self._number_by_url[url] = len(self._number_by_url)
            self._write("urls", url.encode() + b"\n")
        return self._number_by_url[url]

    def _intern(self, sampling: SamplingParams) -> tuple[int, int]:
        values = _interned_values(sampling)
        key = (*values[:-1], tuple(values[-1].items()))
        place = self._interned.get(key)
        if place is None:
            data = json.dumps(dict(zip(_INTERNED_FIELDS, values, strict=True)), default=given_fields).encode()
            self._num_interned_bytes += len(data)
            if self._num_interned_bytes > MAX_INTERNED_BYTES:
                self._interned.clear()
                self._num_interned_bytes = len(data)
            place = self._interned[key] = (self._write("sampling", data), len(data))
        return place


def _flags(line: BatchLine) -> int:
    sampling = line.sampling
    limit = MAX_INT32 if sampling.max_tokens is None else sampling.max_tokens
    return (
        (HAS_SEED if sampling.seed is not None else 0)
        | (EMBEDS if line.embeds else 0)
        | (HAS_SCORES if sampling.prompt_logprobs is not None else 0)
        | (HAS_STRUCTURE if sampling.structured_outputs is not None else 0)
        | (HAS_KNOWN_LENGTH if known_output_tokens(sampling, limit) >= 0 else 0)
    )
