import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.allocation import LayerState, reallocate, starting_ranks


def layer(
    name: str,
    rank: int,
    cost: int,
    losses: list[float],
    gains: float | list[float],
    *,
    low: int = 0,
    top: int = 64,
) -> LayerState:
    known = gains if isinstance(gains, list) else [gains] * 8
    return LayerState(name, rank, cost, low, top, losses, known)


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
        gains = sorted(draw(st.lists(scores, max_size=4)), reverse=True)
        states.append(layer(f"l{index}", rank, cost, losses, gains, low=low, top=top))
    return states


@given(
    states=layers(),
    slack=st.integers(0, 30),
    swaps=st.integers(0, 10),
    margin=st.floats(1, 3),
)
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
        assert after[s.name] - s.rank <= sum(gain > 0 for gain in s.gains)
    for move in moves:
        assert move.before != move.after
        # What pays promises less than what it pays for, by the margin; 0 pays where parameters were free.
        if move.after < move.before:
            assert swaps and move.against > move.score * margin * (1 - 5e-3)
    assert moves == reallocate(states, budget=budget, swaps=swaps, margin=margin)


def after_moves(states: list[LayerState], budget: int, swaps: int) -> tuple[dict[str, int], int]:
    """The change at each layer, and the parameters left over."""
    moves = reallocate(states, budget=budget, swaps=swaps, margin=1.5)
    change = {s.name: 0 for s in states} | {m.layer: m.after - m.before for m in moves}
    return change, budget - sum((s.rank + change[s.name]) * s.cost for s in states)


def next_gain(s: LayerState, change: int) -> float:
    open_ = 0 <= change < len(s.gains) and s.rank + change < s.max_rank
    return s.gains[change] if open_ else 0.0


@given(states=layers(), slack=st.integers(0, 30), swaps=st.integers(0, 3))
def test_what_is_left_over_buys_nothing_useful(states: list[LayerState], slack: int, swaps: int) -> None:
    budget = sum(s.rank * s.cost for s in states) + slack
    change, left = after_moves(states, budget, swaps)
    assert not [s for s in states if next_gain(s, change[s.name]) > 0 and s.cost <= left]


@given(states=layers(), slack=st.integers(0, 8))
def test_no_swap_that_is_worth_it_remains(states: list[LayerState], slack: int) -> None:
    """Brute force: for every taker, all that layers of far less gain can give does not pay for it."""
    budget = sum(s.rank * s.cost for s in states) + slack
    change, left = after_moves(states, budget, swaps=1000)
    for taker in states:
        gain = next_gain(taker, change[taker.name])
        paid = left
        for payer in states:
            given_ = -change[payer.name]
            if payer is taker or given_ < 0 or max(payer.gains, default=0.0) * 1.5 >= gain * (1 - 2e-2):
                continue
            room = payer.rank - given_ - payer.min_rank
            paid += payer.cost * len(list(payer.losses[given_:])[: max(0, room)])
        assert gain <= 0 or paid < taker.cost


def test_what_is_free_is_spent_before_anybody_pays() -> None:
    states = [layer("a", 1, 4, [0.0], [3.0, 2.0, 1.0]), layer("b", 1, 8, [0.0], [9.0])]

    def ranks(budget: int, swaps: int) -> dict[str, int]:
        return {m.layer: m.after for m in reallocate(states, budget=budget, swaps=swaps)}

    assert ranks(12 + 40, 5) == {"a": 4, "b": 2}
    assert ranks(12 + 9, 0) == {"b": 2}
    assert ranks(12 + 7, 0) == {"a": 2}
    assert ranks(12 + 3, 0) == {}
    assert ranks(12 + 4, 1) == {"a": 0, "b": 2}  # what is free pays for half of it


def test_nobody_pays_who_need_not() -> None:
    """The narrow layers lose least, but the wide one pays alone."""
    states = [
        layer("taker", 1, 10, [], 9.0),
        layer("narrow", 2, 4, [0.1, 0.1], 0.0),
        layer("wide", 1, 10, [0.2], 0.0),
    ]
    assert {m.layer: m.after for m in reallocate(states, budget=28, swaps=1)} == {"taker": 2, "wide": 0}


@given(states=layers(), slack=st.integers(0, 8), swaps=st.integers(0, 5))
def test_what_is_left_over_gives_nobody_back_what_was_given_up(
    states: list[LayerState], slack: int, swaps: int
) -> None:
    budget = sum(s.rank * s.cost for s in states) + slack
    change, left = after_moves(states, budget, swaps=swaps)
    assert all(change[s.name] >= 0 or s.cost > left for s in states)


def test_what_a_dearer_payer_frees_goes_back_to_the_dearest_that_it_pays_for() -> None:
    states = [
        layer("cheap", 1, 4, [0.2], 0.0),
        layer("first", 0, 5, [], [0.5]),
        layer("second", 0, 4, [], [0.9]),
        layer("dear", 2, 7, [0.5, 0.8], 0.0),
    ]
    moves = {m.layer: m.after for m in reallocate(states, budget=20, swaps=3)}
    assert moves == {"second": 1, "first": 1, "dear": 1}


def test_rounding_decides_nothing() -> None:
    states = [
        layer("a", 1, 4, [1.0 + 1e-7], 1.0),
        layer("b", 1, 4, [1.0], 1.0),
        layer("c", 1, 4, [1.0], [9.0]),
        layer("d", 1, 4, [1.0], [9.0 + 1e-6]),
    ]
    assert {m.layer: m.after for m in reallocate(states, budget=16, swaps=1)} == {"a": 0, "c": 2}


def test_the_best_per_parameter_comes_first_whatever_it_costs() -> None:
    states = [
        layer("poor", 9, 2, [0.0] * 9, 0.0),
        layer("wide", 1, 8, [], 2.0),
        layer("narrow", 1, 4, [], 3.0),
    ]
    assert {m.layer: m.after for m in reallocate(states, budget=30, swaps=1)} == {"poor": 7, "narrow": 2}


def test_a_layer_does_not_pay_because_its_own_gain_was_not_seen() -> None:
    """One layer's gain stands out of the noise by a hair, those of its likes do not."""
    hidden = [replace(layer(f"l{i}", 2, 4, [0.1, 0.2], 0.0), bound=1.0) for i in range(4)]
    seen = layer("seen", 2, 4, [0.1, 0.2], 1.05)
    assert reallocate([*hidden, seen], budget=40, swaps=9) == ()
    clear = replace(seen, gains=(1.6, 1.4))
    moves = reallocate([*hidden, clear], budget=40, swaps=9)
    assert [(m.layer, m.before, m.after, m.against) for m in moves] == [
        ("l0", 2, 1, 1.6), ("seen", 2, 3, 1.0),
    ]  # fmt: skip


def test_no_more_components_go_than_may_but_for_two() -> None:
    """A wide rank costs eight narrow ones: they go where so many may, and else none does."""
    narrow = [layer(f"n{i}", 4, 4, [0.1, 0.2, 0.3, 0.4], 0.0) for i in range(4)]
    wide = layer("wide", 1, 32, [9.0], 9.0)
    assert reallocate([*narrow, wide], budget=96, swaps=7) == ()
    moves = reallocate([*narrow, wide], budget=96, swaps=8)
    assert {m.layer: m.after - m.before for m in moves} == {"wide": 1} | {f"n{i}": -2 for i in range(4)}
    assert reallocate([*narrow, replace(wide, cost=12)], budget=76, swaps=1) == ()
    assert len(reallocate([*narrow, replace(wide, cost=8)], budget=72, swaps=1)) == 3


def test_what_is_left_over_goes_where_a_gain_is_likely() -> None:
    """A wide rank pays for a narrow one; what that frees is not idle, and no clear gain is needed."""
    wide = layer("wide", 2, 10, [0.1, 0.2], 0.0)
    narrow = layer("narrow", 1, 4, [5.0], [9.0])
    likely = [replace(layer(f"n{i}", 1, 4, [5.0], 0.0), likely=(gain,)) for i, gain in enumerate((0.1, 0.3))]
    moves = reallocate([wide, narrow, *likely], budget=32, swaps=1)
    assert {m.layer: m.after - m.before for m in moves} == {"wide": -1, "narrow": 1, "n1": 1}
    assert [m.against for m in moves if m.layer == "n1"] == [0.0]
    # Of nothing else does a likely gain take: not from others, and not where nothing is likely.
    assert reallocate([wide, *likely], budget=28, swaps=9) == ()
    assert reallocate([wide, layer("n", 1, 4, [5.0], 0.0)], budget=99, swaps=9) == ()


def test_a_layer_gives_or_takes_in_one_call() -> None:
    """What is free pays for a, which could then pay for d; and b, which paid for a, could then take."""
    kept = layer("a", 1, 4, [5.0, 5.0], [9.0], low=1)
    states = [kept, layer("d", 1, 8, [9.0], [20.0])]
    assert {m.layer: m.after - m.before for m in reallocate(states, budget=16, swaps=9)} == {"a": 1}
    states = [kept, layer("b", 3, 4, [0.1, 0.2, 0.3], [2.0]), layer("c", 2, 4, [0.5, 0.6], 0.0)]
    assert {m.layer: m.after - m.before for m in reallocate(states, budget=24, swaps=9)} == {"a": 1, "b": -1}


def test_a_gain_of_just_the_margin_moves_nothing() -> None:
    states = [layer("a", 2, 4, [0.1], 3.0), layer("b", 2, 4, [0.1], 2.0)]
    assert reallocate(states, budget=16, swaps=1, margin=1.5) == ()
    assert reallocate([replace(states[0], gains=(3.01,)), states[1]], budget=16, swaps=1, margin=1.5)


@given(st.data())
def test_equal_costs_start_at_the_best_of_all_plans(data: st.DataObject) -> None:
    """Brute force over all plans that fit."""
    count, budget = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    names = [f"l{i}" for i in range(count)]
    gains = {n: sorted(data.draw(st.lists(scores, max_size=3)), reverse=True) for n in names}
    limits = {n: len(gains[n]) for n in names}
    ranks = starting_ranks(gains, dict.fromkeys(names, 3), limits, budget)

    def worth(plan: tuple[int, ...]) -> float:
        return sum(sum(gains[n][:rank]) for n, rank in zip(names, plan, strict=True))

    plans = itertools.product(*(range(limits[n] + 1) for n in names))
    best = max(worth(plan) for plan in plans if 3 * sum(plan) <= budget)
    assert 3 * sum(ranks.values()) <= budget
    assert worth(tuple(ranks[n] for n in names)) == pytest.approx(best)


@given(st.data())
def test_unequal_costs_lose_less_than_the_first_component_that_did_not_fit(data: st.DataObject) -> None:
    """Brute force over all plans that fit; the bound is that of the fractional knapsack (Dantzig 1957)."""
    names = [f"l{i}" for i in range(data.draw(st.integers(1, 3)))]
    costs = {n: data.draw(st.integers(1, 9)) for n in names}
    gains = {n: sorted(data.draw(st.lists(scores, max_size=3)), reverse=True) for n in names}
    limits = {n: len(gains[n]) for n in names}
    budget = data.draw(st.integers(0, 40))
    ranks = starting_ranks(gains, costs, limits, budget)

    def worth(plan: tuple[int, ...]) -> float:
        return sum(sum(gains[n][:rank]) for n, rank in zip(names, plan, strict=True))

    def cost(plan: tuple[int, ...]) -> int:
        return sum(costs[n] * rank for n, rank in zip(names, plan, strict=True))

    best = max(
        worth(p) for p in itertools.product(*(range(limits[n] + 1) for n in names)) if cost(p) <= budget
    )
    ordered = sorted(((gain / costs[n], gain, costs[n]) for n in names for gain in gains[n]), reverse=True)
    spent = itertools.accumulate(price for _, _, price in ordered)
    first = next((gain for (_, gain, _), sum_ in zip(ordered, spent, strict=True) if sum_ > budget), 0.0)
    assert best <= (worth(tuple(ranks[n] for n in names)) + first) * (1 + 1e-9)


@given(st.data())
def test_a_start_fills_the_budget(data: st.DataObject) -> None:
    names = [f"l{i}" for i in range(data.draw(st.integers(1, 5)))]
    costs = {n: data.draw(st.integers(1, 9)) for n in names}
    limits = {n: data.draw(st.integers(1, 6)) for n in names}
    gains = {n: sorted(data.draw(st.lists(scores, max_size=3)), reverse=True) for n in names}
    budget = data.draw(st.integers(0, 60))
    ranks = starting_ranks(gains, costs, limits, budget)
    left = budget - sum(ranks[n] * costs[n] for n in names)
    assert left >= 0 and all(0 <= ranks[n] <= limits[n] for n in names)
    assert all(ranks[n] == limits[n] or costs[n] > left for n in names)


def test_what_known_gains_leave_over_is_spread_evenly() -> None:
    """However small a last gain is, it is worth more than none; c sees no gradient and comes last."""
    gains = {"a": [9.0, 0.0], "b": [8.0, 1e-9, 1e-12], "c": []}
    costs = dict.fromkeys(gains, 4)
    found = [starting_ranks(gains, costs, dict.fromkeys(costs, 3), 4 * ranks) for ranks in range(10)]
    assert [tuple(ranks.values()) for ranks in found] == [
        (0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 0),
        (2, 3, 0), (3, 3, 0), (3, 3, 1), (3, 3, 2), (3, 3, 3),
    ]  # fmt: skip
    equal = starting_ranks(dict.fromkeys("abc", (0.0,)), dict.fromkeys("abc", 4), dict.fromkeys("abc", 3), 20)
    assert equal == {"a": 1, "b": 2, "c": 2}  # the last layers first: below them no backward pass is paid


def test_one_component_goes_where_it_gains_most_per_parameter() -> None:
    gains = {"wide": [10.0, 5.0], "narrow": [9.0, 1.0], "none": []}
    costs = {"wide": 8, "narrow": 4, "none": 3}
    limits = dict.fromkeys(costs, 9)
    assert starting_ranks(gains, costs, limits, 4) == {"wide": 0, "narrow": 1, "none": 0}
    assert starting_ranks(gains, costs, limits, 12) == {"wide": 1, "narrow": 1, "none": 0}
    assert starting_ranks(gains, costs, limits, 3) == {"wide": 0, "narrow": 0, "none": 1}
    assert starting_ranks(gains, costs, limits, 2) == dict.fromkeys(costs, 0)


def test_a_rank_goes_from_the_least_loss_to_the_largest_gain() -> None:
    states = [
        layer("a", 2, 4, [0.1, 5.0], 1.0),
        layer("b", 2, 4, [2.0, 3.0], 9.0),
        layer("c", 2, 4, [1.0], 1.0),
    ]
    moves = reallocate(states, budget=24, swaps=1)
    assert [(m.layer, m.before, m.after) for m in moves] == [("a", 2, 1), ("b", 2, 3)]
    assert moves[0].score == 1.0 and moves[0].against == 9.0
    assert moves[1].score == 9.0 and moves[1].against == 1.0


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
    """Brute force over all swaps: the largest gain that somebody pays for, at the lowest price."""
    count = data.draw(st.integers(2, 5))
    states = [
        layer(f"l{i}", 2, 3, sorted(data.draw(st.tuples(scores, scores))), data.draw(scores))
        for i in range(count)
    ]
    moves = reallocate(states, budget=6 * count, swaps=1, margin=1.5)
    digits = {s.name: (float(f"{s.losses[0]:.3g}"), float(f"{s.gains[0]:.3g}")) for s in states}

    def payers(taker: LayerState) -> list[float]:
        gain = digits[taker.name][1]
        return [digits[p.name][0] for p in states if p is not taker and gain > 1.5 * digits[p.name][1]]

    worth = [s for s in states if payers(s)]
    if not worth:
        assert moves == ()
        return
    after = {m.layer: m.after - m.before for m in moves}
    grown = next(s for s in states if after.get(s.name) == 1)
    shrunk = next(s for s in states if after.get(s.name) == -1)
    assert digits[grown.name][1] == max(digits[s.name][1] for s in worth)
    assert digits[shrunk.name][0] == min(payers(grown))


def test_gain_falls_with_every_rank_taken() -> None:
    """Two layers with equal gains share what a third gives up."""
    falling = [9.0, 4.5, 3.0]
    states = [
        layer("poor", 6, 4, [0.0] * 6, 0.0),
        layer("x", 1, 4, [9.0], falling),
        layer("y", 1, 4, [9.0], falling),
    ]
    moves = reallocate(states, budget=32, swaps=4)
    assert {m.layer: m.after for m in moves} == {"poor": 2, "x": 3, "y": 3}
