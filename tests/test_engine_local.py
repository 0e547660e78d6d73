"""The engine of one process: events in order, failures as data, lanes handed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autorank.adapter import lora_layers
from autorank.config import load_config
from autorank.display import Display
from autorank.engine import Event, Failed, Finished, Notice, Report, local
from autorank.engine.local import LocalEngine
from autorank.lane import Bench, Lane, TrialSpec
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


def drain(engine: LocalEngine, trials: int = 1) -> list[Event]:
    """Everything until so many trials have ended."""
    events: list[Event] = []
    while sum(isinstance(event, (Finished, Failed)) for event in events) < trials:
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


def test_a_trial_can_be_ended_where_it_is(setup: Setup) -> None:
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup))
    while not (isinstance(event := engine.advance(), Report) and event.value is not None):
        pass
    engine.finish(3)
    assert engine.pending and engine.free == 0  # what it had is free when its end is told
    last = engine.advance()
    assert isinstance(last, Finished) and engine.free == 1 and not lora_layers(setup.base.model)
    assert last.steps == last.checkpoint.step == event.step and last.checkpoint.value == event.value
    engine.finish(3)  # as of one that could not be started, whose failure is told already
    assert not engine.pending


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
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_trial_that_learns_nothing_says_so_and_fails_under_strict(
    setup: Setup, strict: bool, adaptive: bool
) -> None:
    engine = LocalEngine(replace(setup.bench, recipe=replace(setup.bench.recipe, strict=strict)))
    engine.start(spec(setup, learning_rate=0.0, adaptive=adaptive))
    end = drain(engine)[-1]
    assert not lora_layers(setup.base.model)
    if strict:
        last = setup.bench.recipe.schedule.final_step - 1 if adaptive else setup.bench.recipe.steps
        assert isinstance(end, Failed) and end.steps == last
        said = end.reason
        assert said.startswith("under strict: ")
    else:
        assert isinstance(end, Finished) and end.moved is not None
        said = end.moved
    assert "have learnt nothing" in said and "model.layers.0.self_attn.v_proj" in said


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_trial_that_trains_as_it_should_is_finished_under_strict(setup: Setup, adaptive: bool) -> None:
    engine = LocalEngine(replace(setup.bench, recipe=replace(setup.bench.recipe, strict=True)))
    engine.start(spec(setup, adaptive=adaptive))
    end = drain(engine)[-1]
    assert isinstance(end, Finished) and (end.moved is None) == (not adaptive)


@pytest.mark.parametrize("adaptive", [False, True])
def test_layers_that_no_gradient_reaches_are_named(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, adaptive: bool
) -> None:
    blocks: Any = setup.base.model.get_submodule("model.layers")
    monkeypatch.setattr(blocks[1], "forward", lambda hidden, *_, **__: hidden)  # left out of the model
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup, adaptive=adaptive))
    end = drain(engine)[-1]
    assert isinstance(end, Finished) and end.moved is not None
    assert "have learnt nothing: model.layers.1." in end.moved and "model.layers.0" not in end.moved
    monkeypatch.setattr(blocks[0], "forward", lambda hidden, *_, **__: hidden)
    engine.start(spec(setup, adaptive=adaptive))
    end = drain(engine)[-1]
    assert isinstance(end, Failed)
    assert end.reason == "RuntimeError: no layer with an adapter has a part in the loss at step 1"


@pytest.mark.parametrize(
    ("place", "error", "reason"),
    [
        (
            torch.linalg,
            torch.linalg.LinAlgError("svd: failed to converge"),
            "LinAlgError: svd: failed to con",
        ),
        (torch.linalg, torch.OutOfMemoryError("Tried to allocate"), "out of memory (Tried to allocate)"),
        (torch.optim.AdamW, torch.OutOfMemoryError("Tried to allocate"), "out of memory (Tried to allocate)"),
        (torch.optim.AdamW, MemoryError(), "out of memory (no message)"),
    ],
)
def test_what_fails_in_the_middle_of_a_step_is_not_tried_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, place: Any, error: Exception, reason: str
) -> None:
    """A move that is half made, or made before the optimizer failed, would be made twice."""
    alone = LocalEngine(setup.bench)
    alone.start(spec(setup, number=1, seed=1))
    expected = drain(alone)[-1]
    engine, name = LocalEngine(setup.bench, lanes=2), "svd" if place is torch.linalg else "step"
    real, move = getattr(place, name), setup.bench.recipe.schedule.moves[0]

    def broken(*arguments: Any, **settings: Any) -> Any:
        if steps and steps[-1] == move:
            steps.clear()
            raise error
        return real(*arguments, **settings)

    steps = [0]
    monkeypatch.setattr(place, name, broken)
    for number in range(2):
        engine.start(spec(setup, number=number, seed=number))
    events = []
    while not events or not isinstance(events[-1], Finished):
        events.append(engine.advance())
        if steps and isinstance(events[-1], Report) and events[-1].number == 0:
            steps.append(events[-1].step)
    failed = next(event for event in events if isinstance(event, Failed))
    assert failed.reason.lstrip("_").startswith(reason) and failed.reason.endswith(f" at step {move + 1}")
    assert (failed.number, failed.steps, failed.out_of_memory) == (0, move, "memory" in reason)
    assert not any(isinstance(event, Notice) for event in events) and not lora_layers(setup.base.model)
    end = events[-1]
    assert isinstance(end, Finished) and isinstance(expected, Finished) and end.number == 1
    assert end.checkpoint.value == pytest.approx(expected.checkpoint.value, abs=1e-5)
    assert [move["layer"] for move in end.ledger] == [move["layer"] for move in expected.ledger]


class Small:
    """A memory that holds so many rows in a forward pass; a hook on the base model."""

    def __init__(self, setup: Setup, rows: int) -> None:
        self.rows = rows
        self.seen: list[int] = []
        self._hook = setup.base.model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, module: torch.nn.Module, inputs: object, named: dict[str, torch.Tensor]) -> None:
        self.seen.append(len(named["input_ids"]))
        if self.seen[-1] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    def close(self) -> None:
        self._hook.remove()


def test_what_does_not_fit_is_trained_in_smaller_passes_to_the_same_end(setup: Setup) -> None:
    whole = LocalEngine(setup.bench)
    whole.start(spec(setup))
    expected = drain(whole)[-1]
    memory = Small(setup, 1)
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup))
    events = drain(engine)
    memory.close()
    notes = [event.text for event in events if isinstance(event, Notice)]
    assert [note.split(": ")[1] for note in notes] == [
        "every batch is trained in 2 passes, whose gradients are added",
        "every batch is trained in 4 passes, whose gradients are added",
        "evaluations take 2 rows at a time",
        "evaluations take 1 rows at a time",
    ]
    found = events[-1]
    assert isinstance(found, Finished) and isinstance(expected, Finished)
    assert found.checkpoint.value == pytest.approx(expected.checkpoint.value, abs=1e-5)
    assert [move["layer"] for move in found.ledger] == [move["layer"] for move in expected.ledger]
    assert found.samples == expected.samples


def test_fewer_lanes_share_a_pass_where_all_do_not_fit(setup: Setup) -> None:
    expected = []
    for number in range(3):
        alone = LocalEngine(setup.bench)
        alone.start(spec(setup, number=number, seed=number))
        expected.append(drain(alone)[-1])
    engine, memory = LocalEngine(setup.bench, lanes=3), Small(setup, 2)
    for number in range(3):
        engine.start(spec(setup, number=number, seed=number))
    events = drain(engine, 3)
    memory.close()
    notes = [event.text for event in events if isinstance(event, Notice)]
    assert any("2 lanes share a pass" in note for note in notes)
    ends = {event.number: event for event in events if isinstance(event, Finished)}
    for number, end in enumerate(expected):
        assert isinstance(end, Finished)
        assert ends[number].checkpoint.value == pytest.approx(end.checkpoint.value, abs=1e-5)


def test_what_fits_in_no_way_fails_and_leaves_nothing_behind(setup: Setup) -> None:
    engine, memory = LocalEngine(setup.bench, lanes=2), Small(setup, 0)
    for number in range(2):
        engine.start(spec(setup, number=number))
    events = drain(engine, 2)
    failed = [event for event in events if isinstance(event, Failed)]
    assert {event.number for event in failed} == {0, 1} and all(event.out_of_memory for event in failed)
    assert failed[0].reason == "out of memory (CUDA out of memory. Tried to allocate 2 GiB) at step 1"
    assert not lora_layers(setup.base.model) and engine.free == 2
    memory.rows = 99
    memory.seen.clear()
    engine.start(spec(setup))
    events = drain(engine)
    memory.close()
    assert isinstance(events[-1], Finished) and memory.seen[0] == 4  # in whole batches again
    assert not any(isinstance(event, Notice) for event in events)


def test_a_batch_is_cut_into_no_more_passes_than_it_has_rows(setup: Setup) -> None:
    bench = replace(setup.bench, recipe=replace(setup.bench.recipe, batch_size=3))
    engine, memory = LocalEngine(bench), Small(setup, 1)
    engine.start(spec(setup))
    events = [engine.advance() for _ in range(4)]
    memory.close()
    engine.close()
    cuts = [event.text.split(" in ")[1] for event in events if isinstance(event, Notice)]
    assert cuts == [f"{count} passes, whose gradients are added" for count in (2, 3)]
    assert [event.step for event in events if isinstance(event, Report)] == [1, 2]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, whose memory runs out for real"
)
def test_a_device_whose_memory_runs_out_goes_on_in_smaller_passes(setup: Setup) -> None:
    row, device = 100 * 2**20, torch.cuda.current_device()

    def fill(module: torch.nn.Module, inputs: object, named: dict[str, torch.Tensor]) -> None:
        torch.empty(len(named["input_ids"]) * row, dtype=torch.uint8, device=device)

    torch.cuda.empty_cache()
    baseline = torch.cuda.memory_allocated(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved(device) + 2.5 * row) / total, device
    )
    hook = setup.base.model.register_forward_pre_hook(fill, with_kwargs=True)
    try:
        engine = LocalEngine(setup.bench, lanes=2)
        for number in range(2):
            engine.start(spec(setup, number=number))
        events = drain(engine, 2)
    finally:
        hook.remove()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert sum(isinstance(event, Finished) for event in events) == 2
    notes = [event.text for event in events if isinstance(event, Notice)]
    assert any("trained in 4 passes" in note for note in notes) and any("rows at a time" in n for n in notes)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(device) <= baseline + 2**20


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError])
def test_an_error_of_one_lane_is_its_own(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, bad: int, kind: type[Exception]
) -> None:
    train = local.train_lanes

    def broken(bench: Bench, lanes: list[Lane], **settings: Any) -> Any:
        if any(lane.spec.number == bad and lane.step == 3 for lane in lanes):
            raise kind("of one")
        return train(bench, lanes, **settings)

    monkeypatch.setattr(local, "train_lanes", broken)
    engine = LocalEngine(setup.bench, lanes=3)
    for number in range(3):
        engine.start(spec(setup, number=number))
    ends = [event for event in drain(engine, 3) if isinstance(event, (Finished, Failed))]
    assert isinstance(ends[0], Failed) and (ends[0].number, ends[0].steps) == (bad, 3)
    assert "of one" in ends[0].reason and ends[0].out_of_memory == (kind is torch.OutOfMemoryError)
    assert [(type(end), end.number) for end in ends[1:]] == [(Finished, n) for n in range(3) if n != bad]


def test_a_lane_that_is_trained_alone_for_anothers_sake_may_need_smaller_passes(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One diverges, so that each is trained alone, and there memory is short for a moment."""
    train, hurt = local.train_lanes, []

    def short(bench: Bench, lanes: list[Lane], **settings: Any) -> Any:
        if lanes[0].step == 3 and len(lanes) == 2 and not hurt:
            hurt.append(True)
            return [*train(bench, lanes[:1], **settings), torch.OutOfMemoryError("for a moment")]
        return train(bench, lanes, **settings)

    monkeypatch.setattr(local, "train_lanes", short)
    engine = LocalEngine(setup.bench, lanes=2)
    for number in range(2):
        engine.start(spec(setup, number=number))
    events = drain(engine, 2)
    assert hurt and not any(isinstance(event, Failed) for event in events)
    assert any(isinstance(event, Notice) and "out of memory" in event.text for event in events)
    for number in range(2):
        steps = [e.step for e in events if isinstance(e, Report) and e.value is None and e.number == number]
        assert steps == list(range(1, setup.bench.recipe.steps + 1))


def test_a_trial_that_cannot_start_fails_like_any_other(setup: Setup) -> None:
    engine = LocalEngine(setup.bench)
    layers = setup.space.groups["all-linear"]
    engine.start(spec(setup, plan=RankPlan(layers, {layer.name: 0 for layer in layers}, 2.0)))
    failed = engine.advance()
    assert isinstance(failed, Failed) and "rank 0" in failed.reason
    assert not lora_layers(setup.base.model)


def test_memory_that_is_not_there_at_the_start_is_told_as_such(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Lane, "__init__", full)
    engine = LocalEngine(setup.bench)
    engine.start(spec(setup))
    failed = engine.advance()
    assert isinstance(failed, Failed) and failed.out_of_memory
    assert failed.reason == "out of memory (no room) at the start"


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
    with pytest.raises(RuntimeError, match="not on a lane"):
        engine.pause(8)
    engine.close()
    engine.close()
    assert not lora_layers(setup.base.model)


def test_a_lane_with_a_head_is_refilled_while_another_trains(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = {"model": str(tiny_bert), "data": str(tiny_data), "budget": "3k", "steps": 20}
    settings |= {"batch_size": 4, "max_length": 16, "studies_dir": str(tmp_path)}
    heads = prepare(load_config(None, settings), Display.silent())

    def trial(number: int) -> TrialSpec:
        return spec(
            heads, number=number, seed=number, adaptive=False, head_learning_rate=1e-2, head_scale=1.0
        )

    expected = []
    for number in range(3):
        alone = LocalEngine(heads.bench)
        alone.start(trial(number))
        expected.append(drain(alone)[-1])
    engine = LocalEngine(heads.bench, lanes=2)
    engine.start(trial(0))
    engine.start(trial(1))
    while getattr(engine.advance(), "value", None) is None:  # its head was the one in use when it leaves
        pass
    state = engine.pause(0)
    engine.start(trial(2))
    events = [engine.advance() for _ in range(6)]
    engine.pause(1)
    engine.start(trial(0), state)
    events += drain(engine, 2)
    engine.close()
    ends = {event.number: event for event in events if isinstance(event, Finished)}
    assert not any(isinstance(event, (Failed, Notice)) for event in events)
    for number in (0, 2):
        end = expected[number]
        assert isinstance(end, Finished)
        assert ends[number].checkpoint.value == pytest.approx(end.checkpoint.value, abs=1e-5)
        assert ends[number].checkpoint.scores["loss"] == pytest.approx(
            end.checkpoint.scores["loss"], abs=1e-4
        )
    assert not lora_layers(heads.base.model)


def test_a_failed_trial_leaves_its_traceback_in_the_log(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "autorank")
    engine = LocalEngine(setup.bench)
    layers = setup.space.groups["all-linear"]
    engine.start(spec(setup, plan=RankPlan(layers, {layer.name: 0 for layer in layers}, 2.0)))
    assert isinstance(engine.advance(), Failed)

    def broken(*_: object, **__: object) -> None:
        raise ValueError("broken in the pass")

    monkeypatch.setattr("autorank.engine.local.train_lanes", broken)
    engine.start(spec(setup))
    assert isinstance(engine.advance(), Failed)
    first, second = caplog.records
    assert "at the start" in first.message and first.exc_info is not None
    assert "broken in the pass" in caplog.text and second.exc_info is not None
