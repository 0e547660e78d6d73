"""The tasks there are, and the choice between them from a data set's columns.

A task says how rows become batches, and how logits become a loss and scores. It knows nothing of
models, adapters or the search.
"""

from __future__ import annotations

from autorank.data import DataSet
from autorank.errors import CommandError, DataError
from autorank.rows import listed
from autorank.tasks.causal_lm import CausalLM
from autorank.tasks.hints import columns_example, unused_label
from autorank.tasks.task import Batch, Encoded, Example, Metric, Task, Tokenizer
from autorank.tasks.text_classification import TextClassification

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Encoded",
    "Example",
    "Metric",
    "Task",
    "TextClassification",
    "Tokenizer",
    "choose_task",
]

TASKS = ("text-classification", "causal-lm")


def choose_task(name: str, data: DataSet, metric: str = "auto") -> tuple[Task, str]:
    """Make the task for a data set, and check every row of the data for it.

    Args:
        name: a task's name, or `auto` to tell from the columns.
        data: the rows; labels are those of its train split.
        metric: the name of one of the task's metrics, or `auto`.

    Returns:
        The task, and one line that says what was chosen and why.

    Raises:
        DataError: columns, labels or a row do not fit the task, or it has no such metric.
        CommandError: there is no task of that name.
    """
    if name not in ("auto", *TASKS):
        raise CommandError(f"task {name!r} is unknown; choose auto, {' or '.join(TASKS)}")
    chosen, why = _from_columns(data) if name == "auto" else (name, "as asked for")
    task: Task
    if chosen == TextClassification.name:
        task = TextClassification.from_data(data, metric)
        detail = f"{len(task.labels or ())} classes"
    else:
        task = CausalLM.from_data(data, metric)
        detail = f"trained on {task.trained}"
    better = "higher" if task.metric.direction == "maximize" else "lower"
    return task, f"task {chosen} ({why}): {detail}, metric {task.metric.name}, {better} is better"


def _from_columns(data: DataSet) -> tuple[str, str]:
    """The task that the columns speak of."""
    columns = set(data.columns)
    if {"text", "label"} <= columns:
        return TextClassification.name, "columns text, label"
    if {"text_a", "text_b", "label"} <= columns:
        return TextClassification.name, "columns text_a, text_b, label"
    if {"prompt", "completion"} <= columns:
        return CausalLM.name, "columns prompt, completion"
    if "text" in columns:
        return CausalLM.name, f"column text, no label{unused_label(data)}"
    raise DataError(
        f"{data.source}: no task fits its columns ({listed(data.columns)}); rename them to text, label or "
        "text_a, text_b, label to classify, to prompt, completion to generate, or to text for a plain corpus"
        f"; or say which is which, such as {columns_example(data)}"
    )
