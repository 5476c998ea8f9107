"""`LLM`: a model, its engine and its tokenizer in one object, in the shape of vLLM's offline API.

Batch files add a journal around the same engine (`job`); everything else between a prompt and its answer is here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat, zip_longest
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from blendserve.calibration.first_run import expected_work_s
from blendserve.config import Dtype, EngineConfig, KvDtype
from blendserve.costs.stored_calibration import Calibration
from blendserve.costs.this_machine import built_in_cost, cost_of
from blendserve.dialect.defaults import checked_defaults
from blendserve.engine.limits import resolve_limits
from blendserve.engine.planned import run_planned, run_windowed
from blendserve.engine.stats import RunStats
from blendserve.engines.native.loop import calibrate_executor, open_executor, open_loop
from blendserve.errors import ConfigError, ExecutorError, RequestError
from blendserve.host import cache_dir
from blendserve.models.chat_encoder import ChatEncoder
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.generation_config import sampling_defaults
from blendserve.models.hub import resolve
from blendserve.models.load import load_model
from blendserve.offline.assembler import OutputAssembler, given_token_ids
from blendserve.offline.chats import encode_chats
from blendserve.offline.formats import with_format
from blendserve.offline.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import make_plan
from blendserve.planner.policies import POLICY_NAMES
from blendserve.planner.sorting import flatten
from blendserve.planner.table import request_table
from blendserve.planner.tree import PrefixTree
from blendserve.planner.windows import Window
from blendserve.request import EmbeddingParams, Request, SamplingParams, SequenceOutput, TokenIds

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Conversation = Sequence[Message]
Encoded = tuple[str | None, TokenIds | RequestError]

DEFAULT_WINDOW = 4096
"""Prompts that a stream reads and plans at a time: enough to find what they share, few enough to begin soon."""


class LLM:
    """A model on this machine's CPU: loaded once, then asked for answers to prompts.

    - `model`: a directory with config.json and safetensors, a .gguf file, a hub id (owner/name), or a name from
      `blendserve models`. None: the default model, SmolLM2-135M-Instruct.
    - `policy`: the order in which requests run (default: "blend").
    - `kv_memory_bytes`, `max_model_len`, `num_threads`: 0, the default, decides from the machine and the model.
    - `max_num_seqs`: most requests that run at once (default: 256).
    - `max_num_batched_tokens`: most tokens in one step, which is one forward pass (default: 2048).
    - `enable_prefix_caching`, `overlap`, `dtype`, `kv_dtype`, `isa`: as in `NativeSettings`.
    - `seed`: for requests that are sampled and give no seed of their own (default: 0).
    - `generation_config`: as in `NativeSettings`, for calls without sampling parameters.

    Answers depend on the request, the model, `dtype`, `kv_dtype` and `isa`. A sampled request without a seed of its
    own also depends on `seed` and on its place in the list. Nothing else changes answers.
    Calls from several threads take turns. A process that is forked from this one needs an LLM of its own.
    Raises: ConfigError when the model or a limit cannot work.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        policy: str = "blend",
        kv_memory_bytes: int = 0,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int = 0,
        num_threads: int = 0,
        enable_prefix_caching: bool = True,
        overlap: str = "auto",
        dtype: Dtype = "bf16",
        kv_dtype: KvDtype = "bf16",
        isa: str = "auto",
        seed: int = 0,
        generation_config: str = "auto",
    ) -> None:
        if policy not in POLICY_NAMES:
            raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(POLICY_NAMES)}")
        config = EngineConfig(
            kv_memory_bytes=kv_memory_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_threads=num_threads,
            enable_prefix_caching=enable_prefix_caching,
            overlap=overlap,
            dtype=dtype,
            kv_dtype=kv_dtype,
        )
        files = resolve(model, cache_dir())
        self.model = load_model(files)
        self._default_sampling = checked_defaults(sampling_defaults(files, generation_config))
        self._formats = ChatFormats.of(self.model.tokenizer)
        self._chat_encoder = ChatEncoder(self.model.tokenizer)
        self.config = resolve_limits(config, self.model.spec)
        self.policy = policy
        self.seed = seed
        self.notes: tuple[str, ...] = ()
        """Sentences that the user should read, such as why a calibration was not used."""
        self._measured: Calibration | None = None
        self._cost = cost_of(self.model.spec, self.config.num_threads, self._note, dtype, kv_dtype, overlap=overlap)
        self._executor = open_executor(self.model, self.config, isa=isa)
        self._engine = open_loop(self.model, self.config, self._executor)
        self._is_closed = False
        self._lock = threading.RLock()
        self._owner = os.getpid()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts. Each is a text or a list of token ids; outputs are in the order of the prompts.

        `sampling_params`: one for all prompts, or one per prompt. None: `get_default_sampling_params()`. A prompt that
        cannot be answered (it is too long, or a parameter is out of range) comes back with `error` set; the others are
        answered. A generator of prompts is read a window at a time, as `stream` does.
        Raises: ConfigError when the numbers of prompts and parameters differ, or after `close`.
        """
        if not isinstance(prompts, str | Sequence | np.ndarray):
            return _in_order(self.stream(prompts, sampling_params))
        listed = _listed_prompts(prompts)  # type: ignore[arg-type]  # a generator is none of these
        return self._answer(self._encode(listed), _listed_params(self._given(sampling_params), len(listed)))

    def chat(
        self,
        messages: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        response_format: Mapping[str, Any] | type | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several. The model's chat template makes the prompts.

        `response_format`: a pydantic model, a JSON schema, or OpenAI's object of that name, for every answer.
        A conversation that the template does not accept comes back with `error` set; the others are answered. A
        generator of conversations is read a window at a time, as `stream` does.
        Raises: ConfigError when the model has no chat template, or after `close`.
        """
        sampling_params = with_format(sampling_params, response_format)
        if not isinstance(messages, Sequence):
            return _in_order(self.stream(messages, sampling_params))
        listed = _listed_conversations(messages)
        params = _listed_params(self._given(sampling_params), len(listed))
        return self._answer(self._encode(listed, are_chats=True), params)

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without sampling parameters gets: `SamplingParams()` with the values of the model's
        generation_config.json.
        """
        return SamplingParams(**self._default_sampling)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, dimensions: int | None = None
    ) -> list[EmbeddingRequestOutput]:
        """Turn prompts into vectors. Each is a text or a list of token ids; outputs are in the order of the prompts.

        The model's files say which states of it are pooled: that of the last token, which is the default, or the mean
        of all; and whether vectors have length 1, which is the default too. `dimensions`: keep so many of the first
        numbers of each vector, for models that were trained for that. None: all.
        A prompt that cannot be read (it is too long) comes back with `error` set.
        Raises: ConfigError when `dimensions` is out of range, or after `close`.
        """
        most = self.model.spec.hidden_size
        if dimensions is not None and not 1 <= dimensions <= most:
            raise ConfigError(f"dimensions is {dimensions}; it must be between 1 and {most}, all that the model has")
        listed = _listed_prompts(prompts)
        assembler = self._assembler(EmbeddingParams(dimensions))
        outputs = self._answer(self._encode(listed), [SamplingParams(max_tokens=0)] * len(listed), assembler)
        return [_embedded(output, assembler.vectors.get(int(output.request_id))) for output in outputs]

    def stream(
        self,
        prompts: Iterable[Prompt | Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        window: int = DEFAULT_WINDOW,
    ) -> Iterator[RequestOutput]:
        """Answer prompts and conversations, and yield each output when it is complete.

        `request_id` is the place of the prompt, counted from 0. Prompts are read `window` at a time (default: 4096),
        while earlier ones run. Memory holds only unfinished requests, so the prompts may be endless. Calling this LLM
        again cancels an unfinished stream.
        Raises: ConfigError for a window below 1, after `close`, or when prompts and parameters differ in number;
        ExecutorError when another call has cancelled the stream.
        """
        if window < 1:
            raise ConfigError(f"window is {window}; it must be at least 1 prompt")
        self._check_open()
        return self._stream(_paired(prompts, self._given(sampling_params)), window)

    @property
    def stats(self) -> RunStats:
        """Counts and times of the latest call."""
        return self._engine.stats

    def close(self) -> None:
        """Stop the threads and free the memory, once other threads' calls have ended. A closed LLM refuses prompts;
        closing it again does nothing.
        """
        if self._owner != os.getpid():
            return  # the threads are those of the process that we were forked from
        with self._lock:
            self._is_closed = True
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _given(
        self, params: SamplingParams | Iterable[SamplingParams] | None
    ) -> SamplingParams | Iterable[SamplingParams]:
        return self.get_default_sampling_params() if params is None else params

    def _note(self, text: str) -> None:
        self.notes = (*self.notes, text)

    def _calibrate(self, prefixes: Callable[[], PrefixTree], table: RequestTable) -> None:
        """Measure the machine if this is its first long call, and plan with the result from now on."""
        if self._measured is not None:
            return
        spec, config = self.model.spec, self.config

        def expected_s() -> float:
            cost, tree = built_in_cost(spec, config.num_threads, config.dtype, config.kv_dtype), prefixes()
            return expected_work_s(cost, table, tree.num_prompt_tokens - tree.num_unique_tokens)

        self._measured = calibrate_executor(self._executor, config, expected_s, self._note)
        if self._measured is not None:
            self._cost = cost_of(
                spec,
                config.num_threads,
                self._note,
                config.dtype,
                config.kv_dtype,
                self._measured,
                config.overlap,
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this LLM is closed; make a new one")
        if self._owner != os.getpid():
            raise ConfigError(
                f"this LLM was opened by process {self._owner}, and this process ({os.getpid()}) was forked from it "
                "without its threads; make a new LLM here, or start processes with the method spawn"
            )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep other threads out of the engine. Raises: ConfigError when this LLM cannot answer any more."""
        self._check_open()
        with self._lock:
            self._check_open()
            yield

    def _encode(self, prompts: Sequence[Prompt | Conversation], *, are_chats: bool = False) -> list[Encoded]:
        """Text and token ids of every prompt, or why it has none."""
        tokenizer = self.model.tokenizer
        is_chat = [are_chats or _is_conversation(prompt) for prompt in prompts]
        chats = [prompt for prompt, is_one in zip(prompts, is_chat, strict=True) if is_one]
        max_tokens = self.config.max_model_len
        of_chats = iter(encode_chats(self._chat_encoder, self._formats, chats, max_tokens=max_tokens))
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        of_texts = iter(tokenizer.encode_each(texts, max_tokens=max_tokens))
        found: list[Encoded] = []
        for prompt, is_one in zip(prompts, is_chat, strict=True):
            if is_one:
                found.append(next(of_chats))
            elif isinstance(prompt, str):
                found.append((prompt, next(of_texts)))
            else:
                found.append((None, given_token_ids(prompt, self.model.spec.vocab_size)))
        return found

    def _assembler(self, embedding: EmbeddingParams | None = None) -> OutputAssembler:
        return OutputAssembler(
            self.model.tokenizer,
            vocab_size=self.model.spec.vocab_size,
            max_model_len=self.config.max_model_len,
            seed=self.seed,
            embedding=embedding,
        )

    def _answer(
        self,
        encoded: Sequence[Encoded],
        params: Sequence[SamplingParams],
        assembler: OutputAssembler | None = None,
    ) -> list[RequestOutput]:
        """Plan all prompts together, run them, and return their outputs in order."""
        self._check_open()
        assembler = self._assembler() if assembler is None else assembler
        requests: list[Request] = []
        for (text, token_ids), sampling in zip(encoded, params, strict=True):
            requests += assembler.add(text, token_ids, sampling)
        if requests:
            prompts = flatten(request.prompt_token_ids for request in requests)
            tree, table = PrefixTree.from_flat(prompts), _table(requests)
            with self._turn():
                self._calibrate(lambda: tree, table)
                plan = make_plan(tree, table, self._cost, seed=self.seed)
                for output in run_planned(self._engine, requests, plan, self.policy):
                    assembler.apply(output)
        return _in_order(assembler.take())

    def _stream(
        self, pairs: Iterator[tuple[Prompt | Conversation, SamplingParams]], window: int
    ) -> Iterator[RequestOutput]:
        self._check_open()
        assembler = self._assembler()
        windows = self._windows(pairs, window, assembler)
        if (first := next(windows, None)) is not None:
            prompts, table = first.prompts, first.table
            with self._turn():
                self._calibrate(lambda: PrefixTree.from_flat(prompts), table)
            windows = chain([first], windows)
        outputs = run_windowed(self._engine, assembler, windows, self._cost, self.policy)
        try:
            while (output := self._next_of(outputs)) is not None:
                assembler.apply(output)
                yield from assembler.take()
        finally:
            if self._owner == os.getpid():  # else the lock may be held for ever
                with self._lock:
                    outputs.close()
        if assembler.num_unfinished or next(pairs, None) is not None:
            raise ExecutorError(
                "another call of this LLM ended this stream before all of its prompts were answered; read a stream to "
                "its end first, or use another LLM"
            )
        yield from assembler.take()

    def _next_of(self, outputs: Iterator[SequenceOutput]) -> SequenceOutput | None:
        with self._turn():
            return next(outputs, None)

    def _windows(
        self, pairs: Iterator[tuple[Prompt | Conversation, SamplingParams]], size: int, assembler: OutputAssembler
    ) -> Iterator[Window]:
        while taken := list(islice(pairs, size)):
            requests: list[Request] = []
            for (text, token_ids), (_, sampling) in zip(self._encode([p for p, _ in taken]), taken, strict=True):
                requests += assembler.add(text, token_ids, sampling)
            yield Window(flatten(request.prompt_token_ids for request in requests), _table(requests))


def _table(requests: Sequence[Request]) -> RequestTable:
    return request_table(
        (request.num_prompt_tokens for request in requests),
        ((request.sampling, request.max_output_tokens) for request in requests),
    )


def _embedded(output: RequestOutput, vector: NDArray[np.float32] | None) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput([] if vector is None else vector.tolist()),
        prompt_token_ids=output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
        error=output.error,
    )


def _in_order(outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
    return sorted(outputs, key=lambda output: int(output.request_id))


def _paired(
    prompts: Iterable[Prompt | Conversation], params: SamplingParams | Iterable[SamplingParams]
) -> Iterator[tuple[Prompt | Conversation, SamplingParams]]:
    if isinstance(params, SamplingParams):
        yield from zip(prompts, repeat(params))
        return
    missing = object()
    for number, (prompt, sampling) in enumerate(zip_longest(prompts, params, fillvalue=missing)):
        if prompt is missing or sampling is missing:
            few, more = ("prompts", "sampling parameters") if prompt is missing else ("sampling parameters", "prompts")
            raise ConfigError(f"there are {number} {few} and more {more}; give one for all prompts, or one per prompt")
        yield prompt, sampling  # type: ignore[misc]


def _is_conversation(prompt: Prompt | Conversation) -> bool:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _listed_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(prompt, int | np.integer) for prompt in prompts):
        return [prompts]  # type: ignore[list-item]  # one prompt, given as its token ids
    return list(prompts)  # type: ignore[arg-type]


def _listed_params(params: SamplingParams | Iterable[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    listed = list(params)
    if len(listed) != count:
        raise ConfigError(f"{len(listed)} sampling parameters for {count} prompts; give one for all or one per prompt")
    return listed


def _listed_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    if len(messages) and isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]
