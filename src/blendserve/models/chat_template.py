"""Chat templates as Hugging Face models carry them: Jinja in a sandbox, with the few names they rely on.

A template gets content in the form that it takes (`template_content`), the role `developer` only where it knows it, and
is found out where the words of the user never reach the prompt.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blendserve.errors import ConfigError, RequestError
from blendserve.models.conversation import Conversation, Message, reads_variable, text_of_content
from blendserve.models.template_content import ContentForm, content_form, in_form, other_form, with_text_arguments

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
_END_MARK = "\ue0f8END\ue0f9"
"""Put behind the last message that an answer is to continue, to see where it ends in the prompt."""
_OTHER_WORDS = " other words"


class _RaisedError(jinja2.TemplateError):
    """What the template says itself, by `raise_exception`."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is all that matters."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Turns messages into the text that the model was trained on. `special_tokens` are names such as `bos_token`;
    `date` is what `strftime_now` tells.

    Raises: ConfigError when the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], date: datetime.date) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = date.strftime
        self._special_tokens = dict(special_tokens)
        try:
            self._form = content_form(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the model's chat template is not valid, line {error.lineno}: {error.message}"
            ) from error
        self._knows_developer = any(name in source for name in ("'developer'", '"developer"'))
        self._knows_thinking = reads_variable(source, "thinking")

    def render(self, conversation: Conversation) -> str:
        """The prompt of a conversation. Raises: RequestError when the template refuses the messages, or leaves out
        all that the user says.
        """
        text = self._render(conversation)
        if text is None:
            raise _refused(
                "no text of the user reaches the prompt; give content in another form (text, or text parts), or "
                "another template (--chat-template)"
            )
        return text

    def _render(self, conversation: Conversation) -> str | None:
        """In the form that the template seems to take, else in the other one; None where neither shows the user."""
        first_error: RequestError | None = None
        for form in (self._form, other_form(self._form)):
            try:
                text = self._render_in(conversation, form)
                if self._shows_user(conversation, form, text):
                    return text
            except _RaisedError as error:
                raise first_error or _refused(str(error)) from error
            except _RENDER_ERRORS as error:
                first_error = first_error or _refused(str(error))
        if first_error is not None:
            raise first_error
        return None

    def _render_in(self, conversation: Conversation, form: ContentForm) -> str:
        """With the arguments of calls as objects, or as JSON text where the template joins them to texts."""
        messages = [self._shaped(in_form(message, form)) for message in conversation.messages]
        try:
            return self._finish(conversation, messages, form)
        except TypeError:
            if not any(message.get("tool_calls") for message in messages):
                raise
        return self._finish(conversation, [with_text_arguments(message, _to_json) for message in messages], form)

    def _finish(self, conversation: Conversation, messages: list[dict[str, Any]], form: ContentForm) -> str:
        if not conversation.continue_final_message:
            return self._call(conversation, messages)
        *others, last = messages
        marked = text_of_content(last["content"]) + _END_MARK
        text = self._call(conversation, [*others, in_form({**last, "content": marked}, form)])
        end = text.rfind(_END_MARK)
        if end < 0:
            raise _RaisedError("continue_final_message: the template changes or leaves out the last message")
        return text[:end]

    def _call(self, conversation: Conversation, messages: list[dict[str, Any]]) -> str:
        values: dict[str, Any] = {"documents": None, **self._special_tokens, **conversation.variables}
        values["messages"] = messages
        values["tools"] = [*conversation.tools] or None
        is_continued = conversation.continue_final_message
        return self._template.render(
            values, add_generation_prompt=conversation.add_generation_prompt and not is_continued
        )

    def _shaped(self, message: Message) -> dict[str, Any]:
        shaped = {name: value for name, value in message.items() if name != "pictures"}
        if shaped["role"] == "developer" and not self._knows_developer:
            shaped["role"] = "system"
        if "reasoning_content" in shaped:
            shaped["reasoning"] = shaped["reasoning_content"]
            if self._knows_thinking:
                shaped["thinking"] = shaped["reasoning_content"]
        return shaped

    def _shows_user(self, conversation: Conversation, form: ContentForm, text: str) -> bool:
        """Is anything of what the user says in the prompt, or does the prompt at least depend on it?"""
        said = [text_of_content(m["content"]).strip() for m in conversation.messages if m["role"] == "user"]
        said = [words for words in said if words]
        if not said or any(words in text for words in said):
            return True
        try:
            return self._render_in(_mapped_user(conversation, lambda words: words + _OTHER_WORDS), form) != text
        except _RENDER_ERRORS:
            return True


def _mapped_user(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    messages = tuple(
        {**message, "content": change(text_of_content(message["content"]))} if message["role"] == "user" else message
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)


def _refused(reason: str) -> RequestError:
    return RequestError(
        f"the model's chat template does not take these messages: {reason}", code="invalid_value", param="messages"
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, no HTML escapes: the text goes to a model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
