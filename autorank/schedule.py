"""When ranks move: warm-up, a window with a decaying share of moves, a final phase with fixed ranks.

Pure arithmetic over optimizer steps; which ranks move is decided in `allocation.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from autorank.errors import CommandError

__all__ = ["LEAST_INTERVAL", "Schedule", "learning_rate_factor", "make_schedule"]

LEAST_INTERVAL = 3
"""Fewest optimizer steps of evidence behind a move; fewer say more about the batch than the layer."""


@dataclass(frozen=True)
class Schedule:
    """The steps at which ranks may move, and the share of all components that may move there.

    Steps count from 0; a move at step t happens after t optimizer steps. `moves` is increasing
    and lies in [warm-up, final_step); from `final_step` to `total_steps` ranks are fixed.

    Raises:
        CommandError: the moves do not fit, as in `make_schedule`, or the share is not in (0, 1].
    """

    total_steps: int
    moves: tuple[int, ...]
    first_share: float
    final_step: int

    def __post_init__(self) -> None:
        _check_moves(self.moves)
        if not self.moves[-1] < self.final_step <= self.total_steps:
            raise CommandError(
                f"schedule: the last move is at step {self.moves[-1]}, ranks are fixed from step "
                f"{self.final_step} and training has {self.total_steps} steps: these must come in that "
                "order, and no move where ranks are fixed; move earlier or train longer"
            )
        if not 0 < self.first_share <= 1:
            raise CommandError(
                f"schedule: first_share {self.first_share} must be in (0, 1], the share of all components "
                "that may move at the first move; 0.1 is usual"
            )

    def share(self, step: int) -> float:
        """The share of components that may move at this step, 0 where no move is due.

        Falls linearly over the moves, so that the last ones are small: churn near the end of
        the window costs more than it finds.
        """
        if step not in self.moves:
            return 0.0
        return self.first_share * (1 - self.moves.index(step) / len(self.moves))


def make_schedule(
    total_steps: int,
    *,
    warmup: float = 0.1,
    until: float = 0.5,
    moves: int = 4,
    share: float = 0.1,
) -> Schedule:
    """Place up to `moves` moves evenly in the window from `warmup` to `until` of the steps.

    Moves stay at least 3 steps apart and 3 steps after the start; fewer are placed where the
    window is short.

    Args:
        total_steps: the trial's full planned length in optimizer steps.
        warmup: the steps before the first move: a fraction of all, or their number where it is an int.
        until: the step from which ranks are fixed, likewise; above `warmup`, at most 0.8 of all steps.
        moves: most moves, at least 1.
        share: share of all components that may move at the first one, in (0, 1].

    Raises:
        CommandError: the values are out of range, or no move would fit.
    """
    warmup, until = _fraction(warmup, total_steps), _fraction(until, total_steps)
    if not 0 <= warmup < until <= 0.8:
        raise CommandError(
            f"schedule: warmup {warmup} and until {until} leave no window: "
            "0 <= warmup < until <= 0.8 must hold, so that ranks can move and then settle"
        )
    if moves < 1 or not 0 < share <= 1:
        raise CommandError(f"schedule: moves {moves} must be at least 1 and share {share} in (0, 1]")
    first, final_step = _window(total_steps, warmup, until)
    room = final_step - first
    if room < LEAST_INTERVAL:
        least = _least_length(warmup, until)
        raise CommandError(
            f"schedule: {total_steps} steps are too few for ranks to move between {warmup:.0%} and "
            f"{until:.0%} of them: train for at least {least} steps (--steps {least}), or keep ranks as they "
            "start (--set space.allocation=uniform)"
        )
    count = min(moves, room // LEAST_INTERVAL)
    interval = room // count
    return Schedule(total_steps, tuple(first + interval * i for i in range(count)), share, final_step)


def _check_moves(moves: tuple[int, ...]) -> None:
    """Refuse no moves, and moves with too few steps of evidence before them."""
    if not moves:
        raise CommandError(
            "schedule: no moves were given: name one step at least, or use importance 'uniform' to keep ranks"
        )
    for before, move in itertools.pairwise((0, *moves)):
        if move - before < LEAST_INTERVAL:
            since = f"the one at step {before}" if before else "the start"
            raise CommandError(
                f"schedule: the move at step {move} comes {move - before} steps after {since}: moves must "
                f"increase and have {LEAST_INTERVAL} steps of evidence each; space them further apart"
            )


def _fraction(share: float, total_steps: int) -> float:
    """A number of steps as a fraction of all; a fraction as it is."""
    return share / max(1, total_steps) if isinstance(share, int) and share != 0 else float(share)


def _least_length(warmup: float, until: float) -> int:
    """The least number of steps for which one move fits."""
    # No fewer can do: the window is at most that share of the steps, and one step for rounding.
    steps = max(LEAST_INTERVAL, math.floor((LEAST_INTERVAL - 1) / (until - warmup)))
    while True:
        first, final_step = _window(steps, warmup, until)
        if final_step - first >= LEAST_INTERVAL:
            return steps
        steps += 1


def _window(total_steps: int, warmup: float, until: float) -> tuple[int, int]:
    """The first step at which ranks may move, and the first at which they may not any more."""
    slack = 1e-9  # a number of steps made a fraction and back is that number again
    first = max(LEAST_INTERVAL, math.ceil(total_steps * warmup - slack))
    return first, math.floor(total_steps * until + slack)


def learning_rate_factor(step: int, total_steps: int, warmup: float = 0.06) -> float:
    """The share of the peak learning rate at a step (from 0): linear warm-up, then linear decay to 0.

    Range (0, 1]: the last step still moves.
    """
    warmup_steps = max(1, round(total_steps * warmup))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (total_steps - step) / max(1, total_steps - warmup_steps)
