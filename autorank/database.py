"""The SQLite file of a study: made, checked and opened for Optuna, or copied to be read.

What is wrong with a file is found out here, before Optuna sees it, and said in one message.
A file that is missing is never created by opening it. What the rows mean is `study.py`'s business.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, StaticPool

from autorank.errors import FileError, StudyError
from autorank.sampler import quiet_optuna

__all__ = ["copy_database", "create_database", "network_filesystem", "open_database", "storage_errors"]

_HEADER = b"SQLite format 3\x00"
_TABLES = {"studies", "study_directions", "study_user_attributes", "trials", "trial_params", "version_info"}
_ATTRIBUTES = (
    "study_user_attributes",
    "study_system_attributes",
    "trial_user_attributes",
    "trial_system_attributes",
)
_LARGEST_ATTRIBUTE = 16 * 2**20
_LOCK_TIMEOUT_S = 30.0
_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "lustre", "ceph", "glusterfs", "afs")


def create_database(path: Path) -> RDBStorage:
    """Make a new file with Optuna's tables in it."""
    with storage_errors(path):
        # Exclusive: an old file is never taken for the new one.
        path.open("xb").close()
        return _storage(_connector(path), NullPool, tables=True)


def open_database(path: Path) -> RDBStorage:
    """Check a study's file and open it for reading and writing.

    Raises:
        StudyError: the file is missing, damaged, not a study or of another Optuna.
        FileError: it cannot be read or written, or another process has locked it.
    """
    _check_file(path)
    with storage_errors(path):
        with closing(_connector(path)()) as connection:
            _check_content(path, connection)
        return _storage(_connector(path), NullPool)


def copy_database(path: Path) -> RDBStorage:
    """Check a study's file and open a copy of it in memory; the file stays as it is.

    The copy is consistent while another process writes, and the writer is not disturbed.

    Raises:
        StudyError, FileError: as `open_database`.
    """
    _check_file(path)
    with storage_errors(path):
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            _fill(path, copy)
            _check_content(path, copy)
            return _storage(lambda: copy, StaticPool)
        except BaseException:
            copy.close()
            raise


def _fill(path: Path, copy: sqlite3.Connection) -> None:
    try:
        with closing(_connector(path, "ro")()) as source:
            source.backup(copy)
    except sqlite3.OperationalError:
        if not Path(f"{path}-journal").exists():
            raise
        # A writer was killed in the middle of a commit. Its journal must be rolled back, which
        # reading alone may not do: so it is done to a copy of both files.
        with tempfile.TemporaryDirectory(prefix="autorank-") as folder:
            twin = Path(folder) / path.name
            shutil.copyfile(path, twin)
            shutil.copyfile(f"{path}-journal", f"{twin}-journal")
            with closing(_connector(twin)()) as source:
                source.backup(copy)


def _connector(path: Path, mode: str = "rw") -> Callable[[], sqlite3.Connection]:
    """A function that connects to an existing file; a missing one is an error."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, timeout=_LOCK_TIMEOUT_S, check_same_thread=False)

    return connect


def _storage(
    connect: Callable[[], sqlite3.Connection], pool: type[NullPool] | type[StaticPool], tables: bool = False
) -> RDBStorage:
    """Optuna's storage over a connection. The URL names no file: any path would do as it is."""
    with quiet_optuna():
        return RDBStorage(
            "sqlite:///study.db",
            engine_kwargs={"creator": connect, "poolclass": pool},
            skip_compatibility_check=True,
            skip_table_creation=not tables,
        )


def _check_file(path: Path) -> None:
    """What can be seen without SQLite."""
    advice = "restore it from a copy, or start a new study with --name"
    if path.is_dir():
        raise StudyError(f"{path} is a folder, not a study's database: {advice}")
    if not path.exists():
        raise StudyError(f"{path} is missing, so there is no study here: {advice}")
    try:
        with path.open("rb") as file:
            header = file.read(len(_HEADER))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    if not header:
        raise StudyError(f"{path} is empty: {advice}")
    if header != _HEADER:
        raise StudyError(f"{path} is not a SQLite database: {advice}")


def _check_content(path: Path, connection: sqlite3.Connection) -> None:
    """Whether the pages are whole and the tables those of one Optuna study."""
    verdict = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
    if verdict != "ok":
        raise StudyError(
            f"{path} is damaged ({verdict.splitlines()[-1]}): restore it from a copy, "
            "or start a new study with --name"
        )
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables >= _TABLES:
        raise StudyError(
            f"{path} is a SQLite database but no study: it lacks the tables "
            f"{', '.join(sorted(_TABLES - tables))}. Name the folder of a study that autorank made"
        )
    if "alembic_version" not in tables or not (
        _first(connection, "SELECT count(*) FROM alembic_version")
        and _first(connection, "SELECT count(*) FROM version_info")
    ):
        raise StudyError(f"{path} does not say which Optuna made it: restore it from a copy")
    _check_schema(path, connection)
    count = _first(connection, "SELECT count(*) FROM studies")
    if count != 1:
        raise StudyError(
            f"{path} holds {count} studies, and autorank makes exactly one in a file: "
            "name a study that autorank made"
        )
    for table in _ATTRIBUTES:
        largest = _first(connection, f"SELECT max(length(value_json)) FROM {table}") or 0
        if largest > _LARGEST_ATTRIBUTE:
            raise StudyError(
                f"{path} holds an attribute of {largest:,} characters in {table}; autorank writes at most "
                f"{_LARGEST_ATTRIBUTE:,}. It was changed by something else: restore it from a copy"
            )


def _first(connection: sqlite3.Connection, query: str) -> int | None:
    value = connection.execute(query).fetchone()[0]
    return None if value is None else int(value)


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    """Whether this Optuna reads the file's tables."""
    current = str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])
    head, known = _schemas()
    if current == head:
        return
    if current in known:
        raise StudyError(
            f"{path} was made by an older Optuna (tables {current}, this one has {head}): copy the file, "
            f"then run `optuna storage upgrade --storage sqlite:///{path}`"
        )
    raise StudyError(
        f"{path} was made by a newer Optuna (tables {current}, this one has {head}): "
        "install the Optuna that made it, or a newer one"
    )


@cache
def _schemas() -> tuple[str, frozenset[str]]:
    """The version of the tables that this Optuna makes, and all that it knows. Slow to find out."""
    storage = _storage(lambda: sqlite3.connect(":memory:"), StaticPool, tables=True)
    try:
        return storage.get_head_version(), frozenset(storage.get_all_versions())
    finally:
        storage.engine.dispose()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite, SQLAlchemy and Optuna raise about a file into one clear error."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, OSError) as error:
        cause = _sqlite_error(error)
        text = str(cause).lower()
        if "locked" in text or "busy" in text:
            raise FileError(
                f"{path} is locked by another process: wait until it is done, or end it"
            ) from error
        if "full" in text or isinstance(cause, OSError) or "disk i/o" in text:
            needed = (path.stat().st_size if path.exists() else 0) + 2**20
            raise FileError(
                f"{path} cannot be written ({cause}): its last complete state is kept; "
                f"free at least {needed:,} bytes"
            ) from error
        if "readonly" in text or "unable to open" in text:
            raise FileError(f"{path} cannot be opened or written ({cause}): check its permissions") from error
        raise StudyError(
            f"{path} is damaged ({cause}): restore it from a copy, or start a new study with --name"
        ) from error


def _sqlite_error(error: BaseException) -> BaseException:
    """The innermost cause: SQLite's own words, not the wrapping ones."""
    seen = error
    while True:
        inner = getattr(seen, "orig", None) or seen.__cause__
        if not isinstance(inner, BaseException):
            return seen
        seen = inner


def network_filesystem(path: Path, mounts: str) -> str | None:
    """The type of the network file system that a path lies on, if it does.

    SQLite's locks do not hold on many of them.

    Args:
        path: An absolute path.
        mounts: The text of /proc/mounts.
    """
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = point == "/" or path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind if kind.startswith(_NETWORK) else None
