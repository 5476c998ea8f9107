"""Calls that work with vLLM's `LLM`: shapes of prompts, keywords, options of the constructor, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_llm import LIMITS, tokens_of
from tiny_files import tiny_directory

from blendserve import LLM, RequestOutput, SamplingParams
from blendserve.errors import ConfigError, RequestError

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
TEXT = "the capital of france"
USER = {"role": "user", "content": "what is the answer?"}
TEMPLATE = (
    "{% if tools %}tools: {{ tools | map(attribute='function.name') | join(' ') }}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}quick\n{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_directory(tmp_path_factory.mktemp("models") / "tiny")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), **LIMITS) as llm:
        yield llm


def ids_of(llm: LLM, text: str = TEXT) -> list[int]:
    return llm.get_tokenizer().encode(text)


PROMPTS: dict[str, Any] = {
    "text": lambda _: TEXT,
    "list of texts": lambda _: [TEXT],
    "tuple of texts": lambda _: (TEXT,),
    "object with a text": lambda _: {"prompt": TEXT},
    "list of objects": lambda _: [{"prompt": TEXT}],
    "object with token ids": lambda llm: {"prompt_token_ids": ids_of(llm)},
    "object with both": lambda llm: {"prompt_token_ids": ids_of(llm), "prompt": TEXT},
    "object with fields that are empty": lambda _: {"prompt": TEXT, "multi_modal_data": None, "cache_salt": "s"},
    "token ids": ids_of,
    "list of token ids": lambda llm: [ids_of(llm)],
    "array of token ids": lambda llm: np.array(ids_of(llm)),
    "generator of objects": lambda _: ({"prompt": TEXT} for _ in range(1)),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_shape_of_one_prompt_is_the_same_prompt(llm: LLM, name: str) -> None:
    (expected,) = llm.generate(TEXT, GREEDY, use_tqdm=False)
    (output,) = llm.generate(PROMPTS[name](llm), GREEDY, use_tqdm=False)
    assert output.error is None
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs == expected.outputs
    assert output.prompt == (TEXT if "text" in name or "objects" in name or "both" in name or "empty" in name else None)


def test_shapes_may_be_mixed(llm: LLM) -> None:
    prompts: list[Any] = [TEXT, {"prompt": TEXT}, ids_of(llm), {"prompt_token_ids": ids_of(llm)}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(outputs[:1]) * 4


def test_token_ids_by_their_old_keyword(llm: LLM) -> None:
    expected = tokens_of(llm.generate([TEXT], GREEDY))
    assert tokens_of(llm.generate(prompt_token_ids=[ids_of(llm)], sampling_params=GREEDY)) == expected
    with pytest.raises(ConfigError, match="give prompts"):
        llm.generate(sampling_params=GREEDY)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (USER, "LLM.chat"),
        ({"prompt": ["a"]}, "must be a text"),
        ({"prompts": "a"}, "prompt_token_ids"),
        ({}, "prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": None}, "prompt_token_ids"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "text only"),
        ({"prompt_embeds": [1.0]}, "embeddings"),
        ({"encoder_prompt": "a", "decoder_prompt": "b"}, "encoder"),
        ({"prompt_token_ids": [1.5]}, "token ids"),
        ({"prompt_token_ids": [400]}, "0 to 319"),
    ],
    ids=str,
)
def test_an_object_that_is_no_prompt_fails_alone_and_says_why(llm: LLM, prompt: Any, words: str) -> None:
    bad, good = llm.generate([prompt, TEXT], GREEDY, use_tqdm=False)
    assert isinstance(bad.error, RequestError)
    assert words in str(bad.error)
    assert good.error is None


def test_one_message_is_a_conversation(llm: LLM) -> None:
    (expected,) = llm.chat([USER], GREEDY)
    assert expected.prompt == "user: what is the answer?\nassistant: "
    for messages in (USER, [[USER]], (USER,), ([USER] for _ in range(1))):
        (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert (output.prompt, output.outputs) == (expected.prompt, expected.outputs)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "what is"}, {"type": "text", "text": "the answer?"}], "what is\nthe answer?"),
        ([{"type": "text", "text": "what?"}], "what?"),
        ("what?", "what?"),
    ],
)
def test_text_parts_reach_the_prompt(llm: LLM, content: Any, text: str) -> None:
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY)
    assert output.prompt == f"user: {text}\nassistant: "


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": None}, {"role": "user", "contents": "x"}, {"content": "x"}, {"role": "user"}, 5],
    ids=str,
)
def test_a_message_that_is_none_fails_its_conversation_alone(llm: LLM, message: Any) -> None:
    bad, good = llm.chat([[message], [USER]], GREEDY)
    assert isinstance(bad.error, RequestError)
    assert good.error is None


def test_keywords_of_chat_reach_the_template(llm: LLM) -> None:
    def prompt(*messages: Any, **keywords: Any) -> str | None:
        (output,) = llm.chat([*messages], GREEDY, use_tqdm=False, **keywords)
        assert output.error is None
        return output.prompt

    asked = "user: what is the answer?\n"
    assert prompt(USER, add_generation_prompt=False) == asked
    assert prompt(USER, chat_template_kwargs={"enable_thinking": False}) == f"{asked}quick\nassistant: "
    begun = {"role": "assistant", "content": "it is"}
    assert prompt(USER, begun, continue_final_message=True) == f"{asked}assistant: it is"
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    assert prompt(USER, tools=[tool]) == f"tools: look\n{asked}assistant: "
    assert prompt(USER, chat_template="{{ messages[0]['content'] }}!") == "what is the answer?!"
    assert prompt(USER, chat_template_content_format="string", mm_processor_kwargs={}) == f"{asked}assistant: "


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "both true"),
        ({"tools": "look"}, "tools"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_content_format": "json"}, "auto, string, openai"),
        ({"chat_template": 5}, "text of a template"),
        ({"lora_request": object()}, "LoRA"),
        ({"tokenization_kwargs": {"padding": True}}, "add_special_tokens"),
    ],
)
def test_keywords_that_cannot_work_are_refused_by_name(llm: LLM, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        llm.chat([USER], GREEDY, **keywords)


def test_a_prompt_is_cut_to_its_last_tokens(llm: LLM) -> None:
    ids = list(range(10, 40))
    by_params, by_keyword, both = (
        llm.generate([ids], SamplingParams(max_tokens=2, truncate_prompt_tokens=5)),
        llm.generate([ids], SamplingParams(max_tokens=2), tokenization_kwargs={"truncate_prompt_tokens": 6}),
        llm.generate([[5] * 700], SamplingParams(max_tokens=10, truncate_prompt_tokens=-1)),
    )
    assert by_params[0].prompt_token_ids == ids[-5:]
    assert by_keyword[0].prompt_token_ids == ids[-6:]
    assert len(both[0].prompt_token_ids) == 512 - 10
    (bad,) = llm.generate([ids], SamplingParams(truncate_prompt_tokens=0))
    assert isinstance(bad.error, RequestError)
    assert bad.error.param == "truncate_prompt_tokens"


def test_texts_as_parameters_want_them(llm: LLM) -> None:
    (plain,) = llm.generate([[4, 5, 6]], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    text = plain.outputs[0].text
    stop = text[4:6]
    (kept,) = llm.generate(
        [[4, 5, 6]],
        SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True),
    )
    assert kept.outputs[0].text == text[: text.find(stop) + len(stop)]
    (silent,) = llm.generate([[4, 5, 6]], SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False))
    assert (silent.outputs[0].text, len(silent.outputs[0].token_ids)) == ("", 3)
    bias = {2: 100.0}  # the end token
    shown = SamplingParams(max_tokens=3, ignore_eos=True, logit_bias=bias, skip_special_tokens=False)
    (special,) = llm.generate([[4, 5, 6]], shown)
    assert special.outputs[0].text == "</s></s></s>"


def test_the_progress_bar_counts_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([TEXT] * 3, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate([TEXT] * 3, GREEDY)
    printed = capsys.readouterr().err
    assert "Processed prompts: 100%" in printed
    assert "3/3" in printed
    assert "toks/s" in printed
    llm.chat([USER], GREEDY, True)
    assert "1/1" in capsys.readouterr().err


class Bar:
    """What a caller may give to see progress in its own way."""

    made: list[Bar] = []  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        self.settings, self.num_updates, self.is_closed = settings, 0, False
        Bar.made.append(self)

    def update(self, count: int) -> None:
        self.num_updates += count

    def close(self) -> None:
        self.is_closed = True


def test_a_bar_of_the_callers_own(llm: LLM) -> None:
    prompts: list[Any] = [TEXT, [400], TEXT]
    llm.generate(prompts, GREEDY, use_tqdm=Bar)
    llm.generate((TEXT for _ in range(2)), GREEDY, use_tqdm=Bar)
    first, second = Bar.made
    assert (first.settings["total"], first.num_updates, first.is_closed) == (3, 3, True)
    assert (second.settings["total"], second.num_updates, second.is_closed) == (None, 2, True)


def test_priorities_change_no_answer(llm: LLM) -> None:
    assert llm.generate([TEXT], GREEDY, priority=[3])[0].outputs == llm.generate([TEXT], GREEDY)[0].outputs


def test_options_of_vllm_that_change_no_answer_are_named_once(tiny: Path) -> None:
    options: dict[str, Any] = {
        "gpu_memory_utilization": 0.9,
        "trust_remote_code": True,
        "tensor_parallel_size": 2,
        "enforce_eager": None,
        "quantization": None,
        "load_format": "auto",
        "kv_cache_memory_bytes": 1 << 22,
        "kv_cache_dtype": "auto",
        "dtype": "bfloat16",
        "seed": None,
        "max_model_len": None,
    }
    with pytest.warns(UserWarning, match="gpu_memory_utilization, trust_remote_code, tensor_parallel_size: without"):
        llm = LLM(str(tiny), max_num_seqs=4, num_threads=1, **options)
    with llm:
        assert llm.config.kv_memory_bytes == 1 << 22
        assert any("tensor_parallel_size" in note for note in llm.notes)
        assert llm.generate([TEXT], GREEDY, use_tqdm=False)[0].error is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "awq"}, "quantization is 'awq'.*int8"),
        ({"enable_lora": True}, "enable_lora.*vLLM"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8'"),
        ({"hf_overrides": {"rope_theta": 1}}, "hf_overrides"),
        ({"device": "cuda"}, "device is 'cuda'"),
        ({"max_num_seq": 4}, "did you mean max_num_seqs"),
        ({"zzz": 1}, "no option 'zzz'"),
    ],
)
def test_options_that_would_change_answers_are_refused_by_name(tiny: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(str(tiny), **options)


def test_another_models_tokenizer(tiny: Path, tmp_path: Path) -> None:
    other = tiny_directory(tmp_path / "other")
    with LLM(str(tiny), tokenizer=str(other), **LIMITS) as llm:
        assert llm.chat([USER], GREEDY)[0].prompt == "<s>user: what is the answer?\nassistant: "


def test_the_tokenizer_is_that_of_transformers_in_use(llm: LLM, tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    theirs.chat_template = TEMPLATE
    ours = llm.get_tokenizer()
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours([TEXT, "a"])["attention_mask"] == theirs([TEXT, "a"])["attention_mask"]
    ids = [1, *ours.encode(TEXT), 2]
    for skips in (False, True):
        assert ours.decode(ids, skip_special_tokens=skips) == theirs.decode(ids, skip_special_tokens=skips)
    assert ours.batch_decode([ids[1:-1], [2]], skip_special_tokens=True) == [TEXT, ""]
    for name in ("eos_token", "bos_token", "eos_token_id", "bos_token_id", "pad_token_id", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.tokenize(TEXT) == theirs.tokenize(TEXT)
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_tokens_to_ids("</s>") == 2
    for adds in (False, True):
        keywords: dict[str, Any] = {"tokenize": False, "add_generation_prompt": adds, "enable_thinking": False}
        assert ours.apply_chat_template([USER], **keywords) == theirs.apply_chat_template([USER], **keywords)
    assert ours.apply_chat_template([USER]) == ours.encode("user: what is the answer?\n")
    with pytest.raises(RequestError):
        ours.apply_chat_template([{"role": "nobody", "content": "x"}])


def test_parameters_by_default(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    (output,) = llm.generate([TEXT], use_tqdm=False)
    assert isinstance(output, RequestOutput)
    assert len(output.outputs[0].token_ids) <= 16


def test_values_that_vllm_leaves_open_are_taken(llm: LLM) -> None:
    nothing: Any = None
    params = SamplingParams(
        max_tokens=4, stop=nothing, stop_token_ids=nothing, bad_words=nothing, logit_bias=nothing, temperature=3.5
    )
    (output,) = llm.generate([TEXT], params, use_tqdm=False)
    assert output.error is None
