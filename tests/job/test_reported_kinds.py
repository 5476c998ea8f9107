"""What real files, checkpoints, servers and callers hold: one table for each, every row with its right outcome."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import batch_line, errors_of, read_rows, run_fake, write_lines
from http_cases import chat_line, engine_for, run_http
from reported_lines import ABILITY_CODES, ANSWERED, CASES_BY_KIND, LIMITS, REPLIES, SHORT, Malformed, Unable, user
from tiny_files import tiny_directory
from tokenizers import Tokenizer

from blendserve import LLM, NativeSettings, run_batch
from blendserve.dialect.schema import ServedModel
from blendserve.engines.http import fake_server
from blendserve.engines.http.fake_server import serving
from blendserve.errors import ConfigError
from blendserve.job.job import JobReport
from blendserve.models.hub import ModelFiles
from blendserve.models.load import load_model

CASES = {f"{kind} {at}": case for kind, cases in CASES_BY_KIND.items() for at, case in enumerate(cases)}
Row = dict[str, Any]


def rows_by_id(output: Path) -> dict[str, Row]:
    paths = [path for path in (output, errors_of(output)) if path.exists()]
    return {row["custom_id"]: row for path in paths for row in read_rows(path)}


def error_of(row: Row) -> tuple[str, str] | None:
    """Code and message of a row, None where it is an answer."""
    response = row["response"]
    if row["error"]:
        return row["error"]["code"], row["error"]["message"]
    if response["status_code"] == 200:
        return None
    error = response["body"].get("error")
    return (error.get("code", ""), error["message"]) if isinstance(error, dict) else ("", json.dumps(response["body"]))


def run_tiny(directory: Path, lines: list[Any], model: Path | None = None) -> tuple[dict[str, Row], JobReport]:
    model = model or tiny_directory(directory / "tiny")
    source = write_lines(directory / "in.jsonl", lines)
    report = run_batch(source, directory / "out.jsonl", engine=NativeSettings(str(model), **LIMITS))
    return rows_by_id(directory / "out.jsonl"), report


@pytest.fixture(scope="module")
def rows_by_engine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Row]]:
    """What becomes of every line of the table: on a tiny Llama, and on a server."""
    directory = tmp_path_factory.mktemp("lines")
    native, _ = run_tiny(directory, [case.line(name) for name, case in CASES.items()])
    with serving() as server:
        run_http(engine_for(server), directory / "in.jsonl", directory / "http.jsonl")
    return {"native": native, "http": rows_by_id(directory / "http.jsonl")}


@pytest.mark.parametrize("engine", ["native", "http"])
@pytest.mark.parametrize("kind", CASES_BY_KIND)
def test_every_line_has_its_outcome(kind: str, engine: str, rows_by_engine: dict[str, dict[str, Row]]) -> None:
    for at, case in enumerate(CASES_BY_KIND[kind]):
        expected = case.native if engine == "native" else case.http
        error = error_of(rows_by_engine[engine][f"{kind} {at}"])
        assert (error is None) == (expected == ANSWERED), (case, error)
        if isinstance(expected, Malformed | Unable):
            assert error is not None
            assert error[0] == expected.code, (case, error)
            assert expected.words in error[1], (case, error)


def test_valid_lines_are_answered_or_refused_for_what_the_engine_cannot_do(
    rows_by_engine: dict[str, dict[str, Row]],
) -> None:
    valid = [name for name, case in CASES.items() if not isinstance(case.native, Malformed)]
    codes = Counter((error_of(rows_by_engine["native"][name]) or (ANSWERED,))[0] for name in valid)
    num_refused = sum(codes[code] for code in ABILITY_CODES)
    assert codes[ANSWERED] + num_refused == len(valid), codes
    page = (Path(__file__).parents[2] / "docs" / "batch-files.md").read_text()
    sentence = (
        f"Of {len(valid)} valid lines after public batch files, a tiny Llama answers {codes[ANSWERED]} and refuses "
        f"{num_refused} for something that it cannot do. No valid line is refused for another reason."
    )
    assert sentence in " ".join(page.split()), sentence


def test_tools_that_cannot_be_used_are_the_only_fault_of_a_line(rows_by_engine: dict[str, dict[str, Row]]) -> None:
    errors = [error_of(rows_by_engine["native"][name]) for name in CASES if name.startswith("tools")]
    messages = [error[1] for error in errors if error and "calls functions is not known" in error[1]]
    assert messages
    assert not [message for message in messages if "tool_choice" in message]


IDS: dict[str, tuple[Any, str | None, str]] = {  # the id of the line, the code of its error, the id in the row
    "a text": ("a-1", None, "a-1"),
    "of other scripts": ("čas-時間-⏳", None, "čas-時間-⏳"),
    "with a line break": ("a\nb", None, "a\nb"),
    "with a zero": ("a\x00b", None, "a\x00b"),
    "with a blank": (" a", None, " a"),
    "long": ("a" * 400, None, "a" * 400),
    "a number": (12, "invalid_custom_id", "12"),
    "empty": ("", "invalid_custom_id", ""),
    "used": ("first", "duplicate_custom_id", "first"),
}


@pytest.mark.parametrize(("custom_id", "code", "found"), IDS.values(), ids=IDS)
def test_ids_are_kept_and_errors_have_them(tmp_path: Path, custom_id: Any, code: str | None, found: str) -> None:
    lines = [batch_line("first"), batch_line(custom_id)]
    run_fake(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    last = [row for path in tmp_path.glob("out*.jsonl") for row in read_rows(path) if row["custom_id"] == found][-1]
    error = error_of(last) if code is None else error_of(read_rows(errors_of(tmp_path / "out.jsonl"))[0])
    assert (error and error[0]) == code
    assert last["custom_id"] == found


ROWS = [json.dumps(batch_line(f"r{number}")).encode() for number in range(3)]
JOINED = b"\n".join(ROWS) + b"\n"
MARK = b"\xef\xbb\xbf"
FILES: dict[str, tuple[bytes, int | str]] = {  # the bytes, and the number of answers or words of the refusal
    "a mark": (MARK + JOINED, 3),
    "marks inside": (MARK + ROWS[0] + MARK + ROWS[1] + b"\n" + MARK + ROWS[2], 3),
    "windows line ends": (JOINED.replace(b"\n", b"\r\n"), 3),
    "blank lines": (b"\n\n" + JOINED.replace(b"\n", b"\n \n"), 3),
    "no last line end": (JOINED[:-1], 3),
    "gzip": (gzip.compress(JOINED), 3),
    "gzip twice": (gzip.compress(ROWS[0] + b"\n") + gzip.compress(JOINED[len(ROWS[0]) + 1 :]), 3),
    "bzip2": (bz2.compress(JOINED), 3),
    "xz": (lzma.compress(JOINED), 3),
    "an array": (b"[" + b", ".join(ROWS) + b"]", "is one JSON array"),
    "an array with a row in each line": (b"[\n" + b",\n".join(ROWS) + b"\n]\n", "is one JSON array"),
    "an array in gzip": (gzip.compress(b"[" + b",\n".join(ROWS) + b"]"), "is one JSON array"),
    "a pretty object": (json.dumps(batch_line("a"), indent=4).encode(), "spread over several lines"),
    "semicolons": (b"id;question;note\n1;Name a river;x\n2;Name a lake;y\n", "is a table (CSV) with 3 columns"),
    "utf-16": (JOINED.decode().encode("utf-16-le"), "is UTF-16LE text; convert it"),
    "utf-16 in bzip2": (bz2.compress(JOINED.decode().encode("utf-16")), "is UTF-16 text"),
    "messages for claude": (b'{"custom_id": "a", "params": {"max_tokens": 9, "messages": []}}', "Anthropic's format"),
    "contents for gemini": (b'{"key": "a", "request": {"contents": [{"parts": []}]}}', "Gemini's batch format"),
    "a model input": (b'{"recordId": "a", "modelInput": {"max_tokens": 5}}', "Bedrock's batch format"),
    "questions": (b"Name a river.\nName a lake.\n", "is plain text, not JSON"),
    "another model": (json.dumps(batch_line("a", {"prompt": "x", "model": "gpt-9"})).encode(), "Choose with --model"),
}


@pytest.mark.parametrize(("content", "outcome"), FILES.values(), ids=FILES)
def test_a_file_is_read_or_refused_as_a_whole(tmp_path: Path, content: bytes, outcome: int | str) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(content)
    if isinstance(outcome, int):
        report = run_fake(path, output)
        assert (report.num_succeeded, report.num_failed, report.exit_code) == (outcome, 0, 0)
        return
    with pytest.raises(ConfigError) as refused:
        run_fake(path, output)
    assert outcome in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("out*.jsonl"))


def test_a_comma_behind_a_line_is_named(tmp_path: Path) -> None:
    report = run_fake(write_lines(tmp_path / "in.jsonl", [ROWS[0] + b",", ROWS[1]]), tmp_path / "out.jsonl")
    (row,) = read_rows(tmp_path / "out.errors.jsonl")
    assert report.num_succeeded == 1
    assert row["error"]["message"].endswith("; remove the comma at its end")


def test_a_model_chosen_after_a_refusal_answers_what_the_file_asks_for(tmp_path: Path) -> None:
    models = ["gpt-9", "gpt-9", "gpt-9-mini"]
    lines = [batch_line(f"{at}", {"prompt": "x", "model": name}) for at, name in enumerate(models)]
    path, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match=r"'gpt-9' .*'gpt-9-mini'"):
        run_fake(path, output)
    report = run_fake(path, output, served=ServedModel(("tiny",), accepts_any_name=True))
    assert (report.num_succeeded, report.errors_by_code) == (2, {"mismatched_model": 1})


def test_a_run_that_answers_nothing_is_no_success(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl", [batch_line("a", {"prompt": "x", "top_p": 7}), batch_line("b", method="")]
    )
    report = run_fake(path, tmp_path / "out.jsonl")
    assert (report.num_succeeded, report.exit_code) == (0, 3)


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; a field whose new value is None is left out."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in {**content, **changes}.items() if value is not None}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / "config.json", **changes)


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / "tokenizer_config.json", **changes)


def file(name: str, content: bytes, *, without: str = "") -> Callable[[Path], None]:
    def write(model: Path) -> None:
        if without:
            (model / without).unlink()
        (model / name).write_bytes(content)

    return write


def special_map(model: Path) -> None:
    edit(model / "tokenizer_config.json", bos_token=None, eos_token=None)
    edit(model / "special_tokens_map.json", bos_token="<s>", eos_token={"content": "</s>"})


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
PROMPT = "<s>user: a river\nassistant: "
MODELS: dict[str, tuple[Callable[[Path], None], str]] = {  # a change of a sound model; the prompt, or the refusal
    "special tokens in a map": (special_map, PROMPT),
    "a template over parts": (tokenizer(chat_template=PARTS), "a river"),
    "a template that hears nobody": (tokenizer(chat_template="fixed"), "no text of the user reaches the prompt"),
    "a named template": (tokenizer(chat_template=[{"name": "default", "template": PARTS}]), "a river"),
    "a template without a name": (tokenizer(chat_template=["x"]), "or a list of templates that each have a name"),
    "a template that is a number": (tokenizer(chat_template=7), "is 7; it must be a text"),
    "a template in another encoding": (file("chat_template.jinja", b"\xff\xfe"), "is not UTF-8 text; convert it"),
    "a broken template": (tokenizer(chat_template="{% for m in messages %}"), "chat template is not valid, line 1"),
    "no template": (tokenizer(chat_template=None), "the model has no chat template; use /v1/completions"),
    "an end that is a text": (config(eos_token_id="2"), "eos_token_id is '2' in"),
    "rope scaling that is a text": (config(rope_scaling="linear"), "is 'linear' in config.json; it must be an object"),
    "rope by kind of layer": (
        config(rope_parameters={"full_attention": {**ROPE, "rope_theta": 5e5}, "sliding_attention": ROPE}),
        "rope_parameters differ from layer to layer, which is not supported",
    ),
    "a size that is a text": (
        config(hidden_size="96"),
        "hidden_size is '96' in config.json; it must be a whole number",
    ),
    "a size that is absent": (config(num_attention_heads=None), "config.json has no 'num_attention_heads'"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu', which is not supported"),
    "a scale that we do not know": (config(residual_multiplier=0.2), "residual_multiplier is 0.2, which is not"),
    "half rotary": (config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, which is not supported"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config is"),
    "quantized by nothing": (config(quantization_config={}), PROMPT),
    "experts": (config(architectures=["Qwen3MoeForCausalLM"]), "'Qwen3MoeForCausalLM'] is not supported; known"),
    "a window that is absent": (config(model_type="mistral", architectures=["MistralForCausalLM"]), PROMPT),
    "a config that is a list": (file("config.json", b"[]"), "config.json holds a list, not an object"),
    "a config that is cut": (file("config.json", b"{"), "cannot read"),
    "sampling that is a text": (file("generation_config.json", b'{"temperature": "hot"}'), "it must be a number"),
    "a tokenizer of sentencepiece": (
        file("tokenizer.model", b"\n\x0e", without="tokenizer.json"),
        "has tokenizer.model, but no tokenizer.json; write one: pip install transformers",
    ),
    "an empty tokenizer": (file("tokenizer.json", b"{}"), "download the model again"),
    "weights of torch": (
        file("pytorch_model.bin", b"PK", without="model.safetensors"),
        "it has weights of PyTorch; convert them",
    ),
    "a pointer": (file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "an adapter beside": (file("adapter_model.safetensors", b"x"), PROMPT),
    "a second copy beside": (file("consolidated.00.safetensors", b"x"), PROMPT),
    "an old shard beside": (file("model-00002-of-00003.safetensors", b"x"), PROMPT),
}


def prompt_or_refusal(model: Path) -> str:
    try:
        with LLM(str(model), **LIMITS) as llm:
            (output,) = llm.chat(user("a river"), SHORT, use_tqdm=False)
    except ConfigError as error:
        return str(error)
    return str(output.error or output.prompt)


@pytest.mark.parametrize(("change", "outcome"), MODELS.values(), ids=MODELS)
def test_a_checkpoint_is_read_as_it_is_meant_or_refused_by_name(
    tmp_path: Path, change: Callable[[Path], None], outcome: str
) -> None:
    change(model := tiny_directory(tmp_path / "tiny"))
    found = prompt_or_refusal(model)
    assert found == outcome or (found != PROMPT and outcome in found)
    assert found == PROMPT or "\n" not in found


ENDS: dict[str, tuple[Callable[[Path], None], set[int]]] = {
    "the tokenizer's too": (tokenizer(eos_token={"content": "<s>"}), {1, 2}),
    "generation_config's too": (file("generation_config.json", b'{"eos_token_id": [0, 1]}'), {0, 1, 2}),
    "none in config.json": (config(eos_token_id=None), {2}),
}


@pytest.mark.parametrize(("change", "ends"), ENDS.values(), ids=ENDS)
def test_ends_of_all_files_count(tmp_path: Path, change: Callable[[Path], None], ends: set[int]) -> None:
    change(model := tiny_directory(tmp_path / "tiny"))
    assert set(load_model(ModelFiles("m", model)).spec.eos_token_ids) == ends


def test_a_token_beyond_the_embedding_is_an_error_of_the_line_that_uses_it(tmp_path: Path) -> None:
    model = tiny_directory(tmp_path / "tiny")
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens(["[PAD]"])
    backend.save(str(model / "tokenizer.json"))
    prompts = {"plain": "a river", "pad": "a[PAD]"}
    rows, report = run_tiny(tmp_path, [batch_line(name, {"prompt": text}) for name, text in prompts.items()], model)
    assert (report.num_succeeded, report.num_failed) == (1, 1)
    assert error_of(rows["plain"]) is None
    assert "320" in str(error_of(rows["pad"]))


@pytest.mark.parametrize(("named", "is_greedy"), [({"top_k": 1}, True), ({"temperature": 0.0}, True), ({}, False)])
def test_sampling_of_the_model_counts_where_a_line_has_none(
    tmp_path: Path, named: dict[str, Any], is_greedy: bool
) -> None:
    model = tiny_directory(tmp_path / "tiny")
    edit(model / "generation_config.json", **named)
    rows, _ = run_tiny(tmp_path, [batch_line("a", {"prompt": "a river", "n": 4, "max_tokens": 8, "seed": 1})], model)
    answers = {choice["text"] for choice in rows["a"]["response"]["body"]["choices"]}
    assert (len(answers) == 1) == is_greedy


def test_a_reply_is_used_kept_or_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(_path: str, body: bytes, _status: int = 400) -> tuple[int, bytes]:
        status, content, _, _ = REPLIES[json.loads(body)["model"]]
        return status, (content if isinstance(content, str) else json.dumps(content)).encode()

    monkeypatch.setattr(fake_server, "answer", reply)
    source = write_lines(tmp_path / "in.jsonl", [chat_line(name, model=name) for name in REPLIES])
    with serving() as server:
        run_http(engine_for(server), source, tmp_path / "out.jsonl")
    asked = Counter(json.loads(exchange.body)["model"] for exchange in server.exchanges)
    rows = rows_by_id(tmp_path / "out.jsonl")
    for name, (_, content, code, num_asked) in REPLIES.items():
        error = error_of(rows[name])
        assert (error is None) == (code == ANSWERED), (name, error)
        assert error is None or not code or error[0] == code, (name, error)
        assert ("odd words" in json.dumps(rows[name])) == ("odd words" in json.dumps(content)), rows[name]
        assert asked[name] == num_asked, (name, error)
