"""Multi-label classification: lists of classes, their loss and the scores of what is told."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from autorank.data import Places, build_data
from autorank.errors import DataError
from autorank.tasks import Batch, Example, HeadTask, Metric, MultiLabelClassification, choose_task
from autorank.tasks.task import Tokenizer

TASK = MultiLabelClassification(("text",), ("x", "y", "z"), Metric("f1_micro", "maximize"))


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": "a", "label": label} for label in labels]


def task(*labels: Any, validation: list[Any] | None = None) -> MultiLabelClassification:
    places = {"train": Places("train.jsonl", range(1, 99), lines=True)}
    splits = {"train": rows(*labels), "validation": rows(*(validation or labels))}
    return MultiLabelClassification.from_data(build_data("things", splits, places=places))


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    loaded: Tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    return loaded


def test_classes_are_those_of_all_train_lists() -> None:
    assert task(["z", "y"], [], ["y", "x"]) == TASK
    assert task([], [10, 2]).labels == ("2", "10")
    assert isinstance(TASK, HeadTask) and TASK.outputs == 3
    assert TASK.model_kwargs() == {
        "num_labels": 3,
        "id2label": {0: "x", 1: "y", 2: "z"},
        "label2id": {"x": 0, "y": 1, "z": 2},
        "problem_type": "multi_label_classification",
    }


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "label is missing; it must be a list of class names or integers, [] for none"),
        ("x", "label is str 'x'; it must be a list"),
        (["x", 1], "label 1 is int, the first label is str 'x'; write all labels as names"),
        ([1.5], "label is float '1.5'; it must be a class name or an integer"),
        (["x", " "], "field 'label' is empty; it must be a class name"),
        ([None], "field 'label' is missing"),
        ([["x"]], "label is list"),
    ],
)
def test_a_bad_label_is_refused_with_its_place(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"train.jsonl:3: {message}")):
        task([], ["x"], label)


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(DataError, match="things: no train row has a class"):
        task([], [])
    with pytest.raises(DataError, match=r"validation, row 2: label 'q' does not occur in train"):
        task(["x"], ["y"], validation=[["x"], ["y", "q"]])


def test_ones_and_zeros_are_no_classes() -> None:
    for lists in (([0, 1, 0], [1, 0, 0]), ([0, 1], [1, 1]), ([False, True, True], [True, False, False])):
        with pytest.raises(DataError, match=rf"things: its labels are a 0 or 1 .*{re.escape(str(lists[0]))}"):
            task(*lists)
    assert task([0, 1], [1, 0]).labels == ("0", "1")
    assert task([0, 1, 0], [1]).labels == ("0", "1")


def test_lists_are_taken_for_several_classes() -> None:
    data = build_data("things", {"train": rows([], ["x"], ["y"]), "validation": rows(["x"])})
    chosen, line = choose_task("auto", data)
    assert isinstance(chosen, MultiLabelClassification)
    assert line == (
        "task multi-label-classification (columns text, label): any of 2 classes, metric f1_micro, "
        "higher is better"
    )


def test_lists_become_ones_and_zeros(tokenizer: Tokenizer) -> None:
    given_rows = [
        {"text": "the cat", "label": ["z", "x", "z"]},
        {"text": "soup", "label": []},
        {"text": "red green blue the one", "label": ["y"]},
    ]
    encoded = TASK.encode(given_rows, tokenizer, 6)
    assert [example.labels for example in encoded.examples] == [(0, 2), (), (1,)]
    assert [example.length for example in encoded.examples] == [4, 3, 6] and encoded.truncated == 1
    batch = TASK.collate(encoded.examples, 0)
    assert batch.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]] and batch.labels.dtype == torch.float32
    assert batch.take(range(1, 3)).labels.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert TASK.describe(encoded.examples[0], tokenizer) == "[CLS] the cat [SEP] -> x, z"
    assert TASK.describe(encoded.examples[1], tokenizer) == "[CLS] soup [SEP] -> none"


def batch_of(labels: list[list[int]]) -> Batch:
    return Batch({}, torch.tensor(labels, dtype=torch.float32), len(labels))


def test_loss_is_the_mean_binary_cross_entropy_in_float32() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.bfloat16)
    batch = batch_of([[1, 0, 1]])
    by_hand = (math.log(1 + math.exp(-2)) + math.log(2) + math.log(1 + math.e)) / 3
    loss = TASK.loss(logits, batch)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6) and loss.dtype == torch.float32
    assert TASK.terms(batch) == 1
    assert TASK.score(TASK.outcomes(logits, batch))["loss"] == pytest.approx(by_hand, rel=1e-6)


def test_a_class_is_told_from_one_half_on() -> None:
    logits = torch.tensor([[0.0, -0.01, 9.0], [-1.0, -1.0, -1.0]])
    assert TASK.predictions(logits, batch_of([[0, 0, 0]] * 2)) == [["x", "z"], []]
    outcomes = TASK.outcomes(logits, batch_of([[1, 1, 1], [0, 0, 0]]))
    assert outcomes[:, 1:].tolist() == [[0, 1, 0, 1, 1, 0, 1, 1, 1, 1], [1] + 9 * [0]]
    assert outcomes.dtype == torch.float64
    assert TASK.score(outcomes)["exact_match"] == 0.5
    assert TASK.score(outcomes)["f1_micro"] == pytest.approx(2 * 2 / 5)
    assert TASK.score(outcomes)["f1_macro"] == pytest.approx(2 / 3)


_SETS = st.lists(st.integers(0, 1), min_size=3, max_size=3)


@given(st.lists(st.tuples(_SETS, _SETS), min_size=1, max_size=20))
def test_scores_against_scikit_learn(pairs: list[tuple[list[int], list[int]]]) -> None:
    told, true = (torch.tensor(side) for side in zip(*pairs, strict=True))
    scores = TASK.score(TASK.outcomes(2.0 * told - 1.0, batch_of(true.tolist())))
    occur = [c for c in range(3) if told[:, c].any() or true[:, c].any()]

    def f1(average: str) -> float:
        found = sklearn_metrics.f1_score(
            true.numpy()[:, occur], told.numpy()[:, occur], average=average, zero_division=0
        )
        return float(found)

    assert scores["exact_match"] == pytest.approx(sklearn_metrics.accuracy_score(true.numpy(), told.numpy()))
    assert scores["f1_micro"] == pytest.approx(f1("micro") if occur else 0.0)
    assert scores["f1_macro"] == pytest.approx(f1("macro") if occur else 0.0)
    assert tuple(scores) == TASK.metrics


def test_batches_score_as_the_whole_and_what_is_not_finite_as_nan() -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    labels = [[1, 0, 1], [0, 0, 0], [1, 1, 1]] * 3
    whole = TASK.outcomes(logits, batch_of(labels))
    parts = [TASK.outcomes(logits[at : at + 4], batch_of(labels[at : at + 4])) for at in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts), whole)
    logits[3, 1] = math.nan
    assert all(map(math.isnan, TASK.score(TASK.outcomes(logits, batch_of(labels))).values()))


def test_collating_one_without_classes() -> None:
    assert TASK.collate([Example([5], ())], 0).labels.tolist() == [[0, 0, 0]]
