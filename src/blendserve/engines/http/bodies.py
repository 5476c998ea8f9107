"""The body of a reply, as text and as JSON. It is read as leniently as an answer that was paid for deserves."""

from __future__ import annotations

import json
import math
import re
import zlib
from contextlib import suppress
from typing import Any

from blendserve.dialect.logprobs import LOWEST_LOGPROB
from blendserve.engines.http.events import body_of_events, is_stream

_CHARSET = re.compile(r"charset=\"?([\w.:-]+)", re.IGNORECASE)
_GZIP = b"\x1f\x8b"
_LENIENT = json.JSONDecoder(strict=False)
_BLANKS = "\ufeff \t\r\n"


def text_of(data: bytes, content_type: str, max_bytes: int) -> str:
    """The text in the encoding that a response says or shows that it has; else in UTF-8, with marks for what is none. A
    body that is packed though nobody said so is unpacked, up to `max_bytes`.
    """
    if data.startswith(_GZIP):
        with suppress(zlib.error):
            data = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, max_bytes)
    named = _CHARSET.search(content_type)
    try:
        return data.decode(named[1] if named else json.detect_encoding(data))
    except (LookupError, UnicodeError):
        return data.decode(errors="replace")


def json_of(text: str) -> Any:
    """The JSON of a body. Comments before it, characters behind an object, and control characters within texts do not
    count; a stream of events is put together; `finite` replaces numbers that are none.

    Raises: ValueError when it is no JSON, RecursionError when it is nested too deeply.
    """
    text = text.lstrip(_BLANKS)
    while text.startswith(":"):  # sent to keep a connection open
        text = text.partition("\n")[2].lstrip(_BLANKS)
    if is_stream(text):
        return finite(body_of_events(text))
    value, end = _LENIENT.raw_decode(text)
    if not isinstance(value, dict) and text[end:].strip(_BLANKS):
        raise ValueError(f"more text at character {end}")
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return finite(value)
    return value


def finite(value: Any, *, is_logprob: bool = False) -> Any:
    """A JSON value without NaN and infinities, which some servers send and no row can hold: null stands for them, and
    for minus infinity among log probabilities what OpenAI has there.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return LOWEST_LOGPROB if is_logprob and value == -math.inf else None
    if isinstance(value, list):
        return [finite(item, is_logprob=is_logprob) for item in value]
    if isinstance(value, dict):
        return {name: finite(item, is_logprob=is_logprob or "logprob" in name) for name, item in value.items()}
    return value
