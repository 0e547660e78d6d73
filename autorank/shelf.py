"""What a study keeps of its trials on disk: adapters of the best, states of those that go on, no more.

Each is complete or absent, see `artifacts.py`. Which trials there are, and how they stand, is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from autorank.artifacts import ArtifactStore, read_json, write_json
from autorank.errors import StudyError
from autorank.lane import Bench, Checkpoint, LaneState
from autorank.record import Score, TrialRecord, best_of
from autorank.space import Space

__all__ = ["Progress", "Shelf", "forecast", "kept"]


@dataclass(frozen=True)
class Progress:
    """What is known of a trial beside its state: its scores by step, and what it would be recorded with."""

    scores: Mapping[int, Score] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        scores = {str(step): asdict(score) for step, score in self.scores.items()}
        return {"scores": scores, "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> Progress:
        """Read what `to_json` wrote, and `source` holds.

        Raises:
            StudyError: it is something else.
        """
        try:
            scores = {
                int(step): Score(**{name: _number(value) for name, value in score.items()})
                for step, score in data["scores"].items()
            }
            facts = dict(data["facts"])
            _number(facts.get("seconds", 0.0))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise StudyError(f"{source} cannot be read ({error}): restore it from a copy") from error
        return cls(scores, facts)


class Shelf:
    """The artifacts of one study's trials.

    Args:
        store: where they are.
        bench: what knows how an adapter is written.
        labels: the names of the classes, where the task has some.
        keep: how many of the best adapters stay; those that the verdict needs do too.
    """

    def __init__(
        self, store: ArtifactStore, bench: Bench, labels: Sequence[str] | None, *, keep: int
    ) -> None:
        self._store = store
        self._bench = bench
        self._labels = labels
        self._keep = keep

    def save_lane(self, number: int, state: LaneState, progress: Progress) -> None:
        """Store how far a trial is; an older state is replaced."""

        def fill(folder: Path) -> None:
            state.save(folder)
            write_json(folder / "progress.json", progress.to_json())

        best = {} if state.best is None else state.best.tensors
        seen = {} if state.allocator is None else state.allocator["tensors"]
        self._store.write_folder(_lane(number), fill, _bytes(state.tensors, state.optimizer, seen, best))

    def progress(self, number: int) -> Progress | None:
        """What was stored beside the trial's state, None where there is none."""
        if not self._store.exists(_lane(number)):
            return None
        path = self._store.path(_lane(number)) / "progress.json"
        return Progress.from_json(read_json(path), str(path))

    def lane(self, number: int) -> LaneState | None:
        """Where the trial goes on, None where it starts.

        Raises:
            StudyError: the state is damaged, or at a step that the trial has not.
        """
        if not self._store.exists(_lane(number)):
            return None
        state, steps = LaneState.load(self._store.path(_lane(number))), self._bench.recipe.steps
        if not 0 <= state.step <= steps:
            raise StudyError(
                f"the state of trial {number} is at step {state.step:,} of {steps:,}, so it was changed: "
                f"restore {self._store.path(_lane(number))} from a copy, or remove it to start the trial over"
            )
        return state

    def save_adapter(self, number: int, checkpoint: Checkpoint, *, dropout: float) -> dict[str, str]:
        """Store a checkpoint, trained with that dropout, as a plain PEFT adapter; returns its digest."""

        def fill(folder: Path) -> None:
            self._bench.save(folder, checkpoint, dropout=dropout)
            if self._labels is not None:
                write_json(folder / "labels.json", list(self._labels))

        self._store.write_folder(_adapter(number), fill, _bytes(checkpoint.tensors))
        return self._store.digest(_adapter(number))

    def tidy(self, records: Iterable[TrialRecord], direction: str, budget: int) -> None:
        """Remove what nobody needs any more: states of trials that ended, adapters that are not kept."""
        records = list(records)
        wanted = {_lane(record.number) for record in records if record.state == "RUNNING"}
        wanted |= {_adapter(number) for number in kept(records, direction, budget, self._keep)}
        for key in self._store.names():
            if key.startswith((_lane(""), _adapter(""))) and key not in wanted:
                self._store.remove(key)


def kept(records: Sequence[TrialRecord], direction: str, budget: int, keep: int) -> set[int]:
    """The trials whose adapters stay: the best, the best uniform one, and the pair of the very best."""
    left, numbers = list(records), set()
    for _ in range(keep):
        best = best_of(left, direction, budget)
        if best is not None:
            numbers.add(best.number)
            left.remove(best)
    best = best_of(records, direction, budget)
    uniform = best_of([record for record in records if record.is_uniform], direction, budget)
    pairs = [r for r in records if best is not None and r.state == "COMPLETE" and r.is_pair_of(best)]
    return numbers | {record.number for record in (uniform, *pairs[:1]) if record is not None}


def forecast(bench: Bench, space: Space, *, trials: int, keep: int) -> int:
    """Most bytes that a study may come to hold on disk; that every trial is paused at once is the worst case.

    A state holds the adapter, two moments and the best checkpoint, each with the head, and what the
    allocator has seen of the layers.
    """
    layers = {layer.name: layer for group in space.groups.values() for layer in group}
    words = _WORDS + _WORDS_OF_A_LAYER * len(layers)
    tensors = 4 * (space.budget + bench.head_parameters)
    seen = 4 * (space.budget + _SEEN * sum(layer.cost for layer in layers.values()))
    state = 4 * tensors + seen + words
    # One adapter and one state may be about to replace another; a commit keeps what it changes twice.
    adapters = (keep + _REFERENCES + 1) * (tensors + words)
    return adapters + (trials + 1) * (state + 2 * words) + tensors + _DATABASE


_REFERENCES = 2
"""Adapters that the verdict may need beside the best: the best uniform one, and the pair."""
# Bytes of JSON, file heads and rows of a trial, with its ledger; and of the database without any.
_WORDS, _WORDS_OF_A_LAYER, _DATABASE = 20_000, 4_000, 400_000
_SEEN = 8
"""Vectors that the allocator may hold of a layer, each of its input and output: twice what was found."""


def _number(value: Any) -> Any:
    """The value, which must be a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


def _bytes(*parts: Mapping[str, Tensor]) -> int:
    """What tensors take on disk, but for their names."""
    return sum(tensor.nbytes for part in parts for tensor in part.values())


def _lane(number: object) -> str:
    return f"lane-{number}"


def _adapter(number: object) -> str:
    return f"trial-{number}"
