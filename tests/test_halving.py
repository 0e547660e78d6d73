from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.halving import MIN_PEERS, REDUCTION, Runner, Verdict, judge, next_runner, stalled, verdict

Direction = Literal["maximize", "minimize"]
SCORES = st.floats(-100, 100)
PEERS = st.lists(SCORES, max_size=12)
ENOUGH = st.lists(SCORES, min_size=MIN_PEERS, max_size=12)
NOISE = st.floats(0, 10)
COMING = st.integers(0, 12)
DIRECTIONS = st.sampled_from(("maximize", "minimize"))
ORDER = {"lost": 0, "wait": 1, "on": 2}


@pytest.mark.parametrize(
    ("score", "peers", "direction", "noise", "to_come", "expected"),
    [
        # Four trials, so two go on: the cut is the second best score.
        (0.84, [0.80, 0.82, 0.90], "maximize", 0.0, 0, "on"),
        (0.82, [0.80, 0.84, 0.90], "maximize", 0.0, 0, "lost"),
        (0.82, [0.80, 0.84, 0.90], "maximize", 0.03, 0, "on"),
        # Seven trials would let three go on, so two worse ones are not enough, and three are.
        (0.82, [0.80, 0.84, 0.90], "maximize", 0.0, 2, "lost"),
        (0.82, [0.80, 0.84, 0.90], "maximize", 0.0, 3, "wait"),
        (2.1, [2.0, 2.2, 2.3], "minimize", 0.0, 0, "on"),
        (2.2, [2.0, 2.1, 2.3], "minimize", 0.0, 0, "lost"),
        (0.10, [0.82, 0.84], "maximize", 0.0, 1, "wait"),  # one more makes enough to judge by
        (0.10, [0.82, 0.84], "maximize", 0.0, 0, "on"),
        (0.90, [], "maximize", 0.0, 2, "on"),  # enough will never come
        (0.10, [0.82, 0.84, math.nan], "maximize", 0.0, 0, "on"),
        (math.nan, [], "maximize", 1.0, 9, "lost"),
        (-math.inf, [], "minimize", 1.0, 9, "lost"),
    ],
)
def test_examples(
    score: float, peers: list[float], direction: Direction, noise: float, to_come: int, expected: Verdict
) -> None:
    found = judge(score, peers, direction=direction, noise=noise, to_come=to_come, first=True)
    assert found == expected


def test_above_the_first_rung_few_peers_keep_nobody() -> None:
    assert judge(0.1, [0.9], direction="maximize", noise=0.0, to_come=5, first=False) == "on"


@given(SCORES, ENOUGH, DIRECTIONS, NOISE, st.booleans())
def test_with_enough_peers_the_best_third_goes_on_and_who_is_within_noise_of_it(
    score: float, peers: list[float], direction: Direction, noise: float, first: bool
) -> None:
    sign = 1 if direction == "maximize" else -1
    better = sum(sign * peer - noise > sign * score for peer in peers)
    quota = -(-(len(peers) + 1) // REDUCTION)
    goes = judge(score, peers, direction=direction, noise=noise, to_come=0, first=first) == "on"
    if better != sum(sign * (peer - score) > noise for peer in peers):
        return  # a difference that rounds
    assert goes == (better < quota)


@given(SCORES, PEERS, DIRECTIONS, NOISE, COMING, st.booleans(), st.data())
def test_the_lost_stay_lost_whoever_comes(
    score: float,
    peers: list[float],
    direction: Direction,
    noise: float,
    to_come: int,
    first: bool,
    data: st.DataObject,
) -> None:
    found = judge(score, peers, direction=direction, noise=noise, to_come=to_come, first=first)
    late = data.draw(st.lists(SCORES, max_size=to_come))
    then = judge(
        score,
        [*peers, *late],
        direction=direction,
        noise=noise,
        to_come=to_come - len(late),
        first=first,
    )
    if found == "lost":
        assert then == "lost"


@given(SCORES, PEERS, DIRECTIONS, NOISE, COMING, st.booleans())
def test_who_waits_has_something_to_wait_for(
    score: float, peers: list[float], direction: Direction, noise: float, to_come: int, first: bool
) -> None:
    if judge(score, peers, direction=direction, noise=noise, to_come=to_come, first=first) != "wait":
        return
    assert to_come > 0
    worst = -1e9 if direction == "maximize" else 1e9
    coming = [worst] * to_come
    assert judge(score, [*peers, *coming], direction=direction, noise=noise, to_come=0, first=first) == "on"


@given(SCORES, SCORES, PEERS, NOISE, COMING, st.booleans())
def test_a_better_score_never_fares_worse(
    score: float, other: float, peers: list[float], noise: float, to_come: int, first: bool
) -> None:
    low, high = sorted((score, other))

    def of(value: float, direction: Direction) -> int:
        return ORDER[judge(value, peers, direction=direction, noise=noise, to_come=to_come, first=first)]

    assert of(low, "maximize") <= of(high, "maximize")
    assert of(high, "minimize") <= of(low, "minimize")


@given(SCORES, PEERS, NOISE, COMING, st.booleans())
def test_the_directions_mirror_each_other(
    score: float, peers: list[float], noise: float, to_come: int, first: bool
) -> None:
    mirrored = judge(
        -score, [-peer for peer in peers], direction="minimize", noise=noise, to_come=to_come, first=first
    )
    assert judge(score, peers, direction="maximize", noise=noise, to_come=to_come, first=first) == mirrored


@given(SCORES, PEERS, DIRECTIONS, NOISE, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_peers_that_are_not_finite_do_not_count(
    score: float, peers: list[float], direction: Direction, noise: float, odd: float
) -> None:
    alone = judge(score, peers, direction=direction, noise=noise, to_come=0, first=True)
    assert judge(score, [odd, *peers, odd], direction=direction, noise=noise, to_come=0, first=True) == alone


@pytest.mark.parametrize(("noise", "to_come"), [(-0.1, 0), (math.nan, 0), (0.0, -1)])
def test_a_negative_noise_or_number_makes_no_rule(noise: float, to_come: int) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        judge(1.0, [1.0], direction="maximize", noise=noise, to_come=to_come, first=True)


# -- a whole study ---------------------------------------------------------------------------------

RUNGS = (5, 8, 10)


def study(finals: list[list[float]], noise: float, direction: Direction) -> tuple[list[Runner], int]:
    """Trials on one lane, as a coordinator would run them; returns how each ended, and the rungs trained."""
    runners: list[Runner] = []
    trained = 0
    while True:
        new = len(finals) - len(runners)
        lost = [r for r in runners if r.waits and verdict(r, runners, direction=direction, new=new) == "lost"]
        if lost:
            place = runners.index(lost[0])
            runners[place] = Runner(lost[0].number, lost[0].scores, noise, ended=True)
            continue
        chosen = next_runner(runners, direction=direction, new=new)
        if chosen is None and not new:
            return runners, trained
        if chosen is None:
            chosen = Runner(len(runners), {}, noise, waits=True)
            runners.append(chosen)
        step = RUNGS[len(chosen.scores)]
        trained += 1
        scores = {**chosen.scores, step: finals[chosen.number][len(chosen.scores)]}
        done = step == RUNGS[-1]
        runners[chosen.number] = Runner(chosen.number, scores, noise, waits=not done, ended=done)


CURVES = st.lists(st.lists(SCORES, min_size=3, max_size=3), min_size=1, max_size=12)


@given(CURVES, NOISE, DIRECTIONS)
def test_a_study_ends_with_nobody_waiting_and_somebody_finished(
    curves: list[list[float]], noise: float, direction: Direction
) -> None:
    runners, _ = study(curves, noise, direction)
    assert len(runners) == len(curves)
    assert all(runner.ended and not runner.waits for runner in runners)
    assert any(runner.rung == RUNGS[-1] for runner in runners)


@given(CURVES, DIRECTIONS)
def test_who_is_best_at_every_rung_always_finishes(curves: list[list[float]], direction: Direction) -> None:
    pick = max if direction == "maximize" else min
    best = [pick(curve[rung] for curve in curves) for rung in range(3)]
    runners, _ = study([*curves, best], 0.0, direction)
    assert runners[-1].rung == RUNGS[-1]


def test_of_nine_clear_cases_three_go_on_from_the_first_rung_and_the_rest_costs_nothing() -> None:
    curves = [[0.1 * n, 0.1 * n, 0.1 * n] for n in range(1, 10)]
    runners, trained = study(curves[::-1], 0.0, "maximize")
    assert [runner.rung for runner in runners[:3]] != [5, 5, 5] and runners[0].rung == 10
    assert all(runner.rung == 5 for runner in runners[3:])
    assert trained <= 9 + 2 * 3


def test_of_two_that_are_alike_the_first_goes_on() -> None:
    alike = [Runner(number, {5: 0.9}, waits=True) for number in range(4)]
    for order in (alike, alike[::-1]):
        assert next_runner(order, direction="maximize", new=0) == alike[0]


@pytest.mark.parametrize(
    ("scores", "patience", "settled", "expected"),
    [
        ([0.5, 0.4], 1, 0, True),
        ([0.5, 0.4], 2, 0, False),
        ([0.5, 0.4, 0.45], 2, 0, True),
        ([0.5, 0.4, 0.5], 2, 0, True),  # as good is not better
        ([0.5, 0.4, 0.5001], 1, 0, False),  # any gain is one
        ([0.5, 0.6, 0.4, 0.5], 2, 0, True),
        ([0.5, 0.6, 0.4, 0.7, 0.5], 2, 0, False),
        ([0.5, 0.4, 0.3], 2, 20, False),  # what comes while ranks move does not count
        ([0.5, 0.4, 0.3, 0.2], 2, 20, True),
        ([0.9, 0.4, 0.3], 1, 20, True),  # but can be the best
        ([], 1, 0, False),
    ],
)  # fmt: skip
def test_a_trial_that_gets_no_better_has_stalled(
    scores: list[float], patience: int, settled: int, expected: bool
) -> None:
    by_step = {10 * (at + 1): score for at, score in enumerate(scores)}
    assert stalled(by_step, direction="maximize", patience=patience, settled=settled) == expected
    turned = {step: -score for step, score in reversed(by_step.items())}
    assert stalled(turned, direction="minimize", patience=patience, settled=settled) == expected


@given(st.lists(st.integers(-5, 5), max_size=15), st.integers(1, 6), DIRECTIONS)
def test_patience_is_that_of_transformers_callback(
    scores: list[int], patience: int, direction: Direction
) -> None:
    sign, best, counter, ends = (1 if direction == "maximize" else -1), -math.inf, 0, []
    for score in scores:  # transformers' EarlyStoppingCallback.check_metric_value, its threshold 0
        counter = 0 if sign * score > best else counter + 1
        best = max(best, sign * score)
        ends.append(counter >= patience)
    for count, end in enumerate(ends, 1):
        seen = {step: float(score) for step, score in enumerate(scores[:count], 1)}
        assert stalled(seen, direction=direction, patience=patience, settled=0) == end
