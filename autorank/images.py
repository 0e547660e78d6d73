"""Images as rows hold them: a file's path or its bytes, and how they become pixels. Pillow's home.

Reads folders of images, with a folder for each class or a metadata file, and columns that name or hold
images. An image is decoded when it is asked for and kept nowhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autorank.errors import CommandError, DataError, first_line
from autorank.figures import counted
from autorank.readers import read_file
from autorank.rows import SPLIT_NAMES, Part, Places, Row, listed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "METADATA",
    "ImageFile",
    "check_image",
    "decode",
    "is_image_folder",
    "read_image_folder",
    "read_images",
]

METADATA = "metadata"
"""The stem of a file that names the images of a folder, a row each, as `datasets` knows it."""

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_METADATA_FILES = tuple(f"{METADATA}{extension}" for extension in (".csv", ".jsonl", ".parquet"))
# Pillow knows more, of which some start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_COLUMN = "image"
_NAMED = "file_name"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is not decoded.

    Attributes:
        name: its path, or what it is called in a table, for messages.
        content: the file's bytes; None where they are to be read from the path `name`.
        digest: SHA-256 of the bytes, which tells images apart; empty where there is a problem.
        problem: why there are no bytes, if so; who needs the image refuses it then.
    """

    name: str
    content: bytes | None
    digest: str
    problem: str | None = None

    def __str__(self) -> str:
        # What a data set's hash is taken of, and what rows with the same image have in common.
        return f"image sha256:{self.digest}" if self.digest else f"image {self.name}"


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds images, those of a split or a class in folders of their own, or both."""
    tops = (folder, *_folders(folder))
    near = any(_images(place) for top in tops for place in (top, *_folders(top)))
    return near or any(_images_below(top) for top in tops if _metadata(top) is not None)


def read_image_folder(
    folder: Path, numeric: Collection[str] = ("label", "score")
) -> tuple[dict[str, Part], list[str]]:
    """The rows of a folder of images, with columns `image` (a path) and `label`, by split, and notes.

    Splits are folders of classes; where there are none, the folders are the classes and all is
    train. Images in no class's folder have no label. A split with a metadata file has the rows and
    columns of that, whose column `file_name` is the path of an image within the split's folder, and no
    classes by folder, as in the `imagefolder` of `datasets`.

    Args:
        folder: of the images.
        numeric: the columns of a metadata table that may be numbers, as for `read_file`.

    Raises:
        DataError: a class has no images, images lie beside the classes, or a metadata file is broken,
            lies beside the splits or names no image within its folder.
    """
    folder = folder.absolute()
    splits = _splits(folder)
    beside = _metadata(folder) if splits else None
    if beside is not None:
        raise DataError(f"{beside} lies beside the splits: give each of their folders one of its own")
    others = 0
    parts: dict[str, Part] = {}
    notes: list[str] = []
    for split, place in (splits or {"train": folder}).items():
        metadata = _metadata(place)
        if metadata is not None:
            parts[split] = _read_metadata(metadata, numeric)
            unnamed = _images_below(place) - len({row[_COLUMN] for row in parts[split].rows})
            if unnamed > 0:
                notes.append(f"left out, for {metadata} does not name it: {counted(unnamed, 'image')}")
            continue
        rows, left = _read_classes(place)
        parts[split] = Part(rows, Places(str(place), range(1, len(rows) + 1), lines=False))
        others += left
    if others:
        notes.append(f"{others:,} files beside the images are left out; images are {', '.join(_EXTENSIONS)}")
    return parts, notes


def _metadata(folder: Path) -> Path | None:
    """The metadata file of a folder, if it has one."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name in _METADATA_FILES]
    if len(found) > 1:
        both = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: {both} would each describe its images; keep one of them")
    return found[0] if found else None


def _images_below(folder: Path) -> int:
    """How many images lie in a folder and in those below it."""
    return sum(len(_images(Path(place))) for place, _, _ in os.walk(folder))


def _read_metadata(path: Path, numeric: Collection[str]) -> Part:
    """The rows of a metadata file, with the path of their image for its name."""
    _, part = read_file(path, numeric)
    rows: list[Row] = []
    for index, row in enumerate(part.rows):
        name, place = row.get(_NAMED), part.places[index]
        if not isinstance(name, str) or not name.strip():
            found = f"is {str(name)[:40]!r}" if _NAMED in row else f"is missing, found {listed(row)}"
            raise DataError(f"{place}: field {_NAMED!r} {found}; it must be the path of the row's image")
        # As `datasets` does: a data set that came from elsewhere does not point at other files here.
        inside = os.path.normpath(name.replace("\\", "/"))
        if os.path.isabs(inside) or inside.split("/")[0] == "..":
            raise DataError(
                f"{place}: {_NAMED} {name[:80]!r} leads out of {path.parent}; it must be a path within it"
            )
        others = {column: value for column, value in row.items() if column not in (_NAMED, _COLUMN)}
        rows.append({_COLUMN: str(path.parent / inside), **others})
    return Part(rows, part.places)


def _splits(folder: Path) -> dict[str, Path]:
    """The folders of the splits; none where the folders are classes, of which one may be called `train`."""
    splits: dict[str, Path] = {}
    places = _folders(folder)
    for split, names in SPLIT_NAMES.items():
        found = [place for place in places if place.name in names]
        if len(found) > 1:
            both = ", ".join(place.name for place in found)
            raise DataError(f"{folder}: {both} would all be the {split} split; keep one of them")
        if found:
            splits[split] = found[0]
    return splits if len(splits) == len(places) or any(map(_folders, splits.values())) else {}


def _read_classes(folder: Path) -> tuple[list[Row], int]:
    """A row for each image of a split, and how many other files there are."""
    classes = _folders(folder)
    loose = _images(folder)
    if classes and loose:
        raise DataError(f"{loose[0]} lies in no class's folder: move it into one, or away")
    rows: list[Row] = [{_COLUMN: str(path)} for path in loose]
    for place in classes:
        found = _images(place)
        if not found:
            raise DataError(
                f"{place}: no image in this folder of a class; fill it or remove it (images are "
                f"{', '.join(_EXTENSIONS)})"
            )
        rows += [{_COLUMN: str(path), "label": place.name} for path in found]
    files = sum(
        path.is_file() and not path.name.startswith(".")
        for place in (folder, *classes)
        for path in place.iterdir()
    )
    return rows, files - len(rows)


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder by name, hidden ones left out."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _images(folder: Path) -> list[Path]:
    """The image files in a folder by name, hidden ones left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )


def read_images(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The splits with an `ImageFile` for each path, bytes, or struct of both, in a column `image`.

    A path is relative to the folder of the data file, or absolute: rows may name any file of the
    user's. What is no image file is told where an image is needed, for the column may mean something
    else to other tasks.
    """
    read: dict[str, Part] = {}
    for split, part in parts.items():
        place = Path(part.places.file)
        folder = place if place.is_dir() else place.parent
        rows = [
            {**row, _COLUMN: _read_image(row[_COLUMN], folder, part.places[index])}
            if isinstance(row.get(_COLUMN), (str, bytes, dict))
            else row
            for index, row in enumerate(part.rows)
        ]
        read[split] = Part(rows, part.places)
    return read


def _read_image(value: str | bytes | dict[str, Any], folder: Path, place: str) -> object:
    """The image that a path, bytes or a struct gives; what is none stays as it is."""
    if isinstance(value, dict):
        path, content = value.get("path"), value.get("bytes")
    else:
        path, content = (value, None) if isinstance(value, str) else (None, value)
    if isinstance(content, bytes):
        name = f"{path} of {place}" if path else f"the image of {place}"
        return ImageFile(name, content, hashlib.sha256(content).hexdigest())
    if not isinstance(path, str) or not path:
        return value
    file = (folder / os.path.expanduser(path)).absolute()
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError("a device or a pipe, which may have no end")
        return ImageFile(str(file), None, hashlib.sha256(file.read_bytes()).hexdigest())
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        return ImageFile(str(file), None, "", problem)


def check_image(value: object, place: str) -> ImageFile:
    """The value, if it is an image whose every byte can be decoded.

    Raises:
        DataError: it is none; the message names the file.
        CommandError: Pillow is missing.
    """
    if not isinstance(value, ImageFile):
        found = "is missing" if value is None else f"is {type(value).__name__} {str(value)[:40]!r}"
        raise DataError(
            f"{place}: field {_COLUMN!r} {found}; it must be the path of an image file, from the data file's "
            "folder on, or a struct of its bytes"
        )
    if value.problem is not None:
        raise DataError(
            f"{place}: the image {value.name} cannot be read ({value.problem}); correct the path, which is "
            "that of a file, from the data file's folder on"
        )
    try:
        _open(value, small=True)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    return value


def decode(image: ImageFile) -> Image:
    """The image in RGB, upright, transparency left out.

    Raises:
        DataError: it cannot be read or decoded; the message names the file.
    """
    from PIL import ImageOps

    opened = ImageOps.exif_transpose(_open(image))
    if opened.mode.startswith("I;16"):  # converted as it is, all that is over 255 would be white
        opened = opened.point(lambda value: value / 256).convert("L")
    if "transparency" in opened.info:
        opened = opened.convert("RGBA")
    found: Image = opened.convert("RGB")
    return found


def _open(image: ImageFile, *, small: bool = False) -> Image:
    """The image as its file has it, every byte decoded; `small` lets a JPEG file be read coarsely."""
    try:
        from PIL import Image
    except ImportError as error:
        raise CommandError(
            f'images need the package Pillow ({first_line(error)}): pip install "autorank-lora[images]"'
        ) from error
    try:
        with warnings.catch_warnings():
            # An image of more pixels than any photo has is a file made to fill the memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = image.name if image.content is None else io.BytesIO(image.content)
            opened: Image.Image
            with Image.open(source, formats=_FORMATS) as opened:
                if small:
                    opened.draft("RGB", (1, 1))
                opened.load()
            return opened
    except Exception as error:  # decoders raise too many kinds to name
        raise DataError(
            f"{image.name} is broken, or no image ({first_line(error)}); replace it or leave it out (formats "
            f"are {', '.join(_FORMATS)})"
        ) from None
