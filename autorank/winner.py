"""Who won, by how much, and the one sentence that may be said of it.

Pure arithmetic on the records and results that a study stores (JSON shapes). A gain is written so
that + means better, whatever the metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autorank.figures import format_difference, format_value

__all__ = ["gain", "is_better", "remarks", "score_of", "verdict"]

Record = Mapping[str, Any]

_SATURATED = 0.999

LEAST_ROWS = 100
"""Fewest rows on which a gain is claimed: an interval from fewer says little of other rows."""


def gain(winner: object, other: object, direction: str) -> float | None:
    """How much better `winner` is than `other`: positive is better, also where less is better."""
    if not isinstance(winner, (int, float)) or not isinstance(other, (int, float)):
        return None
    return winner - other if direction == "maximize" else other - winner


def is_better(record: Record, best: Record | None, *, direction: str, budget: int) -> bool:
    """Whether a record may win (complete, finite, within the budget) and beats `best`."""
    value, parameters = record.get("value"), record.get("trainable_parameters")
    if record.get("state") != "COMPLETE" or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    if parameters is not None and parameters > budget:
        return False
    return best is None or (gain(value, best.get("value"), direction) or 0.0) > 0


def score_of(metrics: object, name: str) -> float | None:
    """One metric out of a stored dictionary of them."""
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def remarks(result: Mapping[str, Any], *, trials: Sequence[Record], metric: str, direction: str) -> list[str]:
    """What should make people wonder about the scores, a sentence each.

    A validation score with nothing left to gain, trials that all have the same one, and a winner whose
    answers have nothing to do with the right ones: Matthews' correlation, or Pearson's, is exactly 0
    where all are the same, and Matthews' also where as many are right as by chance.
    """
    winner = next((t for t in trials if t.get("number") == result.get("best")), None)
    if winner is None:
        return []
    found, value = list[str](), score_of({metric: winner.get("value")}, metric)
    # chrF goes to 100, and a person's own metric, module:function, wherever it does.
    to_one = metric != "chrf" and ":" not in metric
    if direction == "maximize" and to_one and value is not None and value >= _SATURATED:
        found.append(
            f"Validation {metric} is {format_value(value)}: little is left to gain on these rows, so "
            "harder ones, or another --metric, would tell trials apart."
        )
    values = {t.get("value") for t in trials if t.get("state") == "COMPLETE"}
    complete = sum(t.get("state") == "COMPLETE" for t in trials)
    if complete > 1 and len(values) == 1:
        base = (result.get("references") or {}).get("frozen_base") or {}
        same = ", as the frozen base does" if score_of(base.get("validation"), metric) in values else ""
        found.append(
            f"All {complete} complete trials score {format_value(value)} on validation{same}: "
            "more rows, longer trials or another --metric would tell them apart."
        )
    blind = next((n for n in ("mcc", "pearson") if score_of(winner.get("metrics"), n) == 0.0), None)
    if blind is not None:
        chance = " or is right no more often than by chance," if blind == "mcc" else ""
        found.append(
            f"The winner's {blind} on validation is exactly 0: it says the same of every row,{chance} or "
            "these rows all have the same answer; its other scores mean little."
        )
    return found


def verdict(result: Mapping[str, Any], *, trials: Sequence[Record], metric: str, direction: str) -> str:
    """One sentence: does the winner beat what anyone has without a search, and uniform ranks?

    A gain over uniform is claimed only where the winner is adaptive, the 95 % interval of its pair
    lies above 0 on at least `LEAST_ROWS` rows, and control and best uniform trial are behind it. The
    interval is that of the test split where there is one: on validation the winner was chosen for
    its score, its control was not. Nothing is claimed where the frozen base is not behind. Behind
    is: worse on validation, and no better on test. A winner that started from the gradient has a
    control with those ranks, fixed and not uniform: then that is what is said.
    """
    winner = next((t for t in trials if t.get("number") == result.get("best")), None)
    if winner is None:
        return "No verdict: no trial is complete, finite and within the budget."
    references = result.get("references") or {}
    base, uniform, control = (references.get(key) or {} for key in ("frozen_base", "uniform", "control"))
    scores = {"validation": winner.get("value"), "test": score_of(result.get("test"), metric)}
    pair = _pair_words(winner, control, metric)
    lead = _lead(scores, base, metric, direction)
    if lead is not None:
        return f"No gain over the frozen base, which is {lead}; {pair}."
    params = winner.get("params") or {}
    against = "fixed ranks" if params.get("rank") == 0 else "uniform"
    if params.get("allocation") != "adaptive":
        itself = "has these" if params.get("rank") == 0 else "is uniform"
        return f"No gain over {against}: the winner, trial {winner['number']}, {itself} itself; {pair}."
    _, difference = _difference(control)
    if difference is None or difference["low"] is None:  # of a loss that some samples of the rows lack
        return f"No verdict on {against}: {pair}."
    lead = _lead(scores, uniform, metric, direction)
    rival = f", and the best uniform trial, {uniform.get('number')}, is {lead}"
    if difference["low"] > 0 and lead is None and _lead(scores, control, metric, direction) is None:
        if difference.get("n", LEAST_ROWS) < LEAST_ROWS:
            few = f"{int(difference['n'])} rows are too few to claim a gain"
            return f"No verdict on {against}, for {few}: {pair}."
        return f"Adaptive ranks beat {against} here: {pair}."
    return f"No gain over {against}: {pair}{'' if lead is None else rival}."


def _difference(control: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """The split and the difference that the verdict rests on: test, or validation without one."""
    if control.get("test_difference"):
        return "test", control["test_difference"]
    return "validation", control.get("difference")


def _pair_words(winner: Record, control: Mapping[str, Any], metric: str) -> str:
    """The pair in words: difference, interval, what it rests on."""
    split, difference = _difference(control)
    if difference is None:
        return f"trial {winner['number']} has no complete paired control"
    mean, low, high = (format_difference(difference[key]) for key in ("mean", "low", "high"))
    rows = f", {int(difference['n']):,} rows" if difference.get("n") else ""
    return (
        f"{split} {metric} {mean} (95 % interval {low} to {high}{rows}) for trial {winner['number']} against "
        f"its control, trial {control.get('number')}; + favours the winner; one pair, one seed"
    )


def _lead(scores: Mapping[str, Any], reference: Mapping[str, Any], metric: str, direction: str) -> str | None:
    """Where a reference is not behind the winner, in words: ahead on a split, or level on validation."""
    behind = {
        split: gain(score, score_of(reference.get(split), metric), direction)
        for split, score in scores.items()
    }
    for split, margin in behind.items():
        if margin is not None and margin < 0:
            return f"ahead by {format_value(-margin)} on {split}"
    return "level on validation" if behind["validation"] == 0 else None
