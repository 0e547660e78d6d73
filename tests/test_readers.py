"""Files of rows: every format, its places, and what is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import DataError
from autorank.readers import _unquoted, known_stem, read_file

ROWS = [{"text": f"text {index}", "label": "ab"[index % 2]} for index in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def packed(content: bytes) -> bytes:
    """As gzip data, the same at any time: tests that run side by side must agree on their parameters."""
    return gzip.compress(content, mtime=0)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_file(path)[1].rows


def table(rows: list[list[str]], **dialect: Any) -> bytes:
    """A table as Python's own writer writes it."""
    stream = io.StringIO()
    csv.writer(stream, **dialect).writerows(rows)
    return stream.getvalue().encode()


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(
    ("suffix", "kind", "content"),
    [
        (".jsonl", "JSONL", LINES),
        (".json", "JSONL", LINES),
        (".json", "JSON", json.dumps(ROWS, indent=2).encode()),
        (".csv", "CSV", table([["text", "label"], *(list(row.values()) for row in ROWS)])),
        (".tsv", "TSV", "\n".join("\t".join(row) for row in [ROWS[0], *(r.values() for r in ROWS)]).encode()),
    ],
)
def test_text_is_read_plain_and_compressed(
    tmp_path: Path, suffix: str, kind: str, content: bytes, packing: str
) -> None:
    plain, packed = tmp_path / f"train{suffix}", tmp_path / f"train{suffix}{packing.upper()}"
    plain.write_bytes(content)
    packed.write_bytes(PACKERS[packing](content))
    found, part = read_file(packed)
    assert found == kind
    assert part.rows == ROWS
    assert part.rows == rows_of(plain)
    places = read_file(plain)[1].places
    assert [part.places[index] for index in range(6)] == [
        places[index].replace(str(plain), str(packed)) for index in range(6)
    ]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("train.jsonl", "train"),
        ("train.JSON.GZ", "train"),
        ("train.v2.tsv.xz", "train.v2"),
        ("train.parquet", "train"),
        ("train.parquet.gz", None),
        ("train.gz", None),
        ("train", None),
        (".jsonl", None),
        ("train.txt", None),
    ],
)
def test_the_stem_of_a_known_file(name: str, stem: str | None) -> None:
    assert known_stem(Path(name)) == stem


def test_the_rows_of_an_array_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text('\n [ {"text": "a\\nb"},{"text": "\u2028b"}\n,\n\n{"text":\n"c"} ]\n', encoding="utf-8")
    kind, part = read_file(path)
    assert kind == "JSON"
    assert [row["text"] for row in part.rows] == ["a\nb", "\u2028b", "c"]
    assert [part.places[index] for index in range(3)] == [f"{path}:{line}" for line in (2, 2, 5)]


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers()), min_size=1, max_size=5
    ),
    indent=st.sampled_from([None, 0, 2]),
)
def test_an_array_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    assert rows_of(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"a": 1},\n{"a" 2}]', r":3: the array does not go on as JSON does \(Expecting ':' .*column 6\)"),
        ('[\n{"a": 1},\n7]', ":3: found int; each line must be one JSON object"),
        ('[\n{"a": 1}\n{"a": 2}]', ":3: expected a comma or the array's end, found '{'"),
        ('[\n{"a": 1},\n', r":3: the array does not go on as JSON does \(Expecting value"),
        ('[\n{"a": 1}\n', ":3: expected a comma or the array's end, the file ends"),
        ('[{"a": 1},\n]', r":2: the array does not go on"),
        ('[{"a": 1}]\n\n[]', ":3: more behind the array; a .json file holds one array"),
        ('[{"a": "caf\xe9"}]', r":1: not UTF-8 \(byte 0xe9"),
        ('[\n{"a": ' + "[" * 100_000, ":2: nested too deeply"),
        ('[\n{"n": ' + "9" * 5000 + "}]", ":2: the array does not go on as JSON does"),
        ("[]", "no rows in it"),
        ('{\n"a": 1}', ":1: not a JSON object on one line .*or an array of objects in a file named .json"),
    ],
)
def test_bad_arrays_are_refused_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "all.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("levels", "fits"), [(63, True), (64, False)])
def test_rows_nest_so_deep_and_no_deeper(tmp_path: Path, levels: int, fits: bool) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text('{"a": ' + "[" * levels + "]" * levels + "}\n", encoding="utf-8")
    if fits:
        assert len(rows_of(path)) == 1
    else:
        with pytest.raises(DataError, match=r"all\.jsonl:1: nested too deeply"):
            read_file(path)


def test_brackets_in_a_text_are_no_levels(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text(json.dumps({"a": "[{" * 1000}), encoding="utf-8")
    assert rows_of(path) == [{"a": "[{" * 1000}]


# -- compression ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "name"), [(".gz", "gzip"), (".bz2", "bzip2"), (".xz", "xz")])
def test_broken_compression_is_refused(tmp_path: Path, packing: str, name: str) -> None:
    content = PACKERS[packing](LINES * 200)
    path = tmp_path / f"train.jsonl{packing}"
    middle = len(content) // 2
    for broken in (content[:middle], content[:middle] + b"\0\1\2\3" + content[middle + 4 :]):
        path.write_bytes(broken)
        with pytest.raises(
            DataError, match=rf"its {name} data are broken after line \d+ \(.+\); copy or pack"
        ):
            read_file(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", packed(LINES), r"compressed with gzip; unpack it first, or name it t\.jsonl\.gz"),
        ("t.csv", bz2.compress(LINES), r"compressed with bzip2; unpack it first, or name it t\.csv\.bz2"),
        ("t.json", lzma.compress(LINES), r"compressed with xz; unpack it first, or name it t\.json\.xz"),
        ("t.jsonl", b"PK\x03\x04....", "compressed with zip; unpack it first$"),
        ("t.jsonl", b"\x28\xb5\x2f\xfd....", "compressed with zstd; unpack it first$"),
        ("t.jsonl", b"PAR1....", r"a Parquet file by its content; name it t\.parquet"),
        ("t.jsonl.gz", LINES, r"no compressed data, not gzip; name it t\.jsonl if it is plain text"),
        ("t.jsonl.xz", packed(LINES), r"with gzip, not xz; unpack it first, or name it t\.jsonl\.gz$"),
        ("t.jsonl.xz", b"PK\x03\x04....", "compressed with zip, not xz; unpack it first$"),
        ("t.csv", LINES, r"t\.csv:1: JSON by its content, not CSV; name it t\.jsonl or \.json"),
        ("t.tsv", json.dumps(ROWS).encode(), r"t\.tsv:1: JSON by its content, not TSV; name it t\.jsonl"),
        ("t.jsonl.gz", b"", "no rows in it"),
        ("t.jsonl.gz", packed(b""), "no rows in it"),
        ("t.gz", packed(LINES), r"the extension '\.gz' alone is not known; files are JSON lines"),
        ("t.jsonl.gz", packed(packed(LINES)), r":1: not UTF-8"),
        ("t.jsonl.gz", packed(LINES + b"x\n"), r"t\.jsonl\.gz:7: not a JSON object"),
        ("t", LINES, "the extension '' is not known"),
    ],
)  # fmt: skip
def test_content_and_name_must_agree(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


# -- tables --------------------------------------------------------------------------------------


def test_a_quote_in_a_tsv_is_a_quote(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('text\tlabel\n"Imagine\t1\nall "the" people"\t2\n\n"x"\t3\r\n', encoding="utf-8")
    _, part = read_file(path)
    assert part.rows == [
        {"text": '"Imagine', "label": 1},
        {"text": 'all "the" people"', "label": 2},
        {"text": '"x"', "label": 3},
    ]
    assert [part.places[index] for index in range(3)] == [f"{path}:{line}" for line in (2, 3, 5)]


@given(
    rows=st.lists(
        st.lists(st.text(st.sampled_from("a\" '"), min_size=1, max_size=6), min_size=2, max_size=2),
        min_size=1,
        max_size=4,
    )
)
def test_a_tsv_of_a_csv_writer_keeps_its_texts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.tsv"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        path.write_bytes(table([["one", "two"], *rows], delimiter="\t", quoting=quoting))
        assert [list(row.values()) for row in rows_of(path)] == rows


@pytest.mark.parametrize(
    ("field", "read_as"),
    [('"a""b"', 'a"b'), ('""a""', '""a""'), ('"a"', '"a"'), ('"a"b""c"', '"a"b""c"'), ('""', '""')],
)  # fmt: skip
def test_only_doubled_quotes_are_undone(field: str, read_as: str) -> None:
    assert _unquoted(field) == read_as


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\tlabel\na\tb\nc\td\te\n", r":3: 3 fields, the header names 2; for tabs or line breaks"),
        (b"text\ttext\na\tb\n", ":1: the header names a column twice"),
        (b"text,label\na,b\n", ":1: the header is one column, 'text,label'; TSV has tabs between columns"),
        (b'"text"\t"label"\n"a"b\t"c"\n', ":2: not TSV"),
        (b"text\tlabel\ncaf\xe9\tc\n", ":2: not UTF-8"),
        (b"text\tlabel\n", "no rows in it"),
    ],
)  # fmt: skip
def test_bad_tsv_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


def test_the_numeric_columns_of_a_table_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("label,intent,score,grade\n1,2,3,4.5\n1,2,0.5,x\n", encoding="utf-8")
    assert rows_of(path)[0] == {"label": 1, "intent": "2", "score": 3.0, "grade": "4.5"}
    part = read_file(path, numeric=("intent", "grade", "missing"))[1]
    assert part.rows[0] == {"label": "1", "intent": 2, "score": "3", "grade": "4.5"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', r":2: not a JSON object on one line \(Expecting ','"),
        (b'[{"text": "a"}, 1x]\n', r":1: .*a JSON array must be written as one object per line"),
        (b'[{"text": "a"}]\n', ":1: found list; each line must be one JSON object"),
        (b'{"text": "a"}\n\n7\n', ":3: found int; each line must be one JSON object"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r":2: not UTF-8 \(byte 0xe9 at 14\); save"),
        (b"[" * 100_000, ":1: nested too deeply|:1: not a JSON object"),
        (b'{"n": ' + b"9" * 5000 + b"}", ":1: not a JSON object on one line"),
        (b"", "no rows in it"),
        (b"\n \n", "no rows in it"),
        (packed(b'{"text": "a"}\n'), "compressed with gzip; unpack it first"),
    ],
)  # fmt: skip
def test_bad_json_lines_are_refused_with_their_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na,b\nc\n", ":3: 1 fields, the header names 2"),
        (b'text,label\n"a\nb",c\nd,e,f\n', ":4: 3 fields, the header names 2"),
        (b"text,text\na,b\n", ":1: the header names a column twice or not at all: text, text"),
        (b"text;label\na;b\n", ":1: the header is one column, 'text;label'; CSV has commas between columns"),
        (b'text,label\n"a"b,c\n', ":2: not CSV"),
        (b"text,label\ncaf\xe9,c\n", ":2: not UTF-8"),
        (b"text,label\n", "no rows in it"),
        (b"", "no rows in it"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    for name, text in (("t.csv", "a\nb\n"), ("t.jsonl", '{"a": "b"}'), ("t.json", '[{"a": "b"}]')):
        (tmp_path / name).write_bytes(f"\ufeff{text}".encode())
        assert rows_of(tmp_path / name) == [{"a": "b"}]


@pytest.mark.parametrize(
    ("labels", "read_as"),
    [
        (["0", "12", "-3"], [0, 12, -3]),
        (["007", "12"], ["007", "12"]),
        (["0.5", "1"], [0.5, 1.0]),
        (["1", "x"], ["1", "x"]),
        (["nan", "inf"], ["nan", "inf"]),
        (["", "1"], [None, 1]),
        (["", "a"], [None, "a"]),
        (["", ""], [None, None]),
        (["1e-05", "2.5"], [1e-5, 2.5]),
        (["1e5", "2e3"], ["1e5", "2e3"]),
        (["1_0", "10"], ["1_0", "10"]),
        (["9" * 5000, "1"], ["9" * 5000, "1"]),
    ],
)
def test_csv_labels_are_numbers_only_if_all_are(
    tmp_path: Path, labels: list[str], read_as: list[Any]
) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(table([["text", "label"], *(["1", label] for label in labels)]))
    found = [row["label"] for row in rows_of(path)]
    assert found == read_as
    assert [type(label) for label in found] == [type(label) for label in read_as]
    assert rows_of(path)[0]["text"] == "1"


def test_a_field_may_be_longer_than_the_csv_module_has_it(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    limit = csv.field_size_limit()
    path.write_bytes(b"text,label\n" + b"word " * 40_000 + b",a\n")
    assert len(rows_of(path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == limit


def test_a_role_with_blanks_around_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"id , text, label\n1, the cat, a\n")
    with pytest.raises(DataError, match=r"train\.csv:1: the header's ' text' has blanks .*; write 'text'"):
        rows_of(path)
    path.write_bytes(b"id ,text,label\n1,the cat,a\n")
    assert rows_of(path) == [{"id ": "1", "text": "the cat", "label": "a"}]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.xlsx"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"the extension '\.xlsx' is not known; files are JSON lines"):
        read_file(path)
