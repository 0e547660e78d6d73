"""The tasks there are, and the choice between them from a data set's columns.

A task says how rows become batches, and how logits become a loss and scores. It knows nothing of
models, adapters or the search.
"""

from __future__ import annotations

from autorank.data import DataSet
from autorank.errors import CommandError, DataError, ModelError
from autorank.tasks.causal_lm import CausalLM
from autorank.tasks.seq2seq import Seq2Seq
from autorank.tasks.task import Batch, Encoded, Example, Metric, Task, Tokenizer, WritingTask
from autorank.tasks.text_classification import TextClassification

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Encoded",
    "Example",
    "Metric",
    "Seq2Seq",
    "Task",
    "TextClassification",
    "Tokenizer",
    "WritingTask",
    "choose_task",
    "for_model",
]

TASKS = ("text-classification", "causal-lm", "seq2seq")


def choose_task(
    name: str, data: DataSet, metric: str = "auto", *, encoder_decoder: bool = False
) -> tuple[Task, str]:
    """Make the task for a data set, and check every row of the data for it.

    Args:
        name: a task's name, or `auto` to tell from the columns.
        data: the rows; labels are those of its train split.
        metric: the name of one of the task's metrics, or `auto`.
        encoder_decoder: whether the base model is one, which decides who completes prompts.

    Returns:
        The task, and one line that says what was chosen and why.

    Raises:
        DataError: columns, labels or a row do not fit the task, or it has no such metric.
        CommandError: there is no task of that name, or a package that computes the metric is missing.
    """
    if name not in ("auto", *TASKS):
        raise CommandError(f"task {name!r} is unknown; choose auto, {', '.join(TASKS[:-1])} or {TASKS[-1]}")
    chosen, why = _from_columns(data, encoder_decoder) if name == "auto" else (name, "as asked for")
    task: Task
    if chosen == TextClassification.name:
        task = TextClassification.from_data(data, metric)
        detail = f"{len(task.labels or ())} classes"
    elif chosen == Seq2Seq.name:
        task = Seq2Seq.from_data(data, metric)
        detail = f"{task.columns[0]} to {task.columns[1]}"
    else:
        task = CausalLM.from_data(data, metric)
        detail = f"trained on {task.trained}"
    better = "higher" if task.metric.direction == "maximize" else "lower"
    return task, f"task {chosen} ({why}): {detail}, metric {task.metric.name}, {better} is better"


def for_model(task: Task, decoder_start: int | None) -> Task:
    """The task, told what the base model's decoder starts with, if it is of use to it.

    Raises:
        ModelError: the task needs it, and the model does not say.
    """
    if not isinstance(task, Seq2Seq):
        return task
    if decoder_start is None:
        raise ModelError(
            "the base model does not say what its decoder starts with: set decoder_start_token_id in its "
            "config.json"
        )
    return task.starting_with(decoder_start)


def _from_columns(data: DataSet, encoder_decoder: bool) -> tuple[str, str]:
    """The task that the columns speak of."""
    columns = set(data.columns)
    if {"text", "label"} <= columns:
        return TextClassification.name, "columns text, label"
    if {"text_a", "text_b", "label"} <= columns:
        return TextClassification.name, "columns text_a, text_b, label"
    if {"source", "target"} <= columns:
        return Seq2Seq.name, "columns source, target"
    if {"prompt", "completion"} <= columns and encoder_decoder:
        return Seq2Seq.name, "columns prompt, completion, and an encoder-decoder model"
    if {"prompt", "completion"} <= columns:
        return CausalLM.name, "columns prompt, completion"
    if "text" in columns:
        return CausalLM.name, "column text, no label"
    raise DataError(
        f"{data.source}: no task fits its columns ({', '.join(data.columns)}); rename them to text, label or "
        "text_a, text_b, label to classify, to prompt, completion to generate, to source, target for an "
        "encoder-decoder, or to text for a plain corpus"
    )
