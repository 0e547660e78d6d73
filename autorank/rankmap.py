"""The rank map: an adapter's ranks by place, a row per block and a column per kind of layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from autorank.budget import format_count
from autorank.figures import name_lines, printable
from autorank.plan import LayerSpec

__all__ = ["rank_map"]

_HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_PLACE = re.compile(r"(?P<stack>.*?)\.?(?P<block>\d+)\.(?P<kind>.+)")
_BLOCK_HEAD = "block"
_LEAST_CELL = 6
_LONGEST_LINE = 20  # of the name of a kind of layers

Cells = Mapping[tuple[int, str], int]


def rank_map(
    ranks: Mapping[str, int],
    layers: Sequence[LayerSpec] = (),
    *,
    starting: Mapping[str, int] | None = None,
) -> RenderableType:
    """Ranks by place, hotter where they are higher; empty where no layer was a target.

    Args:
        ranks: layer → rank, layers at rank 0 included.
        layers: the target layers; with them the legend tells the parameters.
        starting: the ranks the trial started with, for the legend.
    """
    return _RankMap(ranks, layers, starting or {}) if ranks else Text("no ranks recorded", "dim")


@dataclass(frozen=True)
class _RankMap:
    ranks: Mapping[str, int]
    layers: Sequence[LayerSpec]
    starting: Mapping[str, int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stacks: dict[str, dict[tuple[int, str], int]] = {}
        alone: dict[str, int] = {}
        for name, rank in self.ranks.items():
            match = _PLACE.fullmatch(name)
            if match is None:
                alone[name] = rank
            else:
                stacks.setdefault(match["stack"], {})[int(match["block"]), match["kind"]] = rank
        for stack, cells in stacks.items():
            title = printable(stack) if len(stacks) > 1 else None
            yield from self._tables(cells, title, options.max_width)
        for name, rank in alone.items():
            yield Text.assemble(f"{printable(name)}  ", self._cell(rank, 0))
        yield Text(self._legend(), "dim")

    def _tables(self, cells: Cells, title: str | None, width: int) -> Iterator[Table]:
        """One stack of blocks: as many maps below one another as the width asks for."""
        kinds = list(dict.fromkeys(kind for _, kind in cells))
        blocks = sorted({block for block, _ in cells})
        while kinds:
            room, count = width - len(_BLOCK_HEAD), 0
            while count < len(kinds) and (count == 0 or room > _width(kinds[count])):
                room -= _width(kinds[count]) + 1
                count += 1
            shown, kinds = kinds[:count], kinds[count:]
            table = Table(
                title=title,
                title_justify="left",
                title_style="bold",
                box=SIMPLE_HEAD,
                show_edge=False,
                pad_edge=False,
                padding=0,
                header_style="bold",
            )
            table.add_column(_BLOCK_HEAD, justify="right", no_wrap=True)
            for kind in shown:
                table.add_column("\n".join(_lines(kind)), justify="center", no_wrap=True)
            for block in blocks:
                row = [cells.get((block, kind)) for kind in shown]
                table.add_row(str(block), *("" if rank is None else self._cell(rank) for rank in row))
            yield table

    def _cell(self, rank: int, width: int = _LEAST_CELL) -> Text:
        """A rank on a background from dark (the lowest) to bright (the highest)."""
        text = f" {rank} ".center(width)
        if rank == 0:
            return Text(text, "dim")
        low, high = min(self.ranks.values()), max(self.ranks.values())
        share = (rank - low) / (high - low) if high > low else 0.5
        index = min(int(share * (len(_HEAT) - 1)), len(_HEAT) - 2)
        part = share * (len(_HEAT) - 1) - index
        colour = (round(a + (b - a) * part) for a, b in zip(_HEAT[index], _HEAT[index + 1], strict=True))
        ink = "#000000" if share > 0.55 else "#ffffff"
        return Text(text, Style.parse(f"{ink} on #{bytes(colour).hex()}"))

    def _legend(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        parts = [f"{'rank' if low == high else 'ranks'} {low}{'' if low == high else f' to {high}'}"]
        parts[0] += f" at {len(self.ranks)} layers"
        dead = sum(rank == 0 for rank in self.ranks.values())
        if dead:
            parts.append(f"{dead} of them at 0, without an adapter")
        if self.starting:
            moved = sum(self.starting.get(name) != rank for name, rank in self.ranks.items())
            parts.append(f"{moved} moved from where they started" if moved else "none moved")
        if self.layers:
            cost = sum(self.ranks.get(layer.name, 0) * layer.cost for layer in self.layers)
            parts.append(f"{format_count(cost)} parameters")
        return "; ".join(parts)


def _width(kind: str) -> int:
    """The columns that a kind of layer needs: its longest line, or a rank."""
    return max(_LEAST_CELL, *map(len, _lines(kind)))


def _lines(kind: str) -> list[str]:
    """A kind of layers as the lines of a head, a word each."""
    return [line for word in printable(kind).split(".") for line in name_lines(word, _LONGEST_LINE)]
