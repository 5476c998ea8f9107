"""What `map` and `map_file` may be told of the question and the answer, as one record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, get_type_hints

from blendserve.errors import ConfigError

if TYPE_CHECKING:
    from blendserve.tables.recipe import Recipe

Function = TypeVar("Function", bound=Callable[..., Any])


class Question(TypedDict, total=False):
    """Keyword arguments; the docstring of `map` says what each of them means."""

    prompt: str | None
    system: str | None
    messages: str | None
    prompt_column: str | None
    embed: str | None
    schema: Any
    unnest: bool
    examples: Iterable[Mapping[str, Any]]
    params: Mapping[str, Any] | None
    param_columns: Mapping[str, str] | None
    id: str | None
    fields: Iterable[str]
    reorder_fields: bool
    column: str
    prefix: str


DEFAULTS: Question = {
    "prompt": None,
    "system": None,
    "messages": None,
    "prompt_column": None,
    "embed": None,
    "schema": None,
    "unnest": False,
    "examples": (),
    "params": None,
    "param_columns": None,
    "id": None,
    "fields": (),
    "reorder_fields": False,
    "column": "answer",
    "prefix": "",
}


def asking(function: Function) -> Function:
    """Give a function that takes `**question` a signature that lists the fields, for `help` and for notebooks."""
    own = signature(function)
    parameters = [one for one in own.parameters.values() if one.kind != Parameter.VAR_KEYWORD]
    listed = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=hint)  # type: ignore[literal-required]
        for name, hint in get_type_hints(Question).items()
    ]
    function.__signature__ = own.replace(parameters=[*parameters, *listed])  # type: ignore[attr-defined]
    return function


def complete(given: Question) -> Question:
    """All fields. Raises: TypeError for a name that is none of them."""
    if unknown := sorted({*given} - {*DEFAULTS}):
        raise TypeError(f"there is no argument {unknown[0]!r}; the question is asked with {', '.join(DEFAULTS)}")
    return {**DEFAULTS, **given}


def recipe_of(question: Question) -> Recipe:
    """What a complete question asks about every row. Raises: ConfigError."""
    from blendserve.tables.recipe import Recipe

    return Recipe(
        prompt=question["prompt"],
        system=question["system"],
        messages_column=question["messages"],
        prompt_column=question["prompt_column"],
        embed_column=question["embed"],
        examples=tuple(question["examples"]),
        params=dict(question["params"] or {}),
        param_columns=dict(question["param_columns"] or {}),
        schema=schema_of_model(question["schema"]),
        id_column=question["id"],
        fields=tuple(question["fields"]),
        answer=question["column"],
    )


def schema_of_model(schema: Any) -> Mapping[str, Any] | None:
    """A JSON schema, or that of a Pydantic model. Raises: ConfigError for anything else."""
    if schema is None or isinstance(schema, Mapping):
        return schema
    if callable(make := getattr(schema, "model_json_schema", None)):
        found: Mapping[str, Any] = make()
        return found
    raise ConfigError(f"schema is a {type(schema).__name__}; it must be a JSON schema (a dict) or a Pydantic model")
