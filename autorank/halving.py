"""Who goes on at a rung: trials pause there, the best third goes on, and the others may still.

Asynchronous successive halving (ASHA, Li et al., MLSys 2020, arXiv 1810.05934, algorithm 2), with
three changes. A trial is planned at full length and paused, so that whoever goes on does so from
where it was and nothing is trained twice. A score that chance could have kept below the cut goes
on too: the cut is lowered by the noise of the score. And nobody is judged by few peers: at the
first rung a trial waits for them, as far as they will come; above it, it goes on without.

A trial is lost when it would not go on even if all who are still to come did worse than it: then,
and only then, it may be given up.

A trial that is no better for a while may end by itself, whoever its peers are: `stalled`.

Pure arithmetic. When rungs come, and that none comes before ranks have moved, is decided by who
asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Runner", "Verdict", "judge", "next_runner", "stalled", "verdict"]

Direction = Literal["maximize", "minimize"]
Verdict = Literal["on", "wait", "lost"]

REDUCTION = 3
"""Of so many trials at a rung one goes on; the paper's η, where 2 to 4 do alike."""
MIN_PEERS = 3
"""With fewer others at a rung nobody is judged."""


@dataclass(frozen=True)
class Runner:
    """One trial on its way: the score it had at each rung, by step.

    `noise` is the difference that chance makes to its last score. `waits` says that it is paused
    at the last of these rungs; one that does not may be running, or have ended.
    """

    number: int
    scores: Mapping[int, float]
    noise: float = 0.0
    waits: bool = False
    ended: bool = False

    @property
    def rung(self) -> int:
        """The step of its last score; 0 before the first."""
        return max(self.scores, default=0)


def judge(
    score: float,
    peers: Sequence[float],
    *,
    direction: Direction,
    noise: float,
    to_come: int,
    first: bool,
) -> Verdict:
    """What becomes of a trial that is paused at a rung.

    Args:
        score: The trial's own score. One that is not finite is lost.
        peers: The scores of all others that reached this rung, wherever they are now; those that
            are not finite do not count.
        direction: Which scores are better.
        noise: The difference that chance makes, at least 0, in the units of the score.
        to_come: How many others may still reach this rung.
        first: Whether this is the first rung, where a trial waits for peers to be judged by.
    """
    if not noise >= 0 or to_come < 0:
        raise ValueError(f"noise {noise} and to_come {to_come} must be at least 0")
    if not math.isfinite(score):
        return "lost"
    known = [peer for peer in peers if math.isfinite(peer)]
    if len(known) < MIN_PEERS:
        return "wait" if first and len(known) + to_come >= MIN_PEERS else "on"
    sign = 1.0 if direction == "maximize" else -1.0
    ranking = sorted((sign * value for value in (score, *known)), reverse=True)

    def within(entrants: int) -> bool:
        cut = ranking[math.ceil(entrants / REDUCTION) - 1] if entrants <= len(ranking) * REDUCTION else None
        return cut is None or cut - sign * score <= noise

    if within(len(ranking)):
        return "on"
    return "wait" if within(len(ranking) + to_come) else "lost"


def verdict(runner: Runner, runners: Iterable[Runner], *, direction: Direction, new: int) -> Verdict:
    """What becomes of a paused trial among all trials of a study.

    Args:
        runner: The trial, which has a score.
        runners: All trials that did not fail, this one too or not.
        direction: Which scores are better.
        new: How many trials are still to start.
    """
    others = [other for other in runners if other.number != runner.number]
    rung = runner.rung
    to_come = new + sum(not other.ended and rung not in other.scores for other in others)
    return judge(
        runner.scores[rung],
        [other.scores[rung] for other in others if rung in other.scores],
        direction=direction,
        noise=runner.noise,
        to_come=to_come,
        first=rung == min(runner.scores),
    )


def next_runner(runners: Sequence[Runner], *, direction: Direction, new: int) -> Runner | None:
    """The paused trial that goes on next: of those that may, the furthest, then the best, then the first."""
    sign = 1.0 if direction == "maximize" else -1.0
    able = [
        runner
        for runner in runners
        if runner.waits and verdict(runner, runners, direction=direction, new=new) == "on"
    ]
    return max(able, key=lambda r: (r.rung, sign * r.scores[r.rung], -r.number), default=None)


def stalled(scores: Mapping[int, float], *, direction: Direction, patience: int, settled: int) -> bool:
    """Whether a trial was no better than its best for so many evaluations.

    Any gain is one, as in early stopping elsewhere: what counts is the best score that there is to
    keep. Evaluations up to step `settled`, while ranks move, can be the best but do not count.

    Args:
        scores: The trial's own, by step.
        direction: Which scores are better.
        patience: How many evaluations, at least 1.
        settled: The step of the last move of ranks.
    """
    sign = 1.0 if direction == "maximize" else -1.0
    best = max(scores, key=lambda step: (sign * scores[step], -step), default=0)
    return sum(step > max(best, settled) for step in scores) >= patience
