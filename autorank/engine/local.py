"""The engine of one process: one lane at a time on the base model that the process holds."""

from __future__ import annotations

import gc

import torch

from autorank.allocator import RankAllocatorWarning
from autorank.engine import Event, Failed, Finished, Report
from autorank.lane import Bench, Lane, LaneState, TrialSpec
from autorank.train import NotFinite

__all__ = ["LocalEngine"]


class LocalEngine:
    """Trains one lane at a time in this process, in the calling thread."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._lane: Lane | None = None
        self._broken: Failed | None = None
        self._evaluated = 0

    def start(self, spec: TrialSpec, state: LaneState | None = None) -> None:
        """Put a trial on the lane; where that fails, `advance` says so.

        Raises:
            RuntimeError: the lane is taken.
        """
        if self._lane is not None or self._broken is not None:
            raise RuntimeError("the only lane is taken")
        try:
            self._lane = Lane(spec, self._bench, state)
            self._evaluated = self._lane.step
        except Exception as error:
            self._broken = Failed(spec.number, f"{_reason(error)} at the start", 0, 0)

    def advance(self) -> Event:
        """One optimizer step, or the evaluation that is due after it.

        Whatever goes wrong inside the trial comes back as `Failed`; the lane is then free.
        """
        if self._broken is not None:
            broken, self._broken = self._broken, None
            return broken
        lane = self._require()
        try:
            if lane.step in self._bench.recipe.evaluate_at and self._evaluated != lane.step:
                self._evaluated = lane.step
                value, noise = lane.evaluate()
                return Report(lane.spec.number, lane.step, None, lane.plan.parameters, value, noise)
            if lane.finished:
                return self._finish(lane)
            loss = lane.train()
            return Report(lane.spec.number, lane.step, loss, lane.plan.parameters)
        except NotFinite as error:
            return self._fail(lane, f"{error} (learning rate {lane.spec.learning_rate:.3g})")
        except RankAllocatorWarning as warning:
            return self._fail(lane, f"under strict: {warning}")
        except Exception as error:
            # A trial that fails is data: it must not take the study with it.
            return self._fail(lane, f"{_reason(error)} at step {lane.step + 1}")

    def _finish(self, lane: Lane) -> Event:
        if lane.best is None:
            return self._fail(lane, "no evaluation was due after ranks were fixed")
        heads = sum(parameter.numel() for parameter in lane.adapter.head_parameters().values())
        event = Finished(
            lane.spec.number, lane.best, lane.step, lane.samples, heads, lane.ledger(), lane.moved
        )
        self.close()
        return event

    def _fail(self, lane: Lane, reason: str) -> Failed:
        event = Failed(lane.spec.number, reason, lane.step, lane.samples)
        self.close()
        return event

    @property
    def free(self) -> int:
        """How many more trials can be started now: one or none."""
        return int(self._lane is None and self._broken is None)

    def snapshot(self, number: int) -> LaneState:
        """The state of the trial, which stays on the lane."""
        lane = self._require()
        if lane.spec.number != number:
            raise RuntimeError(f"trial {number} is not on the lane; trial {lane.spec.number} is")
        return lane.state()

    def pause(self, number: int) -> LaneState:
        """Take the trial off the lane and hand back its state."""
        state = self.snapshot(number)
        self.close()
        return state

    def close(self) -> None:
        """Free the lane and its memory, and leave the base model as it was."""
        if self._lane is None:
            return
        self._lane.close()
        self._lane = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _require(self) -> Lane:
        if self._lane is None:
            raise RuntimeError("no trial is on the lane: start one first")
        return self._lane


def _reason(error: Exception) -> str:
    """The error in one line, memory by its name."""
    lines = str(error).strip().splitlines()
    first = lines[0][:200] if lines else "no message"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory ({first})"
    return f"{type(error).__name__}: {first}"
