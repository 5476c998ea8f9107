"""How a row becomes a request: a frozen value of what the user asked for, and the function that it stands for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blendserve.dialect.urls import CHAT_URL, EMBEDDINGS_URL
from blendserve.dialect.values import shown
from blendserve.errors import ConfigError, RequestError
from blendserve.tables.template import RowTemplate

_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a job asks about every row: exactly one of `prompt`, `messages_column`, `prompt_column` and `embed_column`.

    - `prompt`, `system`: Jinja templates over the row, for the user's and the system's message.
    - `messages_column`: a column of whole conversations. `prompt_column`: one of finished prompts.
    - `embed_column`: a column of texts whose embeddings are wanted.
    - `examples`: answered rows that stand before the question; they have the columns of the templates, and `answer`.
    - `params`, `param_columns`: parameters of the request by name: values, and columns with a value for each row.
    - `schema`: the JSON schema that answers have to follow.
    - `id_column`: names rows in messages, and seeds what is sampled; None: file and place do.
    - `fields`: the columns that `{{ row_fields }}` lists (default: those that the templates do not name).

    Raises: ConfigError when it is not one question.
    """

    prompt: str | None = None
    system: str | None = None
    messages_column: str | None = None
    prompt_column: str | None = None
    embed_column: str | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    param_columns: Mapping[str, str] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = None
    id_column: str | None = None
    fields: tuple[str, ...] = ()
    answer: str = "answer"

    def __post_init__(self) -> None:
        ways = {
            "--prompt": self.prompt,
            "--messages": self.messages_column,
            "--prompt-column": self.prompt_column,
            "--embed": self.embed_column,
        }
        given = [option for option, value in ways.items() if value is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ConfigError(f"a row is asked one question: give one of {', '.join(ways)}; {found}")
        if self.examples and self.messages_column:
            raise ConfigError("--examples and --messages do not work together: put the examples into the conversations")
        if self.embed_column and (self.system or self.examples or self.schema):
            raise ConfigError("--embed takes texts as they are: leave --system, --examples and --schema out")
        if self.messages_column and self.system:
            raise ConfigError("--messages holds whole conversations: put the system message into them, not --system")
        if twice := sorted({*self.params} & {*self.param_columns}):
            raise ConfigError(f"{twice[0]} is given as a value and as a column; give one of them")
        if self.params.get("n", 1) != 1 or "n" in self.param_columns:
            raise ConfigError("a row has one answer: leave n out, or repeat the row")

    def settings(self) -> dict[str, Any]:
        """All that answers depend on beside the rows and the model, by the name of its option; JSON values."""
        listed = {
            "--prompt": _digest(self.prompt),
            "--system": _digest(self.system),
            "--messages": self.messages_column,
            "--prompt-column": self.prompt_column,
            "--embed": self.embed_column,
            "--examples": _digest(list(self.examples)) if self.examples else None,
            "--param": _digest(dict(sorted(self.params.items()))) if self.params else None,
            "--param-column": _digest(dict(sorted(self.param_columns.items()))) if self.param_columns else None,
            "--schema": _digest(self.schema),
            "--id": self.id_column,
            "--fields": list(self.fields) or None,
        }
        return {name: value for name, value in listed.items() if value is not None}


class RowRequests:
    """A recipe for the columns of one table: row -> body of a request.

    `columns` are those that it reads, `fields` those that `{{ row_fields }}` lists, `named` those that the prompt
    names in its own order, `fixed` what all bodies hold. Raises: ConfigError when a column does not exist.
    """

    def __init__(self, recipe: Recipe, names: Sequence[str]) -> None:
        self.recipe = recipe
        self.url = EMBEDDINGS_URL if recipe.embed_column else CHAT_URL
        self._system = None if recipe.system is None else RowTemplate(recipe.system, "--system", names, recipe.fields)
        self._prompt = None if recipe.prompt is None else RowTemplate(recipe.prompt, "--prompt", names, recipe.fields)
        templates = [template for template in (self._system, self._prompt) if template is not None]
        named = {
            "--messages": recipe.messages_column,
            "--prompt-column": recipe.prompt_column,
            "--embed": recipe.embed_column,
            "--id": recipe.id_column,
            **{f"--param-column {name}": column for name, column in recipe.param_columns.items()},
        }
        for option, column in named.items():
            if column is not None and column not in names:
                raise ConfigError(
                    f"{option} names the column {shown(column)}, and the table has {', '.join(names)}; correct the name"
                )
        used = {*(column for column in named.values() if column), *(c for one in templates for c in one.columns)}
        self.columns = tuple(name for name in names if name in used)
        listing = next((template for template in templates if template.lists_fields), None)
        self.fields: tuple[str, ...] = () if listing is None else listing.fields
        self.named: tuple[str, ...] = () if self._prompt is None else self._prompt.named
        self._examples = [message for example in recipe.examples for message in self._example(example, names)]
        self.fixed: dict[str, Any] = {**recipe.params}
        if recipe.schema is not None:
            named_schema = {"name": "answer", "schema": recipe.schema, "strict": True}
            self.fixed["response_format"] = {"type": "json_schema", "json_schema": named_schema}

    def body(self, row: Mapping[str, Any], order: Sequence[str] | None = None) -> dict[str, Any]:
        """The body of the request for one row. `order`: of the fields that the prompt lists.

        Raises: RequestError when the row does not fit.
        """
        recipe = self.recipe
        given = {name: _plain(row[column]) for name, column in recipe.param_columns.items()}
        params = {**self.fixed, **{name: value for name, value in given.items() if value is not None}}
        if recipe.embed_column is not None:
            return {"input": _text(row, recipe.embed_column), "encoding_format": "base64", **params}
        return {"messages": self._messages(row, order), **params}

    def _messages(self, row: Mapping[str, Any], order: Sequence[str] | None) -> Any:
        recipe = self.recipe
        if recipe.messages_column is not None:
            return _conversation(row[recipe.messages_column], recipe.messages_column)
        system = [] if self._system is None else [{"role": "system", "content": self._system.render(row, order)}]
        return [*system, *self._examples, {"role": "user", "content": self._question(row, order)}]

    def _question(self, row: Mapping[str, Any], order: Sequence[str] | None = None) -> str:
        if self._prompt is None:
            assert self.recipe.prompt_column is not None, "a recipe is one question"
            return _text(row, self.recipe.prompt_column)
        return self._prompt.render(row, order)

    def _example(self, example: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, str]]:
        answer = example.get(self.recipe.answer)
        if answer is None:
            raise ConfigError(
                f"an example of --examples has no {self.recipe.answer}: it needs the columns of the prompt, and its "
                f"answer in {self.recipe.answer}; it has {', '.join(example)}"
            )
        try:
            question = self._question({**dict.fromkeys(names), **example})
        except RequestError as error:
            raise ConfigError(f"an example of --examples does not fit: {error}") from error
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": text}]


def _digest(value: Any) -> str | None:
    """A value as messages about another job show it: its beginning, and a hash that tells the rest."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    begin = " ".join(text[:_SHOWN_CHARACTERS].split())
    return f"{begin}{'...' if len(text) > _SHOWN_CHARACTERS else ''} ({key})"


def _plain(value: Any) -> Any:
    """A value of a column as JSON has it: whole numbers that a column of fractions holds become whole again."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str):  # a column of text, as CSV has them all
        try:
            return json.loads(value) if value else None
        except ValueError:
            return value
    return value


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value:
        raise RequestError(f"{column} is {shown(value)}; it must be a text", code="invalid_row", param=column)
    return value


def _conversation(value: Any, column: str) -> Any:
    """Messages as a column has them: a list of structures, or its JSON text. Fields that are null are left out, as a
    structure has all fields of all rows."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RequestError(f"{column} is no JSON: {error}", code="invalid_row", param=column) from error
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
