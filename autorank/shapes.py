"""Shapes of instruction data: which one the rows have, and chats in one form.

OpenAI's `messages` of role and content and ShareGPT's `conversations` of from and value both become
`messages` with the roles system, user, assistant and tool. Alpaca's columns stay as they are. Pure
functions on rows; what is trained on them is the task's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autorank.errors import DataError
from autorank.rows import Part, Row

__all__ = ["read_shapes"]

Turn = dict[str, Any]


@dataclass(frozen=True)
class _Form:
    """How a chat writes a turn: the name of its form, its two keys, and its words for the roles."""

    told: str
    role: str
    content: str
    roles: Mapping[str, str]


_OWN = {role: role for role in ("system", "user", "assistant", "tool")}
_OPENAI = _Form("OpenAI chat, turns of role and content", "role", "content", _OWN)
_SHAREGPT = _Form(
    "ShareGPT chat, turns of from and value", "from", "value", {"human": "user", "gpt": "assistant", **_OWN}
)
_WORDS = {word for form in (_OPENAI, _SHAREGPT) for word in (form.role, form.content)}
_ALPACA = ("instruction", "input", "output")
# What may come after a turn; the conversation starts after the one that is no turn.
_NEXT = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
_ORDER = "a system turn comes first only, then user and assistant in turn, tools behind the assistant"


def read_shapes(parts: Mapping[str, Part]) -> tuple[dict[str, Part], list[str]]:
    """The splits with their chats in one form, and notes that say which shape was recognised.

    A turn after the last one of the assistant is left out, and counted in a note: nothing is learnt
    from it.

    Raises:
        DataError: a turn is malformed, unknown or out of order, or no turn is the assistant's.
    """
    read: dict[str, Part] = {}
    told: dict[str, None] = {}
    counted: list[str] = []
    for split, part in parts.items():
        column = next((name for name in ("messages", "conversations") if _is_chat(part.rows, name)), None)
        if column is None:
            read[split] = part
            columns = [name for name in _ALPACA if any(name in row for row in part.rows)]
            if {"instruction", "output"} <= set(columns):
                told[f"shape: Alpaca, columns {', '.join(columns)}"] = None
            continue
        form = _form_of(part.rows, column)
        rows = [_read_row(row, column, form, part.places[index]) for index, row in enumerate(part.rows)]
        pairs = zip(rows, part.rows, strict=True)
        cut = sum(len(row["messages"]) < len(given[column]) for row, given in pairs)
        read[split] = Part(rows, part.places)
        told[f"shape: {form.told}" + ("" if column == "messages" else f", {column} read as messages")] = None
        if cut:
            counted.append(
                f"{cut:,} of {len(rows):,} {split} chats go on after the last assistant turn: "
                "what follows it is left out"
            )
    return read, [*told, *counted]


def _is_chat(rows: Sequence[Row], column: str) -> bool:
    """Whether a column begins as one of chats does, with a list of turns in either form."""
    first = next((row[column] for row in rows if row.get(column)), None)
    turn = first[0] if isinstance(first, list) else None
    return isinstance(turn, dict) and not turn.keys().isdisjoint(_WORDS)


def _form_of(rows: Sequence[Row], column: str) -> _Form:
    """The form that the first turn of a column is written in."""
    turn = next((row[column][0] for row in rows if isinstance(row.get(column), list) and row[column]), None)
    return _SHAREGPT if isinstance(turn, dict) and {"from", "value"} & set(turn) else _OPENAI


def _read_row(row: Row, column: str, form: _Form, place: str) -> Row:
    """The row with its chat as `messages`, checked, up to the last assistant turn."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        found = "is missing" if value is None else "is empty" if value == [] else f"is {type(value).__name__}"
        raise DataError(f"{place}: field {column!r} {found}; it must be a list of turns")
    turns: list[Turn] = []
    before: str | None = None
    for index, given in enumerate(value):
        turn = _read_turn(given, form, f"{column}[{index}]", place)
        role = turn["role"]
        if role not in _NEXT[before]:
            after = f"after {before!r}" if before else "at the start"
            raise DataError(
                f"{place}: field '{column}[{index}].{form.role}' is {given[form.role]!r} {after}; {_ORDER}"
            )
        turns.append(turn)
        before = role
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{place}: field {column!r} has no assistant turn; there is nothing to learn from it")
    kept = {name: value for name, value in row.items() if name not in (column, "messages")}
    return {**kept, "messages": turns}


def _read_turn(turn: object, form: _Form, path: str, place: str) -> Turn:
    """The turn with `role` and `content`."""
    if not isinstance(turn, dict):
        raise DataError(
            f"{place}: field {path!r} is {type(turn).__name__}; "
            f"a turn is an object with {form.role} and {form.content}"
        )
    word = turn.get(form.role)
    role = form.roles.get(word) if isinstance(word, str) else None
    if role is None:
        found = "is missing" if word is None else f"is {str(word)[:40]!r}"
        raise DataError(f"{place}: field '{path}.{form.role}' {found}; roles are {', '.join(form.roles)}")
    content = turn.get(form.content)
    if role != "tool" and not (role == "assistant" and content is None and turn.get("tool_calls")):
        _check_content(content, role, f"{path}.{form.content}", place)
    if form is _SHAREGPT:
        return {"role": role, "content": content}
    # A table has each key in every turn; what is null in it was not said.
    return {key: value for key, value in turn.items() if value is not None or key == "content"}


def _check_content(content: object, role: str, path: str, place: str) -> None:
    """Refuse what is no text; a system turn alone may be empty."""
    if not isinstance(content, str):
        found = "is missing" if content is None else f"is {type(content).__name__} {str(content)[:40]!r}"
        raise DataError(f"{place}: field {path!r} {found}; it must be text (a string)")
    if role != "system" and not content.strip():
        raise DataError(f"{place}: field {path!r} is empty; remove the turn or fill it in")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {path!r} holds half a surrogate pair at character {error.start + 1}; "
            "write the whole character"
        ) from None
