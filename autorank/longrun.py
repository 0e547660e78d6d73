"""The long run: what a search found, its settings and ranks, trained anew for as long as is wanted.

Ranks are fixed from the first step on. It writes nothing, and the test split is not read.
"""

from __future__ import annotations

from dataclasses import replace

from autorank.display import Display
from autorank.errors import ModelError
from autorank.figures import format_value
from autorank.lane import Checkpoint, Lane, TrialSpec
from autorank.preflight import Setup
from autorank.record import TrialRecord
from autorank.train import NotFinite

__all__ = ["long_run"]

_TOLD = 10
"""So often it is said how far the training is."""


def long_run(setup: Setup, record: TrialRecord, *, steps: int, whole: bool, display: Display) -> Checkpoint:
    """Train a trial's settings at its final ranks, from the start.

    Args:
        setup: base model with the study's head, task and data.
        record: the trial, whose ranks, learning rates and seed hold.
        steps: how many; the learning rate rises and falls over all of them.
        whole: train on the validation rows too. Nothing is left to score then: what comes back is the
            last step, and its value is NaN.
        display: who watches.

    Returns:
        The checkpoint with the best validation score, or the last.

    Raises:
        ModelError: the training came to numbers that are not finite before there was a checkpoint.
    """
    bench, config = setup.bench, setup.config
    plan, params = record.plan, record.params
    count = min(config.evaluations, steps)
    points = () if whole else tuple(round(steps * (i + 1) / count) for i in range(count))
    rows = (*bench.train, *bench.validation) if whole else bench.train
    recipe = replace(bench.recipe, steps=steps, evaluate_at=points)
    spec = TrialSpec.of(params, number=record.number, seed=record.seed, plan=plan, adaptive=False)
    lane = Lane(spec, replace(bench, recipe=recipe, train=rows))
    try:
        _train(lane, steps, points, setup.task.metric.name, display)
        if whole:
            return Checkpoint(lane.step, float("nan"), {}, plan, lane.adapter.tensors())
    except NotFinite as error:
        if lane.best is None:
            rate = params.learning_rate
            raise ModelError(
                f"the training failed: {error} (learning rate {rate:.3g}); try another --trial"
            ) from error
        display.note(f"the training ends early: {error}")
    finally:
        lane.close()
    assert lane.best is not None
    return lane.best


def _train(lane: Lane, steps: int, points: tuple[int, ...], metric: str, display: Display) -> None:
    """All steps, with an evaluation at each of the points."""
    told = {round(steps * i / _TOLD) for i in range(1, _TOLD + 1)}
    while not lane.finished:
        loss = lane.train()
        if lane.step in points:
            value, _ = lane.evaluate()
            display.note(f"step {lane.step} of {steps}: validation {metric} {format_value(value)}")
        elif lane.step in told:
            display.note(f"step {lane.step} of {steps}: loss {format_value(loss)}")
