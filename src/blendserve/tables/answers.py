"""Rows of the journal -> columns beside those of the table."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from blendserve.dialect.values import shown
from blendserve.errors import ConfigError
from blendserve.tables.recipe import Recipe
from blendserve.tables.typed import Object, Shape, shape_of

ERROR, FINISH_REASON, PROMPT_TOKENS, OUTPUT_TOKENS = "error", "finish_reason", "prompt_tokens", "output_tokens"
_TYPES = {ERROR: pa.string(), FINISH_REASON: pa.string(), PROMPT_TOKENS: pa.int64(), OUTPUT_TOKENS: pa.int64()}


class Answer(NamedTuple):
    """What one row got. `value` is as its column takes it, and None where there is an `error`."""

    value: Any = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class AnswerColumns:
    """The columns that a recipe adds to a table: their types, and their content.

    `num_unreadable` counts answers that came, and are not what the recipe asks for: their rows get an error.
    Raises: ConfigError when a name is one of the table's.
    """

    def __init__(self, recipe: Recipe, names: Sequence[str], *, unnest: bool = False, prefix: str = "") -> None:
        self.num_unreadable = 0
        self._recipe = recipe
        self._shape = None if recipe.schema is None else shape_of(recipe.schema)
        self._fields: Mapping[str, Shape] | None = None
        self._num_dimensions: int | None = None
        if unnest:
            if not isinstance(self._shape, Object):
                raise ConfigError("--unnest makes a column of each field: it needs a --schema of an object with fields")
            self._fields = self._shape.fields
        self._names = [prefix + name for name in _TYPES]
        own = [*(self._fields or (recipe.answer,)), *self._names]
        for name in own:
            if name in names or own.count(name) > 1:
                raise ConfigError(
                    f"the answers would be in a column {shown(name)}, and the table has one of that name; choose "
                    "others with --column (for answers) and --prefix (for error, finish_reason and tokens)"
                )

    def read(self, row: bytes) -> Answer:
        """The answer in a row of the journal."""
        fields = json.loads(row)
        response = fields["response"]
        body = response["body"] if response else {}
        if fields["error"] or response["status_code"] != 200:
            return Answer(error=_error_text(fields["error"] or body.get("error"), response))
        try:
            answer = self._embedding(body) if self._recipe.embed_column else self._text(body)
        except (LookupError, TypeError, AttributeError) as error:
            answer = Answer(error=f"unreadable_answer: the server's answer is of another form ({error!r})")
        self.num_unreadable += answer.error is not None
        return answer

    def types(self) -> list[Any]:
        """Fields of the columns. Of embeddings, the size is that of the first one that was read."""
        if self._fields is not None:
            answers = [pa.field(name, shape.type) for name, shape in self._fields.items()]
        else:
            answers = [pa.field(self._recipe.answer, self._answer_type())]
        return [*answers, *(pa.field(name, kind) for name, kind in zip(self._names, _TYPES.values(), strict=True))]

    def arrays(self, answers: Sequence[Answer]) -> list[Any]:
        """The columns of some rows."""
        _, *others = zip(*answers, strict=True) if answers else ((),) * 5
        values = [answer.value for answer in answers]
        return [
            *self._answer_arrays(values),
            *(pa.array(column, kind) for column, kind in zip(others, _TYPES.values(), strict=True)),
        ]

    @property
    def _size(self) -> int:
        """Numbers in a vector; one where no row has any, as Arrow has no lists of none."""
        return self._num_dimensions or 1

    def _answer_type(self) -> Any:
        if self._recipe.embed_column:
            return pa.list_(pa.float32(), self._size)
        return pa.string() if self._shape is None else self._shape.type

    def _answer_arrays(self, values: Sequence[Any]) -> list[Any]:
        if self._fields is not None:
            return [shape.build([value and value[name] for value in values]) for name, shape in self._fields.items()]
        if self._recipe.embed_column:
            return [self._vectors(values)]
        return [pa.array(values, pa.string()) if self._shape is None else self._shape.build(values)]

    def _vectors(self, values: Sequence[Any]) -> Any:
        size = self._size
        flat = np.concatenate([np.zeros(size, np.float32) if value is None else value for value in values] or [[]])
        mask = pa.array([value is None for value in values], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), size, mask=mask)

    def _text(self, body: Mapping[str, Any]) -> Answer:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        usage = body.get("usage") or {}
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        text = message.get("content")
        if message.get("refusal") and not text:
            return Answer(None, f"refusal: {message['refusal']}", reason, *tokens)
        if self._shape is None:
            calls = message.get("tool_calls")
            return Answer(json.dumps(calls) if text is None and calls else text, None, reason, *tokens)
        try:
            value = self._shape.check(json.loads(text or ""), "the answer")
        except (ValueError, RecursionError) as error:
            cut = "; it was cut off, raise max_tokens" if reason == "length" else ""
            return Answer(None, f"invalid_answer: {error}{cut}: {shown(text)}", reason, *tokens)
        return Answer(value, None, reason, *tokens)

    def _embedding(self, body: Mapping[str, Any]) -> Answer:
        given = body["data"][0]["embedding"]
        vector = (
            np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.asarray(given, np.float32)
        )
        if self._num_dimensions is None:
            self._num_dimensions = len(vector)
        num_tokens = (body.get("usage") or {}).get("prompt_tokens")
        if len(vector) != self._num_dimensions:
            sizes = f"the vector has {len(vector)} numbers, earlier ones have {self._num_dimensions}"
            return Answer(None, f"unreadable_answer: {sizes}", None, num_tokens)
        return Answer(vector, None, None, num_tokens)


def _error_text(error: Any, response: Any) -> str:
    """Code and message of an error row, as one text; the line number that it begins with is that of the row."""
    if not isinstance(error, dict):
        return f"http_{response['status_code']}: {shown(error)}"
    code = error.get("code") or f"http_{response['status_code']}" if response else error.get("code")
    message = str(error.get("message"))
    begin, separator, rest = message.partition(": ")
    is_numbered = separator and begin.startswith("line ") and begin[5:].isdigit()
    return f"{code}: {rest if is_numbered else message}"
