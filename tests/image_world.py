"""Vision models made from scratch, and coloured squares to tell apart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import transformers
from conftest import seeded
from PIL import Image

COLOURS = {"blue": (50, 60, 200), "green": (40, 180, 60), "red": (200, 40, 40)}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", SMALL),
    "dinov2": ("Dinov2Model", {**SMALL, "mlp_ratio": 2}),
    "swin": (
        "SwinModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 4, "mlp_ratio": 2.0},
    ),
}  # fmt: skip


def save_vit(folder: Path, kind: str = "vit", **values: Any) -> Path:
    """A random vision model of that kind, which reads images of 16 by 16, and its image processor."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    name, given = KINDS[kind]
    config = getattr(transformers, name).config_class(**{**given, **values})
    with seeded(0):
        getattr(transformers, name)(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def square(stream: random.Random, colour: str) -> Image.Image:
    """A square of about that colour somewhere on a ground of any."""
    image = Image.new("RGB", (24, 20), tuple(stream.randrange(256) for _ in range(3)))
    left, top = stream.randrange(16), stream.randrange(12)
    shade = tuple(max(0, min(255, value + stream.randrange(-40, 40))) for value in COLOURS[colour])
    image.paste(shade, (left, top, left + 8, top + 8))
    return image


def write_squares(folder: Path, train: int = 20, held: int = 10) -> Path:
    """A folder of images with that many of each colour in train, and in validation and test each."""
    for seed, split in enumerate(("train", "validation", "test")):
        stream = random.Random(seed)
        for colour in COLOURS:
            place = folder / split / colour
            place.mkdir(parents=True)
            for number in range(held if seed else train):
                square(stream, colour).save(place / f"{number:03}.png")
    return folder
