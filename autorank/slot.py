"""What the next slot of a study trains: a start-up point, a proposal, or the paired control.

A pure function of the trials so far and the study's seed; it stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from optuna.trial import FrozenTrial

from autorank.fingerprint import derive_seed
from autorank.record import TrialRecord, best_of
from autorank.sampler import Direction, Sampler, propose
from autorank.space import Allocation, Space, TrialParams

__all__ = ["SlotContent", "control_slot", "fill_slot", "untried"]


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
    sampler: Sampler = "tpe",
) -> SlotContent | None:
    """Decide what the slot after these trials trains.

    First come the start-up points, then proposals of the sampler. Of three proposals in a row
    one is uniform and one adaptive, so that both get an equal search; the third is free. What was
    tried is not trained again, nor anything as large as what did not fit the memory.

    Args:
        space: What a trial may be.
        records: All trials so far.
        history: The same as the sampler sees them, without those that failed.
        direction: Which values are better.
        study_seed: The seed of the study, from which those of its slots come.
        sampler: Who proposes.

    Returns:
        None where everything was tried, or nothing is left that is smaller than what did not fit.
    """
    slot, startup = len(records), space.startup()
    seed = derive_seed(study_seed, slot)
    barred = _barred(space, records)
    if slot < len(startup) and not barred(startup[slot]):
        return SlotContent(startup[slot], seed, None)
    left = untried(space, records)
    if left is not None and not left:
        return None
    forced = _forced(space, slot - len(startup))
    for attempt in range(_ATTEMPTS):
        draw = derive_seed(study_seed, slot, f"sampler/{attempt}" if attempt else "sampler")
        params = propose(space, history, direction=direction, seed=draw, fixed=forced, sampler=sampler)
        if not barred(params):
            return SlotContent(params, seed, None)
    if left is None:  # the sampler insists on what does not fit: the largest that may
        able = [other for other in _other_sizes(space, params) if not barred(other)]
        largest = max(able, key=lambda other: space.starting_plan(other).parameters, default=None)
        return None if largest is None else SlotContent(largest, seed, None)
    return SlotContent(left[seed % len(left)], seed, None)


_ATTEMPTS = 8


def _other_sizes(space: Space, params: TrialParams) -> list[TrialParams]:
    """The same with every group of layers, and every rank up to its own, that the space has."""
    groups = [str(group) for group in space.dim("target_modules").choices or ()]
    ranks = [int(rank) for rank in space.dim("rank").values() or () if int(rank) <= params.rank]
    return [
        replace(params, target_modules=group, rank=rank)
        for group in groups
        for rank in ranks
        if rank <= space.largest_rank(group)
    ]


def untried(space: Space, records: Sequence[TrialRecord]) -> list[TrialParams] | None:
    """What is left to try of a space that can be counted; None where it cannot."""
    barred = _barred(space, records)
    return None if space.points is None else [params for params in space.points if not barred(params)]


def _barred(space: Space, records: Sequence[TrialRecord]) -> Callable[[TrialParams], bool]:
    """Tells whether parameters were tried, or are as large as some that did not fit the memory."""
    tried = {record.params for record in records}
    sizes = [space.starting_plan(record.params).parameters for record in records if record.out_of_memory]
    limit = min(sizes, default=None)
    return lambda params: (
        params in tried or (limit is not None and space.starting_plan(params).parameters >= limit)
    )


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
