"""What a model sees of an image: shape, dtype and numbers, and processors that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from autorank.errors import DataError, ModelError
from autorank.images import ImageFile
from autorank.pixels import Eye, Picture


def eye(dtype: torch.dtype = torch.float32, channels: int = 3, **settings: Any) -> Eye:
    given = {"size": {"height": 8, "width": 12}, **settings}
    return Eye.of("a model", ViTImageProcessorPil(**given), dtype, channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_scaled_and_of_the_models_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    Image.new("RGB", (30, 20), (255, 0, 51)).save(tmp_path / "a.png")
    picture = Picture(ImageFile(str(tmp_path / "a.png"), None, "x"), eye(dtype))
    assert picture.eye.shape == (3, 8, 12)
    pixels = picture.pixels()
    expected = torch.tensor([1.0, -1.0, -0.6]).to(dtype)[:, None, None].expand(3, 8, 12)
    assert pixels.dtype == dtype
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png is broken, or no image"):
        picture.pixels()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "of a model makes 3x48x64 and 3x640x32 of two images"),
        ({"channels": 1}, "makes 3x8x12 of an image in colour, and the model reads 1 channels"),
        ({"image_mean": [0.5]}, r"a ViTImageProcessorPil, makes no pixels of an image \(.*mean"),
    ],
)
def test_a_processor_that_cannot_be_used_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        eye(**settings)
