"""The choice of a task from a data set's columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autorank.data import DataSet, build_data
from autorank.errors import CommandError, DataError
from autorank.tasks import (
    TASKS,
    CausalLM,
    Metric,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    Seq2Seq,
    TextClassification,
    TokenClassification,
    choose_task,
)


def data(*rows: dict[str, Any]) -> DataSet:
    return build_data("things", {"train": rows, "validation": rows[:1]})


LABELLED = data({"text": "a", "label": "x"}, {"text": "b", "label": "y"})
PAIRS = data({"text_a": "a", "text_b": "b", "label": 0}, {"text_a": "c", "text_b": "d", "label": 1})
PROMPTED = data({"prompt": "a", "completion": "b"})
SIDES = data({"source": "a", "target": "b"})
CORPUS = data({"text": "a b"})
ASKED = data({"question": "a", "context": "b c", "answers": "c"})


LISTS = data({"text": "a", "label": ["x"]}, {"text": "b", "label": []})
NUMBERS = data({"text": "a", "score": 1}, {"text": "b", "score": 2})
TAGGED = data({"tokens": ["a", "b"], "tags": ["B-X", "O"]})


CHOICES = [
    (LABELLED, TextClassification, "text, label", "2 classes, metric accuracy, higher is better"),
    (PAIRS, TextClassification, "text_a, text_b, label", "2 classes, metric accuracy, higher is better"),
    (PROMPTED, CausalLM, "prompt, completion", "trained on completions only, metric loss, lower is better"),
    (SIDES, Seq2Seq, "source, target", "source to target, metric loss, lower is better"),
    (LISTS, MultiLabelClassification, "text, label", "any of 1 classes, metric f1_micro, higher is better"),
    (NUMBERS, Regression, "text, score", "numbers in score, metric pearson, higher is better"),
    (TAGGED, TokenClassification, "tokens, tags", "2 tags, metric span_f1, higher is better"),
    (
        ASKED,
        QuestionAnswering,
        "question, context, answers",
        "answers in context, metric f1, higher is better",
    ),
    (CORPUS, CausalLM, "text", "trained on all of the text, metric loss, lower is better"),
]


@pytest.mark.parametrize(("rows", "kind", "columns", "told"), CHOICES)
def test_auto_tells_from_the_columns(rows: DataSet, kind: type, columns: str, told: str) -> None:
    task, line = choose_task("auto", rows, "auto")
    assert isinstance(task, kind)
    assert ", ".join(task.columns) == columns.removesuffix(", label").removesuffix(", score")  # type: ignore[attr-defined]
    assert line.startswith(f"task {task.name} (column")
    assert columns in line
    assert line.endswith(f"): {told}")
    assert task.name in TASKS


@pytest.mark.parametrize(
    ("rare", "metric", "told"), [(9, "auto", True), (9, "mcc", False), (10, "auto", False)]
)
def test_a_class_that_is_nearly_all_is_said_where_the_metric_hides_it(
    rare: int, metric: str, told: bool
) -> None:
    rows = [{"text": f"t{i}", "label": "rare" if i < rare else "ham"} for i in range(100)]
    _, line = choose_task("auto", data(*rows), metric)
    said = "2 classes (91% of train is 'ham': --metric f1_macro or mcc tells more), metric accuracy"
    assert (said in line) == told and ("of train is" in line) == told


def test_a_misspelt_name_is_told_the_one_that_was_meant() -> None:
    rows = data({"text": "a", "label": "x"}, {"text": "b", "label": "y"})
    with pytest.raises(CommandError, match=r"is unknown; choose .*; do you mean text-classification\?"):
        choose_task("text-clasification", rows)
    with pytest.raises(DataError, match=r"gives accuracy, .*; do you mean accuracy\?"):
        choose_task("auto", rows, "acuracy")
    with pytest.raises(DataError, match=r"as module:function$"):
        choose_task("auto", rows, "bleu")


def test_a_named_task_is_taken() -> None:
    task, told = choose_task("causal-lm", LABELLED, "perplexity")
    assert isinstance(task, CausalLM)
    assert task.columns == ("text",)
    assert task.metric == Metric("perplexity", "minimize")
    assert told.startswith("task causal-lm (as asked for)")


def test_prompts_come_before_a_text_beside_them() -> None:
    task, _ = choose_task("auto", data({"prompt": "a", "completion": "b", "text": "ab"}))
    assert isinstance(task, CausalLM)
    assert task.columns == ("prompt", "completion")


def test_an_encoder_decoder_completes_prompts_itself() -> None:
    task, told = choose_task("auto", PROMPTED, "chrf", encoder_decoder=True)
    assert isinstance(task, Seq2Seq) and task.columns == ("prompt", "completion")
    assert told == (
        "task seq2seq (columns prompt, completion, and an encoder-decoder model): prompt to completion, "
        "metric chrf, higher is better"
    )
    for rows, kind in ((CORPUS, CausalLM), (LABELLED, TextClassification)):
        assert isinstance(choose_task("auto", rows, encoder_decoder=True)[0], kind)
    assert isinstance(choose_task("causal-lm", PROMPTED, encoder_decoder=True)[0], CausalLM)
    assert isinstance(choose_task("seq2seq", PROMPTED)[0], Seq2Seq)


def test_columns_of_no_task_are_listed() -> None:
    with pytest.raises(DataError, match=r"things: no task fits its columns \(sentence, label\); rename them"):
        choose_task("auto", data({"sentence": "a", "label": 1}))


def test_an_unknown_task_is_a_command_error() -> None:
    with pytest.raises(
        CommandError, match=r"choose auto, text-class.*, question-answering, causal-lm or seq2seq"
    ):
        choose_task("ranking", LABELLED)


@pytest.mark.parametrize(
    ("rows", "metric", "there_are"),
    [
        (LABELLED, "perplexity", "accuracy, f1_macro, f1_micro, mcc, loss"),
        (CORPUS, "rouge_l", "loss, perplexity, token_accuracy"),
        (PROMPTED, "accuracy", "loss, perplexity, token_accuracy, exact_match, rouge_l, chrf"),
        (SIDES, "accuracy", "loss, perplexity, token_accuracy, exact_match, rouge_l, chrf"),
    ],
)
def test_an_unknown_metric_names_those_there_are(rows: DataSet, metric: str, there_are: str) -> None:
    with pytest.raises(DataError, match=f"metric '{metric}': the task .* gives {there_are}; choose one"):
        choose_task("auto", rows, metric)


@pytest.mark.parametrize("rows", [LABELLED, PAIRS, LISTS, NUMBERS, TAGGED, PROMPTED, SIDES, CORPUS])
def test_score_gives_the_metrics_that_are_promised(rows: DataSet) -> None:
    task, _ = choose_task("auto", rows)
    columns = {id(LISTS): 5, id(NUMBERS): 2, id(TAGGED): 12}.get(id(rows), 3)
    assert tuple(task.score(torch.ones(2, columns, dtype=torch.float64))) == task.metrics
    assert task.metric.name in task.metrics
