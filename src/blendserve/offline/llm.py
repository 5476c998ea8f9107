"""`LLM`: a model, its engine and its tokenizer in one object, in the shape of vLLM's offline API.

Batch files add a journal around the same engine (`job`); everything else between a prompt and its answer is here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from blendserve.config import EngineConfig
from blendserve.dialect.defaults import checked_defaults
from blendserve.engine.limits import resolve_limits
from blendserve.engine.stats import RunStats
from blendserve.errors import ConfigError, ExecutorError
from blendserve.host import cache_dir
from blendserve.models.generation_config import sampling_defaults
from blendserve.models.hub import resolve
from blendserve.models.load import load_model, load_tokenizer
from blendserve.offline.assembler import OutputAssembler, table_of
from blendserve.offline.encoder import Asked, PromptEncoder, asked_of_chat
from blendserve.offline.formats import with_format
from blendserve.offline.options import dtype_of, kv_dtype_of, read_options
from blendserve.offline.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput, in_order
from blendserve.offline.progress import ProgressBar, UseTqdm
from blendserve.offline.prompts import (
    Conversation,
    Message,
    Prompt,
    are_listed,
    check_prompts,
    listed_conversations,
    listed_params,
    listed_prompts,
    paired,
    read_tokenization,
    refuse_lora,
)
from blendserve.offline.runner import Runner
from blendserve.offline.tokenizer import LLMTokenizer
from blendserve.planner.policies import POLICY_NAMES
from blendserve.planner.sorting import flatten
from blendserve.planner.windows import Window
from blendserve.request import EmbeddingParams, Request, SamplingParams, SequenceOutput

DEFAULT_WINDOW = 4096
"""Prompts that a stream reads and plans at a time: enough to find what they share, few enough to begin soon."""

_Params = SamplingParams | Iterable[SamplingParams] | None


class LLM:
    """A model on this machine's CPU: loaded once, then asked for answers to prompts.

    - `model`: a directory with config.json and safetensors, a .gguf file, a hub id (owner/name), or a name from
      `blendserve models`. None: the default model, SmolLM2-135M-Instruct.
    - `revision`: commit, tag or branch of a hub model. None: the newest.
    - `tokenizer`: another model whose tokenizer is used. None: the model's own.
    - `policy`: the order in which requests run (default: "blend").
    - `kv_memory_bytes`, `max_model_len`, `num_threads`: 0 or None decides from the machine and the model (default).
    - `max_num_seqs`: most requests that run at once (default: 256).
    - `max_num_batched_tokens`: most tokens in one step, which is one forward pass (default: 2048).
    - `enable_prefix_caching`, `overlap`, `dtype`, `kv_dtype`, `isa`: as in `NativeSettings`. vLLM's "auto" and
      "bfloat16" are "bf16".
    - `seed`: for requests that are sampled and give no seed of their own (default: 0).
    - `generation_config`: as in `NativeSettings`, for calls without sampling parameters.
    - `options`: other options of vLLM's `LLM`. `kv_cache_memory_bytes` and `kv_cache_dtype` are `kv_memory_bytes` and
      `kv_dtype`. Those that change no answer, such as `gpu_memory_utilization`, have no effect: `notes` and a warning
      name them. Those that would change answers are refused.

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
        revision: str | None = None,
        tokenizer: str | None = None,
        kv_memory_bytes: int | None = 0,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = 0,
        num_threads: int | None = 0,
        enable_prefix_caching: bool | None = None,
        overlap: str = "auto",
        dtype: str = "bf16",
        kv_dtype: str = "bf16",
        isa: str = "auto",
        seed: int | None = 0,
        generation_config: str = "auto",
        **options: Any,
    ) -> None:
        if policy not in POLICY_NAMES:
            raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(POLICY_NAMES)}")
        memory = options.pop("kv_cache_memory_bytes", None) or kv_memory_bytes
        kv_dtype = options.pop("kv_cache_dtype", None) or kv_dtype
        note = read_options(options, known=tuple(inspect.signature(LLM).parameters))
        config = EngineConfig(
            kv_memory_bytes=memory or 0,
            max_num_seqs=256 if max_num_seqs is None else max_num_seqs,
            max_num_batched_tokens=2048 if max_num_batched_tokens is None else max_num_batched_tokens,
            max_model_len=max_model_len or 0,
            num_threads=num_threads or 0,
            enable_prefix_caching=enable_prefix_caching is not False,
            overlap=overlap,
            dtype=dtype_of(dtype),
            kv_dtype=kv_dtype_of(kv_dtype),
        )
        files = resolve(model, cache_dir(), revision=revision)
        self.model = load_model(files)
        if tokenizer is not None and tokenizer != model:
            self.model = replace(self.model, tokenizer=load_tokenizer(resolve(tokenizer, cache_dir())))
        self._default_sampling = checked_defaults(sampling_defaults(files, generation_config))
        self.config = resolve_limits(config, self.model.spec)
        self._encoder = PromptEncoder(self.model.tokenizer, self.model.spec.vocab_size, self.config.max_model_len)
        self.policy = policy
        self.seed = seed or 0
        self.notes: tuple[str, ...] = () if note is None else (note,)
        """Sentences that the user should read, such as why a calibration was not used."""
        if note is not None:
            warnings.warn(note, stacklevel=2)
        self._runner = Runner(self.model, self.config, policy=policy, isa=isa, seed=self.seed, note=self._note)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] | None = None,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt_token_ids: Any = None,
    ) -> list[RequestOutput]:
        """Answer prompts, in the shapes of vLLM: a text, a list of token ids, `{"prompt": text}`,
        `{"prompt_token_ids": ids}`, or a list of those. Outputs are in the order of the prompts.

        - `sampling_params`: one for all prompts, or one per prompt. None: `get_default_sampling_params()`.
        - `use_tqdm`: show a progress bar on standard error (default: true); or what makes the bar.
        - `tokenization_kwargs`: `add_special_tokens` and `truncate_prompt_tokens` for all prompts.
        - `prompt_token_ids`: prompts as token ids, as older versions of vLLM take them; `prompts` is left out then.
        - `priority` has no effect on answers. `lora_request` is refused: this engine has no adapters.

        A prompt that cannot be answered (it is too long, or a parameter is out of range) comes back with `error` set;
        the others are answered. A generator of prompts is read a window at a time, as `stream` does.
        Raises: ConfigError when the numbers of prompts and parameters differ, or after `close`.
        """
        refuse_lora(lora_request)
        del priority  # the planner orders the work
        if (prompts is None) == (prompt_token_ids is None):
            raise ConfigError("give prompts: texts, token ids, or a list of those")
        asked = Asked(tokenization=read_tokenization(tokenization_kwargs))
        given: Any = prompts if prompt_token_ids is None else prompt_token_ids
        check_prompts(given)
        if not are_listed(given):
            return self._read_all(given, sampling_params, asked, use_tqdm)
        return self._answer(listed_prompts(given), sampling_params, asked, use_tqdm)

    def chat(
        self,
        messages: Message | Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        *,
        response_format: Mapping[str, Any] | type | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several. The model's chat template makes the prompts.

        - `sampling_params`, `use_tqdm`, `lora_request`, `tokenization_kwargs`: as in `generate`.
        - `chat_template`: the text of another template. None: the model's own.
        - `add_generation_prompt`: the template begins the answer. None: unless `continue_final_message`.
        - `continue_final_message`: the answer goes on with the last message (default: false).
        - `tools`: functions that the template describes to the model, in OpenAI's form (default: none).
        - `chat_template_kwargs`: variables of the template, such as `{"enable_thinking": False}` (default: none).
        - `response_format`: a pydantic model, a JSON schema, or OpenAI's object of that name, for every answer.
        - `chat_template_content_format` and `mm_processor_kwargs` have no effect: what form of content a template
          takes is found out, and this engine reads text only.

        A conversation that the template does not accept comes back with `error` set; the others are answered. A
        generator of conversations is read a window at a time, as `stream` does.
        Raises: ConfigError when the model has no chat template, or after `close`.
        """
        refuse_lora(lora_request)
        del mm_processor_kwargs
        params = with_format(self._defaulted(sampling_params), response_format)
        asked = asked_of_chat(
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            tokenization_kwargs=tokenization_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        if not are_listed(messages):
            return self._read_all(messages, params, asked, use_tqdm)
        return self._answer(listed_conversations(messages), params, asked, use_tqdm)

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
        check_prompts(prompts)
        assembler = self._assembler(EmbeddingParams(dimensions))
        read_only = SamplingParams(max_tokens=0)
        outputs = self._answer(listed_prompts(prompts), read_only, Asked(), use_tqdm=False, assembler=assembler)
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
        self._runner.check_open()
        return self._stream(paired(prompts, self._defaulted(sampling_params)), window, Asked())

    def get_tokenizer(self) -> LLMTokenizer:
        """The model's tokenizer, with the methods of transformers' tokenizers that prompts are made with."""
        return LLMTokenizer(self.model.tokenizer, self._encoder)

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without sampling parameters gets: `SamplingParams()` with the values of the model's
        generation_config.json.
        """
        return SamplingParams(**self._default_sampling)

    @property
    def stats(self) -> RunStats:
        """Counts and times of the latest call."""
        return self._runner.stats

    def close(self) -> None:
        """Stop the threads and free the memory, once other threads' calls have ended. A closed LLM refuses prompts;
        closing it again does nothing.
        """
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _note(self, text: str) -> None:
        self.notes = (*self.notes, text)

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
        prompts: Sequence[Prompt | Conversation],
        given: _Params,
        asked: Asked,
        use_tqdm: UseTqdm,
        assembler: OutputAssembler | None = None,
    ) -> list[RequestOutput]:
        """Plan all prompts together, run them, and return their outputs in order."""
        self._runner.check_open()
        assembler = self._assembler() if assembler is None else assembler
        requests: list[Request] = []
        params = listed_params(self._defaulted(given), len(prompts))
        for (text, token_ids), sampling in self._encoder.encode(prompts, params, asked):
            requests += assembler.add(text, token_ids, sampling)
        outputs, progress = assembler.take(), ProgressBar(use_tqdm, len(prompts))
        progress.add(outputs)

        def apply(output: SequenceOutput) -> None:
            assembler.apply(output)
            whole = assembler.take()
            progress.add(whole)
            outputs.extend(whole)

        try:
            if requests:
                self._runner.run(requests, apply)
        finally:
            progress.close()
        return in_order(outputs)

    def _read_all(self, prompts: Iterable[Any], given: _Params, asked: Asked, use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Answer prompts that are made one by one."""
        progress, outputs = ProgressBar(use_tqdm, None), []
        try:
            for output in self._stream(paired(prompts, self._defaulted(given)), DEFAULT_WINDOW, asked):
                outputs.append(output)
                progress.add([output])
        finally:
            progress.close()
        return in_order(outputs)

    def _defaulted(self, given: _Params) -> SamplingParams | Iterable[SamplingParams]:
        return self.get_default_sampling_params() if given is None else given

    def _stream(
        self, pairs: Iterator[tuple[Prompt | Conversation, SamplingParams]], window: int, asked: Asked
    ) -> Iterator[RequestOutput]:
        self._runner.check_open()
        assembler = self._assembler()
        with closing(self._runner.run_windows(self._windows(pairs, window, assembler, asked), assembler)) as outputs:
            for output in outputs:
                assembler.apply(output)
                yield from assembler.take()
        if assembler.num_unfinished or next(pairs, None) is not None:
            raise ExecutorError(
                "another call of this LLM ended this stream before all of its prompts were answered; read a stream to "
                "its end first, or use another LLM"
            )
        yield from assembler.take()

    def _windows(
        self,
        pairs: Iterator[tuple[Prompt | Conversation, SamplingParams]],
        size: int,
        assembler: OutputAssembler,
        asked: Asked,
    ) -> Iterator[Window]:
        while taken := list(islice(pairs, size)):
            requests: list[Request] = []
            prompts, params = zip(*taken, strict=True)
            for (text, token_ids), sampling in self._encoder.encode(prompts, params, asked):
                requests += assembler.add(text, token_ids, sampling)
            yield Window(flatten(request.prompt_token_ids for request in requests), table_of(requests))


def _embedded(output: RequestOutput, vector: NDArray[np.float32] | None) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput([] if vector is None else vector.tolist()),
        prompt_token_ids=output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
        error=output.error,
    )
