"""The chat templates that lie beside a tokenizer, by name. Which file counts is as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blendserve.errors import ConfigError
from blendserve.models.spec import brief
from blendserve.models.tokenizer import read_json

_DEFAULT, _TOOL_USE = "default", "tool_use"


class TemplateSources(NamedTuple):
    """`tools` is the template of conversations with tools, None where they have none of their own."""

    default: str | None = None
    tools: str | None = None


def read_template_file(path: Path) -> str:
    """Raises: ConfigError where it cannot be read, or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8 text; convert it to UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def template_sources(directory: Path, config: Mapping[str, Any]) -> TemplateSources:
    """The templates of a model directory whose tokenizer_config.json holds `config`.

    Raises: ConfigError where there are several and none is the default one, or one is no text.
    """
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        more = directory / "additional_chat_templates" / f"{_TOOL_USE}.jinja"
        return TemplateSources(read_template_file(jinja), read_template_file(more) if more.is_file() else None)
    template = config.get("chat_template") or read_json(directory / "chat_template.json").get("chat_template")
    return sources_of(template, str(directory))


def sources_of(template: Any, where: str) -> TemplateSources:
    """One template, or several by name. Raises: ConfigError."""
    if isinstance(template, list):
        if not all(isinstance(entry, Mapping) and isinstance(entry.get("name"), str) for entry in template):
            raise ConfigError(
                f"the chat template in {where} is {brief(template)}; it must be a text, or a list of templates that "
                "each have a name"
            )
        template = {entry["name"]: entry.get("template") for entry in template}
    if not isinstance(template, Mapping):
        return TemplateSources(_text(template, where))
    if _DEFAULT not in template:
        raise ConfigError(
            f"{where} has several chat templates, {brief(sorted(map(str, template)))}, and none is named default; name "
            "one so in tokenizer_config.json, or give a template with --chat-template"
        )
    return TemplateSources(_text(template[_DEFAULT], where), _text(template.get(_TOOL_USE), where))


def _text(template: Any, where: str) -> str | None:
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"the chat template in {where} is {brief(template)}; it must be a text")
    return template
