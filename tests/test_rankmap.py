"""Ranks by place."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, RenderableType

from autorank.plan import LayerSpec
from autorank.rankmap import rank_map

BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LLAMA = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))


def names(stack: str, blocks: int, kinds: tuple[str, ...]) -> list[str]:
    return [f"{stack}.{block}.{kind}" for block in range(blocks) for kind in kinds]


def draw(thing: RenderableType, width: int = 80, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, **options)  # type: ignore[arg-type]
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("stack", "blocks", "kinds"), [("bert.encoder.layer", 6, BERT), ("model.layers", 32, LLAMA)]
)
def test_a_row_per_block_and_a_cell_per_rank(stack: str, blocks: int, kinds: tuple[str, ...]) -> None:
    ranks = {name: 100 + number for number, name in enumerate(names(stack, blocks, kinds))}
    text = draw(rank_map(ranks))
    rows = [re.findall(r"\d+", line) for line in text.splitlines() if re.match(r"\s*\d", line)]
    count = len(kinds)
    assert rows == [
        [str(block), *(str(100 + block * count + kind) for kind in range(count))] for block in range(blocks)
    ]
    head = text.split("─")[0]
    assert all(word in head for kind in kinds for word in kind.split("."))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_columns_that_do_not_fit_go_below_one_another() -> None:
    ranks = dict.fromkeys(names("model.layers", 2, LLAMA), 4)
    text = draw(rank_map(ranks), width=40)
    assert text.count("block") == 3
    cells = [line.split()[1:] for line in text.splitlines() if line[4:5].isdigit()]
    assert sum(len(row) for row in cells) == len(ranks)
    assert {cell for row in cells for cell in row} == {"4"}
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 40


def test_dead_layers_other_layers_and_empty_places() -> None:
    ranks = {"enc.0.a": 0, "enc.0.b": 3, "enc.1.b": 5, "pooler.dense": 2}
    text = draw(rank_map(ranks, starting=dict.fromkeys(ranks, 3)))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["0"] == ["0", "3"]
    assert rows["1"] == ["5"]
    assert rows["pooler.dense"] == ["2"]
    assert "ranks 0 to 5 at 4 layers; 1 of them at 0, without an adapter; 3 moved" in text


def test_encoder_and_decoder_have_maps_of_their_own() -> None:
    ranks = {"encoder.block.0.layer.0.SelfAttention.q": 2, "decoder.block.0.layer.0.SelfAttention.q": 7}
    text = draw(rank_map(ranks))
    assert text.index("encoder.block") < text.index(" 2 ") < text.index("decoder.block") < text.index(" 7 ")


def test_the_legend_counts_parameters_and_says_that_nothing_moved() -> None:
    layers = (LayerSpec("m.0.a", 10, 6), LayerSpec("m.1.a", 10, 6))
    ranks = {"m.0.a": 2, "m.1.a": 2}
    assert "rank 2 at 2 layers; none moved; 64 parameters" in draw(rank_map(ranks, layers, starting=ranks))


def test_heat_goes_by_rank() -> None:
    ranks = {"m.0.a": 0, "m.0.b": 1, "m.0.c": 5, "m.0.d": 9, "m.0.e": 9}
    text = draw(rank_map(ranks), force_terminal=True, color_system="truecolor")
    cells = [(int(rank), colour) for colour, rank in re.findall(r"48;2;(\d+;\d+;\d+)m\s+(\d+)", text)]
    assert [rank for rank, _ in cells] == [1, 5, 9, 9]
    greens = [int(colour.split(";")[1]) for _, colour in cells]
    assert greens[0] < greens[1] < greens[2] == greens[3]


def test_no_ranks() -> None:
    assert "no ranks recorded" in draw(rank_map({}))
