"""Token sequences: what is trained of each, and how those of plain texts are packed.

Pure lists: knows no tokenizer, and no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Tokens", "pack", "runs", "worth_packing"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a row, uncut.

    Attributes:
        ids: the tokens.
        trained: of each, whether it is one that the model should predict.
        answers: the texts that should be written: one for each run of trained tokens, in their order.
            None for a text that answers nothing.
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


def worth_packing(lengths: Sequence[int], length: int) -> bool:
    """Whether texts of these lengths would, each cut or padded to `length`, lose text or waste half of it."""
    return any(one > length for one in lengths) or 2 * sum(lengths) < length * len(lengths)


def pack(texts: Sequence[Tokens], length: int) -> list[Tokens]:
    """Texts one after the other, in their order, cut into sequences of exactly `length` tokens.

    The last one may be shorter; a single token that is left over is lost, for nothing precedes it. The
    texts of one sequence see each other, as is usual. The first token of a text stays untrained, as it
    is where each text stands alone, so that losses per token compare.
    """
    ids = [token for text in texts for token in text.ids]
    trained = [mark and at > 0 for text in texts for at, mark in enumerate(text.trained)]
    starts = range(0, len(ids) - 1, length)
    return [Tokens(ids[at : at + length], trained[at : at + length]) for at in starts]
