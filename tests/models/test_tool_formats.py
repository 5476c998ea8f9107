"""Formats of tool calls: what is written is read again, whatever is read never raises, and grammars give only calls."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_files import byte_level_tokenizer

from blendserve.engine.grammar import GrammarCompiler
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.reasoning_formats import REASONING_FORMATS
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tool_formats.format import ParsedAnswer, Tool, ToolCall, Wanted, to_json
from blendserve.models.tool_formats.harmony import answered
from blendserve.models.tool_formats.lark import schema_of
from blendserve.models.tool_formats.table import TOOL_FORMATS
from blendserve.models.tool_formats.written import tools_text
from blendserve.request import StructuredOutputs

FORMATS = sorted(TOOL_FORMATS)
WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["city"],
    },
)
TOOLS = (WEATHER, Tool("now"))
BY_NAME = {tool.name: tool for tool in TOOLS}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PIECES = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<function=f>",
            "</function>",
            "<parameter=a>",
            "</parameter>",
            "\n",
            " ",
            ";",
        ),
        *("[TOOL_CALLS]", "[ARGS]", "[", "]", "{", "}", '{"name": "f", "arguments": {"a": 1}}', '"name"', "NaN", ":"),
        *(
            "<|channel|>",
            "analysis",
            "commentary to=functions.f ",
            "final",
            "<|message|>",
            "<|end|>",
            "<|start|>assistant",
        ),
        *(
            "<think>",
            "</think>",
            "[THINK]",
            "hello",
            "🙂",
            "\ud800",
            '{"name": "f", "parameters": {}}',
            "<|python_tag|>",
        ),
        *("[" * 3000, '{"a":' * 2000, "9" * 5000),
    ]
)


def parsed(name: str, text: str, tools: Sequence[Tool] = TOOLS) -> ParsedAnswer:
    return TOOL_FORMATS[name].parse(text, tools)


@pytest.mark.parametrize("name", FORMATS)
@given(pieces=st.lists(PIECES | st.text(max_size=6), max_size=12))
@settings(max_examples=150, deadline=None)
def test_reading_never_raises_and_calls_hold_objects(name: str, pieces: list[str]) -> None:
    found = parsed(name, "".join(pieces), ())
    for call in found.calls:
        assert call.name
        assert isinstance(json.loads(call.arguments), dict)
    if not found.calls and not found.reasoning and name != "harmony":
        assert found.content == "".join(pieces)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"qwen3_coder"}))
@given(arguments=st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=4), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_calls_that_are_written_are_read_again(name: str, arguments: list[dict[str, Any]]) -> None:
    calls = tuple(ToolCall("now", to_json(given)) for given in arguments)
    texts = [to_json(given) for given in arguments]
    if name == "harmony" and any("<|" in text for text in texts):
        return  # the marks of messages: no text can hold them
    assert parsed(name, TOOL_FORMATS[name].write_calls(calls)) == ParsedAnswer("", calls)


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=8)


@given(city=WORDS, days=st.integers(0, 99), unit=st.sampled_from(["C", "F"]), tags=st.lists(st.booleans(), max_size=2))
@settings(max_examples=60, deadline=None)
def test_tagged_arguments_have_the_types_of_their_schema(city: str, days: int, unit: str, tags: list[bool]) -> None:
    given = {"city": city, "days": days, "unit": unit, "tags": tags}
    text = TOOL_FORMATS["qwen3_coder"].write_calls([ToolCall("get_weather", to_json(given))])
    (call,) = parsed("qwen3_coder", text).calls
    assert json.loads(call.arguments) == given


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", 'Hm.\n<tool_call>\n{"name": "now"}\n</tool_call>', "Hm.", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}}', "", [("now", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
        ("hermes", "<tool_call>{'name': 'now'}</tool_call>", "<tool_call>{'name': 'now'}</tool_call>", []),
        ("hermes", '<tool_call>{"name": "now"} and so on', '<tool_call>{"name": "now"} and so on', []),
        (
            "hermes",
            '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "no',
            '<tool_call>{"name": "no',
            [("now", "{}")],
        ),
        ("llama3", '<|python_tag|>{"name": "now", "parameters": {}}', "", [("now", "{}")]),
        ("llama3", '{"name": "now", "parameters": {}}; {"name": "now"}', "", [("now", "{}"), ("now", "{}")]),
        ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
        ("llama3", 'So: {"name": "now", "parameters": {}}', 'So: {"name": "now", "parameters": {}}', []),
        ("mistral", 'x[TOOL_CALLS] [{"name": "now", "arguments": {}}]', "x", [("now", "{}")]),
        (
            "mistral",
            '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}',
            "",
            [("now", "{}"), ("f", '{"a": 1}')],
        ),
        ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        ("qwen3_coder", "<function=now>\n</function>\n</tool_call>", "", [("now", "{}")]),
        ("qwen3_coder", "<function=now>\nfree</function>", "<function=now>\nfree</function>", []),
        (
            "harmony",
            "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
            "",
            [("now", "{}")],
        ),
        ("harmony", "<|channel|>final<|message|>Done.<|return|>", "Done.", []),
    ],
)
def test_answers_as_models_write_them(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = parsed(name, text)
    assert (found.content, [*map(tuple, found.calls)]) == (content, calls)


def test_channels_are_reasoning_text_and_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>First.<|end|><|start|>assistant<|channel|>analysis<|message|>Then.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    )
    end = text.index("Then.<|end|>") + len("Then.<|end|>")
    assert parsed("harmony", text) == ParsedAnswer("", (ToolCall("now", "{}"),), "First.\nThen.", end)
    formats = ChatFormats(TOOL_FORMATS["harmony"], REASONING_FORMATS["harmony"])
    parts = formats.take_apart(text, TOOLS, is_open=False, may_call=True)
    assert (parts.calls, parts.reasoning) == ((ToolCall("now", "{}"),), "First.\nThen.")
    assert parts.reasoning_end == end
    assert formats.take_apart(text, TOOLS, is_open=False, may_call=False).calls == ()


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "rest"),
    [
        ("<think>\nwhy\n</think>\n\nyes", False, "why", "yes"),
        ("why</think>yes", True, "why", "yes"),
        ("why</think>yes", False, "why", "yes"),
        ("yes", False, "", "yes"),
        ("still at it", True, "still at it", ""),
        ("<think>still at it", False, "still at it", ""),
        ("<think>\n\n</think>\n\nyes", False, "", "yes"),
        ("say <think> and </think>", False, "", "say <think> and </think>"),
        ("a</think>b</think>c", True, "a", "b</think>c"),
    ],
)
def test_reasoning_is_told_from_the_answer(text: str, is_open: bool, reasoning: str, rest: str) -> None:
    split = REASONING_FORMATS["think"].split(text, is_open=is_open)
    assert (split.reasoning, split.rest) == (reasoning, rest)


@given(pieces=st.lists(PIECES, max_size=8), is_open=st.booleans(), marks=st.sampled_from(sorted(REASONING_FORMATS)))
@settings(max_examples=150, deadline=None)
def test_splitting_never_raises(pieces: list[str], is_open: bool, marks: str) -> None:
    text = "".join(pieces)
    split = REASONING_FORMATS[marks].split(text, is_open=is_open)
    assert 0 <= split.end <= len(text)
    assert split.rest in text


# Grammars

EOS = 2


def _tokenizer(name: str) -> tuple[Tokenizer, dict[str, int]]:
    """A tokenizer whose markers of Mistral and gpt-oss are special tokens, as theirs are."""
    backend = byte_level_tokenizer(300)
    if name in ("mistral", "harmony"):
        backend.add_special_tokens([*TOOL_FORMATS[name].markers])
    tokenizer = Tokenizer(backend, (EOS,))
    return tokenizer, dict(ChatFormats.of(tokenizer, name).special_ids)


def walk(structure: StructuredOutputs, name: str, source: random.Random, forced: str = "") -> str:
    """A random text of a grammar: any allowed token at every step. The end comes when it may come after 150 tokens."""
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    tokenizer, _ = _tokenizer(name)
    size = tokenizer.backend.get_vocab_size()
    matcher = GrammarCompiler(tokenizer, size, (EOS,)).start(structure)
    mask = allocate_token_bitmask(1, size)
    ids: list[int] = tokenizer.encode(forced, add_special_tokens=False).tolist()
    assert matcher.consume_tokens(ids)
    while not matcher.is_stopped() and len(ids) < 600:
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size])
        if EOS in allowed and (len(ids) > 150 or len(allowed) == 1 or source.random() < 0.3):
            break
        token = int(source.choice([one for one in allowed if one != EOS]))
        assert matcher.consume_token(token)
        ids.append(token)
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_every_answer_of_a_forced_grammar_is_calls(name: str, is_parallel: bool) -> None:
    source = random.Random(name)
    grammar = TOOL_FORMATS[name].forced(Wanted(TOOLS, is_parallel, _tokenizer(name)[1]))
    for _ in range(6):
        text = walk(StructuredOutputs(lark=grammar), name, source)
        found = parsed(name, text)
        assert found.calls, text
        assert found.content == "", text
        assert is_parallel or len(found.calls) == 1
        for call in found.calls:
            jsonschema.validate(json.loads(call.arguments), schema_of(BY_NAME[call.name]))


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"llama3", "harmony"}))
def test_a_call_that_has_begun_goes_on_as_its_schema_says(name: str) -> None:
    source = random.Random(name)
    format = TOOL_FORMATS[name]
    grammar = format.begun(Wanted(TOOLS, False, _tokenizer(name)[1]))
    for _ in range(6):
        structure = StructuredOutputs(lark=grammar.lark, after=grammar.after)
        found = parsed(name, walk(structure, name, source, f"Well: {format.markers[0]}"))
        (call,) = found.calls
        jsonschema.validate(json.loads(call.arguments), schema_of(BY_NAME[call.name]))


@pytest.mark.parametrize("is_parallel", [True, False])
def test_gpt_oss_may_call_again_behind_the_end_of_a_call(is_parallel: bool) -> None:
    format, source = TOOL_FORMATS["harmony"], random.Random(3)
    wanted = Wanted(TOOLS, is_parallel, _tokenizer("harmony")[1])
    calls = (ToolCall("get_weather", '{"city": "Rome"}'), ToolCall("get_weather", '{"city": "Oslo"}'))
    text = format.write_calls(calls)
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for lark in (format.forced(wanted), format.begun(wanted).lark):
        for written in (text, thought + text):
            if is_parallel:
                assert (
                    parsed("harmony", walk(StructuredOutputs(lark=lark), "harmony", source, written)).calls[:2] == calls
                )
            else:
                with pytest.raises(AssertionError):
                    walk(StructuredOutputs(lark=lark), "harmony", source, written)


def test_gpt_oss_says_what_it_likes_until_it_calls() -> None:
    format, source = TOOL_FORMATS["harmony"], random.Random(3)
    begun = format.begun(Wanted(TOOLS, True, _tokenizer("harmony")[1]))
    assert begun.after == "", "free text has no special tokens, and this format is made of them"
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>No"
    found = parsed("harmony", walk(StructuredOutputs(lark=begun.lark), "harmony", source, said))
    assert found.calls == ()
    assert found.content.startswith("No")
    calling = "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary to=functions."
    found = parsed("harmony", walk(StructuredOutputs(lark=begun.lark), "harmony", source, calling))
    assert found.calls
    for call in found.calls:
        jsonschema.validate(json.loads(call.arguments), schema_of(BY_NAME[call.name]))


def test_an_answer_of_gpt_oss_takes_its_shape_on_its_channel() -> None:
    ids = _tokenizer("harmony")[1]
    structure = StructuredOutputs(lark=answered('"yes" | "no"', ids))
    for forced in ("", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"):
        found = parsed("harmony", walk(structure, "harmony", random.Random(1), forced + "<|channel|>final<|message|>"))
        assert found.content in ("yes", "no")


def test_an_answer_that_begins_with_a_brace_is_a_call_of_llama() -> None:
    source = random.Random(1)
    grammar = TOOL_FORMATS["llama3"].begun(Wanted(TOOLS))
    for _ in range(6):
        found = parsed("llama3", walk(StructuredOutputs(lark=grammar.lark), "llama3", source, "{"))
        assert len(found.calls) == 1
    assert parsed("llama3", walk(StructuredOutputs(lark=grammar.lark), "llama3", source, "the")).calls == ()


def test_tools_are_told_in_words_where_templates_cannot() -> None:
    tool = {"type": "function", "function": {"name": "now", "description": "The time."}}
    text = tools_text([tool], TOOL_FORMATS["hermes"])
    assert '{"name": "now", "description": "The time."}' in text
    assert "<tool_call>" in text


@pytest.mark.parametrize(
    ("prompt", "begin", "after"),
    [
        ("assistant\n<think>\n", "", "</think>"),
        ("assistant\n", "<think>", "</think>"),
        ("<think>\n\n</think>\n\n", "", ""),
    ],
    ids=["the prompt opens it", "the model may open it", "the prompt closes it"],
)
def test_a_grammar_begins_where_the_reasoning_ends(prompt: str, begin: str, after: str) -> None:
    source = random.Random(5)
    formats = ChatFormats(reasoning=REASONING_FORMATS["think"])
    settled = formats.settled(StructuredOutputs(choice=("yes", "no")), prompt)
    assert (settled.begin, settled.after) == (begin, after)
    thought = {"": "", "</think>": "so on</think>"}[after]
    for forced in (f"{begin}{thought}", "" if begin or not after else thought):
        text = walk(settled, "hermes", source, forced)
        assert text.removeprefix(forced).strip() in ("yes", "no")
    assert ChatFormats().settled(settled, prompt) == settled
