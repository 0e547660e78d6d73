"""Spans in a sequence of tags, by the rules of the CoNLL-2000 script `conlleval`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["has_spans", "spans"]

_SPAN_TAG = re.compile(r"[BIES]-.+")


def has_spans(tags: Iterable[str]) -> bool:
    """Whether the tags mark spans: `O`, and B-, I-, E- or S- before the span's type."""
    inside = [tag for tag in tags if tag != "O"]
    return all(_SPAN_TAG.fullmatch(tag) for tag in inside) and any(tag[0] in "BI" for tag in inside)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last position of each span.

    A span goes on as long as I- or E- of its type follow; B-, S-, O and another type end it, and
    so does its own E- or S-. One that starts with I- or E- counts like any other.
    """
    found: set[tuple[str, int, int]] = set()
    kind, start, open_ = "", 0, False
    for position, tag in enumerate(tags):
        mark, _, this = tag.partition("-")
        if open_ and (mark in "BSO" or this != kind):
            found.add((kind, start, position - 1))
            open_ = False
        if mark != "O" and not open_:
            kind, start, open_ = this, position, True
        if open_ and mark in "ES":
            found.add((kind, start, position))
            open_ = False
    if open_:
        found.add((kind, start, len(tags) - 1))
    return found
