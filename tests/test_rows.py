"""Rows and their places."""

from __future__ import annotations

from autorank.rows import Part, Places, listed


def test_places_of_some_rows() -> None:
    places = Places("f.csv", [2, 5, 9], lines=True).take([2, 0])
    assert [places[0], places[1]] == ["f.csv:9", "f.csv:2"]
    nested = Places("f.json", ["a[0].b[1]", "a[2]"], lines=False).take([1, 0])
    assert [nested[0], nested[1]] == ["f.json, a[2]", "f.json, a[0].b[1]"]


def test_rows_are_taken_with_their_places() -> None:
    part = Part([{"n": 0}, {"n": 1}, {"n": 2}], Places("f.parquet", range(1, 4), lines=False)).take([2, 0])
    assert part.rows == [{"n": 2}, {"n": 0}]
    assert [part.places[0], part.places[1]] == ["f.parquet, row 3", "f.parquet, row 1"]


def test_names_are_listed_on_one_line() -> None:
    assert listed(["text", "a b", "a\nb", ""]) == "text, a b, 'a\\nb', ''"
