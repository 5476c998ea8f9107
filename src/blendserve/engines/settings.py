"""What an engine is opened from: one frozen value per engine, which pickles and is checked when it is made.

A limit of None was not given: the engine decides. For the native engine the defaults are those of `EngineConfig`; vLLM
keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from blendserve.config import Dtype, EngineConfig
from blendserve.errors import ConfigError

Placement = Literal["spread", "pack"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Task = Literal["generate", "embed"]
TASKS: tuple[Task, ...] = get_args(Task)
VllmScheduler = Literal["front", "blend"]
VLLM_SCHEDULERS: tuple[VllmScheduler, ...] = get_args(VllmScheduler)

ISA_NAMES = ("auto", "portable", "avx2", "avxvnni", "avx512vnni", "avx512bf16")
MAX_RESTARTS = 3


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _check_at_least(settings: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}, or None to leave it open")


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"memory_share is {share}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class NativeSettings:
    """This machine's CPU. `model` is a directory, a .gguf file, a hub id, or a name from `blendserve models`; None is
    the default model.

    `num_threads`: None is every core that this process may use. `overlap`, `dtype` and `isa`: see `blendserve run
    --help-all`. `window`: plan so many requests at a time instead of the whole file. `memory_share`: the part of the
    machine's memory that may be taken, less than 1 where others run beside this engine. `revision`: commit, tag or
    branch of a hub model.
    Raises: ConfigError for a value that cannot work.
    """

    model: str | None = None
    max_model_len: int | None = None
    kv_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_threads: int | None = None
    enable_prefix_caching: bool = True
    overlap: str = "auto"
    dtype: Dtype = "bf16"
    isa: str = "auto"
    window: int | None = None
    memory_share: float = 1.0
    revision: str | None = None

    def __post_init__(self) -> None:
        _check_choice("isa", self.isa, ISA_NAMES)
        _check_at_least(self, 1, "window")
        self.config()

    def config(self) -> EngineConfig:
        """The same limits for the engine's loop."""
        names = {field.name for field in fields(EngineConfig)}
        given = {name: getattr(self, name) for name in sorted(names)}
        return EngineConfig(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """vLLM in this process. `model` is a Hugging Face directory or a hub id.

    `task`: "generate", or "embed" to answer /v1/embeddings. `adapters`: paths of LoRA adapters by the name that lines
    give as their model. `scheduler`: "front" hands requests in from outside; "blend" has vLLM's scheduler ask the
    policy. `own_process`: run vLLM in a subprocess, so that its crash does not stop the job. `arguments`: any other
    fields of vLLM's EngineArgs. `num_threads` is for vLLM on a CPU. `revision`: commit, tag or branch of a hub model.
    `image_domains`: hosts that pictures of lines may be fetched from.
    Raises: ConfigError for a value that cannot work.
    """

    model: str
    max_model_len: int | None = None
    kv_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_threads: int | None = None
    enable_prefix_caching: bool = True
    task: Task = "generate"
    adapters: Mapping[str, str] = field(default_factory=dict)
    scheduler: VllmScheduler = "front"
    own_process: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    memory_share: float = 1.0
    revision: str | None = None
    image_domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("vLLM needs a model: a Hugging Face directory, or a hub id (owner/name)")
        _check_choice("task", self.task, TASKS)
        _check_choice("scheduler", self.scheduler, VLLM_SCHEDULERS)
        _check_at_least(self, 1, "max_num_seqs", "max_num_batched_tokens")
        _check_at_least(self, 0, "max_model_len", "kv_memory_bytes", "num_threads")
        _check_share(self.memory_share)


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """An OpenAI-compatible server at `base_url`. `model` is the name that is sent; None leaves each line's own.

    The key comes from BLENDSERVE_API_KEY, else OPENAI_API_KEY, of the process that opens the engine. `tokenizer` names
    the model whose tokenizer counts prompt tokens; None takes that of `model` where it is on this machine, else four
    bytes count as a token. `kv_tokens` is what the server's KV memory holds, None where it is not known.
    `request_timeout_s` is for one try of a request, to the last byte of its answer; `max_attempts` are tries before a
    request is an error; `max_outage_s` is how long to wait for a server that is down.
    Raises: ConfigError for a value that cannot work.
    """

    base_url: str
    model: str | None = None
    tokenizer: str | None = None
    max_inflight: int = 64
    kv_tokens: int | None = None
    request_timeout_s: float = 600.0
    max_attempts: int = 6
    max_outage_s: float = 600.0

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "max_inflight", "kv_tokens", "max_attempts")
        for name in ("request_timeout_s", "max_outage_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be a number of seconds above 0")


SingleSettings = NativeSettings | VllmSettings | HttpSettings


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """`num_replicas` copies of `engine` on Ray, each with a part of the requests.

    `ray_address` is a running cluster, such as "auto"; None starts Ray on this machine. `num_cpus` of each replica:
    None is the engine's threads, else as many as leave a place for all. `num_gpus` of each are on one machine.
    `placement`: "spread" over as many machines as there are, or "pack" on few. `max_restarts`: how often a replica's
    process is started again before its requests go to the others.
    Raises: ConfigError for a value that cannot work.
    """

    num_replicas: int
    ray_address: str | None = None
    num_cpus: float | None = None
    num_gpus: float = 0.0
    placement: Placement = "spread"
    max_restarts: int = MAX_RESTARTS
    engine: SingleSettings = NativeSettings()

    def __post_init__(self) -> None:
        _check_choice("placement", self.placement, PLACEMENTS)
        _check_at_least(self, 1, "num_replicas")
        _check_at_least(self, 0, "num_cpus", "num_gpus", "max_restarts")


EngineSettings = SingleSettings | ReplicaSettings
