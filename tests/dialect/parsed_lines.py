"""Lines of tests: what parsing gives, or the refusal."""

from __future__ import annotations

from typing import Any

import pytest
from batch_fakes import SERVED, batch_line

from blendserve.dialect.schema import BatchLine, ServedModel, parse_line
from blendserve.errors import RequestError

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"prompt": "hi"}


def parse(body: dict[str, Any], **fields: Any) -> BatchLine:
    return parse_line(batch_line("a", body, **fields), 1, SERVED)


def refusal(value: object, served: ServedModel = SERVED) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_line(value, 1, served)
    return caught.value
