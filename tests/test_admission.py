"""What the allocator takes: settings, layers, limits, a budget; whole models are in test_allocator.py."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn

from autorank.adapter import lora_layers
from autorank.admission import (
    RankLimits,
    check_budget,
    check_held,
    check_limits,
    check_model,
    check_room,
    check_settings,
    kept_layers,
    read_plan,
)
from autorank.errors import CommandError
from autorank.plan import LayerSpec, RankPlan, uniform_plan


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"importance": "magic"}, "importance 'magic': choose one of gradient_norm, singular_value"),
        ({"growth": "magic"}, "growth 'magic': choose one of gradient, plain"),
        ({"margin": 0.1}, "margin 0.1 must be a number of at least 1"),
        ({"margin": math.nan}, "margin nan must be a number of at least 1"),
        ({"min_rank": -1}, "min_rank -1 must be at least 0"),
        ({"max_rank": 0}, "max_rank 0 must be at least 1"),
        ({"min_rank": 6, "max_rank": 2}, "min_rank 6 is above max_rank 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object], message: str) -> None:
    settings = {"importance": "gradient_norm", "growth": "plain", "margin": 1.5, "min_rank": 0, "max_rank": 8}
    check_settings(**settings)  # type: ignore[arg-type]
    with pytest.raises(CommandError, match=message):
        check_settings(**{**settings, **wrong})  # type: ignore[arg-type]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)


def test_adapters_that_are_merged_are_refused() -> None:
    model = peft.get_peft_model(Pair(), peft.LoraConfig(r=2, target_modules=["first", "second"]))
    model.merge_adapter()  # type: ignore[operator]
    with pytest.raises(CommandError, match=r"'default' is merged into the weight of first.*unmerge_adapter"):
        read_plan(lora_layers(model, "default", live=False), "default")
    model.unmerge_adapter()  # type: ignore[operator]
    assert read_plan(lora_layers(model, "default", live=False), "default").ranks == {"first": 2, "second": 2}


def test_what_a_layer_gives_up_pays_for_no_rank_of_its_own() -> None:
    layers = (LayerSpec("dear", 10, 10), LayerSpec("cheap", 5, 5))
    plan = RankPlan(layers, {"dear": 1, "cheap": 0}, 2.0)
    check_room(plan, 20, RankLimits(0, 1, frozenset()))  # the dear one pays for the cheap one
    only = RankPlan(layers[:1], {"dear": 1}, 2.0)
    with pytest.raises(CommandError, match="no rank can ever move"):
        check_room(only, 39, RankLimits(0, 2, frozenset()))  # 19 are free, and its own 20 are not


def test_a_plan_is_read_off_the_layers() -> None:
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["first", "second"],
        rank_pattern={"^second$": 3}, alpha_pattern={"^second$": 6},
    )  # fmt: skip
    model = peft.get_peft_model(Pair(), config)
    plan = read_plan(lora_layers(model, "default", live=False), "default")
    assert plan.layers == (LayerSpec("first", 6, 5), LayerSpec("second", 5, 4))
    assert plan.ranks == {"first": 2, "second": 3} and plan.scaling == 2.0
    assert kept_layers(lora_layers(model), "default") == frozenset()


def test_a_rank_above_the_full_rank_of_its_layer_is_refused() -> None:
    model = peft.get_peft_model(Pair(), peft.LoraConfig(r=5, target_modules=["first", "second"]))
    with pytest.raises(
        CommandError, match="second has rank 5, more than its full rank of 4: give it a lower"
    ):
        read_plan(lora_layers(model), "default")


def test_scalings_that_differ_are_refused() -> None:
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["first", "second"], rank_pattern={"^second$": 3}
    )
    model = peft.get_peft_model(Pair(), config)
    with pytest.raises(CommandError, match=r"scalings differ between layers \(1.33333 to 2\)"):
        read_plan(lora_layers(model), "default")


class Two(nn.Module):
    """Two PEFT models in one."""

    def __init__(self) -> None:
        super().__init__()
        config = peft.LoraConfig(r=2, target_modules=["first"])
        self.one, self.other = peft.get_peft_model(Pair(), config), peft.get_peft_model(Pair(), config)


def test_two_configurations_of_one_name_are_refused() -> None:
    with pytest.raises(CommandError, match="several PEFT models with an adapter 'default'"):
        check_model(Two(), "default")


def test_layers_with_a_magnitude_are_kept() -> None:
    model = peft.get_peft_model(Pair(), peft.LoraConfig(r=2, target_modules=["first"], use_dora=True))
    assert kept_layers(lora_layers(model), "default") == {"first"}


WIDE, NARROW = LayerSpec("wide", 40, 60), LayerSpec("narrow", 3, 7)


def plan(wide: int, narrow: int) -> RankPlan:
    return RankPlan((WIDE, NARROW), {"wide": wide, "narrow": narrow}, 2.0)


def test_limits_are_those_given_and_the_full_rank() -> None:
    limits = RankLimits(0, None, frozenset({"wide"}))
    assert (limits.low(WIDE), limits.top(WIDE)) == (1, 40)
    assert (limits.low(NARROW), limits.top(NARROW)) == (0, 3)
    limits = RankLimits(2, 8, frozenset({"wide"}))
    assert (limits.low(WIDE), limits.top(WIDE)) == (2, 8)
    assert (limits.low(NARROW), limits.top(NARROW)) == (2, 3)


def test_a_start_outside_of_the_limits_is_refused() -> None:
    check_limits(plan(4, 2), RankLimits(2, 4, frozenset()))
    with pytest.raises(
        CommandError, match="1 layers start above max_rank 3, wide at rank 4: start from lower"
    ):
        check_limits(plan(4, 2), RankLimits(0, 3, frozenset()))
    with pytest.raises(
        CommandError, match="1 layers start below min_rank 3, narrow at rank 2: start from hig"
    ):
        check_limits(plan(4, 2), RankLimits(3, 4, frozenset()))


def test_a_budget_may_be_filled_and_no_more() -> None:
    start = uniform_plan((WIDE, NARROW), 2, 2.0, 2**62)
    check_budget(start, 220)
    with pytest.raises(CommandError, match="220 parameters already, over the budget of 219"):
        check_budget(start, 219)


def test_the_optimizer_must_hold_what_trains() -> None:
    held, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(held.parameters(), lr=0.1)
    check_held(optimizer, held.parameters())
    with pytest.raises(CommandError, match="the optimizer does not hold the adapter's parameters"):
        check_held(optimizer, [held.weight, other.weight])
    held.weight.requires_grad_(False)
    with pytest.raises(CommandError, match="the optimizer does not hold the adapter's parameters"):
        check_held(optimizer, held.parameters())


@pytest.mark.parametrize(
    ("ranks", "spare", "limits", "can"),
    [
        ((1, 1), 0, (0, None), True),  # narrow takes what wide gives
        ((1, 1), 0, (1, None), False),  # nobody may give
        ((1, 1), 9, (1, None), False),  # what is free buys nothing
        ((1, 1), 10, (1, None), True),  # it buys narrow
        ((1, 1), 99, (1, 1), False),  # nobody may take
        ((0, 3), 0, (0, None), False),  # all that narrow can give does not buy wide, and narrow is full
        ((0, 3), 70, (0, None), True),  # with what is free it does
        ((1, 0), 0, (0, 1), True),  # narrow has room, wide pays
    ],
)
def test_no_start_from_which_no_rank_can_ever_move(
    ranks: tuple[int, int], spare: int, limits: tuple[int, int | None], can: bool
) -> None:
    start = plan(*ranks)
    wanted = RankLimits(*limits, frozenset())
    if can:
        check_room(start, start.parameters + spare, wanted)
    else:
        with pytest.raises(CommandError, match="no rank can ever move"):
            check_room(start, start.parameters + spare, wanted)
