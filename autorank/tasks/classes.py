"""Classes: how they are named, what may be one, and scores of those told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from autorank.data import DataSet, Row
from autorank.errors import DataError

__all__ = ["check_class", "check_seen", "class_scores", "f1", "f1_macro", "label_name"]


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
    if type(value) is not type(first):
        raise DataError(
            f"{place}: {what} {value!r} is {type(value).__name__}, the first {what} is "
            f"{type(first).__name__} {first!r}; write all {what}s as names or all as integers"
        )


def check_seen(
    data: DataSet, labels: Sequence[str], classes: Callable[[Row], Sequence[object]], what: str = "label"
) -> None:
    """Refuse a class in validation or test that no train row has; `classes` gives those of a row."""
    known = set(labels)
    for split, rows in data.splits.items():
        for index, row in enumerate(rows):
            for value in classes(row):
                if label_name(value) not in known:
                    shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
                    raise DataError(
                        f"{data.where(split, index)}: {what} {value!r} does not occur in train "
                        f"({len(labels)} classes: {shown}); correct the {what}, or add rows of it to train"
                    )


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
