"""When a search ends: so many trials, so much time, so many samples, a score reached, or no progress.

Pure arithmetic on what has been used. What a search does when a limit is near is decided by who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autorank.errors import CommandError

__all__ = ["Limits", "Standing"]

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Standing:
    """How far a search is.

    `best` is the best score of any trial so far; `since_best` counts the trials with a score that
    were started after the one that has it.
    """

    trials: int = 0
    seconds: float = 0.0
    samples: int = 0
    best: float | None = None
    since_best: int = 0


@dataclass(frozen=True)
class Limits:
    """What ends a search, whichever comes first; None is no limit.

    `samples` are training samples over all trials, `target` is a validation score, and `plateau`
    so many trials in a row without a better score.
    """

    trials: int
    time_s: float | None = None
    samples: int | None = None
    target: float | None = None
    plateau: int | None = None

    def used(self, standing: Standing) -> dict[str, float]:
        """The share used of each limit that is a count, from 0."""
        pairs = {
            "trials": (standing.trials, self.trials),
            "time": (standing.seconds, self.time_s),
            "samples": (standing.samples, self.samples),
            "plateau": (standing.since_best, self.plateau),
        }
        return {name: used / limit for name, (used, limit) in pairs.items() if limit is not None}

    def nearest(self, standing: Standing) -> tuple[str, float]:
        """The limit of which the largest share is used, and that share."""
        used = self.used(standing)
        name = max(used, key=used.__getitem__)
        return name, used[name]

    def reached(
        self, standing: Standing, *, direction: Direction, samples: int, seconds: float
    ) -> str | None:
        """The limit that leaves no room but for what ends the search; None where there is more.

        Args:
            standing: how far the search is.
            direction: which scores are better.
            samples: how many the next piece of work and the end of the search may take.
            seconds: how long they may take.
        """
        if self.target is not None and standing.best is not None:
            sign = 1 if direction == "maximize" else -1
            if sign * standing.best >= sign * self.target:
                return "target"
        if self.plateau is not None and standing.since_best >= self.plateau:
            return "plateau"
        if self.samples is not None and standing.samples + samples > self.samples:
            return "samples"
        if self.time_s is not None and standing.seconds + seconds > self.time_s:
            return "time"
        return None

    def check(self, trial_samples: int) -> None:
        """Refuse a number of samples that one trial does not fit.

        Raises:
            CommandError: it is too small.
        """
        if self.samples is not None and self.samples < trial_samples:
            raise CommandError(
                f"--samples {self.samples:,} is less than the {trial_samples:,} training samples of one "
                "trial: raise it, or lower --steps or --batch-size"
            )
