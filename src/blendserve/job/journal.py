"""The directory `OUT.jsonl.journal/`: what a job has done so far, bound to what it was asked to do.

`header.json` is written when ingestion has ended (before that nothing here counts), `records` grows while requests
run, `complete.json` takes the place of all the rest when the output files stand (and joins it where another try could
answer more). `lines` then tells which lines the answers are of. A changed input is read into `records.1` and
`prompts.1`, and so on: they count once the header names them. A lock keeps a second process out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from blendserve.errors import ConfigError
from blendserve.job.disk import open_own, replace_durably, replace_durably_by_pieces, sync_directory, writing_to
from blendserve.job.ownership import check_journal, check_own
from blendserve.job.record_log import RecordLog
from blendserve.job.store_layout import StoredFile

FORMAT_VERSION = 5
_LOCK, _HEADER, _RECORDS, _PROMPTS, _SEAL = "lock", "header.json", "records", "prompts", "complete.json"
_LINES = "lines"
_KEPT, _OWN = "kept", "own.json"
"""Of a table that has changed, until the new one has been read: its records, and the sizes of its files."""
_OWN_NAME = re.compile(
    r"lock|kept|(header\.json|complete\.json|own\.json|lines|records(\.\d+)?)(\.partial)?|prompts(\.\d+)?"
)

_WORDS = {
    "chat_template": "--chat-template",
    "chat_template_kwargs": "--chat-template-kwargs",
    "control_tokens": "--control-tokens",
    "reasoning_format": "--reasoning-format",
    "template_date": "the date in chat templates (--template-date)",
    "tool_format": "--tool-format",
    "dtype": "--dtype",
    "image_domains": "--image-domain",
    "isa": "the instruction set (--isa)",
    "kernels": "the version of the kernels",
    "kv_dtype": "--kv-dtype",
    "max_line_bytes": "the limit of bytes in a line",
    "max_line_requests": "--max-line-requests",
    "max_model_len": "the context length (--max-model-len)",
    "vocab_size": "the size of the vocabulary",
}
"""What users call a setting that has another name here."""


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """All that the answers depend on: same identity, same answers. `settings` hold JSON values only."""

    input_sha256: str
    model: str
    settings: Mapping[str, Any]

    def differences(self, other: JobIdentity) -> list[str]:
        """What differs, one phrase each: "--dtype was bf16, is int8" (`other` being the present one)."""
        mine, theirs = _flat(self), _flat(other)
        return [
            f"{_WORDS.get(name, name)} was {mine.get(name)}, is {theirs.get(name)}"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """What is fixed once ingestion has ended. `created` is the Unix time that every response carries.

    Two may change: `capacity`, the memory setting under which the journal's rows for want of memory came about, and
    `own_sizes`, by which the job knows its files: noted before they appear. `errors_name` is its error file,
    `store_files` what ingestion left in the store. `generation` counts how often the input was changed and read anew,
    `num_reused` lines of a table that kept the answer of an earlier run.
    """

    identity: JobIdentity
    created: int
    num_lines: int
    requested_model: str | None
    num_ingest_bytes: int
    store_files: Mapping[str, StoredFile]
    capacity: int
    errors_name: str
    own_sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    generation: int = 0
    num_reused: int = 0

    def owning(self, sizes: Mapping[str, int]) -> JournalHeader:
        """The same job, which knows files of these sizes for its own too."""
        grown = {name: [*self.own_sizes.get(name, ()), size] for name, size in sizes.items()}
        return replace(self, own_sizes={**self.own_sizes, **grown})


@dataclass(frozen=True, slots=True)
class JournalSeal:
    """A finished job: which files it wrote, how large they were, and the report to repeat.

    `num_for_memory` counts the error rows that came of `capacity`, the memory setting, `num_passing` those of other
    reasons that may pass. Where there are any, header, records and prompts stay beside the seal.
    """

    identity: JobIdentity
    is_ordered: bool
    file_sizes: Mapping[str, int]
    report: Mapping[str, Any]
    capacity: int
    num_for_memory: int
    num_passing: int
    errors_name: str
    generation: int = 0

    @property
    def num_retriable(self) -> int:
        return self.num_for_memory + self.num_passing


class Journal:
    """The journal directory, held under its lock from construction to `close`.

    Raises: ConfigError when another process holds it, a file in it cannot be understood, it is no journal at all, or
    somebody else may have prepared it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with writing_to(directory):
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            check_own(directory)
            check_journal(directory, _LOCK)
            self._lock = open_own(directory / _LOCK, os.O_RDWR | os.O_CREAT)
            sync_directory(directory.parent)
        self._take_lock()

    @property
    def store_directory(self) -> Path:
        """Where the tokens of the job's prompts are kept, of an input that was read once."""
        return self.store_of(0)

    def store_of(self, generation: int) -> Path:
        """Where the tokens of the job's prompts are kept."""
        return self.directory / _of_generation(_PROMPTS, generation)

    def header(self) -> JournalHeader | None:
        """The header of a job whose ingestion has ended, else None."""
        return read_header(self.directory)

    def write_header(self, header: JournalHeader) -> None:
        replace_durably(self.directory / _HEADER, _to_json(header))

    def seal(self) -> JournalSeal | None:
        """What a finished job left, else None. A header of a later generation has put an end to it."""
        return read_seal(self.directory)

    def write_seal(self, seal: JournalSeal, lines: Iterable[bytes] = (), *, keeps_records: bool = False) -> None:
        """Mark the job finished; records and prompts are dropped unless some lines may be tried again: the output files
        hold all that counts. `lines` are those of `TokenStore.line_hashes`. `keeps_records`: the records alone stay."""
        replace_durably_by_pieces(self.directory / _LINES, lines)
        replace_durably(self.directory / _SEAL, _to_json(seal))
        records, prompts = self._names_of(seal.generation)
        kept = (_HEADER, records, prompts) if seal.num_retriable else (records,) if keeps_records else ()
        self._discard(keep={_LOCK, _SEAL, _LINES, *kept})

    def line_hashes(self) -> bytes:
        """What `write_seal` was given. Raises: ConfigError where it is gone."""
        try:
            return (self.directory / _LINES).read_bytes()
        except OSError:
            raise ConfigError(f"{self.directory / _LINES} is damaged; discard the journal with --fresh") from None

    def renew(self, header: JournalHeader) -> None:
        """Put a job of a changed input, which has been read beside the old one, in its place. From the header on it
        counts."""
        self.write_header(header)
        with writing_to(self.directory):
            (self.directory / _SEAL).unlink(missing_ok=True)
            sync_directory(self.directory)
        self._discard(keep={_LOCK, _HEADER, *self._names_of(header.generation)})

    def clear(self, generation: int) -> None:
        """Remove what an attempt to read a changed input has left behind."""
        names = set(self._names_of(generation))
        self._discard(keep={entry.name for entry in self.directory.iterdir()} - names)

    def unseal(self) -> None:
        """Go on with a job that was finished: what it kept beside the seal counts again."""
        with writing_to(self.directory):
            (self.directory / _SEAL).unlink()
            sync_directory(self.directory)

    def discard(self) -> None:
        """Forget everything but the lock. The header goes first: without it the rest counts for nothing."""
        with writing_to(self.directory):
            for name in (_SEAL, _HEADER):
                (self.directory / name).unlink(missing_ok=True)
            sync_directory(self.directory)
        self._discard(keep={_LOCK})

    def set_aside(self, own_sizes: Mapping[str, Sequence[int]]) -> Path | None:
        """Forget everything but the lock, the answers of this job and `own_sizes`. Returns: where the answers are, if
        there are any.

        What a job that was killed while it read its input had set aside stays so: its own records hold less.
        """
        replace_durably(self.directory / _OWN, json.dumps(own_sizes).encode())
        kept, records = self.directory / _KEPT, self.directory / _RECORDS
        with writing_to(self.directory):
            if (self.directory / _HEADER).exists() or (self.directory / _SEAL).exists():
                kept.unlink(missing_ok=True)
            for name in (_SEAL, _HEADER):
                (self.directory / name).unlink(missing_ok=True)
            sync_directory(self.directory)
            if records.exists() and not kept.exists():
                records.rename(kept)
        self._discard(keep={_LOCK, _KEPT, _OWN})
        return kept if kept.exists() else None

    def own_sizes(self) -> dict[str, list[int]]:
        """The sizes that were set aside."""
        path = self.directory / _OWN
        try:
            return {str(name): list(sizes) for name, sizes in json.loads(path.read_bytes()).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError):
            raise ConfigError(f"{path} is damaged; discard the journal with --fresh") from None

    def discard_set_aside(self) -> None:
        """Forget what `set_aside` kept: a new header and new records take its place."""
        with writing_to(self.directory):
            for name in (_KEPT, _OWN):
                (self.directory / name).unlink(missing_ok=True)

    def open_records(self, generation: int = 0) -> RecordLog:
        return RecordLog(records_path(self.directory, generation))

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                message = f"{self.directory} is in use by process {holder}; wait for it, or write to another file (-o)"
            else:
                message = f"cannot lock {self.directory}: {error.strerror}; write to a local disk"
            raise ConfigError(message) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _discard(self, keep: set[str]) -> None:
        with writing_to(self.directory):
            for entry in [entry for entry in self.directory.iterdir() if _OWN_NAME.fullmatch(entry.name)]:
                if entry.name in keep:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)

    def _names_of(self, generation: int) -> tuple[str, str]:
        return _of_generation(_RECORDS, generation), _of_generation(_PROMPTS, generation)


def read_header(directory: Path) -> JournalHeader | None:
    """The header of a journal that another process may hold. Raises: ConfigError when it cannot be understood."""
    values = _read_json(directory, _HEADER)
    if values is None:
        return None
    files = {name: StoredFile(*of_file) for name, of_file in values["store_files"].items()}
    return JournalHeader(**{**values, "store_files": files})


def read_seal(directory: Path) -> JournalSeal | None:
    """The seal of a journal that another process may hold. Raises: as `read_header`."""
    values = _read_json(directory, _SEAL)
    if values is None:
        return None
    seal, header = JournalSeal(**values), read_header(directory)
    return None if header is not None and header.generation > seal.generation else seal


def records_path(directory: Path, generation: int) -> Path:
    """Where the records of a journal are."""
    return directory / _of_generation(_RECORDS, generation)


def _read_json(directory: Path, name: str) -> dict[str, Any] | None:
    """The fields of a header or a seal; None where there is no such file."""
    path = directory / name
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        version = values["format"]
        if version == FORMAT_VERSION:
            if values.pop("sha256") != _sha256(values):
                raise ValueError("the hash is that of other fields")
            del values["format"]
            return {**values, "identity": JobIdentity(**values["identity"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ConfigError(f"{path} is damaged; discard the journal with --fresh") from None
    raise ConfigError(
        f"{path} was written by another version of blendserve (journal format {version}; this one reads "
        f"{FORMAT_VERSION}): finish the job with that version, write to another file (-o), or begin anew with "
        "--fresh, which discards its answers"
    )


def why_another_job(recorded: JobIdentity, present: JobIdentity, directory: Path) -> str | None:
    """Every difference between the job that a journal records and the present one, as an error; None where they are
    the same."""
    differences = recorded.differences(present)
    if not differences:
        return None
    if is_changed_input(recorded, present):
        return (
            f"{directory} belongs to a job whose input was another one, or was changed since: add --reuse to keep the "
            "answers of lines that did not change and to run the others, write to another file (-o), or discard that "
            "job with --fresh"
        )
    return (
        f"{directory} belongs to another job: {'; '.join(differences)}. Run the command that began it, write to "
        "another file (-o), or discard that job with --fresh"
    )


def is_changed_input(recorded: JobIdentity, present: JobIdentity) -> bool:
    """Is the input all that differs?"""
    return recorded != present and replace(recorded, input_sha256=present.input_sha256) == present


def _of_generation(name: str, generation: int) -> str:
    return f"{name}.{generation}" if generation else name


def _flat(identity: JobIdentity) -> dict[str, Any]:
    return {"input (sha256)": identity.input_sha256[:16], "model": identity.model, **identity.settings}


def _to_json(value: JournalHeader | JournalSeal) -> bytes:
    values = {"format": FORMAT_VERSION, **asdict(value)}
    return json.dumps({"sha256": _sha256(values), **values}, indent=1).encode()


def _sha256(values: Mapping[str, Any]) -> str:
    """Hash of JSON values, the same before they are written and after they are read."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
