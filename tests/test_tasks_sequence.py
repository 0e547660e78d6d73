"""Token sequences: runs of what is trained, and packing."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from autorank.tasks.sequence import Tokens, pack, runs, worth_packing

TEXTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=6)


@given(st.lists(st.booleans()))
def test_runs_cover_what_is_trained_from_the_second_token_on(trained: list[bool]) -> None:
    found = runs(trained)
    inside = [at for start, end in found for at in range(start, end)]
    assert inside == [at for at, mark in enumerate(trained) if mark and at > 0]
    assert all(start < end for start, end in found)
    # Of each two there is something in between: they are as long as can be.
    assert all(first[1] < second[0] for first, second in pairwise(found))


@given(TEXTS, st.integers(2, 9))
def test_packing_keeps_all_tokens_in_order_and_every_sequence_full(
    texts: list[list[int]], length: int
) -> None:
    tokens = [token for text in texts for token in text]
    packed = pack([Tokens(text, [True] * len(text)) for text in texts], length)
    kept = [token for one in packed for token in one.ids]
    over = len(tokens) % length
    assert kept == (tokens[:-1] if over == 1 else tokens)
    assert all(len(one.ids) == len(one.trained) == length for one in packed[:-1])
    assert all(len(one.ids) >= 2 for one in packed)
    marks = [mark for text in texts for mark in [False] + [True] * (len(text) - 1)]
    assert [mark for one in packed for mark in one.trained] == marks[: len(kept)]


@given(st.lists(st.integers(1, 20), min_size=1), st.integers(2, 10))
def test_packing_is_worth_it_where_texts_are_cut_or_fill_less_than_half(
    lengths: list[int], length: int
) -> None:
    assert worth_packing(lengths, length) == (
        max(lengths) > length or sum(lengths) / len(lengths) < length / 2
    )
