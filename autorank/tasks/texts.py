"""A text, or a pair of texts, as what a model reads: shared by the tasks that judge texts whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autorank.data import DataSet, Row
from autorank.tasks.task import (
    Batch,
    Encoded,
    Example,
    Tokenizer,
    check_text,
    pad_rows,
    require_columns,
    require_room,
)

__all__ = ["check_texts", "collate_texts", "encode_texts", "text_columns"]


def text_columns(data: DataSet) -> tuple[str, ...]:
    """`text` where the data have it, else `text_a` and `text_b` where they have one of these."""
    pair = "text" not in data.columns and {"text_a", "text_b"} & set(data.columns)
    return ("text_a", "text_b") if pair else ("text",)


def check_texts(
    data: DataSet, columns: Sequence[str], target: str, task: str, check: Callable[[Row, Row, str], None]
) -> None:
    """Check every row of every split: its texts, and by `check` what is to be told of them.

    Args:
        data: the rows.
        columns: of the texts.
        target: the column of what is to be told.
        task: its name.
        check: given a row, the first row of its split and the row's place, refuses a bad target.

    Raises:
        DataError: a column is missing, or a field is empty, no text, or refused by `check`.
    """
    require_columns(data, (*columns, target), task)
    for split, rows in data.splits.items():
        for index, row in enumerate(rows):
            place = data.where(split, index)
            for column in columns:
                check_text(row.get(column), column, place)
            check(row, rows[0], place)


def encode_texts(
    rows: Sequence[Row],
    columns: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    label: Callable[[Row], Any],
) -> Encoded:
    """Tokenise each text, or both of a pair; of a long pair the longer text is cut first.

    Args:
        rows: checked ones.
        columns: one, or two for a pair.
        tokenizer: of the base model.
        max_length: most tokens of an example.
        label: gives an example's label from its row.
    """
    require_room(tokenizer, max_length, len(columns))
    tokens = _tokenize(rows, columns, tokenizer)
    too_long = [index for index, (ids, _) in enumerate(tokens) if len(ids) > max_length]
    if too_long:
        cut = _tokenize([rows[index] for index in too_long], columns, tokenizer, max_length)
        for index, pair in zip(too_long, cut, strict=True):
            tokens[index] = pair
    examples = tuple(
        Example(ids, label(row), types) for row, (ids, types) in zip(rows, tokens, strict=True) if ids
    )
    empty = len(rows) - len(examples)
    return Encoded(examples, len(examples), len(too_long), {"no tokens": empty} if empty else {})


def collate_texts(examples: Sequence[Example], pad_token_id: int, labels: torch.Tensor) -> Batch:
    """Pad on the right to the longest example; `labels` has a row for each."""
    rows = [example.input_ids for example in examples]
    inputs = {
        "input_ids": pad_rows(rows, pad_token_id),
        "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
    }
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    if types:
        inputs["token_type_ids"] = pad_rows(types, 0)
    return Batch(inputs, labels, len(examples))


def _tokenize(
    rows: Sequence[Row], columns: Sequence[str], tokenizer: Tokenizer, max_length: int | None = None
) -> list[tuple[list[int], list[int] | None]]:
    """Token ids and, where the tokenizer gives them, token types of each row."""
    if not rows:
        return []
    # `verbose=False`: a text over the model's limit is cut afterwards, no reason for a warning.
    encoded = tokenizer(
        *([row[column] for row in rows] for column in columns),
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        verbose=False,
    )
    types = encoded.get("token_type_ids") or [None] * len(rows)
    return list(zip(encoded["input_ids"], types, strict=True))
