from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from study_world import make_space

from autorank.errors import StudyError
from autorank.record import TrialRecord, best_of, plain

SPACE = make_space()
PARAMS = SPACE.startup()[0]
RAW = SPACE.to_optuna(PARAMS)
ATTRIBUTES = {"slot": 0, "seed": 5, "control_of": None}


def read(state: str = "COMPLETE", value: float | None = 0.5, **attributes: Any) -> TrialRecord:
    return TrialRecord.from_stored(SPACE, 0, state, value, RAW, {**ATTRIBUTES, **attributes})


def trial(number: int, value: float | None, **changes: Any) -> TrialRecord:
    return replace(TrialRecord(number, number, number, "COMPLETE", value, PARAMS, 100), **changes)


def test_the_json_of_a_record_has_all_that_show_promises() -> None:
    layer = SPACE.groups["all-linear"][0].name
    told = {"trainable_parameters": 960, "ranks": {layer: 2}, "steps": 7, "samples": 224, "note": "kept"}
    data = json.loads(json.dumps(read(record=told).to_json(), allow_nan=False))
    assert data["number"] == 0
    assert data["state"] == "COMPLETE"
    assert data["value"] == 0.5
    assert data["params"] == PARAMS.to_json()
    assert data["trainable_parameters"] == 960
    assert data["ranks"] == {layer: 2}
    assert data["starting_ranks"] == dict(SPACE.starting_plan(PARAMS).ranks)
    assert (data["steps"], data["samples"], data["reason"], data["note"]) == (7, 224, None, "kept")


def test_only_one_rank_at_all_layers_from_start_to_end_is_uniform() -> None:
    fixed = replace(PARAMS, rank=0)
    assert trial(0, 0.5).is_uniform
    assert not trial(0, 0.5, params=replace(PARAMS, allocation="adaptive")).is_uniform
    assert not trial(0, 0.5, params=fixed).is_uniform
    adaptive = trial(1, 0.5, seed=0, params=replace(fixed, allocation="adaptive"))
    assert adaptive.is_pair_of(trial(0, 0.5, params=fixed))
    assert not adaptive.is_pair_of(trial(0, 0.5))


@pytest.mark.parametrize("stored", [{}, {"plan": None}, {"plan": {"layers": [["a"]], "ranks": {}}}])
def test_a_record_without_the_ranks_of_its_adapter_is_told(stored: dict[str, Any]) -> None:
    plan = SPACE.starting_plan(PARAMS)
    assert read(record={"plan": plan.to_json()}).plan == plan
    with pytest.raises(StudyError, match="the record of trial 0 tells no ranks of its adapter"):
        _ = read(record=stored).plan


def test_json_knows_no_nan() -> None:
    assert plain({"a": math.nan, "b": [math.inf, 1.5], 3: (-math.inf, "x")}) == {
        "a": None,
        "b": [None, 1.5],
        "3": [None, "x"],
    }
    assert trial(0, math.nan).to_json()["value"] is None


def test_what_an_interrupted_run_left_is_not_shown() -> None:
    left = {"record": {"steps": 3}, "reason": "old"}
    running = read("RUNNING", None, **left)
    assert (running.steps, running.reason) == (None, None)
    assert read("FAIL", None, **left).reason == "old"


@pytest.mark.parametrize(
    "attributes",
    [
        {"record": {"ranks": {"../../etc/passwd": 2}}},
        {"record": {"ranks": {"block.0.attention": "many"}}},
        {"record": {"trainable_parameters": [1]}},
        {"record": {"metrics": 3}},
        {"record": "text"},
        {"seed": "x"},
        {"control_of": {}},
    ],
)
def test_attributes_that_autorank_did_not_write_are_refused(attributes: dict[str, Any]) -> None:
    with pytest.raises((StudyError, ValueError, TypeError, AttributeError)):
        read(**attributes)


def test_a_trial_without_slot_or_of_a_state_we_never_write_is_refused() -> None:
    with pytest.raises(StudyError, match="did not make trial 3"):
        TrialRecord.from_stored(SPACE, 3, "COMPLETE", 1.0, RAW, {"seed": 1})
    with pytest.raises(StudyError, match="WAITING"):
        read("WAITING", None)


def test_a_pair_differs_in_allocation_alone() -> None:
    one = trial(0, 0.5, seed=5)
    other = replace(one, params=replace(PARAMS, allocation="adaptive"), number=4)
    assert one.is_pair_of(other)
    assert other.is_pair_of(one)
    assert not one.is_pair_of(one)
    assert not one.is_pair_of(replace(other, seed=6))
    assert not one.is_pair_of(replace(other, params=replace(other.params, rank=1)))


def test_the_best_is_complete_finite_within_the_budget_and_the_first_of_equals() -> None:
    records = [
        trial(0, math.inf),
        trial(1, math.nan),
        trial(2, 0.99, state="PRUNED"),
        trial(3, 0.98, trainable_parameters=101),
        trial(4, 0.97, trainable_parameters=None),
        trial(5, 0.5),
        trial(6, 0.7),
        trial(7, 0.7),
        trial(8, None, state="RUNNING"),
    ]
    best = best_of(records, "maximize", budget=100)
    assert best is not None and best.number == 6
    best = best_of([trial(0, -math.inf), *records[5:]], "minimize", budget=100)
    assert best is not None and best.number == 5
    assert best_of(records[:5], "maximize", budget=100) is None
