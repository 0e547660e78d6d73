"""Hints on columns of other names."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.columns import parse_columns
from autorank.data import DataSet, build_data
from autorank.errors import DataError
from autorank.tasks import CausalLM, TextClassification, choose_task
from autorank.tasks.hints import columns_example, unused_label


def data(**columns: list[Any]) -> DataSet:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return build_data("things", {"train": rows, "validation": rows[:1]})


TEXTS = [f"text number {index}" for index in range(6)]
OTHERS = [f"other text {index}" for index in range(6)]
CLASSES = ["in", "out", "in", "in", "out", "in"]


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ({"klass": CLASSES}, "; column klass is not used: --columns label=klass would classify"),
        ({"a class": [0, 1, 0, 1, 2, 2]},
         "; column a class is not used: --columns 'label=a class' would classify"),
        ({"spam": [True, False] * 3}, "; column spam is not used: --columns label=spam would classify"),
        ({"id": list(range(6)), "klass": CLASSES}, "; column klass is not used: --columns label=klass would"),
        ({"id": list(range(6))}, ""),
        ({"lang": ["en"] * 6}, ""),
        ({"size": [0.5, 1.5] * 3}, ""),
        ({"klass": ["in", None, "in", "out", "in", "out"]}, ""),
        ({"klass": ["in", 1, "in", 1, "in", 1]}, ""),
        ({"klass": ["in", "", "in", "", "in", ""]}, ""),
        ({"klass": ["in", "x" * 61] * 3}, ""),
        ({"four": [0, 1, 2, 3, 3, 3]}, ""),
        ({"nested": [["in"], ["out"]] * 3}, ""),
        ({"a,b": CLASSES}, ""),
    ],
)  # fmt: skip
def test_a_corpus_whose_rows_seem_to_have_classes_says_so(columns: dict[str, list[Any]], hint: str) -> None:
    rows = data(text=TEXTS, **columns)
    assert unused_label(rows).startswith(hint) if hint else unused_label(rows) == ""
    task, line = choose_task("auto", rows)
    assert isinstance(task, CausalLM)
    assert line.startswith(f"task causal-lm (column text, no label{hint}")
    assert "--columns" not in choose_task("causal-lm", rows)[1]


@pytest.mark.parametrize(
    ("columns", "example"),
    [
        ({"sentence": TEXTS, "label": CLASSES}, "text=sentence,label=label"),
        ({"id": list(range(6)), "sentence": TEXTS, "klass": CLASSES}, "text=sentence,label=klass"),
        ({"premise": TEXTS, "hypothesis": OTHERS, "label": CLASSES},
         "text_a=premise,text_b=hypothesis,label=label"),
        ({"text_a": TEXTS, "text_b": OTHERS, "klass": CLASSES}, "label=klass"),
        ({"ask": TEXTS, "answer": OTHERS}, "prompt=ask,completion=answer"),
        ({"id": list("uvwxyz"), "body": TEXTS, "n": list(range(6))}, "text=body"),
        ({"my body": TEXTS}, "'text=my body'"),
        ({"n": list(range(6))}, "text=n"),
        ({"a,b": TEXTS}, "text=COLUMN"),
        ({"label": CLASSES}, "text=COLUMN"),
    ],
)  # fmt: skip
def test_the_way_out_is_made_of_the_columns_there_are(columns: dict[str, list[Any]], example: str) -> None:
    rows = data(**columns)
    example = example.replace(",label=label", "")
    with pytest.raises(DataError, match="things: no task fits its columns") as caught:
        choose_task("auto", rows)
    assert str(caught.value).endswith(f"or say which is which, such as --columns {example}")


def test_a_hint_that_is_followed_classifies() -> None:
    rows = data(sentence=TEXTS, klass=CLASSES)
    roles = parse_columns(shlex.split(columns_example(rows))[1]) or {}
    renamed = data(**{role: [row[column] for row in rows.train] for role, column in roles.items()})
    assert isinstance(choose_task("auto", renamed)[0], TextClassification)


VALUES = st.none() | st.text(max_size=5) | st.integers(0, 2) | st.lists(st.integers(), max_size=1)


@given(st.lists(st.dictionaries(st.text(max_size=4), VALUES), min_size=1, max_size=6))
def test_an_example_can_always_be_parsed(rows: list[dict[str, Any]]) -> None:
    found = build_data("x", {"train": rows, "validation": rows})
    flag, value = shlex.split(columns_example(found))
    assert flag == "--columns"
    assert set((parse_columns(value) or {}).values()) <= {*found.columns, "COLUMN"}
