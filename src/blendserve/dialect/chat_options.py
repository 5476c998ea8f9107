"""What a chat body says beside its messages that shapes the prompt: tools, and what the chat template is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from blendserve.dialect.values import read_boolean, reject, shown
from blendserve.errors import RequestError

ToolMode = Literal["none", "auto", "required", "named"]

MAX_TOOLS = 512
MAX_NAME_CHARACTERS = 128
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_RESERVED_VARIABLES = frozenset(("messages", "tools", "chat_template", "tokenize", "return_dict"))
_FLAGS = ("add_generation_prompt", "continue_final_message")
_TOOL_WANTED = 'an object {"type": "function", "function": {"name": "...", "parameters": {...}}}'

CHAT_OPTION_FIELDS = (
    *("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt"),
    *("continue_final_message", "documents", "reasoning_effort", "thinking", "include_reasoning"),
)
"""Every name of a body that `take_chat_options` reads."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """`tools` are the functions that a model may call, in OpenAI's form; with mode "named" it must call `named`.
    `allowed` are the names of those that an answer may call, all where it is empty; the model reads of the others too.
    `variables` are what the chat template is told. `add_generation_prompt` is None where the body leaves it open.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    mode: ToolMode = "none"
    named: str | None = None
    allowed: frozenset[str] = frozenset()
    is_parallel: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    includes_reasoning: bool = True

    @property
    def callable_tools(self) -> tuple[Mapping[str, Any], ...]:
        """Those of the functions that an answer may call."""
        if self.mode == "named":
            return tuple(tool for tool in self.tools if tool["function"]["name"] == self.named)
        return tuple(tool for tool in self.tools if not self.allowed or tool["function"]["name"] in self.allowed)

    @property
    def is_strict(self) -> bool:
        """Must the arguments of every call follow their schema?"""
        return any(tool["function"].get("strict") is True for tool in self.callable_tools)


def take_chat_options(body: Mapping[str, Any]) -> tuple[dict[str, Any], ChatOptions]:
    """A body without its chat options, and those. Raises: RequestError for one that is not understood."""
    rest = {name: value for name, value in body.items() if name not in CHAT_OPTION_FIELDS}
    given = {name: body[name] for name in CHAT_OPTION_FIELDS if body.get(name) is not None}
    kwargs = given.get("chat_template_kwargs")
    if isinstance(kwargs, Mapping):  # vLLM takes these two there as well
        given = {name: kwargs[name] for name in _FLAGS if kwargs.get(name) is not None} | given
    if not given:
        return rest, _NO_OPTIONS
    tools = read_tools("tools", given.get("tools", ()))
    choice, allowed = given.get("tool_choice"), frozenset[str]()
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        choice, allowed = _read_allowed("tool_choice.allowed_tools", choice.get("allowed_tools", choice), tools)
    mode, named = read_tool_choice("tool_choice", choice, tools)
    continues = _flag(given, "continue_final_message", False)
    adds = _flag(given, "add_generation_prompt", None)
    if continues and adds:
        raise RequestError(
            "continue_final_message and add_generation_prompt are both true; an answer either goes on with the last "
            "message or begins a new one: give one of them",
            code="invalid_value",
            param="continue_final_message",
        )
    return rest, ChatOptions(
        tools=tools,
        mode=mode,
        named=named,
        allowed=allowed,
        is_parallel=_flag(given, "parallel_tool_calls", True),
        variables=_read_variables(given),
        add_generation_prompt=adds,
        continue_final_message=continues,
        includes_reasoning=_flag(given, "include_reasoning", True),
    )


_NO_OPTIONS = ChatOptions()


def _flag(given: Mapping[str, Any], name: str, default: Any) -> Any:
    return read_boolean(name, given[name]) if name in given else default


def read_tools(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Functions in OpenAI's form, each name once. Raises: RequestError."""
    if not isinstance(value, list | tuple):
        reject(name, value, "a list of functions", code="invalid_type")
    if len(value) > MAX_TOOLS:
        raise RequestError(f"{name} has {len(value)} functions; at most {MAX_TOOLS}", code="invalid_value", param=name)
    tools = tuple(_read_tool(f"{name}[{index}]", tool) for index, tool in enumerate(value))
    names = [tool["function"]["name"] for tool in tools]
    if len({*names}) < len(names):
        twice = next(one for one in names if names.count(one) > 1)
        raise RequestError(
            f"{name} has two functions named {shown(twice)}; give each its own name", code="invalid_value", param=name
        )
    return tools


def _read_tool(name: str, tool: Any) -> Mapping[str, Any]:
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    if kind is not None and kind != "function":
        raise RequestError(
            f"{name} is of type {shown(kind)}; only functions can be called here",
            code="unsupported_parameter",
            param=name,
        )
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        reject(name, tool, _TOOL_WANTED, code="invalid_type")
    called = function.get("name")
    if not isinstance(called, str) or not 0 < len(called) <= MAX_NAME_CHARACTERS or not called.isprintable():
        reject(f"{name}.function.name", called, f"a name of 1 to {MAX_NAME_CHARACTERS} characters")
    for key, kinds, wanted in (
        ("description", str, "a text"),
        ("parameters", Mapping, "a JSON schema, which is an object"),
        ("strict", bool, "true or false"),
    ):
        if not isinstance(function.get(key), kinds | None):
            reject(f"{name}.function.{key}", function[key], wanted, code="invalid_type")
    kind = (function.get("parameters") or {}).get("type", "object")
    if kind != "object":
        reject(f"{name}.function.parameters.type", kind, 'absent or "object": arguments are one object')
    return {**tool, "type": "function", "function": {key: part for key, part in function.items() if part is not None}}


def read_tool_choice(name: str, value: Any, tools: tuple[Mapping[str, Any], ...]) -> tuple[ToolMode, str | None]:
    """Which calls are allowed or wanted, and the function that is asked for by name. Raises: RequestError."""
    if value in (None, "auto", "none"):
        return ("auto" if tools and value != "none" else "none"), None
    names = [tool["function"]["name"] for tool in tools]
    if value == "required":
        if not tools:
            raise RequestError(
                f'{name} is "required", but there are no tools; give tools', code="invalid_value", param=name
            )
        return "required", None
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    named = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(named, str):
        reject(name, value, 'none, auto, required, or {"type": "function", "function": {"name": "..."}}')
    if named not in names:
        reject(f"{name}.function.name", named, f"one of the tools: {', '.join(names)}" if names else "among the tools")
    return "named", named


def _read_allowed(name: str, value: Any, tools: tuple[Mapping[str, Any], ...]) -> tuple[Any, frozenset[str]]:
    """OpenAI's choice among some of the tools: auto or required, and the names of these. Raises: RequestError."""
    mode = value.get("mode") if isinstance(value, Mapping) else None
    listed = value.get("tools") if isinstance(value, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        reject(name, value, 'an object {"mode": "auto" or "required", "tools": [...]}')
    names = [tool["function"]["name"] for tool in tools]
    allowed: set[str] = set()
    for index, tool in enumerate(listed):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        called = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(called, str) or called not in names:
            wanted = f"one of the tools: {', '.join(names)}" if names else "among the tools"
            reject(f"{name}.tools[{index}].name", called, wanted)
        allowed.add(called)
    return mode, frozenset(allowed)


def _read_variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is told, the body's own names first."""
    variables: dict[str, Any] = {}
    effort = given.get("reasoning_effort")
    if effort is not None:
        if effort not in EFFORTS:
            reject("reasoning_effort", effort, f"one of {', '.join(EFFORTS)}")
        variables |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    if (thinking := given.get("thinking")) is not None:
        variables |= _read_thinking(thinking)
    if (documents := given.get("documents")) is not None:
        if not isinstance(documents, list) or not all(isinstance(document, Mapping) for document in documents):
            reject("documents", documents, "a list of objects", code="invalid_type")
        variables["documents"] = documents
    return variables | read_template_kwargs("chat_template_kwargs", given.get("chat_template_kwargs", {}))


def _read_thinking(value: Any) -> dict[str, bool]:
    """DeepSeek's and GLM's switch, under the names that templates have for it."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("enabled", "disabled"):
        reject("thinking", value, 'an object {"type": "enabled"} or {"type": "disabled"}')
    return {"enable_thinking": kind == "enabled", "thinking": kind == "enabled"}


def read_template_kwargs(name: str, value: Any) -> dict[str, Any]:
    """Variables of a chat template. Raises: RequestError for one that others set."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        reject(name, value, "an object of variables of the chat template", code="invalid_type")
    for key in value:
        if key in _RESERVED_VARIABLES:
            raise RequestError(
                f"{name} sets {key}, which the template gets from elsewhere; remove it",
                code="invalid_value",
                param=f"{name}.{key}",
            )
    return {key: part for key, part in value.items() if key not in _FLAGS}
