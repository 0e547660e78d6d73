from __future__ import annotations

from dataclasses import replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial
from study_world import make_space, score

from autorank.fingerprint import derive_seed
from autorank.record import TrialRecord
from autorank.slot import SlotContent, control_slot, fill_slot, untried
from autorank.space import Space


def end(space: Space, number: int, content: SlotContent, **changes: Any) -> TrialRecord:
    """The record of that slot's trial, complete and within the budget."""
    parameters = space.starting_plan(content.params).parameters
    complete = TrialRecord(
        number, number, content.seed, "COMPLETE", score(content.params), content.params, parameters
    )
    return replace(complete, control_of=content.control_of, **changes)


def frozen(space: Space, record: TrialRecord) -> FrozenTrial:
    return create_trial(
        state=TrialState[record.state],
        value=record.value,
        params=space.to_optuna(record.params),
        distributions=space.distributions(),
    )


def fill(space: Space, records: list[TrialRecord], *, last: bool = False, seed: int = 0) -> SlotContent:
    history = [frozen(space, record) for record in records if record.state != "FAIL"]
    control = control_slot(space, records, direction="maximize") if last else None
    content = control or fill_slot(space, records, history, direction="maximize", study_seed=seed)
    assert content is not None
    return content


def search(space: Space, total: int, seed: int = 0) -> list[TrialRecord]:
    records: list[TrialRecord] = []
    for number in range(total):
        records.append(end(space, number, fill(space, records, last=number == total - 1, seed=seed)))
    return records


def test_slots_are_start_up_points_then_proposals_then_the_control() -> None:
    space = make_space()
    records = search(space, 8)
    assert tuple(record.params for record in records[:3]) == space.startup()
    best = max(records[:7], key=lambda record: record.value or 0)
    assert records[7].control_of == best.number
    assert records[7].is_pair_of(best)
    assert [record.control_of for record in records[:7]] == [None] * 7


def test_among_three_proposals_one_is_uniform_and_one_adaptive() -> None:
    allocations = [record.params.allocation for record in search(make_space(), 16)[3:15]]
    assert allocations[0::3] == ["uniform"] * 4
    assert allocations[1::3] == ["adaptive"] * 4


def test_proposals_depend_on_seed_and_history_alone() -> None:
    space = make_space()
    records = search(space, 4)
    assert fill(space, records) == fill(space, records)
    assert fill(space, records).params != fill(space, records, seed=1).params
    better = [*records[:1], replace(records[1], value=2.0), *records[2:]]
    assert fill(space, better).params != fill(space, records).params


def test_proposals_learn_from_the_history() -> None:
    space = make_space(
        rank=2,
        scaling=2.0,
        head_learning_rate=1e-3,
        head_scale=1.0,
        target_modules="mlp",
        allocation="uniform",
    )
    records = [end(space, 0, fill(space, []))]
    low, high = 6e-4, 3e-3
    for number in range(1, 21):
        rate = high if number % 2 else low
        params = replace(records[0].params, learning_rate=rate * (1 + number / 100))
        records.append(replace(end(space, number, SlotContent(params, 0, None)), value=float(rate == high)))
    drawn = [fill(space, records, seed=seed).params.learning_rate for seed in range(12)]
    assert sum(rate > 1.5e-3 for rate in drawn) >= 10


def test_seeds_come_from_study_seed_and_slot() -> None:
    records = search(make_space(), 6, seed=7)
    assert [record.seed for record in records[:5]] == [derive_seed(7, slot) for slot in range(5)]


def test_a_pair_that_exists_makes_the_last_slot_ordinary() -> None:
    space = make_space()
    records = search(space, 5)
    assert records[4].control_of is not None
    content = fill(space, records, last=True)
    best = max(records, key=lambda record: record.value or 0)
    assert best.number in (4, records[4].control_of)
    assert content.control_of is None
    assert content.seed == derive_seed(0, 5)


def test_the_control_is_of_the_best_that_may_win() -> None:
    space = make_space()
    records = search(space, 4)[:3]
    records[0] = replace(records[0], value=float("inf"))
    records[1] = replace(records[1], value=99.0, trainable_parameters=space.budget + 1)
    assert fill(space, records, last=True).control_of == 2
    records[2] = replace(records[2], state="FAIL", value=None)
    assert fill(space, records, last=True).control_of is None


def test_a_single_allocation_has_no_control() -> None:
    space = make_space(allocation="uniform")
    records = search(space, 4)
    assert [record.control_of for record in records] == [None] * 4
    assert {record.params.allocation for record in records} == {"uniform"}


def test_a_first_slot_that_is_the_last_is_the_default() -> None:
    space = make_space()
    assert fill(space, [], last=True) == SlotContent(space.startup()[0], derive_seed(0, 0), None)


def test_when_every_start_up_point_failed_the_draw_is_random_but_repeatable() -> None:
    space = make_space()
    failed = [replace(end(space, n, fill(space, [])), state="FAIL", value=None) for n in range(4)]
    assert fill(space, failed) == fill(space, failed)
    assert fill(space, failed).params not in space.startup()


FEW = {
    "rank": [1, 2],
    "scaling": 2.0,
    "learning_rate": [1e-3, 2e-3],
    "head_learning_rate": 1e-3,
    "head_scale": 1.0,
    "target_modules": "mlp",
}


def test_of_a_space_that_can_be_counted_everything_is_tried_once() -> None:
    space = make_space(**FEW)
    assert space.points is not None and len(space.points) == 8
    assert make_space().points is None
    records: list[TrialRecord] = []
    for number in range(8):
        assert untried(space, records) is not None and len(untried(space, records) or []) == 8 - number
        records.append(end(space, number, fill(space, records)))
    assert {record.params for record in records} == set(space.points)
    history = [frozen(space, record) for record in records]
    assert fill_slot(space, records, history, direction="maximize", study_seed=0) is None


def test_what_failed_is_not_tried_again_either() -> None:
    space = make_space(**FEW)
    records: list[TrialRecord] = []
    for number in range(8):
        ended = end(space, number, fill(space, records), reason="the loss is nan")
        records.append(replace(ended, state="FAIL", value=None))
    assert {record.params for record in records} == set(space.points or ())


def test_a_start_up_point_as_large_as_what_did_not_fit_is_passed_over() -> None:
    space = make_space()
    startup = space.startup()
    least = min(startup, key=lambda params: space.starting_plan(params).parameters)
    first = replace(end(space, 0, fill(space, [])), params=least, state="FAIL", value=None)
    records = [replace(first, extra={"out_of_memory": True})]
    content = fill(space, records)
    assert content.params != startup[1]
    limit = space.starting_plan(least).parameters
    assert (
        space.starting_plan(content.params).parameters < limit <= space.starting_plan(startup[1]).parameters
    )


def test_nothing_as_large_as_what_did_not_fit_is_proposed_again() -> None:
    for space in (make_space(), make_space(rank={"low": 1, "high": 8})):
        records = search(space, 4)[:3]
        middle = replace(records[0], params=replace(records[0].params, rank=3), state="FAIL", value=None)
        records[0] = replace(middle, extra={"out_of_memory": True})
        limit = space.starting_plan(records[0].params).parameters
        for number in range(3, 12):
            content = fill(space, records)
            assert space.starting_plan(content.params).parameters < limit
            records.append(end(space, number, content))
    for space in (make_space(), make_space(rank={"low": 1, "high": 8})):
        records = search(space, 4)[:3]
        least = replace(records[0].params, target_modules="attention", rank=1, allocation="uniform")
        records[0] = replace(
            records[0], params=least, state="FAIL", value=None, extra={"out_of_memory": True}
        )
        history = [frozen(space, record) for record in records[1:]]
        assert fill_slot(space, records, history, direction="maximize", study_seed=0) is None
    counted = make_space(**FEW)
    first = end(counted, 0, fill(counted, []))
    first = replace(first, state="FAIL", value=None, extra={"out_of_memory": True})
    assert {params.rank for params in untried(counted, [first]) or ()} == {1} - {first.params.rank}
