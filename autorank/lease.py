"""One coordinator per study: a lock that the kernel holds, and a note of who has it.

The lock ends with its process, however that dies, so nothing is ever stale. Readers need no lease, and
never try the lock: one that starts would find it taken.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from filelock import FileLock, Timeout

from autorank.artifacts import file_errors, read_json, write_json
from autorank.errors import FileError, StudyError

__all__ = ["Lease", "owner"]

_NOTE = "lease.json"


class Lease:
    """The right to write a study, for the length of a `with` block.

    Raises:
        FileError: another process has it, and the message names that; or the folder cannot be written.
        StudyError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._note = folder / _NOTE
        self._lock = FileLock(folder / "lease.lock")

    def __enter__(self) -> Lease:
        if not self._folder.is_dir():
            # Checked here because taking the lock would make the folder.
            raise StudyError(f"there is no study {self._folder.name!r} in {self._folder.parent}")
        with file_errors(self._folder, "locked"):
            self._acquire()
        try:
            for draft in self._folder.glob(".tmp-*-*"):
                if draft.is_file():
                    draft.unlink()  # a holder was killed while it wrote it
            write_json(self._note, _myself())
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._note.unlink(missing_ok=True)
        self._lock.release()

    def _acquire(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise FileError(
                f"study {self._folder.name!r} is in use by {self._holder()}: wait until it is done or "
                f"end it; `autorank show {self._folder.name}` works meanwhile"
            ) from error

    def _holder(self) -> str:
        """Who holds the lock, as far as its note says; it may be about to write it."""
        note = _read(self._note)
        return "another process" if note is None else _words(note)


def owner(folder: Path) -> str | None:
    """Which other process trains a study now, in words; None where none does, or it is gone.

    Of a process on another host nothing is known but its note.
    """
    note = _read(folder / _NOTE)
    if note is None or (note["host"] == socket.gethostname() and not _is_another(note)):
        return None
    return _words(note)


def _read(place: Path) -> dict[str, Any] | None:
    try:
        note = read_json(place)
        return {"pid": int(note["pid"]), "host": str(note["host"]), "started": str(note["started"])}
    except (StudyError, FileError, KeyError, TypeError, ValueError):
        return None


def _words(note: dict[str, Any]) -> str:
    return f"process {note['pid']} on {note['host']}, since {note['started']}"


def _is_another(note: dict[str, Any]) -> bool:
    """Whether the process that wrote the note is not this one and runs: one of its number, no younger."""
    if note["pid"] == os.getpid():
        return False
    try:
        started = datetime.fromisoformat(note["started"]).timestamp()
        process = psutil.Process(note["pid"])
        # The note is of whole seconds, and written after the process began.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < started + 2
    except (psutil.Error, ValueError, OverflowError):
        return False


def _myself() -> dict[str, Any]:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
