"""The directory `OUT.jsonl.journal/`: what a job has done so far, bound to what it was asked to do.

`header.json` is written when ingestion has ended (before that nothing here counts), `records` grows while requests
run, `complete.json` takes the place of all the rest when the output files stand (and joins it where more memory could
answer more). A lock keeps a second process out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from blendserve.errors import ConfigError
from blendserve.job.disk import open_own, replace_durably, sync_directory, writing_to
from blendserve.job.record_log import RecordLog
from blendserve.job.store import StoredFile

FORMAT_VERSION = 5
_LOCK, _HEADER, _RECORDS, _PROMPTS, _SEAL = "lock", "header.json", "records", "prompts", "complete.json"
_KEPT, _OWN = "kept", "own.json"
"""Of a job whose input has changed, until the new one has been read: its records, and the sizes of its files."""

_OWN_NAMES = frozenset(
    (_LOCK, _PROMPTS, _KEPT, *(name + end for name in (_HEADER, _RECORDS, _SEAL, _OWN) for end in ("", ".partial")))
)


_WORDS = {
    "accepts_any_name": "a model chosen with --model",
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
    `store_files` what ingestion left in the store, `num_reused` counts lines that kept the answer of an earlier run.
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
    num_reused: int = 0

    def owning(self, sizes: Mapping[str, int]) -> JournalHeader:
        """The same job, which knows files of these sizes for its own too."""
        grown = {name: [*self.own_sizes.get(name, ()), size] for name, size in sizes.items()}
        return replace(self, own_sizes={**self.own_sizes, **grown})


@dataclass(frozen=True, slots=True)
class JournalSeal:
    """A finished job: which files it wrote, how large they were, and the report to repeat.

    `num_retriable` counts the error rows that came of `capacity`, the memory setting.
    """

    identity: JobIdentity
    is_ordered: bool
    file_sizes: Mapping[str, int]
    report: Mapping[str, Any]
    capacity: int
    num_retriable: int
    errors_name: str


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
            _check_own(directory)
            _check_ours(directory)
            self._lock = open_own(directory / _LOCK, os.O_RDWR | os.O_CREAT)
            sync_directory(directory.parent)
        self._take_lock()

    @property
    def store_directory(self) -> Path:
        """Where the tokens of the job's prompts are kept."""
        return self.directory / _PROMPTS

    def header(self) -> JournalHeader | None:
        """The header of a job whose ingestion has ended, else None."""
        values = self._read_json(_HEADER)
        if values is None:
            return None
        files = {name: StoredFile(*of_file) for name, of_file in values["store_files"].items()}
        return JournalHeader(**{**values, "store_files": files})

    def write_header(self, header: JournalHeader) -> None:
        replace_durably(self.directory / _HEADER, _to_json(header))

    def seal(self) -> JournalSeal | None:
        """What a finished job left, else None."""
        values = self._read_json(_SEAL)
        return None if values is None else JournalSeal(**values)

    def write_seal(self, seal: JournalSeal, *, keeps_records: bool = False) -> None:
        """Mark the job finished; records and prompts are dropped unless some lines may be tried again: the output files
        hold all that counts. `keeps_records`: the records alone stay."""
        replace_durably(self.directory / _SEAL, _to_json(seal))
        kept = (_HEADER, _RECORDS, _PROMPTS) if seal.num_retriable else (_RECORDS,) if keeps_records else ()
        self._discard(keep={_LOCK, _SEAL, *kept})

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

    def open_records(self) -> RecordLog:
        return RecordLog(self.directory / _RECORDS)

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
            for name in _OWN_NAMES - keep:
                entry = self.directory / name
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """The fields of a header or a seal; None where there is no such file."""
        path = self.directory / name
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
            f"{path} has format {version}, this version of blendserve reads {FORMAT_VERSION}; finish the job with "
            "the version that began it, or discard the journal with --fresh"
        )


def why_another_job(recorded: JobIdentity, present: JobIdentity, directory: Path) -> str | None:
    """Every difference between the job that a journal records and the present one, as an error; None where they are
    the same."""
    differences = recorded.differences(present)
    if not differences:
        return None
    return (
        f"{directory} belongs to another job: {'; '.join(differences)}. Run the command that began it, write to "
        "another file (-o), or discard that job with --fresh"
    )


def _check_own(directory: Path) -> None:
    """Raises: ConfigError where another user may have put a part of the journal there: it could lead anywhere.

    Mutates: the mode of a directory that others may look into.
    """
    paths = [directory]
    for parent, directories, files in os.walk(directory):
        paths += [Path(parent, name) for name in (*directories, *files)]
    for path in paths:
        found = path.lstat()
        reason = _foreign(found)
        if reason:
            raise ConfigError(
                f"{path} {reason}; a journal is used only by the user who began it: move it away, or write to another "
                "file (-o)"
            )
        if path == directory and stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o700)


def _foreign(found: os.stat_result) -> str:
    """Why a path is not surely ours, as a verb and its object; empty where it is."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, and you are user {os.geteuid()}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH:
        return f"is a directory that everybody may write to (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _check_ours(directory: Path) -> None:
    """Raises: ConfigError where a directory of that name is somebody else's: discarding a journal must not empty it."""
    if not (directory / _LOCK).exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} is where the journal belongs, and holds other files; move them away, or write to another "
            "file (-o)"
        )


def _flat(identity: JobIdentity) -> dict[str, Any]:
    return {"input (sha256)": identity.input_sha256[:16], "model": identity.model, **identity.settings}


def _to_json(value: JournalHeader | JournalSeal) -> bytes:
    values = {"format": FORMAT_VERSION, **asdict(value)}
    return json.dumps({"sha256": _sha256(values), **values}, indent=1).encode()


def _sha256(values: Mapping[str, Any]) -> str:
    """Hash of JSON values, the same before they are written and after they are read."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
