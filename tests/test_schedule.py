import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import CommandError
from autorank.schedule import LEAST_INTERVAL, Schedule, learning_rate_factor, make_schedule


def test_moves_lie_evenly_in_the_window() -> None:
    schedule = make_schedule(100, warmup=0.1, until=0.5, moves=4, share=0.2)
    assert schedule.moves == (10, 20, 30, 40)
    assert schedule.final_step == 50
    assert [schedule.share(step) for step in schedule.moves] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert schedule.share(11) == 0


@given(total=st.integers(100, 900), warmup=st.integers(1, 20), until=st.integers(40, 80))
def test_numbers_of_steps_mean_what_they_say(total: int, warmup: int, until: int) -> None:
    schedule = make_schedule(total, warmup=warmup, until=until, moves=3)
    assert schedule.moves[0] == max(LEAST_INTERVAL, warmup)
    assert schedule.final_step == until


@given(
    total=st.integers(12, 5000),
    warmup=st.floats(0, 0.4),
    until=st.floats(0.45, 0.8),
    moves=st.integers(1, 50),
)
def test_moves_keep_their_distance_and_end_before_the_final_phase(
    total: int, warmup: float, until: float, moves: int
) -> None:
    try:
        schedule = make_schedule(total, warmup=warmup, until=until, moves=moves)
    except CommandError:
        return
    assert 1 <= len(schedule.moves) <= moves
    assert schedule.moves[0] >= max(LEAST_INTERVAL, warmup * total)
    gaps = [b - a for a, b in zip(schedule.moves, schedule.moves[1:], strict=False)]
    assert all(gap >= LEAST_INTERVAL for gap in gaps)
    assert schedule.final_step - schedule.moves[-1] >= LEAST_INTERVAL
    assert all(schedule.share(step) == 0 for step in range(schedule.final_step, total))


@given(total=st.integers(1, 400), warmup=st.floats(0, 0.3), until=st.floats(0.4, 0.8))
def test_a_refusal_names_the_least_length_that_works(total: int, warmup: float, until: float) -> None:
    try:
        make_schedule(total, warmup=warmup, until=until)
    except CommandError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert least > total
        assert make_schedule(least, warmup=warmup, until=until).moves
        with pytest.raises(CommandError):
            make_schedule(least - 1, warmup=warmup, until=until)


@pytest.mark.parametrize(
    "values",
    [
        {"warmup": 0.5, "until": 0.5},
        {"warmup": -0.1},
        {"until": 0.9},
        {"moves": 0},
        {"share": 0.0},
        {"share": 1.5},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(CommandError, match="schedule"):
        make_schedule(1000, **values)  # type: ignore[arg-type]


def test_a_schedule_of_ones_own_may_use_all_the_room() -> None:
    schedule = Schedule(10, (3, 6, 9), first_share=1.0, final_step=10)
    assert [schedule.share(step) for step in schedule.moves] == pytest.approx([1, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"moves": ()}, "no moves were given: name one step at least"),
        ({"moves": (5, 5, 9)}, "the move at step 5 comes 0 steps after the one at step 5"),
        ({"moves": (9, 5)}, "the move at step 5 comes -4 steps after the one at step 9: moves must increase"),
        ({"moves": (5, 7)}, "the move at step 7 comes 2 steps after the one at step 5"),
        ({"moves": (2, 8)}, "the move at step 2 comes 2 steps after the start"),
        ({"moves": (0, 8)}, "the move at step 0 comes 0 steps after the start"),
        ({"moves": (5, 20)}, "the last move is at step 20, ranks are fixed from step 20"),
        ({"final_step": 41}, "ranks are fixed from step 41 and training has 40 steps"),
        ({"first_share": 0.0}, r"first_share 0.0 must be in \(0, 1\]"),
        ({"first_share": 1.1}, r"first_share 1.1 must be in \(0, 1\]"),
        ({"first_share": float("nan")}, "first_share nan"),
    ],
)
def test_a_schedule_that_cannot_hold_is_refused(values: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {"total_steps": 40, "moves": (5, 8), "first_share": 0.3, "final_step": 20}
    assert Schedule(**good)
    with pytest.raises(CommandError, match=said):
        Schedule(**{**good, **values})


def test_learning_rate_rises_then_falls_to_the_end() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert all(b < a for a, b in itertools.pairwise(factors[6:]))
    assert factors[-1] == pytest.approx(1 / 94)
    assert learning_rate_factor(0, 1) == 1


def test_the_least_length_of_a_narrow_window_is_found_at_once() -> None:
    with pytest.raises(CommandError, match="at least"):
        make_schedule(700, warmup=0.5, until=0.5 + 1e-7)
