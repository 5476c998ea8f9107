"""The requests of a job: prompts as token ids, one record per line, sampling parameters interned.

Written once by ingestion (`store_writer`), then read: plans read many lines at a time through memory maps, whose pages
are given back at once; lookups of one line read the file. A request takes about 12 bytes of memory here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
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
from blendserve.job.sampling_json import sampling_from
from blendserve.job.store_files import StoreFiles
from blendserve.job.store_layout import (
    EMBEDS,
    HAS_KNOWN_LENGTH,
    HAS_SCORES,
    HAS_SEED,
    HAS_STRUCTURE,
    LINE_STRUCT,
    MAX_INTERNED_BYTES,
    NO_LIMIT,
    URL_SHIFT,
    LineRecord,
    StoredFile,
)
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.sorting import FlatPrompts
from blendserve.planner.table import most_output_tokens
from blendserve.request import EmbeddingParams, Request, SamplingParams, StructuredOutputs, TokenIds
from blendserve.seeds import choice_seed, derived_seed

_CHUNK_LINES = 1 << 14
"""Lines that are looked at together where all are: bounds memory."""
_CHUNK_TOKENS = 1 << 20


class TokenStore:
    """A finished store, read from its files, or from arrays in (shared) memory. Requests are numbered by line, then
    prompt, then choice. `max_model_len=0` means that no context limit is known.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]] | StoreFiles, max_model_len: int = 0) -> None:
        self.max_model_len = max_model_len
        self._source = arrays
        self._urls = self.arrays["urls"].tobytes().decode().splitlines()
        self.num_lines = len(self._lines)
        self._sampling_by_offset: dict[int, SamplingParams] = {}
        self._num_interned_bytes = 0
        num_choices = self._lines["num_prompts"].astype(np.int64) * self._lines["n"]
        self._first_requests = np.zeros(len(num_choices) + 1, np.int64)
        np.cumsum(num_choices, out=self._first_requests[1:])
        self.line_of_request = np.repeat(np.arange(self.num_lines, dtype=np.int32), num_choices)
        """Shape: int32[num_requests], the row of every request's line."""
        self.release()

    @classmethod
    def open(cls, directory: Path, files: Mapping[str, StoredFile], max_model_len: int = 0) -> TokenStore:
        """Open the files that `StoreWriter` left. Raises: ConfigError when one is not what `files` says."""
        return cls(StoreFiles(directory, files), max_model_len)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The content of every file."""
        return self._source.arrays if isinstance(self._source, StoreFiles) else self._source

    def release(self) -> None:
        """Give back the memory of what was read of the files."""
        if isinstance(self._source, StoreFiles):
            self._source.release()

    def sampling(self, row: int) -> SamplingParams:
        """The parameters of a line, but for `seed` and `max_tokens`."""
        record = self._record(row)
        return self._interned(record.sampling_offset, record.sampling_bytes)

    @property
    def num_requests(self) -> int:
        return len(self.line_of_request)

    def line(self, row: int) -> StoredLine:
        record = self._record(row)
        return StoredLine(
            line_number=record.line_number,
            custom_id=self._custom_id(record).decode(),
            url=self._urls[record.flags >> URL_SHIFT],
            num_prompts=record.num_prompts,
            n=record.n,
            first_request=int(self._first_requests[row]),
        )

    def body(self, row: int) -> bytes:
        """What a remote server is sent for a line, or the `Extras` of one that is answered here."""
        record = self._record(row)
        return self._read("bodies", record.body_offset, record.body_bytes)

    def digest(self, row: int) -> bytes:
        """The hash of a line as the file has it."""
        return self._record(row).digest

    def row_by_digest(self) -> dict[bytes, int]:
        """The row of every line by its digest."""
        return {bytes(digest): row for row, digest in enumerate(self._lines["digest"])}

    def line_hashes(self) -> Iterator[bytes]:
        """For every line the hash of its custom_id and its digest, 16 bytes each; many lines at a time."""
        for begin in range(0, self.num_lines, _CHUNK_LINES):
            lines = self._lines[begin : begin + _CHUNK_LINES]
            first, last = int(lines["id_offset"][0]), int(lines["id_offset"][-1]) + int(lines["id_bytes"][-1])
            ids = self._read("custom_ids", first, last - first)
            places = zip(
                (lines["id_offset"] - first).tolist(), lines["id_bytes"].tolist(), lines["digest"], strict=True
            )
            yield b"".join(hash_of_id(ids[at : at + size]) + bytes(digest) for at, size, digest in places)
            self.release()

    def row_of(self, line_number: int) -> int | None:
        """The row of a line, None where that line is not in the store."""
        row = int(np.searchsorted(self._lines["line_number"], line_number))
        return row if row < self.num_lines and self._lines["line_number"][row] == line_number else None

    def request(self, number: int, index: int) -> Request:
        """Build request `number` of the store as row `index` of a run."""
        row = int(self.line_of_request[number])
        record = self._record(row)
        choice = number - int(self._first_requests[row])
        token_ids = self.prompt(record.first_prompt + choice // record.n)
        seed = record.seed if record.flags & HAS_SEED else None
        max_tokens = None if record.max_tokens == NO_LIMIT else record.max_tokens
        if seed is None:
            resolved = derived_seed(b"id", self._custom_id(record), choice)
        else:
            resolved = choice_seed(seed, choice % record.n)
        sampling = self._interned(record.sampling_offset, record.sampling_bytes)
        return Request(
            index=index,
            prompt_token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=replace(sampling, seed=seed, max_tokens=max_tokens),
            max_output_tokens=self._limit(max_tokens, len(token_ids)),
            seed=resolved,
            block_keys=block_keys(token_ids, BLOCK_SIZE),
            embedding=EmbeddingParams(self._extras(record).dimensions) if record.flags & EMBEDS else None,
        )

    def prompt(self, prompt: int) -> TokenIds:
        """Tokens of one prompt."""
        ends = np.frombuffer(self._read("prompt_ends", 8 * max(prompt - 1, 0), 16), np.int64)
        begin, end = (0, int(ends[0])) if prompt == 0 else (int(ends[0]), int(ends[1]))
        return np.frombuffer(self._read("tokens", 4 * begin, 4 * (end - begin)), np.int32)

    def prompt_of(self, number: int) -> TokenIds:
        """Tokens of the prompt of request `number`."""
        row = int(self.line_of_request[number])
        record = self._record(row)
        return self.prompt(record.first_prompt + (number - int(self._first_requests[row])) // record.n)

    def prompts_of(self, numbers: Int64s) -> Int64s:
        """The prompt of every request of `numbers`. Shapes: both int64[num_requests]."""
        rows = self.line_of_request[numbers]
        lines = self._lines
        within = (numbers - self._first_requests[rows]) // np.maximum(lines["n"][rows], 1)
        return np.asarray(lines["first_prompt"][rows] + within, np.int64)

    def flat_prompts(self, numbers: Int64s) -> FlatPrompts:
        """All prompts of `numbers` end to end; a view of the map where they stand so in the store."""
        prompts = self.prompts_of(numbers)
        if len(prompts) and bool((np.diff(prompts) == 1).all()):
            first, last = int(prompts[0]), int(prompts[-1])
            begin = int(self._prompt_ends[first - 1]) if first else 0
            ends = self._prompt_ends[first : last + 1]
            return FlatPrompts(self._tokens[begin : int(ends[-1])], np.concatenate(([0], ends - begin)))
        return self._gathered(prompts)

    def table(self, numbers: Int64s) -> RequestTable:
        """What a policy may know of the requests of `numbers` before they run."""
        rows, prompts = self.line_of_request[numbers], self.prompts_of(numbers)
        lengths = self._prompt_ends[prompts] - self._begins(prompts)
        max_tokens = self._lines["max_tokens"][rows].astype(np.int64)
        limits = np.where(max_tokens == NO_LIMIT, MAX_INT32, max_tokens)
        if self.max_model_len:
            limits = np.minimum(limits, self.max_model_len - lengths)
        flags = self._lines["flags"][rows]
        known = np.where((flags & HAS_KNOWN_LENGTH) != 0, limits, -1)
        structured = self._structures(rows) if (flags & HAS_STRUCTURE).any() else None
        self.release()
        if structured is None:
            return RequestTable(lengths, limits, known)
        structure, bounds = structured
        return RequestTable(lengths, np.minimum(limits, bounds), known, structure)

    @property
    def _lines(self) -> NDArray[Any]:
        return self.arrays["lines"]

    @property
    def _tokens(self) -> NDArray[Any]:
        return self.arrays["tokens"]

    @property
    def _prompt_ends(self) -> NDArray[Any]:
        return self.arrays["prompt_ends"]

    def _begins(self, prompts: Int64s) -> Int64s:
        return np.where(prompts > 0, self._prompt_ends[np.maximum(prompts - 1, 0)], 0)

    def _gathered(self, prompts: Int64s) -> FlatPrompts:
        begins = self._begins(prompts)
        offsets = np.zeros(len(prompts) + 1, np.int64)
        np.cumsum(self._prompt_ends[prompts] - begins, out=offsets[1:])
        token_ids = np.empty(int(offsets[-1]), np.int32)
        first = 0
        while first < len(prompts):
            last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _CHUNK_TOKENS, side="right")) - 1)
            moved = np.repeat(begins[first:last] - offsets[first:last], np.diff(offsets[first : last + 1]))
            to = slice(int(offsets[first]), int(offsets[last]))
            token_ids[to] = self._tokens[moved + np.arange(to.start, to.stop)]
            first = last
        self.release()
        return FlatPrompts(token_ids, offsets)

    def embeds_any(self, numbers: Int64s) -> bool:
        """Does any of these requests ask for a vector?"""
        return len(self._rows_with(EMBEDS, numbers)) > 0

    def most_prompt_logprobs(self, numbers: Int64s) -> int:
        """The most alternatives with which tokens of these prompts are scored; -1 where no prompt is."""
        rows = self._rows_with(HAS_SCORES, numbers)
        _, first = np.unique(self._lines["sampling_offset"][rows], return_index=True)
        self.release()
        asked = (self.sampling(row).prompt_logprobs for row in rows[first].tolist())
        return max((number for number in asked if number is not None), default=-1)

    def _rows_with(self, flag: int, numbers: Int64s) -> NDArray[np.int32]:
        """Lines of these requests that have the flag."""
        rows = self.line_of_request[numbers]
        found: NDArray[np.int32] = rows[(self._lines["flags"][rows] & flag) != 0]
        self.release()
        return found

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
            sampling = self.sampling(row)
            number = number_by_structure.setdefault(sampling.structured_outputs, len(number_by_structure) + 1)
            of_offset[:, at] = number, most_output_tokens(sampling, MAX_INT32)
        numbers[structured], bounds[structured] = of_offset[:, inverse.ravel()]
        return numbers, bounds

    def _limit(self, max_tokens: int | None, num_prompt_tokens: int) -> int:
        limit = MAX_INT32 if max_tokens is None else max_tokens
        return min(limit, self.max_model_len - num_prompt_tokens) if self.max_model_len else limit

    def _extras(self, record: LineRecord) -> Extras:
        return Extras.from_bytes(self._read("bodies", record.body_offset, record.body_bytes))

    def _custom_id(self, record: LineRecord) -> bytes:
        return self._read("custom_ids", record.id_offset, record.id_bytes)

    def _record(self, row: int) -> LineRecord:
        return LineRecord._make(LINE_STRUCT.unpack(self._read("lines", row * LINE_STRUCT.size, LINE_STRUCT.size)))

    def _read(self, name: str, begin: int, num_bytes: int) -> bytes:
        """Bytes of a file, without a map where there are files."""
        if isinstance(self._source, StoreFiles):
            return self._source.read(name, begin, num_bytes)
        array = self._source[name]
        first, last = begin // array.itemsize, (begin + num_bytes) // array.itemsize
        return array[first:last].tobytes()

    def _interned(self, offset: int, num_bytes: int) -> SamplingParams:
        sampling = self._sampling_by_offset.get(offset)
        if sampling is None:
            self._num_interned_bytes += num_bytes
            if self._num_interned_bytes > MAX_INTERNED_BYTES:
                self._sampling_by_offset.clear()
                self._num_interned_bytes = num_bytes
            values = json.loads(self._read("sampling", offset, num_bytes))
            sampling = self._sampling_by_offset[offset] = sampling_from(values)
        return sampling


def hash_of_id(custom_id: bytes) -> bytes:
    """16 bytes that stand for a custom_id."""
    return hashlib.blake2b(custom_id, digest_size=16).digest()
