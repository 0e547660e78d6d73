"""Who won, by how much, and what may be said of it.

Pure arithmetic on the records and results that a study stores (JSON shapes). A gain is written so
that + means better, whatever the metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autorank.figures import counted, format_difference, format_value

__all__ = ["gain", "is_better", "remarks", "score_of", "verdict"]

Record = Mapping[str, Any]

_SATURATED = 0.999

LEAST_SAMPLES = 100
"""Fewest samples on which a gain is claimed: an interval from fewer says little of other rows."""


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
    all_of_them = "Both complete trials" if complete == 2 else f"All {complete} complete trials"
    if complete > 1 and len(values) == 1:
        base = (result.get("references") or {}).get("frozen_base") or {}
        same = ", as the frozen base does" if score_of(base.get("validation"), metric) in values else ""
        found.append(
            f"{all_of_them} score {format_value(value)} on validation{same}: "
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
    """Does the winner beat what anyone has without a search, and uniform ranks? A sentence on each.

    How far the winner is ahead of the frozen base is said of test where there is one. Nothing more
    is claimed where the base is not behind; then both splits are told, if they disagree.

    A gain over uniform is claimed only where the winner is adaptive, the 95 % interval of its pair
    lies above 0 on at least `LEAST_SAMPLES` samples, and control and best uniform trial are behind it. The
    interval is that of the test split where there is one: on validation the winner was chosen for
    its score, its control was not. Behind is: worse on validation, and no better on test. A winner
    that started from the gradient has a control with those ranks, fixed and not uniform: then that
    is what is said. Samples are what the task scores: rows, packed sequences, questions.
    """
    winner = next((t for t in trials if t.get("number") == result.get("best")), None)
    if winner is None:
        return "No verdict: no trial is complete, finite and within the budget."
    references = result.get("references") or {}
    base, uniform, control = (references.get(key) or {} for key in ("frozen_base", "uniform", "control"))
    scores = {"validation": winner.get("value"), "test": score_of(result.get("test"), metric)}
    pair = _pair_words(winner, control, metric)
    lead = _lead(_margins(scores, base, metric, direction))
    if lead is not None:
        return f"No gain over the frozen base, which is {lead}; {pair}."
    ahead = _ahead_words(_margins(scores, base, metric, direction))
    params = winner.get("params") or {}
    against = "fixed ranks" if params.get("rank") == 0 else "uniform"
    if params.get("allocation") != "adaptive":
        itself = "has these" if params.get("rank") == 0 else "is uniform"
        return (
            f"{ahead}No gain over {against}: the winner, trial {winner['number']}, {itself} itself; {pair}."
        )
    _, difference = _difference(control)
    if difference is None or difference["low"] is None:  # of a loss that some samples of the rows lack
        return f"{ahead}No verdict on {against}: {pair}."
    rivals = []
    lead = _lead(_margins(scores, control, metric, direction))
    if lead is not None and difference["low"] > 0:  # else the pair says it already
        rivals.append(f"and the control is {lead}")
    rival = _lead(_margins(scores, uniform, metric, direction))
    if rival is not None and uniform.get("number") != control.get("number"):
        rivals.append(f"and the best uniform trial, {uniform.get('number')}, is {rival}")
    if difference["low"] > 0 and lead is None and rival is None:
        if difference.get("n", LEAST_SAMPLES) < LEAST_SAMPLES:
            few = f"{counted(int(difference['n']), 'sample')} are too few to claim a gain"
            return f"{ahead}No verdict on {against}, for {few}: {pair}."
        return f"{ahead}Adaptive ranks beat {against} here: {pair}."
    return f"{ahead}No gain over {against}: {', '.join([pair, *rivals])}."


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
    low, high = (format_difference(difference[key]) for key in ("low", "high"))
    samples = f" on {counted(int(difference['n']), 'sample')}" if difference.get("n") else ""
    return (
        f"{split} {metric} {_better(difference['mean'])} (95 % interval {low} to {high}{samples}; + favours "
        f"the winner) for trial {winner['number']} against its control, trial {control.get('number')}; "
        "one pair, one seed"
    )


def _better(gain: float | None) -> str:
    """A gain in words: whether a larger number is better need not be known."""
    if gain is None:
        return "not known"
    size = format_value(abs(gain))
    if not float(size.replace(",", "")):
        return "no different"
    return f"{'better' if gain > 0 else 'worse'} by {size}"


Margins = Mapping[str, float | None]


def _margins(
    scores: Mapping[str, Any], reference: Mapping[str, Any], metric: str, direction: str
) -> dict[str, float | None]:
    """How far the winner's scores are ahead of a reference's, by split."""
    return {
        split: gain(score, score_of(reference.get(split), metric), direction)
        for split, score in scores.items()
    }


def _ahead_words(margins: Margins) -> str:
    """How far the winner is ahead of the frozen base, as a sentence; nothing where that is not known."""
    split = "validation" if margins["test"] is None else "test"
    margin = margins[split]
    if margin is None:
        return ""
    if margin:
        return f"The winner is ahead of the frozen base by {format_value(margin)} on {split}. "
    other = f", ahead by {format_value(margins['validation'])} on validation" if margins["validation"] else ""
    return f"The winner is level with the frozen base on {split}{other}. "


def _lead(margins: Margins) -> str | None:
    """Where a reference is not behind the winner, in words: ahead on a split, or level on validation.

    The other split is told as well, unless it says the same.
    """
    known = {split: margin for split, margin in margins.items() if margin is not None}
    if not any(margin < 0 for margin in known.values()) and margins["validation"] != 0:
        return None
    ahead = [f"by {format_value(-margin)} on {split}" for split, margin in known.items() if margin < 0]
    words = [f"ahead {' and '.join(ahead)}"] if ahead else []
    level = [f"on {split}" for split, margin in known.items() if margin == 0]
    words += [f"level {' and '.join(level)}"] if level else []
    words += [
        f"though the winner is ahead by {format_value(margin)} on {split}"
        for split, margin in known.items()
        if margin > 0
    ]
    return ", ".join(words)
