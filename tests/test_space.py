from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from study_world import ATTENTION, GROUPS, MLP, make_space

from autorank.config import Dimension, SpaceConfig
from autorank.errors import CommandError, StudyError
from autorank.plan import LayerSpec, snap_scaling
from autorank.space import Dim, Space, build_space, largest_rank

# Rank 1: attention 3 x 64 = 192, mlp 3 x 96 = 288, all-linear 480.


def build(budget: int, *, has_head: bool = True, max_rank: int | None = None, **settings: Any) -> Any:
    return build_space(
        SpaceConfig.model_validate(settings), GROUPS, budget, has_head=has_head, max_rank=max_rank
    )


def refusal(budget: int, **settings: Any) -> str:
    with pytest.raises(CommandError) as caught:
        build(budget, **settings)
    return str(caught.value)


def layers(draw: Any, name: str = "layer") -> tuple[LayerSpec, ...]:
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
    return tuple(LayerSpec(f"{name}.{i}", *size) for i, size in enumerate(sizes))


@given(st.data())
def test_largest_rank_is_what_trying_every_rank_finds(data: st.DataObject) -> None:
    specs = layers(data.draw)
    budget = data.draw(st.integers(0, 700))
    limit = data.draw(st.none() | st.integers(1, 12))
    top = max(layer.full_rank for layer in specs)
    fitting = [
        rank
        for rank in range(min(top, limit or top) + 1)
        if sum(min(rank, layer.full_rank) * layer.cost for layer in specs) <= budget
    ]
    assert largest_rank(specs, budget, limit) == max(fitting)


@given(st.data())
def test_every_trial_of_every_space_is_feasible(data: st.DataObject) -> None:
    groups = {name: layers(data.draw, name) for name in ("a", "b")}
    least = min(layer.cost for group in groups.values() for layer in group)
    whole = min(sum(layer.cost for layer in group) for group in groups.values())
    budget = data.draw(st.integers(least, whole * 6))
    limit = data.draw(st.none() | st.integers(1, 6))
    config = SpaceConfig.model_validate(data.draw(st.sampled_from(STARTS)))
    if config.start == Dimension(choices=("uniform",)):
        budget = max(budget, whole)
    space, _ = build_space(config, groups, budget, has_head=False, max_rank=limit)
    gains = st.lists(st.floats(0, 9), max_size=4).map(lambda known: tuple(sorted(known, reverse=True)))
    space = space.with_gains({layer.name: data.draw(gains) for group in groups.values() for layer in group})
    raw = {dim.name: draw_value(data.draw, dim) for dim in space.dims}
    for params in (space.from_optuna(raw), *space.startup()):
        plan = space.starting_plan(params)
        assert plan.parameters <= budget
        lowest = 0 if params.start == "gradient" else 1
        assert all(lowest <= plan.ranks[layer.name] <= layer.full_rank for layer in plan.layers)
        assert 1 <= max(plan.ranks.values()) <= (limit or math.inf)
        assert plan.layers == groups[params.target_modules]
        # The parameters say what is trained: the same again when they are stored and read back.
        assert space.from_optuna(space.to_optuna(params)) == params
        assert params.rank == (max(plan.ranks.values()) if params.start == "uniform" else 0)
        assert params.start in space.starts(params.target_modules)


STARTS: list[dict[str, Any]] = [
    {}, {"start": "uniform"}, {"start": "gradient"}, {"start": ["uniform", "gradient"]},
]  # fmt: skip


def draw_value(draw: Any, dim: Dim) -> Any:
    if dim.choices is not None:
        return draw(st.sampled_from([str(choice) for choice in dim.choices]))
    numbers = st.integers if isinstance(dim.low, int) else st.floats
    return draw(numbers(dim.low, dim.high))  # type: ignore[operator]


def test_without_settings_the_space_has_its_documented_ranges() -> None:
    space, notes = build(4_800)
    assert notes == []
    assert space.distributions() == {
        "rank": IntDistribution(1, 25, log=True),  # attention affords the most: 4,800 / 192
        "scaling": FloatDistribution(1.0, 8.0, log=True),
        "learning_rate": FloatDistribution(5e-4, 4e-3, log=True),
        "head_learning_rate": FloatDistribution(2e-4, 1e-2, log=True),
        "head_scale": FloatDistribution(0.2, 1.0, log=True),
        "target_modules": CategoricalDistribution(("attention", "mlp", "all-linear")),
        "allocation": CategoricalDistribution(("uniform", "adaptive")),
    }


REGULARISERS = ("dropout", "weight_decay", "label_smoothing")


def test_regularisers_are_off_and_no_dimensions_unless_asked_for() -> None:
    plain, zero = make_space(), make_space(**dict.fromkeys(REGULARISERS, 0))
    assert zero == plain and not plain.fixed and "fixed" not in plain.to_json()
    assert not any(name in key for name in REGULARISERS for key in plain.fingerprint())
    assert all(getattr(params, name) == 0.0 for params in plain.startup() for name in REGULARISERS)


@pytest.mark.parametrize("name", REGULARISERS)
def test_a_regulariser_that_is_fixed_is_every_trials_and_changes_no_draw(name: str) -> None:
    plain, fixed = make_space(), make_space(**{name: 0.1})
    assert fixed.distributions() == plain.distributions()
    assert [replace(params, **{name: 0.0}) for params in fixed.startup()] == list(plain.startup())
    assert {getattr(params, name) for params in fixed.startup()} == {0.1}
    assert fixed.fingerprint() == {**plain.fingerprint(), f"space.{name}": "0.1"}
    assert Space.from_json(json.loads(json.dumps(fixed.to_json()))) == fixed


@pytest.mark.parametrize("name", REGULARISERS)
def test_a_regulariser_that_is_searched_starts_at_its_least(name: str) -> None:
    listed, ranged = make_space(**{name: [0.2, 0, 0.1]}), make_space(**{name: {"low": 0, "high": 0.5}})
    assert listed.distributions()[name] == CategoricalDistribution(("0.2", "0.0", "0.1"))
    assert ranged.distributions()[name] == FloatDistribution(0.0, 0.5)
    assert {getattr(params, name) for space in (listed, ranged) for params in space.startup()} == {0.0}
    assert {getattr(params, name) for params in make_space(**{name: [0.2, 0.1]}).startup()} == {0.1}
    logged = make_space(**{name: {"low": 0.01, "high": 0.5, "log": True}})
    assert logged.distributions()[name] == FloatDistribution(0.01, 0.5, log=True)
    for space, value in ((listed, "0.1"), (ranged, 0.1)):
        params = space.from_optuna({**space.to_optuna(space.startup()[0]), name: value})
        assert getattr(params, name) == 0.1 and space.to_optuna(params)[name] == value
        with pytest.raises(StudyError, match=name):
            space.from_optuna({**space.to_optuna(params), name: 0.7})


def test_a_weight_decay_takes_no_weight_whole() -> None:
    assert "space.weight_decay 250 at learning rate 0.004" in refusal(4_800, weight_decay=250)
    assert "keep it below 250" in refusal(4_800, weight_decay={"low": 0, "high": 300})
    assert "at learning rate 0.5" in refusal(4_800, weight_decay=[0, 2], learning_rate=[0.1, 0.5])
    assert build(4_800, weight_decay=2, learning_rate=0.1)[0].fixed == {"weight_decay": 2.0}


def test_a_task_without_head_has_no_learning_rate_for_one() -> None:
    space, notes = build(4_800, has_head=False, head_learning_rate=1e-3)
    assert not space.has_head
    assert "head_learning_rate" not in space.distributions()
    assert notes == ["the task has no head: head_learning_rate is not used"]
    assert all(params.head_learning_rate is params.head_scale is None for params in space.startup())


def test_the_start_up_points_are_the_documented_ones() -> None:
    points = make_space(4_800).startup()
    assert [(p.target_modules, p.allocation, p.rank) for p in points] == [
        ("all-linear", "uniform", 10),
        ("mlp", "adaptive", 16),
        ("all-linear", "adaptive", 10),
    ]
    assert [(p.scaling, p.learning_rate) for p in points] == [(2.0, 2e-3), (8.0, 5e-4), (4.0, 1e-3)]
    assert {p.scaling * p.learning_rate for p in points} == {4e-3}


def test_start_up_points_keep_to_a_narrowed_space_and_are_there_once() -> None:
    fixed = {
        "scaling": 2.0,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-3,
        "head_scale": 1.0,
        "target_modules": "mlp",
    }
    points = make_space(4_800, **fixed, allocation="uniform", rank=2).startup()
    assert len(points) == 1
    assert (points[0].rank, points[0].learning_rate, points[0].allocation) == (2, 1e-3, "uniform")
    two = make_space(4_800, **fixed, rank={"low": 1, "high": 4}).startup()
    assert [(p.rank, p.allocation) for p in two] == [(4, "uniform"), (4, "adaptive")]


def test_start_up_values_go_to_the_nearest_that_is_allowed() -> None:
    space = make_space(learning_rate=[1e-4, 3e-3], scaling={"low": 3, "high": 4})
    assert [p.learning_rate for p in space.startup()] == [3e-3, 1e-4, 3e-3]
    assert [p.scaling for p in space.startup()] == [3.0, 4.0, 4.0]


def test_without_the_preferred_groups_the_first_points_use_those_there_are() -> None:
    space, _ = build_space(SpaceConfig(), {"q,v": ATTENTION}, 1_000, has_head=False, max_rank=None)
    assert {p.target_modules for p in space.startup()} == {"q,v"}


def test_a_group_that_does_not_fit_at_rank_1_starts_from_the_gradient() -> None:
    space, notes = build(300)
    assert list(space.groups) == ["attention", "mlp", "all-linear"]
    assert notes == [
        "all-linear cannot have rank 1 at every layer, which costs 480: the gradient chooses where it starts"
    ]
    assert space.dim("rank").high == 1
    assert list(space.gradient_groups) == ["all-linear"]
    # What may start uniform comes first, so that plain LoRA is tried; the third is for the gradient.
    points = [(p.target_modules, p.rank, p.start) for p in space.startup()]
    assert points == [("mlp", 1, "uniform"), ("mlp", 1, "uniform"), ("all-linear", 0, "gradient")]


def test_below_rank_1_everywhere_the_gradient_decides_under_the_whole_budget() -> None:
    notes = build(191)[1]
    assert [note.split(" cannot")[0] for note in notes] == ["attention", "mlp", "all-linear"]
    space, _ = build(191, target_modules="all-linear")
    assert "rank" not in space.distributions()
    gains = {layer.name: (1.0,) for layer in ATTENTION + MLP}
    space = space.with_gains(gains | {"block.1.mlp": (3.0, 2.9), "block.2.attention": (1.5, 0.1)})
    plan = space.starting_plan(space.startup()[0])
    # Per parameter: mlp 3 / 96 and 2.9 / 96, attention 1.5 / 64.
    assert {name: rank for name, rank in plan.ranks.items() if rank} == {
        "block.1.mlp": 1,
        "block.2.attention": 1,
    }
    wide = replace(space, budget=2 * 96)
    assert wide.starting_plan(wide.startup()[0]).ranks["block.1.mlp"] == 2
    limited = replace(wide, max_rank=1)
    assert max(limited.starting_plan(limited.startup()[0]).ranks.values()) == 1


@pytest.mark.parametrize("gains", [{}, {f"block.{i}.mlp": (5.0,) for i in range(3)}])
def test_where_nothing_affordable_has_a_gain_the_last_layer_that_fits_comes_first(
    gains: dict[str, tuple[float, ...]],
) -> None:
    space = build(70)[0].with_gains({layer.name: () for layer in ATTENTION + MLP} | gains)
    plan = space.gradient_plan("all-linear", 2.0)
    assert [layer.name for layer in plan.live] == ["block.2.attention"]
    assert (plan.parameters, plan.scaling) == (64, 2.0)


def test_a_plan_from_a_gradient_that_was_not_measured_is_refused() -> None:
    space = build(191)[0]
    with pytest.raises(ValueError, match=r"not measured at block\.0\.attention and"):
        space.starting_plan(space.startup()[0])


def test_a_group_with_no_affordable_component_is_left_out() -> None:
    space, notes = build(90)
    assert list(space.groups) == ["attention", "all-linear"]
    assert notes[1] == "mlp is left out: one component costs at least 96, over the budget"


def test_a_budget_below_one_component_names_the_smallest_that_would_do() -> None:
    assert refusal(63) == (
        "--budget 63 buys nothing here: one component of the cheapest layer, block.0.attention, "
        "costs 64; raise it to that or more"
    )
    assert build(64)[0].startup()[0].rank == 0


@pytest.mark.parametrize("kept", [{"start": "uniform"}, {"min_rank": 1}, {"rank": 1}])
def test_who_asks_for_ranks_gets_them_or_an_error(kept: dict[str, Any]) -> None:
    least = kept.pop("min_rank", 0)

    def make(budget: int) -> tuple[Space, list[str]]:
        config = SpaceConfig.model_validate(kept)
        return build_space(config, GROUPS, budget, has_head=False, max_rank=None, min_rank=least)

    space, notes = make(300)
    assert list(space.groups) == ["attention", "mlp"] and not space.gradient_groups
    assert notes == ["all-linear is left out: rank 1 costs 480, over the budget"]
    with pytest.raises(CommandError) as caught:
        make(191)
    assert str(caught.value) == (
        "--budget 191 buys nothing here: the cheapest group, attention, needs 192 at rank 1; "
        "raise it or narrow --target-modules"
    )


def test_a_start_from_the_gradient_can_be_asked_for() -> None:
    space, notes = build(4_800, start="gradient")
    assert notes == [] and "rank" not in space.distributions()
    assert {p.start for p in space.startup()} == {"gradient"}
    space, _ = build(4_800, start=["uniform", "gradient"])
    assert space.distributions()["start"] == CategoricalDistribution(("uniform", "gradient"))
    assert [(p.rank, p.start) for p in space.startup()] == [(10, "uniform"), (16, "uniform"), (0, "gradient")]
    space = space.with_gains({layer.name: (1.0,) for layer in ATTENTION + MLP})
    first, *_, third = space.startup()
    assert space.starting_plan(third).parameters == 4_800
    # No rank is the rank of such a trial: whatever was drawn, it is the same trial, stored as one.
    raw = space.to_optuna(first) | {"start": "gradient"}
    drawn = {space.from_optuna({**raw, "rank": rank}) for rank in (1, 5, 25)}
    assert len(drawn) == 1
    assert space.to_optuna(drawn.pop())["rank"] == 1
    listed = build(4_800, start=["uniform", "gradient"], rank=[4, 8])[0]
    assert listed.to_optuna(listed.startup()[2])["rank"] == "4"


def test_a_lowest_rank_counts_when_groups_are_dropped() -> None:
    space, notes = build(1_000, rank=[4, 5])
    assert list(space.groups) == ["attention"]
    assert [note.split(" is left out: ")[1] for note in notes] == [
        "rank 4 costs 1,152, over the budget",
        "rank 4 costs 1,920, over the budget",
    ]
    assert "needs 768 at rank 4; raise it or lower space.rank" in refusal(700, rank=4)


def test_a_budget_above_full_rank_is_capped_and_said_so() -> None:
    space, notes = build(10**9)
    full = sum(layer.full_rank * layer.cost for layer in ATTENTION + MLP)
    assert notes == [
        f"the budget of 1,000,000,000 is more than full rank takes: at most {full:,} can be used"
    ]
    assert space.dim("rank").high == 32
    assert space.starting_plan(space.startup()[0]).parameters == full


def test_a_largest_rank_limits_the_space() -> None:
    space, notes = build(4_800, max_rank=3)
    assert space.dim("rank").high == 3
    assert notes == [
        "the budget of 4,800 is more than the largest rank allowed takes: at most 1,440 can be used"
    ]
    assert "rank 4 is above what attention can have, 3" in refusal_with_limit()


def refusal_with_limit() -> str:
    with pytest.raises(CommandError) as caught:
        build(4_800, max_rank=3, rank=4)
    return str(caught.value)


def test_ranks_that_cannot_be_bought_are_left_out() -> None:
    space, notes = build(1_000, rank=[1, 2, 64], target_modules="mlp")
    assert space.dim("rank").choices == (1, 2)
    assert notes == ["ranks above 3 are left out: the budget buys none of them"]
    space, notes = build(1_000, rank={"low": 1, "high": 64})
    assert space.dim("rank").high == 5
    assert notes == ["ranks end at 5, not 64: the budget buys no more"]


def test_a_rank_is_lowered_to_what_its_group_affords() -> None:
    space = make_space(1_000)
    raw = space.to_optuna(space.startup()[0])
    ranks = {
        group: space.from_optuna({**raw, "rank": 5, "target_modules": group}).rank for group in space.groups
    }
    assert ranks == {"attention": 5, "mlp": 3, "all-linear": 2}
    chosen = make_space(1_000, rank=[1, 2, 5])
    lowered = chosen.from_optuna({**raw, "rank": "5", "target_modules": "mlp"})
    assert lowered.rank == 2


def test_scalings_are_multiples_of_1024ths_and_stay_in_their_range() -> None:
    space, notes = build(4_800, scaling={"low": 0.3, "high": 0.7})
    assert notes[0] == "scaling 0.3 is used as 0.299805: scalings are multiples of 1/1024"
    dim = space.dim("scaling")
    raw = space.to_optuna(space.startup()[0])
    for value in (dim.low, 0.5001, dim.high):
        params = space.from_optuna({**raw, "scaling": value})
        assert params.scaling == snap_scaling(params.scaling)
        assert dim.contains(params.scaling)


def test_groups_of_the_same_layers_are_searched_once() -> None:
    groups = {"attention": ATTENTION, "query-value": tuple(reversed(ATTENTION)), "mlp": ()}
    space, notes = build_space(SpaceConfig(), groups, 4_000, has_head=False, max_rank=None)
    assert list(space.groups) == ["attention"]
    assert notes[0] == "query-value is left out: it has the same layers as attention"


def test_groups_can_be_narrowed_and_an_unknown_one_is_refused() -> None:
    assert make_space(target_modules=["mlp", "attention"]).dim("target_modules").choices == (
        "mlp",
        "attention",
    )
    message = refusal(4_000, target_modules=["mlp", "mpl"])
    assert "space.target_modules names mpl" in message
    assert "attention, mlp, all-linear" in message


def test_no_layers_at_all_is_refused() -> None:
    with pytest.raises(CommandError, match="no layers to adapt"):
        build_space(SpaceConfig(), {"attention": ()}, 10, has_head=False, max_rank=None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"budget": 100},
        {"rank": [1, 2, 4], "scaling": 2, "learning_rate": {"low": 1e-4, "high": 1e-3, "log": False}},
    ],
)
def test_a_space_is_the_same_after_json(settings: dict[str, Any]) -> None:
    space = make_space(**settings).with_gains({"block.0.mlp": (1 / 3, 0.0), "block.1.mlp": ()})
    again = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.distributions() == space.distributions()
    assert again.fingerprint() == space.fingerprint()


def test_all_choices_reach_optuna_as_strings() -> None:
    space = make_space(rank=[1, 2, 4], learning_rate=[1e-3, 2e-3])
    assert space.distributions()["rank"] == CategoricalDistribution(("1", "2", "4"))
    assert space.distributions()["learning_rate"] == CategoricalDistribution(("0.001", "0.002"))
    params = space.startup()[0]
    assert (params.rank, params.learning_rate) == (4, 2e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", 21),
        ("rank", 2.0),
        ("rank", True),
        ("scaling", 17.0),
        ("scaling", math.nan),
        ("learning_rate", "0.001"),
        ("target_modules", "../mlp"),
        ("allocation", ["uniform"]),
        ("allocation", None),
    ],
)
def test_values_outside_the_space_are_refused(name: str, value: Any) -> None:
    space = make_space()
    raw = space.to_optuna(space.startup()[0])
    with pytest.raises(StudyError, match=name):
        space.from_optuna({**raw, name: value})


def test_missing_and_unknown_parameters_are_refused() -> None:
    space = make_space()
    raw = space.to_optuna(space.startup()[0])
    with pytest.raises(StudyError, match="dropout"):
        space.from_optuna({**raw, "dropout": 0.1})
    del raw["rank"]
    with pytest.raises(StudyError, match="stored space"):
        space.from_optuna(raw)


def test_a_fingerprint_names_the_dimension_that_changed() -> None:
    one, other = make_space(target_modules=["mlp"]), make_space(target_modules=["mlp", "attention"])
    differing = {k for k, v in other.fingerprint().items() if one.fingerprint().get(k) != v}
    assert differing == {"space.rank", "space.target_modules", "space.layers"}
    assert other.fingerprint()["space.target_modules"] == "mlp, attention"


def test_no_trial_starts_below_the_least_rank() -> None:
    space, _ = build_space(SpaceConfig(), GROUPS, 4_000, has_head=False, max_rank=None, min_rank=2)
    assert space.dim("rank").low == 2
    assert all(params.rank >= 2 for params in space.startup())
