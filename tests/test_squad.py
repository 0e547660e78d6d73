"""SQuAD's own nested file: its questions as rows, their places, and what is refused."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from autorank.data import read_data
from autorank.errors import DataError
from autorank.readers import read_file
from autorank.tasks import choose_task

CONTEXT = "we saw the cat today"


def asked(answer: str, **more: Any) -> dict[str, Any]:
    answers = [{"text": answer, "answer_start": CONTEXT.index(answer)}]
    return {"question": f"where is {answer}?", "id": f"id of {answer}", "answers": answers, **more}


LAST = [asked("today")]
VERSION_1: dict[str, Any] = {
    "data": [
        {"title": "pets", "paragraphs": [{"context": CONTEXT, "qas": [asked("the cat"), asked("we")]}]},
        {"title": "days", "paragraphs": [{"context": "b", "qas": []}, {"context": CONTEXT, "qas": LAST}]},
    ],
    "version": "1.1",
}
NONE = {
    "question": "who?",
    "id": "none",
    "answers": [],
    "plausible_answers": [{"text": "we", "answer_start": 0}],
    "is_impossible": True,
}
VERSION_2: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "pets",
            "paragraphs": [{"qas": [asked("the cat", is_impossible=False), NONE], "context": CONTEXT}],
        }
    ],
}


def write(path: Path, value: object, indent: int | None = None) -> Path:
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_a_row_is_a_question(tmp_path: Path, indent: int | None) -> None:
    kind, part = read_file(write(tmp_path / "train-v1.1.json", VERSION_1, indent))
    assert kind == "SQuAD JSON"
    assert part.rows[0] == {
        "id": "id of the cat",
        "title": "pets",
        "question": "where is the cat?",
        "context": CONTEXT,
        "answers": {"text": ["the cat"], "answer_start": [7]},
    }
    assert [row["title"] for row in part.rows] == ["pets", "pets", "days"]
    assert part.places[2] == f"{tmp_path / 'train-v1.1.json'}, data[1].paragraphs[1].qas[0]"
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(VERSION_1).encode("utf-8-sig")))
    assert read_file(packed)[1].rows == part.rows


def test_what_is_impossible_has_no_answer(tmp_path: Path) -> None:
    _, part = read_file(write(tmp_path / "dev.json", VERSION_2))
    assert [row["answers"]["text"] for row in part.rows] == [["the cat"], []]
    assert not any("plausible_answers" in row for row in part.rows)


def test_a_search_reads_it(tmp_path: Path) -> None:
    big = copy.deepcopy(VERSION_2)
    one = big["data"][0]["paragraphs"][0]
    one["qas"] = [asked("the cat", question=f"number {n}?") for n in range(12)]
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", big if split == "train" else VERSION_2)
    data = read_data(str(tmp_path), eval_fraction=0.2, seed=0)
    assert data.format == "SQuAD JSON folder" and len(data.train) == 12
    assert choose_task("auto", data)[0].name == "question-answering"
    one["qas"][7]["answers"][0]["answer_start"] = 3
    write(tmp_path / "train.json", big)
    with pytest.raises(
        DataError, match=re.escape("train.json, data[0].paragraphs[0].qas[7]: at character 3")
    ):
        choose_task("auto", read_data(str(tmp_path), eval_fraction=0.2, seed=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.append(7), "data[1] is int; in SQuAD's form it is an object"),
        (lambda data: data[0].update(paragraphs={}), "data[0].paragraphs is dict; in SQuAD's form"),
        (lambda data: data[0]["paragraphs"][0].pop("qas"), "data[0].paragraphs[0].qas is missing; in"),
        (
            lambda data: data[0]["paragraphs"][0]["qas"][0].update(answers="we"),
            "data[0].paragraphs[0].qas[0].answers is str; in SQuAD's form it is a list of objects",
        ),
        (
            lambda data: data[0]["paragraphs"][0]["qas"][0].update(answers=["we"]),
            "data[0].paragraphs[0].qas[0].answers[0] is str; in SQuAD's form it is an object",
        ),
        (
            lambda data: data[0]["paragraphs"][0]["qas"][0].update(is_impossible=True),
            "data[0].paragraphs[0].qas[0] is_impossible, and yet has answers; remove them",
        ),
        (
            lambda data: data[0]["paragraphs"][0]["qas"][1].update(is_impossible="yes"),
            "data[0].paragraphs[0].qas[1].is_impossible is 'yes'; it is true or false",
        ),
    ],
)
def test_a_file_that_is_nested_otherwise_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    value = copy.deepcopy(VERSION_2)
    change(value["data"])
    path = write(tmp_path / "train.json", value)
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
        read_file(path)


def test_other_objects_stay_what_they_were(tmp_path: Path) -> None:
    rows = {"data": [1], "version": 1}
    kind, part = read_file(write(tmp_path / "rows.json", rows))
    assert (kind, part.rows) == ("JSONL", [rows])
    empty = write(tmp_path / "empty.json", {"data": [{"paragraphs": []}]})
    with pytest.raises(DataError, match=r"empty\.json: no rows in it"):
        read_file(empty)
    two = tmp_path / "two.json"
    two.write_text(f"{json.dumps(VERSION_1)}\n{json.dumps(VERSION_1)}\n", encoding="utf-8")
    assert read_file(two)[0] == "JSONL"
    deep: Any = copy.deepcopy(VERSION_1)
    inner: Any = []
    for _ in range(100):
        inner = [inner]
    deep["data"][0]["paragraphs"][0]["context"] = inner
    with pytest.raises(DataError, match="nested too deeply"):
        read_file(write(tmp_path / "deep.json", deep))


def test_questions_without_answers_are_answered(tmp_path: Path) -> None:
    bare = copy.deepcopy(VERSION_1)
    del bare["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    _, part = read_file(write(tmp_path / "ask.json", bare))
    assert "answers" not in part.rows[0] and "answers" in part.rows[1]
