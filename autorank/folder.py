"""The folder of a study: its name, its files, and how it comes into being at once.

It holds `study.db`, `config.json`, `events.jsonl` and what others keep there. What the database
says is `study.py`'s business.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autorank.artifacts import file_errors, read_json, write_json
from autorank.config import NAME, NAME_RULE
from autorank.errors import FileError, StudyError

__all__ = ["StudyFolder", "study_folder", "study_names"]


def study_folder(studies_dir: str | Path, name: str) -> Path:
    """The folder of a study.

    Raises:
        StudyError: the name could lead out of the folder of studies.
    """
    if NAME.fullmatch(name) is None:
        raise StudyError(f"{name!r} is no name of a study: a name is {NAME_RULE}")
    return Path(os.path.expanduser(studies_dir)) / name


def study_names(studies_dir: str | Path) -> list[str]:
    """The names of the studies there are, sorted; those that cannot be read too.

    Raises:
        FileError: it is not a folder, or cannot be read.
    """
    folder = Path(os.path.expanduser(studies_dir))
    with file_errors(folder, "read"):
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder} is a file: --studies-dir must be a folder")
        found = [path.parent.name for path in folder.glob("*/study.db")]
    return sorted(name for name in found if NAME.fullmatch(name))


class StudyFolder:
    """The files of one study.

    Raises:
        StudyError: the folder's name is no name of a study.
    """

    def __init__(self, path: Path) -> None:
        self.path = study_folder(path.parent, path.name)
        self.name = path.name
        self.database = path / "study.db"

    def create(self, config: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
        """Make the folder, complete or not at all.

        Args:
            config: What `config.json` will hold.
            fill: Makes the database at the path it is given.

        Raises:
            StudyError: there is something under this name already.
            FileError: the folder cannot be made.
        """
        self.check_free()
        draft = self.path.with_name(f".tmp-{self.name}-{os.getpid()}")
        with file_errors(self.path, "made"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            draft.mkdir()
            try:
                write_json(draft / "config.json", config)
                fill(draft / "study.db")
                self.check_free()
                os.rename(draft, self.path)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def check_free(self) -> None:
        """Whether a study can be made here.

        Raises:
            StudyError: there is something under this name already.
        """
        if os.path.lexists(self.path) and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise StudyError(
                f"{self.path} exists already: go on with `autorank resume {self.name}`, "
                "or start another study with --name"
            )

    def check(self) -> None:
        """Whether the folder is there, and what is written in it lies in it.

        Raises:
            StudyError: it is not, and the message says which studies there are; or a part of it is a link.
            FileError: the folder of studies is a file.
        """
        if self.path.is_dir():
            parts = [*self.path.iterdir(), *(self.path / "artifacts").glob("*")]
            link = next((part for part in parts if part.is_symlink()), None)
            if link is not None:  # a study from elsewhere does not write to other files here
                raise StudyError(
                    f"{link} is a link, which no part of a study is: put in its place what it names"
                )
            return
        if self.path.exists():
            raise StudyError(f"{self.path} is a file, not the folder of a study: name another study")
        names = study_names(self.path.parent)
        close = difflib.get_close_matches(self.name, names, n=3)
        known = f"there are: {', '.join(names)}" if names else "there is none yet"
        known = f"did you mean {', '.join(close)}?" if close else known
        raise StudyError(f"there is no study {self.name!r} in {self.path.parent}: {known}")

    def config(self) -> dict[str, Any]:
        """What the study was asked to do.

        Raises:
            StudyError: the file is missing or damaged.
        """
        config = read_json(self.path / "config.json")
        if not isinstance(config, dict):
            raise StudyError(f"{self.path / 'config.json'} is damaged (no object): restore it from a copy")
        return config

    def log_event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Append what happened, and when."""
        event = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "kind": kind, **facts}
        path = self.path / "events.jsonl"
        # The newline comes first: a line that a kill cut short does not spoil the next one.
        line = "\n" + json.dumps(event, ensure_ascii=False)
        with file_errors(path, "written", len(line)), path.open("a", encoding="utf-8") as file:
            file.write(line)

    def events(self) -> list[dict[str, Any]]:
        """All events, in order, without lines that a kill cut short."""
        path = self.path / "events.jsonl"
        if not path.exists():
            return []
        with file_errors(path, "read"):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [event for event in map(_event, lines) if event is not None]

    def _sweep(self) -> None:
        """Remove what a process that no longer runs had begun under this name."""
        for draft in self.path.parent.glob(f".tmp-{self.name}-*"):
            pid = draft.name.removeprefix(f".tmp-{self.name}-")
            if pid.isdigit() and not _other_runs(int(pid)):
                shutil.rmtree(draft, ignore_errors=True)


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None


def _other_runs(pid: int) -> bool:
    """Whether a process other than this one has that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
