"""Files of other kinds, told by their first bytes: tables, archives, pictures, text in UTF-16."""

from __future__ import annotations

from pathlib import Path

from blendserve.errors import ConfigError

HEAD_BYTES = 512
"""As many as a tar archive needs to be told."""

_TABLES_BY_MAGIC = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file"}
_KINDS_BY_MAGIC = {
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"SQLite format 3": "an SQLite database",
    b"PK\x03\x04": "a zip archive (spreadsheets are such archives too)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x04\x22\x4d\x18": "compressed with LZ4",
    b"\xff\x06\x00\x00sNaPpY": "compressed with Snappy",
    b"\x5d\x00\x00": "compressed with LZMA",
    b"LZIP": "compressed with lzip",
    b"\x1f\x9d": "compressed with compress",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x02": "a pickle",
    b"\x7fELF": "a program",
    b"GGUF": "a model (GGUF)",
}
_TAR_AT, _TAR_MAGIC = 257, b"ustar"
_LFS_POINTER = b"version https://git-lfs"


def check_kind(head: bytes, path: Path) -> None:
    """Raises: ConfigError when a file that begins so is of a kind that holds no text of JSON lines."""
    for magic, kind in _TABLES_BY_MAGIC.items():
        if head.startswith(magic):
            raise ConfigError(f"{path} is {kind}: answer its rows with `blendserve map`, or convert it to JSON lines")
    if head.startswith(_LFS_POINTER):
        raise ConfigError(f"{path} is a pointer of Git LFS, not the file itself; fetch it: git lfs pull")
    if head[_TAR_AT:].startswith(_TAR_MAGIC):
        raise ConfigError(f"{path} is a tar archive; unpack it first: tar -xf {path}")
    for magic, kind in _KINDS_BY_MAGIC.items():
        if head.startswith(magic):
            raise ConfigError(f"{path} is {kind}; convert it to JSON lines first, one request in each line")
    encoding = _wide_encoding(head)
    if encoding is not None:
        raise ConfigError(
            f"{path} is {encoding.upper()} text; convert it first: iconv -f {encoding} -t utf-8 {path} > in.jsonl"
        )


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark or by the zeros between characters of ASCII."""
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    sample = head[: len(head) // 4 * 4]
    zeros = [sample[at::4].count(0) * 16 >= len(sample) * 3 for at in range(4)]  # most of each column of four bytes
    patterns = {
        (False, True, False, True): "utf-16le",
        (True, False, True, False): "utf-16be",
        (False, True, True, True): "utf-32le",
        (True, True, True, False): "utf-32be",
    }
    encoding = patterns.get((zeros[0], zeros[1], zeros[2], zeros[3])) if len(sample) >= 8 else None
    return encoding if encoding and "\0" not in sample.decode(encoding, "replace") else None
