"""Token sequences: what is trained of each, before they are cut. Pure lists; knows no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Tokens", "runs"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a row, uncut.

    Attributes:
        ids: the tokens.
        trained: of each, whether it is one that the model should predict.
        answers: the texts that should be written: one for each run of trained tokens, in their order,
            or where the two differ in number the last one alone. None for a text that answers nothing.
        untold: how many answers the row has besides, of which no token is trained.
    """

    ids: list[int]
    trained: list[bool]
    answers: tuple[str, ...] = ()
    untold: int = 0


def runs(trained: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of trained tokens. The first token counts as none: nothing precedes it."""
    marks = [False, *trained[1:], False]
    edges = [at for at in range(1, len(marks)) if marks[at] != marks[at - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
