"""Columns: the roles that tasks know, and which column of a person's data plays which.

Pure text; whether the data have the columns is found out where they are read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from autorank.errors import CommandError

__all__ = ["ROLES", "parse_columns"]

ROLES = (
    "text",
    "label",
    "text_a",
    "text_b",
    "prompt",
    "completion",
    "messages",
    "source",
    "target",
    "tokens",
    "tags",
    "score",
    "question",
    "context",
    "answers",
    "image",
    "instruction",
    "input",
    "output",
)
"""What a task may call a column: the only column names it reads."""

_RULE = "columns are written role=column,role=column, such as text=question,label=intent"


def parse_columns(value: str | Mapping[str, Any] | None) -> dict[str, str] | None:
    """Read which column plays which role: `text=question,label=intent`, or a table of roles.

    Returns:
        Role -> column, each column once; None where none is named.

    Raises:
        CommandError: the text has another form, a role is not known, or a column is used twice.
    """
    if isinstance(value, str):
        pairs = [_pair(part, value) for part in value.split(",")]
        for role, _ in pairs:
            if [known for known, _ in pairs].count(role) > 1:
                raise CommandError(f"columns {value!r}: {role} is named twice; one column plays a role")
    elif value is None or isinstance(value, Mapping):
        pairs = list((value or {}).items())
    else:
        raise CommandError(f"columns {value!r} is not understood: {_RULE}")
    columns: dict[str, str] = {}
    for role, column in pairs:
        if role not in ROLES:
            close = difflib.get_close_matches(str(role), ROLES, n=1)
            hint = f"do you mean {close[0]}? " if close else ""
            raise CommandError(f"columns: {role!r} is no role: {hint}the roles are {', '.join(ROLES)}")
        if not isinstance(column, str) or not column:
            raise CommandError(
                f"columns.{role} is {column!r}: it must be the name of a column, in quotes where it looks "
                "like a number"
            )
        other = next((known for known, used in columns.items() if used == column), None)
        if other is not None:
            raise CommandError(f"columns: {other} and {role} both name {column!r}; a column plays one role")
        columns[role] = column
    return columns or None


def _pair(part: str, whole: str) -> tuple[str, str]:
    """One `role=column` of a text."""
    role, equals, column = (piece.strip() for piece in part.partition("="))
    if not role or not equals or not column:
        raise CommandError(
            f"columns {whole!r}: {part.strip()!r} is not understood: {_RULE}; a column whose name holds a "
            "comma is named in a study file"
        )
    return role, column
