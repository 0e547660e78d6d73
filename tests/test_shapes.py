"""Shapes of instruction data: which is recognised, what it becomes, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import DataError
from autorank.rows import Part, Places
from autorank.shapes import read_shapes

WORDS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def openai(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": WORDS.get(role, role), "value": content} for role, content in turns]


def part(*rows: dict[str, Any]) -> Part:
    return Part(list(rows), Places("t.jsonl", range(1, len(rows) + 1), lines=True))


def read(*rows: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    parts, notes = read_shapes({"train": part(*rows)})
    return parts["train"].rows, notes


TALK = (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"messages": openai(*TALK)}, "shape: OpenAI chat, turns of role and content"),
        ({"conversations": sharegpt(*TALK)},
         "shape: ShareGPT chat, turns of from and value, conversations read as messages"),
        ({"messages": sharegpt(*TALK)}, "shape: ShareGPT chat, turns of from and value"),
        ({"conversations": openai(*TALK)},
         "shape: OpenAI chat, turns of role and content, conversations read as messages"),
    ],
)  # fmt: skip
def test_chats_come_in_one_form(row: dict[str, Any], note: str) -> None:
    rows, notes = read({"id": 7, **row})
    assert rows == [{"id": 7, "messages": openai(*TALK)}]
    assert notes == [note]


PIECES = st.sampled_from(["system", "user", "assistant", "tool", "user assistant", "tool assistant"])


@given(st.lists(PIECES, min_size=1, max_size=5), st.sampled_from([openai, sharegpt]))
def test_the_order_of_roles(pieces: list[str], form: Any) -> None:
    roles = " ".join(pieces).split()
    turns = [(role, f"t{index}") for index, role in enumerate(roles)]
    order = "".join(role[0] for role in roles)  # u, a, s, t
    fits = re.fullmatch(r"s?(ua(t+a)*t*)*(u)?", order) and order[0] in "su"
    if fits and "a" in order:
        rows, notes = read({"messages": form(*turns)})
        kept = order.rindex("a") + 1
        assert rows[0]["messages"] == openai(*turns[:kept])
        assert len(notes) == 1 + (kept < len(order))
    else:
        with pytest.raises(DataError, match=r"t\.jsonl:1: field 'messages"):
            read({"messages": form(*turns)})


def test_what_follows_the_last_assistant_turn_is_left_out_and_counted() -> None:
    row = {"messages": openai(*TALK)}
    longer = {"messages": openai(*TALK, ("user", "e"))}
    parts, notes = read_shapes(
        {"train": part(row, longer, longer), "validation": part(row), "test": part(longer)}
    )
    assert [len(row["messages"]) for row in parts["train"].rows] == [5, 5, 5]
    assert notes == [
        "shape: OpenAI chat, turns of role and content",
        "2 of 3 train chats go on after the last assistant turn: what follows it is left out",
        "1 of 1 test chats go on after the last assistant turn: what follows it is left out",
    ]
    assert len(longer["messages"]) == 6


def test_tools_and_what_calls_them_are_passed_through() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    answer = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}
    turns = [*openai(("user", "2+2")), call, answer, answer, *openai(("assistant", "4"))]
    assert read({"messages": turns})[0] == [{"messages": turns}]


def test_what_is_null_in_a_turn_was_not_said() -> None:
    turns = [{**turn, "tool_calls": None, "name": "x"} for turn in openai(*TALK)]
    assert read({"messages": turns})[0][0]["messages"] == [{**turn, "name": "x"} for turn in openai(*TALK)]


USER, SAYS = ("user", "a"), ("assistant", "b")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, "field 'messages' is missing; it must be a list of turns"),
        ([], "field 'messages' is empty; it must be a list"),
        ("hello", "field 'messages' is str; it must be a list"),
        ([*openai(USER), "b"], r"field 'messages\[1\]' is str; a turn is an object with role and content"),
        ([*openai(USER), {"role": "assistant"}], r"field 'messages\[1\]\.content' is missing; it must"),
        ([*openai(USER), {"content": "b"}], r"field 'messages\[1\]\.role' is missing; roles are"),
        (openai(USER, ("bot", "b")), r"field 'messages\[1\]\.role' is 'bot'; roles are system, user"),
        (openai(USER, ([], "b")), r"field 'messages\[1\]\.role' is '\[\]'; roles are"),
        (openai(USER, ("assistant", 4)), r"field 'messages\[1\]\.content' is int '4'; it must be text"),
        (openai(USER, ("assistant", None)), r"field 'messages\[1\]\.content' is missing"),
        (openai(("user", " "), SAYS), r"field 'messages\[0\]\.content' is empty; remove the turn"),
        (openai(("user", "\ud800"), SAYS), r"field 'messages\[0\]\.content' holds half a surrogate pair"),
        (openai(SAYS), r"field 'messages\[0\]\.role' is 'assistant' at the start; a system"),
        (openai(USER, SAYS, SAYS), r"field 'messages\[2\]\.role' is 'assistant' after 'assistant'; a system"),
        (openai(USER, USER, SAYS), r"field 'messages\[1\]\.role' is 'user' after 'user'"),
        (openai(USER, SAYS, ("system", "s")), r"field 'messages\[2\]\.role' is 'system' after 'assistant'"),
        (openai(USER, ("tool", "t"), SAYS), r"field 'messages\[1\]\.role' is 'tool' after 'user'"),
        (openai(("system", "s"), USER), "field 'messages' has no assistant turn; there is nothing to learn"),
    ],
)  # fmt: skip
def test_bad_turns_are_refused_with_place_and_field(turns: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^t\.jsonl:2: {message}"):
        read({"messages": openai(USER, SAYS)}, {"messages": turns})


def test_fields_are_named_as_the_data_name_them() -> None:
    good = {"conversations": sharegpt(USER, SAYS)}
    with pytest.raises(DataError, match=r"field 'conversations\[0\]\.from' is 'gpt' at the start; "):
        read(good, {"conversations": sharegpt(SAYS)})
    with pytest.raises(DataError, match=r"field 'conversations\[1\]\.value' is missing; it must be text"):
        read(good, {"conversations": [*sharegpt(USER), {"from": "gpt"}]})
    with pytest.raises(DataError, match=r"'bot'; roles are human, gpt, system, user, assistant, tool"):
        read(good, {"conversations": sharegpt(USER, ("bot", "x"))})


def test_an_empty_system_turn_is_kept() -> None:
    turns = openai(("system", ""), USER, SAYS)
    assert read({"messages": turns})[0] == [{"messages": turns}]


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        ({"instruction": "a", "output": "b"}, ["shape: Alpaca, columns instruction, output"]),
        ({"instruction": "a", "input": "", "output": "b"},
         ["shape: Alpaca, columns instruction, input, output"]),
        ({"instruction": "a"}, []),
        ({"text": "a", "messages": 3}, []),
        ({"text": "a", "conversations": "none"}, []),
        ({"text": "a", "label": "x", "messages": ["first", "second"]}, []),
        ({"text": "a", "label": "x", "messages": []}, []),
        ({"text": "a", "label": "x", "conversations": [{"id": 1}]}, []),
    ],
)  # fmt: skip
def test_other_rows_stay_as_they_are(row: dict[str, Any], notes: list[str]) -> None:
    assert read(row) == ([row], notes)
