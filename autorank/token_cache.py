"""Tokens of large splits, kept between runs: made once, and read wherever they would come out the same.

An entry is a JSON file, under the hash of everything that its tokens depend on. It lies where the
libraries of Hugging Face keep such files, which `HF_ASSETS_CACHE`, `HF_HOME` and `XDG_CACHE_HOME` move.
The cache is never an error: what cannot be read is made again, what cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from autorank import __version__
from autorank.artifacts import write_text
from autorank.data import DataSet
from autorank.errors import FileError
from autorank.rows import Row
from autorank.tasks import (
    CausalLM,
    Encoded,
    Example,
    MultiLabelClassification,
    Regression,
    Task,
    TextClassification,
    encode_rows,
)
from autorank.tasks.task import IGNORED, Passage

__all__ = ["TokenCache"]

LEAST_BYTES = 2_000_000
"""Rows of less than that are tokenised anew: a megabyte takes half a second to a second (studies/LOG.md)."""

MOST_BYTES = 2 * 2**30
"""What all entries together may take on the disk; a token takes 5 to 10 bytes."""

# What a chat template says of the time, or by chance, it may not say again.
_FLEETING = re.compile(r"strftime_now|random|lipsum")

Label = TypeVar("Label")
_Whole = Annotated[int, Field(ge=0, lt=2**31)]
_Mark = Annotated[int, Field(ge=IGNORED, lt=2**31)]


class _Entry(BaseModel, Generic[Label]):
    """`Encoded` as it is stored; of each example tokens, labels, token types, reference and passage."""

    model_config = ConfigDict(strict=True, extra="forbid")

    examples: list[tuple[list[_Whole], Label, list[_Whole] | None, str | None, Passage | None]]
    kept: _Whole
    truncated: _Whole
    dropped: dict[str, _Whole]
    sides: dict[str, _Whole]
    packed: _Whole
    notes: tuple[str, ...]


# JSON does not tell these labels from one another; those of the other tasks are lists.
_ENTRIES: dict[str, type[_Entry[Any]]] = {
    TextClassification.name: _Entry[_Whole],
    Regression.name: _Entry[float],
    MultiLabelClassification.name: _Entry[tuple[_Whole, ...]],
}


@dataclass(frozen=True)
class TokenCache:
    """What a model's `processor` makes of rows, at most `max_length` tokens of each.

    Images are not kept, nor what may come out otherwise in the next run: tokens of a slow tokenizer or of
    one with code of its own, and chats whose template asks for the time. `place` is the folder of the
    entries, by default the user's.
    """

    processor: Any
    max_length: int
    place: Path | None = None

    @cached_property
    def folder(self) -> Path | None:
        """Where the entries are; None where there can be no such folder."""
        import huggingface_hub

        with suppress(OSError, ValueError):
            return self.place or huggingface_hub.cached_assets_path("autorank", "tokens")
        return None

    def encode(self, task: Task, data: DataSet, split: str) -> tuple[Encoded, bool]:
        """What `encode_rows` gives of the split, and whether it was read instead of made.

        Raises:
            AutorankError: what `encode_rows` raises.
        """
        key = self._key(task, data.splits[split])
        if key is None or self.folder is None:
            return encode_rows(task, data, split, self.processor, self.max_length), False
        path, form = self.folder / f"{key}.json", _ENTRIES.get(task.name, _Entry[list[_Mark]])
        found = _read(path, form)
        if found is not None:
            return found, True
        encoded = encode_rows(task, data, split, self.processor, self.max_length)
        _write(path, form, encoded)
        return encoded, False

    def _key(self, task: Task, rows: Sequence[Row]) -> str | None:
        """A hash of all that the tokens depend on; None where they are not to be kept."""
        if not getattr(self.processor, "is_fast", False):  # nor are images read for nothing
            return None
        digest, size = hashlib.sha256(), 0
        for row in rows:  # `repr` tells more apart than JSON does: types, and the order of keys
            text = f"{row!r}\n".encode()
            digest.update(text)
            size += len(text)
        if size < LEAST_BYTES or self._identity is None:
            return None
        chats = isinstance(task, CausalLM) and task.chats(self.processor)
        if chats and _FLEETING.search(str(self.processor.chat_template)):
            return None
        # No task's tokens depend on what is improved.
        names = [field.name for field in fields(task) if field.name != "metric"]  # type: ignore[arg-type]
        settings = {name: getattr(task, name) for name in names}
        digest.update(repr((task.name, settings, self.max_length, self._identity, _versions())).encode())
        return digest.hexdigest()

    @cached_property
    def _identity(self) -> str | None:
        """A hash of all that the tokenizer is; None where that cannot be told."""
        tokenizer = self.processor
        if not type(tokenizer).__module__.startswith("transformers."):  # code that came with a model
            return None
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # every call of the tokenizer sets both anew
        backend.no_padding()
        try:
            stored = backend.to_str()
        except Exception:  # a part of it is written in Python; no narrower kind is raised
            return None
        apart = ("_tokenizer", "deprecation_warnings")  # the backend, and what was warned of already
        state = {name: value for name, value in vars(tokenizer).items() if name not in apart}
        return hashlib.sha256(f"{type(tokenizer)!r}\n{stored}\n{state!r}".encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Of what makes tokens of rows; of autorank the source too, for a checkout changes under one version."""
    source, here = hashlib.sha256(), Path(__file__)
    for path in (here, *sorted((here.parent / "tasks").glob("*.py"))):
        source.update(path.read_bytes())
    libraries = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")}
    python = platform.python_version()
    return {"python": python, "autorank": __version__, "source": source.hexdigest(), **libraries}


def _read(path: Path, form: type[_Entry[Any]]) -> Encoded | None:
    """The entry in a file; None where there is none, or it is not what was written."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        checksum, _, text = path.read_bytes().partition(b"\n")
        if checksum.strip() != _checksum(path, text):
            return None
        entry = form.model_validate_json(text)
    except (OSError, ValueError):
        return None
    with suppress(OSError):
        os.utime(path)
    examples = tuple(
        Example(ids, labels, types, reference, passage=passage)
        for ids, labels, types, reference, passage in entry.examples
    )
    return Encoded(
        examples, entry.kept, entry.truncated, entry.dropped, entry.sides, entry.packed, entry.notes
    )


def _write(path: Path, form: type[_Entry[Any]], encoded: Encoded) -> None:
    """Store an entry if that can be done; those not used for longest go where all take too much."""
    entry = form.model_construct(
        examples=[
            (one.input_ids, one.labels, one.token_type_ids, one.reference, one.passage)
            for one in encoded.examples
        ],
        kept=encoded.kept,
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        sides=encoded.sides,
        packed=encoded.packed,
        notes=encoded.notes,
    )
    with suppress(FileError, OSError, ValueError):
        text = entry.model_dump_json()
        if len(text) < MOST_BYTES:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, f"{_checksum(path, text.encode()).decode()}\n{text}")
            _make_room(path.parent)


def _checksum(path: Path, text: bytes) -> bytes:
    """Of an entry and its name: under another's it is none."""
    return hashlib.sha256(path.name.encode() + b"\n" + text).hexdigest().encode()


def _make_room(folder: Path) -> None:
    found = [(path.stat(), path) for path in folder.iterdir()]
    total = 0
    for stat, path in sorted(found, key=lambda one: -one[0].st_mtime):
        total += stat.st_size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)
