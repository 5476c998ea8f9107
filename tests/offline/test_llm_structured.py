"""Structured answers through the doors: `LLM`, batch files, and many schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from batch_fakes import read_rows
from schemas import schemas
from tiny_files import tiny_directory

from blendserve import LLM, NativeSettings, RequestOutput, SamplingParams, StructuredOutputs, run_batch
from blendserve.errors import ConfigError, RequestError

LIMITS: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_threads": 2}
COLOR = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
CLOSED = {**COLOR, "additionalProperties": False}
ANSWERS = ({"color": "red"}, {"color": "blue"})
DATES = ("date", "date-time")
"""Python's own dates begin with the year 1, those of JSON Schema with the year 0."""
CHAT = [{"role": "user", "content": "which?"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), kv_memory_bytes=1 << 25, **LIMITS) as llm:
        yield llm


class Color:
    """What pydantic's models have, and all that is asked of them."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return CLOSED


@pytest.mark.parametrize(
    "response_format",
    [
        Color,
        CLOSED,
        {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR, "strict": True}},
    ],
)
def test_chat_takes_a_format(llm: LLM, response_format: Any) -> None:
    params = SamplingParams(max_tokens=100)
    (output,) = llm.chat(CHAT, params, response_format=response_format)
    assert output.error is None
    assert json.loads(output.outputs[0].text) in ANSWERS
    listed = llm.chat([CHAT, CHAT], [params, params], response_format=response_format)
    streamed = llm.chat(iter([CHAT]), iter([params]), response_format=response_format)
    assert all(json.loads(output.outputs[0].text) in ANSWERS for output in [*listed, *streamed])


def test_formats_that_are_none(llm: LLM) -> None:
    free = llm.chat(CHAT, SamplingParams(max_tokens=5, seed=1))
    assert llm.chat(CHAT, SamplingParams(max_tokens=5, seed=1), response_format={"type": "text"}) == free
    with pytest.raises(ConfigError, match="pydantic model, a JSON schema"):
        llm.chat(CHAT, response_format=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="json_schema"):
        llm.chat(CHAT, response_format={"type": "json_schema"})
    asked = SamplingParams(structured_outputs=StructuredOutputs(choice=("a",)))
    with pytest.raises(ConfigError, match="give one of them"):
        llm.chat(CHAT, asked, response_format=CLOSED)


def test_generate_takes_structures_with_each_prompt(llm: LLM) -> None:
    structures: Sequence[Any] = (
        StructuredOutputs(choice=("yes", "no")),
        {"regex": "[0-9]{3}"},
        {"json": CLOSED},
        StructuredOutputs(json='{"not": {}}'),
        {"regex": "a", "choice": ["b"]},
        None,
    )
    params = [SamplingParams(max_tokens=60, n=2, structured_outputs=structure) for structure in structures]
    chosen, matched, read, refused, doubtful, free = llm.generate(["which?"] * len(params), params)
    assert {choice.text for choice in chosen.outputs} <= {"yes", "no"}
    assert all(len(choice.text) == 3 and choice.text.isdigit() for choice in matched.outputs)
    assert all(json.loads(choice.text) in ANSWERS for choice in read.outputs)
    assert isinstance(refused.error, RequestError)
    assert refused.error.code == "unsupported_schema"
    assert isinstance(doubtful.error, RequestError)
    assert doubtful.error.param == "structured_outputs"
    assert free.error is None


def line(custom_id: str, **body: Any) -> str:
    chat = {"messages": CHAT, "max_tokens": 80, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": chat})


def test_a_batch_file_with_structures(tiny: Path, tmp_path: Path) -> None:
    lines = [
        *(line(f"schema-{i}", structured_outputs={"json": CLOSED}) for i in range(20)),
        *(line(f"choice-{i}", guided_choice=["yes", "no"], max_tokens=4) for i in range(5)),
        line("object", response_format={"type": "json_object"}, max_tokens=2),
        line("refused", structured_outputs={"json": {"type": "array", "contains": {}}}),
        line("free"),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    settings = NativeSettings(model=str(tiny), max_num_seqs=16, kv_memory_bytes=1 << 23)
    report = run_batch(source, target, engine=settings)
    assert report.errors_by_code == {"unsupported_schema": 1}
    (error,) = read_rows(target.with_suffix(".errors.jsonl"))
    assert '"contains"' in error["response"]["body"]["error"]["message"]
    choices = {row["custom_id"]: row["response"]["body"]["choices"][0] for row in read_rows(target)}
    assert choices["object"]["finish_reason"] == "length"
    for name, choice in choices.items():
        if name.startswith("schema"):
            assert choice["finish_reason"] == "stop"
            assert json.loads(choice["message"]["content"]) in ANSWERS
        if name.startswith("choice"):
            assert choice["message"]["content"] in ("yes", "no")
    usage = {row["custom_id"]: row["response"]["body"]["usage"] for row in read_rows(target)}
    assert usage["choice-0"]["completion_tokens"] <= 4


def answers(llm: LLM, count_each: int, num_seeds: int) -> list[tuple[str, dict[str, Any], RequestOutput]]:
    """Answers to every schema, of a model that likes to end what it begins."""
    ends = {int(llm.model.tokenizer.encode(token)[0]): 4.0 for token in ('"', "}", "]", "0")}
    asked = [(name, schema, seed) for name, schema in schemas(count_each) for seed in range(num_seeds)]
    params = [
        SamplingParams(
            max_tokens=300, seed=seed, logit_bias=ends, structured_outputs=StructuredOutputs(json=json.dumps(schema))
        )
        for _, schema, seed in asked
    ]
    outputs = llm.generate([f"{name}: {seed}" for name, _, seed in asked], params)
    return [(name, schema, output) for (name, schema, _), output in zip(asked, outputs, strict=True)]


def check_answers(answered: list[tuple[str, dict[str, Any], RequestOutput]]) -> None:
    num_whole = 0
    for name, schema, output in answered:
        assert output.error is None, (name, output.error)
        (choice,) = output.outputs
        if choice.finish_reason == "length":
            continue
        num_whole += 1
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        checker = jsonschema.FormatChecker(formats=())
        of_draft = validator.FORMAT_CHECKER.checkers
        checker.checkers = {name: of_draft[name] for name in of_draft if name not in DATES}
        validator(schema, format_checker=checker).validate(json.loads(choice.text))
    assert num_whole > 0.7 * len(answered)


def test_answers_that_stop_fit_their_schema(llm: LLM) -> None:
    check_answers(answers(llm, count_each=6, num_seeds=1))


@pytest.mark.thorough
def test_answers_to_many_schemas_fit(llm: LLM) -> None:
    answered = answers(llm, count_each=40, num_seeds=3)
    assert len({json.dumps(schema) for _, schema, _ in answered}) >= 300
    check_answers(answered)
