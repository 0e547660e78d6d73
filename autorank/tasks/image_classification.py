"""Image classification: an image, and the name of its class.

Images are decoded batch by batch. Class names and their order come from the train split. Nothing
here knows the head or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from autorank.data import DataSet, Row
from autorank.images import check_image
from autorank.pixels import Eye, Picture
from autorank.tasks.classes import OneClass, check_class, class_names, label_name
from autorank.tasks.task import Batch, Encoded, Example, Metric, choose_metric, require_columns

__all__ = ["ImageClassification"]


@dataclass(frozen=True)
class ImageClassification(OneClass):
    """Tell the class (column `label`) of an image (column `image`)."""

    labels: tuple[str, ...]
    metric: Metric

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    peft_task_type: ClassVar[None] = None

    @classmethod
    def from_data(
        cls, data: DataSet, metric: str = "auto", *, labels: Sequence[str] | None = None
    ) -> ImageClassification:
        """The task with the labels of the train split, after every image of every split was decoded once.

        Args:
            data: the rows.
            metric: the name of one of the task's metrics, or `auto`.
            labels: the classes that a trained model knows, in its order; None for those of the train split.

        Raises:
            DataError: a column or an image is missing, an image is broken, labels are floats or of
                mixed types, train has fewer than two classes, or another split has a class that
                train has not.
            CommandError: Pillow is missing.
        """
        require_columns(data, ("image", "label"), cls.name)
        for split, rows in data.splits.items():
            for index, row in enumerate(rows):
                place = data.where(split, index)
                check_class(row.get("label"), rows[0].get("label"), place)
                check_image(row.get("image"), place)
        return cls(class_names(data, labels), choose_metric(metric, cls.directions, cls.name))

    def encode(self, rows: Sequence[Row], tokenizer: Eye, max_length: int) -> Encoded:
        """An example for each row, not decoded; an image has no length, and none is cut."""
        index_of = {label: index for index, label in enumerate(self.labels)}
        examples = tuple(
            Example([], index_of[label_name(row["label"])], picture=Picture(row["image"], tokenizer))
            for row in rows
        )
        return Encoded(examples, len(examples), 0, {})

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Decode the images; `pad_token_id` fills up nothing. Labels have shape (samples,).

        Raises:
            DataError: an image has gone or changed since it was read.
        """
        pictures = [example.picture for example in examples]
        pixels = torch.stack([picture.pixels() for picture in pictures if picture is not None])
        labels = torch.tensor([example.labels for example in examples], dtype=torch.int64)
        return Batch({"pixel_values": pixels}, labels, len(examples))

    def describe(self, example: Example, tokenizer: Eye) -> str:
        """The image's file, what the model sees of it, and the name of the class."""
        assert example.picture is not None and isinstance(example.labels, int)
        shape = "x".join(map(str, tokenizer.shape))
        return f"{example.picture.image.name} as {shape} -> {self.labels[example.labels]}"
