"""Numbers and stored text as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.figures import (
    format_bytes,
    format_difference,
    format_duration,
    format_rate,
    format_value,
    name_lines,
    param_parts,
    printable,
    shortened,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.92204, "0.9220"),
        (1, "1.0000"),
        (1234.56, "1,234.6"),
        (None, "-"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0027, "+0.0027"), (-0.01, "-0.0100"), (0.0, "+0.0000"), (-0.00001, "+0.0000"), (None, "-")],
)
def test_differences_carry_their_sign_and_no_minus_zero(value: float | None, text: str) -> None:
    assert format_difference(value) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0.002, "2e-3"), (1.35e-3, "1.4e-3"), (0.01, "1e-2"), (1.0, "1e0"), (None, "-")]
)
def test_rates(rate: object, text: str) -> None:
    assert format_rate(rate) == text


@given(st.floats(1e-6, 1.0))
def test_a_rate_reads_back_to_two_digits(rate: float) -> None:
    assert float(format_rate(rate)) == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (45.2, "45s"), (59.6, "1m 00s"), (130, "2m 10s"), (3900, "1h 05m"), (183600, "2d 3h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12 * 2**20, "12 MiB"), (3 * 2**29, "1.5 GiB"), (None, "-")])
def test_bytes(count: object, text: str) -> None:
    assert format_bytes(count) == text


def test_settings_in_words() -> None:
    params = {
        "target_modules": "mlp",
        "allocation": "adaptive",
        "rank": 4,
        "scaling": 0.7314453125,
        "learning_rate": 2e-3,
        "head_learning_rate": None,
    }
    assert param_parts(params) == ["mlp", "adaptive", "rank 4", "scaling 0.731", "rate 2e-3"]
    assert param_parts({"rank": 0}) == ["start from the gradient"]
    assert param_parts({"head_learning_rate": 1e-3, "head_scale": 1.0}) == ["head 1e-3"]
    assert param_parts({"head_learning_rate": 1e-3, "head_scale": 0.3}) == ["head 1e-3", "head scale 0.3"]
    held = {"dropout": 0.1, "weight_decay": 0.0, "label_smoothing": 0.0512345}
    assert param_parts(held) == ["dropout 0.1", "label smoothing 0.0512"]
    assert param_parts({**held, "dropout": 0.0, "weight_decay": 2.0, "label_smoothing": None}) == [
        "weight decay 2"
    ]


@pytest.mark.parametrize(
    ("name", "most", "lines"),
    [
        ("accuracy", 10, ["accuracy"]),
        ("token_accuracy", 10, ["token_", "accuracy"]),
        ("mine:off_by_more", 10, ["mine:off_", "by_more"]),
        ("intermediate_dense", 8, ["intermed", "iate_", "dense"]),
        ("", 8, [""]),
    ],
)
def test_a_long_name_goes_on_in_further_lines(name: str, most: int, lines: list[str]) -> None:
    assert name_lines(name, most) == lines


@given(st.text(), st.integers(1, 9))
def test_lines_of_a_name_hold_all_of_it(name: str, most: int) -> None:
    lines = name_lines(name, most)
    assert "".join(lines) == name and all(len(line) <= most for line in lines)


def test_stored_text_cannot_drive_a_terminal() -> None:
    assert printable("a\x1b[31mred\x07\nb") == "a[31mred b"
    assert printable("a\nb\x9b", lines=True) == "a\nb"


@given(st.text())
def test_printable_text_is_one_line_without_control_characters(text: str) -> None:
    assert all(c.isprintable() for c in printable(text))


def test_a_long_text_keeps_its_begin_and_end() -> None:
    assert shortened("a" * 600) == "a" * 600
    assert shortened("b" * 300 + "x" + "e" * 300) == "b" * 300 + " […] " + "e" * 300
