"""What vLLM's own statistics say of a run, added up step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class VllmCounters:
    """`kv_use` and `num_running` are of the latest step, the rest totals. Units: tokens, flop and bytes of one device
    as vLLM's MFU metrics count them, 0 where it cannot.
    """

    kv_use: float = 0.0
    num_running: int = 0
    max_kv_use: float = 0.0
    max_running: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_flop: int = 0
    num_read_bytes: int = 0
    num_written_bytes: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Part of the prompt tokens of admitted requests that vLLM's prefix cache had."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """Take in a `SchedulerStats` and an `IterationStats` of vLLM, either of which may be None."""
        if scheduler_stats is not None:
            self._record_scheduler(scheduler_stats)
        if iteration_stats is not None:
            self.num_preemptions += iteration_stats.num_preempted_reqs

    def _record_scheduler(self, stats: Any) -> None:
        self.kv_use, self.num_running = stats.kv_cache_usage, stats.num_running_reqs
        self.max_kv_use = max(self.max_kv_use, self.kv_use)
        self.max_running = max(self.max_running, self.num_running)
        self.num_queried_tokens += stats.prefix_cache_stats.queries
        self.num_hit_tokens += stats.prefix_cache_stats.hits
        if stats.perf_stats is not None:
            self.num_flop += stats.perf_stats.num_flops_per_gpu
            self.num_read_bytes += stats.perf_stats.num_read_bytes_per_gpu
            self.num_written_bytes += stats.perf_stats.num_write_bytes_per_gpu
