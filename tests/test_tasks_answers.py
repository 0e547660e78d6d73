"""Answers in rows, and the scores of SQuAD's script by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import DataError
from autorank.tasks.answers import Answer, exact_match, read_answers, word_f1

CONTEXT = "the cat saw the cat"


def read(answers: Any) -> tuple[Answer, ...]:
    return read_answers({"context": CONTEXT, "answers": answers}, "rows.jsonl:7")


@pytest.mark.parametrize(
    ("answers", "read_as"),
    [
        ({"text": ["cat", "saw"], "answer_start": [16, 8]}, (("cat", 16), ("saw", 8))),
        ({"text": ["cat"], "answer_start": None}, (("cat", 4),)),
        ({"text": ["cat"]}, (("cat", 4),)),
        ("cat", (("cat", 4),)),
        (["saw the", "cat"], (("saw the", 8), ("cat", 4))),
        ({"text": [], "answer_start": []}, ()),
        ([], ()),
    ],
)
def test_every_form_is_read(answers: Any, read_as: Any) -> None:
    assert read(answers) == tuple(Answer(*answer) for answer in read_as)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, "field 'answers' is missing; it must be {\"text\""),
        (7, "field 'answers' is int '7'; it must be {\"text\""),
        ({"answer_start": [1]}, "field 'answers' is dict"),
        ({"text": "cat", "answer_start": 4}, "field 'answers' is dict"),
        ("dog", "the answer 'dog' does not occur in the context"),
        (["cat", "Cat"], "the answer 'Cat' does not occur in the context"),
        ("", "field 'answers' is empty"),
        ([7], "field 'answers' is int '7'; it must be text"),
        ([{"text": "cat"}], "field 'answers' is dict"),
        (
            {"text": ["cat"], "answer_start": []},
            "field 'answers' has 1 in text and 0 places; each text needs a place",
        ),
        ({"text": ["cat"], "answer_start": 4}, "field 'answers' has 1 in text and answer_start '4'"),
        ({"text": ["cat"], "answer_start": ["4"]}, "answer_start '4' is no place"),
        ({"text": ["cat"], "answer_start": [-3]}, "answer_start '-3' is no place"),
        ({"text": ["the"], "answer_start": [False]}, "answer_start 'False' is no place"),
        (
            {"text": ["cat"], "answer_start": [5]},
            "at character 5 of the context stands 'at ', not the answer 'cat'; leave answer_start out and",
        ),
        (
            {"text": ["dog"], "answer_start": [99]},
            "at character 99 of the context stands '', not the answer 'dog'; correct the row: it does not",
        ),
    ],
)
def test_what_is_no_answer_is_refused_with_its_place(answers: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"rows.jsonl:7: {message}")):
        read(answers)


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),  # case, punctuation, articles
        ("cat", ["a  cat,", "dog"], 1, 1),
        ("another", ["other"], 0, 0),  # an article is a whole word
        ("U.S.A.", ["USA"], 1, 1),
        ("a big red cat", ["red cat"], 0, 0.8),  # 2 of 3 words told, 2 of 2 wanted
        ("red cat", ["the small dog", "cat"], 0, 2 / 3),  # the best of several
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # each word as often as both have it
        ("", ["cat"], 0, 0),
        ("cat", [], 0, 0),
        ("", [], 1, 1),  # no answer, and none told
        ("the", [], 1, 1),
        ("", ["the", "cat"], 0, 0),  # an answer of nothing but articles is none beside another
        ("", ["the"], 1, 1),
    ],
)
def test_scores_by_hand(text: str, answers: list[str], exact: float, f1: float) -> None:
    assert exact_match(text, answers) == exact
    assert word_f1(text, answers) == pytest.approx(f1)


_TEXTS = st.lists(st.sampled_from(["a", "the", "cat", "Dog,", "red"]), max_size=5).map(" ".join)


@given(_TEXTS, st.lists(_TEXTS, max_size=3))
def test_an_exact_match_has_an_f1_of_1(text: str, answers: list[str]) -> None:
    exact, f1 = exact_match(text, answers), word_f1(text, answers)
    assert exact in (0.0, 1.0) and 0.0 <= f1 <= 1.0
    assert f1 == 1.0 or not exact
    assert all(word_f1(text, [*answers, answer]) >= f1 for answer in answers)
