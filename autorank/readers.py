"""Files of rows: JSON lines, JSON arrays, SQuAD's JSON, CSV and TSV, plain or compressed, and Parquet.

The format is told by the extension, and what the content says against it is refused. Rows are
checked for being rows at all; what their columns may hold is the task's business.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from autorank.arrow import read_parquet
from autorank.columns import ROLES
from autorank.errors import DataError
from autorank.rows import Part, Places, Row, listed
from autorank.squad import is_squad, squad_part

__all__ = ["KNOWN_FILES", "known_stem", "looks_like_file", "read_file"]

_Numbered = tuple[int, Row]

_FORMATS = {".jsonl": "JSONL", ".json": "JSON", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PACKINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
# What the first bytes of a file that is no plain text say.
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "zip": re.compile(rb"PK\x03\x04"),
}
KNOWN_FILES = (
    "JSON lines (.jsonl, .json), a JSON array (.json), CSV (.csv) or TSV (.tsv), each also compressed "
    "(.jsonl.gz, .bz2, .xz), or Parquet (.parquet)"
)
_SPACE = re.compile(r"[ \t\n\r]*")
_WHOLE = re.compile(r"0|-?[1-9]\d{0,99}", re.ASCII)
# As programs write them: 1e-05 is one, and 1e5 may well be a name.
_DECIMAL = re.compile(r"-?\d+(?:\.\d*(?:e[+-]?\d+)?|e[+-]\d+)", re.ASCII | re.IGNORECASE)
_DEEPEST = 64
_LONGEST_FIELD = 2**31 - 1  # the most that a long has everywhere


def known_stem(path: Path) -> str | None:
    """`train` of `train.jsonl.gz`; None where the extension is not known."""
    format_, packing = _extensions(path)
    return path.name[: -len(format_ + packing)] if format_ in _FORMATS else None


def looks_like_file(path: Path) -> bool:
    """Whether a name can only be meant as a file's."""
    return _extensions(path)[0] in _FORMATS


def _extensions(path: Path) -> tuple[str, str]:
    """The extension of the format and that of the compression, in lower case; Parquet has no second."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
    if suffixes[-1] in _PACKINGS and suffixes[-2:-1] != [".parquet"]:
        return suffixes[-2], suffixes[-1]
    return suffixes[-1], ""


def read_file(path: Path, numeric: Collection[str] = ("label", "score")) -> tuple[str, Part]:
    """The format and the rows of one file.

    Args:
        path: its extension says what it holds.
        numeric: the columns of CSV and TSV that are numbers where all their values are: integers, or
            else floats. An empty field of theirs is None. All others are text.

    Raises:
        DataError: the extension is not known, or the file is empty, broken or of another format.
    """
    format_, packing = _extensions(path)
    kind = _FORMATS.get(format_)
    if kind is None:
        extension = f"{path.suffix!r} alone" if path.suffix.lower() in _PACKINGS else repr(path.suffix)
        raise DataError(f"{path}: the extension {extension} is not known; files are {KNOWN_FILES}")
    try:
        if kind == "Parquet":
            part = read_parquet(path)
        else:
            lines = _decoded_lines(path, packing)
            if kind == "JSON":
                kind, part = _read_json(path, list(lines))
            elif kind == "JSONL":
                part = _numbered(path, _read_jsonl(path, lines))
            else:
                part = _numbered(path, _read_table(path, lines, kind, numeric))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not part.rows:
        raise DataError(f"{path}: no rows in it; a split needs at least one")
    return kind, part


def _numbered(path: Path, pairs: Iterable[_Numbered]) -> Part:
    """Rows with the numbers of their lines."""
    numbers, rows = [], []
    for line, row in pairs:
        numbers.append(line)
        rows.append(row)
    return Part(rows, Places(str(path), numbers, lines=True))


def _decoded_lines(path: Path, packing: str) -> Iterator[str]:
    """The lines of a UTF-8 file, unpacked, with their ends, a byte order mark left out."""
    _check_content(path, packing)
    for number, line in enumerate(_raw_lines(path, packing), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1}); "
                "save the file as UTF-8"
            ) from None


def _check_content(path: Path, packing: str) -> None:
    """Refuse a file whose first bytes are those of another format than its name says."""
    with path.open("rb") as stream:
        head = stream.read(16)
    found = next((name for name, magic in _MAGIC.items() if magic.match(head)), None)
    expected = _PACKINGS.get(packing)
    if not head or found == expected:
        if head.startswith(b"PAR1"):
            raise DataError(f"{path}: a Parquet file by its content; name it {path.stem}.parquet")
        return
    extension = next((extension for extension, name in _PACKINGS.items() if name == found), None)
    plain = path.name.removesuffix(path.suffix) if packing else path.name
    if found is None:
        raise DataError(f"{path}: no compressed data, not {expected}; name it {plain} if it is plain text")
    hint = "unpack it first" + (f", or name it {plain}{extension}" if extension else "")
    raise DataError(f"{path}: compressed with {found}{f', not {expected}' if expected else ''}; {hint}")


def _raw_lines(path: Path, packing: str) -> Iterator[bytes]:
    """The lines of a file as bytes, unpacked, and all of them sound."""
    if not packing:
        with path.open("rb") as stream:
            yield from stream
        return
    lines: list[bytes] = []
    try:
        with _OPENERS[packing](path, "rb") as stream:
            for line in stream:  # a fault inside is often found at the very end only
                lines.append(line)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DataError(
            f"{path}: its {_PACKINGS[packing]} data are broken after line {len(lines)} ({error}); "
            "copy or pack the file again"
        ) from None
    yield from lines


# -- JSON ----------------------------------------------------------------------------------------


def _read_json(path: Path, lines: list[str]) -> tuple[str, Part]:
    """The rows of a `.json` file: an array where it opens a bracket, SQuAD's, or an object a line."""
    text = "".join(lines)
    start = _end_of_space(text, 0)
    if text[start : start + 1] == "[":
        return "JSON", _numbered(path, _read_array(path, text, start))
    whole = _whole_value(text, start)
    if is_squad(whole):
        return "SQuAD JSON", squad_part(str(path), _checked_row(path, 1, whole, text))
    return "JSONL", _numbered(path, _read_jsonl(path, lines))


def _whole_value(text: str, start: int) -> object:
    """The value that a JSON text is; None where it is none, or more than one."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value if _end_of_space(text, end) == len(text) else None


def _read_array(path: Path, text: str, start: int) -> Iterator[_Numbered]:
    """Line number and row of each object of an array, `start` being where its bracket is."""
    decode = json.JSONDecoder().raw_decode
    line = 1
    counted = 0

    def line_of(position: int) -> int:
        nonlocal line, counted
        line += text.count("\n", counted, position)
        counted = position
        return line

    at = _end_of_space(text, start + 1)
    mark = "]" if text[at : at + 1] == "]" else ","
    at += mark == "]"
    while mark == ",":
        here = line_of(at)
        try:
            row, end = decode(text, at)
        except RecursionError:
            raise _too_deep(path, here) from None
        except ValueError as error:
            place = f"{path}:{error.lineno if isinstance(error, json.JSONDecodeError) else here}"
            raise DataError(f"{place}: the array does not go on as JSON does ({_what(error)})") from None
        yield here, _checked_row(path, here, row, text[at:end])
        comma = _end_of_space(text, end)
        mark = text[comma : comma + 1]
        at = _end_of_space(text, comma + 1)
    if mark != "]":
        found = f"found {mark!r}" if mark else "the file ends"
        raise DataError(f"{path}:{line_of(comma)}: expected a comma or the array's end, {found}")
    if _end_of_space(text, at) != len(text):
        raise DataError(f"{path}:{line_of(at)}: more behind the array; a .json file holds one array")


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _read_jsonl(path: Path, lines: Iterable[str]) -> Iterator[_Numbered]:
    """Line number and row of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))  # a fault at its end is one of this line
        except RecursionError:
            raise _too_deep(path, number) from None
        except ValueError as error:
            hint = "; a JSON array must be written as one object per line" if line.startswith("[") else ""
            if line.strip() in ("[", "{"):
                hint = "; write one object per line, or an array of objects in a file named .json"
            raise DataError(
                f"{path}:{number}: not a JSON object on one line ({_what(error)}){hint}"
            ) from None
        yield number, _checked_row(path, number, row, line)


def _what(error: ValueError) -> object:
    """What is wrong with a JSON text."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error


def _checked_row(path: Path, line: int, value: object, text: str) -> Row:
    """The value, which must be an object that is not nested beyond reason."""
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{line}: found {type(value).__name__}; each line must be one JSON object, "
            'such as {"text": "…", "label": "…"}'
        )
    if text.count("[") + text.count("{") > _DEEPEST and _is_deeper(value, _DEEPEST):
        raise _too_deep(path, line)
    return value


def _is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie in one another at more levels."""
    layer = [value]
    for _ in range(levels):
        inner = [item for item in layer if isinstance(item, (dict, list))]
        layer = [item for outer in inner for item in (outer.values() if isinstance(outer, dict) else outer)]
    return any(isinstance(item, (dict, list)) for item in layer)


def _too_deep(path: Path, line: int) -> DataError:
    return DataError(f"{path}:{line}: nested too deeply; write one flat object per line")


# -- tables --------------------------------------------------------------------------------------


def _read_table(path: Path, lines: Iterator[str], kind: str, numeric: Collection[str]) -> list[_Numbered]:
    """Line number and row of each record; the first line names the columns."""
    records = _records(path, lines, kind)
    _, header = next(records, (1, []))
    if header and header[0].startswith(("{", "[{")):
        raise DataError(
            f"{path}:1: JSON by its content, not {kind}; name it {known_stem(path)}.jsonl or .json"
        )
    if len(header) == 1 and any(mark in header[0] for mark in ",;|\t"):
        wanted = "tabs" if kind == "TSV" else "commas"
        raise DataError(
            f"{path}:1: the header is one column, {header[0]!r}; {kind} has {wanted} between columns: save "
            "it so"
        )
    if len(set(header)) < len(header) or "" in header:
        raise DataError(
            f"{path}:1: the header names a column twice or not at all: {listed(header)}; give each a name"
        )
    padded = next((name for name in header if name != name.strip() and name.strip() in ROLES), None)
    if padded is not None:
        raise DataError(
            f"{path}:1: the header's {padded!r} has blanks around its name; write {padded.strip()!r}, and no "
            "blanks beside the separators below"
        )
    rows: list[_Numbered] = []
    for line, values in records:
        if values and len(values) != len(header):
            hint = 'put a text with commas between quotes, "…"'
            if kind == "TSV":
                hint = "for tabs or line breaks in a text save it as CSV or JSON lines"
            raise DataError(f"{path}:{line}: {len(values)} fields, the header names {len(header)}; {hint}")
        if values:
            rows.append((line, dict(zip(header, values, strict=True))))
    for column in set(numeric) & set(header):
        number = _number_type([row[column] for _, row in rows if row[column]])
        for _, row in rows:
            row[column] = number(row[column]) if row[column] else None
    return rows


def _records(path: Path, lines: Iterator[str], kind: str) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record begins, and its fields.

    Tabs separate plain text, in which a quote is a quote: a TSV is read as CSV is only where its
    header is quoted. Of other fields those that hold doubled quotes alone are undone.
    """
    first = next(lines, None)
    if first is None:
        return
    if kind == "TSV" and not first.startswith('"'):
        for number, text in enumerate(chain([first], lines), start=1):
            text = text.rstrip("\r\n")
            yield number, [_unquoted(field) for field in text.split("\t")] if text else []
        return
    reader = csv.reader(chain([first], lines), strict=True, delimiter="\t" if kind == "TSV" else ",")
    limit = csv.field_size_limit(_LONGEST_FIELD)  # the module's, for all of its readers
    try:
        line = 1
        for values in reader:
            yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f'{path}:{reader.line_num}: not {kind} ({error}); quote fields with "…"') from None
    finally:
        csv.field_size_limit(limit)


def _unquoted(field: str) -> str:
    """A field as its writer had it, where only a writer of quoted fields can have written it so."""
    inner = field[1:-1]
    wrapped = len(field) > 2 and field[0] == field[-1] == '"'
    if wrapped and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field


def _number_type(values: Sequence[str]) -> type[str] | type[int] | type[float]:
    """What all of the values are, strictly: `007` is a name, `7` an integer and `7.0` a float."""
    if all(_WHOLE.fullmatch(value) for value in values):
        return int
    numbers = all(_WHOLE.fullmatch(value) or _DECIMAL.fullmatch(value) for value in values)
    return float if numbers else str
