"""The tasks there are, and the choice between them from a data set's columns.

A task says how rows become batches, and how logits become a loss and scores. It knows nothing of
models, adapters or the search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from autorank.data import DataSet
from autorank.errors import CommandError, DataError, ModelError
from autorank.figures import close_to
from autorank.rows import listed
from autorank.tasks.causal_lm import CausalLM
from autorank.tasks.classes import label_name
from autorank.tasks.hints import columns_example, unused_label
from autorank.tasks.image_classification import ImageClassification
from autorank.tasks.multi_label import MultiLabelClassification
from autorank.tasks.question_answering import QuestionAnswering
from autorank.tasks.regression import Regression
from autorank.tasks.seq2seq import Seq2Seq
from autorank.tasks.task import (
    Batch,
    Encoded,
    Example,
    HeadTask,
    Metric,
    ProbeKind,
    Task,
    Tokenizer,
    WindowTask,
    WritingTask,
)
from autorank.tasks.text_classification import TextClassification
from autorank.tasks.token_classification import TokenClassification

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Encoded",
    "Example",
    "HeadTask",
    "ImageClassification",
    "Metric",
    "MultiLabelClassification",
    "ProbeKind",
    "QuestionAnswering",
    "Regression",
    "Seq2Seq",
    "Task",
    "TextClassification",
    "TokenClassification",
    "Tokenizer",
    "WindowTask",
    "WritingTask",
    "choose_task",
    "encode_rows",
    "for_model",
    "for_rows",
]

_NEARLY_ALL = 0.9
_CLOSE = 1e-4  # float32 has seven digits: fewer than four are left for what differs

TASKS = (
    "text-classification",
    "multi-label-classification",
    "regression",
    "image-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "seq2seq",
)


def choose_task(
    name: str,
    data: DataSet,
    metric: str = "auto",
    *,
    encoder_decoder: bool = False,
    template: str | None = None,
    packing: bool | Literal["auto"] = False,
) -> tuple[Task, str]:
    """Make the task for a data set, and check every row of the data for it.

    Args:
        name: a task's name, or `auto` to tell from the columns.
        data: the rows; labels are those of its train split.
        metric: the name of one of the task's metrics, or `auto`.
        encoder_decoder: whether the base model is one, which decides who completes prompts.
        template: makes the prompts of a causal language model, columns of the data in braces.
        packing: join the plain texts of a corpus to sequences of the full length; `auto` leaves it to
            `for_rows`.

    Returns:
        The task, and one line that says what was chosen and why.

    Raises:
        DataError: columns, labels or a row do not fit the task, or it has no such metric.
        CommandError: there is no task of that name, it has no use for a template, or a package that
            computes the metric is missing.
    """
    if name not in ("auto", *TASKS):
        raise CommandError(
            f"task {name!r} is unknown; choose auto, {', '.join(TASKS[:-1])} or {TASKS[-1]}"
            f"{close_to(name, TASKS)}"
        )
    if template is not None and name == "auto":
        chosen, why = CausalLM.name, "as it has a template"
    else:
        chosen, why = _from_columns(data, encoder_decoder) if name == "auto" else (name, "as asked for")
    if template is not None and chosen != CausalLM.name:
        raise CommandError(
            f"a template makes prompts for the task {CausalLM.name}, not for {chosen}: leave one of them out"
        )
    task: Task
    if chosen == TextClassification.name:
        task = TextClassification.from_data(data, metric)
        detail = f"{len(task.labels or ())} classes{_imbalance(data, task.metric.name)}"
    elif chosen == MultiLabelClassification.name:
        task = MultiLabelClassification.from_data(data, metric)
        detail = f"any of {len(task.labels)} classes"
    elif chosen == ImageClassification.name:
        task = ImageClassification.from_data(data, metric)
        detail = f"{len(task.labels)} classes{_imbalance(data, task.metric.name)}"
    elif chosen == TokenClassification.name:
        task = TokenClassification.from_data(data, metric)
        detail = f"{len(task.labels)} tags"
    elif chosen == QuestionAnswering.name:
        task = QuestionAnswering.from_data(data, metric)
        detail = "answers in context" + (", or none" if task.abstains else "")
    elif chosen == Regression.name:
        task = Regression.from_data(data, metric)
        detail = f"numbers in {task.target}{_closeness(data, task)}"
    elif chosen == Seq2Seq.name:
        task = Seq2Seq.from_data(data, metric)
        detail = f"{task.columns[0]} to {task.columns[1]}"
    else:
        task = CausalLM.from_data(data, metric, template=template, packing=packing)
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


def for_rows(task: Task, encoded: Encoded) -> Task:
    """The task, with what was left to the rows decided as it was for those of the train split."""
    return task.settled(encoded) if isinstance(task, CausalLM) else task


def encode_rows(
    task: Task,
    data: DataSet,
    split: str,
    processor: Any,
    max_length: int,
    chosen: Sequence[int] | None = None,
) -> Encoded:
    """The examples of a split, or of the chosen rows of it; what is wrong with a row is told with its place.

    Raises:
        DataError: a row cannot be used with the processor.
        AutorankError: what else `Task.encode` raises.
    """
    rows = data.splits[split]
    places = range(len(rows)) if chosen is None else chosen
    try:
        return task.encode([rows[at] for at in places], processor, max_length)
    except DataError:
        for at in places:
            try:
                task.encode([rows[at]], processor, max_length)
            except DataError as error:
                raise DataError(f"{data.where(split, at)}: {error}") from error
        raise


def _from_labels(data: DataSet) -> str:
    """The task for the train split's labels: lists, numbers of which one at least is a float, or classes."""
    labels = [row.get("label") for row in data.train]
    if isinstance(labels[0], list):
        return MultiLabelClassification.name
    numbers = all(isinstance(label, (int, float)) and not isinstance(label, bool) for label in labels)
    if numbers and any(isinstance(label, float) for label in labels):
        return Regression.name
    return TextClassification.name


def _imbalance(data: DataSet, metric: str) -> str:
    """Where one class is nearly all of train and the metric hides that, which metrics would not."""
    label, count = Counter(label_name(row["label"]) for row in data.train).most_common(1)[0]
    share = count / len(data.train)
    if share <= _NEARLY_ALL or metric not in ("accuracy", "f1_micro"):
        return ""
    return f" ({share:.0%} of train is {label!r}: --metric f1_macro or mcc tells more)"


def _closeness(data: DataSet, task: Regression) -> str:
    """Where the numbers of train lie so close to one another that float32 hardly tells them apart."""
    largest = max(abs(float(row[task.target])) for row in data.train)
    if task.unit >= _CLOSE * largest:
        return ""
    spread = f"they spread over {task.unit / largest:.0e} of their size"
    return f" ({spread}, which float32 hardly tells apart: subtract what they have in common)"


def _from_columns(data: DataSet, encoder_decoder: bool) -> tuple[str, str]:
    """The task that the columns speak of."""
    columns = set(data.columns)
    if {"tokens", "tags"} <= columns:
        return TokenClassification.name, "columns tokens, tags"
    if {"question", "context", "answers"} <= columns:
        return QuestionAnswering.name, "columns question, context, answers"
    for texts in (("text",), ("text_a", "text_b")):
        if {*texts, "label"} <= columns:
            return _from_labels(data), f"columns {', '.join(texts)}, label"
        if {*texts, "score"} <= columns:
            return Regression.name, f"columns {', '.join(texts)}, score"
    if {"image", "label"} <= columns:
        return ImageClassification.name, "columns image, label"
    if "messages" in columns:
        return CausalLM.name, "column messages"
    if {"source", "target"} <= columns:
        return Seq2Seq.name, "columns source, target"
    if {"prompt", "completion"} <= columns and encoder_decoder:
        return Seq2Seq.name, "columns prompt, completion, and an encoder-decoder model"
    if {"prompt", "completion"} <= columns:
        return CausalLM.name, "columns prompt, completion"
    if {"instruction", "output"} <= columns:
        return CausalLM.name, "columns instruction, output"
    if "text" in columns:
        return CausalLM.name, f"column text, no label{unused_label(data)}"
    raise DataError(
        f"{data.source}: no task fits its columns ({listed(data.columns)}); rename them to text, label or "
        "text_a, text_b, label to classify, with score in place of label to predict numbers, to tokens, tags "
        "to tag words, to image, label for images, to question, context, answers to find answers, to prompt, "
        "completion to generate, to source, target for an encoder-decoder, or to text for a plain corpus; or "
        f"say which is which, such as {columns_example(data)}"
    )
