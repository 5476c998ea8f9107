"""Pictures as a plan needs them: which one it is, and how large. Nothing is decoded or fetched."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from hashlib import blake2b

_HEAD_CHARACTERS = 1 << 16
"""Of a picture's base64; sizes stand at the beginning of all formats but JPEGs with large thumbnails."""
_JPEG_FRAMES = frozenset((*range(0xC0, 0xD0),)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class Picture:
    """`digest` is that of its URL: equal ones share a prefix. Units: pixels, 0 where they are not known."""

    digest: str
    width: int = 0
    height: int = 0

    @classmethod
    def from_url(cls, url: str) -> Picture:
        """Read the size off a data URL; other URLs are not fetched."""
        digest = blake2b(url.encode("utf-8", "replace"), digest_size=16).hexdigest()
        header, _, data = url.partition(",")
        if not (header.startswith("data:") and header.endswith(";base64")):
            return cls(digest)
        head = data[: _HEAD_CHARACTERS - _HEAD_CHARACTERS % 4]
        try:
            return cls(digest, *image_size(base64.b64decode(head + "=" * (-len(head) % 4))))
        except binascii.Error:
            return cls(digest)

    @classmethod
    def from_text(cls, text: str) -> Picture:
        digest, width, height = text.split(":")
        return cls(digest, int(width), int(height))

    def to_text(self) -> str:
        """As a message carries it through encoding."""
        return f"{self.digest}:{self.width}:{self.height}"


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the beginning of a PNG, GIF, JPEG or WebP file; zeros where they are not found."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 10:
        return int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    if data.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    return 0, 0


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk from segment to segment until a frame header."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
