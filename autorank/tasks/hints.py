"""Hints for data whose columns have other names: what `--columns` could say of them.

A guess from the train rows, for people to correct; nothing is decided by it.
"""

from __future__ import annotations

import shlex

from autorank.data import DataSet

__all__ = ["columns_example", "unused_label"]

_MOST_CLASSES = 200
_LONGEST_NAME = 60
_ROWS_SEEN = 100


def unused_label(data: DataSet) -> str:
    """What to add to the choice of a plain corpus whose rows seem to have classes; else nothing."""
    labels = [column for column in _nameable(data) if column != "text" and _is_label(data, column)]
    if not labels:
        return ""
    return f"; column {labels[0]} is not used: {_flag({'label': labels[0]})} would classify"


def columns_example(data: DataSet) -> str:
    """A `--columns` made of the columns there are: to classify where one seems to hold classes."""
    columns = _nameable(data)
    labels = [column for column in columns if column == "label" or _is_label(data, column)]
    others = [column for column in columns if column not in labels]
    texts = [column for column in others if _is_text(data, column)] or others[:1]
    if labels and texts:
        label = "label" if "label" in labels else labels[0]
        said = {"text_a": texts[0], "text_b": texts[1]} if len(texts) == 2 else {"text": texts[0]}
        said["label"] = label
    elif len(texts) > 1:
        said = {"prompt": texts[0], "completion": texts[1]}
    else:
        said = {"text": texts[0] if texts else "COLUMN"}
    return _flag({role: column for role, column in said.items() if role != column} or {"text": "COLUMN"})


def _flag(columns: dict[str, str]) -> str:
    return f"--columns {shlex.quote(','.join(f'{role}={column}' for role, column in columns.items()))}"


def _nameable(data: DataSet) -> list[str]:
    """The columns that the flag can name."""
    return [
        column
        for column in data.columns
        if column and column.isprintable() and column.strip() == column and "," not in column
    ]


def _is_text(data: DataSet, column: str) -> bool:
    """Whether the first rows hold texts of several words."""
    values = [row.get(column) for row in data.train[:_ROWS_SEEN]]
    texts = [value for value in values if isinstance(value, str)]
    return len(texts) == len(values) and any(len(text.split()) > 1 for text in texts)


def _is_label(data: DataSet, column: str) -> bool:
    """Whether a column holds few short names or integers, each of them in two rows on average."""
    values = [row.get(column) for row in data.train]
    kinds = {type(value) for value in values}
    if kinds not in ({str}, {int}, {bool}):
        return False
    if any(isinstance(value, str) and not 0 < len(value.strip()) <= _LONGEST_NAME for value in values):
        return False
    return 2 <= len(set(values)) <= min(_MOST_CLASSES, len(values) // 2)
