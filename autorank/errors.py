"""The errors autorank raises on purpose, each with the exit code the command line returns.

AutorankError
├── CommandError      2   a flag, a setting or the budget
├── DataError         3   the data set: files, columns, labels, the metric
├── ModelError        4   the base model, its layers and targets
├── StudyError        5   a stored study: missing, damaged, not the same
├── FileError         6   files and processes: unwritable, full, held by another process
└── AllTrialsFailed   7   no trial finished

A message says the rule, the value that broke it and the way out. A trial that
fails is data and raises none of these.
"""

from __future__ import annotations

__all__ = [
    "AllTrialsFailed",
    "AutorankError",
    "CommandError",
    "DataError",
    "FileError",
    "ModelError",
    "StudyError",
    "first_line",
]


class AutorankError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code: int = 1


class CommandError(AutorankError):
    """A flag, a configuration key or the budget cannot be used."""

    exit_code = 2


class DataError(AutorankError):
    """The data set, its columns, its labels or the metric cannot be used."""

    exit_code = 3


class ModelError(AutorankError):
    """The base model or the target modules cannot be used."""

    exit_code = 4


class StudyError(AutorankError):
    """A stored study is missing, damaged or differs from what was asked for."""

    exit_code = 5


class FileError(AutorankError):
    """A file cannot be read or written, or another process holds the study."""

    exit_code = 6


class AllTrialsFailed(AutorankError):
    """Every trial of the study failed; the message counts the reasons."""

    exit_code = 7


def first_line(error: BaseException) -> str:
    """A library's message without what follows its first line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
