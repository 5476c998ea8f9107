"""Calls of `LLM` in the shapes that vLLM's callers use, and in shapes that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from reported_lines import LIMITS, SHORT, part, user
from tiny_files import tiny_directory

from blendserve import LLM
from blendserve.errors import ConfigError

PROMPT = "<s>user: a river\nassistant: "


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(str(tiny_directory(tmp_path_factory.mktemp("llm") / "tiny")), **LIMITS) as llm:
        yield llm


class ClientMessage:
    """As pydantic makes them, which OpenAI's client does."""

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {"role": "user", "content": "a river"}


NO_PROMPTS: Any = [None]
WHOLE_FLOATS: Any = [[5.0, 6.0]]


def from_client() -> Any:
    return [ClientMessage()]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate(5, SHORT), "prompts is 5; give a text, a list of token ids"),
        (lambda llm: llm.generate(b"a river", SHORT), "prompts is b'a river'; give a text"),
        (lambda llm: llm.generate(["a", "b"], [SHORT, None]), "sampling_params is null; give a SamplingParams"),
        (lambda llm: llm.generate("a", {"max_tokens": 2}), "max_tokens.*; give a SamplingParams"),
        (lambda llm: llm.generate((text for text in "ab"), [{}, {}]), "sampling_params is {}; give"),
        (lambda llm: llm.chat("a river", SHORT), "messages is 'a river'; write it as"),
    ],
)
def test_calls_of_no_shape_are_one_error(llm: LLM, call: Callable[[LLM], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(llm)


CALLS: dict[str, tuple[Callable[[LLM], Any], str | None]] = {  # the call, and the prompt or words of its error
    "a text": (lambda llm: llm.generate("a river", SHORT), "a river"),
    "an object": (lambda llm: llm.generate({"prompt": "a river"}, SHORT), "a river"),
    "a list of objects": (lambda llm: llm.generate([{"prompt": "a river"}], SHORT), "a river"),
    "no bar": (lambda llm: llm.generate("a river", SHORT, use_tqdm=False), "a river"),
    "a message to generate": (lambda llm: llm.generate([user("a river")[0]], SHORT), "LLM.chat"),
    "a misspelt object": (lambda llm: llm.generate([{"promt": "a river"}], SHORT), "prompt_token_ids"),
    "one message": (lambda llm: llm.chat(user("a river")[0], SHORT), PROMPT),
    "parts": (lambda llm: llm.chat(user([part("a river")]), SHORT), PROMPT),
    "bare texts as parts": (lambda llm: llm.chat(user(["a river"]), SHORT), PROMPT),
    "no prompt": (lambda llm: llm.generate(NO_PROMPTS, SHORT), "the prompt is None; it must be a text"),
    "ids of a table's column": (lambda llm: llm.generate(WHOLE_FLOATS, SHORT), None),
    "an object of a client": (lambda llm: llm.chat(from_client(), SHORT), PROMPT),
    "a conversation of such objects": (lambda llm: llm.chat([from_client()], SHORT), PROMPT),
    "no content": (lambda llm: llm.chat(user(None), SHORT), "content is null"),
    "misspelt content": (lambda llm: llm.chat([{"role": "user", "contents": "a river"}], SHORT), "content"),
    "variables": (
        lambda llm: llm.chat(user("a river"), SHORT, chat_template_kwargs={"enable_thinking": False}),
        PROMPT,
    ),
}


@pytest.mark.parametrize(("call", "outcome"), CALLS.values(), ids=CALLS)
def test_calls_have_the_shapes_of_vllm(llm: LLM, call: Callable[[LLM], Any], outcome: str | None) -> None:
    (output,) = call(llm)
    if output.error is None:
        assert output.prompt == outcome
        assert output.outputs[0].token_ids
    else:
        assert outcome is not None
        assert outcome in str(output.error)


def test_threads_share_one_llm(llm: LLM) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate(["a river", "a lake"] * 5, SHORT, use_tqdm=False),
        lambda: llm.chat([user("a river")] * 5, SHORT, use_tqdm=False),
        lambda: llm.generate(["a town"] * 7, SHORT, use_tqdm=False),
    ]
    alone = [[output.outputs for output in call()] for call in calls]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda call: [output.outputs for output in call()], calls * 3))
    assert found == alone * 3
