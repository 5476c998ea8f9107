"""One line of a batch file as JSON, read more strictly than Python does: no NaN, no key twice, no half characters.

What a broken line still tells is found here too: its custom_id, and the objects of a line that holds several.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

from blendserve.dialect.values import shown
from blendserve.errors import RequestError

MAX_LINE_PARTS = 1 << 18
"""Objects, lists and members of objects in one line: each takes up to 50 times its text in memory, texts and numbers a
few times theirs."""
UTF8_MARK = b"\xef\xbb\xbf"
_MAX_SEARCHED_BYTES = 1 << 16
_MAX_ID_CHARACTERS = 1000
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ID = re.compile(rb'"custom_id"\s*:\s*("[^"\\]*+(?:\\.[^"\\]*+)*+"|-?\d{1,18}(?=\s*[,}]))', re.DOTALL)
_BETWEEN_OBJECTS = re.compile(r"[\s\ufeff]*")


def line_error(code: str, message: str, param: str | None = None) -> RequestError:
    """An error of a line that never became a request."""
    return RequestError(message, code=code, param=param, status_code=0)


def parse_json(line: bytes) -> object:
    """Parse one line strictly. Raises: RequestError saying where and why it is no JSON that can be answered."""
    if len(line) > MAX_LINE_PARTS and _num_parts(line) > MAX_LINE_PARTS:
        raise line_error(
            "invalid_json_line", f"the line holds more than {MAX_LINE_PARTS} objects, lists and members; split it"
        )
    try:
        value = _DECODER.decode(line.decode())
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise line_error(
            "invalid_json_line", f"byte {error.start} of the line is not UTF-8; save the file as UTF-8"
        ) from None
    except UnicodeEncodeError:
        raise line_error(
            "invalid_json_line",
            "the line holds half of a character: one of \\ud800 to \\udfff without its other half; remove it, or "
            "write the whole character",
        ) from None
    except json.JSONDecodeError as error:
        remedy = "; remove the comma at its end" if error.doc[error.pos :].strip() == "," else ""
        raise line_error(
            "invalid_json_line", f"the line is not valid JSON: {error.msg} at column {error.colno}{remedy}"
        ) from None
    except ValueError as error:
        raise line_error("invalid_json_line", f"the line is not valid JSON: {error}") from None
    except RecursionError:
        raise nested_too_deeply() from None
    return value


def nested_too_deeply() -> RequestError:
    return line_error("invalid_json_line", "the JSON is nested too deeply; flatten it")


def joined_objects(line: bytes) -> list[bytes]:
    """The objects of a line that holds several requests, as where files without a last line break were joined; byte
    order marks may stand between them. Empty where the line is anything else.
    """
    if line.count(b'"custom_id"') < 2 or _num_parts(line) > MAX_LINE_PARTS:
        return []
    pieces: list[bytes] = []
    try:
        text = line.decode()
        position = 0
        while position < len(text):
            value, end = _LENIENT.raw_decode(text, position)
            if not (isinstance(value, dict) and "custom_id" in value):
                return []
            pieces.append(text[position:end].encode())
            between = _BETWEEN_OBJECTS.match(text, end)
            position = between.end() if between is not None else end
    except (ValueError, RecursionError):
        return []
    return pieces if len(pieces) > 1 else []


def custom_id_in(line: bytes) -> str | None:
    """The custom_id of a line that is no valid JSON, as far as it can be read."""
    match = _ID.search(line, 0, _MAX_SEARCHED_BYTES)
    if match is None:
        return None
    try:
        custom_id = str(_LENIENT.decode(match.group(1).decode()))
        return custom_id.encode(errors="replace").decode()[:_MAX_ID_CHARACTERS]
    except (ValueError, RecursionError):
        return None


def _num_parts(line: bytes) -> int:
    """Objects, lists and members of objects; what stands in texts is looked at only where it could matter."""
    signs = (b"[", b"{", b":")
    if sum(map(line.count, signs)) <= MAX_LINE_PARTS:
        return 0
    return sum(map(_TEXTS.sub(b"", line).count, signs))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} appears twice in one object; remove one of the two")
    return result


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number; write a number, or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
_LENIENT = json.JSONDecoder()
