"""What stays on disk, and what goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from study_world import make_space

from autorank.artifacts import ArtifactStore
from autorank.record import Score, TrialRecord
from autorank.shelf import Progress, Shelf, kept

BUDGET = 4000


def record(number: int, value: float | None, state: Any = "COMPLETE", **changes: Any) -> TrialRecord:
    params = replace(make_space().startup()[0], allocation="adaptive", **changes.pop("params", {}))
    return TrialRecord(number, number, number, state, value, params, 100, **changes)


def uniform(number: int, value: float, **changes: Any) -> TrialRecord:
    first = record(number, value, **changes)
    return replace(first, params=replace(first.params, allocation="uniform"))


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(1, {3, 1}), (2, {3, 4, 1}), (3, {3, 4, 2, 1}), (9, {0, 1, 2, 3, 4})],
)
def test_the_best_and_the_best_uniform_stay(keep: int, expected: set[int]) -> None:
    records = [
        uniform(0, 0.1), uniform(1, 0.2), record(2, 0.5), record(3, 0.9), record(4, 0.7),
        record(5, 0.99, "PRUNED"), record(6, None, "FAIL"), record(7, None, "RUNNING"),
        replace(record(8, 5.0), trainable_parameters=BUDGET + 1),
    ]  # fmt: skip
    assert kept(records, "maximize", BUDGET, keep) == expected


def test_the_pair_of_the_best_stays_whatever_it_scored() -> None:
    best = record(0, 0.9)
    pair = replace(best, number=3, value=0.1, params=replace(best.params, allocation="uniform"), control_of=0)
    records = [best, record(1, 0.8), uniform(2, 0.85), pair]
    assert kept(records, "maximize", BUDGET, 1) == {0, 2, 3}
    assert kept([*records, record(4, 0.95)], "maximize", BUDGET, 1) == {4, 2}
    assert kept([], "maximize", BUDGET, 3) == set()


def test_progress_is_read_back() -> None:
    progress = Progress({5: Score(0.5, 0.1, 20, 300, 40, 60)}, {"seconds": 1.5, "ranks": {"a": 2}})
    assert Progress.from_json(progress.to_json(), "it") == progress


def test_tidying_leaves_what_is_not_a_trials(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    for key in ("frozen", "lane-0", "lane-1", "lane-7", "trial-0", "trial-1", "trial-2", "trial-9"):
        store.write_folder(key, lambda folder: (folder / "x").write_text("x") and None)
    shelf = Shelf(store, bench=None, labels=None, keep=1)  # type: ignore[arg-type]
    records = [record(0, 0.9), record(1, None, "RUNNING"), record(2, 0.3)]
    shelf.tidy(records, "maximize", BUDGET)
    # Trial 1 had an adapter that nobody was told of: it is written again when the trial ends.
    assert store.names() == ["frozen", "lane-1", "trial-0"]
    assert shelf.progress(7) is None and shelf.lane(7) is None
