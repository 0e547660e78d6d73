"""How many lanes pay, as measured: the base is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autorank.adapter import wrapped_modules
from autorank.config import load_config
from autorank.display import Display
from autorank.engine import probe
from autorank.engine.probe import Throughput, measure_lanes
from autorank.errors import ModelError
from autorank.lane import TrialSpec
from autorank.plan import uniform_plan
from autorank.preflight import Setup, prepare


@pytest.fixture(scope="module")
def setup(tiny_llama: Path, tiny_completions: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    given = {"model": str(tiny_llama), "data": str(tiny_completions), "budget": "6k", "steps": 20}
    folder = str(tmp_path_factory.mktemp("studies"))
    return prepare(load_config(None, {**given, "batch_size": 4, "studies_dir": folder}), Display.silent())


def specs(setup: Setup) -> list[TrialSpec]:
    layers = setup.space.groups["all-linear"]
    return [TrialSpec(0, 0, uniform_plan(layers, rank, 2.0, 6000), True, 1e-2, None, None) for rank in (1, 2)]


def test_lanes_are_measured_and_leave_nothing_behind(setup: Setup) -> None:
    model = setup.base.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen, measured = measure_lanes(setup.bench, specs(setup), most=2)
    assert [one.lanes for one in measured] == [1, 2] and chosen in (1, 2)
    assert all(one.samples_per_s > 0 and one.memory_bytes == 0 for one in measured)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert wrapped_modules(model) == ({}, {}) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("rates", "most", "expected", "tried"),
    [
        ([100, 190, 250, 251], 16, 4, 4),
        ([100, 190, 250, 251], 3, 2, 2),
        ([100, 104], 16, 1, 2),
        ([100, 0], 16, 1, 2),
        ([100, 190, 380, 700, 1400, 2800, 0], 64, 32, 7),
        ([0, 0], 8, 1, 1),
    ],
)
def test_lanes_double_as_long_as_that_pays(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, rates: list[float], most: int, expected: int, tried: int
) -> None:
    asked: list[int] = []

    def measured(bench: object, specs: list[TrialSpec]) -> Throughput:
        asked.append(len(specs))
        return Throughput(len(specs), rates[len(asked) - 1], 0)

    monkeypatch.setattr(probe, "_measure", measured)
    chosen, found = measure_lanes(setup.bench, specs(setup), most=most)
    assert chosen == expected and len(found) == tried
    assert asked == [2**n for n in range(tried)]


def test_a_model_whose_samples_cannot_share_a_pass_has_one_lane(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = probe.train_lanes

    def apart(bench: object, lanes: list[object], **more: object) -> object:
        if len(lanes) > 1:
            raise ModelError("a layer sees 1 rows for 8 samples")
        return train(bench, lanes, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "train_lanes", apart)
    chosen, found = measure_lanes(setup.bench, specs(setup), most=8)
    assert (chosen, [one.reason for one in found]) == (1, ["", "a layer sees 1 rows for 8 samples"])
    assert wrapped_modules(setup.base.model) == ({}, {})


def test_what_does_not_fit_is_measured_as_nothing(setup: Setup) -> None:
    def full(module: torch.nn.Module, inputs: object) -> None:
        raise torch.OutOfMemoryError("no room")

    hook = setup.base.model.register_forward_pre_hook(full)
    chosen, found = measure_lanes(setup.bench, specs(setup), most=8)
    hook.remove()
    assert (chosen, [one.samples_per_s for one in found]) == (1, [0.0])
    assert wrapped_modules(setup.base.model) == ({}, {})
