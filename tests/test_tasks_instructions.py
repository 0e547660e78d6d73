"""Instructions as prompts: Alpaca's wording, and templates of a person's own."""

from __future__ import annotations

from typing import Any

import pytest

from autorank.errors import CommandError, DataError
from autorank.tasks.instructions import alpaca_prompt, alpaca_turns, fill_template, template_fields


def test_the_wording_is_that_of_alpaca() -> None:
    assert alpaca_prompt({"instruction": "Say hi.", "input": "", "output": "hi"}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert alpaca_prompt({"instruction": "Add {x}.", "input": "2, 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n"
        "### Input:\n2, 2\n\n### Response:\n"
    )


def test_an_empty_input_is_no_part_of_the_turn() -> None:
    asked = [
        alpaca_turns({"instruction": "a", "input": given, "output": "b"})[0]
        for given in ("", "c", None, " \n")
    ]
    assert [turn["content"] for turn in asked] == ["a", "a\n\nc", "a", "a"]
    assert alpaca_turns({"instruction": "a", "output": "b"})[0]["content"] == "a"


def test_a_template_names_columns_and_doubles_other_braces() -> None:
    template = "{question} {{not one}} {a hint} {question}"
    fields = template_fields(template)
    assert fields == ("question", "a hint")
    row = {"question": "why {0}?", "a hint": 3, "other": None}
    assert fill_template(template, fields, row, "here") == "why {0}? {not one} 3 why {0}?"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question.__class__}", "is more than a column's name"),
        ("{question[0]}", "is more than a column's name"),
        ("{question:{hint}}", "is more than a column's name"),
        ("{question:>999999999}", "is more than a column's name"),
        ("{question!r}", "is more than a column's name"),
        ("{0}", "is more than a column's name"),
        ("{}", "is more than a column's name"),
        ("no column", "names no column"),
        ("{open", "cannot be used"),
        ("}", "cannot be used"),
    ],
)
def test_a_template_that_does_more_is_refused(template: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        template_fields(template)


@pytest.mark.parametrize("value", [None, True, ["a"], {"a": 1}])
def test_what_is_no_text_and_no_number_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: field 'q' .*\(the row has q, a\)"):
        fill_template("{q}", ("q",), {"q": value, "a": "b"}, "rows.jsonl:7")
