"""Instructions as prompts: Alpaca's triples, and templates of a person's own.

Pure text; which tokens are trained is the task's business.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from autorank.errors import CommandError, DataError
from autorank.rows import Row, listed

__all__ = ["ANSWERS", "alpaca_input", "alpaca_prompt", "alpaca_turns", "fill_template", "template_fields"]

ANSWERS = ("completion", "output", "label")
"""What may hold the answer to a template's prompt, the first that there is."""

# The wording of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), which most such models have seen.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)


def alpaca_input(row: Row) -> Any:
    """What an Alpaca row has as `input`; None where that is missing or blank, as it is in most rows."""
    given = row.get("input")
    return None if isinstance(given, str) and not given.strip() else given


def alpaca_prompt(row: Row) -> str:
    """The prompt of an Alpaca row: `instruction`, and `input` where it is not blank."""
    given = alpaca_input(row)
    paired = ", paired with an input that provides further context" if given else ""
    inner = f"### Input:\n{given}\n\n" if given else ""
    return _ALPACA.format(paired=paired, instruction=row["instruction"], given=inner)


def alpaca_turns(row: Row) -> list[dict[str, str]]:
    """An Alpaca row as a conversation of two turns."""
    given = alpaca_input(row)
    asked = f"{row['instruction']}\n\n{given}" if given else str(row["instruction"])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": str(row["output"])}]


def template_fields(template: str) -> tuple[str, ...]:
    """The columns that a template names, in its order.

    Args:
        template: text with columns in braces, `Question: {question}`; `{{` and `}}` stand for braces.

    Raises:
        CommandError: it names no column, or does more than name columns.
    """
    rule = "a template names columns in braces, such as 'Question: {question}\\nAnswer: ', and doubles others"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise CommandError(f"template {template!r} cannot be used ({error}): {rule}") from None
    fields = [(field, bool(spec or conversion)) for _, field, spec, conversion in parts if field is not None]
    for field, more in fields:
        if more or not field or field.isdecimal() or set(field) & set(".[]"):
            raise CommandError(f"template {template!r}: {{{field}}} is more than a column's name: {rule}")
    if not fields:
        raise CommandError(f"template {template!r} names no column: {rule}")
    return tuple(dict.fromkeys(field for field, _ in fields))


def fill_template(template: str, fields: Sequence[str], row: Mapping[str, Any], place: str) -> str:
    """The prompt of a row.

    Raises:
        DataError: a column of it is missing, or is neither text nor a number.
    """
    for field in fields:
        value = row.get(field)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            found = "is missing" if value is None else f"is {type(value).__name__}"
            raise DataError(
                f"{place}: field {field!r} {found}; the template puts text or a number there "
                f"(the row has {listed(row)})"
            )
    return template.format(**{field: row[field] for field in fields})
