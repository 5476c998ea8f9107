"""Structure, tools, reasoning, responses and scoring on the installed vLLM; scripts/test-vllm runs this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from batch_fakes import read_rows
from chat_templates import HERMES_LIKE
from tiny_files import byte_level_tokenizer, write_directory
from tiny_models import random_weights
from vllm_cases import chat, line
from vllm_real_cases import SPEC, command, finish, pytestmark, start

from blendserve.dialect.grammars import check_grammar
from blendserve.engines.vllm.api import InstalledVllm
from blendserve.errors import ConfigError
from blendserve.models.reasoning_formats import REASONING_FORMATS
from blendserve.request import StructuredOutputs

__all__ = ["pytestmark"]

MARKS = ("<tool_call>", "</tool_call>", *REASONING_FORMATS["think"].markers)
FLAG = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "of": {"enum": ["a", "b"]}},
    "required": ["ok", "of"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "report", "parameters": FLAG}}
OTHER = {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}}
STRICT = {"type": "function", "function": {"name": "report", "parameters": FLAG, "strict": True}}
NAMED = {"type": "function", "function": {"name": "report"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "flag", "strict": True, "schema": FLAG}}
ASK: dict[str, Any] = {"max_tokens": 250, "temperature": 0}


def number_of(mark: str) -> int:
    return SPEC.vocab_size - len(MARKS) + MARKS.index(mark)


def next_is(mark: str) -> dict[str, Any]:
    """Make a model that says anything say this one token wherever it may."""
    return {"logit_bias": {str(number_of(mark)): 100}}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that calls as Hermes does and reasons."""
    path = tmp_path_factory.mktemp("thinker") / "tiny"
    write_directory(path, SPEC, random_weights(SPEC, 1))
    tokenizer = byte_level_tokenizer(SPEC.vocab_size - len(MARKS))
    assert tokenizer.get_vocab_size() == SPEC.vocab_size - len(MARKS)
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    template = HERMES_LIKE.replace("assistant\n{% if", "assistant\n{% if opens %}<think>\n{% endif %}{% if")
    (path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "eos_token": "</s>", "chat_template": template})
    )
    return path


@pytest.fixture(scope="module")
def rows(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Bodies and errors of one file that asks for everything, answered by the command."""
    path = tmp_path_factory.mktemp("rows")
    source, output = path / "in.jsonl", path / "out.jsonl"
    source.write_text("\n".join(lines()))
    finish(start(command(thinker, source, output), path), exit_code=3)
    found = {row["custom_id"]: row["response"]["body"] for row in read_rows(output)}
    errors = read_rows(source.with_name("out.errors.jsonl"))
    return found | {row["custom_id"]: row["response"]["body"]["error"] for row in errors}


def lines() -> list[str]:
    text = "the capital of france is paris"
    flat = {"type": "function", "name": "report", "parameters": FLAG, "strict": True}
    shaped = {"format": {"type": "json_schema", "name": "flag", "schema": FLAG, "strict": True}}
    asked = {"max_output_tokens": 250, "temperature": 0}
    unthought = {"chat_template_kwargs": {"enable_thinking": False}}
    one_call = {"parallel_tool_calls": False}
    return [
        chat("required", "tell", tools=[OTHER, TOOL], tool_choice="required", parallel_tool_calls=False, **ASK),
        chat("named", "tell", tools=[OTHER, TOOL], tool_choice=NAMED, **ASK),
        chat("strict", "tell", tools=[STRICT], parallel_tool_calls=False, **ASK, **next_is("<tool_call>")),
        chat("either", "tell", tools=[TOOL], response_format=FORMAT, **ASK | unthought | one_call),
        chat("none", "tell", tools=[TOOL], tool_choice="none", response_format=FORMAT, **ASK | unthought),
        chat(
            "thought", "tell", chat_template_kwargs={"opens": True}, response_format=FORMAT, **ASK | next_is("</think>")
        ),
        chat("unthought", "tell", response_format=FORMAT, **ASK | unthought),
        chat("json", "tell", guided_json=FLAG, **ASK | unthought),
        chat("regex", "tell", guided_regex="[ab]{3}-[0-9]{2}", **ASK | unthought),
        chat("choice", "tell", guided_choice=["yes it is", "no"], **ASK | unthought),
        chat("grammar", "tell", guided_grammar='root ::= "a" | "b"', **ASK | unthought),
        chat("impossible", "tell", guided_json={"type": "array", "uniqueItems": True}, **ASK),
        line("response", "/v1/responses", input="tell", text=shaped, **asked),
        line("call", "/v1/responses", input="tell", tools=[flat], tool_choice="required", **asked | one_call),
        chat("scored", text, prompt_logprobs=1, **ASK | {"max_tokens": 2}),
        line("echoed", "/v1/completions", prompt=text, echo=True, logprobs=1, max_tokens=0),
        line("read", "/v1/completions", prompt=text, prompt_logprobs=1, max_tokens=1, temperature=0),
    ]


def message(rows: dict[str, Any], name: str) -> Any:
    return rows[name]["choices"][0]["message"]


@pytest.mark.parametrize("name", ["required", "named", "strict"])
def test_calls_follow_their_schema(rows: dict[str, Any], name: str) -> None:
    calls = message(rows, name)["tool_calls"]
    assert rows[name]["choices"][0]["finish_reason"] == "tool_calls"
    assert len(calls) == 1
    if calls[0]["function"]["name"] == "report":
        jsonschema.validate(json.loads(calls[0]["function"]["arguments"]), FLAG)
    else:
        assert name == "required"
        assert calls[0]["function"]["arguments"] == "{}"


def test_a_call_or_an_answer_of_a_shape(rows: dict[str, Any]) -> None:
    found = message(rows, "either")
    text = found["tool_calls"][0]["function"]["arguments"] if found.get("tool_calls") else found["content"]
    jsonschema.validate(json.loads(text), FLAG)
    assert not message(rows, "none").get("tool_calls")
    jsonschema.validate(json.loads(message(rows, "none")["content"]), FLAG)


def test_grammars_begin_behind_the_reasoning(rows: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(message(rows, "thought")["content"]), FLAG)
    assert rows["thought"]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 1  # the mark of its end
    jsonschema.validate(json.loads(message(rows, "unthought")["content"]), FLAG)


def test_every_spelling_of_a_structure(rows: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(message(rows, "json")["content"]), FLAG)
    content = message(rows, "regex")["content"]
    assert len(content) == 6
    assert set(content[:3]) <= {"a", "b"}
    assert content[4:].isdigit()
    assert message(rows, "choice")["content"] in ("yes it is", "no")
    assert message(rows, "grammar")["content"] in ("a", "b")
    assert rows["impossible"]["code"] == "unsupported_schema"
    assert "uniqueItems" in rows["impossible"]["message"]


def test_responses(rows: dict[str, Any]) -> None:
    (said,) = rows["response"]["output"]
    jsonschema.validate(json.loads(said["content"][0]["text"]), FLAG)
    (called,) = rows["call"]["output"]
    assert (called["type"], called["name"]) == ("function_call", "report")
    jsonschema.validate(json.loads(called["arguments"]), FLAG)


def test_prompts_are_scored_alike_by_every_name(rows: dict[str, Any]) -> None:
    first, *others = rows["scored"]["prompt_logprobs"]
    assert first is None
    assert len(others) + 1 == rows["scored"]["usage"]["prompt_tokens"]
    assert all(entry["logprob"] <= 0 for found in others for entry in found.values())
    echoed = rows["echoed"]["choices"][0]["logprobs"]["token_logprobs"]
    assert rows["echoed"]["usage"]["completion_tokens"] == 0
    read = rows["read"]["choices"][0]["prompt_logprobs"]
    assert echoed[0] is None
    assert read[0] is None
    assert len(read) == len(echoed)
    for logprob, found in zip(echoed[1:], read[1:], strict=True):
        assert any(logprob == pytest.approx(entry["logprob"], abs=1e-4) for entry in found.values())


def test_reasoning_is_told_as_by_vllms_own_parsers(thinker: Path) -> None:
    """Answers that leave no doubt; where the prompt has opened the reasoning, its parsers cannot know."""
    api = InstalledVllm()
    marks = REASONING_FORMATS["think"]
    for name in ("deepseek_r1", "qwen3"):
        assert api.reasoning_marks(name, str(thinker)) == marks.markers
        for text in (f"{marks.begin}so it is{marks.end}four", f"so it is{marks.end}four", f"{marks.begin}so it is"):
            reasoning, rest, _ = marks.split(text, is_open=False)
            assert api.parse_reasoning(name, str(thinker), text) == (reasoning, rest), (name, text)
    with pytest.raises(ConfigError, match="has a format of that name"):
        api.reasoning_marks("no-such-parser", str(thinker))


def test_our_own_engine_follows_grammars_beside_this_vllm() -> None:
    """vLLM holds llguidance back; we have to do with that one too."""
    check_grammar(StructuredOutputs(json=json.dumps(FLAG)))
    check_grammar(StructuredOutputs(json_object=True))
    check_grammar(StructuredOutputs(choice=("a", "b"), after="</think>"))
