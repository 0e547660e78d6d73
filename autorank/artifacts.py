"""Files and folders that are complete or absent, whatever happens while they are written.

An artifact appears by a rename after everything in it has reached the disk. What a killed
process left behind is never read, and is swept when the store is opened for writing.
The store knows no tensors: it calls a function that fills a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autorank.errors import FileError, StudyError

__all__ = [
    "ArtifactStore",
    "check_writable",
    "file_errors",
    "flush",
    "read_json",
    "write_json",
    "write_text",
]

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
# Half-written or half-removed: rubbish. Replaced but not yet by anything: still the truth.
_RUBBISH = ".tmp-"
_REPLACED = ".old-"


class ArtifactStore:
    """The artifacts of one study: a folder of folders and JSON files, each under a key.

    At every instant an artifact is its old or its new complete version. One process writes;
    others open the store with `read_only`, which creates and sweeps nothing.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder = folder
        if not read_only:
            with file_errors(folder, "made"):
                folder.mkdir(parents=True, exist_ok=True)
                self._sweep()

    def path(self, key: str) -> Path:
        """Where the artifact is, or would be."""
        place, replaced = self._places(key)
        return replaced if replaced.exists() and not place.exists() else place

    def exists(self, key: str) -> bool:
        """Whether there is a complete artifact under this key."""
        return self.path(key).exists()

    def names(self) -> list[str]:
        """The keys of all artifacts there are, sorted."""
        names = {path.name.removeprefix(_REPLACED) for path in self.folder.iterdir()}
        return sorted(name for name in names if not name.startswith(_RUBBISH))

    def write_folder(self, key: str, fill: Callable[[Path], None], size: int | None = None) -> Path:
        """Write an artifact: `fill` gets an empty folder and writes its files into it.

        An artifact that was there before is replaced when the new one is complete. If `fill`
        raises, nothing has changed. `size` is about how many bytes there will be, for the error.

        Raises:
            FileError: the folder cannot be written, or the disk is full.
        """
        place, replaced = self._places(key)
        draft = self._rubbish(key)
        try:
            with file_errors(place, "written", size):
                draft.mkdir()
                fill(draft)
                _flush_tree(draft)
                if place.exists():
                    os.rename(place, replaced)
                os.rename(draft, place)
                flush(self.folder)
                self._discard(replaced)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return place

    def write_json(self, key: str, data: Any) -> Path:
        """Write a JSON file under a key that names it, such as `plan.json`."""
        place, _ = self._places(key)
        write_json(place, data)
        return place

    def read_json(self, key: str) -> Any:
        """Read what `write_json` wrote."""
        return read_json(self.path(key))

    def remove(self, key: str) -> None:
        """Remove an artifact, if it is there."""
        place, replaced = self._places(key)
        with file_errors(place, "removed"):
            # The older version first, or it would come back.
            for path in (replaced, place):
                self._discard(path)

    def digest(self, key: str) -> dict[str, str]:
        """The sha256 of every file of a folder, by its path in it."""
        place = self.path(key)
        with file_errors(place, "read"):
            files = sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
            return {path.relative_to(place).as_posix(): _sha256(path) for path in files}

    def check(self, key: str, digest: Mapping[str, str]) -> Path:
        """The path of an artifact that is what it was when its digest was taken.

        Raises:
            StudyError: it is missing, or a file of it is missing, changed or new.
        """
        place = self.path(key)
        advice = "restore it from a copy, or export another trial"
        if not place.is_dir():
            raise StudyError(f"the artifact {place} is missing: {advice}")
        found = self.digest(key)
        differing = sorted(name for name in {**digest, **found} if digest.get(name) != found.get(name))
        if differing:
            files = ", ".join(differing)
            raise StudyError(f"the artifact {place} is not what was stored ({files}): {advice}")
        return place

    def _places(self, key: str) -> tuple[Path, Path]:
        if _KEY.fullmatch(key) is None:
            raise StudyError(
                f"{key!r} is no key of an artifact: keys are letters, digits, '.', '_' and '-', "
                "and begin with no dot"
            )
        return self.folder / key, self.folder / f"{_REPLACED}{key}"

    def _rubbish(self, key: str) -> Path:
        """A path for rubbish that does not exist yet."""
        count = 0
        while (path := self.folder / f"{_RUBBISH}{key}-{os.getpid()}-{count}").exists():
            count += 1
        return path

    def _discard(self, path: Path) -> None:
        """Remove a file or folder so that a half-removed one is never seen under its name."""
        if not path.exists():
            return
        rubbish = self._rubbish(path.name.lstrip("."))
        os.rename(path, rubbish)
        _remove_tree(rubbish)

    def _sweep(self) -> None:
        """Finish or undo what a killed process had begun."""
        for replaced in self.folder.glob(f"{_REPLACED}*"):
            place = self.folder / replaced.name.removeprefix(_REPLACED)
            if place.exists():
                self._discard(replaced)
            else:
                os.rename(replaced, place)
        for rubbish in self.folder.glob(f"{_RUBBISH}*"):
            _remove_tree(rubbish)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file at once or not at all, over an older one if there is one.

    Raises:
        FileError: it cannot be written, or the disk is full.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, as `write_json` does."""
    draft = path.with_name(f"{_RUBBISH}{path.name}-{os.getpid()}")
    with file_errors(path, "written", len(text)):
        try:
            draft.write_text(text, encoding="utf-8")
            flush(draft)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        flush(path.parent)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StudyError: it is missing or no JSON.
        FileError: it cannot be read.
    """
    try:
        with file_errors(path, "read"):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is damaged ({error}): restore it from a copy") from error


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written, before anything slow.

    Args:
        folder: it may be there, or not yet.
        flag: what names it, for the message.

    Raises:
        FileError: the message says why.
    """
    advice = f"choose another folder with {flag}"
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # to be made; what is in the way is found below
    except OSError as error:
        raise FileError(f"{folder} cannot be used ({error.strerror}): {advice}") from error
    nearest = folder
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        kind = "a link that leads nowhere" if nearest.is_symlink() else "a file"
        raise FileError(f"{nearest} is {kind}: {flag} must be a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FileError(f"{nearest} cannot be written: {advice}")


@contextmanager
def file_errors(path: Path, what: str, size: int | None = None) -> Iterator[None]:
    """Turn errors of the file system into one clear error.

    Args:
        path: The file or folder that the message names.
        what: The verb: "written", "read".
        size: How many bytes were to be written, where that is known.
    """
    needed = "" if size is None else f"; {size:,} bytes are needed"
    try:
        yield
    except FileNotFoundError as error:
        if what == "read":
            raise StudyError(f"{path} is missing: restore it from a copy") from error
        raise FileError(f"{path} cannot be {what}: {error.strerror}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be {what}: {error.strerror or error}{needed}") from error
    except Exception as error:
        # Writers of tensors wrap the system's error in a type of their own.
        system = re.search(r"\(os error (\d+)\)", str(error))
        if system is None:
            raise
        raise FileError(f"{path} cannot be {what}: {os.strerror(int(system[1]))}{needed}") from error


def _flush_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file or a folder's listing is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
