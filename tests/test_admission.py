"""What the allocator takes as settings; models and layers are tried in test_allocator.py."""

from __future__ import annotations

import math

import peft
import pytest
from torch import nn

from autorank.adapter import lora_layers
from autorank.admission import check_model, check_settings, kept_layers, read_plan
from autorank.errors import CommandError
from autorank.plan import LayerSpec


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
