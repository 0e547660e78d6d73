"""The task of an exported adapter, made again for other rows: to score them, or to answer them."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from autorank.data import DataSet
from autorank.errors import DataError, FileError
from autorank.rows import Row, listed
from autorank.tasks.causal_lm import CausalLM
from autorank.tasks.image_classification import ImageClassification
from autorank.tasks.instructions import ANSWERS, template_fields
from autorank.tasks.multi_label import MultiLabelClassification
from autorank.tasks.question_answering import QuestionAnswering
from autorank.tasks.regression import Regression
from autorank.tasks.seq2seq import Seq2Seq
from autorank.tasks.task import Task
from autorank.tasks.text_classification import TextClassification
from autorank.tasks.token_classification import TokenClassification

__all__ = ["blank_answer", "check_columns", "restore_task"]

_BLANK = "?"
_CLASSES = (
    TextClassification.name,
    MultiLabelClassification.name,
    ImageClassification.name,
    TokenClassification.name,
)
_Columns = dict[tuple[str, ...], tuple[str, ...]]
_TEXTS: _Columns = {("text",): ("label",), ("text_a", "text_b"): ("label",)}
# What the model is given, one of these sets of columns, and where the answer to it stands.
_COLUMNS: dict[str, _Columns] = {
    TextClassification.name: _TEXTS,
    MultiLabelClassification.name: _TEXTS,
    Regression.name: dict.fromkeys(_TEXTS, ("score", "label")),
    ImageClassification.name: {("image",): ("label",)},
    TokenClassification.name: {("tokens",): ("tags",)},
    QuestionAnswering.name: {("question", "context"): ("answers",)},
    Seq2Seq.name: {("source",): ("target",), ("prompt",): ("completion",)},
    CausalLM.name: {
        ("prompt",): ("completion",),
        ("instruction",): ("output",),
        ("messages",): (),
        ("conversations",): (),
        ("text",): (),
    },
}


def check_columns(
    facts: Mapping[str, Any],
    source: str,
    found: Collection[str],
    *,
    answers: bool,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Refuse rows without what the model is given or, where they are to be scored, without answers.

    Args:
        facts: what `autorank_export.json` tells.
        source: of the rows, for messages.
        found: their columns, by their roles.
        answers: whether there must be some.
        columns: role -> column, as the rows were read.

    Raises:
        DataError: a column is missing; the message says how to name it.
    """
    known = _COLUMNS.get(facts["task"], {})
    if facts.get("template") is not None:
        known = {template_fields(str(facts["template"])): ANSWERS}
    trained = (facts.get("usage") or {}).get("columns") or ()
    # What it was trained on is told first.
    ordered = sorted(known, key=lambda one: not set(one) <= set(trained))
    given = next((one for one in ordered if set(one) <= set(found)), None)
    mapped = {role: column for role, column in (columns or {}).items() if role in found}
    own = listed(mapped.get(column, column) for column in found)
    if given is None and known:
        first = ordered[0]
        wanted = [", ".join(one) for one in ordered]
        wanted[0] += " (as in training)" if set(first) <= set(trained) and len(wanted) > 1 else ""
        missing = next(column for column in first if column not in found)
        raise DataError(
            f"{source}: the adapter reads {' or '.join(wanted)}; found {own}: say which column it is, "
            f"such as {_flag(mapped, missing)}"
        )
    wanted_answers = known.get(given or (), ())
    if answers and wanted_answers and not set(wanted_answers) & set(found):
        raise DataError(
            f"{source}: no answers to score against: there is no column {' or '.join(wanted_answers)}, only "
            f"{own}; say which column holds them, such as {_flag(mapped, wanted_answers[0])}, or let "
            "`autorank predict` answer the rows"
        )


def _flag(mapped: Mapping[str, str], role: str) -> str:
    """The `--columns` that names one column more."""
    pairs = [f"{name}={column}" for name, column in mapped.items()]
    return f"--columns {shlex.quote(','.join([*pairs, f'{role}=COLUMN']))}"


def restore_task(facts: Mapping[str, Any], data: DataSet, metric: str = "auto") -> Task:
    """The task that an export was made for, after a check of every row for it.

    Args:
        facts: what `autorank_export.json` tells: `task`, and where there are classes `id2label`.
        data: the rows, with answers.
        metric: the one that it is scored by first.

    Raises:
        CommandError: the metric cannot be used.
        DataError: columns, labels or a row do not fit the task.
        FileError: the export is of a task that is not known here, or tells no classes where there are some.
    """
    name, labels = facts["task"], _labels(facts)
    if name == TextClassification.name:
        return TextClassification.from_data(data, metric, labels=labels)
    if name == ImageClassification.name:
        return ImageClassification.from_data(data, metric, labels=labels)
    if name == MultiLabelClassification.name:
        return MultiLabelClassification.from_data(data, metric, labels=labels)
    if name == TokenClassification.name:
        return TokenClassification.from_data(data, metric, labels=labels)
    if name == QuestionAnswering.name:
        return QuestionAnswering.from_data(data, metric, abstains=bool(facts.get("abstains", True)))
    if name == Regression.name:
        return Regression.from_data(data, metric)
    if name == Seq2Seq.name:
        return Seq2Seq.from_data(data, metric)
    if name == CausalLM.name:
        template, packing = facts.get("template"), bool(facts.get("packing"))
        return CausalLM.from_data(data, metric, template=template, packing=packing)
    raise FileError(f"the export is of a task {name!r}, which this version does not know: update autorank")


def blank_answer(facts: Mapping[str, Any], row: Row) -> Row:
    """The row with something in the place of its answer, which the model never sees.

    Whatever stands there, an answer, a blank or what the task does not know, has no part in what the
    model says, nor in how much of the row it is given.
    """
    name, labels = facts["task"], _labels(facts)
    row = {column: value for column, value in row.items() if value is not None}  # tables have all in each
    if name in (TextClassification.name, ImageClassification.name):
        return {**row, "label": labels[0]}
    if name == MultiLabelClassification.name:
        return {**row, "label": []}
    if name == Regression.name:
        return {**row, "score": 0.0}
    if name == TokenClassification.name:
        words = row.get("tokens")
        return {**row, "tags": [labels[0]] * (len(words) if isinstance(words, list) else 0)}
    if name == QuestionAnswering.name:
        return {**row, "answers": []}
    if name == Seq2Seq.name:
        return {**row, "target" if "source" in row else "completion": _BLANK}
    if facts.get("template") is not None:
        asked = template_fields(str(facts["template"]))
        return {**row, next(answer for answer in ANSWERS if answer not in asked): _BLANK}
    if "messages" in row or "conversations" in row:
        return _answered(row)
    answers = {"prompt": "completion", "instruction": "output"}
    given = next((column for column in answers if column in row), None)
    return row if given is None else {**row, answers[given]: _BLANK}


def _labels(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in their order; none where the task has none.

    Raises:
        FileError: the task has some, and the export does not tell them.
    """
    names = facts.get("id2label") or {}
    if not names and facts["task"] in _CLASSES:
        raise FileError(f"the export does not tell the classes of its task {facts['task']}: export it again")
    return tuple(str(names[str(index)]) for index in range(len(names)))


def _answered(row: Row) -> Row:
    """A chat with something in the place of the last turn, where that is the assistant's, or behind it."""
    column = "messages" if "messages" in row else "conversations"
    turns = row[column]
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return row  # which is refused where the turns are read
    last = turns[-1]
    role, words, mine = ("from", "value", "gpt") if "from" in last else ("role", "content", "assistant")
    asked = turns[:-1] if last.get(role) in (mine, "assistant") else turns
    return {**row, column: [*asked, {role: mine, words: _BLANK}]}
