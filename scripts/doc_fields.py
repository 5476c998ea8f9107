"""Tables of docs/batch-files.md: what lines may hold on which engine, asked of the readers that runs use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from blendserve.dialect import extras, passthrough, schema
from blendserve.dialect.chat_options import CHAT_OPTION_FIELDS
from blendserve.dialect.extras import Abilities, native_abilities
from blendserve.dialect.readers import CHAT_READERS, COMPLETION_READERS
from blendserve.dialect.schema import ServedModel
from blendserve.dialect.unsupported import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, IGNORED_FIELDS
from blendserve.dialect.urls import CHAT_URL, COMPLETIONS_URL, EMBEDDINGS_URL, RESPONSES_URL
from blendserve.errors import RequestError
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.reasoning_formats import REASONING_FORMATS
from blendserve.models.tool_formats.hermes import HERMES

_ADAPTER = "my-adapter"
_CHAT_FORMATS = ChatFormats(tools=HERMES, reasoning=REASONING_FORMATS["think"], renders_tools=True, renders_calls=True)
"""Those of a model whose chat template takes tools, and which reasons."""
ENGINES = {
    "`native`": ServedModel(("my-model",), abilities=native_abilities(576, _CHAT_FORMATS)),
    "`vllm`": ServedModel(
        ("my-model",),
        abilities=Abilities(adapters=(_ADAPTER,), sees=True, chat=_CHAT_FORMATS),
    ),
    "`vllm --task embed`": ServedModel(("my-model",), abilities=Abilities(urls=(EMBEDDINGS_URL,))),
    "`http`": ServedModel(("the server's",), accepts_any_name=True, is_remote=True),
}
_USER = {"role": "user", "content": "Hello"}
_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
_SHORT = {
    str(-(2**63)): "-2^63",
    str(2**63 - 1): "2^63 - 1",
    str(2**31 - 1): "2^31 - 1",
}


class Ask(NamedTuple):
    """One thing that a line may ask for, and a body that asks for it."""

    what: str
    url: str
    body: Mapping[str, Any]


def _chat(what: str, message: Mapping[str, Any] = _USER, **fields: Any) -> Ask:
    return Ask(what, CHAT_URL, {"messages": [message], **fields})


def _complete(what: str, prompt: Any, **fields: Any) -> Ask:
    return Ask(what, COMPLETIONS_URL, {"prompt": prompt, **fields})


ASKS = (
    _chat("`messages` whose `content` is text, or a list of text parts"),
    _chat("roles `system`, `developer`, `user`, `assistant`", {"role": "developer", "content": "Be brief."}),
    _chat("role `tool`, with `tool_call_id`", {"role": "tool", "content": "4", "tool_call_id": "c"}),
    _chat("`tool_calls` of an assistant", {"role": "assistant", "content": None, "tool_calls": [_CALL]}),
    _chat("`name` in a message", {**_USER, "name": "Ann"}),
    _chat("`reasoning_content` or `reasoning` of an assistant", {**_USER, "role": "assistant", "reasoning": "so"}),
    _chat("pictures: parts of type `image_url`", {"role": "user", "content": [_PICTURE]}),
    _chat("sound, files: other parts", {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
    _chat("`tools`, `tool_choice` none or auto", tools=[_TOOL]),
    _chat("`tool_choice` required, or the name of a function", tools=[_TOOL], tool_choice="required"),
    _chat("`chat_template_kwargs`, `reasoning_effort`", chat_template_kwargs={"enable_thinking": False}),
    _chat("`continue_final_message`, `add_generation_prompt`", {"role": "assistant", "content": "It"}, **_CONTINUED),
    _chat("`response_format` of type `json_object` or `json_schema`", response_format=_SCHEMA),
    _chat("`structured_outputs` (vLLM's `json`, `regex`, `choice`, `grammar`)", structured_outputs={"regex": "a+"}),
    _chat("a LoRA adapter: `model` is a name of `--lora NAME=PATH`", model=_ADAPTER),
    _chat("several answers: `n` above 1", n=3),
    _chat("log probabilities: `logprobs`, `top_logprobs`", logprobs=True, top_logprobs=5),
    _complete("`prompt` as text", "Once"),
    _complete("`prompt` as token ids", [1, 2, 3]),
    _complete("`prompt` as a list of texts, or of lists of token ids", ["Once", "Twice"]),
    Ask("`input` of `/v1/embeddings`, in the same four forms", EMBEDDINGS_URL, {"input": ["Once", "Twice"]}),
    _complete(
        "`prompt_logprobs`; `echo` with `logprobs`; `max_tokens` of 0", "Once", echo=True, logprobs=1, max_tokens=0
    ),
    Ask("`/v1/responses` without state", RESPONSES_URL, {"input": "Hello"}),
    Ask("`/v1/responses` with `previous_response_id`", RESPONSES_URL, {"input": "Hello", "previous_response_id": "r"}),
    Ask("`/v1/moderations`, `/rerank`, `/score` and other endpoints", "/score", {"text_1": "a", "text_2": "b"}),
    Ask("`url` without `/v1`, with a host, or as Azure writes it", "/chat/completions", {"messages": [_USER]}),
    _chat("`stream` true", stream=True),
)


def asks_table() -> str:
    """Every kind of line on every engine: answered, or the code of its error row."""
    rows = [(ask.what, *(_verdict(ask, served) for served in ENGINES.values())) for ask in ASKS]
    return _table(("a line with", *ENGINES), rows)


class Compared(NamedTuple):
    """A kind of line, and what the documents of others say of it."""

    what: str
    ask: Ask
    openai: str
    vllm: str
    llm_d: str


_SENT = "sent on"
COMPARED = (
    Compared("`/v1/chat/completions`", _chat(""), "yes", "yes", _SENT),
    Compared("`/v1/completions`", _complete("", "Once"), "yes", "no", _SENT),
    Compared("`/v1/responses`", Ask("", RESPONSES_URL, {"input": "Hello"}), "yes", "no", _SENT),
    Compared("`/v1/embeddings`", Ask("", EMBEDDINGS_URL, {"input": "Hello"}), "yes", "yes", _SENT),
    Compared("`/v1/moderations`", Ask("", "/v1/moderations", {"input": "Hello"}), "yes", "no", _SENT),
    Compared("`/v1/images/generations`", Ask("", "/v1/images/generations", {"prompt": "A cat"}), "yes", "no", _SENT),
    Compared("`/score`", Ask("", "/score", {"text_1": "a", "text_2": "b"}), "no", "yes", _SENT),
    Compared("`/rerank`", Ask("", "/rerank", {"query": "q", "documents": ["d"]}), "no", "yes", _SENT),
    Compared(
        "`url` without `/v1`", Ask("", "/chat/completions", {"messages": [_USER]}), "Azure only", "no", "not said"
    ),
    Compared("`prompt_logprobs`", _chat("", prompt_logprobs=1), "no", "yes", _SENT),
    Compared("`response_format` with a schema", _chat("", response_format=_SCHEMA), "yes", "yes", _SENT),
    Compared("`structured_outputs`", _chat("", structured_outputs={"regex": "a+"}), "no", "yes", _SENT),
    Compared("`tools`", _chat("", tools=[_TOOL]), "yes", "with a parser named", _SENT),
    Compared("`tool_choice` required", _chat("", tools=[_TOOL], tool_choice="required"), "yes", "yes", _SENT),
    Compared("`reasoning_effort`", _chat("", reasoning_effort="low"), "yes", "yes", _SENT),
    Compared("`chat_template_kwargs`", _chat("", chat_template_kwargs={"enable_thinking": False}), "no", "yes", _SENT),
    Compared("`continue_final_message`", _chat("", continue_final_message=True), "no", "yes", _SENT),
    Compared(
        "`echo` with `logprobs` and `max_tokens` 0",
        _complete("", "Once", echo=True, logprobs=1, max_tokens=0),
        *("not said", "no", _SENT),
    ),
    Compared("`guided_json` and its like", _chat("", guided_json={"type": "object"}), "no", "ignored", _SENT),
    Compared("`stream` true", _chat("", stream=True), "no", "no", "not said"),
)


def comparison_table() -> str:
    """What lines others take, as they document it, beside what our readers take."""
    rows = [(line.what, line.openai, line.vllm, line.llm_d, _ours(line.ask)) for line in COMPARED]
    return _table(("a line with", "OpenAI", "`vllm run-batch`", "llm-d batch gateway", "BlendServe"), rows)


def _ours(ask: Ask) -> str:
    engines = [name for name in ("`native`", "`http`") if not _verdict(ask, ENGINES[name]).startswith("`")]
    return "yes" if "`native`" in engines else "with `--engine http`" if engines else "no"


PROBES: tuple[Any, ...] = (
    *(True, False, 1, 2, 0.5, -1, "x", "auto", "none", "low", 'root ::= "a"', ["x"], [1], [_TOOL], {"a": 1}, {"5": 1}),
    *({"type": "enabled"}, {"type": "json_object"}, _SCHEMA, {"regex": "a+"}, {"json": {"type": "object"}}),
)
"""Values of every kind: what a reader does with them tells what a field is to an engine."""
_ENDPOINTS = (
    ("chat", CHAT_URL, {"messages": [_USER], "logprobs": True}),
    ("completions", COMPLETIONS_URL, {"prompt": "Once"}),
)
_MATRIX_ENGINES = ("`native`", "`vllm`", "`http`")


def fields_table() -> str:
    """Every field of a body that has a name here, on every engine and endpoint."""
    names = sorted((schema._MISPLACED_FIELDS | IGNORED_FIELDS) - {"messages", "prompt", "model", "extra_body"})
    header = ("field", *(f"{engine}, {where}" for engine in _MATRIX_ENGINES[:-1] for where, *_ in _ENDPOINTS), "`http`")
    rows = []
    for name in names:
        cells = [
            _best(_outcome(name, ENGINES[engine], url, {**body, **more}) for more in ({}, {"tools": [_TOOL]}))
            for engine in _MATRIX_ENGINES
            for _, url, body in _ENDPOINTS
        ]
        rows.append((f"`{name}`", *cells[:-1]))  # a server gets chats and completions alike
    return _table(header, rows)


def _best(outcomes: Iterable[str]) -> str:
    """Some fields count only beside tools, others only without."""
    plain, beside_tools = outcomes
    return beside_tools if beside_tools == "yes" else plain


def _outcome(name: str, served: ServedModel, url: str, body: Mapping[str, Any]) -> str:
    """What becomes of a field, found with values of every kind."""
    plain = {key: value for key, value in body.items() if key != name}
    try:
        before = _parsed(served, url, plain)
    except RequestError as error:  # completions have no tools
        return f"`{error.code}`"
    codes: set[str] = set()
    has_no_effect = False
    for probe in PROBES:
        try:
            after = _parsed(served, url, {**plain, name: probe})
        except RequestError as error:
            codes.add(error.code)
            continue
        if after != before:
            return "sent" if served.is_remote else "yes"
        has_no_effect = True
    if "unsupported_parameter" in codes:
        return "neutral values only"
    if has_no_effect:
        return "ignored"
    return "`unknown_parameter`" if codes == {"unknown_parameter"} else f"`{min(codes)}`"


def _parsed(served: ServedModel, url: str, body: Mapping[str, Any]) -> object:
    parse = passthrough.parse_remote_line if served.is_remote else schema.parse_line
    return parse({"custom_id": "a", "method": "POST", "url": url, "body": dict(body)}, 1, served)


def parameters_table() -> str:
    """Parameters that shape the answer, with the values that they may have."""
    rows = []
    for name in _names(CHAT_READERS, COMPLETION_READERS):
        wanted: dict[str, list[str]] = {}
        for where, readers in (
            ("chat", CHAT_READERS),
            ("completions", COMPLETION_READERS),
        ):
            if name in readers:
                wanted.setdefault(_wanted(name, readers[name]), []).append(where)
        rows += [(f"`{name}`", _where(places), words) for words, places in wanted.items()]
    return _table(("parameter", "endpoint", "value"), rows)


def neutral_table() -> str:
    """Parameters that only their neutral value is accepted of."""
    chat, completions = CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED
    rows = []
    for name in _names(chat, completions):
        places = [where for where, of in (("chat", chat), ("completions", completions)) if name in of]
        rule = chat.get(name) or completions[name]
        values = " or ".join(f"`{json.dumps(value)}`" for value in rule.neutral) or "none"
        rows.append((f"`{name}`", _where(places), values, "; ".join(filter(None, (rule.why, rule.instead)))))
    return _table(("parameter", "endpoint", "accepted value besides `null`", "why no other"), rows)


def ignored_list() -> str:
    """Parameters of any value that change nothing."""
    return ", ".join(f"`{name}`" for name in sorted(IGNORED_FIELDS)) + "."


def chat_options_list() -> str:
    """Parameters of chat that shape the prompt, or how an answer is read."""
    return ", ".join(f"`{name}`" for name in CHAT_OPTION_FIELDS) + "."


def embeddings_list() -> str:
    """Parameters of /v1/embeddings."""
    return ", ".join(f"`{name}`" for name in extras._EMBEDDING_FIELDS) + "."


def _verdict(ask: Ask, served: ServedModel) -> str:
    line = {"custom_id": "a", "method": "POST", "url": ask.url, "body": dict(ask.body)}
    parse = passthrough.parse_remote_line if served.is_remote else schema.parse_line
    try:
        parse(line, 1, served)
    except RequestError as error:
        return f"`{error.code}`"
    return "sent" if served.is_remote else "yes"


def _wanted(name: str, read: Callable[[str, Any], Any]) -> str:
    """What a reader says that a value must be, gathered from what it says of wrong ones."""
    found: list[str] = []
    for probe in ({"x": 1} if name != "logit_bias" else 1, 10**30, 0, ["x"] * 1000):
        try:
            read(name, probe)
        except RequestError as error:
            words = error.message.rpartition("; ")[2].removeprefix("it must be ")
            if not found or (words not in found and words.startswith(("between", "above", "at most", "finite"))):
                found.append(words)
    text = " ".join(found[:1] + [words if words.startswith("between") else f", {words}" for words in found[1:]])
    for long, short in _SHORT.items():
        text = text.replace(long, short)
    return text.replace(" ,", ",")


def _names(*tables: Mapping[str, object]) -> Sequence[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def _where(places: Sequence[str]) -> str:
    return "both" if len(places) == 2 else places[0]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
