"""Data sets: from a folder, a file, a hub id or a built-in name to rows in three splits.

Which columns a task needs and what they may hold is the task's business. Nothing is tokenised,
shuffled or written here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autorank.arrow import is_saved, read_hub, read_saved
from autorank.errors import CommandError, DataError
from autorank.figures import counted
from autorank.images import METADATA, is_image_folder, read_image_folder, read_images
from autorank.quickstart import DATA_NAME, stdlib_docs
from autorank.readers import KNOWN_FILES, known_stem, looks_like_file, read_file
from autorank.rows import SPLIT_NAMES, SPLITS, Part, Places, Row, listed
from autorank.shapes import read_shapes

__all__ = ["SPLITS", "DataSet", "Places", "Row", "build_data", "read_data", "read_rows"]

# Labels of so many inputs are no classes if more than this share of them comes once only.
_MANY, _HARDLY_EVER_TWICE = 20, 0.8
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>\w[\w.-]*))?", re.ASCII)


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
        mapped: role -> the data's own column, of those that `read_rows` renamed.
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
    mapped: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def splits(self) -> dict[str, tuple[Row, ...]]:
        """The splits by name, the empty ones too."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def where(self, split: str, index: int) -> str:
        """The place of a row, for messages: `train.jsonl:17`, or the split and its row number."""
        return self.places[split][index] if split in self.places else f"{split}, row {index + 1}"


def read_data(
    source: str, *, eval_fraction: float, seed: int, columns: Mapping[str, str] | None = None
) -> DataSet:
    """Read a data set.

    Args:
        source: a folder with a file per split (train; validation, valid, val or dev; test), a folder
            that `save_to_disk` of `datasets` wrote, a folder of images with a folder for each class
            or a metadata file, perhaps within a folder for each split, a single file, a dataset's id on
            the hub (`owner/name`, or `owner/name:config`), or `builtin:stdlib-docs`.
        eval_fraction: how much of train becomes the validation split where there is none. Where
            there is neither validation nor test, a test split of the same size is cut too.
        seed: which rows these are. Rows with the same input stay together, and each class keeps its
            share and at least one input in train.
        columns: role -> column of the data. The rows have the role's name in its place, and no
            other column of that name.

    Raises:
        DataError: the data set cannot be found or read, has no train split, a split is empty, or a column
            is missing.
        CommandError: `eval_fraction` is needed and out of range.
    """
    columns = columns or {}
    kind, parts, notes = _read_parts(source, columns)
    if "train" not in parts:
        raise DataError(
            f"{source}: no train split found, but {', '.join(parts)}; name the splits train, validation and "
            "test"
        )
    if columns:
        notes += _rename(parts, columns)
    if _is_hidden(parts):
        del parts["test"]
        notes.append("the test split's labels are hidden (-1): it is left out")
    parts, shape_notes = read_shapes(read_images(parts))
    parts, cut_notes = _complete(source, parts, eval_fraction, seed)
    rows = {split: part.rows for split, part in parts.items()}
    places = {split: part.places for split, part in parts.items()}
    return build_data(source, rows, kind=kind, notes=(*notes, *shape_notes, *cut_notes), places=places)


def read_rows(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    complete: Callable[[Row], Row] | None = None,
) -> DataSet:
    """Rows of one split, as the test rows of a data set that has no others.

    Args:
        source: as for `read_data`.
        columns: role -> column of the data. A column that the rows have not is left out, for rows
            without an answer lack the one that holds it.
        split: train, validation or test; by default test, or what there is.
        complete: what every row becomes before its shape is recognised.

    Raises:
        DataError: the data set cannot be found or read, or has no such split.
        CommandError: there is no split of that name.
    """
    if split is not None and split not in SPLITS:
        raise CommandError(f"split {split!r} is not known: it is {', '.join(SPLITS)}")
    kind, parts, notes = _read_parts(source, columns or {})
    name = split or next(known for known in reversed(SPLITS) if known in parts)
    if name not in parts:
        raise DataError(f"{source} has no {name} split; it has {', '.join(parts)}")
    if len(parts) > 1:
        kind = f"{kind}, {name} split"
    part = parts[name]
    there = {column for row in part.rows for column in row}
    chosen = {name: part}
    mapped = {role: column for role, column in (columns or {}).items() if column in there}
    if mapped:
        notes += _rename(chosen, mapped)
    if complete is not None:
        chosen = {name: Part([complete(row) for row in chosen[name].rows], part.places)}
    read, shape_notes = read_shapes(read_images(chosen))
    notes += shape_notes
    rows = tuple(read[name].rows)
    found = tuple(dict.fromkeys(column for row in rows for column in row))
    return DataSet(
        source, kind, found, (), (), rows, _hash({name: rows}), tuple(notes), {"test": part.places}, mapped
    )


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


def _read_parts(source: str, columns: Mapping[str, str]) -> tuple[str, dict[str, Part], list[str]]:
    """The format, the splits that the source has, and notes."""
    try:
        return _read_source(source, columns)
    except OSError as error:  # a path that is too long, or a folder that may not be read
        raise DataError(f"data {source[:200]!r} cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise DataError(
            f"data {source[:200]!r} take more memory than there is: give fewer rows, or a machine with more"
        ) from error


def _read_source(source: str, columns: Mapping[str, str]) -> tuple[str, dict[str, Part], list[str]]:
    if source.startswith("builtin:"):
        return _read_builtin(source)
    path = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    numeric = (columns.get("label", "label"), columns.get("score", "score"))
    if path.is_dir() and is_saved(path):
        return *read_saved(path), []
    if path.is_dir():
        stems = {known_stem(file) for file in path.iterdir() if file.is_file()}
        if not stems - {None, METADATA} and is_image_folder(path):
            return "image folder", *read_image_folder(path, numeric)
        return _read_folder(path, numeric)
    if path.is_file():
        kind, part = read_file(path, numeric)
        return f"{kind} file", {"train": part}, []
    if os.path.lexists(path):  # a device, a pipe, which is read once only, or a link to nothing
        raise DataError(f"data {source!r}: neither a file nor a folder; give the file that it stands for")
    looks_local = looks_like_file(path) or source.startswith((".", "~", "/")) or "\\" in source
    match = _HUB_ID.fullmatch(source)
    if match is None or looks_local:
        raise DataError(
            f"data {source!r}: no such file or folder{_beside(path)}; give a folder with train and "
            f"validation files, a file, an id on the hub, or {DATA_NAME}"
        )
    return *read_hub(source, match["name"], match["config"]), []


def _beside(path: Path) -> str:
    """A name beside the path that is much like it, for a message."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f", but there is {path.with_name(close[0])}" if close else ""


def _read_builtin(source: str) -> tuple[str, dict[str, Part], list[str]]:
    """The splits of an embedded data set."""
    if source != DATA_NAME:
        raise DataError(f"data {source!r} is not built in; the built-in data set is {DATA_NAME}")
    parts = {
        split: Part(rows, Places(f"{source} {split}", range(1, len(rows) + 1), lines=False))
        for split, rows in zip(SPLITS, stdlib_docs(), strict=True)
    }
    return "docstrings of this Python's standard library", parts, []


def _read_folder(folder: Path, numeric: Collection[str]) -> tuple[str, dict[str, Part], list[str]]:
    """The splits of a folder that holds one file for each."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    parts: dict[str, Part] = {}
    kinds: list[str] = []
    for split, names in SPLIT_NAMES.items():
        found = [path for path in files if known_stem(path) in names]
        if len(found) > 1:
            listed = ", ".join(path.name for path in found)
            raise DataError(f"{folder}: {listed} would all be the {split} split; keep one of them")
        if found:
            kind, parts[split] = read_file(found[0], numeric)
            kinds.append(kind)
    if not parts:
        listed = ", ".join(path.name for path in files[:10]) or "no files"
        raise DataError(
            f"{folder}: no train file found ({listed}); name the splits train, validation and test, "
            f"as {KNOWN_FILES}"
        )
    return f"{' and '.join(dict.fromkeys(kinds))} folder", parts, []


def _rename(parts: dict[str, Part], columns: Mapping[str, str]) -> list[str]:
    """Give the columns of all splits the names of their roles; notes that say so."""
    roles = {column: role for role, column in columns.items()}
    for split, part in parts.items():
        found = list(dict.fromkeys(column for row in part.rows for column in row))
        for role, column in columns.items():
            if column not in found:
                close = difflib.get_close_matches(column, found, n=3)
                hint = f"do you mean {listed(close)}?" if close else "correct --columns"
                raise DataError(
                    f"{part.places.file}: no column {column!r}, which is to be the {role}; "
                    f"the {split} rows have {listed(found)}: {hint}"
                )
    notes = ["columns: " + ", ".join(f"{role} is read from {column}" for role, column in columns.items())]
    for role, column in columns.items():
        if role not in roles and any(role in row for part in parts.values() for row in part.rows):
            notes.append(f"the data's own column {role} is left out, for {role} is read from {column}")
    for split, part in parts.items():
        rows = [
            {
                roles.get(name, name): value
                for name, value in row.items()
                if name in roles or name not in columns
            }
            for row in part.rows
        ]
        parts[split] = Part(rows, part.places)
    return notes


def _is_hidden(parts: Mapping[str, Part]) -> bool:
    """Whether all test labels are -1 where train has names: benchmarks hide them so."""
    if "test" not in parts or any(row.get("label") != -1 for row in parts["test"].rows):
        return False
    return any(isinstance(row.get("label"), str) for row in parts["train"].rows)


def _complete(
    source: str, parts: dict[str, Part], eval_fraction: float, seed: int
) -> tuple[dict[str, Part], list[str]]:
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
            f"{source}: {counted(len(train.rows), 'train row')}, too few or too alike to cut "
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
    alone = sum(len(stratum) == 1 for stratum in strata.values())
    if len(units) >= _MANY and alone > _HARDLY_EVER_TWICE * len(units):  # no classes, but answers in words
        strata = {"": [unit for stratum in strata.values() for unit in stratum]}
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


# By the columns that a task is told from, the ones that it puts in: in the order in which it is told
# from them, so that a column that is there besides does not speak for the row; then rows without answers.
_INPUTS = (
    ({"tokens", "tags"}, ("tokens",)),
    ({"question", "context", "answers"}, ("question", "context")),
    ({"text", "label"}, ("text",)),
    ({"text", "score"}, ("text",)),
    ({"text_a", "text_b", "label"}, ("text_a", "text_b")),
    ({"text_a", "text_b", "score"}, ("text_a", "text_b")),
    ({"image", "label"}, ("image",)),
    ({"messages"}, ("messages",)),
    ({"source", "target"}, ("source",)),
    ({"prompt", "completion"}, ("prompt",)),
    ({"instruction", "output"}, ("instruction", "input")),
    ({"text"}, ("text",)),
    ({"prompt"}, ("prompt",)),
    ({"question", "context"}, ("question", "context")),
    ({"tokens"}, ("tokens",)),
    ({"text_a", "text_b"}, ("text_a", "text_b")),
    ({"image"}, ("image",)),
)


def _input_key(row: Row) -> str:
    """What makes two rows the same question: the columns that a task puts in, else the whole row."""
    for needed, inputs in _INPUTS:
        if needed <= row.keys():
            return _canonical([_without_answer(row.get(column)) or None for column in inputs])
    return _canonical(row)


def _without_answer(value: object) -> object:
    """A chat without its last turn, where that is the assistant's; any other value as it is."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return value[:-1] if value[-1].get("role") == "assistant" else value
    return value


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
