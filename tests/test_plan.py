from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import CommandError
from autorank.plan import LayerSpec, RankPlan, alpha_for, snap_scaling, uniform_plan

LAYERS = (LayerSpec("0.q", 384, 384), LayerSpec("0.up", 384, 1536), LayerSpec("0.small", 4, 8))


def test_a_rank_costs_a_row_of_a_and_a_column_of_b() -> None:
    assert [layer.cost for layer in LAYERS] == [768, 1920, 12]
    assert [layer.full_rank for layer in LAYERS] == [384, 384, 4]


def test_a_plan_counts_the_parameters_of_its_tensors() -> None:
    plan = RankPlan(LAYERS, {"0.q": 3, "0.up": 0, "0.small": 4}, 2.0)
    numel = sum(
        plan.ranks[layer.name] * layer.in_features + layer.out_features * plan.ranks[layer.name]
        for layer in LAYERS
    )
    assert plan.parameters == numel == 3 * 768 + 4 * 12
    assert [layer.name for layer in plan.live] == ["0.q", "0.small"]


def test_other_ranks_leave_layers_and_scaling_as_they_were() -> None:
    plan = uniform_plan(LAYERS, 2, 2.5, 10**6)
    moved = plan.with_ranks({**plan.ranks, "0.q": 0})
    assert (moved.layers, moved.scaling) == (plan.layers, plan.scaling)
    assert plan.ranks["0.q"] == 2
    assert moved.ranks["0.q"] == 0


@pytest.mark.parametrize(
    "ranks",
    [
        {"0.q": 1, "0.up": 1},
        {"0.q": 1, "0.up": 1, "0.small": 1, "1.q": 1},
        {"0.q": -1, "0.up": 1, "0.small": 1},
        {"0.q": 1, "0.up": 1, "0.small": 5},
    ],
)
def test_ranks_that_cannot_be_are_refused(ranks: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"0\.small|1\.q|0\.q"):
        RankPlan(LAYERS, ranks, 1.0)


def test_a_uniform_plan_stops_at_a_layers_full_rank() -> None:
    assert uniform_plan(LAYERS, 6, 1.0, 10**6).ranks == {"0.q": 6, "0.up": 6, "0.small": 4}


def test_a_uniform_plan_may_use_the_whole_budget_and_no_parameter_more() -> None:
    cost = 2 * 2700
    assert uniform_plan(LAYERS, 2, 1.0, cost).parameters == cost
    with pytest.raises(
        CommandError, match=r"rank 2 at 3 layers costs 5,400 .* budget of 5,399.*raise --budget"
    ):
        uniform_plan(LAYERS, 2, 1.0, cost - 1)


def test_a_plan_reads_back_from_json() -> None:
    plan = RankPlan(LAYERS, {"0.q": 3, "0.up": 0, "0.small": 4}, 1.25)
    assert RankPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(st.floats(1e-3, 100), st.integers(1, 4096))
def test_a_snapped_scaling_comes_back_exactly_from_the_alpha_of_any_rank(scaling: float, rank: int) -> None:
    snapped = snap_scaling(scaling)
    assert snapped > 0
    assert snapped == snap_scaling(snapped)
    assert abs(snapped - scaling) <= 1 / 2048 or snapped == 1 / 1024
    assert alpha_for(snapped, rank) / rank == snapped
    assert alpha_for(snapped, rank) == snapped * rank


@given(st.floats(1e-6, 1e6), st.integers(1, 4096))
def test_the_alpha_of_any_scaling_is_the_best_there_is(scaling: float, rank: int) -> None:
    assert alpha_for(scaling, rank) / rank == pytest.approx(scaling, rel=2**-52)
