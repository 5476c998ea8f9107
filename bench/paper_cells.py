"""Which simulations `bench/paper.py` is made of."""

from __future__ import annotations

from collections.abc import Iterator

from paper_ablation import ABLATIONS
from paper_run import KNOWLEDGE, SYSTEMS, Cell
from paper_variants import VARIANTS

from blendserve.simulator.workloads.blend import PAPER_TRACES

GRID_DENSITIES = tuple(round(0.80 + 0.05 * step, 2) for step in range(13))
GRID_SHARINGS = (0.05, 0.15, 0.25, 0.35, 0.45)
COARSE_GRID = ((0.8, 1.0, 1.2, 1.4), (0.05, 0.25, 0.45))


def all_cells(*, is_quick: bool, is_coarse: bool = False) -> list[Cell]:
    """Every cell of the run, what matters most first. A coarse run has 12 of the 65 blends."""
    if is_quick:
        return [*_traces("traces 8B"), *_timelines()]
    return [
        *_traces("traces 8B"),
        *_losses(),
        *_timelines(),
        *_replicas((1, 4, 2, 8)),
        *_sensitivity(),
        *_knowledge(),
        *_grid("grid BurstGPT", *(COARSE_GRID if is_coarse else (GRID_DENSITIES, GRID_SHARINGS))),
        *_traces("traces 70B", model="llama-3-70b"),
        *_ablations(),
        *_models(),
        *_disaggregated(),
        *_grid("grid Azure", *COARSE_GRID, trace="azure-code"),
        *_grid("grid ShareGPT", *COARSE_GRID, trace="sharegpt"),
        *_grid("grid WildChat", COARSE_GRID[0], (0.25, 0.35, 0.45), trace="wildchat"),
        *_replicas((16, 32)),
    ]


def _named() -> Iterator[tuple[str, float, float]]:
    for name, target in PAPER_TRACES.items():
        yield name, target.density, target.sharing


def _traces(experiment: str, model: str = "llama-3-8b") -> Iterator[Cell]:
    for system in reversed(SYSTEMS):
        for name, density, sharing in _named():
            yield Cell(experiment, system, density, sharing, model=model, label=name)


def _timelines() -> Iterator[Cell]:
    for system in ("NanoFlow-DFS", "blend"):
        yield Cell("timeline", system, 1.4, 0.35, label="trace-1", keeps_steps=True)


def _grid(
    experiment: str, densities: tuple[float, ...], sharings: tuple[float, ...], trace: str = "burstgpt"
) -> Iterator[Cell]:
    for density in densities:
        for sharing in sharings:
            for system in ("NanoFlow-DFS", "BlendServe, Alg. 3", "blend"):
                yield Cell(experiment, system, density, sharing, trace=trace)


def _losses() -> Iterator[Cell]:
    for knowledge in ("1% samples", "exact"):
        for name, density, sharing in _named():
            yield Cell("losses", "blend", density, sharing, knowledge=knowledge, label=name)


def _sensitivity() -> Iterator[Cell]:
    name, density, sharing = next(_named())
    for variant in ("", *VARIANTS):
        for system in ("NanoFlow-Balance", "NanoFlow-DFS", "blend"):
            yield Cell("sensitivity", system, density, sharing, label=name, variant=variant)


def _knowledge() -> Iterator[Cell]:
    for name, density, sharing in _named():
        for knowledge in KNOWLEDGE:
            yield Cell("knowledge", "blend", density, sharing, knowledge=knowledge, label=name)
    for knowledge in KNOWLEDGE:
        yield Cell("knowledge", "blend", 1.1, 0.25, trace="sharegpt", knowledge=knowledge, label="ShareGPT (1.1, 25%)")


def _ablations() -> Iterator[Cell]:
    blends = (("burstgpt", "trace-2", 0.9, 0.35), ("sharegpt", "ShareGPT (1.1, 25%)", 1.1, 0.25))
    for trace, label, density, sharing in blends:
        for ablation in ABLATIONS:
            yield Cell("ablation", "blend", density, sharing, trace=trace, ablation=ablation, label=label)
        yield Cell("ablation", "blend", density, sharing, trace=trace, knowledge="means of samples", label=label)


def _models() -> Iterator[Cell]:
    for model in ("qwen-2.5-7b", "llama-2-7b", "qwen-2.5-72b", "deepseek-67b"):
        for name, density, sharing in _named():
            for system in ("NanoFlow-DFS", "BlendServe, Alg. 3", "blend"):
                yield Cell("models", system, density, sharing, model=model, label=name)


def _disaggregated() -> Iterator[Cell]:
    for name, density, sharing in _named():
        for system in ("vLLM-DFS", "1P1D", "1P2D", "2P1D", "1P3D"):
            yield Cell("disaggregated", system, density, sharing, label=name)


def _replicas(counts: tuple[int, ...]) -> Iterator[Cell]:
    for num_replicas in counts:
        for name, density, sharing in _named():
            yield Cell("replicas", "blend", density, sharing, num_replicas=num_replicas, label=name)
