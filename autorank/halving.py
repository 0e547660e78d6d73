"""Who goes on at a rung: a trial is compared with what its peers scored at the same step.

Pure arithmetic. When rungs come, and that none comes before ranks had their moves, is decided
by who asks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

__all__ = ["goes_on"]


def goes_on(
    score: float,
    peers: Sequence[float],
    *,
    direction: Literal["maximize", "minimize"],
    min_peers: int = 3,
    noise: float,
) -> bool:
    """Whether a trial is worth going on with.

    It stops when it is worse than the median of its peers by more than the noise: the median
    stopping rule of Google Vizier (KDD 2017, section 3.2.2) with a margin, so that chance on a
    small validation set stops nobody. Peers are all others that reached this step, whether they
    are finished, stopped or still running: with lanes nobody is finished when it matters.

    Args:
        score: The trial's own score. One that is not finite never goes on.
        peers: The scores of the others at the same step; those that are not finite do not count.
        direction: Which scores are better.
        min_peers: With fewer peers than this everyone goes on.
        noise: The difference that chance makes, at least 0, in the units of the score.
    """
    if not noise >= 0 or min_peers < 1:
        raise ValueError(f"noise {noise} must be at least 0, min_peers {min_peers} at least 1")
    if not math.isfinite(score):
        return False
    known = [peer for peer in peers if math.isfinite(peer)]
    if len(known) < min_peers:
        return True
    sign = 1.0 if direction == "maximize" else -1.0
    return sign * (statistics.median(known) - score) <= noise
