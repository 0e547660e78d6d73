"""How numbers, settings and stored text are written for people. Plain strings; no terminal here."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from autorank.config import REGULARISERS

__all__ = [
    "close_to",
    "counted",
    "format_bytes",
    "format_difference",
    "format_duration",
    "format_rate",
    "format_value",
    "name_lines",
    "param_parts",
    "printable",
    "regulariser_parts",
    "shortened",
]


def counted(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def close_to(word: str, known: Iterable[str]) -> str:
    """`; do you mean accuracy?` where one of the known words is close to this one, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; do you mean {close[0]}?" if close else ""


def format_value(value: object) -> str:
    """A metric or loss to four decimals, fewer where it is large; `-` where there is none."""
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.4f}" if not math.isfinite(value) or abs(value) < 100 else f"{value:,.1f}"


def format_difference(value: float | None) -> str:
    """A difference with its sign, to four decimals; never -0."""
    return "-" if value is None else f"{round(value, 4) + 0.0:+.4f}"


def format_rate(rate: object) -> str:
    """A learning rate as people write it: 2e-3, 1.5e-4."""
    if not isinstance(rate, (int, float)):
        return "-"
    digits, _, exponent = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def format_duration(seconds: float) -> str:
    """45s, 2m 10s, 1h 05m, 2d 3h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def format_bytes(count: object) -> str:
    """Memory in powers of two: 0.4 GiB, 12 MiB."""
    if not isinstance(count, (int, float)):
        return "-"
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def param_parts(params: Mapping[str, Any]) -> list[str]:
    """A trial's settings in a few words each, the telling ones first."""
    parts = [str(params[key]) for key in ("target_modules", "allocation") if params.get(key) is not None]
    if params.get("rank") is not None:
        parts.append(f"rank {params['rank']}" if params["rank"] else "start from the gradient")
    if params.get("scaling") is not None:
        parts.append(f"scaling {params['scaling']:.3g}")
    if params.get("learning_rate") is not None:
        parts.append(f"rate {format_rate(params['learning_rate'])}")
    if params.get("head_learning_rate") is not None:
        parts.append(f"head {format_rate(params['head_learning_rate'])}")
    if params.get("head_scale") not in (None, 1.0):
        parts.append(f"head scale {params['head_scale']:.3g}")
    parts += regulariser_parts(params)
    return [printable(part) for part in parts]


def regulariser_parts(params: Mapping[str, Any]) -> list[str]:
    """What holds a trial back, where anything does: `dropout 0.1`, `weight decay 0.5`."""
    return [f"{name.replace('_', ' ')} {params[name]:.3g}" for name in REGULARISERS if params.get(name)]


def shortened(text: str, most: int = 600) -> str:
    """A text with its middle left out where it is long: begin and end tell most."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} […] {text[-half:]}"


def name_lines(name: str, most: int) -> list[str]:
    """A name over lines of at most `most` characters, broken after its own marks where that is enough."""
    lines = [""]
    for part in re.findall(r"[^_:./-]*[_:./-]|[^_:./-]+", name):
        if len(lines[-1]) + len(part) > most and lines[-1]:
            lines.append("")
        while len(part) > most:
            lines[-1], part = part[:most], part[most:]
            lines.append("")
        lines[-1] += part
    return lines


def printable(text: str, *, lines: bool = False) -> str:
    """`text` without control characters, so that it cannot drive a terminal; one line unless `lines`."""
    if not lines:
        text = re.sub(r"\s+", " ", text)
    return "".join(c for c in text if c in "\n\t" or c.isprintable()).strip()
