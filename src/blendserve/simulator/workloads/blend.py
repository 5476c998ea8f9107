"""Blends of traces that hit a compute density and a sharing ratio (paper section 8): one compute-intensive trace,
OpenVid for the density, MMLU for the sharing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from blendserve.costs.hardware import A100_80G, peak_cost_model
from blendserve.costs.model_cost import CostModel, ModelCost
from blendserve.errors import ConfigError
from blendserve.models.known import LLAMA_3_8B
from blendserve.simulator.workloads.traces import VIDEO_MEAN_TOKENS, Floats, Trace, make_trace, openvid
from blendserve.simulator.workloads.workload import Workload, mix

TOLERANCE = 0.01
_MAX_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class BlendTarget:
    """A named blend of the paper."""

    density: float
    sharing: float


PAPER_TRACES = {
    "trace-1": BlendTarget(1.4, 0.35),
    "trace-2": BlendTarget(0.9, 0.35),
    "trace-3": BlendTarget(1.4, 0.05),
    "trace-4": BlendTarget(0.9, 0.05),
}


def paper_cost_model() -> CostModel:
    """Densities are those of Llama-3-8B on an A100 at datasheet peaks, whatever a simulation runs on."""
    return peak_cost_model(ModelCost.from_spec(LLAMA_3_8B), A100_80G)


def blend(
    density: float,
    sharing: float,
    num_requests: int,
    *,
    compute_trace: str = "burstgpt",
    seed: int = 0,
    cost: CostModel | None = None,
    video_tokens: float = VIDEO_MEAN_TOKENS,
) -> Workload:
    """Mix three traces so that density is within one percent and sharing within two percent of the targets.

    Counts are solved first; in small blends the video lengths are then scaled to meet the density exactly, since one
    video more or less would miss it. Raises: ConfigError when no mixture of the three reaches the targets.
    """
    if density <= 0 or not 0 <= sharing < 1:
        raise ConfigError(f"density {density} must be positive and sharing {sharing} in [0, 1)")
    cost = cost or paper_cost_model()
    names = (compute_trace, "openvid", "mmlu")
    counts = np.rint(np.array([0.9, 0.001, 0.1]) * num_requests)
    for attempt in range(_MAX_ROUNDS):
        traces = _make_traces(names, counts, seed, video_tokens)
        solved = _solve_counts(traces, cost, density, sharing, num_requests)
        if (np.abs(solved - counts) <= np.maximum(1, 1e-3 * counts)).all():
            break
        counts = solved if attempt < _MAX_ROUNDS // 2 else np.rint((counts + solved) / 2)
    traces = _make_traces(names, counts, seed, video_tokens)
    traces[1] = _stretch_videos(traces, cost, density)
    workload = mix(f"{compute_trace} density {density} sharing {sharing}", traces, np.random.default_rng(seed))
    if not _is_met(workload, cost, density, sharing):
        raise ConfigError(
            f"{num_requests} requests of {', '.join(names)} come to density {workload.cost(cost).density:.3f} and "
            f"sharing {workload.sharing:.3f}, not {density} and {sharing}: ask for more requests or other targets"
        )
    return workload


def _make_traces(names: tuple[str, ...], counts: Floats, seed: int, video_tokens: float) -> list[Trace]:
    rng = np.random.default_rng(seed)
    sizes = [max(1, int(count)) for count in counts]
    compute_trace = make_trace(names[0], sizes[0], rng)
    videos = openvid(sizes[1], rng, mean_tokens=video_tokens)
    return [compute_trace, videos, make_trace(names[2], sizes[2], rng)]


def _is_met(workload: Workload, cost: CostModel, density: float, sharing: float) -> bool:
    has_density = abs(workload.cost(cost).density / density - 1) < TOLERANCE
    return has_density and abs(workload.sharing - sharing) < 2 * TOLERANCE * max(sharing, 0.05)


def _solve_counts(traces: list[Trace], cost: CostModel, density: float, sharing: float, num_requests: int) -> Floats:
    """Counts that meet both targets if every trace keeps its present means: three linear equations.

    Sharing is affine in the count: every request saves its prefix except the first of each.
    """
    singles = [mix(trace.name, [trace], np.random.default_rng(0)) for trace in traces]
    size = np.array([len(trace) for trace in traces])
    compute = np.array([single.cost(cost).compute_s for single in singles]) / size
    memory = np.array([single.cost(cost).memory_s for single in singles]) / size
    prompts = np.array([single.num_prompt_tokens.sum() for single in singles]) / size
    prefixes = np.array([np.append(trace.prefix_tokens, 0)[trace.prefix].sum() for trace in traces])
    first = prefixes - np.array([single.num_shared_tokens.sum() for single in singles])
    saved = prefixes / size
    rows = np.array([compute - cost.token_s * saved - density * memory, saved - sharing * prompts, np.ones(3)])
    counts = np.linalg.solve(rows, [-cost.token_s * first.sum(), first.sum(), float(num_requests)])
    if (counts < 0).any():
        parts = zip(singles, counts / num_requests, strict=True)
        shares = ", ".join(f"{single.name} {share:.1%}" for single, share in parts)
        raise ConfigError(f"density {density} with sharing {sharing} would need negative counts ({shares})")
    return np.maximum(1.0, np.rint(counts))


def _stretch_videos(traces: list[Trace], cost: CostModel, density: float) -> Trace:
    """Scale the video outputs, by a fifth at most, so that the whole blend has the density."""
    videos = traces[1]
    others = mix("others", [traces[0], traces[2]], np.random.default_rng(0)).cost(cost)
    needed_s = max(0.0, others.remaining_compute_s - density * others.memory_s)
    compute_s = float(np.sum(cost.compute_s(videos.num_prompt_tokens, videos.num_output_tokens)))
    memory_s = float(np.sum(cost.memory_s(videos.num_prompt_tokens, videos.num_output_tokens)))
    # Memory grows with the square of the stretch x, compute linearly: density x^2 memory - x compute - needed = 0.
    root = (compute_s + np.sqrt(compute_s**2 + 4 * density * memory_s * needed_s)) / (2 * density * memory_s)
    outputs = np.rint(videos.num_output_tokens * np.clip(root, 0.8, 1.2)).astype(np.int64)
    return replace(videos, num_output_tokens=np.maximum(1, outputs))
