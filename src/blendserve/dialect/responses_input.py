"""A body of /v1/responses as the chat body that asks for the same: items become messages, settings get chat's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blendserve.dialect.values import reject, shown
from blendserve.errors import RequestError

SETTINGS = {
    "max_output_tokens": "max_completion_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_logprobs": "top_logprobs",
    "parallel_tool_calls": "parallel_tool_calls",
    "seed": "seed",
    "stop": "stop",
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "logit_bias": "logit_bias",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "chat_template_kwargs": "chat_template_kwargs",
    "structured_outputs": "structured_outputs",
}
"""Settings of a response, by chat's name of the same."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "stream": (False,),
    "background": (False,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "context_management": (),
}
"""What needs state or would change the answer unnoticed: taken only with these values, or null."""

_IGNORED = ("model", "store", "metadata", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
_IGNORED_TOO = ("service_tier", "priority", "stream_options")
_OWN = ("input", "instructions", "text", "tools", "tool_choice", "reasoning", "include")
FIELDS = (*_OWN, *SETTINGS, *NEUTRAL, *_IGNORED, *_IGNORED_TOO)
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text")

CHAT_NAMES = {
    **{chat: own for own, chat in SETTINGS.items()},
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}
"""What a parameter of the chat body is called in the body of the user."""


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: RequestError for what needs state, a hosted tool or a file, naming it."""
    _check_names(body)
    given = {chat: body[own] for own, chat in SETTINGS.items() if body.get(own) is not None}
    shaped = {
        "response_format": _response_format(body.get("text")),
        "tools": _tools(body.get("tools")),
        "tool_choice": _tool_choice(body.get("tool_choice")),
        "reasoning_effort": _effort(body.get("reasoning")),
        "logprobs": _wants_logprobs(body.get("include"), body.get("top_logprobs")) or None,
    }
    shaped = {name: value for name, value in shaped.items() if value is not None}
    return {**given, **shaped, "messages": _messages(body)}


def _check_names(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name not in FIELDS:
            raise RequestError(
                f"unknown parameter {shown(name)}: remove it, or correct its spelling",
                code="unknown_parameter",
                param=name[:100],
            )
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise _unsupported(name, value, "each line of a batch is answered on its own and as a whole; remove it")


def _unsupported(name: str, value: object, why: str) -> RequestError:
    return RequestError(
        f"{name} is {shown(value)}, which is not supported: {why}", code="unsupported_parameter", param=name
    )


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    instructions, given = body.get("instructions"), body.get("input")
    if instructions is not None and not isinstance(instructions, str):
        reject("instructions", instructions, "a string", code="invalid_type")
    if given is None:
        raise RequestError("input is missing", code="missing_required_parameter", param="input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        reject("input", given, "a string, or a list of at least one item", code="invalid_type")
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for index, item in enumerate(items):
        name = f"input[{index}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if not isinstance(kind, str) or not isinstance(item, dict):
            reject(name, item, "an object", code="invalid_type")
        if kind not in _ITEMS:
            raise _unsupported(f"{name}.type", kind, f"items may be of type {', '.join(_ITEMS)}")
        _ITEMS[kind](messages, name, item)
    return [message for message in messages if not _is_thought(message)]


def _add_message(messages: list[dict[str, Any]], name: str, item: Mapping[str, Any]) -> None:
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(f"{name}.content[{index}]", part) for index, part in enumerate(content)]
    if item.get("role") == "assistant" and messages and _is_thought(messages[-1]):
        messages[-1]["content"] = content
    else:
        messages.append({"role": item.get("role"), "content": content})


def _is_thought(message: Mapping[str, Any]) -> bool:
    """Reasoning that waits for what it led to."""
    return "reasoning_content" in message and message["content"] is None and "tool_calls" not in message


def _part(name: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS:
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    raise _unsupported(
        name, kind or part, f"parts may be of type {', '.join(_TEXT_PARTS)}, and files cannot be fetched"
    )


def _add_call(messages: list[dict[str, Any]], name: str, item: Mapping[str, Any]) -> None:
    """Calls that follow each other, or a text of the assistant, are one message."""
    call_id, function, arguments = (_text(name, item, field) for field in ("call_id", "name", "arguments"))
    call = {"id": call_id, "type": "function", "function": {"name": function, "arguments": arguments}}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _add_call_output(messages: list[dict[str, Any]], name: str, item: Mapping[str, Any]) -> None:
    output = item.get("output")
    if isinstance(output, list):
        output = [_part(f"{name}.output[{index}]", part) for index, part in enumerate(output)]
    messages.append({"role": "tool", "tool_call_id": _text(name, item, "call_id"), "content": output})


def _add_reasoning(messages: list[dict[str, Any]], name: str, item: Mapping[str, Any]) -> None:  # noqa: ARG001
    """Reasoning belongs to the message that follows it. What is encrypted or summed up cannot be read."""
    parts = item.get("content") or []
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    thought = "\n".join(text for text in texts if isinstance(text, str))
    if thought:
        messages.append({"role": "assistant", "content": None, "reasoning_content": thought})


_ITEMS: Mapping[str, Callable[[list[dict[str, Any]], str, Mapping[str, Any]], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_call_output,
    "reasoning": _add_reasoning,
}


def _text(name: str, item: Mapping[str, Any], field: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        reject(f"{name}.{field}", value, "a string", code="invalid_type")
    return value


def _response_format(text: Any) -> dict[str, Any] | None:
    if text is None:
        return None
    if not isinstance(text, dict):
        reject("text", text, "an object", code="invalid_type")
    if text.get("verbosity") not in (None, "medium"):
        raise _unsupported("text.verbosity", text["verbosity"], "only OpenAI's models follow it; remove it")
    shape = text.get("format")
    if shape is None:
        return None
    kind = shape.get("type") if isinstance(shape, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        reject("text.format", shape, "an object of type text, json_object or json_schema")
    if kind != "json_schema":
        return {"type": kind}
    return {"type": kind, "json_schema": {name: value for name, value in shape.items() if name != "type"}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    if not isinstance(tools, list):
        reject("tools", tools, "a list", code="invalid_type")
    found = []
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise _unsupported(f"tools[{index}]", kind or tool, "only functions can be called, which you run yourself")
        found.append({"type": kind, "function": {name: value for name, value in tool.items() if name != "type"}})
    return found


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict) or choice.get("type") == "allowed_tools":
        return choice
    if choice.get("type") != "function":
        raise _unsupported("tool_choice", choice, "it must be none, auto, required, or a function")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _effort(reasoning: Any) -> Any:
    if reasoning is None:
        return None
    if not isinstance(reasoning, dict):
        reject("reasoning", reasoning, "an object", code="invalid_type")
    return reasoning.get("effort")


def _wants_logprobs(include: Any, num_top: Any) -> bool:
    if include is None:
        return num_top is not None
    if not isinstance(include, list):
        reject("include", include, "a list", code="invalid_type")
    for name in include:
        if name != _LOGPROBS:
            raise _unsupported("include", name, f"only {_LOGPROBS} can be included")
    return bool(include) or num_top is not None
