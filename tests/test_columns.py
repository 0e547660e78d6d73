"""Which column plays which role, as flags and study files say it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.columns import ROLES, parse_columns
from autorank.errors import CommandError

NAMES = st.text(st.characters(exclude_characters=",", exclude_categories=["Z", "C"]), min_size=1)


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ("text=question,label=intent", {"text": "question", "label": "intent"}),
        (" text = the question , label=a=b", {"text": "the question", "label": "a=b"}),
        ({"text": "a, b", "label": "text"}, {"text": "a, b", "label": "text"}),
        ("text=label,label=text", {"text": "label", "label": "text"}),
        ({}, None),
        (None, None),
    ],
)
def test_columns_are_read(value: Any, columns: dict[str, str] | None) -> None:
    assert parse_columns(value) == columns


@given(
    columns=st.dictionaries(st.sampled_from(ROLES), NAMES, min_size=1, max_size=5).filter(
        lambda columns: len(set(columns.values())) == len(columns)
    )
)
def test_a_flag_says_what_a_table_says(columns: dict[str, str]) -> None:
    flag = ",".join(f"{role}={column}" for role, column in columns.items())
    assert parse_columns(flag) == parse_columns(columns) == columns


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", r"columns '': '' is not understood: columns are written role=column"),
        ("text", r"columns 'text': 'text' is not understood: .* such as text=question,label=intent"),
        ("text=", "'text=' is not understood"),
        ("=a", "'=a' is not understood"),
        ("text=a,b", r"'b' is not understood: .*a column whose name holds a comma is named in a study file"),
        ("text=a,", "columns 'text=a,': '' is not understood"),
        ("text=a,text=b", "columns 'text=a,text=b': text is named twice; one column plays a role"),
        ("text=a,label=a", "columns: text and label both name 'a'; a column plays one role"),
        ({"text": "a", "label": "a"}, "text and label both name 'a'"),
        ("txt=a", "columns: 'txt' is no role: do you mean text[?] the roles are text, label, text_a"),
        ("zzzzz=a", "columns: 'zzzzz' is no role: the roles are text"),
        ({1: "a"}, "columns: 1 is no role: the roles are text"),
        ({"text": 1}, "columns.text is 1: it must be the name of a column, in quotes"),
        ({"text": ""}, "columns.text is '': it must be the name of a column"),
        (3, "columns 3 is not understood: columns are written"),
        ([["text", "a"]], "is not understood: columns are written"),
    ],
)
def test_what_names_no_columns_is_refused(value: Any, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse_columns(value)
