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
from autorank.tasks.classes import check_class, check_seen, class_scores, label_name
from autorank.tasks.task import (
    Batch,
    Direction,
    Encoded,
    Example,
    Metric,
    ProbeKind,
    Tokenizer,
    choose_metric,
)
from autorank.tasks.texts import check_texts, collate_texts, encode_texts, text_columns

__all__ = ["TextClassification"]

_DIRECTIONS: dict[str, Direction] = {
    "accuracy": "maximize",
    "f1_macro": "maximize",
    "f1_micro": "maximize",
    "mcc": "maximize",
    "loss": "minimize",
}


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
    probe: ClassVar[ProbeKind] = "multinomial"

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
        if labels is None:
            labels = [label_name(value) for value in sorted({row["label"] for row in data.train})]
        if len(labels) < 2:
            raise DataError(
                f"{data.source}: every train row has the label {labels[0]!r}; "
                "a classifier needs at least two classes"
            )
        check_seen(data, labels, lambda row: [row["label"]])
        return cls(columns, tuple(labels), choose_metric(metric, _DIRECTIONS, cls.name))

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
        index_of = {label: index for index, label in enumerate(self.labels)}
        return encode_texts(
            rows, self.columns, tokenizer, max_length, lambda row: index_of[label_name(row["label"])]
        )

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels have shape (samples,)."""
        labels = torch.tensor([example.labels for example in examples], dtype=torch.int64)
        return collate_texts(examples, pad_token_id, labels)

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
        """Accuracy, F1, Matthews' correlation and the mean cross-entropy in nats; see `class_scores`."""
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, float("nan"))
        scores = class_scores(outcomes[:, 0].long(), outcomes[:, 1].long(), len(self.labels))
        return {**scores, "loss": outcomes[:, 2].mean().item()}

    def predictions(self, logits: torch.Tensor, batch: Batch) -> list[Any]:
        """The name of each sample's most probable class."""
        return [self.labels[index] for index in logits.argmax(dim=-1).tolist()]

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
