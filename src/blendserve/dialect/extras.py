"""What a line may ask beyond text in and text out, where the engine can: an adapter, pictures, embeddings.

The reader takes it out of the body before the rules of `parameters` see the rest; the engine gets it back from the
store's `bodies`, as the JSON of an `Extras`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from blendserve.dialect.images import Picture
from blendserve.dialect.urls import EMBEDDINGS_URL, TEXT_URLS
from blendserve.dialect.values import integer_between, reject, shown
from blendserve.errors import RequestError
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.tool_formats.format import Tool

EncodingFormat = Literal["float", "base64"]

MAX_DIMENSIONS = 1 << 20


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an engine can beyond text. `urls` are the endpoints that it answers. `adapters` are the names of LoRA
    adapters. `max_dimensions` is the length of its vectors, 0 where that is not known. `image_domains` are the hosts
    that pictures may be fetched from: a line must not send the engine to whatever it can reach. `chat` is how the model
    chats; `forces_json`: calls that a line demands come as plain JSON, because the engine follows no grammar of the
    model's own format. `checks_grammars`:
    structures are held against what our own engine can follow; others check them themselves.
    """

    adapters: tuple[str, ...] = ()
    sees: bool = False
    image_domains: tuple[str, ...] = ()
    urls: tuple[str, ...] = TEXT_URLS
    max_dimensions: int = 0
    chat: ChatFormats = field(default_factory=ChatFormats)
    forces_json: bool = False
    checks_grammars: bool = True


TEXT_ONLY = Abilities()


def native_abilities(hidden_size: int, chat: ChatFormats | None = None) -> Abilities:
    """What the native engine can, with a model whose states have so many numbers and which chats so."""
    urls = (*TEXT_URLS, EMBEDDINGS_URL)
    return Abilities(urls=urls, max_dimensions=hidden_size, chat=chat or ChatFormats())


@dataclass(frozen=True, slots=True)
class Extras:
    """`messages` is the whole conversation where it holds pictures, and `template` what its chat template is told; the
    stored prompt is then only an estimate. `echo` has the text of every prompt that answers begin with, None for one
    that was given as tokens. `shows_prompt_logprobs`: the answer has them in vLLM's field. `echoed` are settings that
    the answer repeats. The rest is how a chat's answer is read: `tools` that it may call, and how it writes calls
    (`CallForm`).
    """

    adapter: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    encoding_format: EncodingFormat = "float"
    dimensions: int | None = None
    echo: tuple[str | None, ...] = ()
    shows_prompt_logprobs: bool = False
    echoed: Mapping[str, Any] | None = None
    template: Mapping[str, Any] | None = None
    tools: tuple[Tool, ...] = ()
    call_form: str = ""
    named: str | None = None
    is_parallel: bool = True
    includes_reasoning: bool = True
    num_id_characters: int = 0

    def to_bytes(self) -> bytes:
        """JSON of what differs from the default; empty where nothing does."""
        values = {name: value for name, value in asdict(self).items() if value != getattr(NO_EXTRAS, name)}
        return json.dumps(values, ensure_ascii=False).encode() if values else b""

    @classmethod
    def from_bytes(cls, data: bytes) -> Extras:
        if not data:
            return NO_EXTRAS
        values = json.loads(data)
        tools = tuple(Tool(**tool) for tool in values.get("tools", ()))
        lists = {name: tuple(values.get(name, ())) for name in ("messages", "echo")}
        return cls(**{**values, **lists, "tools": tools})


NO_EXTRAS = Extras()


def take_pictures(messages: Any, domains: tuple[str, ...] = ()) -> tuple[Any, list[tuple[Picture, ...]]]:
    """Messages with their text parts alone, and the pictures of each; messages that are not understood stay.

    Raises: RequestError for a picture without a URL, or with one of a host that is not among `domains`.
    """
    if not isinstance(messages, list):
        return messages, []
    parted = [_part(f"messages[{index}].content", message, domains) for index, message in enumerate(messages)]
    return [message for message, _ in parted], [pictures for _, pictures in parted]


def _part(name: str, message: Any, domains: tuple[str, ...]) -> tuple[Any, tuple[Picture, ...]]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message, ()
    pictures = tuple(
        _read_picture(f"{name}[{index}]", part, domains) for index, part in enumerate(content) if _is_picture(part)
    )
    if not pictures:
        return message, ()
    texts = [part for part in content if not _is_picture(part)]
    return {**message, "content": texts or ""}, pictures


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"


def _read_picture(name: str, part: Mapping[str, Any], domains: tuple[str, ...]) -> Picture:
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else None
    if not isinstance(url, str) or not url.startswith(("data:image/", "http://", "https://")):
        reject(f"{name}.image_url", value, "an object whose url is a data:image/ or http(s) URL")
    if not url.startswith("data:") and (host := _host_of(url)) not in domains:
        raise RequestError(
            f"{name}.image_url would be fetched from {shown(host)}, which is not allowed; put the picture into the "
            "line (data:image/...), or allow the host with --image-domain",
            code="invalid_value",
            param=f"{name}.image_url",
        )
    return Picture.from_url(url)


def _host_of(url: str) -> str:
    """The host of a URL that everybody reads alike; empty for one with a user, a backslash or a space in it."""
    try:
        return "" if re.search(r"[\\@\s\x00-\x1f\x7f]", url) else (urlsplit(url).hostname or "")
    except ValueError:
        return ""


_EMBEDDING_FIELDS = ("model", "input", "encoding_format", "dimensions", "user")


def read_embedding_extras(body: Mapping[str, Any], max_dimensions: int = 0) -> Extras:
    """How vectors are wanted; `max_dimensions` is how many the model has, where that is known.

    Raises: RequestError for an unknown parameter, or a wrong one.
    """
    for name in body:
        if name not in _EMBEDDING_FIELDS:
            raise RequestError(
                f"unknown parameter {name[:60]!r}: remove it, or correct its spelling",
                code="unknown_parameter",
                param=name[:100],
            )
    given = body.get("encoding_format") or "float"
    if given not in ("float", "base64"):
        reject("encoding_format", given, "float or base64")
    encoding_format: EncodingFormat = "base64" if given == "base64" else "float"
    dimensions = body.get("dimensions")
    if dimensions is not None:
        integer_between(1, max_dimensions or MAX_DIMENSIONS)("dimensions", dimensions)
    return Extras(encoding_format=encoding_format, dimensions=dimensions)
