"""Text classification: one text, or a pair of texts, and the name of its class.

Class names and their order come from the train split. Nothing here knows the head or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from autorank.data import DataSet, Row
from autorank.errors import DataError
from autorank.tasks.task import (
    Batch,
    Direction,
    Encoded,
    Example,
    Metric,
    Tokenizer,
    check_text,
    choose_metric,
    pad_rows,
    require_columns,
    require_room,
)

__all__ = ["TextClassification"]

_DIRECTIONS: dict[str, Direction] = {"accuracy": "maximize", "f1_macro": "maximize", "loss": "minimize"}


@dataclass(frozen=True)
class TextClassification:
    """Tell the class of a text (column `text`) or of a pair (`text_a`, `text_b`)."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: Metric

    name: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[str, ...]] = tuple(_DIRECTIONS)
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    smooths: ClassVar[bool] = True

    @classmethod
    def from_data(cls, data: DataSet, metric: str = "auto") -> TextClassification:
        """The task with the labels of the train split, after a check of every row of every split.

        Integer labels are ordered by value, names by alphabet.

        Raises:
            DataError: a column is missing, a text is no text, labels are floats or of mixed types,
                train has fewer than two classes, or another split has a class that train has not.
        """
        pair = "text" not in data.columns and {"text_a", "text_b"} & set(data.columns)
        columns = ("text_a", "text_b") if pair else ("text",)
        require_columns(data, (*columns, "label"), cls.name)
        for split, rows in data.splits.items():
            for index, row in enumerate(rows):
                for column in columns:
                    check_text(row.get(column), column, data.where(split, index))
                _check_label(row.get("label"), rows[0].get("label"), data.where(split, index))
        labels = tuple(_label_name(value) for value in sorted({row["label"] for row in data.train}))
        if len(labels) < 2:
            raise DataError(
                f"{data.source}: every train row has the label {labels[0]!r}; "
                "a classifier needs at least two classes"
            )
        _check_seen(data, labels)
        return cls(columns, labels, choose_metric(metric, _DIRECTIONS, cls.name))

    @property
    def outputs(self) -> int:
        """One output of the head a class."""
        return len(self.labels)

    def model_kwargs(self) -> dict[str, Any]:
        """The number and the names of the classes, as a model's configuration holds them."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each text, or both of a pair; of a long pair the longer text is cut first."""
        require_room(tokenizer, max_length, len(self.columns))
        index_of = {label: index for index, label in enumerate(self.labels)}
        tokens = _tokenize(rows, self.columns, tokenizer)
        too_long = [index for index, (ids, _) in enumerate(tokens) if len(ids) > max_length]
        if too_long:
            cut = _tokenize([rows[index] for index in too_long], self.columns, tokenizer, max_length)
            for index, pair in zip(too_long, cut, strict=True):
                tokens[index] = pair
        examples = tuple(
            Example(ids, index_of[_label_name(row["label"])], types)
            for row, (ids, types) in zip(rows, tokens, strict=True)
            if ids
        )
        empty = len(rows) - len(examples)
        return Encoded(examples, len(examples), len(too_long), {"no tokens": empty} if empty else {})

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels have shape (samples,)."""
        rows = [example.input_ids for example in examples]
        inputs = {
            "input_ids": pad_rows(rows, pad_token_id),
            "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
        }
        types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
        if types:
            inputs["token_type_ids"] = pad_rows(types, 0)
        labels = torch.tensor([example.labels for example in examples], dtype=torch.int64)
        return Batch(inputs, labels, len(examples))

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy over the samples, in float32; `logits` has shape (samples, classes)."""
        return functional.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)

    def terms(self, batch: Batch) -> int:
        """The number of samples."""
        return batch.samples

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample: (predicted class, class, cross-entropy), float64 on the CPU."""
        logits, labels = logits.detach().float().cpu(), batch.labels.cpu()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return torch.stack([logits.argmax(dim=-1).double(), labels.double(), losses.double()], dim=1)

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """Accuracy, macro F1 over the classes that occur, and the mean cross-entropy in nats."""
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, float("nan"))
        predicted, actual = outcomes[:, 0].long(), outcomes[:, 1].long()
        count = len(self.labels)
        hits = torch.bincount(actual[predicted == actual], minlength=count).double()
        met = (torch.bincount(actual, minlength=count) + torch.bincount(predicted, minlength=count)).double()
        return {
            "accuracy": (predicted == actual).double().mean().item(),
            "f1_macro": (2 * hits[met > 0] / met[met > 0]).mean().item(),
            "loss": outcomes[:, 2].mean().item(),
        }

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text and the name of the class."""
        assert isinstance(example.labels, int)
        return f"{tokenizer.decode(example.input_ids)} -> {self.labels[example.labels]}"


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


def _label_name(value: object) -> str:
    """The name of a class: the string itself, an integer's digits, `true` or `false`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_label(value: object, first: object, place: str) -> None:
    """Refuse what is no class, and a label of another type than the split's first."""
    if value is None:
        raise DataError(f"{place}: field 'label' is missing; give each row a class name or an integer")
    if isinstance(value, float):
        raise DataError(
            f"{place}: label {value!r} is a float; classes are names or integers "
            "(scores to be predicted as numbers are not supported)"
        )
    if not isinstance(value, (str, int)):
        raise DataError(f"{place}: label is {type(value).__name__}; it must be a class name or an integer")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{place}: field 'label' is empty; give each row a class name or an integer")
    if type(value) is not type(first):
        raise DataError(
            f"{place}: label {value!r} is {type(value).__name__}, the first label is {type(first).__name__} "
            f"{first!r}; write all labels as names or all as integers"
        )


def _check_seen(data: DataSet, labels: Sequence[str]) -> None:
    """Refuse a class in validation or test that no train row has."""
    known = set(labels)
    for split, rows in data.splits.items():
        for index, row in enumerate(rows):
            if _label_name(row["label"]) not in known:
                shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
                raise DataError(
                    f"{data.where(split, index)}: label {row['label']!r} does not occur in train "
                    f"({len(labels)} classes: {shown}); correct the label, or add rows of it to train"
                )
