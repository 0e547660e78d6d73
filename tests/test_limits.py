from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import CommandError
from autorank.limits import Limits, Standing


@pytest.mark.parametrize(
    ("limits", "standing", "expected"),
    [
        ({}, {"seconds": 1e9, "samples": 10**9, "best": 1.0, "since_best": 99}, None),
        ({"time_s": 60.0}, {"seconds": 50.0}, None),
        ({"time_s": 60.0}, {"seconds": 50.1}, "time"),
        ({"samples": 1000}, {"samples": 900}, None),
        ({"samples": 1000}, {"samples": 901}, "samples"),
        ({"plateau": 3}, {"since_best": 2}, None),
        ({"plateau": 3}, {"since_best": 3}, "plateau"),
        ({"target": 0.9}, {"best": None}, None),
        ({"target": 0.9}, {"best": 0.89}, None),
        ({"target": 0.9}, {"best": 0.9}, "target"),
    ],
)
def test_what_is_reached(limits: dict[str, Any], standing: dict[str, Any], expected: str | None) -> None:
    found = Limits(12, **limits).reached(Standing(**standing), direction="maximize", samples=100, seconds=10)
    assert found == expected


def test_a_target_is_below_where_less_is_better() -> None:
    limits = Limits(12, target=0.3)
    for best, expected in ((0.31, None), (0.3, "target"), (0.2, "target")):
        found = limits.reached(Standing(best=best), direction="minimize", samples=0, seconds=0)
        assert found == expected


def test_the_nearest_limit_is_that_of_which_most_is_used() -> None:
    limits = Limits(10, time_s=100.0, samples=1000, plateau=4)
    assert limits.nearest(Standing(trials=5, seconds=20.0, samples=100)) == ("trials", 0.5)
    assert limits.nearest(Standing(trials=5, seconds=60.0, samples=100)) == ("time", 0.6)
    assert limits.nearest(Standing(trials=5, seconds=60.0, samples=700)) == ("samples", 0.7)
    assert limits.nearest(Standing(trials=5, since_best=3)) == ("plateau", 0.75)
    assert Limits(10).used(Standing(trials=1, seconds=1e9)) == {"trials": 0.1}


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500), st.integers(0, 200))
def test_who_has_used_more_is_no_less_at_a_limit(used: int, more: int, limit: int, need: int) -> None:
    limits = Limits(3, samples=limit)

    def reached(samples: int) -> bool:
        standing = Standing(samples=samples)
        return limits.reached(standing, direction="maximize", samples=need, seconds=0) is not None

    assert reached(used) <= reached(used + more)
    assert reached(used) == (used + need > limit)


def test_samples_for_less_than_one_trial_are_refused() -> None:
    with pytest.raises(CommandError, match="--samples 47 is less than the 48 training samples of one trial"):
        Limits(9, samples=47).check(48)
    Limits(9, samples=48).check(48)
    Limits(9).check(48)
