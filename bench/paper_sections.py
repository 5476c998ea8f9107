"""The paper's tables and figures from simulated cells: markdown beside the paper's numbers, and plots."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import paper_reference as paper
from paper_ablation import ABLATIONS
from paper_plots import bars, heat_map, lines
from paper_run import KNOWLEDGE, SYSTEMS, Outcome
from paper_tables import ALGORITHM_3, BASE, OURS, by_system, grouped, table

MEANS = "means, no distributions"


def traces_section(outcomes: list[Outcome], out: Path) -> list[str]:
    """The four named blends on every system."""
    model = outcomes[0].cell.model
    rows, plot = [], {}
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        systems = by_system(group)
        base = systems[BASE].time_s
        plot[str(label)] = {name: base / systems[name].time_s for name in SYSTEMS}
        for name in SYSTEMS:
            one = systems[name]
            shares = (one.share_of_optimum, one.share_of_bound, one.sharing_kept)
            rows.append((label, name, round(one.tokens_per_s), base / one.time_s, *shares, one.num_preemptions))
    name = model.replace("-", "_")
    (out / f"traces_{name}.svg").write_text(bars(f"Speed over NanoFlow-DFS, {model} (simulated)", "x", plot))
    ratios = {system: [group[system] for group in plot.values()] for system in SYSTEMS}
    over_vllm = [group[OURS] / group["vLLM-DFS"] for group in plot.values()]
    return [
        f"## The four traces, {model}",
        *table(
            ("trace", "system", "tokens/s", "over NanoFlow-DFS", "T_o / T", "T_lb / T", "sharing kept", "preemptions"),
            rows,
        ),
        f"Over NanoFlow-DFS: Alg. 3 {mean(ratios[ALGORITHM_3]):.3f}, blend {mean(ratios[OURS]):.3f} "
        f"(paper: {paper.TRACES_OVER_DFS if model == 'llama-3-8b' else paper.TRACES_OVER_DFS_70B}). "
        f"Blend over vLLM-DFS: {min(over_vllm):.3f} to {max(over_vllm):.3f} (paper: {paper.OVER_VLLM_DFS}).",
        f"Paper: BlendServe reaches {paper.OPTIMUM_BLEND[model]} of T_o, DFS {paper.OPTIMUM_DFS}; Balance against DFS: "
        + ", ".join(f"{trace} {verdict}" for trace, verdict in paper.BALANCE_OVER_DFS.items())
        + f"; sharing kept over 0.97, by Balance under 0.30. Table 3 has {paper.TABLE_3_TOKENS_PER_S} tokens/s "
        "for BlendServe: compare ratios, this cost model leaves out norms, sampling and launch gaps.",
        "",
    ]


def timeline_section(outcomes: list[Outcome], out: Path) -> list[str]:
    """Both resources over the run."""
    for outcome in outcomes:
        steps = outcome.steps
        title = f"Busy share of both resources, {outcome.cell.system}, {outcome.cell.label} (simulated)"
        columns = {"compute": steps["compute_s"], "memory": steps["memory_s"]}
        path = out / f"timeline_{outcome.cell.system.replace(' ', '_')}.svg"
        path.write_text(lines(title, "share", steps["time_s"], columns, x_label="seconds"))
    return ["## Compute and memory over time", "See timeline_*.svg.", ""]


def grid_section(outcomes: list[Outcome], out: Path) -> list[str]:
    """Speedups over a grid of densities and sharings."""
    experiment = outcomes[0].cell.experiment
    ours, theirs, bounds = {}, {}, {}
    for key, group in grouped(outcomes, lambda outcome: (outcome.cell.density, outcome.cell.sharing)).items():
        assert isinstance(key, tuple)
        systems = by_system(group)
        ours[key] = systems[BASE].time_s / systems[OURS].time_s
        theirs[key] = systems[BASE].time_s / systems[ALGORITHM_3].time_s
        bounds[key] = systems[OURS].share_of_bound
    densities = sorted({density for density, _ in ours})
    sharings = sorted({sharing for _, sharing in ours})
    cells = {(f"{sharing:.0%}", f"{density:.2f}"): ours[density, sharing] for density, sharing in ours}
    columns, rows_of = [f"{density:.2f}" for density in densities], [f"{sharing:.0%}" for sharing in sharings]
    path = out / f"{experiment.replace(' ', '_')}.svg"
    path.write_text(heat_map(f"blend over NanoFlow-DFS, {experiment} (simulated)", columns, rows_of, cells))
    rows = []
    for density in densities:
        keys = [(density, sharing) for sharing in sharings if (density, sharing) in ours]
        published = paper.GRID_BY_DENSITY.get(density, "") if experiment == "grid BurstGPT" else ""
        means = [mean(values[key] for key in keys) for values in (ours, theirs, bounds)]
        rows.append((f"{density:.2f}", *means, published))
    num_better = sum(ours[key] > theirs[key] for key in ours)
    return [
        f"## {experiment}: {len(ours)} blends",
        *table(("density", "blend over DFS", "Alg. 3 over DFS", "blend T_lb / T", "paper over DFS"), rows),
        f"blend {min(ours.values()):.3f} to {max(ours.values()):.3f}, mean {mean(ours.values()):.4f}; "
        f"Alg. 3 mean {mean(theirs.values()):.4f}; paper {paper.GRID_RANGE[experiment]}. blend beats Alg. 3 "
        f"in {num_better} of {len(ours)}; share of T_lb: mean {mean(bounds.values()):.3f}, "
        f"least {min(bounds.values()):.3f}.",
        "",
    ]


def knowledge_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """What it costs not to know output lengths."""
    rows = []
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        time_by = {outcome.cell.knowledge: outcome.time_s for outcome in group}
        rows.append((label, *(time_by["exact"] / time_by[name] for name in KNOWLEDGE)))
    return [
        "## Speed by what is known of lengths, exact = 1 (blend)",
        *table(("blend", *KNOWLEDGE), rows),
        f"Paper: {paper.SAMPLING}.",
        "",
    ]


def ablation_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """Policy blend with one ingredient out."""
    by_label = grouped(outcomes, lambda outcome: outcome.cell.label)
    names = [*ABLATIONS, MEANS]
    times = {label: {outcome.cell.ablation or MEANS: outcome for outcome in group} for label, group in by_label.items()}
    rows = [
        (
            name,
            *(times[label]["blend"].time_s / times[label][name].time_s for label in by_label),
            *(times[label][name].sharing_kept for label in by_label),
            *(times[label][name].num_preemptions for label in by_label),
        )
        for name in names
    ]
    headers = [f"{what}, {label}" for what in ("speed", "sharing kept", "preemptions") for label in by_label]
    return ["## Policy blend with one ingredient out: speed, all of it = 1", *table(("blend", *headers), rows)]


def models_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """Other models."""
    rows: list[tuple[object, ...]] = []
    speedups: list[tuple[float, float]] = []
    for model, group in grouped(outcomes, lambda outcome: outcome.cell.model).items():
        for label, cells in grouped(group, lambda outcome: outcome.cell.label).items():
            systems = by_system(cells)
            base = systems[BASE].time_s
            ours = systems[OURS]
            ratios = (base / systems[ALGORITHM_3].time_s, base / ours.time_s)
            speedups.append(ratios)
            rows.append((model, label, *ratios, ours.share_of_optimum, ours.share_of_bound))
    means = [mean(column) for column in zip(*speedups, strict=True)]
    return [
        "## Other models (70B class on 8 A100s)",
        *table(("model", "trace", "Alg. 3 over DFS", "blend over DFS", "T_o / T", "T_lb / T"), rows),
        f"Mean: Alg. 3 {means[0]:.3f}, blend {means[1]:.3f}; paper {paper.MODELS_OVER_DFS}.",
        "",
    ]


def disaggregated_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """xPyD per GPU against vLLM."""
    rows, names = [], ("1P1D", "1P2D", "2P1D", "1P3D")
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        systems = by_system(group)
        base = systems["vLLM-DFS"].tokens_per_s_per_gpu
        rows.append((label, *(systems[name].tokens_per_s_per_gpu / base for name in names)))
    return [
        "## Prefill and decode on separate GPUs: throughput per GPU, vLLM-DFS = 1",
        *table(("trace", *names), rows),
        f"Paper: {paper.DISAGGREGATED}. Optimistic for it: free transfers, full prefill batches, decodes never wait.",
        "",
    ]
