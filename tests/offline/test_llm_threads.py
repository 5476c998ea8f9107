"""One `LLM` in several threads and processes: the answers of one after the other, or an error that says what to do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_files import tiny_directory

from blendserve import LLM, RequestOutput, SamplingParams
from blendserve.errors import ConfigError, ExecutorError

LIMITS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "kv_memory_bytes": 1 << 22,
    "num_threads": 2,
}
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
NUM_CALLS = 12


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with LLM(str(tiny_directory(tmp_path / "tiny")), **LIMITS) as llm:
        yield llm


def prompts_of(call: int) -> list[list[int]]:
    random = np.random.default_rng(call)
    return [random.integers(3, 320, 30).tolist() for _ in range(6)]


def tokens_of(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_threads_get_the_answers_that_they_would_get_alone(llm: LLM) -> None:
    alone = [tokens_of(llm.generate(prompts_of(call), PARAMS)) for call in range(NUM_CALLS)]
    with ThreadPoolExecutor(4) as threads:
        together = threads.map(lambda call: tokens_of(llm.generate(prompts_of(call), PARAMS)), range(NUM_CALLS))
        assert list(together) == alone


def test_a_stream_that_another_thread_ends_says_so(llm: LLM) -> None:
    alone = tokens_of(llm.generate(prompts_of(1), PARAMS))
    stream = llm.stream([[5, 6]] * 50, PARAMS, window=4)
    next(stream)
    with ThreadPoolExecutor(1) as threads:
        assert tokens_of(threads.submit(llm.generate, prompts_of(1), PARAMS).result()) == alone
    with pytest.raises(ExecutorError, match="ended this stream"):
        list(stream)


@pytest.mark.parametrize("is_stream", [False, True])
def test_closing_while_others_call_refuses_what_comes_later(llm: LLM, is_stream: bool) -> None:
    expected = [tokens_of(llm.generate(prompts_of(call), PARAMS)) for call in range(NUM_CALLS)]
    has_begun = threading.Event()

    def call(number: int) -> list[tuple[int, ...]] | None:
        has_begun.set()
        prompts = prompts_of(number)
        try:
            return tokens_of(llm.generate(iter(prompts) if is_stream else prompts, PARAMS))
        except ConfigError as error:
            return None if "closed" in str(error) else [(0,)]
        except ExecutorError as error:  # a stream that another call came in between of
            return None if is_stream and "ended this stream" in str(error) else [(0,)]

    with ThreadPoolExecutor(4) as threads:
        found = threads.map(call, range(NUM_CALLS))
        has_begun.wait()
        llm.close()
        assert all(answer in (None, expected[number]) for number, answer in enumerate(found))


def in_a_fork(act: Callable[[], object]) -> str:
    """What `act` raises in a forked process."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            act()
            os.write(writer, b"nothing")
        except ConfigError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(process, 0)
    return text


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
def test_a_forked_process_is_told_to_make_its_own(llm: LLM) -> None:
    alone = tokens_of(llm.generate(prompts_of(0), PARAMS))
    stream = llm.stream([[5, 6]] * 50, PARAMS, window=4)
    next(stream)
    assert "forked from it without its threads; make a new LLM" in in_a_fork(lambda: llm.generate([[5, 6]]))
    assert "was forked from it" in in_a_fork(lambda: next(stream))
    assert in_a_fork(llm.close) == "nothing"
    assert tokens_of(llm.generate(prompts_of(0), PARAMS)) == alone
