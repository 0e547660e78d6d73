"""Who trains the lanes: the interface between the search and whatever runs the trials.

One single-threaded coordinator starts trials, asks the engine to advance, and alone talks to the
study. An engine knows no study, and decides nothing but the order of the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from autorank.lane import Checkpoint, LaneState, TrialSpec

__all__ = ["Engine", "Event", "Failed", "Finished", "Lost", "Notice", "Paused", "Report"]


@dataclass(frozen=True)
class Report:
    """A trial is `step` optimizer steps along; `value` only where it was just evaluated."""

    number: int
    step: int
    loss: float | None
    parameters: int
    value: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Paused:
    """A trial was taken off; it can be started again from its state."""

    number: int
    state: LaneState


@dataclass(frozen=True)
class Finished:
    """A trial did all its steps, or was ended before; the checkpoint is its best one.

    `ledger` holds every rank move, `moved` what they came to in a sentence, and which layers have
    learnt nothing; None where ranks are uniform and all have.
    """

    number: int
    checkpoint: Checkpoint
    steps: int
    samples: int
    head_parameters: int
    ledger: list[dict[str, Any]] = field(repr=False)
    moved: str | None


@dataclass(frozen=True)
class Failed:
    """A trial could not go on; the reason is for people, except that it did not fit the memory."""

    number: int
    reason: str
    steps: int
    samples: int
    out_of_memory: bool = False


@dataclass(frozen=True)
class Lost:
    """Whoever trained the trial is gone; it can be started again from its last stored state."""

    number: int


@dataclass(frozen=True)
class Notice:
    """The engine works in another way from now on; `text` is for people."""

    text: str


Event = Report | Paused | Finished | Failed | Lost | Notice


class Engine(Protocol):
    """Trains lanes, one or several at a time."""

    @property
    def free(self) -> int:
        """How many more trials can be started now."""

    @property
    def pending(self) -> bool:
        """Whether events of work that is done wait to be handed out."""

    def start(self, spec: TrialSpec, state: LaneState | None = None) -> None:
        """Put a trial on a lane, from the start or from a stored state."""

    def advance(self) -> Event:
        """Do the next piece of work and say what came of it.

        With several lanes a piece of work has several events; they are handed out one at a time
        before more is done. A trial's evaluation is a piece of work of its own.
        """

    def snapshot(self, number: int) -> LaneState:
        """The state of a trial, which stays on its lane."""

    def pause(self, number: int) -> LaneState:
        """Take a trial off its lane and hand back its state."""

    def finish(self, number: int) -> None:
        """End a trial where it is, after an evaluation; `advance` says what it came to."""

    def close(self) -> None:
        """Drop every lane and leave the base model as it was."""
