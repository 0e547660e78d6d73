"""What the next slot of a study trains: a start-up point, a proposal, or the paired control.

A pure function of the trials so far and the study's seed; it stores nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from optuna.trial import FrozenTrial

from autorank.fingerprint import derive_seed
from autorank.record import TrialRecord, best_of
from autorank.sampler import Direction, propose
from autorank.space import Allocation, Space, TrialParams

__all__ = ["SlotContent", "control_slot", "fill_slot"]


@dataclass(frozen=True, slots=True)
class SlotContent:
    """Parameters and seed of a trial, and whose paired control it is."""

    params: TrialParams
    seed: int
    control_of: int | None


def fill_slot(
    space: Space,
    records: Sequence[TrialRecord],
    history: Sequence[FrozenTrial],
    *,
    direction: Direction,
    study_seed: int,
) -> SlotContent:
    """Decide what the slot after these trials trains.

    First come the start-up points, then proposals of the sampler. Of three proposals in a row
    one is uniform and one adaptive, so that both get an equal search; the third is free.

    Args:
        space: What a trial may be.
        records: All trials so far.
        history: The same as the sampler sees them, without those that failed.
        direction: Which values are better.
        study_seed: The seed of the study, from which those of its slots come.
    """
    slot, startup = len(records), space.startup()
    seed = derive_seed(study_seed, slot)
    if slot < len(startup):
        return SlotContent(startup[slot], seed, None)
    params = propose(
        space,
        history,
        direction=direction,
        seed=derive_seed(study_seed, slot, "sampler"),
        fixed=_forced(space, slot - len(startup)),
    )
    return SlotContent(params, seed, None)


def _forced(space: Space, turn: int) -> dict[str, str]:
    """The allocations take turns, and after each round comes a proposal that is free."""
    turns = (*_allocations(space), None)
    allocation = turns[turn % len(turns)]
    return {} if allocation is None else {"allocation": allocation}


def control_slot(space: Space, records: Sequence[TrialRecord], *, direction: Direction) -> SlotContent | None:
    """The paired control: the best trial once more, same seed and data order, with the other allocation.

    Returns:
        None where it exists, or there is nothing to pair.
    """
    best = best_of(records, direction, space.budget)
    if best is None or any(record.is_pair_of(best) for record in records):
        return None
    other = next((name for name in _allocations(space) if name != best.params.allocation), None)
    if other is None:
        return None
    return SlotContent(replace(best.params, allocation=other), best.seed, best.number)


def _allocations(space: Space) -> tuple[Allocation, ...]:
    return cast(tuple[Allocation, ...], space.dim("allocation").choices)
