"""What a user may decide about how a model chats: its template, what templates are told, formats of answers."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from blendserve.errors import ConfigError
from blendserve.models.chat_formats import AUTO, ChatFormats
from blendserve.models.template_files import read_template_file
from blendserve.models.tokenizer import Tokenizer

ControlTokens = Literal["text", "obey"]
CONTROL_TOKENS: tuple[ControlTokens, ...] = get_args(ControlTokens)
_RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt")


class TodaysDate(str):
    """A date that nobody has given: a job that goes on keeps the one that it began with."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How conversations become prompts, and how answers are read. Answers depend on all of these.

    - `chat_template`: a file with a Jinja template, used instead of the model's own. None: the model's own.
    - `chat_template_kwargs`: variables for the template of every line, such as `{"enable_thinking": False}`. A line's
      own come first (default: none).
    - `template_date`: what templates get as today, such as "2026-11-29". None: the day on which the job begins.
    - `tool_format`: how the model writes calls of functions: "auto", as its template shows (default); "none"; or a name
      of `TOOL_FORMAT_NAMES`.
    - `reasoning_format`: how the model marks its reasoning: "auto" (default), "none", or a name of
      `REASONING_FORMAT_NAMES`.
    - `control_tokens`: what control tokens, such as <|im_end|>, are in the texts of users and tools: "text" (default),
      or "obey", which lets them end a message or begin another, as in vLLM.

    Raises: ConfigError for a value that cannot work.
    """

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_date: str | None = None
    tool_format: str = AUTO
    reasoning_format: str = AUTO
    control_tokens: ControlTokens = "text"

    def __post_init__(self) -> None:
        if self.control_tokens not in CONTROL_TOKENS:
            raise ConfigError(f"control_tokens is {self.control_tokens!r}; it must be {' or '.join(CONTROL_TOKENS)}")
        for name in _RESERVED_VARIABLES:
            if name in self.chat_template_kwargs:
                raise ConfigError(f"chat_template_kwargs sets {name}, which lines set; leave it out")
        self.date()

    @property
    def obeys_control_tokens(self) -> bool:
        return self.control_tokens == "obey"

    def date(self) -> datetime.date:
        """What templates get as today. Raises: ConfigError where it is no date."""
        if self.template_date is None:
            return datetime.date.today()
        try:
            return datetime.date.fromisoformat(self.template_date)
        except (TypeError, ValueError):
            raise ConfigError(
                f"template_date is {self.template_date!r}; it must be a date such as 2026-11-29"
            ) from None

    def applied(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the template and the date that are wanted. Raises: ConfigError."""
        if self.chat_template is None:
            return replace(tokenizer, template_date=self.date())
        source = read_template_file(Path(self.chat_template))
        return replace(tokenizer, chat_template_source=source, tool_template_source=None, template_date=self.date())

    def formats(self, tokenizer: Tokenizer) -> ChatFormats:
        """How a model with this (applied) tokenizer chats. Raises: ConfigError for an unknown format."""
        return ChatFormats.of(tokenizer, self.tool_format, self.reasoning_format, self.chat_template_kwargs)

    def identity(self) -> dict[str, Any]:
        """What answers depend on beside the model's files, for a job's settings."""
        template = None
        if self.chat_template is not None:
            template = hashlib.sha256(read_template_file(Path(self.chat_template)).encode()).hexdigest()[:16]
        given = {
            "chat_template": template,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "tool_format": self.tool_format,
            "reasoning_format": self.reasoning_format,
            "control_tokens": self.control_tokens,
        }
        return given | {"template_date": self.template_date or TodaysDate(self.date().isoformat())}


DEFAULT_CHAT = ChatSettings()
