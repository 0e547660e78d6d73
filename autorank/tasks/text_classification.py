"""Text classification: one text, or a pair of texts, and the name of its class.

Class names and their order come from the train split. Nothing here knows the head or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from autorank.data import DataSet, Row
from autorank.errors import DataError
from autorank.tasks.classes import OneClass, check_class, class_names, label_name
from autorank.tasks.task import Batch, Encoded, Example, Metric, Tokenizer, choose_metric
from autorank.tasks.texts import check_texts, collate_texts, encode_texts, text_columns

__all__ = ["TextClassification"]


@dataclass(frozen=True)
class TextClassification(OneClass):
    """Tell the class of a text (column `text`) or of a pair (`text_a`, `text_b`)."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: Metric

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"

    @classmethod
    def from_data(
        cls, data: DataSet, metric: str = "auto", *, labels: Sequence[str] | None = None
    ) -> TextClassification:
        """The task with the labels of the train split, after a check of every row of every split.

        Integer labels are ordered by value, names by alphabet.

        Args:
            data: the rows.
            metric: the name of one of the task's metrics, or `auto`.
            labels: the classes that a trained model knows, in its order; None for those of the train split.

        Raises:
            DataError: a column is missing, a text is no text, labels are floats or of mixed types,
                train has fewer than two classes, or another split has a class that train has not.
        """
        columns = text_columns(data)
        check_texts(data, columns, "label", cls.name, _check_label)
        return cls(columns, class_names(data, labels), choose_metric(metric, cls.directions, cls.name))

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each text, or both of a pair; of a long pair the longer text is cut first."""
        index_of = {label: index for index, label in enumerate(self.labels)}
        return encode_texts(
            rows, self.columns, tokenizer, max_length, lambda row: index_of[label_name(row["label"])]
        )

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels have shape (samples,)."""
        labels = torch.tensor([example.labels for example in examples], dtype=torch.int64)
        return collate_texts(examples, pad_token_id, labels)

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text and the name of the class."""
        assert isinstance(example.labels, int)
        return f"{tokenizer.decode(example.input_ids)} -> {self.labels[example.labels]}"


def _check_label(row: Row, first: Row, place: str) -> None:
    """Refuse what is no class; numbers and lists are for other tasks."""
    label = row.get("label")
    if isinstance(label, float):
        raise DataError(
            f"{place}: label {label!r} is a float; classes are names or integers "
            "(--task regression predicts numbers)"
        )
    if isinstance(label, list):
        raise DataError(
            f"{place}: label is list; it must be a class name or an integer "
            "(--task multi-label-classification takes lists)"
        )
    check_class(label, first.get("label"), place)
