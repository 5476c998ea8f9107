"""The directory `OUT.jsonl.journal/`: what a job has done so far, bound to what it was asked to do.

`header.json` is written when ingestion has ended (before that nothing here counts), `records` grows while requests
run, `complete.json` takes the place of all the rest when the output files stand (and joins it where more memory could
answer more). A lock keeps a second process out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from blendserve.errors import ConfigError
from blendserve.job.disk import replace_durably, sync_directory, writing_to
from blendserve.job.record_log import RecordLog

FORMAT_VERSION = 3
_LOCK, _HEADER, _RECORDS, _PROMPTS, _SEAL = "lock", "header.json", "records", "prompts", "complete.json"

_OWN_NAMES = frozenset(
    (_LOCK, _PROMPTS, *(name + end for name in (_HEADER, _RECORDS, _SEAL) for end in ("", ".partial")))
)


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """All that the answers depend on: same identity, same answers. `settings` hold JSON values only."""

    input_sha256: str
    model: str
    settings: Mapping[str, Any]

    def differences(self, other: JobIdentity) -> list[str]:
        """What differs, one phrase each: "max_model_len was 2048, is 4096" (`other` being the present one)."""
        mine, theirs = _flat(self), _flat(other)
        return [
            f"{name} was {mine.get(name)}, is {theirs.get(name)}"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """What is fixed once ingestion has ended. `created` is the Unix time that every response carries.

    Two may change: `capacity`, the memory setting under which the journal's rows for want of memory came about, and
    `own_sizes`, by which the job knows its files: noted before they appear. `errors_name` is its error file. The last
    two are missing in journals of older versions.
    """

    identity: JobIdentity
    created: int
    num_lines: int
    requested_model: str | None
    num_ingest_bytes: int
    store_sizes: Mapping[str, int]
    capacity: int
    errors_name: str | None = None
    own_sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)

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
    errors_name: str | None = None


class Journal:
    """The journal directory, held under its lock from construction to `close`.

    Raises: ConfigError when another process holds it, a file in it cannot be understood, or it is no journal at all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with writing_to(directory):
            directory.mkdir(exist_ok=True)
            _check_ours(directory)
            self._lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            sync_directory(directory.parent)
        self._take_lock()

    @property
    def store_directory(self) -> Path:
        """Where the tokens of the job's prompts are kept."""
        return self.directory / _PROMPTS

    def header(self) -> JournalHeader | None:
        """The header of a job whose ingestion has ended, else None."""
        values = self._read_json(_HEADER, JournalHeader)
        return None if values is None else JournalHeader(**values)

    def write_header(self, header: JournalHeader) -> None:
        replace_durably(self.directory / _HEADER, _to_json(header))

    def seal(self) -> JournalSeal | None:
        """What a finished job left, else None."""
        values = self._read_json(_SEAL, JournalSeal)
        return None if values is None else JournalSeal(**values)

    def write_seal(self, seal: JournalSeal) -> None:
        """Mark the job finished; records and prompts are dropped unless some lines may be tried again: the output files
        hold all that counts."""
        replace_durably(self.directory / _SEAL, _to_json(seal))
        self._discard(keep={_LOCK, _SEAL, *((_HEADER, _RECORDS, _PROMPTS) if seal.num_retriable else ())})

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

    def _read_json(self, name: str, kind: type[JournalHeader | JournalSeal]) -> dict[str, Any] | None:
        """The fields of a `kind`; None where there is no such file."""
        path = self.directory / name
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            version = values.pop("format")
            if version == FORMAT_VERSION:
                identity = JobIdentity(**values["identity"])
                known = {entry.name: values[entry.name] for entry in fields(kind) if _is_kept(entry, values)}
                return known | {"identity": identity}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(f"{path} is damaged; discard the journal with --fresh") from None
        raise ConfigError(
            f"{path} has format {version}, this version of blendserve reads {FORMAT_VERSION}; finish the job with "
            "the version that began it, or discard the journal with --fresh"
        )


def check_same_job(recorded: JobIdentity, present: JobIdentity, directory: Path) -> None:
    """Raises: ConfigError naming every difference between the job that a journal records and the present one."""
    differences = recorded.differences(present)
    if differences:
        raise ConfigError(
            f"{directory} belongs to another job: {'; '.join(differences)}. Run the command that began it, write to "
            "another file (-o), or discard that job with --fresh"
        )


def _check_ours(directory: Path) -> None:
    """Raises: ConfigError where a directory of that name is somebody else's: discarding a journal must not empty it."""
    if not (directory / _LOCK).exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} is where the journal belongs, and holds other files; move them away, or write to another "
            "file (-o)"
        )


def _is_kept(entry: Field[Any], values: Mapping[str, Any]) -> bool:
    """Is it there, or must it be? What later versions added has a default."""
    return entry.name in values or (entry.default is MISSING and entry.default_factory is MISSING)


def _flat(identity: JobIdentity) -> dict[str, Any]:
    return {"input (sha256)": identity.input_sha256[:16], "model": identity.model, **identity.settings}


def _to_json(value: JournalHeader | JournalSeal) -> bytes:
    return json.dumps({"format": FORMAT_VERSION, **asdict(value)}, indent=1).encode()
