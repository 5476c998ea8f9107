"""A vLLM without a model: the surface of `LLMEngine` that the adapter uses, with vLLM's way of filling a step.

Answers are made up, the same for the same prompt. It can refuse requests, die at a step, and die of a request; the
tests use it, and so may yours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from blendserve.engine.keys import block_keys
from blendserve.engines.vllm.counters import VllmCounters
from blendserve.engines.vllm.queue import PolicyQueue
from blendserve.errors import ConfigError
from blendserve.models.tool_formats.format import ParsedAnswer, Tool, ToolCall

VOCABULARY = 256
EMBEDDING_WIDTH = 4
LETTERS = "ab12cd34"  # what vLLM puts behind ids


class FakeEngineDeadError(Exception):
    """The engine is gone."""


@dataclass(slots=True)
class FakeVllm:
    """A `VllmApi`. `dies_at` counts the steps of all engines together, as does `ends_at`, where an engine takes its
    requests down before it dies, as vLLM's own process does on a signal; `dies_of` and `refuses` are request ids.

    `has_own_process`: its scheduler is out of reach. `opened` lists the arguments of every engine.
    """

    num_blocks: int = 65
    block_size: int = 32
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512
    dies_at: frozenset[int] = frozenset()
    ends_at: frozenset[int] = frozenset()
    dies_of: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    has_own_process: bool = False
    version: str = "0.32.0"
    num_steps: int = 0
    opened: list[Mapping[str, Any]] = field(default_factory=list)
    engines: list[FakeEngine] = field(default_factory=list)
    told: list[Mapping[str, Any] | None] = field(default_factory=list)

    def open_engine(self, arguments: Mapping[str, Any], counters: VllmCounters) -> Any:
        self.opened.append(arguments)
        self.engines.append(FakeEngine(self, counters, has_policy_queue="scheduler_cls" in arguments))
        return self.engines[-1]

    def close_engine(self, engine: Any) -> None:
        engine.is_closed = True

    def scheduler_of(self, engine: Any) -> Any | None:
        return None if self.has_own_process else engine.scheduler

    def sampling_params(self, structure: Mapping[str, Any] | None, *, is_streamed: bool = False, **values: Any) -> Any:
        return SimpleNamespace(structure=structure, is_streamed=is_streamed, **values)

    def embedding_params(self, dimensions: int | None) -> Any:
        return SimpleNamespace(dimensions=dimensions, max_tokens=0)

    def lora_request(self, name: str, number: int, path: str) -> Any:
        return SimpleNamespace(name=name, number=number, path=path)

    def tokens_prompt(self, token_ids: Sequence[int]) -> Any:
        return list(token_ids)

    def chat_prompt(
        self,
        engine: Any,  # noqa: ARG002
        messages: Sequence[Mapping[str, Any]],
        template: Mapping[str, Any] | None = None,
    ) -> Any:
        self.told.append(template)
        text = str(messages)
        if "broken" in text:
            raise OSError("cannot identify image file")
        return list(text.encode())

    def check_parser(self, name: str) -> None:
        if name != "shout":
            raise ConfigError(f"there is no parser {name}")

    def parse_calls(self, name: str, model: str, text: str, tools: Sequence[Tool]) -> ParsedAnswer:  # noqa: ARG002
        """Parser "shout" takes a text in capitals for the name of a function; other parsers fail."""
        if name != "shout":
            raise ValueError(text)
        return ParsedAnswer("", (ToolCall(text.lower(), "{}"),)) if text.isupper() else ParsedAnswer(text)

    def reasoning_marks(self, name: str, model: str) -> tuple[str, str]:  # noqa: ARG002
        if name != "murmur":
            raise ConfigError(f"there is no parser {name}")
        return "(", ")"

    def parse_reasoning(self, name: str, model: str, text: str) -> tuple[str, str]:  # noqa: ARG002
        """Parser "murmur" takes what stands before the first closing bracket; it fails where there is none."""
        end = text.index(")")
        return text[:end].removeprefix("("), text[end + 1 :]

    def device_name(self) -> str:
        return "fake"

    def is_death(self, error: Exception) -> bool:
        return isinstance(error, FakeEngineDeadError)


@dataclass(slots=True, eq=False)
class FakeRequest:
    """A request inside, with the names that vLLM's own has."""

    request_id: str
    prompt: list[int]
    params: Any
    lora_request: Any | None
    status: Any = field(default_factory=lambda: SimpleNamespace(name="WAITING"))
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_blocks: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def external_id(self) -> str:
        return self.request_id.partition("-")[0]

    @property
    def target(self) -> int:
        """Output tokens that it will have."""
        limit: int = self.params.max_tokens
        can_stop = hasattr(self.params, "ignore_eos") and not self.params.ignore_eos
        return min(limit, 1 + sum(self.prompt) % 40) if can_stop else limit


class FakeQueue(deque[FakeRequest]):
    """First come, first served."""

    def add_request(self, request: FakeRequest) -> None:
        self.append(request)

    def peek_request(self) -> FakeRequest:
        return self[0]

    def pop_request(self) -> FakeRequest:
        return self.popleft()

    def prepend_request(self, request: FakeRequest) -> None:
        self.appendleft(request)

    def remove_requests(self, requests: Iterable[FakeRequest]) -> None:
        for request in set(requests) & set(self):
            self.remove(request)


class FakeScheduler:
    """Running requests first, then waiting ones while tokens, slots and blocks last; the youngest is preempted."""

    def __init__(self, api: FakeVllm, *, has_policy_queue: bool) -> None:
        self.current_step = 0
        self.max_num_running_reqs = api.max_num_seqs
        self.max_num_scheduled_tokens = api.max_num_batched_tokens
        self.running: list[FakeRequest] = []
        self.waiting: Any = PolicyQueue() if has_policy_queue else FakeQueue()
        self.num_free = api.num_blocks - 1
        self.num_preempted = self.num_queried = self.num_hits = 0
        self.kv_cache_manager = SimpleNamespace(
            block_pool=SimpleNamespace(get_num_free_blocks=lambda: self.num_free),
            get_computed_blocks=lambda request: ((), self.num_cached(request), 0),
        )
        self._block_size = api.block_size
        self._known: set[Any] = set()

    def num_cached(self, request: FakeRequest) -> int:
        """Tokens of full blocks at its beginning that were computed before, but never its last token."""
        keys = list(self._keys(request))[: (request.num_prompt_tokens - 1) // self._block_size]
        known = [key in self._known for key in keys]
        return (known.index(False) if False in known else len(known)) * self._block_size

    def schedule(self) -> dict[str, int]:
        """Tokens of this step by request id."""
        self.current_step += 1
        self.num_preempted = self.num_queried = self.num_hits = 0
        budget, scheduled = self.max_num_scheduled_tokens, {}
        for request in tuple(self.running):
            if request not in self.running:
                continue
            count = min(self._left(request), budget)
            while count and not self._allocate(request, count):
                self._preempt(self.running[-1])
                if request not in self.running:
                    count = 0
            if count:
                scheduled[request.request_id] = count
                budget -= count
        while not self.num_preempted and budget and len(self.running) < self.max_num_running_reqs and self.waiting:
            request = self.waiting.peek_request()
            request.num_computed_tokens = request.num_cached_tokens = self.num_cached(request)
            count = min(self._left(request), budget)
            if not self._allocate(request, count):
                request.num_computed_tokens = 0
                break
            self.waiting.pop_request()
            request.status.name = "RUNNING"
            self.running.append(request)
            self.num_queried += request.num_prompt_tokens
            self.num_hits += request.num_cached_tokens
            scheduled[request.request_id] = count
            budget -= count
        return scheduled

    def apply(self, scheduled: Mapping[str, int]) -> list[FakeRequest]:
        """Move everyone on; returns those that have ended, out of their memory."""
        for request in self.running:
            request.num_computed_tokens += scheduled.get(request.request_id, 0)
            if request.num_computed_tokens >= request.num_prompt_tokens:
                self._known.update(self._keys(request))
            if self._left(request) == 0 and request.params.max_tokens:
                request.num_output_tokens += 1
        ended = [
            request
            for request in self.running
            if request.num_computed_tokens >= request.num_prompt_tokens and request.num_output_tokens >= request.target
        ]
        for request in ended:
            self.free(request)
        return ended

    def free(self, request: FakeRequest) -> None:
        self.running.remove(request)
        self.num_free += request.num_blocks
        request.num_blocks = 0

    def _left(self, request: FakeRequest) -> int:
        return request.num_prompt_tokens + request.num_output_tokens - request.num_computed_tokens

    def _keys(self, request: FakeRequest) -> Iterable[Any]:
        return block_keys(np.array(request.prompt, np.int32), self._block_size)

    def _allocate(self, request: FakeRequest, count: int) -> bool:
        wanted = -(-(request.num_computed_tokens + count) // self._block_size) - request.num_blocks
        if wanted > self.num_free:
            return False
        self.num_free -= max(wanted, 0)
        request.num_blocks += max(wanted, 0)
        return True

    def _preempt(self, request: FakeRequest) -> None:
        self.free(request)
        request.status.name = "PREEMPTED"
        request.num_computed_tokens = 0
        self.num_preempted += 1
        self.waiting.prepend_request(request)


class FakeEngine:
    """What `LLMEngine` offers."""

    def __init__(self, api: FakeVllm, counters: VllmCounters, *, has_policy_queue: bool) -> None:
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=api.num_blocks, block_size=api.block_size),
            scheduler_config=SimpleNamespace(
                max_num_seqs=api.max_num_seqs, max_num_batched_tokens=api.max_num_batched_tokens
            ),
        )
        self.scheduler = FakeScheduler(api, has_policy_queue=has_policy_queue)
        self.is_closed = False
        self.order: list[str] = []
        """Ids of `add_request`, in order."""
        self.aborted: list[str] = []
        self._api = api
        self._counters = counters
        self._requests: dict[str, FakeRequest] = {}

    def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any | None = None) -> str:
        self._check_alive()
        if request_id in self._api.refuses:
            raise ValueError(f"request {request_id} is not to the engine's liking")
        assert request_id not in self._requests, f"{request_id} is inside already"
        request = FakeRequest(f"{request_id}-{LETTERS}", prompt, params, lora_request)
        self._requests[request_id] = request
        self.order.append(request_id)
        self.scheduler.waiting.add_request(request)
        return request.request_id

    def step(self) -> list[Any]:
        self._check_alive()
        scheduler = self.scheduler
        if not scheduler.running and not len(scheduler.waiting):
            return []
        scheduled = scheduler.schedule()
        self._api.num_steps += 1
        ids = {request.external_id for request in scheduler.running}
        if self._api.num_steps in self._api.dies_at or ids & self._api.dies_of:
            self.is_closed = True
            raise FakeEngineDeadError("the device fell off the bus")
        if self._api.num_steps in self._api.ends_at:
            self.is_closed = True
            return [_output(request, finish_reason="abort") for request in scheduler.running]
        ended = scheduler.apply(scheduled)
        self._record()
        for request in ended:
            del self._requests[request.external_id]
        streamed = [
            _output(request, is_finished=False)
            for request in scheduler.running
            if getattr(request.params, "is_streamed", False) and request.num_output_tokens
        ]
        return streamed + [_output(request) for request in ended]

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            request = self._requests.pop(request_id)
            if request in self.scheduler.running:
                self.scheduler.free(request)
            else:
                self.scheduler.waiting.remove_requests([request])

    def _record(self) -> None:
        scheduler = self.scheduler
        self._counters.record(
            SimpleNamespace(
                kv_cache_usage=1 - scheduler.num_free / (self._api.num_blocks - 1),
                num_running_reqs=len(scheduler.running),
                prefix_cache_stats=SimpleNamespace(queries=scheduler.num_queried, hits=scheduler.num_hits),
                perf_stats=None,
            ),
            SimpleNamespace(num_preempted_reqs=scheduler.num_preempted),
        )

    def _check_alive(self) -> None:
        if self.is_closed:
            raise FakeEngineDeadError("the engine is closed")


def answer_to(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that every fake engine gives."""
    first = sum(prompt)
    return [(first + 7 * position) % VOCABULARY for position in range(count)]


def _output(request: FakeRequest, finish_reason: str | None = None, *, is_finished: bool = True) -> Any:
    common = {
        "request_id": request.external_id,
        "finished": is_finished,
        "prompt_token_ids": request.prompt,
        "num_cached_tokens": request.num_cached_tokens,
    }
    if not request.params.max_tokens:
        vector = [float(sum(request.prompt) % (place + 2)) for place in range(EMBEDDING_WIDTH)]
        return SimpleNamespace(outputs=SimpleNamespace(data=vector[: request.params.dimensions]), **common)
    choice = SimpleNamespace(
        token_ids=answer_to(request.prompt, request.num_output_tokens),
        finish_reason=finish_reason or ("length" if request.num_output_tokens >= request.params.max_tokens else "stop"),
        stop_reason=None,
        logprobs=None,
    )
    scored = [{token: SimpleNamespace(logprob=-float(token), rank=1)} for token in request.prompt]
    is_scored = getattr(request.params, "prompt_logprobs", None) is not None
    return SimpleNamespace(outputs=[choice], prompt_logprobs=[None, *scored[1:]] if is_scored else None, **common)
