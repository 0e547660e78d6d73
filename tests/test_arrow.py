"""Arrow tables: Parquet files, saved folders and the hub's splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autorank.arrow import parts_of, read_parquet
from autorank.data import DataSet, read_data
from autorank.errors import DataError


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


def test_hub_splits_are_named_and_hidden_labels_left_out() -> None:
    datasets = pytest.importorskip("datasets")
    parts, notes = parts_of(
        "o/n",
        datasets.DatasetDict(train=saved([1, 0]), dev=saved([0]), test=saved([-1, -1]), other=saved([1])),
    )
    assert {split: [row["label"] for row in part.rows] for split, part in parts.items()} == {
        "train": ["yes", "no"],
        "validation": ["no"],
    }
    assert parts["validation"].places[0] == "o/n dev, row 1"
    assert notes == ["the test split's labels are hidden (-1): it is left out"]
    with pytest.raises(DataError, match="has no train split; it has test"):
        parts_of("o/n", datasets.DatasetDict(test=saved([1])))


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
    parts, _ = parts_of("o/n", datasets.DatasetDict(train=rows))
    assert [row["tags"] for row in parts["train"].rows] == [["O", "LOC"], [-1]]


def test_hidden_labels_are_seen_in_the_column_that_is_mapped() -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=saved([0, 1]), test=saved([-1, -1])).rename_column("label", "intent")
    parts, notes = parts_of("o/n", splits, label="intent")
    assert list(parts) == ["train"]
    assert notes == ["the test split's labels are hidden (-1): it is left out"]
