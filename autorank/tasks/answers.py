"""Answers that stand in a text: how rows give them, and how a text is judged against them.

The scores are those of SQuAD's own script: Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1, and
for questions without an answer Rajpurkar et al. 2018, arXiv 1806.03822.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from autorank.data import Row
from autorank.errors import DataError
from autorank.tasks.task import check_text

__all__ = ["Answer", "exact_match", "read_answers", "word_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_RULE = (
    'it must be {"text": […], "answer_start": […]}, a text of the context, or a list of such texts, which is '
    "empty where there is no answer"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of a context: `text`, which begins at character `start`."""

    text: str
    start: int


def read_answers(row: Row, place: str) -> tuple[Answer, ...]:
    """The answers of a row whose `context` is text, in their order; none where the question has none.

    A text without a place is taken where it first occurs.

    Args:
        row: `answers` is SQuAD's object of `text` and `answer_start`, a text, or a list of texts.
        place: of the row, for messages.

    Raises:
        DataError: `answers` has another form, or one of them does not stand in the context.
    """
    value, context = row.get("answers"), row["context"]
    starts: object = None
    texts: object = value
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
    if isinstance(value, str):
        texts = [value]
    if not isinstance(texts, list):
        found = "is missing" if value is None else f"is {type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"{place}: field 'answers' {found}; {_RULE}")
    if starts is None:
        return tuple(_found(text, context, place) for text in texts)
    if not isinstance(starts, list) or len(starts) != len(texts):
        found = f"{len(starts)} places" if isinstance(starts, list) else f"answer_start {str(starts)[:40]!r}"
        raise DataError(f"{place}: field 'answers' has {len(texts)} texts and {found}; each text needs one")
    return tuple(_placed(text, start, context, place) for text, start in zip(texts, starts, strict=True))


def _found(text: object, context: str, place: str) -> Answer:
    """An answer where it first occurs."""
    check_text(text, "answers", place)
    assert isinstance(text, str)
    start = context.find(text)
    if start < 0:
        raise DataError(
            f"{place}: the answer {text[:40]!r} does not occur in the context; answers are parts of it, "
            "letter by letter"
        )
    return Answer(text, start)


def _placed(text: object, start: object, context: str, place: str) -> Answer:
    """An answer where it is said to be."""
    check_text(text, "answers", place)
    assert isinstance(text, str)
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise DataError(
            f"{place}: answer_start {str(start)[:40]!r} is no place; it must be the number of characters "
            f"before {text[:40]!r}"
        )
    stands = context[start : start + len(text)]
    if stands != text:
        first = context.find(text)
        way = "leave answer_start out and" if first >= 0 else "correct the row:"
        where = f"it begins at {first}" if first >= 0 else "it does not occur there at all"
        raise DataError(
            f"{place}: at character {start} of the context stands {stands[:40]!r}, not the answer "
            f"{text[:40]!r}; {way} {where}"
        )
    return Answer(text, start)


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where the text is one of the answers, 0 elsewhere.

    Texts are compared in lower case and without punctuation and articles. Where there are no answers
    the empty text is right.
    """
    return float(any(_words(text) == answer for answer in _wanted(answers)))


def word_f1(text: str, answers: Sequence[str]) -> float:
    """The F1 of the words of the text, in [0, 1], against the answer for which it is highest.

    Words are those of `exact_match`. Where there are no answers the empty text has 1, another 0.
    """
    return max(_overlap(_words(text), answer) for answer in _wanted(answers))


def _wanted(answers: Sequence[str]) -> list[list[str]]:
    """The words of each answer that has some; no words, where none has."""
    return [words for words in map(_words, answers) if words] or [[]]


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _overlap(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))
