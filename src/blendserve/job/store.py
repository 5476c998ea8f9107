"""The requests of a job on disk: prompts as token ids, one fixed-size record per line, sampling parameters interned.

Written once by ingestion, then read through memory maps: a million requests cost a few bytes each of memory of our
own, the rest is the system's page cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.config import BLOCK_SIZE
from blendserve.dialect.endpoint import StoredLine
from blendserve.dialect.extras import Extras
from blendserve.dialect.values import MAX_INT32
from blendserve.engine.keys import block_keys
from blendserve.errors import ConfigError
from blendserve.job.sampling_json import sampling_from
from blendserve.job.store_layout import (
    EMBEDS,
    FILES,
    HAS_KNOWN_LENGTH,
    HAS_SEED,
    HAS_STRUCTURE,
    MAX_INTERNED_BYTES,
    NO_LIMIT,
    URL_SHIFT,
    StoredFile,
)
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.sorting import FlatPrompts, flatten
from blendserve.planner.table import most_output_tokens
from blendserve.request import EmbeddingParams, Request, SamplingParams, StructuredOutputs, TokenIds
from blendserve.seeds import choice_seed, derived_seed


class TokenStore:
    """A finished store, read through memory maps or from shared memory. Requests are numbered by line, then prompt,
    then choice.

    `arrays`: the content of every file. `max_model_len=0` means that no context limit is known.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], max_model_len: int = 0) -> None:
        self.arrays = arrays
        self.max_model_len = max_model_len
        self._tokens = arrays["tokens"]
        self._prompt_ends = arrays["prompt_ends"]
        self._lines = arrays["lines"]
        self._custom_ids = arrays["custom_ids"]
        self._sampling = arrays["sampling"]
        self._bodies = arrays["bodies"]
        self._urls = arrays["urls"].tobytes().decode().splitlines()
        self._sampling_by_offset: dict[int, SamplingParams] = {}
        self._num_interned_bytes = 0
        num_choices = self._lines["num_prompts"].astype(np.int64) * self._lines["n"]
        self._first_requests = np.concatenate(([0], np.cumsum(num_choices)))
        self.line_of_request = np.repeat(np.arange(len(self._lines), dtype=np.int32), num_choices)
        """Shape: int32[num_requests], the row of every request's line."""

    @classmethod
    def open(cls, directory: Path, files: Mapping[str, StoredFile], max_model_len: int = 0) -> TokenStore:
        """Map the files that `StoreWriter` left. Raises: ConfigError when one is not what `files` says."""
        return cls({name: _mapped(directory / name, dtype, files) for name, dtype in FILES.items()}, max_model_len)

    @property
    def num_lines(self) -> int:
        return len(self._lines)

    def sampling(self, row: int) -> SamplingParams:
        """The parameters of a line, but for `seed` and `max_tokens`."""
        return self._sampling_of(self._lines[row])

    @property
    def num_requests(self) -> int:
        return len(self.line_of_request)

    def line(self, row: int) -> StoredLine:
        record = self._lines[row]
        begin, size = int(record["id_offset"]), int(record["id_bytes"])
        return StoredLine(
            line_number=int(record["line_number"]),
            custom_id=self._custom_ids[begin : begin + size].tobytes().decode(),
            url=self._urls[int(record["flags"]) >> URL_SHIFT],
            num_prompts=int(record["num_prompts"]),
            n=int(record["n"]),
            first_request=int(self._first_requests[row]),
        )

    def body(self, row: int) -> bytes:
        """What a remote server is sent for a line, or the `Extras` of one that is answered here."""
        record = self._lines[row]
        begin = int(record["body_offset"])
        return self._bodies[begin : begin + int(record["body_bytes"])].tobytes()

    def _extras(self, row: int) -> Extras:
        return Extras.from_bytes(self.body(row))

    def digest(self, row: int) -> bytes:
        """The hash of a line as the file has it."""
        return bytes(self._lines["digest"][row])

    def row_by_digest(self) -> dict[bytes, int]:
        """The row of every line by its digest."""
        return {bytes(digest): row for row, digest in enumerate(self._lines["digest"])}

    def line_hashes(self) -> bytes:
        """For every line the hash of its custom_id and its digest, 16 bytes each."""
        ids, lines = self._custom_ids.tobytes(), self._lines
        places = zip(lines["id_offset"].tolist(), lines["id_bytes"].tolist(), lines["digest"], strict=True)
        return b"".join(
            part for begin, size, digest in places for part in (hash_of_id(ids[begin : begin + size]), bytes(digest))
        )

    def row_of(self, line_number: int) -> int | None:
        """The row of a line, None where that line is not in the store."""
        row = int(np.searchsorted(self._lines["line_number"], line_number))
        return row if row < len(self._lines) and self._lines["line_number"][row] == line_number else None

    def request(self, number: int, index: int) -> Request:
        """Build request `number` of the store as row `index` of a run."""
        row = int(self.line_of_request[number])
        line = self._lines[row]
        choice = number - int(self._first_requests[row])
        token_ids = self.prompt_of(number)
        seed = int(line["seed"]) if line["flags"] & HAS_SEED else None
        max_tokens = None if line["max_tokens"] == NO_LIMIT else int(line["max_tokens"])
        if seed is None:
            resolved = derived_seed(b"id", self.line(row).custom_id.encode(), choice)
        else:
            resolved = choice_seed(seed, choice % int(line["n"]))
        return Request(
            index=index,
            prompt_token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=replace(self._sampling_of(line), seed=seed, max_tokens=max_tokens),
            max_output_tokens=self._limit(max_tokens, len(token_ids)),
            seed=resolved,
            block_keys=block_keys(token_ids, BLOCK_SIZE),
            embedding=EmbeddingParams(self._extras(row).dimensions) if line["flags"] & EMBEDS else None,
        )

    def prompt(self, prompt: int) -> TokenIds:
        """Tokens of one prompt, a view of the map."""
        begin = int(self._prompt_ends[prompt - 1]) if prompt else 0
        return self._tokens[begin : int(self._prompt_ends[prompt])]

    def prompt_of(self, number: int) -> TokenIds:
        """Tokens of the prompt of request `number`."""
        row = int(self.line_of_request[number])
        line = self._lines[row]
        choice = number - int(self._first_requests[row])
        return self.prompt(int(line["first_prompt"]) + choice // int(line["n"]))

    def prompts_of(self, numbers: Int64s) -> Int64s:
        """The prompt of every request of `numbers`. Shapes: both int64[num_requests]."""
        rows = self.line_of_request[numbers]
        lines = self._lines
        within = (numbers - self._first_requests[rows]) // np.maximum(lines["n"][rows], 1)
        return np.asarray(lines["first_prompt"][rows] + within, np.int64)

    def flat_prompts(self, numbers: Int64s) -> FlatPrompts:
        """All prompts of `numbers` end to end; a view of the map where they are just the prompts of the store."""
        prompts = self.prompts_of(numbers)
        if len(prompts) == len(self._prompt_ends) and bool((np.diff(prompts) == 1).all()):
            return FlatPrompts(self._tokens, np.concatenate(([0], self._prompt_ends)))
        return flatten(self.prompt(int(prompt)) for prompt in prompts)

    def table(self, numbers: Int64s) -> RequestTable:
        """What a policy may know of the requests of `numbers` before they run."""
        rows, prompts = self.line_of_request[numbers], self.prompts_of(numbers)
        lengths = np.diff(self._prompt_ends, prepend=0)[prompts]
        max_tokens = self._lines["max_tokens"][rows].astype(np.int64)
        limits = np.where(max_tokens == NO_LIMIT, MAX_INT32, max_tokens)
        if self.max_model_len:
            limits = np.minimum(limits, self.max_model_len - lengths)
        flags = self._lines["flags"][rows]
        known = np.where((flags & HAS_KNOWN_LENGTH) != 0, limits, -1)
        if not (flags & HAS_STRUCTURE).any():
            return RequestTable(lengths, limits, known)
        structure, bounds = self._structures(rows)
        return RequestTable(lengths, np.minimum(limits, bounds), known, structure)

    def _structures(self, rows: NDArray[np.int32]) -> tuple[Int64s, Int64s]:
        """Numbers of the structures that lines ask for, 0 for none, and the most tokens of each."""
        structured = np.flatnonzero(self._lines["flags"][rows] & HAS_STRUCTURE)
        offsets, first, inverse = np.unique(
            self._lines["sampling_offset"][rows[structured]], return_index=True, return_inverse=True
        )
        number_by_structure: dict[StructuredOutputs | None, int] = {}
        numbers, bounds = np.zeros(len(rows), np.int64), np.full(len(rows), MAX_INT32, np.int64)
        of_offset = np.zeros((2, len(offsets)), np.int64)
        for at, row in enumerate(rows[structured[first]].tolist()):
            sampling = self._sampling_of(self._lines[row])
            number = number_by_structure.setdefault(sampling.structured_outputs, len(number_by_structure) + 1)
            of_offset[:, at] = number, most_output_tokens(sampling, MAX_INT32)
        numbers[structured], bounds[structured] = of_offset[:, inverse.ravel()]
        return numbers, bounds

    def _limit(self, max_tokens: int | None, num_prompt_tokens: int) -> int:
        limit = MAX_INT32 if max_tokens is None else max_tokens
        return min(limit, self.max_model_len - num_prompt_tokens) if self.max_model_len else limit

    def _sampling_of(self, line: np.void) -> SamplingParams:
        offset = int(line["sampling_offset"])
        sampling = self._sampling_by_offset.get(offset)
        if sampling is None:
            data = self._sampling[offset : offset + int(line["sampling_bytes"])].tobytes()
            values = json.loads(data)
            self._num_interned_bytes += len(data)
            if self._num_interned_bytes > MAX_INTERNED_BYTES:
                self._sampling_by_offset.clear()
                self._num_interned_bytes = len(data)
            sampling = self._sampling_by_offset[offset] = sampling_from(values)
        return sampling


def hash_of_id(custom_id: bytes) -> bytes:
    """16 bytes that stand for a custom_id."""
    return hashlib.blake2b(custom_id, digest_size=16).digest()


def _mapped(path: Path, dtype: np.dtype[Any], files: Mapping[str, StoredFile]) -> NDArray[Any]:
    """A file as an array. Its hash takes one read of the map, which planning would do soon after anyway."""
    expected = files.get(path.name)
    if expected is None or not path.is_file() or path.stat().st_size != expected.num_bytes:
        raise _damaged(path)
    content = np.memmap(path, np.uint8, mode="r") if expected.num_bytes else np.zeros(0, np.uint8)
    if hashlib.sha256(content.data).hexdigest() != expected.sha256:
        raise _damaged(path)
    return np.asarray(content).view(dtype)


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"{path} is damaged; discard the journal with --fresh")
