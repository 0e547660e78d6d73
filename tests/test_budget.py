from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.budget import format_count, parse_budget
from autorank.errors import CommandError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("9216", 9_216),
        ("2M", 2_000_000),
        ("2m", 2_000_000),
        ("170k", 170_000),
        ("170K", 170_000),
        ("1.5M", 1_500_000),
        ("0.5k", 500),
        ("2_000_000", 2_000_000),
        ("1_000.5k", 1_000_500),
        ("1b", 1_000_000_000),
        ("1000B", 10**12),
        (" 2 M ", 2_000_000),
        (1, 1),
        (10**12, 10**12),
    ],
)
def test_a_budget_is_read_as_people_write_it(text: str | int, count: int) -> None:
    assert parse_budget(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "2X", "abc", "", " ", "0", "-1", "nan", "inf", "1e400", "1e6", "2MB", "2MiB", "2,5M", "2,000",
        "0.5%", "0.0001k", "1.5", "1001B", "1__0", "_1", "1_", "2 M M", "٣", "0x10", "2T",
        0, -5, 10**12 + 1, True, 2.0, None,
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused_with_the_value_and_the_rule(text: object) -> None:
    with pytest.raises(CommandError) as caught:
        parse_budget(text)  # type: ignore[arg-type]
    message = str(caught.value)
    assert repr(text) in message or repr(str(text)) in message
    assert any(word in message for word in ("such as", "whole number", "must be from"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [("2MB", "bytes"), ("2GiB", "bytes"), ("0.5%", "autorank plan"), ("2,5M", "decimal point")],
)
def test_a_near_miss_is_told_what_it_probably_meant(text: str, hint: str) -> None:
    with pytest.raises(CommandError, match=hint):
        parse_budget(text)


@given(st.integers(1, 10**12))
def test_every_number_in_range_reads_back_however_it_is_written(count: int) -> None:
    assert parse_budget(count) == parse_budget(str(count)) == parse_budget(f"{count:_}") == count
    assert format_count(count) == f"{count:,}"


@given(st.integers(1, 10**6), st.sampled_from([("k", 10**3), ("M", 10**6)]))
def test_a_unit_multiplies_exactly(thousandths: int, unit: tuple[str, int]) -> None:
    letter, factor = unit
    text = f"{thousandths // 1000}.{thousandths % 1000:03}{letter}"
    assert parse_budget(text) == thousandths * factor // 1000
