from __future__ import annotations

import math
import statistics
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.halving import goes_on

Direction = Literal["maximize", "minimize"]
SCORES = st.floats(-100, 100)
PEERS = st.lists(SCORES, max_size=9)
NOISE = st.floats(0, 10)
DIRECTIONS = st.sampled_from(("maximize", "minimize"))


@pytest.mark.parametrize(
    ("score", "peers", "direction", "noise", "goes"),
    [
        (0.80, [0.82, 0.84, 0.90], "maximize", 0.03, False),
        (0.82, [0.82, 0.84, 0.90], "maximize", 0.03, True),
        (0.10, [0.82, 0.84], "maximize", 0.0, True),  # too few to judge by
        (0.10, [0.82, 0.84, math.nan], "maximize", 0.0, True),
        (2.5, [2.0, 2.1, 2.2, 2.3], "minimize", 0.2, False),
        (2.3, [2.0, 2.1, 2.2, 2.3], "minimize", 0.2, True),
        (math.nan, [], "maximize", 1.0, False),
        (-math.inf, [], "minimize", 1.0, False),
    ],
)
def test_examples(score: float, peers: list[float], direction: Direction, noise: float, goes: bool) -> None:
    assert goes_on(score, peers, direction=direction, noise=noise) is goes


@given(SCORES, PEERS, DIRECTIONS, NOISE)
def test_it_stops_exactly_below_the_median_by_more_than_the_noise(
    score: float, peers: list[float], direction: Direction, noise: float
) -> None:
    goes = goes_on(score, peers, direction=direction, noise=noise)
    if len(peers) < 3:
        assert goes
    elif direction == "maximize":
        assert goes == (statistics.median(peers) - score <= noise)
    else:
        assert goes == (score - statistics.median(peers) <= noise)


@given(SCORES, SCORES, PEERS, NOISE)
def test_a_better_score_never_stops_where_a_worse_one_goes_on(
    score: float, other: float, peers: list[float], noise: float
) -> None:
    low, high = sorted((score, other))
    if goes_on(low, peers, direction="maximize", noise=noise):
        assert goes_on(high, peers, direction="maximize", noise=noise)
    if goes_on(high, peers, direction="minimize", noise=noise):
        assert goes_on(low, peers, direction="minimize", noise=noise)


@given(SCORES, PEERS, NOISE)
def test_the_directions_mirror_each_other(score: float, peers: list[float], noise: float) -> None:
    mirrored = goes_on(-score, [-peer for peer in peers], direction="minimize", noise=noise)
    assert goes_on(score, peers, direction="maximize", noise=noise) == mirrored


@given(st.lists(SCORES, min_size=4, max_size=9), DIRECTIONS)
def test_of_a_group_the_best_always_goes_on(scores: list[float], direction: Direction) -> None:
    best = max(scores) if direction == "maximize" else min(scores)
    peers = list(scores)
    peers.remove(best)
    assert goes_on(best, peers, direction=direction, noise=0.0)


@given(SCORES, PEERS, DIRECTIONS, NOISE, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_peers_that_are_not_finite_do_not_count(
    score: float, peers: list[float], direction: Direction, noise: float, odd: float
) -> None:
    alone = goes_on(score, peers, direction=direction, noise=noise)
    assert goes_on(score, [odd, *peers, odd], direction=direction, noise=noise) == alone


@pytest.mark.parametrize(("noise", "min_peers"), [(-0.1, 3), (math.nan, 3), (0.0, 0)])
def test_a_negative_noise_or_no_peers_make_no_rule(noise: float, min_peers: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        goes_on(1.0, [1.0], direction="maximize", noise=noise, min_peers=min_peers)
