"""Whether an allocator is called as it must be: once before each step of the optimizer that trains.

It warns and changes nothing.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch.optim import Optimizer

__all__ = ["RankAllocatorWarning", "StepWatch"]

WATCHED_STEPS = 8
"""Optimizer steps at the start that are watched, and calls after which the optimizer must have stepped."""

CROWDED_STEPS = 3
"""Optimizer steps in a row with several calls before each, which are no accident."""


class RankAllocatorWarning(UserWarning):
    """The allocator does not do what its user expects: it is not called, or ranks never moved."""


class StepWatch:
    """Counts an allocator's calls between the first steps of its optimizer.

    Args:
        optimizer: the bare one, whose hooks fire.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._calls = 0
        self._calls_since_step = 0
        self._optimizer_steps = 0
        self._crowded = 0
        self._late = 0
        this = weakref.ref(self)  # of an allocator that is gone nobody need be told

        def hook(*_: Any) -> None:
            watch = this()
            if watch is not None:
                watch._before_optimizer_step()

        self._handle = optimizer.register_step_pre_hook(hook)

    def _before_optimizer_step(self) -> None:
        self._optimizer_steps += 1
        # A gradient scaler skips optimizer steps that overflow, but not one before each that it makes.
        self._crowded = self._crowded + 1 if self._calls_since_step > 1 else 0
        if self._optimizer_steps == 2 and not self._calls:
            warnings.warn(
                "the optimizer makes its second step and allocator.step() was never called: call it "
                "right before every optimizer.step(), or ranks never move",
                RankAllocatorWarning,
                stacklevel=4,
            )
        if self._crowded == CROWDED_STEPS:
            times = self._calls_since_step
            warnings.warn(
                f"allocator.step() is called {times} times per optimizer.step(), so that ranks move "
                f"{times} times too early: call it once, right before every optimizer.step(), however "
                "many backward passes come before; with accelerate, where accelerator.sync_gradients is true",
                RankAllocatorWarning,
                stacklevel=4,
            )
        self._calls_since_step = 0

    def note_call(self) -> None:
        """Remember that the allocator was called."""
        self._calls += 1
        self._calls_since_step += 1
        # Each call has one optimizer step before it, the first one too.
        self._late = self._late + 1 if self._optimizer_steps == self._calls else 0
        if self._late == self._calls == CROWDED_STEPS:
            warnings.warn(
                "allocator.step() is called after optimizer.step(), where gradients are of weights that are "
                "gone: call it right before",
                RankAllocatorWarning,
                stacklevel=3,
            )
        if self._calls == WATCHED_STEPS and not self._optimizer_steps:
            warnings.warn(
                f"allocator.step() was called {self._calls} times and the allocator's optimizer has made no "
                "step: call it once, right before every optimizer.step(), and make it with the optimizer "
                "that trains, for another one would go on with parameters that a move has replaced",
                RankAllocatorWarning,
                stacklevel=3,
            )
        if self._optimizer_steps >= WATCHED_STEPS:
            self.close()

    def close(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()
