import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.allocation import LayerState, reallocate


def layer(
    name: str, rank: int, cost: int, losses: list[float], gain: float, *, low: int = 0, top: int = 64
) -> LayerState:
    return LayerState(name, rank, cost, low, top, losses, gain)


scores = st.floats(0, 100, allow_nan=False)


@st.composite
def layers(draw: st.DrawFn) -> list[LayerState]:
    count = draw(st.integers(2, 6))
    states = []
    for index in range(count):
        rank = draw(st.integers(1, 6))
        losses = sorted(draw(st.lists(scores, max_size=rank)))
        low = draw(st.integers(0, rank))
        top = draw(st.integers(rank, 10))
        cost = draw(st.integers(1, 9))
        states.append(layer(f"l{index}", rank, cost, losses, draw(scores), low=low, top=top))
    return states


@given(states=layers(), slack=st.integers(0, 30), swaps=st.integers(0, 10), margin=st.floats(1, 3))
def test_budget_and_limits_hold_for_any_scores(
    states: list[LayerState], slack: int, swaps: int, margin: float
) -> None:
    budget = sum(s.rank * s.cost for s in states) + slack
    moves = reallocate(states, budget=budget, swaps=swaps, margin=margin)
    after = {s.name: s.rank for s in states} | {m.layer: m.after for m in moves}
    assert sum(after[s.name] * s.cost for s in states) <= budget
    for s in states:
        assert s.min_rank <= after[s.name] <= s.max_rank or after[s.name] == s.rank
        assert s.rank - after[s.name] <= len(s.losses)
    assert sum(max(0, m.after - m.before) for m in moves) <= swaps
    for move in moves:
        assert move.before != move.after
    assert moves == reallocate(states, budget=budget, swaps=swaps, margin=margin)


def test_a_rank_goes_from_the_least_loss_to_the_largest_gain() -> None:
    states = [
        layer("a", 2, 4, [0.1, 5.0], 1.0),
        layer("b", 2, 4, [2.0, 3.0], 9.0),
        layer("c", 2, 4, [1.0], 1.0),
    ]
    moves = reallocate(states, budget=24, swaps=1)
    assert [(m.layer, m.before, m.after) for m in moves] == [("a", 2, 1), ("b", 2, 3)]
    assert moves[0].score == 0.1 and moves[0].against == 9.0
    assert moves[1].score == 9.0 and moves[1].against == 0.1


def test_one_wide_layer_pays_for_two_narrow_ranks() -> None:
    states = [layer("wide", 3, 8, [0.0], 0.0), layer("narrow", 1, 4, [5.0], 9.0)]
    moves = reallocate(states, budget=28, swaps=2)
    assert {m.layer: m.after for m in moves} == {"wide": 2, "narrow": 3}


def test_several_narrow_ranks_pay_for_a_wide_one() -> None:
    states = [
        layer("wide", 1, 8, [9.0], 9.0),
        layer("n1", 2, 4, [0.1, 0.2], 0.0),
        layer("n2", 1, 4, [0.3], 0.0),
    ]
    moves = reallocate(states, budget=20, swaps=1)
    assert {m.layer: m.after for m in moves} == {"wide": 2, "n1": 0}


def test_the_margin_keeps_a_near_tie_still() -> None:
    states = [layer("a", 2, 4, [1.0, 1.0], 1.0), layer("b", 2, 4, [1.4, 1.4], 1.4)]
    assert reallocate(states, budget=16, swaps=4, margin=1.5) == ()
    assert reallocate(states, budget=16, swaps=4, margin=1.2) != ()


def test_flat_scores_move_nothing() -> None:
    states = [layer(f"l{i}", 4, 6, [1.0] * 4, 1.0) for i in range(5)]
    assert reallocate(states, budget=120, swaps=10) == ()


def test_ties_go_to_the_layer_named_first() -> None:
    states = [layer(n, 2, 4, [0.1, 0.1], 5.0 if n > "b" else 0.0) for n in "abcd"]
    moves = reallocate(states, budget=32, swaps=1)
    assert {m.layer: m.after for m in moves} == {"a": 1, "c": 3}


def test_ranks_over_the_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="8 parameters more"):
        reallocate([layer("a", 4, 4, [], 1.0)], budget=8, swaps=1)


@given(st.data())
def test_one_swap_between_equal_costs_is_the_first_of_all_swaps(data: st.DataObject) -> None:
    """Brute force over all swaps: the largest gain that is worth its price, at the lowest price."""
    count = data.draw(st.integers(2, 5))
    states = [
        layer(f"l{i}", 2, 3, sorted(data.draw(st.tuples(scores, scores))), data.draw(scores))
        for i in range(count)
    ]
    moves = reallocate(states, budget=6 * count, swaps=1, margin=1.5)
    payable = {taker.name: min(payer.losses[0] for payer in states if payer is not taker) for taker in states}
    worth = [s for s in states if s.gain > 0 and payable[s.name] * 1.5 < s.gain]
    if not worth:
        assert moves == ()
        return
    after = {m.layer: m.after - m.before for m in moves}
    grown = next(s for s in states if after.get(s.name) == 1)
    shrunk = next(s for s in states if after.get(s.name) == -1)
    assert grown.gain == max(s.gain for s in worth)
    assert shrunk.losses[0] == payable[grown.name]


def test_gain_falls_with_every_rank_taken() -> None:
    """Two layers with equal gains share what a third gives up."""
    states = [layer("poor", 6, 4, [0.0] * 6, 0.0), layer("x", 1, 4, [9.0], 9.0), layer("y", 1, 4, [9.0], 9.0)]
    moves = reallocate(states, budget=32, swaps=4)
    assert {m.layer: m.after for m in moves} == {"poor": 2, "x": 3, "y": 3}
