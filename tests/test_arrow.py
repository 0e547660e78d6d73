"""Arrow tables: Parquet files, saved folders and the hub's splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autorank.arrow import parts_of, read_parquet
from autorank.data import DataSet, read_data, read_rows
from autorank.errors import DataError
from autorank.tasks import choose_task


def read(source: object) -> DataSet:
    return read_data(str(source), eval_fraction=0.25, seed=0)


def saved(labels: list[int]) -> Any:
    """A `Dataset` with named classes."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    content = {"text": [f"t{index}" for index in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(content, features=features)


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"nope")
    with pytest.raises(DataError, match=r"train\.parquet: not a Parquet file that can be read"):
        read(path)


def test_parquet_of_another_writer_may_have_types_that_datasets_has_not(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    facts = pyarrow.array([[("lang", "en")], []], type=pyarrow.map_(pyarrow.string(), pyarrow.string()))
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["x", "y"], "facts": facts}), path)
    assert [row["label"] for row in read_parquet(path).rows] == ["x", "y"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["text", "label", "text"])
    parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"train\.parquet: its schema names a column twice: text, label, te"):
        read_parquet(path)


def test_parquet_written_by_datasets_keeps_its_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from pyarrow import parquet

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).data.table
    for split in ("train", "dev"):
        parquet.write_table(
            table.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / f"{split}.parquet"
        )
    assert [row["label"] for row in read(tmp_path).train] == ["yes", "no"]


def test_hub_splits_are_named_and_others_left_out() -> None:
    datasets = pytest.importorskip("datasets")
    parts = parts_of(
        "o/n",
        datasets.DatasetDict(train=saved([1, 0]), dev=saved([0]), test=saved([-1, -1]), other=saved([1])),
    )
    assert {split: [row["label"] for row in part.rows] for split, part in parts.items()} == {
        "train": ["yes", "no"],
        "validation": ["no"],
        "test": [-1, -1],
    }
    assert parts["validation"].places[0] == "o/n dev, row 1"
    with pytest.raises(DataError, match="has no train split; it has other"):
        parts_of("o/n", datasets.DatasetDict(other=saved([1])))


def test_a_saved_set_of_splits_is_read_with_its_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=saved([1, 0]), valid=saved([0]), unsupervised=saved([1]))
    splits.save_to_disk(tmp_path / "set")
    data = read(tmp_path / "set")
    assert data.format == "Arrow folder"
    assert data.train == ({"text": "t0", "label": "yes"}, {"text": "t1", "label": "no"})
    assert data.validation == ({"text": "t0", "label": "no"},)
    assert data.where("validation", 0) == f"{tmp_path / 'set'} valid, row 1"


def test_a_saved_lone_set_is_cut_as_a_file_is(tmp_path: Path) -> None:
    rows = saved([0, 1] * 10).select(range(4, 20))
    rows.save_to_disk(tmp_path / "set")
    data = read(tmp_path / "set")
    assert data.format == "Arrow folder"
    assert [len(part) for part in data.splits.values()] == [8, 4, 4]
    texts = {row["text"] for part in data.splits.values() for row in part}
    assert texts == {f"t{index}" for index in range(4, 20)}


def test_a_broken_saved_folder_is_one_error(tmp_path: Path) -> None:
    saved([0, 1]).save_to_disk(tmp_path / "set")
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:40])
    with pytest.raises(DataError, match=r"set: not an Arrow folder that can be read .*; write it again"):
        read(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(DataError, match="set: not an Arrow folder that can be read"):
        read(tmp_path / "set")


def test_a_set_without_rows_is_refused() -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="set: no rows in its dev split; a split needs at least one"):
        parts_of("set", datasets.DatasetDict(train=saved([0]), dev=saved([])))


def test_a_class_that_the_schema_does_not_name_stays_a_number(tmp_path: Path) -> None:
    from pyarrow import parquet

    table = saved([0, 1]).data.table
    table = table.set_column(1, table.schema.field(1), [[7, 1]])
    parquet.write_table(table, tmp_path / "train.parquet")
    assert [row["label"] for row in read_parquet(tmp_path / "train.parquet").rows] == [7, "yes"]


def test_lists_of_classes_are_named_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")),
        tags=datasets.List(datasets.ClassLabel(names=["O", "LOC"])),
    )
    content = {"tokens": [["in", "Bonn"], ["a"]], "tags": [[0, 1], [-1]]}
    rows = datasets.Dataset.from_dict(content, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    assert [row["tags"] for row in read_parquet(tmp_path / "train.parquet").rows] == [["O", "LOC"], [-1]]
    parts = parts_of("o/n", datasets.DatasetDict(train=rows))
    assert [row["tags"] for row in parts["train"].rows] == [["O", "LOC"], [-1]]


FORMS = ("parquet file", "parquet folder", "saved set", "saved splits")


def stored(form: str, folder: Path, rows: Any) -> Path:
    """The path of a `Dataset` that is stored in that form."""
    datasets = pytest.importorskip("datasets")
    path = folder / "rows.parquet" if form == "parquet file" else folder / "rows"
    if form == "parquet file":
        rows.to_parquet(path)
    elif form == "parquet folder":
        path.mkdir()
        for split in ("train", "dev"):
            rows.to_parquet(path / f"{split}.parquet")
    elif form == "saved set":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict(train=rows, validation=rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("kind", ["one", "List", "Sequence", "LargeList", "fixed", "tags"])
def test_classes_have_their_names_in_every_form(tmp_path: Path, form: str, renamed: bool, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["no", "yes"])
    features: dict[str, Any] = {
        "one": names,
        "List": datasets.List(names),
        "Sequence": datasets.Sequence(names),
        "LargeList": datasets.LargeList(names),
        "fixed": datasets.List(names, length=2),
        "tags": datasets.List(names),
    }
    target, given = ("tags", "tokens") if kind == "tags" else ("label", "text")
    column = f"my {target}" if renamed else target
    text = datasets.List(datasets.Value("string")) if kind == "tags" else datasets.Value("string")
    labels: list[Any] = [index % 2 for index in range(12)]
    if kind != "one":
        labels = [[label, 1] for label in labels]
    content = {
        given: [["a", f"t{n}"] if kind == "tags" else f"t{n}" for n in range(12)],
        column: labels,
    }
    rows = datasets.Dataset.from_dict(content, datasets.Features({given: text, column: features[kind]}))
    columns = {target: column} if renamed else None
    data = read_data(str(stored(form, tmp_path, rows)), eval_fraction=0.25, seed=0, columns=columns)
    found = [row[target] for row in (*data.train, *data.validation)]
    expected = ["no", "yes"] if kind == "one" else [["no", "yes"], ["yes", "yes"]]
    assert all(value in expected for value in found) and all(value in found for value in expected)
    task, _ = choose_task("auto", data)
    tasks = {"one": "text-classification", "tags": "token-classification"}
    assert task.name == tasks.get(kind, "multi-label-classification")
    assert task.labels == ("no", "yes")


def test_names_are_found_in_objects_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    role = datasets.ClassLabel(names=["user", "assistant"])
    features = datasets.Features(
        messages=datasets.List({"role": role, "content": datasets.Value("string")}), meta={"kind": role}
    )
    turns = [{"role": 0, "content": "a"}, {"role": 1, "content": "b"}]
    content = {"messages": [turns, None], "meta": [{"kind": 1}, None]}
    datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / "rows.parquet")
    first, second = read_parquet(tmp_path / "rows.parquet").rows
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]
    assert first["meta"] == {"kind": "assistant"}
    assert second["messages"] is None


@pytest.mark.parametrize("column", ["label", "intent"])
def test_a_test_split_of_hidden_labels_is_left_out_of_a_search_and_answered(
    tmp_path: Path, column: str
) -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=saved([0, 1] * 8), dev=saved([0]), test=saved([-1, -1]))
    if column != "label":
        splits = splits.rename_column("label", column)
    splits.save_to_disk(tmp_path / "set")
    columns = {"label": column}
    data = read_data(str(tmp_path / "set"), eval_fraction=0.2, seed=0, columns=columns)
    assert not data.test and "the test split's labels are hidden (-1): it is left out" in data.notes
    rows = read_rows(str(tmp_path / "set"), columns=columns)
    assert [row["label"] for row in rows.test] == [-1, -1] and rows.format == "Arrow folder, test split"
