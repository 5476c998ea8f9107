"""A user's prompt template over one row: Jinja in a sandbox, checked against the columns before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blendserve.dialect.values import shown
from blendserve.errors import ConfigError, RequestError

ROW, ROW_FIELDS = "row", "row_fields"
MAX_PROMPT_CHARACTERS = 1 << 25
"""Of one rendered prompt, so that a template that multiplies its text costs its row and not the memory."""

# What a template may run into on a row that it was not written for; anything else is our own bug.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class RowTemplate:
    """A template whose names are columns; `row` is the whole row, for columns whose names are no identifiers.

    `columns` are those that it reads, in the order of the table, `named` those that it names, in its own order.
    `{{ row_fields }}` lists the row as JSON: the columns
    that the template does not name, or those of `fields`, in the order that `order` gives.
    Raises: ConfigError when the template is not valid, or names a column that does not exist.
    """

    def __init__(self, source: str, what: str, names: Sequence[str], fields: Sequence[str] = ()) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=_printed, keep_trailing_newline=True
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals = {"range": self._environment.globals["range"]}
        try:
            tree = self._environment.parse(source)
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{what} is no valid template, line {error.lineno}: {error.message}") from error
        self.source = source
        used = _names_of(tree)
        self.lists_fields = ROW_FIELDS in used
        _check_known(used - {ROW_FIELDS, ROW, "range"}, names, what, f"{{{{ {ROW_FIELDS} }}}}")
        subscripts = _subscripts_of(tree)
        _check_known(subscripts or set(), names, what, f"{{{{ {ROW_FIELDS} }}}}")
        named = set(names) if ROW in used and subscripts is None else (used | (subscripts or set())) & set(names)
        self.fields = tuple(fields) or tuple(name for name in names if name not in named)
        if self.lists_fields:
            _check_known(set(self.fields), names, "the list of fields", f"{{{{ {ROW_FIELDS} }}}}")
            named |= set(self.fields)
        self.columns = tuple(name for name in names if name in named)
        in_order = [node.name for node in tree.find_all(jinja2.nodes.Name)]
        self.named = tuple(dict.fromkeys(name for name in in_order if name in names))

    def render(self, row: Mapping[str, Any], order: Sequence[str] | None = None) -> str:
        """The text for one row. Raises: RequestError when the row does not fit the template."""
        values = {**row, ROW: row}
        if self.lists_fields:
            values[ROW_FIELDS] = fields_text(row, self.fields if order is None else order)
        pieces, num_characters = [], 0
        try:
            for piece in self._template.generate(values):
                num_characters += len(piece)
                if num_characters > MAX_PROMPT_CHARACTERS:
                    raise ValueError(f"the prompt grows beyond {MAX_PROMPT_CHARACTERS} characters")
                pieces.append(piece)
        except _RENDER_ERRORS as error:
            raise RequestError(f"the prompt does not take this row: {error}", code="invalid_row") from error
        return "".join(pieces)


def fields_text(row: Mapping[str, Any], order: Sequence[str]) -> str:
    """Fields of a row as a prompt lists them: one JSON object, a field on each line."""
    inner = ",\n".join(f"{_to_json(name)}: {_to_json(row[name])}" for name in order)
    return "{" + inner + "}"


def _printed(value: Any) -> Any:
    """What stands in a prompt for a value; a null is an error, as a model would read "None"."""
    if value is None:
        raise ValueError("a value is null; say what to write instead: {{ column or '' }}")
    if isinstance(value, dict | list):
        return _to_json(value)
    if isinstance(value, bytes):
        raise ValueError("a value is binary, and a prompt is text")
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, default=str, indent=indent)


def _names_of(tree: jinja2.nodes.Template) -> set[str]:
    return set(jinja2.meta.find_undeclared_variables(tree))


def _subscripts_of(tree: jinja2.nodes.Template) -> set[str] | None:
    """Columns that the template takes out of `row`; None where it uses `row` in another way, so that any may be."""
    names, num_uses = set(), 0
    for attribute in tree.find_all(jinja2.nodes.Getattr):
        if _is_row(attribute.node):
            names.add(attribute.attr)
            num_uses += 1
    for item in tree.find_all(jinja2.nodes.Getitem):
        if _is_row(item.node):
            if not (isinstance(item.arg, jinja2.nodes.Const) and isinstance(item.arg.value, str)):
                return None
            names.add(item.arg.value)
            num_uses += 1
    num_names = sum(map(_is_row, tree.find_all(jinja2.nodes.Name)))
    return names if num_uses == num_names else None


def _is_row(node: jinja2.nodes.Node) -> bool:
    return isinstance(node, jinja2.nodes.Name) and node.name == ROW


def _check_known(used: set[str], names: Sequence[str], what: str, fields: str) -> None:
    unknown = sorted(used - set(names))
    if unknown:
        raise ConfigError(
            f"{what} uses {', '.join(map(shown, unknown))}, and the table has no such column; it has "
            f"{', '.join(names)} ({fields} lists them all)"
        )
