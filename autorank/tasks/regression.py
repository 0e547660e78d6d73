"""Regression: one text, or a pair of texts, and a number that goes with it.

The head gives the user's numbers, in training too, so that an exported adapter needs no constants
beside it: it starts from a ridge regression on the frozen features (`autorank.head`), which has found
their place and spread. The loss, and with it what every step does, is counted in their spread.
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

__all__ = ["Regression"]

_DIRECTIONS: dict[str, Direction] = {
    "pearson": "maximize",
    "spearman": "maximize",
    "mse": "minimize",
    "mae": "minimize",
}
_LARGEST = 1e15  # its square has room in float32, a thousand times over


@dataclass(frozen=True)
class Regression:
    """Predict the number `score`, or `label`, of a text (column `text`) or of a pair (`text_a`, `text_b`).

    `unit` is the standard deviation of the train split's numbers; 1 where there is none.
    """

    columns: tuple[str, ...]
    target: str
    metric: Metric
    unit: float = 1.0

    name: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = tuple(_DIRECTIONS)
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    outputs: ClassVar[int] = 1
    labels: ClassVar[tuple[str, ...] | None] = None
    smooths: ClassVar[bool] = False
    probe: ClassVar[ProbeKind] = "ridge"

    @classmethod
    def from_data(cls, data: DataSet, metric: str = "auto") -> Regression:
        """The task for the data's columns, after a check of every row of every split.

        Raises:
            DataError: a column is missing, a text is no text, a target is no finite number, or all
                targets of train are the same in float32.
        """
        columns = text_columns(data)
        target = "label" if "score" not in data.columns and "label" in data.columns else "score"

        given = [row.get(target) for rows in data.splits.values() for row in rows]
        spoilt = any(isinstance(value, str) and not _reads_as_number(value) for value in given)

        def check(row: Row, first: Row, place: str) -> None:
            value = row.get(target)
            # One field of a table that is no number makes text of its whole column: that one is told.
            if not (spoilt and isinstance(value, str) and _reads_as_number(value)):
                _check_number(value, target, place)

        check_texts(data, columns, target, cls.name, check)
        # As training sees them: in float32.
        targets = torch.tensor([float(row[target]) for row in data.train], dtype=torch.float32).double()
        unit = float(targets.std(correction=0)) if len(targets) else 1.0
        if unit == 0.0:
            values = {float(row[target]) for row in data.train}
            alike = "" if len(values) == 1 else ", or one that float32 cannot tell from it"
            raise DataError(
                f"{data.source}: every train row has the {target} {data.train[0][target]!r}{alike}; "
                "there is nothing to tell apart"
            )
        return cls(columns, target, choose_metric(metric, _DIRECTIONS, cls.name), unit)

    def model_kwargs(self) -> dict[str, Any]:
        """One output, and that it is a number."""
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each text, or both of a pair; of a long pair the longer text is cut first."""
        return encode_texts(rows, self.columns, tokenizer, max_length, lambda row: float(row[self.target]))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels are float32, shape (samples,)."""
        labels = torch.tensor([example.labels for example in examples], dtype=torch.float32)
        return collate_texts(examples, pad_token_id, labels)

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean squared error over the samples, in squares of the unit, in float32.

        `logits` has shape (samples, 1).
        """
        return functional.mse_loss(logits.float().squeeze(-1) / self.unit, batch.labels / self.unit)

    def terms(self, batch: Batch) -> int:
        """The number of samples."""
        return batch.samples

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample: (predicted number, number), float64 on the CPU."""
        predicted = logits.detach().float().squeeze(-1).cpu()
        return torch.stack([predicted.double(), batch.labels.cpu().double()], dim=1)

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """Pearson's and Spearman's correlation, in [-1, 1], and the mean squared and absolute error.

        A correlation with what is constant is 0. Equal values share the mean of their ranks.
        """
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, math.nan)
        predicted, actual = outcomes.T
        errors = predicted - actual
        return {
            "pearson": _correlation(predicted, actual),
            "spearman": _correlation(_ranks(predicted), _ranks(actual)),
            "mse": errors.square().mean().item(),
            "mae": errors.abs().mean().item(),
        }

    def predictions(self, logits: torch.Tensor, batch: Batch) -> list[Any]:
        """Each sample's number, a float."""
        numbers: list[Any] = logits.float().squeeze(-1).tolist()
        return numbers

    def answers(self, batch: Batch) -> list[Any]:
        """Each sample's number, a float."""
        numbers: list[Any] = batch.labels.tolist()
        return numbers

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text and the number."""
        assert isinstance(example.labels, float)
        return f"{tokenizer.decode(example.input_ids)} -> {example.labels:g}"


def _reads_as_number(value: str) -> bool:
    """Whether a text is that of a finite number."""
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _check_number(value: object, target: str, place: str) -> None:
    """Refuse what is no number that float32 can hold and square."""
    if value is None:
        raise DataError(f"{place}: field {target!r} is missing; give each row a number")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(
            f"{place}: {target} is {type(value).__name__} {str(value)[:40]!r}; it must be a number "
            "(--task text-classification predicts classes)"
        )
    if not abs(value) <= _LARGEST:  # NaN too
        shown = f"{value!r}" if isinstance(value, float) else "an integer of that size"
        raise DataError(
            f"{place}: {target} {shown} cannot be predicted; numbers must be finite and at most "
            f"{_LARGEST:g} in size"
        )


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    if first.min() == first.max() or second.min() == second.max():
        return 0.0
    one, other = _centred(first), _centred(second)
    product, lengths = (one @ other).item(), (one.square().sum() * other.square().sum()).sqrt().item()
    return min(1.0, max(-1.0, float(product / lengths)))


def _centred(values: torch.Tensor) -> torch.Tensor:
    """Deviations from the mean, the largest of size 1: their squares neither overflow nor vanish."""
    deviations = values - values.mean()
    return deviations / deviations.abs().max()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """The rank of each value, from 1; equal ones have the mean of theirs."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: torch.Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[places].double()
