"""What a search has cost: samples and tokens trained on, and samples scored, which are counted apart.

The currency in which searches are compared. A step that a kill made to be done again counts once.
Pure arithmetic on the records that a study stores (JSON shapes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["COUNTS", "cost_of", "curve", "total_cost"]

COUNTS = ("samples", "tokens", "evaluation_samples")

Record = Mapping[str, Any]


def total_cost(trials: Sequence[Record]) -> dict[str, int]:
    """Each count over all trials, however they ended."""
    return {name: sum(trial.get(name) or 0 for trial in trials) for name in COUNTS}


def curve(trials: Sequence[Record], direction: str) -> list[list[float]]:
    """Best score so far against the training samples of the whole study: a pair for each better score.

    Scores are those of checkpoints after ranks are fixed; trials that failed have none.
    """
    sign = 1 if direction == "maximize" else -1
    scores = sorted(
        (score["spent"], trial["number"], score["value"])
        for trial in trials
        if trial.get("state") != "FAIL"
        for score in (trial.get("scores") or {}).values()
    )
    found: list[list[float]] = []
    for spent, _, value in scores:
        if not found or sign * value > sign * found[-1][1]:
            found.append([spent, value])
    return found


def cost_of(trials: Sequence[Record], direction: str) -> dict[str, Any]:
    """The totals, and the curve."""
    return {**total_cost(trials), "curve": curve(trials, direction)}
