"""Spans by the rules of conlleval, by hand and against a second reading of its two rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.tasks.spans import has_spans, spans


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("", []),
        ("O O", []),
        ("B-P I-P O B-L", [("P", 0, 1), ("L", 3, 3)]),
        ("B-P B-P", [("P", 0, 0), ("P", 1, 1)]),
        ("I-P I-P O I-P", [("P", 0, 1), ("P", 3, 3)]),
        ("B-P I-L I-L", [("P", 0, 0), ("L", 1, 2)]),
        ("O I-P B-P I-P", [("P", 1, 1), ("P", 2, 3)]),
        ("B-P I-P E-P I-P", [("P", 0, 2), ("P", 3, 3)]),
        ("S-P S-P E-P E-P", [("P", 0, 0), ("P", 1, 1), ("P", 2, 2), ("P", 3, 3)]),
        ("B-P S-P I-P", [("P", 0, 0), ("P", 1, 1), ("P", 2, 2)]),
        ("B-geo-loc I-geo-loc", [("geo-loc", 0, 1)]),
        ("B-P I-P", [("P", 0, 1)]),
    ],
)
def test_spans_by_hand(tags: str, wanted: list[tuple[str, int, int]]) -> None:
    assert spans(tags.split()) == set(wanted)


def _starts(before: str, tag: str) -> bool:
    """`startOfChunk` of conlleval.pl, and S- as later scripts have it."""
    (mark, _, kind), (old, _, old_kind) = tag.partition("-"), before.partition("-")
    if mark in "BS":
        return True
    if mark in "EI" and old in "EOS":
        return True
    return mark != "O" and kind != old_kind


def _ends(tag: str, after: str) -> bool:
    """`endOfChunk`."""
    (mark, _, kind), (new, _, new_kind) = tag.partition("-"), after.partition("-")
    if mark in "ES":
        return True
    if mark in "BI" and new in "BSO":
        return True
    return mark != "O" and kind != new_kind


@given(st.lists(st.sampled_from(["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in "PL")]), max_size=12))
def test_spans_are_what_conlleval_opens_and_closes(tags: list[str]) -> None:
    around = ["O", *tags, "O"]
    found, start = set(), 0
    for position, tag in enumerate(tags):
        if _starts(around[position], tag):
            start = position
        if _ends(tag, around[position + 2]):
            found.add((tag.partition("-")[2], start, position))
    assert spans(tags) == found


def test_tags_that_mark_spans() -> None:
    assert has_spans(["O", "B-P", "I-P"]) and has_spans(["I-P"]) and has_spans(["B-P", "S-P", "E-P"])
    assert not has_spans(["O"]) and not has_spans(["NOUN", "VERB"]) and not has_spans(["B-P", "VERB"])
    assert not has_spans(["B-", "O"]) and not has_spans(["1", "0"])
