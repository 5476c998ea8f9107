"""Which form of content a chat template takes: texts, or lists of parts.

Source: vLLM's detection, which looks for a loop over the content of a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from jinja2 import nodes

from blendserve.models.conversation import Message, text_of_content

ContentForm = Literal["text", "parts"]


def content_form(template: nodes.Template) -> ContentForm:
    """The form that a parsed template iterates over, or else text."""
    messages = _names_of(template, "messages", None)
    loops = [*template.find_all(nodes.For)]
    items = {
        loop.target.name
        for loop in loops
        if isinstance(loop.target, nodes.Name) and any(_reads(loop.iter, name, None) for name in messages)
    }
    for item in sorted(items):
        contents = _names_of(template, item, "content")
        if any(_reads(loop.iter, item, "content") or _reads_any(loop.iter, contents) for loop in loops):
            return "parts"
    return "text"


def other_form(form: ContentForm) -> ContentForm:
    return "text" if form == "parts" else "parts"


def in_form(message: Message, form: ContentForm) -> dict[str, Any]:
    """A message with its content as text or as parts."""
    text = text_of_content(message["content"])
    if form == "text":
        return {**message, "content": text}
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content or ()]
    return {**message, "content": parts}


def _names_of(template: nodes.Template, name: str, key: str | None) -> list[str]:
    """The variables that hold `name` (with a key: that part of it) or a piece of it, `name` itself included."""
    found = [name] if key is None else []
    assignments = [*template.find_all(nodes.Assign)]
    found += _targets(assignments, name, key)
    for known in found:  # grows while it is walked
        found += [target for target in _targets(assignments, known, None) if target not in found]
    return found


def _targets(assignments: list[nodes.Assign], name: str, key: str | None) -> Iterator[str]:
    for assignment in assignments:
        if isinstance(assignment.target, nodes.Name) and _reads(assignment.node, name, key):
            yield assignment.target.name


def _reads_any(node: nodes.Node, names: list[str]) -> bool:
    return any(_reads(node, name, None) for name in names)


def _reads(node: nodes.Node, name: str, key: str | None) -> bool:
    """Is this `name` (or `name[key]`), filtered, tested or sliced?"""
    if isinstance(node, nodes.Filter | nodes.Test):
        return node.node is not None and _reads(node.node, name, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _reads(node.node, name, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.name == name
    if isinstance(node, nodes.Getitem):
        is_key = isinstance(node.arg, nodes.Const) and node.arg.value == key
        return is_key and _reads(node.node, name, None)
    return isinstance(node, nodes.Getattr) and node.attr == key and _reads(node.node, name, None)


def with_text_arguments(message: Mapping[str, Any], dump: Any) -> dict[str, Any]:
    """A message whose calls hold their arguments as JSON text, as some templates want them."""
    calls = [
        {**call, "function": {**call["function"], "arguments": dump(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}
