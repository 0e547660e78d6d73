"""Regression: numbers as targets, their loss and the scores of what is predicted."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from autorank.data import DataSet, Places, build_data, read_data
from autorank.errors import DataError
from autorank.tasks import Batch, Example, HeadTask, Metric, Regression, choose_task
from autorank.tasks.task import Tokenizer

TASK = Regression(("text",), "score", Metric("pearson", "maximize"))
A, B = {"text": "a", "score": 0.5}, {"text": "b", "score": 2}


def task(*rows: dict[str, Any], metric: str = "auto") -> Regression:
    places = {"train": Places("train.jsonl", range(1, 99), lines=True)}
    splits = {"train": list(rows), "validation": list(rows)}
    return Regression.from_data(build_data("things", splits, places=places), metric)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    loaded: Tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    return loaded


def test_the_target_is_the_score_and_else_the_label() -> None:
    assert task(A, B) == replace(TASK, unit=0.75)
    assert isinstance(TASK, HeadTask)
    assert task({"text": "a", "label": 1}, {"text": "b", "label": 2.5}).target == "label"
    assert task({**A, "label": "x"}, {**B, "label": "y"}).target == "score"
    pair = {"text_a": "a", "text_b": "b"}
    assert task({**pair, "score": 1}, {**pair, "score": 2}, metric="mae") == Regression(
        ("text_a", "text_b"), "score", Metric("mae", "minimize"), 0.5
    )


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (None, "field 'score' is missing; give each row a number"),
        ("0.5", "score is str '0.5'; it must be a number"),
        (True, "score is bool 'True'; it must be a number"),
        ([1.0], "score is list '[1.0]'; it must be a number"),
        (math.nan, "score nan cannot be predicted; numbers must be finite and at most 1e+15"),
        (-math.inf, "score -inf cannot be predicted"),
        (2e15, "score 2000000000000000.0 cannot be predicted"),
        (10**400, "score an integer of that size cannot be predicted"),
    ],
)
def test_a_bad_target_is_refused_with_its_place(score: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"train.jsonl:2: {message}")):
        task(A, {"text": "b", "score": score})


def test_the_field_that_makes_a_tables_numbers_text_is_the_one_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,score\na,1.5\nb,2\nc,N/A\nd,\n")
    (tmp_path / "validation.csv").write_text("text,score\na,1.5\n")
    data = read_data(str(tmp_path), eval_fraction=0.1, seed=0)
    with pytest.raises(DataError, match=r"train\.csv:4: score is str 'N/A'; it must be a number"):
        choose_task("regression", data)
    (tmp_path / "train.csv").write_text("text,score\na,1.5\nb,2\nd,\n")
    data = read_data(str(tmp_path), eval_fraction=0.1, seed=0)
    with pytest.raises(DataError, match=r"train\.csv:4: field 'score' is missing; give each row a number"):
        choose_task("regression", data)


def test_what_cannot_be_learnt_is_refused() -> None:
    with pytest.raises(DataError, match=r"things: every train row has the score 0\.5"):
        task(A, {"text": "b", "score": 0.5})
    with pytest.raises(DataError, match=r"the score 16777216\.0, or one that float32 cannot tell from it;"):
        task({**A, "score": 2.0**24}, {**A, "score": 2.0**24 + 1})
    with pytest.raises(DataError, match="regression needs the columns text, score; found text"):
        task({"text": "a"})
    with pytest.raises(DataError, match="regression gives pearson, spearman, mse, mae"):
        task(A, B, metric="accuracy")
    with pytest.raises(DataError, match=r"train\.jsonl:1: field 'text' is empty"):
        task({"text": " ", "score": 1.0}, B)


def test_numbers_reach_the_batch_as_they_are(tokenizer: Tokenizer) -> None:
    encoded = TASK.encode([{"text": "the cat", "score": -3}, {"text": "soup", "score": 0.25}], tokenizer, 8)
    assert TASK.describe(encoded.examples[0], tokenizer) == "[CLS] the cat [SEP] -> -3"
    batch = TASK.collate(encoded.examples, 0)
    assert batch.labels.tolist() == [-3.0, 0.25] and batch.labels.dtype == torch.float32
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert TASK.terms(batch) == 2
    assert encoded.examples[0].length == 4


def batch_of(numbers: list[float]) -> Batch:
    return Batch({}, torch.tensor(numbers, dtype=torch.float32), len(numbers))


def test_loss_is_the_mean_squared_error_in_float32() -> None:
    logits = torch.tensor([[1.0], [4.0]], dtype=torch.bfloat16)
    loss = TASK.loss(logits, batch_of([2.0, 1.0]))
    assert loss.item() == 5.0 and loss.dtype == torch.float32 and loss.ndim == 0
    assert TASK.predictions(logits, batch_of([2.0, 1.0])) == [1.0, 4.0]


@pytest.mark.parametrize("scale", [2.0**-60, 0.25, 2.0**40])
def test_the_loss_is_counted_in_the_spread_of_the_numbers(scale: float) -> None:
    given = task({"text": "a", "score": 3 * scale}, {"text": "b", "score": -scale})
    assert given.unit == 2 * scale
    loss = given.loss(torch.tensor([[scale], [4 * scale]]), batch_of([2 * scale, 2 * scale]))
    assert loss.item() == (0.5**2 + 1.0**2) / 2
    assert given.predictions(torch.tensor([[scale]]), batch_of([scale])) == [scale]


def test_rows_to_score_alone_have_no_spread() -> None:
    rows = (A, B)
    assert Regression.from_data(DataSet("rows", "rows", ("text", "score"), (), (), rows, "")).unit == 1.0


def test_scores_by_hand() -> None:
    outcomes = TASK.outcomes(torch.tensor([[1.0], [2.0], [4.0]]), batch_of([1.0, 3.0, 2.0]))
    assert outcomes.tolist() == [[1, 1], [2, 3], [4, 2]] and outcomes.dtype == torch.float64
    assert TASK.score(outcomes) == pytest.approx(
        {"pearson": 1 / math.sqrt(14 / 3 * 2), "spearman": 0.5, "mse": 5 / 3, "mae": 1.0}
    )


_NUMBERS = st.floats(-1000, 1000, width=16)


@given(st.lists(st.tuples(_NUMBERS, _NUMBERS), min_size=2, max_size=30))
def test_correlations_against_scipy(pairs: list[tuple[float, float]]) -> None:
    predicted, actual = zip(*pairs, strict=True)
    assume(len(set(predicted)) > 1 and len(set(actual)) > 1)
    scores = TASK.score(torch.tensor(pairs, dtype=torch.float64))
    assert scores["spearman"] == pytest.approx(stats.spearmanr(predicted, actual).statistic, abs=1e-9)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(predicted, actual).statistic, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e14])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_correlations_do_not_depend_on_the_unit(scale: float, shift: float) -> None:
    pairs = torch.tensor([[1.0, 1], [2, 3], [4, 2]], dtype=torch.float64)
    scores = TASK.score((pairs + shift) * scale)
    assert (scores["pearson"], scores["spearman"]) == pytest.approx((1 / math.sqrt(14 / 3 * 2), 0.5))


@pytest.mark.parametrize("pairs", [[[0.1, 1.0], [0.1, 2.0]] * 3, [[1.0, 0.1], [2.0, 0.1]] * 3, [[1.0, 2.0]]])
def test_what_is_constant_has_no_correlation(pairs: list[list[float]]) -> None:
    scores = TASK.score(torch.tensor(pairs, dtype=torch.float64))
    assert (scores["pearson"], scores["spearman"]) == (0.0, 0.0)
    assert scores["mse"] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_score_nan(bad: float) -> None:
    scores = TASK.score(TASK.outcomes(torch.tensor([[bad], [1.0]]), batch_of([0.0, 1.0])))
    assert tuple(scores) == TASK.metrics and all(math.isnan(score) for score in scores.values())


def test_the_choice_from_the_columns() -> None:
    def chosen(*rows: dict[str, Any], name: str = "auto") -> str:
        return choose_task(name, build_data("things", {"train": rows, "validation": rows}))[1]

    end = "metric pearson, higher is better"
    assert chosen(A, B) == f"task regression (columns text, score): numbers in score, {end}"
    both = [{**A, "label": "x"}, {**B, "label": "y"}]
    assert chosen(*both).startswith("task text-classification (columns text, label): 2 classes")
    assert chosen(*both, name="regression") == f"task regression (as asked for): numbers in score, {end}"
    floats = [{"text": "a", "label": 1.5}, {"text": "b", "label": 2}]
    assert chosen(*floats) == f"task regression (columns text, label): numbers in label, {end}"
    close = [{"text": "a", "score": 2e6}, {"text": "b", "score": 2e6 + 10}]
    assert "numbers in score (they spread over 2e-06 of their size, which float32 hardly" in chosen(*close)
    assert "spread" not in chosen({"text": "a", "score": 1000}, {"text": "b", "score": 1001})
    whole = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    assert chosen(*whole).startswith("task text-classification")
    pairs = [{"text_a": "a", "text_b": "b", "score": n} for n in (1, 2)]
    assert chosen(*pairs).startswith("task regression (columns text_a, text_b, score)")


def test_a_head_of_numbers_has_one_output() -> None:
    assert TASK.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}
    assert (TASK.outputs, TASK.labels) == (1, None)
    assert Example([5], 1.5).length == 1
