"""The engine of one process: events in order, failures as data, lanes handed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autorank.adapter import lora_layers
from autorank.config import load_config
from autorank.display import Display
from autorank.engine import Event, Failed, Finished, Report
from autorank.engine.local import LocalEngine
from autorank.lane import TrialSpec
from autorank.plan import RankPlan, uniform_plan
from autorank.preflight import Setup, prepare


@pytest.fixture(scope="module")
def setup(tiny_llama: Path, tiny_completions: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    config = load_config(
        None,
        {
            "model": str(tiny_llama),
            "data": str(tiny_completions),
            "budget": "6k",
            "steps": 20,
            "batch_size": 4,
            "max_length": 24,
            "studies_dir": str(tmp_path_factory.mktemp("studies")),
        },
    )
    return prepare(config, Display.silent())


def spec(setup: Setup, **changes: object) -> TrialSpec:
    layers = setup.space.groups["all-linear"]
    first = TrialSpec(3, 1, uniform_plan(layers, 2, 2.0, setup.space.budget), True, 1e-2, None, None)
    return replace(first, **changes)  # type: ignore[arg-type]


def drain(engine: LocalEngine) -> list[Event]:
    events: list[Event] = []
    while not isinstance(events[-1] if events else None, (Finished, Failed)):
        events.append(engine.advance())
    return events


def test_a_trial_reports_every_step_and_every_evaluation(setup: Setup) -> None:
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup))
    events = drain(engine)
    reports = [event for event in events if isinstance(event, Report)]
    assert [e.step for e in reports if e.value is None] == list(range(1, 21))
    assert tuple(e.step for e in reports if e.value is not None) == setup.bench.recipe.evaluate_at
    losses = [e.loss for e in reports if e.loss is not None]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert all(e.parameters <= spec(setup).plan.parameters for e in reports)
    assert all(e.noise is not None and e.noise > 0 for e in reports if e.value is not None)
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.number, last.steps, last.samples, last.head_parameters) == (3, 20, 80, 0)
    assert last.checkpoint.value == min(e.value for e in reports if e.value is not None)
    assert last.ledger and not lora_layers(setup.base.model)


def test_a_failure_is_an_event_and_frees_the_lane(setup: Setup) -> None:
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup, learning_rate=1e30))
    failed = drain(engine)[-1]
    assert isinstance(failed, Failed)
    assert "step" in failed.reason and "1e+30" in failed.reason
    assert not lora_layers(setup.base.model)
    engine.start(spec(setup))
    assert isinstance(drain(engine)[-1], Finished)


@pytest.mark.parametrize("strict", [False, True])
def test_a_trial_that_learns_nothing_says_so_and_fails_under_strict(setup: Setup, strict: bool) -> None:
    engine = LocalEngine(replace(setup.bench, recipe=replace(setup.bench.recipe, strict=strict)))
    engine.start(spec(setup, learning_rate=0.0))
    end = drain(engine)[-1]
    assert not lora_layers(setup.base.model)
    if strict:
        assert isinstance(end, Failed) and end.steps == setup.bench.recipe.schedule.final_step - 1
        said = end.reason
        assert said.startswith("under strict: ")
    else:
        assert isinstance(end, Finished) and end.moved is not None
        said = end.moved
    assert "have learnt nothing" in said and "model.layers.0.self_attn.v_proj" in said


def test_a_trial_that_trains_as_it_should_is_finished_under_strict(setup: Setup) -> None:
    engine = LocalEngine(replace(setup.bench, recipe=replace(setup.bench.recipe, strict=True)))
    engine.start(spec(setup))
    assert isinstance(drain(engine)[-1], Finished)


def test_out_of_memory_is_named(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup))

    def full(*arguments: object, **settings: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    with monkeypatch.context() as patch:
        patch.setattr("autorank.lane.train_step", full)
        failed = engine.advance()
    assert isinstance(failed, Failed)
    assert failed.reason == "out of memory (CUDA out of memory. Tried to allocate 2 GiB) at step 1"


def test_a_trial_that_cannot_start_fails_like_any_other(setup: Setup) -> None:
    engine = LocalEngine(setup.bench)
    layers = setup.space.groups["all-linear"]
    engine.start(spec(setup, plan=RankPlan(layers, {layer.name: 0 for layer in layers}, 2.0)))
    failed = engine.advance()
    assert isinstance(failed, Failed) and "rank 0" in failed.reason
    assert not lora_layers(setup.base.model)


def test_a_paused_trial_goes_on_in_another_engine(setup: Setup) -> None:
    whole = LocalEngine(setup.bench)
    whole.start(spec(setup))
    expected = drain(whole)[-1]
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup))
    while engine.advance().step < 11:  # type: ignore[union-attr]
        pass
    state = engine.pause(3)
    assert not lora_layers(setup.base.model)
    other = LocalEngine(setup.bench)
    other.start(spec(setup), state)
    found = drain(other)[-1]
    assert isinstance(found, Finished) and isinstance(expected, Finished)
    assert found.checkpoint.value == expected.checkpoint.value
    assert found.ledger == expected.ledger


def test_one_lane_takes_one_trial(setup: Setup) -> None:
    engine = LocalEngine(setup.bench)
    with pytest.raises(RuntimeError, match="no trial"):
        engine.advance()
    engine.start(spec(setup))
    with pytest.raises(RuntimeError, match="taken"):
        engine.start(spec(setup))
    with pytest.raises(RuntimeError, match="not on the lane"):
        engine.pause(8)
    engine.close()
    engine.close()
    assert not lora_layers(setup.base.model)
