"""Multi-label classification: one text, or a pair of texts, and the names of any number of classes.

Each class is told by itself: its output is the logit of its probability, and it is predicted from one
half on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from autorank.data import DataSet, Row
from autorank.errors import DataError
from autorank.tasks.classes import check_class, check_seen, f1, f1_macro, label_name
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

__all__ = ["MultiLabelClassification"]

_DIRECTIONS: dict[str, Direction] = {
    "f1_micro": "maximize",
    "f1_macro": "maximize",
    "exact_match": "maximize",
    "loss": "minimize",
}


@dataclass(frozen=True)
class MultiLabelClassification:
    """Tell all classes of a text (column `text`) or of a pair (`text_a`, `text_b`); there may be none."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: Metric

    name: ClassVar[str] = "multi-label-classification"
    metrics: ClassVar[tuple[str, ...]] = tuple(_DIRECTIONS)
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    smooths: ClassVar[bool] = False
    probe: ClassVar[ProbeKind] = "one-vs-rest"
    unit: ClassVar[float] = 1.0

    @classmethod
    def from_data(
        cls, data: DataSet, metric: str = "auto", *, labels: Sequence[str] | None = None
    ) -> MultiLabelClassification:
        """The task with the labels of the train split, after a check of every row of every split.

        Integer labels are ordered by value, names by alphabet.

        Args:
            data: the rows.
            metric: the name of one of the task's metrics, or `auto`.
            labels: the classes that a trained model knows, in its order; None for those of the train split.

        Raises:
            DataError: a column is missing, a text is no text, a label is no list of names or integers,
                the labels are ones and zeros, no train row has a class, or another split has a class
                that train has not.
        """
        columns = text_columns(data)
        lists = [row["label"] for row in data.train if isinstance(row.get("label"), list)]
        given = next((value for values in lists for value in values), None)

        def check(row: Row, first: Row, place: str) -> None:
            found = row.get("label")
            if not isinstance(found, list):
                kind = "missing" if found is None else f"{type(found).__name__} {str(found)[:40]!r}"
                raise DataError(
                    f"{place}: label is {kind}; it must be a list of class names or integers, [] for none "
                    "(in JSON lines or Parquet: a CSV file holds no lists)"
                )
            for value in found:
                check_class(value, value if given is None else given, place)

        check_texts(data, columns, "label", cls.name, check)
        if _are_indicators(lists):
            raise DataError(
                f"{data.source}: its labels are a 0 or 1 for each class, such as {str(lists[0])[:40]}; list "
                "the classes that a text has, by number or name, and [] for none"
            )
        if labels is None:
            labels = [*map(label_name, sorted({value for row in data.train for value in row["label"]}))]
        if not labels:
            raise DataError(f"{data.source}: no train row has a class; there is nothing to tell")
        check_seen(data, labels, lambda row: row["label"])
        return cls(columns, tuple(labels), choose_metric(metric, _DIRECTIONS, cls.name))

    @property
    def outputs(self) -> int:
        """One output of the head a class."""
        return len(self.labels)

    def model_kwargs(self) -> dict[str, Any]:
        """The number and the names of the classes, and that a text may have several."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "multi_label_classification",
        }

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each text, or both of a pair; of a long pair the longer text is cut first."""
        index_of = {label: index for index, label in enumerate(self.labels)}

        def classes(row: Row) -> tuple[int, ...]:
            return tuple(sorted({index_of[label_name(value)] for value in row["label"]}))

        return encode_texts(rows, self.columns, tokenizer, max_length, classes)

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels are 1 or 0, float32, shape (samples, classes)."""
        labels = torch.zeros(len(examples), len(self.labels))
        for row, example in zip(labels, examples, strict=True):
            assert isinstance(example.labels, tuple)
            row[list(example.labels)] = 1.0
        return collate_texts(examples, pad_token_id, labels)

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean binary cross-entropy over samples and classes, in float32; `logits` (samples, classes)."""
        return functional.binary_cross_entropy_with_logits(logits.float(), batch.labels)

    def terms(self, batch: Batch) -> int:
        """The number of samples: each has as many terms as there are classes."""
        return batch.samples

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample: loss, 1 if all classes are right, and of each class hit, told and true.

        The three last have a column a class, 1 or 0. float64 on the CPU, shape (samples, 2 + 3 · classes).
        """
        logits, labels = logits.detach().float().cpu(), batch.labels.cpu()
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
        told, true = _told(logits), labels == 1
        right = (told == true).all(dim=1)
        return torch.cat([losses[:, None].double(), right[:, None].double(), told & true, told, true], dim=1)

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """F1 of all classes together and its mean over those that occur, exact matches, and the mean loss.

        A match is exact where every class of a sample is right. The loss is in nats.
        """
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, math.nan)
        loss, right = outcomes[:, :2].mean(dim=0).tolist()
        hits, told, true = outcomes[:, 2:].sum(dim=0).view(3, -1)
        return {
            "f1_micro": f1(hits.sum().item(), told.sum().item(), true.sum().item()),
            "f1_macro": f1_macro(hits, told, true),
            "exact_match": right,
            "loss": loss,
        }

    def predictions(self, logits: torch.Tensor, batch: Batch) -> list[Any]:
        """The names of each sample's classes, a list in the order of `labels`."""
        return self._named(_told(logits.float()))

    def answers(self, batch: Batch) -> list[Any]:
        """The names of each sample's classes, a list in the order of `labels`."""
        return self._named(batch.labels)

    def _named(self, told: torch.Tensor) -> list[Any]:
        """The names of the classes that are told, or 1; shape (samples, classes)."""
        rows = told.tolist()
        return [[label for label, yes in zip(self.labels, row, strict=True) if yes] for row in rows]

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text and the names of the classes."""
        assert isinstance(example.labels, tuple)
        names = ", ".join(self.labels[index] for index in example.labels) or "none"
        return f"{tokenizer.decode(example.input_ids)} -> {names}"


def _are_indicators(labels: Sequence[Sequence[object]]) -> bool:
    """Whether lists are of a 0 or 1 for each class: of one length, and one of them says the same twice."""
    told = {value for values in labels for value in values}
    alike = len({len(values) for values in labels}) == 1
    return alike and told == {0, 1} and any(len(set(values)) < len(values) for values in labels)


def _told(logits: torch.Tensor) -> torch.Tensor:
    """Whether a class is predicted: its probability is one half or more."""
    return logits >= 0
