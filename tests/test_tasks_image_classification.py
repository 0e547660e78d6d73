"""Image classification: what is refused, what a model sees, and a search from images to answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from card_code import ask
from conftest import write_jsonl
from image_world import COLOURS, KINDS, save_vit, write_squares
from PIL import Image
from safetensors.torch import load_file

from autorank.card import FACTS, loading_lines, training_lines
from autorank.config import load_config
from autorank.data import build_data, read_data
from autorank.errors import DataError, ModelError
from autorank.export import export
from autorank.images import ImageFile
from autorank.model import Base, load_base, not_adapted
from autorank.predictor import Predictor, evaluate_export, predict_export
from autorank.search import search
from autorank.tasks import HeadTask, ImageClassification, Metric, TextClassification, choose_task
from autorank.tasks.exported import restore_task

TASK = ImageClassification(tuple(COLOURS), Metric("accuracy", "maximize"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data") / "squares", train=60, held=20)


def load(source: object, **settings: Any) -> Base:
    given = {"auto_class": TASK.auto_class, "model_kwargs": TASK.model_kwargs(), "device": "cpu"}
    return load_base(str(source), **{**given, **settings})


def refused(source: object, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(source, **settings)
    return str(caught.value)


# -- rows ------------------------------------------------------------------------------------------


def test_classes_and_metrics_are_those_of_texts(squares: Path) -> None:
    data = read_data(str(squares), eval_fraction=0.1, seed=0)
    task, line = choose_task("auto", data)
    assert task == TASK and isinstance(task, HeadTask) and task.outputs == 3
    assert line == (
        "task image-classification (columns image, label): 3 classes, metric accuracy, higher is better"
    )
    assert task.metrics == TextClassification.metrics and task.smooths
    assert task.model_kwargs()["id2label"] == {0: "blue", 1: "green", 2: "red"}
    assert choose_task("image-classification", data, "mcc")[0].metric == Metric("mcc", "maximize")
    facts = {"task": task.name, "id2label": {"0": "red", "1": "blue", "2": "green"}}
    assert restore_task(facts, data).labels == ("red", "blue", "green")


def test_a_caption_comes_before_its_image() -> None:
    rows = [{"image": "a.png", "text": "a", "label": n} for n in range(2)]
    assert isinstance(choose_task("auto", build_data("x", {"train": rows, "validation": rows}))[0],
                      TextClassification)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, r"rows\.jsonl:4: field 'image' is missing; it must be the path"),
        ({"image": "0.png", "label": 1.5}, r"rows\.jsonl:4: label is float '1.5'; it must be a class name"),
        ({"image": "0.png"}, r"rows\.jsonl:4: field 'label' is missing"),
        ({"image": "0.png", "label": "x"}, r"rows\.jsonl:4: label 'x' is str, the first label is int 0"),
        (
            {"image": "no.png", "label": 1},
            r"rows\.jsonl:4: the image .*/no\.png cannot be read \(No such file",
        ),
        ({"image": "bad.png", "label": 1}, r"rows\.jsonl:4: .*/bad\.png is broken, or no image"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    good = [{"image": f"{n}.png", "label": n % 2} for n in range(3)]
    write_jsonl(tmp_path / "validation.jsonl", good)
    path = write_jsonl(tmp_path / "rows.jsonl", [*good, row]).rename(tmp_path / "train.jsonl")
    data = read_data(str(tmp_path), eval_fraction=0.1, seed=0)
    with pytest.raises(DataError, match=message.replace("rows", path.stem)):
        choose_task("image-classification", data)


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    write_jsonl(tmp_path / "train.jsonl", [{"image": "a.png", "label": "a"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"image": "a.png", "label": "b"}])
    data = read_data(str(tmp_path), eval_fraction=0.1, seed=0)
    with pytest.raises(DataError, match="every train row has the label 'a'"):
        choose_task("auto", data)
    with pytest.raises(DataError, match="needs the columns image, label; found text"):
        ImageClassification.from_data(build_data("x", {"train": [{"text": "a"}], "validation": [{}]}))
    with pytest.raises(DataError, match="needs the columns text, label; found image, label"):
        choose_task("text-classification", data)


# -- the model -------------------------------------------------------------------------------------


def test_images_become_what_the_models_own_processor_makes_of_them(vit: Path, squares: Path) -> None:
    from transformers import AutoImageProcessor

    base = load(vit)
    data = read_data(str(squares), eval_fraction=0.1, seed=0)
    rows = [data.train[0], data.train[-1], data.train[60]]
    encoded = TASK.encode(rows, base.processor, 1)
    assert (encoded.kept, encoded.truncated, encoded.dropped) == (3, 0, {})
    assert [example.length for example in encoded.examples] == [1, 1, 1]
    batch = TASK.collate(encoded.examples, base.pad_token_id)
    assert batch.labels.tolist() == [0, 2, 1] and batch.samples == TASK.terms(batch) == 3
    processor = AutoImageProcessor.from_pretrained(vit)
    opened = [Image.open(row["image"].name) for row in rows]
    expected = processor(images=opened, return_tensors="pt")["pixel_values"]
    assert set(batch.inputs) == {"pixel_values"} and expected.shape == (3, 3, 16, 16)
    assert torch.equal(batch.inputs["pixel_values"], expected)
    assert torch.equal(batch.take(range(1, 3)).inputs["pixel_values"], expected[1:])
    told = TASK.describe(encoded.examples[2], base.processor)
    assert told == f"{squares / 'train' / 'green' / '000.png'} as 3x16x16 -> green"
    logits = torch.tensor([[0.0, 9, 1], [5, 1, 1], [0, 0, 9]])
    assert TASK.predictions(logits, batch) == ["green", "blue", "red"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_several_kinds_see(tmp_path: Path, squares: Path, kind: str, dtype: str) -> None:
    base = load(save_vit(tmp_path, kind), dtype=dtype)
    data = read_data(str(squares), eval_fraction=0.1, seed=0)
    batch = TASK.collate(TASK.encode(data.train[:2], base.processor, 1).examples, 0)
    assert base.model(**batch.inputs).logits.shape == (2, 3)
    assert base.fresh == ("classifier",) and base.writer is None
    first, *more = not_adapted(base)
    assert re.fullmatch(
        r"not adapted: \S*embeddings.patch_embeddings.projection \(Conv2d; adapters go on Linear layers\)",
        first,
    )
    assert not more


def test_a_model_for_texts_sees_no_images(tiny_bert: Path, tiny_llama: Path, vit: Path) -> None:
    assert "is a bert model, which transformers cannot use for image classification" in refused(tiny_bert)
    assert "is a llama model, which transformers cannot use for image classification" in refused(tiny_llama)
    for auto_class in ("AutoModelForSequenceClassification", "AutoModelForCausalLM"):
        told = refused(vit, auto_class=auto_class)
        assert "is a vit model, which transformers cannot use for" in told


def test_a_processor_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    model = save_vit(tmp_path)
    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    revision = load(model).revision
    path.write_text(json.dumps({**settings, "do_resize": False}))
    assert "makes 3x48x64 and 3x640x32 of two images, and a batch needs one shape" in refused(model)
    assert load(save_vit(tmp_path, image_size=16)).revision == revision
    path.write_text(json.dumps({**settings, "image_mean": [0.1, 0.2, 0.3]}))
    assert load(model).revision != revision
    path.unlink()
    assert "has no image processor that can be loaded" in refused(model)
    assert "makes 3x16x16 of an image in colour, and the model reads 1 channels" in refused(
        save_vit(tmp_path / "grey", num_channels=1)
    )


def test_the_command_says_what_does_not_go_together(
    vit: Path, squares: Path, tiny_bert: Path, tiny_data: Path, tmp_path: Path, cli: Any
) -> None:
    for model, data, code, told in (
        (tiny_bert, squares, 4, "cannot use for image classification"),
        (vit, tiny_data, 4, "cannot use for sequence classification"),
    ):
        found = cli("search", "--model", model, "--data", data, "--budget", "4k", "--studies-dir", tmp_path)
        assert found.code == code and told in found.err.replace("\n", " ")


# -- from images to answers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(
    vit: Path, squares: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An export, and the report of its search."""
    folder = tmp_path_factory.mktemp("searched")
    settings: dict[str, Any] = {"model": str(vit), "data": str(squares), "budget": "6k", "trials": 1}
    settings |= {"steps": 240, "batch_size": 16, "name": "one", "studies_dir": str(folder / "studies")}
    report = search(load_config(None, {**settings, "space": {"learning_rate": 3e-3}})).report
    return export("one", folder / "adapter", studies_dir=folder / "studies"), report


def test_training_sees_what_the_frozen_base_does_not(searched: tuple[Path, dict[str, Any]]) -> None:
    _, report = searched
    frozen = report["result"]["references"]["frozen_base"]["test"]["accuracy"]
    assert frozen < 0.7 and report["result"]["test"]["accuracy"] > frozen + 0.2
    assert report["best"]["trainable_parameters"] <= 6_000


def test_plain_peft_gives_the_same_logits(searched: tuple[Path, dict[str, Any]], squares: Path) -> None:
    folder, report = searched
    facts = json.loads((folder / FACTS).read_text())
    assert (facts["task"], facts["task_type"]) == ("image-classification", None)
    assert "autorank" not in loading_lines(facts, "x").replace(FACTS, "")
    made: dict[str, Any] = {}
    exec(loading_lines(facts, str(folder)), made)
    model = made["model"].eval()
    assert model.base_model.model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    head = "base_model.model.classifier.weight"
    saved = load_file(folder / "adapter_model.safetensors")[head]
    assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, saved)
    data = read_data(str(squares), eval_fraction=0.1, seed=0)
    opened = [Image.open(row["image"].name) for row in data.test]
    with torch.no_grad():
        logits = model(**made["processor"](images=opened, return_tensors="pt")).logits
        predictor = Predictor.open(folder, facts, restore_task(facts, data), device="cpu")
        examples = TASK.encode(data.test, predictor.base.processor, 1).examples
        own = predictor.base.model(**TASK.collate(examples, 0).inputs).logits
    torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-4)
    told = [data.test[at]["label"] == TASK.labels[index] for at, index in enumerate(logits.argmax(-1))]
    assert sum(told) / len(told) == pytest.approx(report["result"]["test"]["accuracy"])
    assert evaluate_export(folder, str(squares))["scores"] == pytest.approx(
        report["result"]["test"], abs=1e-5
    )


def test_the_card_speaks_of_images(searched: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = searched
    card = (folder / "README.md").read_text()
    assert "AutoModelForImageClassification" in card and "AutoImageProcessor" in card
    facts = json.loads((folder / FACTS).read_text())
    for text in (card, training_lines(facts, "x"), loading_lines(facts)):
        assert "okenizer" not in text and "texts" not in text
    assert "# 240 steps of 16 rows\n" in training_lines(facts, "x")
    assert (folder / "preprocessor_config.json").is_file()


def test_images_without_labels_are_answered(
    searched: tuple[Path, dict[str, Any]], squares: Path, tmp_path: Path
) -> None:
    folder, report = searched
    right = 0
    for colour in COLOURS:
        out = tmp_path / f"{colour}.jsonl"
        found = predict_export(folder, str(squares / "test" / colour), out)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert found["answered"] == 20 and [set(row) for row in rows] == [{"image", "prediction"}] * 20
        assert rows[3]["image"] == str(squares / "test" / colour / "003.png")
        right += sum(row["prediction"] == colour for row in rows)
        assert ask(folder, image=f"Image.open({rows[3]['image']!r})") == rows[3]["prediction"]
    assert right / 60 == pytest.approx(report["result"]["test"]["accuracy"])


def test_images_in_a_table_are_answered_and_not_printed(
    searched: tuple[Path, dict[str, Any]], squares: Path, tmp_path: Path
) -> None:
    import datasets

    folder, _ = searched
    paths = sorted((squares / "test" / "red").iterdir())[:5]
    rows = [{"id": n, "image": {"bytes": path.read_bytes(), "path": None}} for n, path in enumerate(paths)]
    held = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    held.to_parquet(tmp_path / "rows.parquet")
    predict_export(folder, str(tmp_path / "rows.parquet"), tmp_path / "out.jsonl")
    predict_export(folder, str(squares / "test" / "red"), tmp_path / "same.jsonl")
    found, same = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "same.jsonl")
    )
    assert [row["prediction"] for row in found] == [row["prediction"] for row in same[:5]]
    assert found[2] == {"id": 2, "image": {"bytes": None, "path": None}, "prediction": found[2]["prediction"]}


def test_rows_hold_no_pixels(vit: Path, squares: Path) -> None:
    data = read_data(str(squares), eval_fraction=0.1, seed=0)
    example = TASK.encode(data.train[:1], load(vit).processor, 1).examples[0]
    assert example.picture is not None and isinstance(example.picture.image, ImageFile)
    assert example.picture.image.content is None and example.input_ids == []
    first, again = example.picture.pixels(), example.picture.pixels()
    assert first is not again and torch.equal(first, again)
