"""Budgets: numbers of trainable adapter parameters, as people write them.

A budget counts adapter parameters only; heads are counted apart. No torch here.
"""

from __future__ import annotations

import re
from decimal import Decimal

from autorank.errors import CommandError

__all__ = ["format_count", "parse_budget"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_FORM = re.compile(r"(?P<number>\d+(?:_\d+)*(?:\.\d+)?)\s*(?P<unit>[kmb]?)", re.IGNORECASE | re.ASCII)
_LARGEST = 10**12


def parse_budget(text: str | int) -> int:
    """Read a budget such as `2M`, `170k`, `1.5M`, `2_000_000` or `9216`.

    Units are k, M and B for thousand, million and milliard (10^9) in either case: parameters
    come in no fractions, so `2m` can only mean two million.

    Returns:
        The number of parameters, from 1 to 10^12.

    Raises:
        CommandError: the text has another form, or is not a whole number in that range.
    """
    rule = "a budget is a number of trainable parameters, such as 170k, 2M, 1.5M or 2000000"
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise CommandError(f"budget {text!r}: {rule}")
    match = _FORM.fullmatch(str(text).strip())
    if match is None:
        hint = _hint(str(text).strip())
        raise CommandError(f"budget {str(text)!r} is not understood: {rule}{hint}")
    count = Decimal(match["number"].replace("_", "")) * _UNITS[match["unit"].lower()]
    if count != count.to_integral_value():
        raise CommandError(f"budget {str(text)!r} is {count} parameters: it must be a whole number")
    if not 1 <= count <= _LARGEST:
        raise CommandError(f"budget {str(text)!r} is out of range: it must be from 1 to 1000B")
    return int(count)


def _hint(text: str) -> str:
    """What a near miss probably meant."""
    if text.endswith("%"):
        return "; a share of the model is not, see `autorank plan` for the layers' costs"
    if re.search(r"[kmgb]i?b(ytes)?$", text, re.IGNORECASE):
        return "; bytes are not"
    if "," in text:
        return "; write a decimal point, and no separators but _"
    return ""


def format_count(count: int) -> str:
    """Write a number of parameters for people: 165,888."""
    return f"{count:,}"
