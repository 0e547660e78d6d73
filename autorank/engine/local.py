"""The engine of one process: lanes that share the forward passes of the base model that it holds.

Where a pass does not fit the memory, it is cut into smaller ones: the batch of every lane first, then
the lanes. What still does not fit fails, and leaves no memory behind.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from autorank.allocator import RankAllocatorWarning
from autorank.engine import Event, Failed, Finished, Notice, Report
from autorank.engine.memory import free_memory, is_full
from autorank.lane import Bench, Lane, LaneState, TrialSpec, train_lanes
from autorank.routing import Routing
from autorank.train import HalfTaken, NotFinite

__all__ = ["LocalEngine"]

T = TypeVar("T")

# What the command line shows with --debug: a failed trial is told in one line else.
_LOG = logging.getLogger(__name__)


class LocalEngine:
    """Trains lanes in this process, in the calling thread.

    Args:
        bench: what they train on.
        lanes: how many there are.
    """

    def __init__(self, bench: Bench, *, lanes: int = 1) -> None:
        self._bench = bench
        self._count = lanes
        # A lane alone needs none: PEFT's own path is the fastest.
        self._routing = Routing(bench.base.model) if lanes > 1 else None
        self._lanes: dict[int, Lane] = {}
        self._events: deque[Event] = deque()
        self._evaluated: dict[int, int] = {}
        self._whole_passes()

    def _whole_passes(self) -> None:
        """One pass for all lanes and all rows, until that does not fit."""
        self._parts, self._together, self._rows = 1, self._count, self._bench.recipe.batch_size

    @property
    def free(self) -> int:
        """How many more trials can be started now; what one that ended had is free when that is told."""
        ended = sum(isinstance(event, (Failed, Finished)) for event in self._events)
        return self._count - len(self._lanes) - ended

    @property
    def pending(self) -> bool:
        """Whether events of work that is done wait to be handed out."""
        return bool(self._events)

    def start(self, spec: TrialSpec, state: LaneState | None = None) -> None:
        """Put a trial on a lane; where that fails, `advance` says so.

        Raises:
            RuntimeError: every lane is taken.
        """
        if self.free < 1:
            raise RuntimeError("every lane is taken")
        used = {lane.adapter.name for lane in self._lanes.values()}
        name = next(name for number in range(self._count) if (name := f"lane{number:03}") not in used)
        try:
            self._lanes[spec.number] = Lane(spec, self._bench, state, name=name, routing=self._routing)
            self._evaluated[spec.number] = self._lanes[spec.number].step
        except Exception as error:
            _LOG.debug("trial %d failed at the start", spec.number, exc_info=True)
            self._events.append(Failed(spec.number, f"{_reason(error)} at the start", 0, 0, is_full(error)))
            free_memory()

    def advance(self) -> Event:
        """One optimizer step of every lane, or the evaluation of one that is due.

        Whatever goes wrong inside a trial comes back as `Failed`; its lane is then free.
        """
        if self._events:
            return self._events.popleft()
        if not self._lanes:
            raise RuntimeError("no trial is on a lane: start one first")
        for lane in self._lanes.values():
            if self._is_due(lane):
                self._evaluated[lane.spec.number] = lane.step
                self._evaluate(lane)
                return self._events.popleft()
            if lane.finished:
                return self._finish(lane)
        lanes = list(self._lanes.values())
        self._fit(lambda: self._train(lanes), self._cut_pass, lanes)
        return self._events.popleft()

    def _is_due(self, lane: Lane) -> bool:
        at = lane.step
        return at in self._bench.recipe.evaluate_at and self._evaluated[lane.spec.number] != at

    def _train(self, lanes: list[Lane]) -> None:
        """A step of these lanes; those that have taken it are taken off the list."""
        while lanes:
            group = lanes[: self._together]
            found = train_lanes(self._bench, group, routing=self._routing, parts=self._parts)
            del lanes[: len(group)]
            full: list[Lane] = []
            for lane, loss in zip(group, found, strict=True):
                if isinstance(loss, Exception) and is_full(loss) and not isinstance(loss, HalfTaken):
                    full.append(lane)  # it has not taken the step, and may in smaller passes
                    error = loss
                elif isinstance(loss, Exception):
                    _LOG.debug("trial %d failed at step %d", lane.spec.number, lane.step + 1, exc_info=loss)
                    self._events.append(self._fail(lane, loss))
                else:
                    self._events.append(Report(lane.spec.number, lane.step, loss, lane.plan.parameters))
            if full:
                lanes[:0] = full
                raise error

    def _evaluate(self, lane: Lane) -> None:
        scored = self._fit(lambda: lane.evaluate(self._rows), self._cut_rows, [lane])
        if scored is not None:
            value, noise = scored
            self._events.append(Report(lane.spec.number, lane.step, None, lane.plan.parameters, value, noise))

    def _fit(self, work: Callable[[], T], cut: Callable[[], str | None], lanes: list[Lane]) -> T | None:
        """Do some work of lanes, in smaller pieces where it does not fit the memory.

        Args:
            work: raises where it fails; what it has done it does not do again.
            cut: makes the pieces smaller and says how; None where they are the smallest.
            lanes: whose work is left, as `work` keeps it: if it fails for good, those fail that it was
                at, and the others go on.
        """
        while True:
            try:
                return work()
            except Exception as error:
                _LOG.debug("the work of lanes failed", exc_info=True)
                failed = error.with_traceback(None)  # which would hold on to the tensors of the pass
            how = None
            if is_full(failed):
                free_memory()
                how = cut()
            elif len(lanes) > 1 and self._together > 1:
                how = self._one_by_one(failed)
            if how is None:
                for lane in lanes[: self._together]:
                    lanes.remove(lane)
                    self._events.append(self._fail(lane, failed))
                self._whole_passes()
                if not lanes:
                    return None
            else:
                self._events.append(Notice(how))

    def _cut_pass(self) -> str | None:
        size = min(self._bench.recipe.batch_size, len(self._bench.train))
        if self._parts < size:
            self._parts = min(2 * self._parts, size)
            return f"out of memory: every batch is trained in {self._parts} passes, whose gradients are added"
        if self._together > 1:
            self._together = -(-self._together // 2)
            together = (
                f"{self._together} lanes share a pass" if self._together > 1 else "each lane has its own pass"
            )
            return f"out of memory: {together}"
        return None

    def _cut_rows(self) -> str | None:
        if self._rows == 1:
            return None
        self._rows = -(-self._rows // 2)
        return f"out of memory: evaluations take {self._rows} rows at a time"

    def _one_by_one(self, error: Exception) -> str:
        """Find out who is at fault, or do without what cannot be shared."""
        self._together = 1
        return f"the lanes are trained one after the other: {_reason(error)}"

    def _finish(self, lane: Lane) -> Event:
        if lane.best is None:
            return self._fail(lane, RuntimeError("no evaluation was due after ranks were fixed"))
        if self._bench.recipe.strict and lane.idle:
            return self._fail(lane, RankAllocatorWarning(lane.moved))
        heads = sum(parameter.numel() for parameter in lane.adapter.head_parameters().values())
        event = Finished(
            lane.spec.number, lane.best, lane.step, lane.samples, heads, lane.ledger(), lane.moved
        )
        self._take_off(lane)
        return event

    def _fail(self, lane: Lane, error: Exception) -> Failed:
        if isinstance(error, NotFinite):
            reason = f"{error} (learning rate {lane.spec.learning_rate:.3g})"
        elif isinstance(error, RankAllocatorWarning):
            reason = f"under strict: {error}"
        else:
            reason = f"{_reason(error)} at step {lane.step + 1}"
        event = Failed(lane.spec.number, reason, lane.step, lane.samples, is_full(error))
        self._take_off(lane)
        return event

    def snapshot(self, number: int) -> LaneState:
        """The state of the trial, which stays on its lane."""
        if number not in self._lanes:
            there = ", ".join(map(str, self._lanes)) or "none"
            raise RuntimeError(f"trial {number} is not on a lane; on lanes are: {there}")
        return self._lanes[number].state()

    def pause(self, number: int) -> LaneState:
        """Take the trial off its lane and hand back its state."""
        state = self.snapshot(number)
        self._take_off(self._lanes[number])
        return state

    def finish(self, number: int) -> None:
        """End the trial where it is; `advance` says what it came to, or why it could not be started."""
        if number in self._lanes:
            self._events.append(self._finish(self._lanes[number]))

    def _take_off(self, lane: Lane) -> None:
        """Free a lane and its memory."""
        del self._lanes[lane.spec.number]
        lane.close()
        free_memory()

    def close(self) -> None:
        """Drop every lane and leave the base model as it was."""
        for lane in list(self._lanes.values()):
            self._take_off(lane)
        self._events.clear()


def _reason(error: Exception) -> str:
    """The error in one line, memory by its name."""
    lines = str(error).strip().splitlines()
    first = lines[0][:200] if lines else "no message"
    return f"out of memory ({first})" if is_full(error) else f"{type(error).__name__}: {first}"
