"""Chat templates as Hugging Face models carry them: Jinja in a sandbox, with the few names they rely on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blendserve.errors import ConfigError, RequestError

FIXED_DATE = datetime.date(2024, 7, 26)
"""What templates get as today: answers must not depend on the day of the run. Llama 3.1 falls back to the same date."""

# What a template may run into on messages that it was not written for; anything else is our own bug.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is all that matters."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Turns messages into the text that the model was trained on. `special_tokens` are names such as `bos_token`.

    Raises: ConfigError when the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], date: datetime.date = FIXED_DATE) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = date.strftime
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the model's chat template is not valid, line {error.lineno}: {error.message}"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation. Raises: RequestError when the template refuses the messages."""
        values = {"messages": list(messages), "tools": None, "documents": None, **self._special_tokens}
        try:
            return self._template.render(values, add_generation_prompt=add_generation_prompt)
        except _RENDER_ERRORS as error:
            raise RequestError(
                f"the model's chat template does not take these messages: {error}",
                code="invalid_value",
                param="messages",
            ) from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, no HTML escapes: the text goes to a model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
