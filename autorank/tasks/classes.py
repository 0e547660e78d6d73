"""Classes: how they are named, what may be one, the loss of those told and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional

from autorank.data import DataSet, Row
from autorank.errors import DataError
from autorank.figures import shortened
from autorank.tasks.task import Batch, Direction, ProbeKind, check_whole

__all__ = [
    "OneClass",
    "check_class",
    "check_seen",
    "class_names",
    "class_scores",
    "f1",
    "f1_macro",
    "label_name",
]

# Most characters of a class in a message.
_SHOWN = 60


class OneClass:
    """What all tasks share that tell one class of several of each sample, whatever a sample is."""

    labels: tuple[str, ...]

    directions: ClassVar[dict[str, Direction]] = {
        "accuracy": "maximize",
        "f1_macro": "maximize",
        "f1_micro": "maximize",
        "mcc": "maximize",
        "loss": "minimize",
    }
    metrics: ClassVar[tuple[str, ...]] = tuple(directions)
    smooths: ClassVar[bool] = True
    probe: ClassVar[ProbeKind] = "multinomial"
    unit: ClassVar[float] = 1.0

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

    def answers(self, batch: Batch) -> list[Any]:
        """The name of each sample's class."""
        return [self.labels[index] for index in batch.labels.tolist()]


def class_names(data: DataSet, labels: Sequence[str] | None = None) -> tuple[str, ...]:
    """The classes in a column `label`, integers by value and names by alphabet.

    Args:
        data: with checked labels.
        labels: the classes that a trained model knows, in its order; None for those of the train split.

    Raises:
        DataError: there are fewer than two, or a row has a class that is not among them.
    """
    if labels is None:
        labels = [label_name(value) for value in sorted({row["label"] for row in data.train})]
    if len(labels) < 2:
        raise DataError(
            f"{data.source}: every train row has the label {labels[0]!r}; "
            "a classifier needs at least two classes"
        )
    check_seen(data, labels, lambda row: [row["label"]])
    return tuple(labels)


def label_name(value: object) -> str:
    """The name of a class: the string itself, an integer's digits, `true` or `false`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_class(value: object, first: object, place: str, what: str = "label") -> None:
    """Refuse what is no class, and a class of another type than the first; `what` is its name here."""
    rule = "it must be a class name or an integer"
    if value is None:
        raise DataError(f"{place}: field {what!r} is missing; {rule}")
    if not isinstance(value, (str, int)):
        raise DataError(f"{place}: {what} is {type(value).__name__} {str(value)[:40]!r}; {rule}")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{place}: field {what!r} is empty; {rule}")
    if isinstance(value, str):
        check_whole(value, what, place)
    if type(value) is not type(first):
        raise DataError(
            f"{place}: {what} {value!r} is {type(value).__name__}, the first {what} is "
            f"{type(first).__name__} {first!r}; write all {what}s as names or all as integers"
        )


def check_seen(
    data: DataSet, labels: Sequence[str], classes: Callable[[Row], Sequence[object]], what: str = "label"
) -> None:
    """Refuse a class that no train row has, or a trained model does not know; `classes` gives a row's."""
    known = set(labels)
    shown = ", ".join(shortened(label, _SHOWN) for label in labels[:8]) + (", …" if len(labels) > 8 else "")
    for split, rows in data.splits.items():
        for index, row in enumerate(rows):
            for value in classes(row):
                name = label_name(value)
                if name in known:
                    continue
                told = repr(shortened(value, _SHOWN) if isinstance(value, str) else value)
                where, count = f"{data.where(split, index)}: {what} {told}", f"{len(labels)} classes: {shown}"
                hint = _meant(name, row, labels, what)
                if data.train:
                    way = f"correct the {what}, or add rows of it to train"
                    raise DataError(f"{where} does not occur in train ({count}); {hint}{way}")
                raise DataError(
                    f"{where} is none that the adapter was trained on ({count}); {hint}"
                    f"correct the {what}, or leave the row out"
                )


def _meant(name: str, row: Row, labels: Sequence[str], what: str) -> str:
    """What an unknown class may be: one that is written otherwise, or the text, where columns are swapped."""
    close = next((label for label in labels if label.casefold() == name.strip().casefold()), None)
    if close is not None:
        return f"do you mean {close!r}? "
    other = next((column for column, value in row.items() if value in labels and column != what), None)
    return "" if other is None else f"column {other} holds {row[other]!r}: are the columns swapped? "


def class_scores(predicted: torch.Tensor, actual: torch.Tensor, classes: int) -> dict[str, float]:
    """Scores of one class for each sample.

    F1 is the mean over the classes that occur (macro), and over all samples, where it is the accuracy
    (micro). Matthews' correlation, in [-1, 1], is that of Gorodkin (2004) for any number of classes;
    it is 0 where all predictions, or all classes, are the same.

    Args:
        predicted: classes, int64 [samples].
        actual: classes, int64 [samples].
        classes: how many there are.
    """
    samples = len(actual)
    hits = torch.bincount(actual[predicted == actual], minlength=classes).double()
    told = torch.bincount(predicted, minlength=classes).double()
    true = torch.bincount(actual, minlength=classes).double()
    right = hits.sum().item()
    # Whole numbers, so that a constant gives 0 exactly.
    spread = ((samples**2 - told @ told) * (samples**2 - true @ true)).item()
    return {
        "accuracy": right / samples,
        "f1_macro": f1_macro(hits, told, true),
        "f1_micro": right / samples,
        "mcc": (right * samples - (told @ true).item()) / math.sqrt(spread) if spread else 0.0,
    }


def f1_macro(hits: torch.Tensor, told: torch.Tensor, true: torch.Tensor) -> float:
    """The mean F1 of the classes that were told or true at least once; 0 where there are none.

    Args:
        hits: how often each class was told rightly, float64 [classes].
        told: how often it was told.
        true: how often it would have been right.
    """
    met = told + true
    return (2 * hits[met > 0] / met[met > 0]).mean().item() if met.any() else 0.0


def f1(hits: float, told: float, true: float) -> float:
    """F1 = 2 · hits / (told + true); 0 where nothing was told or true."""
    return 2 * hits / (told + true) if told + true else 0.0
