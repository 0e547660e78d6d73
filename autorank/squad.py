"""SQuAD's own nested file: articles of paragraphs of questions, as one row for each question.

Versions 1.1 and 2.0 (rajpurkar.github.io/SQuAD-explorer). Only the nesting is read and checked here;
what a question, a context and answers may be is the business of the task that reads the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autorank.errors import DataError
from autorank.rows import Part, Places, Row

__all__ = ["is_squad", "squad_part"]


def is_squad(value: object) -> bool:
    """Whether a JSON value begins as SQuAD's file does: an object whose `data` are of `paragraphs`."""
    data = value.get("data") if isinstance(value, dict) else None
    return isinstance(data, list) and bool(data) and isinstance(data[0], dict) and "paragraphs" in data[0]


def squad_part(path: str, value: dict[str, Any]) -> Part:
    """The questions of a file in their order: `question`, `context`, `answers`, and `id` and `title` if any.

    `answers` is an object of `text` and `answer_start`, empty where `is_impossible` is true, and
    missing where it is missing in the file, as for questions that are yet to be answered.

    Raises:
        DataError: the file is nested otherwise, or a question that is impossible has answers.
    """
    rows: list[Row] = []
    places: list[str] = []
    for article, of_article in _objects(value, "data", path, ""):
        for paragraph, of_paragraph in _objects(article, "paragraphs", path, of_article):
            for question, place in _objects(paragraph, "qas", path, of_paragraph):
                given = {"id": question.get("id"), "title": article.get("title")}
                row: Row = {name: text for name, text in given.items() if isinstance(text, str)}
                row |= {"question": question.get("question"), "context": paragraph.get("context")}
                rows.append(row | _answers(question, path, place))
                places.append(place)
    return Part(rows, Places(path, places, lines=False))


def _objects(outer: Row, key: str, path: str, place: str) -> Iterator[tuple[Row, str]]:
    """The objects of a list, each with its own place."""
    where = f"{place}.{key}".lstrip(".")
    inner = outer.get(key)
    if not isinstance(inner, list):
        found = "is missing" if inner is None else f"is {type(inner).__name__}"
        raise DataError(f"{path}: {where} {found}; in SQuAD's form it is a list of objects")
    for index, item in enumerate(inner):
        if not isinstance(item, dict):
            raise DataError(
                f"{path}: {where}[{index}] is {type(item).__name__}; in SQuAD's form it is an object"
            )
        yield item, f"{where}[{index}]"


def _answers(question: Row, path: str, place: str) -> Row:
    """The column of answers, where the question has it."""
    impossible = question.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise DataError(f"{path}: {place}.is_impossible is {str(impossible)[:40]!r}; it is true or false")
    if question.get("answers") is None:
        return {"answers": {"text": [], "answer_start": []}} if impossible else {}
    answers = [answer for answer, _ in _objects(question, "answers", path, place)]
    if impossible and answers:
        raise DataError(
            f"{path}: {place} is_impossible, and yet has answers; remove them, or set it to false"
        )
    return {"answers": {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}}
