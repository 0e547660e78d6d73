"""Pixels: an image as a model reads it, made by the model's own processor when a batch needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autorank.errors import ModelError, first_line
from autorank.images import ImageFile, decode

__all__ = ["Eye", "Picture"]


@dataclass(frozen=True)
class Eye:
    """How a model sees: what takes the place of a tokenizer where it reads images.

    Attributes:
        processor: an image processor of transformers.
        dtype: of the model.
        shape: of what the model reads: channels, height, width.
    """

    processor: Any
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, source: str, processor: Any, dtype: torch.dtype, channels: int) -> Eye:
        """The eye of the model `source`, tried out.

        Raises:
            ModelError: images come out in another shape each, or with other than `channels` channels,
                or not at all.
        """
        try:
            shapes = {
                tuple(_process(processor, torch.full((3, height, width), 128, dtype=torch.uint8)).shape)
                for height, width in ((48, 64), (640, 32))
            }
        except Exception as error:  # processors raise too many kinds to name
            raise ModelError(
                f"the image processor of {source}, a {type(processor).__name__}, makes no pixels of an image "
                f"({first_line(error)}): correct its preprocessor_config.json, or give another model"
            ) from error
        told = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        if len(shapes) > 1:
            raise ModelError(
                f"the image processor of {source} makes {told} of two images, and a batch needs one shape: "
                "set do_resize and size, height and width, in its preprocessor_config.json"
            )
        (shape,) = shapes
        if len(shape) != 3 or shape[0] != channels:
            raise ModelError(
                f"the image processor of {source} makes {told} of an image in colour, and the model reads "
                f"{channels} channels: give a model of images in colour, with its own processor"
            )
        return cls(processor, dtype, shape)

    def see(self, image: ImageFile) -> Tensor:
        """The pixels of an image, of the eye's shape and dtype, on the CPU.

        Raises:
            DataError: the file is gone or broken.
        """
        return _process(self.processor, decode(image)).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, and the eye that is to see it."""

    image: ImageFile
    eye: Eye

    def pixels(self) -> Tensor:
        """What the model reads, decoded each time: (channels, height, width)."""
        return self.eye.see(self.image)


def _process(processor: Any, image: Any) -> Tensor:
    pixels: Tensor = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    return pixels
