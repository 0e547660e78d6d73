"""What comes as Arrow tables: Parquet files, folders that `datasets` saved, and the hub's data sets.

The only home of `datasets` and `pyarrow`. Class labels become their names where the schema has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autorank.errors import DataError, first_line
from autorank.rows import SPLIT_NAMES, Part, Places, Row, listed

__all__ = ["is_saved", "parts_of", "read_hub", "read_parquet", "read_saved"]

_HUB_TIMEOUT_S = 10.0


def read_parquet(path: Path) -> Part:
    """The rows of a Parquet file.

    Raises:
        DataError: it is no Parquet file, or a broken one, or two of its columns have one name.
    """
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
        rows = table.to_pylist()
        # Who else wrote the file has given its classes no names, and may have types that `datasets` has not.
        if b"huggingface" in (table.schema.metadata or {}):
            rows = _named_labels(rows, datasets.Features.from_arrow_schema(table.schema))
    except (ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: not a Parquet file that can be read ({first_line(error)}); copy or write it again"
        ) from None
    names: list[str] = table.column_names
    if len(set(names)) < len(names):
        raise DataError(f"{path}: its schema names a column twice: {listed(names)}; give each a name")
    return Part(rows, Places(str(path), range(1, len(rows) + 1), lines=False))


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `save_to_disk` of `datasets` wrote."""
    single = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def read_saved(folder: Path) -> tuple[str, dict[str, Part]]:
    """Format and splits of a folder that `save_to_disk` wrote; a lone set of rows is train.

    Raises:
        DataError: the folder is broken, or has no split.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the libraries below raise too many kinds to name
        raise DataError(
            f"{folder}: not an Arrow folder that can be read ({first_line(error)}); "
            "write it again with save_to_disk"
        ) from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return "Arrow folder", parts_of(str(folder), splits)


def read_hub(source: str, name: str, config: str | None) -> tuple[str, dict[str, Part]]:
    """Format and splits of a data set on the hub, or of its copy in the hub's cache.

    Raises:
        DataError: it is out of reach, or has no split.
    """
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
    return "hub data set", parts_of(source, loaded)


def parts_of(source: str, loaded: Mapping[str, Any]) -> dict[str, Part]:
    """The splits that a loaded `DatasetDict` has; splits of other names are left out.

    Args:
        source: what was loaded, for messages.
        loaded: a `Dataset` by split name.

    Raises:
        DataError: a split has no rows, or there is no split.
    """
    parts: dict[str, Part] = {}
    for split, names in SPLIT_NAMES.items():
        found = next((name for name in names if name in loaded), None)
        if found is None:
            continue
        rows = _named_labels(loaded[found].to_list(), loaded[found].features)
        if not rows:
            raise DataError(f"{source}: no rows in its {found} split; a split needs at least one")
        parts[split] = Part(rows, Places(f"{source} {found}", range(1, len(rows) + 1), lines=False))
    if not parts:
        raise DataError(f"data {source!r} has no train split; it has {', '.join(loaded) or 'none'}")
    return parts


def _named_labels(rows: list[Row], features: Mapping[str, Any]) -> list[Row]:
    """Rows with class names for integers wherever the schema has the names, in lists and objects too."""
    name = _namer(dict(features))
    return rows if name is None else [name(row) for row in rows]


def _namer(feature: Any) -> Callable[[Any], Any] | None:
    """What gives a value of that feature with names for its classes; None where it has no classes.

    What is no class stays as it is, such as a label that is hidden as -1.
    """
    if hasattr(feature, "int2str"):
        names: list[str] = feature.names
        return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else value
    if isinstance(feature, dict):
        found = {key: name for key, inner in feature.items() if (name := _namer(inner)) is not None}
        return _of_object(found) if found else None
    item = getattr(feature, "feature", None)
    of_item = None if item is None else _namer(item)
    return None if of_item is None else _of_list(of_item)


def _of_object(names: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    return lambda value: (
        {key: names[key](inner) if key in names else inner for key, inner in value.items()}
        if isinstance(value, dict)
        else value
    )


def _of_list(name: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda values: [name(value) for value in values] if isinstance(values, list) else values
