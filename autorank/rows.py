"""Rows as they are read: what one is, which splits they are in, and where each came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SPLITS", "SPLIT_NAMES", "Part", "Places", "Row", "listed"]

Row = dict[str, Any]

SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""The splits, and what data sets call them."""

SPLITS = tuple(SPLIT_NAMES)


@dataclass(frozen=True)
class Places:
    """Where the rows of a split came from: a file, and for each row its number or where it is nested.

    Numbers are those of `lines`, or of rows.
    """

    file: str
    numbers: Sequence[int | str]
    lines: bool

    def __getitem__(self, index: int) -> str:
        number = self.numbers[index]
        if isinstance(number, str):
            return f"{self.file}, {number}"
        return f"{self.file}:{number}" if self.lines else f"{self.file}, row {number}"

    def take(self, indices: Iterable[int]) -> Places:
        """The places of some of the rows."""
        return Places(self.file, [self.numbers[index] for index in indices], self.lines)


@dataclass(frozen=True)
class Part:
    """The rows of a split, and where each came from."""

    rows: list[Row]
    places: Places

    def take(self, indices: Sequence[int]) -> Part:
        """Some of the rows, with their places."""
        return Part([self.rows[index] for index in indices], self.places.take(indices))


def listed(columns: Iterable[str]) -> str:
    """The names of columns for a message of one line; one that cannot be seen in it is quoted."""
    return ", ".join(name if name and name.isprintable() else repr(name) for name in columns)
