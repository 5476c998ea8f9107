"""The bench of small KV pools: its jobs are what they are said to be, and its times add up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_pool import Case, behind_best, details, figures_of, gains, machine_of, summary
from token_mixes import BALANCED, GROUPED, MIXES, parts_of, token_lines, workload_of

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
    assert "digest int8 4096 MiB on" in summary(found, ["dfs", "blend"])
    assert details(found).count("\n") == 5


def test_the_parts_of_a_gain_make_the_gain() -> None:
    found = [figures_of(Case("digest", 128, *rest)) for rest in (("off", "dfs"), ("off", "blend"), ("on", "blend"))]
    for line in gains(found).splitlines()[2:]:
        whole, *parts = (float(cell) for cell in line.split("|")[2:-1])
        assert whole == pytest.approx(sum(parts), abs=0.3)
    assert "-" not in gains(found).splitlines()[-1].split("|")[2], "blend saves time here"


@pytest.mark.parametrize(("kv_mib", "overlap"), [(256, "off"), (192, "on"), (256, "unplanned")])
def test_the_default_policy_is_the_best_one_in_a_small_pool(kv_mib: int, overlap: str) -> None:
    runs = [figures_of(Case("pool", kv_mib, overlap, policy)) for policy in ("dfs", "paper", "blend")]
    assert behind_best(runs) < -0.02


@pytest.mark.thorough
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("kv_mib", [128, 192, 256, 512, 1024])
@pytest.mark.parametrize("name", MIXES)
def test_the_default_policy_is_never_far_from_the_best(name: str, kv_mib: int, overlap: str) -> None:
    runs = [figures_of(Case(name, kv_mib, overlap, policy), scale=0.5) for policy in ("fcfs", "dfs", "paper", "blend")]
    assert behind_best(runs) <= 0.02


@pytest.mark.parametrize("name", BALANCED)
def test_balanced_mixes_are_within_two_to_one(name: str) -> None:
    """Of compute that no order can avoid, against KV that every order reads."""
    cost, workload = machine_of(512, "off").cost, workload_of(name)
    own = int(workload.num_prompt_tokens.sum() - workload.lcp.sum())
    outputs = workload.num_output_tokens
    pairs = workload.num_prompt_tokens.astype(float) ** 2 / 2
    compute_s = cost.token_s * (own + int(outputs.sum())) + cost.pair_s * float(pairs.sum())
    memory_s = cost.kv_token_s * float((outputs * (workload.num_prompt_tokens + outputs / 2)).sum())
    assert 0.5 <= compute_s / memory_s <= 2


@pytest.mark.parametrize("name", ["exam", "library"])
def test_a_file_of_tokens_is_the_simulated_job(name: str) -> None:
    lines, workload = token_lines(name, 0.1), workload_of(name, scale=0.1)
    assert [len(line.prompt) for line in lines] == workload.num_prompt_tokens.tolist()
    assert [line.output_tokens for line in lines] == workload.num_output_tokens.tolist()
    prompts = sorted(tuple(line.prompt) for line in lines)
    shared = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        for one, other in itertools.pairwise(prompts)
    ]
    assert sum(count for count in shared if count > 16) == workload.lcp.sum()


def test_a_part_of_a_mix_keeps_its_shape() -> None:
    whole, part = parts_of("library"), parts_of("library", 0.25)
    assert [len(one.prompts) for one in part] == [round(len(one.prompts) / 4) for one in whole]
    assert [part[0].prefix.count(prefix) for prefix in range(3)] == [whole[0].prefix.count(0)] * 3
    assert "library" not in GROUPED
