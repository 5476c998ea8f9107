"""`--engine vllm`: the job is answered by vLLM in this process."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from blendserve.cli.options import find_model, identity_of, notes_of, tell
from blendserve.config import BLOCK_SIZE
from blendserve.costs.model_cost import ModelCost
from blendserve.dialect.extras import Abilities
from blendserve.dialect.schema import ServedModel
from blendserve.engine.limits import MAX_KV_SHARE
from blendserve.engine.stats import RunStats
from blendserve.engines.vllm.api import InstalledVllm, VllmApi, hide_secrets, is_cpu_build, is_secret, is_tested
from blendserve.engines.vllm.codec import VllmCodec
from blendserve.engines.vllm.cost import CPU, LoadTotals, cost_model_of, model_cost_of, text_config_of
from blendserve.engines.vllm.driver import VllmEngine
from blendserve.errors import ConfigError
from blendserve.host import available_memory_bytes, usable_cores
from blendserve.job.job import JobProgress
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.models.fingerprint import fingerprint
from blendserve.models.hub import ModelFiles
from blendserve.models.load import load_tokenizer
from blendserve.models.tokenizer import read_json
from blendserve.planner.plan import Plan
from blendserve.planner.policies import make_policy
from blendserve.report.progress import Progress, Snapshot
from blendserve.request import SequenceOutput

CPU_BLOCK_SIZE = 32
"""What vLLM's CPU kernels want: multiples of it."""


def open_vllm_run(args: argparse.Namespace) -> VllmRun:
    """Read the arguments and the model's files; nothing is loaded yet. Raises: ConfigError."""
    api = InstalledVllm()
    if args.model is None:
        raise ConfigError("--engine vllm needs --model: a Hugging Face directory, or a hub id (owner/name)")
    files = find_model(args)
    if files.is_gguf:
        raise ConfigError(
            f"{files.path} is a GGUF file; --engine vllm reads Hugging Face directories: give --model one"
        )
    prepare_environment(os.environ, args)
    return VllmRun(args, files, api)


def prepare_environment(environment: MutableMapping[str, str], args: argparse.Namespace) -> None:
    """Set what vLLM takes from the environment when it is imported; what the user has set stays."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if args.own_process else "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # only the first host is one that --image-domain allows
    }
    if is_cpu_build():
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.threads or usable_cores())}
    for name, value in defaults.items():
        environment.setdefault(name, value)


class VllmRun:
    """vLLM's part of a job: opened only when requests are left to run, timed, and watched."""

    def __init__(self, args: argparse.Namespace, files: ModelFiles, api: VllmApi) -> None:
        config = read_json(files.path / "config.json")
        text = text_config_of(config)
        adapters = read_adapters(args.lora)
        self._model = model_cost_of(files.name, config)
        max_model_len = args.max_model_len or context_length_of(text)
        embeds = args.task == "embed"
        self.served = ServedModel(
            names=(files.name,),
            accepts_any_name=True,
            vocab_size=int(text.get("vocab_size") or 0),
            max_model_len=max_model_len,
            abilities=Abilities(
                adapters=tuple(sorted(adapters)),
                structures=not embeds,
                sees="vision_config" in config,
                embeds=embeds,
                image_domains=tuple(domain.lower() for domain in args.image_domain),
            ),
        )
        self.codec = VllmCodec(load_tokenizer(files), config, max_model_len)
        self.identity = identity_of(files.name, files)
        self.settings: dict[str, Any] = {
            "engine": "vllm",
            "vllm": api.version,
            "task": args.task,
            "adapters": ", ".join(f"{name} {fingerprint(ModelFiles(name, Path(at)))}" for name, at in adapters.items()),
            "vllm arguments": ", ".join(
                sorted(_shown(text) for text in args.vllm_arg if not is_secret(text.partition("=")[0]))
            ),
        }
        self.load_s = self.plan_s = self.run_s = 0.0
        self.stats: RunStats | None = None
        self._is_cpu = is_cpu_build()
        self._notes = [*notes_of(files)]
        arguments = self._arguments(args, files, adapters, api.version)
        self._engine = VllmEngine(api, arguments, adapters, embeds=embeds, totals=LoadTotals(self._model), notify=tell)
        self._policy: str = args.policy
        self._is_quiet: bool = args.quiet or args.json
        self._progress = JobProgress(0, 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What vLLM's own statistics say, once it has run."""
        return (*self._notes, *report_lines(self._engine, self.stats)) if self.stats is not None else tuple(self._notes)

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        self._progress = progress

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        """Yield the ends of `pending` as they come."""
        started_s = time.perf_counter()
        engine = self._engine
        engine.open()
        loaded_s = time.perf_counter()
        plan = self.plan(pending)
        planned_s = time.perf_counter()
        self.load_s, self.plan_s = loaded_s - started_s, planned_s - loaded_s
        try:
            with Progress(lambda: self._snapshot(plan), is_quiet=self._is_quiet):
                yield from engine.run(pending, plan, make_policy(self._policy, plan))
        finally:
            self.run_s = time.perf_counter() - planned_s
            self.stats = engine.stats

    def plan(self, pending: PendingRequests) -> Plan:
        """The order of `pending` on this device; on an A100 where nothing is open, as in front of replicas."""
        name = "unknown" if self._engine.engine is None else self._engine.api.device_name()
        cost = cost_model_of(self._model, CPU.name if self._is_cpu else name)
        block_size = CPU_BLOCK_SIZE if self._is_cpu else BLOCK_SIZE
        return plan_pending(pending, pending.table(), cost, block_size=block_size)

    def close(self) -> None:
        """Free what vLLM holds."""
        self._engine.close()

    def _snapshot(self, plan: Plan) -> Snapshot:
        progress, counters = self._progress, self._engine.counters
        num_tokens = progress.num_prompt_tokens + progress.num_output_tokens
        expected = float(plan.expected_output_tokens.sum() + plan.table.num_prompt_tokens.sum())
        return Snapshot(
            num_done=progress.num_done,
            num_requests=progress.num_requests,
            num_tokens=num_tokens,
            num_expected_tokens=max(0.0, expected - num_tokens),
            num_running=counters.num_running,
            kv_use=counters.kv_use,
            prefix_hit_rate=counters.prefix_hit_rate,
        )

    def _arguments(
        self, args: argparse.Namespace, files: ModelFiles, adapters: dict[str, str], release: str
    ) -> dict[str, Any]:
        """Fields of vLLM's EngineArgs. What --vllm-arg says comes last."""
        arguments: dict[str, Any] = {
            "model": str(files.path),
            "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "enable_prefix_caching": not args.no_prefix_caching,
            "disable_log_stats": False,
            "enable_mfu_metrics": True,
        }
        if args.max_model_len:  # else vLLM knows better than one field of the configuration, as of scaled positions
            arguments["max_model_len"] = args.max_model_len
        if args.image_domain:
            arguments["allowed_media_domains"] = [domain.lower() for domain in args.image_domain]
        if self._is_cpu:
            most_bytes = int(available_memory_bytes() * MAX_KV_SHARE * args.memory_share)
            memory = args.kv_memory or default_kv_memory(
                self._model, args.max_num_seqs, self.served.max_model_len, most_bytes
            )
            arguments |= {"kv_cache_memory_bytes": memory, "block_size": CPU_BLOCK_SIZE, "enforce_eager": True}
        elif args.kv_memory:
            arguments["kv_cache_memory_bytes"] = args.kv_memory
        if adapters:
            arguments |= {
                "enable_lora": True,
                "max_loras": lora_slots(len(adapters), is_cpu=self._is_cpu),
                "max_lora_rank": largest_rank(adapters),
            }
        if args.task == "embed":
            arguments |= {"runner": "pooling", "convert": "embed"}
        if args.vllm_scheduler == "blend":
            self._choose_scheduler(arguments, args, release)
        return arguments | dict(parse_argument(text) for text in args.vllm_arg)

    def _choose_scheduler(self, arguments: dict[str, Any], args: argparse.Namespace, release: str) -> None:
        """Put our scheduler in, or note why the front door stays."""
        if not is_tested(release):
            self._notes.append(
                f"vLLM is {release}, on which its scheduler was not tested: requests went in from outside"
            )
        elif args.own_process or os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "1":
            self._notes.append(
                "vLLM runs in a process of its own, out of the policy's reach: requests went in from outside"
            )
        else:
            is_async = not self._is_cpu and "async_scheduling=false" not in args.vllm_arg
            arguments["scheduler_cls"] = ASYNC_SCHEDULER if is_async else SCHEDULER


def context_length_of(text_config: Mapping[str, Any]) -> int:
    """Tokens that a model takes; its positions may be scaled. 0 where the config does not say. vLLM's own limit, which
    may be lower, holds besides."""
    length = int(text_config.get("max_position_embeddings") or 0)
    scaling = text_config.get("rope_scaling") or text_config.get("rope_parameters")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) in ("yarn", "linear", "dynamic"):
        original = int(scaling.get("original_max_position_embeddings") or length)
        length = max(length, int(original * float(scaling.get("factor") or 1.0)))
    return length


def _shown(argument: str) -> str:
    """An argument as a journal may hold it: without keys and tokens inside."""
    name, value = parse_argument(argument)
    hidden = hide_secrets(value)
    return argument if hidden == value else f"{name}={json.dumps(hidden, sort_keys=True)}"


SCHEDULER = "blendserve.engines.vllm.scheduler.BlendScheduler"
ASYNC_SCHEDULER = "blendserve.engines.vllm.scheduler.BlendAsyncScheduler"


def default_kv_memory(model: ModelCost, max_num_seqs: int, max_model_len: int, most_bytes: int) -> int:
    """Bytes for the KV cache on a CPU: what the requests could fill at most, within `most_bytes`."""
    wanted = int(max_num_seqs * max(max_model_len, 1) * model.kv_bytes_per_token)
    return min(most_bytes, wanted)


def read_adapters(options: list[str]) -> dict[str, str]:
    """NAME=PATH, each once -> paths by name. Raises: ConfigError."""
    adapters: dict[str, str] = {}
    for option in options:
        name, _, path = option.partition("=")
        if not name or name in adapters or not (Path(path) / "adapter_config.json").is_file():
            raise ConfigError(
                f"--lora {option} is not understood: write NAME=PATH, each name once, where PATH is a directory "
                "with an adapter_config.json"
            )
        adapters[name] = path
    return adapters


def lora_slots(num_adapters: int, *, is_cpu: bool) -> int:
    """Places for adapters. On vLLM's CPU build (seen on 0.32) requests without an adapter get that of the last place
    when they share a step with one that has any: there it stays empty.
    """
    return num_adapters + 1 if is_cpu else num_adapters


def largest_rank(adapters: dict[str, str]) -> int:
    """The rank that vLLM must have room for: the largest of the adapters, as it offers them."""
    rank = max(int(read_json(Path(path) / "adapter_config.json").get("r") or 8) for path in adapters.values())
    return next((size for size in (8, 16, 32, 64, 128, 256, 320) if size >= rank), rank)


def parse_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE of --vllm-arg; the value is JSON, or else taken as text. Raises: ConfigError."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise ConfigError(f"--vllm-arg {name} is not understood: write NAME=VALUE, such as tensor_parallel_size=2")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def report_lines(engine: VllmEngine, stats: RunStats | None) -> tuple[str, ...]:
    """Sentences for the summary: vLLM's counts, and what it computed per step beside what we count."""
    counters, totals = engine.counters, engine.totals
    if stats is None or not stats.num_steps:
        return ()
    lines = [
        f"vLLM {engine.api.version}: prefix hits {counters.num_hit_tokens} of {counters.num_queried_tokens} prompt "
        f"tokens ({counters.prefix_hit_rate:.0%}), {counters.num_preemptions} preemptions, at most "
        f"{counters.max_running} running, KV peak {counters.max_kv_use:.0%}, {engine.num_restarts} restarts"
    ]
    if counters.num_flop:
        num_bytes = counters.num_read_bytes + counters.num_written_bytes
        lines.append(
            f"per step vLLM counts {counters.num_flop / stats.num_steps / 1e9:.2f} GFLOP and "
            f"{num_bytes / stats.num_steps / 1e9:.2f} GB" + _ours(totals)
        )
    return tuple(lines)


def _ours(totals: LoadTotals | None) -> str:
    if totals is None or not totals.num_steps:
        return ""
    return (
        f"; our cost model {totals.num_flop / totals.num_steps / 1e9:.2f} GFLOP and "
        f"{totals.num_bytes / totals.num_steps / 1e9:.2f} GB"
    )
