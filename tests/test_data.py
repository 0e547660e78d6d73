"""Reading data sets: formats, splits, places and what is refused."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.data import DataSet, _cut, _input_key, build_data, read_data
from autorank.errors import CommandError, DataError
from autorank.quickstart import stdlib_docs

ROWS = [{"text": f"text {index}", "label": "ab"[index % 2]} for index in range(20)]


def read(source: object, eval_fraction: float = 0.1, seed: int = 0) -> DataSet:
    return read_data(str(source), eval_fraction=eval_fraction, seed=seed)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".jsonl", "JSONL"), (".json", "JSONL"), (".csv", "CSV"), (".parquet", "Parquet")]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, kind: str) -> None:
    rows = [
        {"text": 'with "quotes", commas\nand lines', "label": 3},
        {"text": "NA", "label": 0},
        {"text": "ünïcode 007", "label": 1},
    ]
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}{suffix}", rows)
    data = read(tmp_path)
    assert data.format == f"{kind} folder"
    assert data.train == data.validation == data.test == tuple(rows)
    assert data.columns == ("text", "label")
    same = read_data(str(tmp_path), eval_fraction=0.3, seed=5)
    assert data.sha256 == same.sha256 == build_data("x", data.splits).sha256


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_folders_validation_split_has_many_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / f"{name}.csv", ROWS[:1])
    write(tmp_path / "notes.txt", [])
    data = read(tmp_path)
    assert data.validation == tuple(ROWS[:1])
    assert data.test == ()
    assert data.format == "JSONL and CSV folder"
    assert data.notes[0] == "no test split: the result is checked on validation only"


def test_the_hash_is_of_the_rows_and_their_splits() -> None:
    base = build_data("a", {"train": [{"x": 1, "y": 2}], "validation": [{"x": 3}]})
    assert base.sha256 == build_data("b", {"train": [{"y": 2, "x": 1}], "validation": [{"x": 3}]}).sha256
    others = [
        {"train": [{"x": 1, "y": 2}], "validation": [{"x": 4}]},
        {"train": [{"x": 1, "y": 2}, {"x": 3}], "validation": [{"x": 3}]},
        {"train": [{"x": 1, "y": 2}], "validation": [{"x": 3}], "test": [{"x": 3}]},
        {"train": [{"x": "1", "y": 2}], "validation": [{"x": 3}]},
    ]
    assert len({build_data("a", other).sha256 for other in others} | {base.sha256}) == 5


def test_a_single_file_is_cut_into_three_disjoint_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", ROWS)
    data = read(path, 0.2)
    assert data.format == "JSONL file"
    assert [len(rows) for rows in data.splits.values()] == [12, 4, 4]
    assert sorted(row["text"] for rows in data.splits.values() for row in rows) == sorted(
        row["text"] for row in ROWS
    )
    for rows in data.splits.values():
        counts = Counter(row["label"] for row in rows)
        assert counts["a"] == counts["b"]
    assert data.notes == ("of 20 train rows, 4 for validation and 4 for test (eval-fraction 0.2, seed 0)",)


def test_the_cut_follows_the_seed_and_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", ROWS)
    first, again, other = read(path, 0.2), read(path, 0.2), read(path, 0.2, seed=1)
    assert first == again
    assert first.sha256 != other.sha256
    for rows in first.splits.values():
        assert [ROWS.index(row) for row in rows] == sorted(ROWS.index(row) for row in rows)


def test_only_what_is_missing_is_cut(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [{"text": "other", "label": "a"}])
    data = read(tmp_path, 0.6)
    assert [len(rows) for rows in data.splits.values()] == [8, 12, 1]


def test_places_survive_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    data = read(path, 0.2)
    for split, rows in data.splits.items():
        for index, row in enumerate(rows):
            assert data.where(split, index) == f"{path}:{2 * ROWS.index(row) + 1}"


def test_places_of_csv_are_lines_and_of_parquet_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [{"text": "two\nlines"}, {"text": "b"}])
    write(tmp_path / "dev.parquet", [{"text": "c"}, {"text": "d"}])
    data = read(tmp_path)
    assert data.where("train", 1) == f"{tmp_path / 'train.csv'}:4"
    assert data.where("validation", 1) == f"{tmp_path / 'dev.parquet'}, row 2"
    assert build_data("x", data.splits).where("train", 1) == "train, row 2"


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    texts=st.integers(1, 60),
    size=st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_cut_keeps_inputs_together_and_every_class_in_train(
    labels: list[int], texts: int, size: int, seed: int
) -> None:
    rows = [{"text": f"t{index % texts}", "label": label} for index, label in enumerate(labels)]
    first, second = _cut(rows, size, 2, seed)
    left = sorted(set(range(len(rows))) - set(first) - set(second))
    assert not set(first) & set(second)
    parts = [{rows[index]["text"] for index in part} for part in (first, second, left)]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert {rows[index]["label"] for index in left} == set(labels)


@given(counts=st.lists(st.integers(10, 60), min_size=2, max_size=5), seed=st.integers(0, 3))
def test_cut_gives_each_class_its_share(counts: list[int], seed: int) -> None:
    rows = [
        {"text": f"{label} {n}", "label": label} for label, count in enumerate(counts) for n in range(count)
    ]
    size = round(0.2 * len(rows))
    for sample in _cut(rows, size, 2, seed):
        assert len(sample) == size
        found = Counter(rows[index]["label"] for index in sample)
        for label, count in enumerate(counts):
            assert abs(found[label] - size * count / len(rows)) <= 2


def test_the_input_is_what_a_task_reads() -> None:
    assert _input_key({"text": "a", "label": 1, "id": 7}) == _input_key({"text": "a", "label": 2})
    assert _input_key({"prompt": "a", "completion": "b"}) == _input_key({"prompt": "a", "completion": "c"})
    assert _input_key({"source": "a", "target": "b"}) == _input_key({"source": "a", "target": "c"})
    assert _input_key({"text_a": "a", "text_b": "b"}) != _input_key({"text_a": "a", "text_b": "c"})


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "same", "other"),
    [
        ({"messages": CHAT}, {"messages": [CHAT[0], {"role": "assistant", "content": "b"}], "id": 1},
         {"messages": [CHAT[1], CHAT[1]]}),
        ({"messages": CHAT + CHAT}, {"messages": [*CHAT, CHAT[0], {"role": "assistant", "content": "b"}]},
         {"messages": CHAT}),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "input": "", "output": "c"},
         {"instruction": "a", "input": "x", "output": "b"}),
        ({"source": "a", "target": "b"}, {"source": "a", "target": "c"}, {"source": "b", "target": "b"}),
        ({"question": "a", "context": "b", "answers": ["c"]}, {"question": "a", "context": "b"},
         {"question": "a", "context": "c", "answers": ["c"]}),
        ({"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["a", "b"], "tags": ["O", "X"]},
         {"tokens": ["a b"], "tags": ["O"]}),
        ({"text": "a", "source": "web"}, {"text": "a", "source": "book"}, {"text": "b", "source": "web"}),
        ({"text": "a", "question": 1}, {"text": "a", "question": 2}, {"text": "b", "question": 1}),
        ({"messages": "m"}, {"messages": "m", "id": 1}, {"messages": "n"}),
        *(({"text": "a", "label": 0, **more}, {"text": "a", "label": 1}, {"text": "b", "label": 0, **more})
          for more in ({"prompt": "tell"}, {"source": "web", "target": "web"}, {"messages": []},
                       {"question": "q", "context": "c"}, {"instruction": "i", "output": "o"})),
        ({"text_a": "a", "text_b": "b", "score": 1.0, "prompt": "p"}, {"text_a": "a", "text_b": "b"},
         {"text_a": "b", "text_b": "b", "score": 1.0, "prompt": "p"}),
    ],
)  # fmt: skip
def test_the_input_of_every_shape(row: dict[str, Any], same: dict[str, Any], other: dict[str, Any]) -> None:
    assert _input_key(row) == _input_key(same)
    assert _input_key(row) != _input_key(other)


def test_overlaps_are_told_of_mapped_columns_and_of_chats(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"q": f"t{n}", "klass": n % 2} for n in range(4)])
    write(tmp_path / "dev.jsonl", [{"q": "t1", "klass": 0}, {"q": "t9", "klass": 1}])
    told = "1 of 2 validation rows have an input that is also in train"
    assert told in mapped(tmp_path, text="q", label="klass").notes
    assert told not in read(tmp_path).notes
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    write(tmp_path / "train.jsonl", [{"conversations": turns}])
    write(tmp_path / "dev.jsonl", [{"messages": [CHAT[0], {"role": "assistant", "content": "b"}]}])
    assert "1 of 1 validation rows have an input that is also in train" in read(tmp_path).notes


def test_shapes_are_read_from_every_source(tmp_path: Path) -> None:
    rows = [
        {"dialog": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]} for n in range(9)
    ]
    data = mapped(write(tmp_path / "all.parquet", rows), messages="dialog")
    assert data.columns == ("messages",)
    assert data.train[0]["messages"][1] == {"role": "assistant", "content": "a"}
    assert data.notes[:2] == (
        "columns: messages is read from dialog",
        "shape: ShareGPT chat, turns of from and value",
    )
    rows[4]["dialog"][1]["from"] = "bot"
    path = write(tmp_path / "all.jsonl", rows)
    with pytest.raises(DataError, match=r"all\.jsonl:5: field 'messages\[1\]\.from' is 'bot'; roles are"):
        mapped(path, messages="dialog")


def test_rows_in_two_splits_are_told() -> None:
    data = build_data("x", {"train": ROWS, "validation": ROWS[:3], "test": ROWS[2:3]})
    assert data.notes == (
        "3 of 3 validation rows have an input that is also in train",
        "1 of 1 test rows have an input that is also in train",
        "1 of 1 test rows have an input that is also in validation",
    )


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.0, -1.0])
def test_an_eval_fraction_that_leaves_nothing_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(CommandError, match=r"must be over 0 and under 0\.5"):
        read(write(tmp_path / "all.jsonl", ROWS), fraction)


def test_too_few_rows_to_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 train rows, too few or too alike to cut validation and test"):
        read(write(tmp_path / "all.jsonl", ROWS[:2]))


def test_rows_with_free_numbers_are_cut_too(tmp_path: Path) -> None:
    rows = [{"text": f"text {index}", "label": index / 7} for index in range(20)]
    assert len(read(write(tmp_path / "all.jsonl", rows)).validation) == 2


def mapped(folder: Path, **columns: str) -> DataSet:
    return read_data(str(folder), eval_fraction=0.2, seed=0, columns=columns)


def test_columns_take_the_names_of_their_roles(tmp_path: Path) -> None:
    rows = [{"id": n, "text": n, "question": f"q{n}", "intent": "xy"[n % 2], "label": 0} for n in range(20)]
    plain = [{"id": row["id"], "text": row["question"], "label": row["intent"]} for row in rows]
    data = mapped(write(tmp_path / "all.jsonl", rows), text="question", label="intent")
    assert data.columns == ("id", "text", "label")
    assert [*data.train, *data.validation, *data.test] != plain
    assert sorted(([*data.train, *data.validation, *data.test]), key=lambda row: row["id"]) == plain
    assert data.notes[:3] == (
        "columns: text is read from question, label is read from intent",
        "the data's own column text is left out, for text is read from question",
        "the data's own column label is left out, for label is read from intent",
    )
    same = read(write(tmp_path / "plain.jsonl", plain), 0.2)
    assert data.sha256 == same.sha256
    assert data.notes[3:] == same.notes


def test_columns_can_change_places(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", [{"text": "class", "label": f"text of {split}", "n": 1}])
    data = mapped(tmp_path, text="label", label="text")
    assert data.train == ({"label": "class", "text": "text of train", "n": 1},)
    assert data.notes[0] == "columns: text is read from label, label is read from text"
    assert len(data.notes) == 2


def test_a_row_without_a_mapped_column_keeps_its_place(tmp_path: Path) -> None:
    rows = [{"a": f"t{n}", "label": n % 2} for n in range(8)]
    del rows[3]["a"]
    write(tmp_path / "train.jsonl", rows)
    data = mapped(write(tmp_path / "dev.jsonl", rows).parent, text="a")
    assert data.train[3] == {"label": 1}
    assert data.where("train", 3).endswith("train.jsonl:4")


def test_numbers_in_a_mapped_csv_column_are_numbers(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [{"text": "a", "label": "1", "stars": "4", "grade": "0.5"}])
    write(tmp_path / "dev.csv", [{"text": "b", "label": "1", "stars": "5", "grade": "1"}])
    data = mapped(tmp_path, label="stars", score="grade")
    assert data.train == ({"text": "a", "label": 4, "score": 0.5},)
    assert data.validation == ({"text": "b", "label": 5, "score": 1},)


def test_a_column_that_is_not_there_is_refused_with_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"question": "a", "intent": "b", "label": 1}])
    write(tmp_path / "dev.jsonl", [{"question": "a", "label": 1}])
    with pytest.raises(DataError, match=r"train\.jsonl: no column 'questoin', which is to be the text; "
                       r"the train rows have question, intent, label: do you mean question\?"):  # fmt: skip
        mapped(tmp_path, text="questoin")
    with pytest.raises(DataError, match="the train rows have question, intent, label: correct --columns"):
        mapped(tmp_path, text="zzzz")
    with pytest.raises(DataError, match=r"dev\.jsonl: no column 'intent'.* the validation rows have quest"):
        mapped(tmp_path, label="intent")


def test_built_in_rows_are_those_of_the_quickstart() -> None:
    data = read("builtin:stdlib-docs")
    assert [list(rows) for rows in data.splits.values()] == list(stdlib_docs())
    assert data.columns == ("text", "label")
    assert data.notes == ()
    assert data.where("test", 0) == "builtin:stdlib-docs test, row 1"


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./data", "no/such/folder", "data.csv", "~/x", "a b", ""]
)
def test_a_missing_path_is_no_hub_id(source: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder; give a folder|no train file"):
        read(source)


@pytest.mark.parametrize("source", ["owner/missing", "missing", "owner/missing:config"])
def test_a_hub_id_out_of_reach_is_one_error(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder here, and loading it from the hub failed"):
        read(source)


def test_an_unknown_built_in_names_the_one_there_is() -> None:
    with pytest.raises(DataError, match="the built-in data set is builtin:stdlib-docs"):
        read("builtin:imdb")


def test_folders_that_are_no_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train file found \(no files\)"):
        read(tmp_path)
    write(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"no train file found \(data\.jsonl\)"):
        read(tmp_path)
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "val.csv", ROWS)
    write(tmp_path / "dev.jsonl", ROWS)
    with pytest.raises(DataError, match=r"dev\.jsonl, val\.csv would all be the validation split"):
        read(tmp_path)


def test_empty_splits_are_refused() -> None:
    with pytest.raises(DataError, match="the validation split has no rows"):
        build_data("x", {"train": ROWS})
    with pytest.raises(DataError, match="the train split has no rows"):
        build_data("x", {"validation": ROWS})


def test_real_folders_are_read(shared: Path) -> None:
    data = read(shared / "data" / "banking77")
    assert [len(rows) for rows in data.splits.values()] == [5000, 1000, 2000]
    assert data.notes == ()
    assert read(shared / "data" / "gsm8k").columns == ("prompt", "completion")


def test_answers_in_words_in_the_label_column_are_no_classes(tmp_path: Path) -> None:
    rows = [{"text": f"question {n}", "label": f"answer {n % 95}"} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_data(str(tmp_path / "rows.jsonl"), eval_fraction=0.1, seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 10, 10)


def test_what_is_neither_file_nor_folder_is_not_told_to_be_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    for name in ("rows.jsonl", "gone.jsonl"):
        with pytest.raises(DataError, match=rf"{name}': neither a file nor a folder; give the file"):
            read(tmp_path / name)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/rows.jsonl", "a" * 300, f"/{'a' * 300}/b.csv"])
def test_a_path_that_no_file_can_have_is_one_error(source: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder|cannot be read \(File name too long\)"):
        read(source)


def test_a_misspelt_file_is_told_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("text,score\na,1\n")
    with pytest.raises(DataError, match=r"no such file or folder, but there is .*ratings\.csv; give"):
        read_data(f"{tmp_path}/ratngs.csv", eval_fraction=0.1, seed=0)
    with pytest.raises(DataError, match=r"no such file or folder; give a folder"):
        read_data(f"{tmp_path}/other.csv", eval_fraction=0.1, seed=0)


def test_data_that_the_memory_does_not_hold_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    monkeypatch.setattr("autorank.readers.json.loads", full)
    with pytest.raises(DataError, match=r"rows\.jsonl' take more memory than there is: give fewer rows"):
        read_data(str(path), eval_fraction=0.1, seed=0)
