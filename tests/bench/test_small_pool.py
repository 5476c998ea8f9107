"""The bench of small KV pools: its jobs are what they are said to be, and its times add up."""

from __future__ import annotations

import numpy as np
import pytest
from small_pool import MIXES, Case, details, figures_of, gains, machine_of, summary, workload_of

from blendserve.simulator.workloads.source import prefix_tree


@pytest.mark.parametrize("name", MIXES)
def test_the_tree_of_a_mix_has_its_prompts_and_prefixes(name: str) -> None:
    workload = workload_of(name)
    tree = prefix_tree(workload)
    tree.check()
    assert sorted(workload.order.tolist()) == list(range(len(workload)))
    assert (workload.known_output_tokens == workload.num_output_tokens).all()


def test_the_pool_shares_one_long_prefix() -> None:
    workload = workload_of("pool")
    assert np.bincount(workload.kind).tolist() == [160, 70, 60]
    assert sorted(set(workload.lcp.tolist())) == [0, 1040]
    assert np.count_nonzero(workload.lcp) == 159
    assert workload.num_prompt_tokens[workload.kind == 2].tolist() == [1200] * 60


def test_memory_is_what_the_pool_holds() -> None:
    """23,040 bytes of KV per token of the default model."""
    assert machine_of(256, "off").capacity_tokens == (256 << 20) // 23_040


def test_times_add_up_and_are_shown() -> None:
    found = [
        figures_of(Case("digest", 4096, overlap, policy)) for overlap in ("off", "on") for policy in ("dfs", "blend")
    ]
    for figures in found:
        assert figures.hidden_s == pytest.approx(0.0, abs=1e-6) or figures.case.overlap == "on"
        assert figures.hidden_s <= min(figures.compute_s, figures.memory_s) / 2 + 1e-6
    assert "digest 4096 MiB on" in summary(found, ["dfs", "blend"])
    assert details(found).count("\n") == 5


def test_the_parts_of_a_gain_make_the_gain() -> None:
    found = [figures_of(Case("digest", 128, *rest)) for rest in (("off", "dfs"), ("off", "blend"), ("on", "blend"))]
    for line in gains(found).splitlines()[2:]:
        whole, *parts = (float(cell) for cell in line.split("|")[2:-1])
        assert whole == pytest.approx(sum(parts), abs=0.3)
    assert "-" not in gains(found).splitlines()[-1].split("|")[2], "blend saves time here"
