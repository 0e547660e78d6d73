"""The task of an export, made again: any row is scored, and a row without an answer is answered."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

from autorank.data import DataSet
from autorank.errors import DataError, FileError
from autorank.images import ImageFile
from autorank.rows import Part, Places
from autorank.shapes import read_shapes
from autorank.tasks import choose_task
from autorank.tasks.exported import blank_answer, check_columns, restore_task

_CONTENT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)
IMAGE = ImageFile("a.png", _CONTENT, hashlib.sha256(_CONTENT).hexdigest())
CASES: list[tuple[str, list[str], list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = [
    ("text-classification", ["10", "9", "a"], [{"text": "x", "label": 9}], {"text": "x"}, {"label": "10"}),
    ("text-classification", ["a", "b"], [{"text_a": "x", "text_b": "y", "label": "b"}],
     {"text_a": "x", "text_b": "y"}, {"label": "a"}),
    ("multi-label-classification", ["a", "b"], [{"text": "x", "label": ["b"]}], {"text": "x"}, {"label": []}),
    ("regression", [], [{"text": "x", "score": 1.5}], {"text": "x"}, {"score": 0.0}),
    ("regression", [], [{"text": "x", "label": 1.5}], {"text": "x"}, {"score": 0.0}),
    ("token-classification", ["B-X", "O"], [{"tokens": ["x", "y"], "tags": ["O", "B-X"]}],
     {"tokens": ["x", "y"]}, {"tags": ["B-X", "B-X"]}),
    ("question-answering", [], [{"question": "x", "context": "y z", "answers": ["z"]}],
     {"question": "x", "context": "y z"}, {"answers": []}),
    ("image-classification", ["a", "b"], [{"image": IMAGE, "label": "b"}], {"image": IMAGE}, {"label": "a"}),
    ("seq2seq", [], [{"source": "x", "target": "y"}], {"source": "x"}, {"target": "?"}),
    ("seq2seq", [], [{"prompt": "x", "completion": "y"}], {"prompt": "x"}, {"completion": "?"}),
    ("causal-lm", [], [{"prompt": "x", "completion": "y"}], {"prompt": "x"}, {"completion": "?"}),
    ("causal-lm", [], [{"instruction": "x", "output": "y"}], {"instruction": "x"}, {"output": "?"}),
    ("causal-lm", [], [{"text": "x"}], {"text": "x"}, {}),
]  # fmt: skip


def told(task: str, labels: list[str], **more: Any) -> dict[str, Any]:
    return {"task": task, "id2label": {str(at): name for at, name in enumerate(labels)} or None, **more}


def rows_as_data(rows: list[dict[str, Any]]) -> DataSet:
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    return DataSet("here", "rows", columns, (), (), tuple(rows), "")


@pytest.mark.parametrize(("name", "labels", "rows", "bare", "filled"), CASES)
def test_rows_with_answers_are_those_of_the_task_and_answers_to_come_are_filled_in(
    name: str, labels: list[str], rows: list[dict[str, Any]], bare: dict[str, Any], filled: dict[str, Any]
) -> None:
    facts = told(name, labels)
    task = restore_task(facts, rows_as_data(rows))
    assert task.name == name and (task.labels or ()) == tuple(labels)
    assert blank_answer(facts, bare) == {**bare, **filled}
    nulls = {**bare, **dict.fromkeys(filled)}  # a table has the column in every row
    assert blank_answer(facts, nulls) == {**bare, **filled}
    for answer in (rows[0], {**bare, **dict.fromkeys(filled, "")}, {**bare, **dict.fromkeys(filled, -1)}):
        blanked = rows_as_data([blank_answer(facts, answer)])
        assert blanked.test[0].items() >= {**bare, **filled}.items()
        assert restore_task(facts, blanked).name == name
    assert restore_task(facts, rows_as_data([blank_answer(facts, bare)])).name == name


def test_a_template_is_that_of_the_export() -> None:
    facts = told("causal-lm", [], template="{q}?")
    task = restore_task(facts, rows_as_data([blank_answer(facts, {"q": "why"})]))
    assert task.columns == ("q", "completion")  # type: ignore[attr-defined]
    assert blank_answer(facts, {"q": "why", "output": ""}) == {"q": "why", "output": "", "completion": "?"}
    named = told("causal-lm", [], template="{q} {completion}")
    row = blank_answer(named, {"q": "why", "completion": "so", "label": "no"})
    assert row == {"q": "why", "completion": "so", "output": "?", "label": "no"}
    assert restore_task(named, rows_as_data([row])).columns == ("q", "completion", "output")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("column", "role", "words", "mine"),
    [("messages", "role", "content", "assistant"), ("conversations", "from", "value", "gpt")],
)
def test_a_chat_that_ends_with_a_question_is_answered(column: str, role: str, words: str, mine: str) -> None:
    facts = told("causal-lm", [])
    asked = [{role: "user" if role == "role" else "human", words: "why?"}]
    row = blank_answer(facts, {column: asked})
    assert row[column] == [*asked, {role: mine, words: "?"}] and blank_answer(facts, row) == row
    read, _ = read_shapes({"test": Part([row], Places("here", [1], lines=True))})
    task = restore_task(facts, rows_as_data(read["test"].rows))
    assert task.columns == ("messages",)  # type: ignore[attr-defined]
    assert blank_answer(facts, {column: [*asked, {role: mine, words: None}]}) == row
    assert blank_answer(facts, {column: "no list"}) == {column: "no list"}


def test_a_task_or_a_class_that_is_not_known_is_refused() -> None:
    with pytest.raises(FileError, match="'juggling', which this version does not know"):
        restore_task(told("juggling", []), rows_as_data([{"text": "x"}]))
    for name, row in (
        ("text-classification", {"text": "x", "label": "c"}),
        ("multi-label-classification", {"text": "x", "label": ["c"]}),
        ("token-classification", {"tokens": ["x"], "tags": ["c"]}),
    ):
        with pytest.raises(
            DataError, match=r"'c' is none that the adapter was trained on \(2 classes: a, b\)"
        ):
            restore_task(told(name, ["a", "b"]), rows_as_data([row]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"text": "x", "label": "HAM"},
            r"\(2 classes: ham, spam\); do you mean 'ham'\? correct the label, or l",
        ),
        ({"text": "spam", "label": "buy now"}, "column text holds 'spam': are the columns swapped"),
        (
            {"text": "spam", "label": "so long " * 99},
            r"label 'so long so long so long so lon \[…\] [a-z ]{30}' is none",
        ),
        ({"text": "x", "label": "eggs"}, r"spam\); correct the label, or leave the row out$"),
    ],
)
def test_what_an_unknown_class_may_be_is_told(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        restore_task(told("text-classification", ["ham", "spam"]), rows_as_data([row]))


def test_columns_are_told_by_the_names_that_the_file_has() -> None:
    facts = told("text-classification", ["a", "b"], usage={"columns": ["text"]})
    with pytest.raises(
        DataError, match=r"no column label, only id, message; .*--columns text=message,label=COL"
    ):
        check_columns(facts, "rows.csv", ["id", "text"], answers=True, columns={"text": "message"})
    given = {"text_a": "first word"}
    pair = told("text-classification", ["a", "b"], usage={"columns": ["text_a", "text_b"]})
    with pytest.raises(
        DataError,
        match=r"text_a, text_b \(as in training\) or text; found first word: .* 'text_a=first word,text_b=C",
    ):
        check_columns(pair, "rows.csv", ["text_a"], answers=False, columns=given)


def test_what_a_chat_was_trained_on_is_told_first() -> None:
    facts = told("causal-lm", [], usage={"columns": ["messages"]})
    with pytest.raises(
        DataError, match=r"reads messages \(as in training\) or prompt or .* --columns messages=CO"
    ):
        check_columns(facts, "rows.csv", ["chat"], answers=False)


def test_labels_of_a_search_and_of_its_export_are_in_one_order() -> None:
    rows = [{"text": f"t{n}", "label": n} for n in (2, 10, 9)]
    data = DataSet("here", "rows", ("text", "label"), tuple(rows), tuple(rows), (), "")
    task, _ = choose_task("auto", data)
    assert task.labels == ("2", "9", "10")
    again = restore_task(told("text-classification", list(task.labels)), rows_as_data(rows[1:]))
    assert again.labels == task.labels


@pytest.mark.parametrize(("name", "labels", "rows", "bare", "filled"), CASES)
def test_columns_that_the_adapter_reads_must_be_there_and_answers_to_be_scored(
    name: str, labels: list[str], rows: list[dict[str, Any]], bare: dict[str, Any], filled: dict[str, Any]
) -> None:
    facts = told(name, labels)
    check_columns(facts, "rows.csv", rows[0], answers=True)
    check_columns(facts, "rows.csv", bare, answers=False)
    first = next(iter(bare))
    lacking = {"opinion": 1} | {column: 1 for column in bare if column != first}
    with pytest.raises(
        DataError, match=rf"^rows\.csv: the adapter reads .*{first}.*found opinion.*--columns \w+=COLUMN"
    ):
        check_columns(facts, "rows.csv", lacking, answers=False)
    if filled:
        with pytest.raises(DataError, match=r"no answers to score against: there is no column .*, only"):
            check_columns(facts, "rows.csv", bare, answers=True)


def test_a_template_reads_its_own_columns() -> None:
    facts = told("causal-lm", [], template="{q} {hint}")
    check_columns(facts, "rows.csv", ["q", "hint"], answers=False)
    with pytest.raises(DataError, match="the adapter reads q, hint; found q"):
        check_columns(facts, "rows.csv", ["q"], answers=False)
