"""Images as rows hold them: folders and columns of them, and how they are decoded."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import random
import re
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import write_jsonl
from image_world import COLOURS, square, write_squares
from PIL import Image

from autorank.data import DataSet, read_data, read_rows
from autorank.errors import CommandError, DataError
from autorank.images import ImageFile, check_image, decode, read_images
from autorank.rows import Part, Places
from autorank.tasks import choose_task


def read(source: object, **more: Any) -> DataSet:
    return read_data(str(source), **{"eval_fraction": 0.2, "seed": 0, **more})


def image_at(path: Path) -> ImageFile:
    """The image that a row names."""
    part = Part([{"image": path.name}], Places(str(path.parent / "rows.csv"), [7], lines=True))
    found = read_images({"train": part})["train"].rows[0]["image"]
    assert isinstance(found, ImageFile)
    return found


def png(colour: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def fill(folder: Path, *paths: str) -> Path:
    """A different image at each path."""
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png((number, 0, 0)))
    return folder


# -- folders ---------------------------------------------------------------------------------------


def test_splits_are_folders_of_folders_of_classes(tmp_path: Path) -> None:
    data = read(write_squares(tmp_path, train=3, held=2))
    assert (data.format, data.columns) == ("image folder", ("image", "label"))
    assert [len(rows) for rows in data.splits.values()] == [9, 6, 6]
    assert [row["label"] for row in data.train] == [colour for colour in COLOURS for _ in range(3)]
    path = tmp_path / "validation" / "green" / "001.png"
    found = data.validation[3]["image"]
    assert found == ImageFile(str(path), None, hashlib.sha256(path.read_bytes()).hexdigest())
    assert data.where("validation", 3) == f"{tmp_path / 'validation'}, row 4"


def test_folders_of_classes_alone_are_cut_into_splits(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{number}.jpg" for name in ("cat", "dog", "train") for number in range(10)))
    data = read(tmp_path)
    assert Counter(row["label"] for row in data.train) == {"cat": 6, "dog": 6, "train": 6}
    assert Counter(row["label"] for row in data.validation) == {"cat": 2, "dog": 2, "train": 2}
    assert len(data.test) == 6


def test_the_same_image_twice_is_in_one_split(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(8)))
    for number in range(8):
        (tmp_path / "a" / f"again{number}.png").write_bytes((tmp_path / "a" / f"{number}.png").read_bytes())
    data = read(tmp_path)
    splits = [{str(row["image"]) for row in rows} for rows in data.splits.values()]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    assert not any("also in" in note for note in data.notes)


def test_what_is_no_image_is_left_out_and_hidden_things_are_not_seen(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.PNG", "train/b/1.jpeg", "train/b/2.webp", "val/a/x.bmp", "train/.a/1.png")
    (tmp_path / "train" / "a" / "notes.md").write_text("these are mine")
    (tmp_path / "train" / "a" / ".DS_Store").write_text("")
    data = read(tmp_path)
    assert [Path(row["image"].name).name for row in data.train] == ["1.PNG", "1.jpeg", "2.webp"]
    assert [row["label"] for row in data.validation] == ["a"]
    assert data.notes[0] == (
        "1 files beside the images are left out; images are .png, .jpg, .jpeg, .webp, .bmp"
    )


@pytest.mark.parametrize("paths", [["1.png", "2.png"], ["train/1.png", "test/1.png"]])
def test_images_in_no_folder_of_a_class_have_no_label(tmp_path: Path, paths: list[str]) -> None:
    rows = read_rows(str(fill(tmp_path, *paths)))
    assert rows.columns == ("image",)
    assert [row["image"].name for row in rows.test] == [
        str(tmp_path / path) for path in paths if not path.startswith("train")
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/a/1.png", "train/b/"], r"train/b: no image in this folder of a class; fill it or remove it"),
        (["a/1.png", "b/1.png", "3.png"], r"3\.png lies in no class's folder"),
        (["test/a/1.png", "val/a/1.png"], r"no train split found, but validation, test; name the spl"),
        (["train/a/1.png", "val/a/1.png", "dev/a/1.png"], r"dev, val would all be the validation split"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(tmp_path: Path, paths: list[str], message: str) -> None:
    for path in paths:
        if path.endswith("/"):
            (tmp_path / path).mkdir(parents=True)
        else:
            fill(tmp_path, path)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_rows_beside_images_are_rows(tmp_path: Path) -> None:
    fill(tmp_path, "images/1.png", "images/2.png")
    write_jsonl(tmp_path / "train.jsonl", [{"image": f"images/{n}.png", "label": n} for n in (1, 2)])
    write_jsonl(tmp_path / "validation.jsonl", [{"image": "images/1.png", "label": 1}])
    data = read(tmp_path)
    assert data.format == "JSONL folder" and data.validation[0]["image"] == data.train[0]["image"]
    assert "1 of 1 validation rows have an input that is also in train" in data.notes
    (tmp_path / "train.jsonl").rename(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no train split found, but validation"):
        read(tmp_path)


def describe(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """A metadata file of that kind in a folder."""
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, rows)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_metadata_file_names_the_images_and_says_what_they_are(tmp_path: Path, kind: str) -> None:
    fill(tmp_path, *(f"{split}/{name}.png" for split in ("train", "test") for name in ("a", "x/b", "x/y/c")))
    names = ["x/y/c.png", "./x/b.png", "x/../a.png"]
    rows = [{"file_name": name, "label": n, "author": "me"} for n, name in enumerate(names)]
    for split in ("train", "test"):
        place = describe(tmp_path / split, kind, rows)
    data = read_rows(str(tmp_path))
    assert (data.format, data.columns) == ("image folder, test split", ("image", "label", "author"))
    assert [row["image"].name for row in data.test] == [
        str(tmp_path / "test" / name) for name in ("x/y/c.png", "x/b.png", "a.png")
    ]
    assert [row["label"] for row in data.test] == [0, 1, 2]
    number = {"csv": ":4", "jsonl": ":3", "parquet": ", row 3"}[kind]
    assert data.where("test", 2) == f"{place}{number}"
    for image in (row["image"] for row in data.test):
        check_image(image, "here")
    describe(tmp_path / "train", kind, rows[:2])
    assert read_rows(str(tmp_path), split="train").columns == data.columns
    if kind != "csv":  # of which `datasets` leaves its files open
        loaded = datasets.load_dataset(
            "imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")
        )
        assert list(loaded["test"]["label"]) == [0, 1, 2]


def test_a_metadata_file_of_a_folder_without_splits(tmp_path: Path) -> None:
    fill(tmp_path, *(f"images/{number}.png" for number in range(12)))
    rows = [{"file_name": f"images\\{number}.png", "kind": "ab"[number % 2]} for number in range(10)]
    path = describe(tmp_path, "csv", rows)
    data = read(tmp_path, columns={"label": "kind"})
    assert [len(part) for part in data.splits.values()] == [6, 2, 2]
    assert data.notes[0] == f"left out, for {path} does not name it: 2 images"
    assert Path(data.train[0]["image"].name).parent == tmp_path / "images"
    task, _ = choose_task("auto", data)
    assert task.name == "image-classification" and task.labels == ("a", "b")


def test_a_class_that_is_nearly_all_images_is_said(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{split}/ham/{number}.png" for split in ("train", "test") for number in range(20)))
    fill(tmp_path, "train/rare/0.png", "test/rare/0.png")
    _, line = choose_task("auto", read(tmp_path))
    assert "2 classes (94% of train is 'ham': --metric f1_macro or mcc tells more)" in line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "../a.png"}, "train/metadata.jsonl:1: file_name '../a.png' leads out of"),
        ({"file_name": "x/../../a.png"}, "metadata.jsonl:1: file_name 'x/../../a.png' leads out of"),
        ({"file_name": "..\\a.png"}, "metadata.jsonl:1: file_name '..\\\\a.png' leads out of"),
        ({"file_name": "/etc/passwd"}, "metadata.jsonl:1: file_name '/etc/passwd' leads out of"),
        ({"image": "a.png"}, "metadata.jsonl:1: field 'file_name' is missing, found image; it must be"),
        ({"file_name": 3}, "metadata.jsonl:1: field 'file_name' is '3'; it must be the path of"),
        ({"file_name": " "}, "metadata.jsonl:1: field 'file_name' is ' '; it must be the path of"),
    ],
)
def test_a_name_that_is_none_or_leads_out_of_its_folder_is_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    fill(tmp_path, "train/a.png", "test/b.png", "a.png")
    (tmp_path / "a.png").unlink()
    describe(tmp_path / "train", "jsonl", [row])
    with pytest.raises(DataError, match=re.escape(message)):
        read(tmp_path)


def test_metadata_files_have_one_place(tmp_path: Path) -> None:
    fill(tmp_path, "train/a.png", "test/b.png")
    path = describe(tmp_path, "csv", [{"file_name": "train/a.png", "label": 1}])
    with pytest.raises(DataError, match=re.escape(f"{path} lies beside the splits: give each")):
        read(tmp_path)
    path.rename(tmp_path / "train" / "metadata.csv")
    describe(tmp_path / "train", "jsonl", [{"file_name": "a.png", "label": 1}])
    with pytest.raises(
        DataError, match=r"train: metadata.csv, metadata.jsonl would each describe its images"
    ):
        read(tmp_path)


def test_a_named_image_that_is_missing_is_told_with_its_row(tmp_path: Path) -> None:
    fill(tmp_path, "train/a.png")
    describe(tmp_path / "train", "csv", [{"file_name": name, "label": 1} for name in ("a.png", "no.png")])
    data = read_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"metadata\.csv:3: the image .*/train/no\.png cannot be read"):
        check_image(data.test[1]["image"], data.where("test", 1))


# -- columns ---------------------------------------------------------------------------------------


def test_every_way_to_hold_the_same_images_is_the_same_data(tmp_path: Path) -> None:
    stream = random.Random(5)
    rows = []
    for number, colour in enumerate(["red", "blue"] * 6):
        square(stream, colour).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": colour})
    sources = {
        "relative": write_jsonl(tmp_path / "a.jsonl", rows),
        "absolute": write_jsonl(
            tmp_path / "sub" / "b.jsonl", [{**row, "image": str(tmp_path / row["image"])} for row in rows]
        ),
        "table": tmp_path / "c.csv",
        "named": tmp_path / "d.parquet",
        "held": tmp_path / "e.parquet",
        "bare": tmp_path / "f.parquet",
        "saved": tmp_path / "saved",
    }
    lines = ["image,label", *(f"{row['image']},{row['label']}" for row in rows)]
    sources["table"].write_text("\n".join(lines))
    named = datasets.Dataset.from_list([{**row, "image": str(tmp_path / row["image"])} for row in rows])
    named.cast_column("image", datasets.Image()).to_parquet(sources["named"])
    contents = [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": row["image"]} for row in rows]
    held = datasets.Dataset.from_list(
        [{**row, "image": content} for row, content in zip(rows, contents, strict=True)]
    ).cast_column("image", datasets.Image())
    held.to_parquet(sources["held"])
    held.save_to_disk(str(sources["saved"]))
    bare = [{**row, "image": content["bytes"]} for row, content in zip(rows, contents, strict=True)]
    datasets.Dataset.from_list(bare).to_parquet(sources["bare"])
    found = {name: read(source) for name, source in sources.items()}
    assert len({data.sha256 for data in found.values()}) == 1
    assert len({str(data.train[0]["image"]) for data in found.values()}) == 1
    for name, data in found.items():
        image = data.train[0]["image"]
        assert (image.content is not None) == (name in ("held", "saved", "bare")), name
        assert decode(check_image(image, "here")).size == (24, 20)
    (tmp_path / "3.png").write_bytes(png())
    assert read(sources["relative"]).sha256 != found["relative"].sha256


def test_a_column_of_another_name(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{number}.png" for number in range(10)))
    rows = [{"photo": f"{number}.png", "kind": number % 2} for number in range(10)]
    data = read(write_jsonl(tmp_path / "rows.jsonl", rows), columns={"image": "photo", "label": "kind"})
    assert {type(row["image"]) for row in data.train} == {ImageFile}


def test_a_column_that_means_something_else_is_no_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which would be waited for for ever
    given = ["no.png", 3, None, "~nobody-of-this-name/a.png", "pipe", "/dev/zero"]
    rows = [{"text": f"t{n}", "label": n % 2, "image": given[n % 6]} for n in range(12)]
    data = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert len(data.train) > 5
    again = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert again.sha256 == data.sha256


# -- what is refused -------------------------------------------------------------------------------


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    rows = read_rows(str(write_jsonl(tmp_path / "rows.jsonl", [{"image": "/dev/zero"}])))
    with pytest.raises(DataError, match=r"/dev/zero cannot be read \(a device or a pipe, which may have"):
        check_image(rows.test[0]["image"], rows.where("test", 0))
    with pytest.raises(
        DataError, match=re.escape(f"x:3: the image {tmp_path / 'no.png'} cannot be read (No")
    ):
        check_image(image_at(tmp_path / "no.png"), "x:3")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png cannot be read \(Is a directory\)"):
        check_image(image_at(tmp_path / "folder.png"), "x:3")


@pytest.mark.parametrize("value", [None, 3, 0.5, [1], {"path": None, "bytes": None}, ""])
def test_what_is_no_image_is_refused(value: object) -> None:
    part = Part([{"image": value}], Places("rows.jsonl", [1], lines=True))
    kept = read_images({"train": part})["train"].rows[0]["image"]
    assert kept == value
    with pytest.raises(DataError, match=r"x:3: field 'image' is .*; it must be the path of an image file"):
        check_image(kept, "x:3")


def noise(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((120, 90), 60).convert("RGB").save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_file_that_ends_too_soon_is_named(tmp_path: Path, kind: str) -> None:
    whole, path = noise(kind), tmp_path / f"a.{kind.lower()}"
    path.write_bytes(whole)
    assert check_image(image_at(path), "x").name == str(path)
    for cut in (0, 5, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"x:3: {re.escape(str(path))} is broken, or no image \("):
            check_image(image_at(path), "x:3")


def test_a_bit_that_flipped_and_other_formats_are_refused(tmp_path: Path) -> None:
    data = bytearray(noise("PNG"))
    data[len(data) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.tiff")
    (tmp_path / "c.tiff").rename(tmp_path / "c.png")
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(DataError, match=rf"{name} is broken, or no image"):
            check_image(image_at(tmp_path / name), "x")


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 10_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png is broken, or no image \(Image size \(100000000 pixels\)"):
        check_image(image_at(tmp_path / "a.png"), "x")


def test_pillow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.png")
    image, real = image_at(tmp_path / "a.png"), builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError("No module named 'PIL'", name="PIL")
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CommandError, match=r'pip install "autorank-lora\[images\]"'):
        check_image(image, "x")


# -- decoding --------------------------------------------------------------------------------------


def pixels(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(image.height, image.width, 3)


def test_every_kind_of_image_is_rgb(tmp_path: Path) -> None:
    grey = Image.new("L", (6, 4), 77)
    cases = {"L": grey, "LA": grey.convert("LA"), "1": Image.new("1", (6, 4), 1)}
    cases |= {"RGBA": grey.convert("RGBA"), "P": grey.convert("RGB").quantize(4)}
    for name, image in cases.items():
        image.save(tmp_path / f"{name}.png")
        value = 255 if name == "1" else 77
        found = pixels(decode(image_at(tmp_path / f"{name}.png")))
        assert found.shape == (4, 6, 3) and bool((found == value).all()), name
    grey.convert("RGB").quantize(4).save(tmp_path / "t.png", transparency=b"\0\1")
    assert bool((pixels(decode(image_at(tmp_path / "t.png"))) == 77).all())
    Image.new("CMYK", (6, 4)).save(tmp_path / "c.jpg")
    assert int(pixels(decode(image_at(tmp_path / "c.jpg"))).min()) > 250


def test_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    image = Image.new("I;16", (4, 1))
    for at, value in enumerate((0, 256, 25_600, 65_535)):
        image.putpixel((at, 0), value)
    image.save(tmp_path / "a.png")
    assert pixels(decode(image_at(tmp_path / "a.png")))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_a_photo_taken_on_its_side_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (10, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert decode(image_at(tmp_path / "a.jpg")).size == (4, 10)


def test_an_image_that_has_gone_since_is_named(tmp_path: Path) -> None:
    image = image_at(fill(tmp_path, "a.png") / "a.png")
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png is broken, or no image"):
        decode(image)
