"""Deciding ranks: which layers give up a rank and which gain one, under an exact budget.

Pure arithmetic on importances, costs and ranks; no torch, no schedule. Importances are per
parameter, because a rank at a wide layer costs more than one at a narrow layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LayerState", "Move", "reallocate"]


@dataclass(frozen=True)
class LayerState:
    """What the decision knows of one layer.

    `losses` says what giving up one rank, then a second, a third … loses, each per parameter and
    ascending; it ends where the layer may give no more (newborn components are not in it).
    `gain` says what one more rank promises, per parameter, in the same unit as `losses`.
    """

    name: str
    rank: int
    cost: int
    min_rank: int
    max_rank: int
    losses: Sequence[float]
    gain: float


@dataclass(frozen=True)
class Move:
    """One changed layer: the ranks before and after, and the scores that were compared.

    `score` is what the layer itself was rated at, `against` the best or worst of the other side.
    """

    layer: str
    before: int
    after: int
    score: float
    against: float


def reallocate(
    layers: Sequence[LayerState], *, budget: int, swaps: int, margin: float = 1.5
) -> tuple[Move, ...]:
    """Move ranks, up to `swaps` of them gained, from the layers that lose least to the layers that gain most.

    Greedy: the layer with the highest gain takes a rank, paid from parameters that are free and
    then by the layers with the smallest losses. A rank is taken only where the gain exceeds
    `margin` times every loss that pays for it, so that ranks near a tie stay put. A layer gives
    or takes in one call, never both. Each rank that a layer takes lowers its gain as 1 / rank, the
    marginal value of a rank under diminishing (logarithmic) returns. Left-over parameters buy
    further ranks while one fits. Ties go to the layer named first.

    Args:
        layers: the layers, in the model's order.
        budget: most parameters that Σ rank · cost may reach; the ranks given must be within it.
        swaps: most ranks that layers gain in this call, at least 0.
        margin: at least 1.

    Returns:
        The changed layers, in the order given; empty where nothing should move.
    """
    free = budget - sum(layer.rank * layer.cost for layer in layers)
    if free < 0:
        raise ValueError(f"the ranks given cost {-free:,} parameters more than the budget of {budget:,}")
    ledger = _Ledger(layers, free, margin)
    while ledger.taken < swaps and ledger.swap():
        ledger.fill(swaps)
    return ledger.moves()


class _Ledger:
    """The ranks while they move, and the parameters that are free."""

    def __init__(self, layers: Sequence[LayerState], free: int, margin: float) -> None:
        self.layers = layers
        self.free = free
        self.margin = margin
        self.change = {layer.name: 0 for layer in layers}
        self.taken = 0
        self.best_gain = 0.0
        self.worst_loss = 0.0

    def gain(self, layer: LayerState) -> float:
        """What the next rank at this layer promises; it falls with every rank taken already."""
        return layer.gain * (layer.rank + 1) / (layer.rank + 1 + self.change[layer.name])

    def takers(self) -> list[LayerState]:
        """Layers that may take a rank, the highest gain first."""
        able = [
            layer
            for layer in self.layers
            if self.change[layer.name] >= 0
            and layer.rank + self.change[layer.name] < layer.max_rank
            and layer.gain > 0
        ]
        return sorted(able, key=lambda layer: -self.gain(layer))

    def payers(self, taker: LayerState) -> tuple[dict[str, int], float] | None:
        """The cheapest losses that free enough for `taker`, or None where they are not worth it."""
        paid: dict[str, int] = {}
        missing = taker.cost - self.free
        worst = 0.0
        while missing > 0:
            offers = [
                (layer.losses[given], index)
                for index, layer in enumerate(self.layers)
                if layer.name != taker.name and self.change[layer.name] <= 0
                for given in [paid.get(layer.name, 0) - self.change[layer.name]]
                if given < len(layer.losses) and layer.rank - given > layer.min_rank
            ]
            if not offers:
                return None
            loss, index = min(offers)
            if loss * self.margin >= self.gain(taker):
                return None
            payer = self.layers[index]
            paid[payer.name] = paid.get(payer.name, 0) + 1
            missing -= payer.cost
            worst = max(worst, loss)
        return paid, worst

    def swap(self) -> bool:
        """Give one rank to the layer that gains most and can be paid for; False where none can."""
        for taker in self.takers():
            bill = self.payers(taker)
            if bill is None:
                continue
            paid, worst = bill
            self.best_gain = max(self.best_gain, self.gain(taker))
            self.worst_loss = max(self.worst_loss, worst)
            costs = {layer.name: layer.cost for layer in self.layers}
            for name, ranks in paid.items():
                self.change[name] -= ranks
                self.free += ranks * costs[name]
            self.change[taker.name] += 1
            self.free -= taker.cost
            self.taken += 1
            return True
        return False

    def fill(self, swaps: int) -> None:
        """Spend what is left over on the layers that gain most, while a rank fits."""
        while self.taken < swaps:
            fitting = [layer for layer in self.takers() if layer.cost <= self.free]
            if not fitting:
                return
            self.change[fitting[0].name] += 1
            self.free -= fitting[0].cost
            self.taken += 1

    def moves(self) -> tuple[Move, ...]:
        """The layers whose rank changed."""
        changed: Mapping[str, int] = {name: change for name, change in self.change.items() if change}
        return tuple(
            Move(
                layer.name,
                layer.rank,
                layer.rank + changed[layer.name],
                layer.gain if changed[layer.name] > 0 else layer.losses[-changed[layer.name] - 1],
                self.worst_loss if changed[layer.name] > 0 else self.best_gain,
            )
            for layer in self.layers
            if layer.name in changed
        )
