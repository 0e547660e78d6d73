"""Data sets: from a folder, a file, a hub id or a built-in name to rows in three splits.

The only home of `datasets`. Rows are checked for being rows at all; which columns a task needs and
what they may hold is the task's business. Nothing is tokenised, shuffled or written here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autorank.errors import CommandError, DataError, first_line
from autorank.quickstart import DATA_NAME, stdlib_docs

__all__ = ["SPLITS", "DataSet", "Places", "Row", "build_data", "read_data"]

Row = dict[str, Any]

SPLITS = ("train", "validation", "test")

_SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_FORMATS = {".jsonl": "JSONL", ".json": "JSONL", ".csv": "CSV", ".parquet": "Parquet"}
_KNOWN_FILES = "JSON lines (.jsonl, .json), CSV (.csv) or Parquet (.parquet)"
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>\w[\w.-]*))?", re.ASCII)
_HUB_TIMEOUT_S = 10.0
_WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)
_DECIMAL = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Places:
    """Where the rows of a split came from: a file, and a line or row number for each row."""

    file: str
    numbers: Sequence[int]
    lines: bool

    def __getitem__(self, index: int) -> str:
        number = self.numbers[index]
        return f"{self.file}:{number}" if self.lines else f"{self.file}, row {number}"

    def take(self, indices: Iterable[int]) -> Places:
        """The places of some of the rows."""
        return Places(self.file, [self.numbers[index] for index in indices], self.lines)


@dataclass(frozen=True)
class _Part:
    """The rows of a split, and where each came from."""

    rows: list[Row]
    places: Places

    def take(self, indices: Sequence[int]) -> _Part:
        return _Part([self.rows[index] for index in indices], self.places.take(indices))


@dataclass(frozen=True)
class DataSet:
    """Rows in three splits. `test` may be empty; `train` and `validation` are not.

    Attributes:
        source: what was asked for.
        format: the format found, for people, such as "JSONL folder".
        columns: the columns of the train rows, in the order in which they first occur.
        sha256: of the rows of all splits in their order, as canonical JSON; where the rows were
            stored, and how, is no part of it.
        notes: what a person should know of how the splits came about, a line each.
        places: where each split's rows came from.
    """

    source: str
    format: str
    columns: tuple[str, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    sha256: str
    notes: tuple[str, ...] = ()
    places: Mapping[str, Places] = field(default_factory=dict, repr=False, compare=False)

    @property
    def splits(self) -> dict[str, tuple[Row, ...]]:
        """The splits by name, the empty ones too."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def where(self, split: str, index: int) -> str:
        """The place of a row, for messages: `train.jsonl:17`, or the split and its row number."""
        return self.places[split][index] if split in self.places else f"{split}, row {index + 1}"


def read_data(source: str, *, eval_fraction: float, seed: int) -> DataSet:
    """Read a data set.

    Args:
        source: a folder with a file per split (train; validation, valid, val or dev; test), a single
            file, a dataset's id on the hub (`owner/name`, or `owner/name:config`), or
            `builtin:stdlib-docs`.
        eval_fraction: how much of train becomes the validation split where there is none. Where
            there is neither validation nor test, a test split of the same size is cut too.
        seed: which rows these are. Rows with the same input stay together, and each class keeps its
            share and at least one input in train.

    Raises:
        DataError: the data set cannot be found or read, or a split is empty.
        CommandError: `eval_fraction` is needed and out of range.
    """
    kind, parts, notes = _read_parts(source)
    parts, cut_notes = _complete(source, parts, eval_fraction, seed)
    rows = {split: part.rows for split, part in parts.items()}
    places = {split: part.places for split, part in parts.items()}
    return build_data(source, rows, kind=kind, notes=(*notes, *cut_notes), places=places)


def build_data(
    source: str,
    splits: Mapping[str, Sequence[Row]],
    *,
    kind: str = "rows",
    notes: Sequence[str] = (),
    places: Mapping[str, Places] | None = None,
) -> DataSet:
    """A data set of rows at hand, with its hash and the notes that its rows give reason for.

    Raises:
        DataError: train or validation has no rows.
    """
    for split in ("train", "validation"):
        if not splits.get(split):
            raise DataError(f"{source}: the {split} split has no rows; at least one is needed")
    columns = tuple(dict.fromkeys(column for row in splits["train"] for column in row))
    train, validation, test = (tuple(splits.get(split, ())) for split in SPLITS)
    return DataSet(
        source=source,
        format=kind,
        columns=columns,
        train=train,
        validation=validation,
        test=test,
        sha256=_hash({"train": train, "validation": validation, "test": test}),
        notes=(*notes, *_overlaps(train, validation, test)),
        places=places or {},
    )


def _read_parts(source: str) -> tuple[str, dict[str, _Part], list[str]]:
    """The format, the splits that the source has, and notes."""
    if source.startswith("builtin:"):
        return _read_builtin(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        kind, part = _read_file(path)
        return f"{kind} file", {"train": part}, []
    looks_local = path.suffix.lower() in _FORMATS or source.startswith((".", "~", "/")) or "\\" in source
    match = _HUB_ID.fullmatch(source)
    if match is None or looks_local:
        raise DataError(
            f"data {source!r}: no such file or folder; give a folder with train and validation files, "
            f"a file, an id on the hub, or {DATA_NAME}"
        )
    return _read_hub(source, match["name"], match["config"])


def _read_builtin(source: str) -> tuple[str, dict[str, _Part], list[str]]:
    """The splits of an embedded data set."""
    if source != DATA_NAME:
        raise DataError(f"data {source!r} is not built in; the built-in data set is {DATA_NAME}")
    parts = {
        split: _Part(rows, Places(f"{source} {split}", range(1, len(rows) + 1), lines=False))
        for split, rows in zip(SPLITS, stdlib_docs(), strict=True)
    }
    return "docstrings of this Python's standard library", parts, []


def _read_folder(folder: Path) -> tuple[str, dict[str, _Part], list[str]]:
    """The splits of a folder that holds one file for each."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    parts: dict[str, _Part] = {}
    kinds: list[str] = []
    for split, names in _SPLIT_NAMES.items():
        found = [path for path in files if path.stem in names and path.suffix.lower() in _FORMATS]
        if len(found) > 1:
            listed = ", ".join(path.name for path in found)
            raise DataError(f"{folder}: {listed} would all be the {split} split; keep one of them")
        if found:
            kind, parts[split] = _read_file(found[0])
            kinds.append(kind)
    if "train" not in parts:
        listed = ", ".join(path.name for path in files[:10]) or "no files"
        raise DataError(
            f"{folder}: no train file found ({listed}); name the splits train, validation and test, "
            f"as {_KNOWN_FILES}"
        )
    return f"{' and '.join(dict.fromkeys(kinds))} folder", parts, []


def _read_file(path: Path) -> tuple[str, _Part]:
    """The rows of one file, by its extension."""
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: the extension {path.suffix!r} is not known; files are {_KNOWN_FILES}")
    try:
        if kind == "Parquet":
            part = _read_parquet(path)
        else:
            pairs = list(_read_jsonl(path) if kind == "JSONL" else _read_csv(path))
            part = _Part(
                [row for _, row in pairs], Places(str(path), [line for line, _ in pairs], lines=True)
            )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not part.rows:
        raise DataError(f"{path}: no rows in it; a split needs at least one")
    return kind, part


def _decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with their ends, a byte order mark left out."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.startswith(b"\x1f\x8b"):
                raise DataError(f"{path}: compressed with gzip; unpack it first")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1}); "
                    "save the file as UTF-8"
                ) from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number and row of each line that is not blank."""
    for number, line in enumerate(_decoded_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise DataError(f"{path}:{number}: nested too deeply; write one flat object per line") from None
        except ValueError as error:
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            hint = "; a JSON array must be written as one object per line" if line.startswith("[") else ""
            raise DataError(f"{path}:{number}: not a JSON object on one line ({what}){hint}") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{number}: found {type(row).__name__}; each line must be one JSON object, "
                'such as {"text": "…", "label": "…"}'
            )
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number and row of each record; the first line names the columns.

    All values are text, except that a `label` column of whole numbers is read as integers, and one
    of other numbers as floats.
    """
    reader = csv.reader(_decoded_lines(path), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"{path}:1: the header names a column twice or not at all: {', '.join(header)}")
        rows = []
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(f"{path}:{line}: {len(values)} fields, the header names {len(header)}")
            if values:
                rows.append((line, dict(zip(header, values, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f'{path}:{reader.line_num}: not CSV ({error}); quote fields with "…"') from None
    number = _number_type([row["label"] for _, row in rows]) if "label" in header else str
    return (
        (line, {**row, "label": number(row["label"])} if number is not str else row) for line, row in rows
    )


def _number_type(values: Sequence[str]) -> type[str] | type[int] | type[float]:
    """What all of the values are, strictly: `007` is a name, `7` an integer and `7.0` a float."""
    if all(_WHOLE.fullmatch(value) for value in values):
        return int
    numbers = all(_WHOLE.fullmatch(value) or _DECIMAL.fullmatch(value) for value in values)
    return float if numbers else str


def _read_parquet(path: Path) -> _Part:
    """The rows of a Parquet file, class labels as names where the file holds them."""
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
        rows = _named_labels(table.to_pylist(), datasets.Features.from_arrow_schema(table.schema))
    except (ArrowException, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({first_line(error)})") from None
    return _Part(rows, Places(str(path), range(1, len(rows) + 1), lines=False))


def _read_hub(source: str, name: str, config: str | None) -> tuple[str, dict[str, _Part], list[str]]:
    """The splits of a data set on the hub, or of its copy in the hub's cache."""
    import datasets
    import huggingface_hub

    rule = f"data {source!r}: no such file or folder here, and"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # Loading retries for long where the hub is out of reach; this asks once.
            huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the libraries below raise too many kinds to name
        raise DataError(
            f"{rule} loading it from the hub failed: {first_line(error)} ({type(error).__name__}); check "
            "the name, give a local folder, or set HF_HUB_OFFLINE=1 to use a copy in the hub's cache"
        ) from error
    return _from_hub(source, loaded)


def _from_hub(source: str, loaded: Mapping[str, Any]) -> tuple[str, dict[str, _Part], list[str]]:
    """The splits that a loaded `DatasetDict` has; others are named in a note."""
    parts: dict[str, _Part] = {}
    notes: list[str] = []
    for split, names in _SPLIT_NAMES.items():
        found = next((name for name in names if name in loaded), None)
        if found is None:
            continue
        features = loaded[found].features
        rows = loaded[found].to_list()
        # Benchmarks hide their test labels as -1, which no class name belongs to.
        named = hasattr(features.get("label"), "int2str")
        if split == "test" and named and all(row["label"] == -1 for row in rows):
            notes.append("the test split's labels are hidden (-1): it is left out")
            continue
        rows = _named_labels(rows, features)
        parts[split] = _Part(rows, Places(f"{source} {found}", range(1, len(rows) + 1), lines=False))
    if "train" not in parts:
        raise DataError(f"data {source!r} has no train split; it has {', '.join(loaded) or 'none'}")
    return "hub data set", parts, notes


def _named_labels(rows: list[Row], features: Mapping[str, Any]) -> list[Row]:
    """Rows with integers replaced by class names in columns that carry the names."""
    names = {column: feature.names for column, feature in features.items() if hasattr(feature, "int2str")}
    if not names:
        return rows
    return [
        {
            column: names[column][value] if column in names and value is not None and value >= 0 else value
            for column, value in row.items()
        }
        for row in rows
    ]


def _complete(
    source: str, parts: dict[str, _Part], eval_fraction: float, seed: int
) -> tuple[dict[str, _Part], list[str]]:
    """The splits with a validation split cut from train where there was none, and notes."""
    if "validation" in parts:
        return parts, [] if "test" in parts else ["no test split: the result is checked on validation only"]
    wanted = ["validation"] if "test" in parts else ["validation", "test"]
    if not 0 < eval_fraction * len(wanted) < 1:
        raise CommandError(
            f"eval-fraction {eval_fraction}: {' and '.join(wanted)} must be cut from train here, so it must "
            f"be over 0 and under {1 / len(wanted):g}"
        )
    train = parts["train"]
    size = max(1, round(len(train.rows) * eval_fraction))
    cut = _cut(train.rows, size, len(wanted), seed)
    if any(not indices for indices in cut):
        raise DataError(
            f"{source}: its {len(train.rows)} train rows are too few or too alike to cut "
            f"{' and '.join(wanted)} from them; give files of their own to these splits"
        )
    taken = {index for indices in cut for index in indices}
    left = [index for index in range(len(train.rows)) if index not in taken]
    new = {split: train.take(indices) for split, indices in zip(wanted, cut, strict=True)}
    sizes = " and ".join(f"{len(part.rows):,} for {split}" for split, part in new.items())
    note = f"of {len(train.rows):,} train rows, {sizes} (eval-fraction {eval_fraction:g}, seed {seed})"
    return {**parts, **new, "train": train.take(left)}, [note]


def _cut(rows: Sequence[Row], size: int, count: int, seed: int) -> list[list[int]]:
    """Indices of `count` samples of about `size` rows each, disjoint, stratified by label.

    Rows of the same input are one unit. The units of a class are put in the order of a hash, and the
    k-th of n stands at (k + 1/2) / n; the samples are taken from all classes along that line, so that
    each has its share. The last unit of a class is never taken.
    """
    units: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        units.setdefault(_input_key(row), []).append(index)
    strata: dict[str, list[tuple[str, list[int]]]] = {}
    for key, members in units.items():
        digest = hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()
        labels = sorted({_canonical(_class(rows[index])) for index in members})
        strata.setdefault(_canonical(labels), []).append((digest, members))
    line: list[tuple[float, str, list[int]]] = []
    for stratum in strata.values():
        ordered = sorted(stratum)
        line += [((k + 0.5) / len(ordered), *unit) for k, unit in enumerate(ordered[:-1])]
    waiting = iter(sorted(line))
    samples: list[list[int]] = []
    for _ in range(count):
        sample: list[int] = []
        while len(sample) < size and (unit := next(waiting, None)) is not None:
            sample += unit[2]
        samples.append(sorted(sample))
    return samples


def _class(row: Row) -> object:
    """The row's class, if it has one: a float is none."""
    label = row.get("label")
    return label if isinstance(label, (str, int)) else None


def _input_key(row: Row) -> str:
    """What makes two rows the same question: the columns that a task puts in, else the whole row."""
    for columns in (("prompt",), ("source",), ("text_a", "text_b"), ("text",)):
        if all(column in row for column in columns):
            return _canonical([row[column] for column in columns])
    return _canonical(row)


def _canonical(value: object) -> str:
    """One JSON text per value, whatever the order of keys; what JSON lacks is written as its `str`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _hash(splits: Mapping[str, Sequence[Row]]) -> str:
    """SHA-256 of the splits' rows in their order."""
    digest = hashlib.sha256()
    for split, rows in splits.items():
        digest.update(f"{split}\n".encode())
        for row in rows:
            digest.update(f"{_canonical(row)}\n".encode())
    return digest.hexdigest()


def _overlaps(train: Sequence[Row], validation: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """A note for each split of which inputs are in an earlier one too."""
    notes = []
    seen: dict[str, set[str]] = {}
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        keys = [_input_key(row) for row in rows]
        for other, known in seen.items():
            shared = sum(key in known for key in keys)
            if shared:
                notes.append(
                    f"{shared:,} of {len(rows):,} {split} rows have an input that is also in {other}"
                )
        seen[split] = set(keys)
    return notes
