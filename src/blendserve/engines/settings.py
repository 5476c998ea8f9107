"""What an engine is opened from: one frozen value per engine. It pickles, and it is checked when it is made.

None means that a limit was not given. The engine then decides: the native engine takes the defaults of `EngineConfig`,
vLLM keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from blendserve.config import Dtype, EngineConfig, KvDtype
from blendserve.errors import ConfigError
from blendserve.models.chat_settings import DEFAULT_CHAT, ChatSettings

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
    """The native engine: answers on this machine's CPU.

    - `model`: a model directory, a .gguf file, a hub id (owner/name), or a name from `blendserve models`. None: the
      default model, SmolLM2-135M-Instruct.
    - `revision`: commit, tag or branch of a hub model. None: the newest.
    - `max_model_len`: most tokens of a prompt and its answer together. None: what the model was made for.
    - `kv_memory_bytes`: memory of the KV cache. None: at most half of the free memory.
    - `max_num_seqs`: most requests that run at once. None: 256.
    - `max_num_batched_tokens`: most tokens in one step (one forward pass). None: 2048.
    - `num_threads`: CPU threads. None: one for every core that this process may use.
    - `enable_prefix_caching`: compute the beginnings that prompts share only once (default: true).
    - `overlap`: run matrix products beside attention in each core: "auto", where this machine was measured to save
      time by it (default); "on", wherever possible; "off", never.
    - `dtype`: of the weights: "bf16" (default), or "int8", which is faster and gives other answers.
    - `kv_dtype`: of the KV cache: "bf16" (default), or "int8", which holds nearly twice as many tokens in the same
      memory, is read faster, and gives other answers.
    - `isa`: instruction set of the kernels: "auto", the best one of this machine (default), or one of `ISA_NAMES`.
    - `window`: plan so many requests at a time. None: all before they run, or parts of 500000.
    - `memory_share`: the part of the machine's memory that this engine may take, from 0 to 1 (default: 1).
    - `generation_config`: where sampling parameters of lines that give none come from: "auto", the model's
      generation_config.json (default); "vllm", nowhere; or a directory with a generation_config.json.
    - `chat`: how conversations become prompts and how answers are read, see `ChatSettings`.

    Answers depend on `model`, `dtype`, `kv_dtype`, `isa`, `generation_config` and `chat`. Others change time only.
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
    kv_dtype: KvDtype = "bf16"
    isa: str = "auto"
    window: int | None = None
    memory_share: float = 1.0
    revision: str | None = None
    generation_config: str = "auto"
    chat: ChatSettings = DEFAULT_CHAT

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
    """vLLM in this process, on GPUs or on its CPU build. Needs vLLM to be installed.

    - `model`: a Hugging Face directory or a hub id (owner/name); no .gguf file.
    - `revision`: commit, tag or branch of a hub model. None: the newest.
    - `max_model_len`, `max_num_seqs`, `max_num_batched_tokens`, `enable_prefix_caching`: as in `NativeSettings`. None:
      vLLM's own default.
    - `kv_memory_bytes`: memory of the KV cache. None: vLLM's own default on GPUs; at most half of the free memory on
      the CPU build.
    - `num_threads`: CPU threads of vLLM's CPU build. None: one for every core that this process may use.
    - `task`: "generate" (default), or "embed" to answer /v1/embeddings.
    - `adapters`: directories of LoRA adapters by the name that lines give as their `model` (default: none).
    - `scheduler`: "front" hands requests to vLLM in the order of the plan (default); "blend" lets vLLM's own scheduler
      ask the plan for the next request.
    - `own_process`: run vLLM in a subprocess, so that its crash does not stop the job (default: false).
    - `image_domains`: hosts that pictures of lines may be fetched from (default: none; pictures have to be in the
      line).
    - `arguments`: any other fields of vLLM's EngineArgs, such as `{"tensor_parallel_size": 4}` (default: none).
    - `memory_share`: the part of the machine's memory that this engine may take on a CPU, from 0 to 1 (default: 1).
    - `generation_config`: as in `NativeSettings`.
    - `chat`: how conversations become prompts and how answers are read, see `ChatSettings`.

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
    generation_config: str = "auto"
    chat: ChatSettings = DEFAULT_CHAT

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
    """An OpenAI-compatible server that runs already.

    - `base_url`: its address, such as "http://localhost:8000/v1".
    - `model`: the model name to send. None: the `model` of each line.
    - `tokenizer`: a model whose tokenizer counts prompt tokens for the plan. None: that of `model` if it is on this
      machine; otherwise four bytes count as a token.
    - `max_inflight`: most requests that are sent and not yet answered (default: 64).
    - `kv_tokens`: tokens that the server's KV memory holds. None: not known, so that only `max_inflight` limits.
    - `request_timeout_s`: seconds for one try of a request, to the last byte of its answer (default: 600).
    - `max_attempts`: tries before a request becomes an error row (default: 6).
    - `max_outage_s`: seconds to wait for a server that is down before the run ends (default: 600).
    - `headers`: further headers of every request, such as {"api-key": "..."} (default: none).

    `base_url` may have a query, such as "?api-version=2024-10-21"; it goes with every request. The key comes from the
    environment: BLENDSERVE_API_KEY, or else OPENAI_API_KEY. Keys and secret headers are shown nowhere.
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
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "max_inflight", "kv_tokens", "max_attempts")
        for name in ("request_timeout_s", "max_outage_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be a number of seconds above 0")


SingleSettings = NativeSettings | VllmSettings | HttpSettings


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Several copies (replicas) of an engine on Ray, each with a part of the requests. Needs Ray to be installed.

    - `num_replicas`: how many copies.
    - `ray_address`: a running Ray cluster, such as "auto". None: Ray is started on this machine for the run.
    - `num_cpus`: CPUs of each replica. None: the engine's `num_threads`; without those, as many as leave room for all.
    - `num_gpus`: GPUs of each replica, all on one machine (default: 0).
    - `placement`: "spread" over as many machines as possible (default), or "pack" on few.
    - `max_restarts`: how often a replica's process is started again before the others take its requests (default: 3).
    - `engine`: settings of the engine that is copied (default: the native engine with the default model).

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
