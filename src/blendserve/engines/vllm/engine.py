"""vLLM's part of a job, in this process: opened only when requests are left to run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from blendserve.config import BLOCK_SIZE
from blendserve.dialect.defaults import checked_defaults
from blendserve.dialect.extras import Abilities
from blendserve.dialect.schema import ServedModel
from blendserve.dialect.urls import EMBEDDINGS_URL, TEXT_URLS
from blendserve.engine.front import Front
from blendserve.engine.grammar import grammar_for
from blendserve.engine.stats import RunStats
from blendserve.engines.base import EngineStatus, EngineTimes, Notify
from blendserve.engines.settings import VllmSettings
from blendserve.engines.vllm.api import InstalledVllm, VllmApi, VllmLimits, is_cpu_build
from blendserve.engines.vllm.arguments import (
    CPU_BLOCK_SIZE,
    check_adapters,
    context_length_of,
    engine_arguments,
    follows_our_grammars,
    lets_reasoning_through,
    prepare_environment,
    scheduler_class,
    shown_arguments,
)
from blendserve.engines.vllm.codec import VllmCodec
from blendserve.engines.vllm.cost import CPU, LoadTotals, cost_model_of, model_cost_of
from blendserve.engines.vllm.driver import VllmDriver
from blendserve.engines.vllm.formats import vllm_formats
from blendserve.errors import ConfigError
from blendserve.host import cache_dir
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.fingerprint import fingerprint, identity_of
from blendserve.models.foreign_config import text_config_of, whole_number
from blendserve.models.generation_config import note_of, sampling_defaults, shown_defaults
from blendserve.models.hub import ModelFiles, resolve
from blendserve.models.load import load_tokenizer
from blendserve.models.tokenizer import read_json
from blendserve.planner.plan import Plan
from blendserve.planner.policies import make_policy
from blendserve.request import SequenceOutput


def open_vllm(settings: VllmSettings, *, notify: Notify) -> VllmEngine:
    """Read the model's files; nothing is loaded yet. Raises: ConfigError."""
    api = InstalledVllm()
    files = resolve(settings.model, cache_dir(), notify=notify, revision=settings.revision)
    if files.is_gguf:
        raise ConfigError(f"{files.path} is a GGUF file; vLLM reads Hugging Face directories: give --model one")
    check_adapters(settings.adapters)
    prepare_environment(os.environ, settings)
    return VllmEngine(settings, files, api, notify=notify)


def served_model_of(
    settings: VllmSettings, files: ModelFiles, config: Mapping[str, Any], formats: ChatFormats
) -> ServedModel:
    """What lines may ask for, from the model's files alone: vLLM itself is not needed for it."""
    text = text_config_of(config)
    embeds = settings.task == "embed"
    source = str(settings.arguments.get("generation_config", settings.generation_config))
    return ServedModel(
        names=(files.name,),
        accepts_any_name=True,
        vocab_size=whole_number(text, "vocab_size"),
        max_model_len=settings.max_model_len or context_length_of(text),
        abilities=Abilities(
            adapters=tuple(sorted(settings.adapters)),
            sees="vision_config" in config,
            chat=formats,
            forces_json=not follows_our_grammars(settings),
            image_domains=tuple(domain.lower() for domain in settings.image_domains),
            urls=(EMBEDDINGS_URL,) if embeds else TEXT_URLS,
            checks_grammars=follows_our_grammars(settings),
        ),
        default_sampling={} if embeds else checked_defaults(sampling_defaults(files, source)),
    )


class VllmEngine:
    """An `Engine` on vLLM."""

    def __init__(self, settings: VllmSettings, files: ModelFiles, api: VllmApi, *, notify: Notify) -> None:
        config = read_json(files.path / "config.json")
        text = text_config_of(config)
        self._model = model_cost_of(files.name, config)
        max_model_len = settings.max_model_len or context_length_of(text)
        embeds = settings.task == "embed"
        tokenizer = settings.chat.applied(load_tokenizer(files))
        formats = vllm_formats(settings.chat, tokenizer, api, str(files.path))
        self.served = served_model_of(settings, files, config, formats)
        sampling = self.served.default_sampling
        self.codec = VllmCodec(
            tokenizer,
            config,
            max_model_len,
            formats,
            obeys_control_tokens=settings.chat.obeys_control_tokens,
            settles=lets_reasoning_through(settings),
        )
        self.identity = identity_of(files.name, files)
        self.settings: dict[str, Any] = {
            "engine": "vllm",
            "vllm": api.version,
            "task": settings.task,
            "generation config": shown_defaults(sampling),
            "adapters": ", ".join(
                f"{name} {fingerprint(ModelFiles(name, Path(at)))}" for name, at in settings.adapters.items()
            ),
            "vllm arguments": shown_arguments(settings.arguments),
            **settings.chat.identity(),
        }
        self.capacity_bytes = settings.kv_memory_bytes or 0
        self.times = EngineTimes()
        self.stats: RunStats | None = None
        self.front: Front | None = None
        self._is_cpu = is_cpu_build()
        arguments = engine_arguments(settings, files.path, self._model, max_model_len, is_cpu=self._is_cpu)
        scheduler, note = scheduler_class(settings, api.version, is_cpu=self._is_cpu)
        if scheduler is not None:
            arguments["scheduler_cls"] = scheduler
        self._first_notes = (*files.notes, *note_of(sampling), *((note,) if note is not None else ()))
        totals = LoadTotals(self._model)
        self._driver = VllmDriver(
            api,
            arguments,
            settings.adapters,
            embeds=embeds,
            totals=totals,
            grammar_of=partial(grammar_for, tokenizer=tokenizer) if follows_our_grammars(settings) else None,
            notify=notify,
        )
        self._plan: Plan | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What vLLM's own statistics say, once it has run."""
        return (*self._first_notes, *report_lines(self._driver, self.stats))

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:
        """Yield the ends of `pending` as they come."""
        started_s = time.perf_counter()
        self._driver.open()
        loaded_s = time.perf_counter()
        plan = self._plan = self.plan(pending)
        planned_s = time.perf_counter()
        self.times = EngineTimes(loaded_s - started_s, planned_s - loaded_s)
        try:
            yield from self._driver.run(pending, plan, make_policy(policy, plan), self.front)
        finally:
            self.times = self.times._replace(run_s=time.perf_counter() - planned_s)
            self.stats = self._driver.stats

    def answer_front(self) -> None:
        """Answer the requests of the front while nothing is planned."""
        assert self.front is not None, "there is no front"
        self._driver.answer(self.front)

    def plan(self, pending: PendingRequests) -> Plan:
        """The order of `pending` on this device, in blocks as vLLM has them; on an A100, in blocks as it likely will,
        where nothing is open, as in front of replicas."""
        engine = self._driver.engine
        name = "unknown" if engine is None else self._driver.api.device_name()
        cost = cost_model_of(self._model, CPU.name if self._is_cpu else name)
        block_size = CPU_BLOCK_SIZE if self._is_cpu else BLOCK_SIZE
        if engine is not None:
            block_size = VllmLimits.of(engine).block_size
        return plan_pending(pending, pending.table(), cost, block_size=block_size)

    def status(self) -> EngineStatus | None:
        """What vLLM's statistics say now."""
        plan, counters = self._plan, self._driver.counters
        if plan is None:
            return None
        return EngineStatus(
            num_running=counters.num_running,
            num_expected_tokens=float(plan.expected_output_tokens.sum() + plan.table.num_prompt_tokens.sum()),
            kv_use=counters.kv_use,
            prefix_hit_rate=counters.prefix_hit_rate,
        )

    def close(self) -> None:
        """Free what vLLM holds."""
        self._driver.close()


def report_lines(driver: VllmDriver, stats: RunStats | None) -> tuple[str, ...]:
    """Sentences for the summary: vLLM's counts, and what it computed per step beside what we count."""
    counters, totals = driver.counters, driver.totals
    if stats is None or not stats.num_steps:
        return ()
    lines = [
        f"vLLM {driver.api.version}: prefix hits {counters.num_hit_tokens} of {counters.num_queried_tokens} prompt "
        f"tokens ({counters.prefix_hit_rate:.0%}), {counters.num_preemptions} preemptions, at most "
        f"{counters.max_running} running, KV peak {counters.max_kv_use:.0%}, {driver.num_restarts} restarts"
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
