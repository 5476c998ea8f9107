"""The requests of a job on disk: prompts as token ids, one fixed-size record per line, sampling parameters interned.

Written once by ingestion, then read through memory maps: a million requests cost a few bytes each of memory of our
own, the rest is the system's page cache. Files (little endian): `tokens` int32, `prompt_ends` int64, `lines` (LINE),
`custom_ids` UTF-8, `sampling` one JSON object per distinct set of parameters, `bodies` what else the engine is told
(see `BatchLine`), `urls` one endpoint per line of text, numbered from 0.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blendserve.config import BLOCK_SIZE
from blendserve.dialect.endpoint import StoredLine
from blendserve.dialect.extras import Extras
from blendserve.dialect.schema import BatchLine
from blendserve.dialect.values import MAX_INT32
from blendserve.engine.keys import block_keys
from blendserve.errors import ConfigError
from blendserve.job.disk import sync_directory, writing_to
from blendserve.job.sampling_json import given_fields, sampling_from
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.sorting import FlatPrompts, flatten
from blendserve.planner.table import known_output_tokens, most_output_tokens
from blendserve.request import EmbeddingParams, Request, SamplingParams, StructuredOutputs, TokenIds
from blendserve.seeds import choice_seed, derived_seed

if TYPE_CHECKING:
    from typing_extensions import Buffer

LINE = np.dtype(
    [
        ("line_number", "<i8"),
        ("first_prompt", "<i8"),
        ("id_offset", "<i8"),
        ("sampling_offset", "<i8"),
        ("body_offset", "<i8"),
        ("body_bytes", "<i8"),
        ("seed", "<i8"),
        ("id_bytes", "<i4"),
        ("sampling_bytes", "<i4"),
        ("max_tokens", "<i4"),
        ("num_prompts", "<i4"),
        ("n", "<i4"),
        ("flags", "<u4"),
        ("digest", "V16"),
    ]
)
_PACK_LINE = struct.Struct("<qqqqqqqiiiiiI16s").pack
_FILES: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "prompt_ends": np.dtype("<i8"),
    "lines": LINE,
    "custom_ids": np.dtype("u1"),
    "sampling": np.dtype("u1"),
    "bodies": np.dtype("u1"),
    "urls": np.dtype("u1"),
}
_HAS_SEED, _HAS_KNOWN_LENGTH, _EMBEDS, _HAS_STRUCTURE, _HAS_SCORES = 1, 2, 4, 8, 16
_URL_SHIFT = 8
"""Flags of a line: the number of its URL stands above this bit."""
_NO_LIMIT = -1
_MAX_INTERNED_BYTES = 4 << 20
"""JSON of the parameter sets remembered at a time, which are about ten times as large: bounds memory, costs only
repeated entries in the file."""

_OWN_FIELDS = ("seed", "max_tokens", "logit_bias")
_INTERNED_FIELDS = (*(field.name for field in fields(SamplingParams) if field.name not in _OWN_FIELDS), "logit_bias")
_interned_values = attrgetter(*_INTERNED_FIELDS)


class StoredFile(NamedTuple):
    """What one file of a store holds: its size and its hash. Units: bytes."""

    num_bytes: int
    sha256: str


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
        self._sizes = dict.fromkeys(_FILES, 0)
        self._interned: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._num_interned_bytes = 0
        self._number_by_url: dict[str, int] = {}
        self._num_prompts = 0
        with ExitStack() as stack, writing_to(directory):
            directory.mkdir(mode=0o700)
            self._hashed = {name: stack.enter_context(_HashedFile(directory / name)) for name in _FILES}
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
            record = _PACK_LINE(
                line.line_number,
                first_prompt,
                id_offset,
                sampling_offset,
                body_offset,
                len(line.body),
                sampling.seed or 0,
                len(custom_id),
                sampling_bytes,
                _NO_LIMIT if sampling.max_tokens is None else sampling.max_tokens,
                len(token_ids),
                sampling.n,
                _flags(line) | self._url_number(line.url) << _URL_SHIFT,
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
            if self._num_interned_bytes > _MAX_INTERNED_BYTES:
                self._interned.clear()
                self._num_interned_bytes = len(data)
            place = self._interned[key] = (self._write("sampling", data), len(data))
        return place


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
        return cls({name: _mapped(directory / name, dtype, files) for name, dtype in _FILES.items()}, max_model_len)

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
            url=self._urls[int(record["flags"]) >> _URL_SHIFT],
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
        seed = int(line["seed"]) if line["flags"] & _HAS_SEED else None
        max_tokens = None if line["max_tokens"] == _NO_LIMIT else int(line["max_tokens"])
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
            embedding=EmbeddingParams(self._extras(row).dimensions) if line["flags"] & _EMBEDS else None,
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
        limits = np.where(max_tokens == _NO_LIMIT, MAX_INT32, max_tokens)
        if self.max_model_len:
            limits = np.minimum(limits, self.max_model_len - lengths)
        flags = self._lines["flags"][rows]
        known = np.where((flags & _HAS_KNOWN_LENGTH) != 0, limits, -1)
        if not (flags & _HAS_STRUCTURE).any():
            return RequestTable(lengths, limits, known)
        structure, bounds = self._structures(rows)
        return RequestTable(lengths, np.minimum(limits, bounds), known, structure)

    def embeds_any(self, numbers: Int64s) -> bool:
        """Does any of these requests ask for a vector?"""
        return bool((self._lines["flags"][self.line_of_request[numbers]] & _EMBEDS).any())

    def most_prompt_logprobs(self, numbers: Int64s) -> int:
        """The most alternatives with which tokens of these prompts are scored; -1 where no prompt is."""
        rows = self.line_of_request[numbers]
        rows = rows[(self._lines["flags"][rows] & _HAS_SCORES) != 0]
        _, first = np.unique(self._lines["sampling_offset"][rows], return_index=True)
        asked = (self._sampling_of(self._lines[row]).prompt_logprobs for row in rows[first].tolist())
        return max((number for number in asked if number is not None), default=-1)

    def _structures(self, rows: NDArray[np.int32]) -> tuple[Int64s, Int64s]:
        """Numbers of the structures that lines ask for, 0 for none, and the most tokens of each."""
        structured = np.flatnonzero(self._lines["flags"][rows] & _HAS_STRUCTURE)
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
            if self._num_interned_bytes > _MAX_INTERNED_BYTES:
                self._sampling_by_offset.clear()
                self._num_interned_bytes = len(data)
            sampling = self._sampling_by_offset[offset] = sampling_from(values)
        return sampling


def hash_of_id(custom_id: bytes) -> bytes:
    """16 bytes that stand for a custom_id."""
    return hashlib.blake2b(custom_id, digest_size=16).digest()


def _flags(line: BatchLine) -> int:
    sampling = line.sampling
    limit = MAX_INT32 if sampling.max_tokens is None else sampling.max_tokens
    return (
        (_HAS_SEED if sampling.seed is not None else 0)
        | (_EMBEDS if line.embeds else 0)
        | (_HAS_SCORES if sampling.prompt_logprobs is not None else 0)
        | (_HAS_STRUCTURE if sampling.structured_outputs is not None else 0)
        | (_HAS_KNOWN_LENGTH if known_output_tokens(sampling, limit) >= 0 else 0)
    )


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
