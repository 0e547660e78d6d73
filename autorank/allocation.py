"""Deciding ranks: which layers give up a rank and which gain one, under an exact budget.

Pure arithmetic on importances, costs and ranks; no torch, no schedule. Importances are per
parameter, because a rank at a wide layer costs more than one at a narrow layer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["LayerState", "Move", "by_order", "is_flat", "reallocate", "starting_ranks"]

FLAT = 3.0
"""Importances whose largest is less than this many times their smallest tell no layer from another."""


@dataclass(frozen=True)
class LayerState:
    """What the decision knows of one layer.

    `losses` says what giving up one rank, then a second, a third … loses, each per parameter and
    ascending; it ends where the layer may give no more (newborn components are not in it).
    `gains` says what one more rank, then a second … promises, per parameter and descending, in
    the same unit as `losses`; it ends where nothing is known to gain.
    """

    name: str
    rank: int
    cost: int
    min_rank: int
    max_rank: int
    losses: Sequence[float]
    gains: Sequence[float]


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


def by_order(layers: Sequence[LayerState]) -> list[LayerState]:
    """The same layers with scores replaced by their places in [0, 1], equal scores sharing one.

    For losses and gains in units that have no honest exchange rate: a loss by the share of all losses
    below it, and half its own; a gain by the share of all gains that are not above it. Gains of 0
    stay 0. Scores that differ by rounding alone are equal: three digits count.
    """
    losses = sorted(_rounded(score) for layer in layers for score in layer.losses)
    gains = sorted(_rounded(score) for layer in layers for score in layer.gains if score > 0)

    return [
        replace(
            layer,
            losses=[(bisect_left(losses, _rounded(score)) + 0.5) / len(losses) for score in layer.losses],
            gains=[
                bisect_right(gains, _rounded(score)) / len(gains) if score > 0 else 0.0
                for score in layer.gains
            ],
        )
        for layer in layers
    ]


def _rounded(score: float) -> float:
    return float(f"{score:.3g}")


def is_flat(scores: Iterable[float]) -> bool:
    """Whether no layer stands out: the largest score is less than `FLAT` times the smallest, or is 0.

    One score alone has nothing to stand out from, and is not flat.
    """
    known = list(scores)
    best = max(known, default=0.0)
    return best <= 0 or (len(known) > 1 and best < FLAT * min(known))


def reallocate(
    layers: Sequence[LayerState], *, budget: int, swaps: int, margin: float = 1.5
) -> tuple[Move, ...]:
    """Move ranks, up to `swaps` of them gained, from the layers that lose least to the layers that gain most.

    Greedy: the layer with the highest gain takes a rank, paid from parameters that are free and
    then by the layers with the smallest losses. A rank is taken only where the gain exceeds
    `margin` times every loss that pays for it, so that ranks near a tie stay put. A layer gives
    or takes in one call, never both, and pays for no gain below its own. What a swap leaves over
    buys further ranks while one fits that gains more than was given up. Ties go to the layer named first.

    Args:
        layers: the layers, in the model's order.
        budget: most parameters that Σ rank · cost may reach; the ranks given must be within it.
        swaps: most ranks that layers gain in this call, at least 0; change that is too little for
            the dearest layer is spent beyond it.
        margin: at least 1.

    Returns:
        The changed layers, in the order given; empty where nothing should move.
    """
    free = budget - sum(layer.rank * layer.cost for layer in layers)
    if free < 0:
        raise ValueError(f"the ranks given cost {-free:,} parameters more than the budget of {budget:,}")
    book = _Book(layers, free, margin)
    while book.taken < swaps and book.swap():
        pass
    if swaps:
        book.spend_change()
    return book.moves()


class _Book:
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
        """What the next rank at this layer promises, 0 where it may take none."""
        taken = self.change[layer.name]
        if taken < 0 or taken >= len(layer.gains) or layer.rank + taken >= layer.max_rank:
            return 0.0
        return layer.gains[taken]

    def takers(self) -> list[LayerState]:
        """Layers that may take a rank, the highest gain first."""
        able = [layer for layer in self.layers if self.gain(layer) > 0]
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
                if layer.name != taker.name
                and self.change[layer.name] <= 0
                # A layer with more to gain than the taker has nothing to give it.
                and max(layer.gains, default=0.0) <= self.gain(taker)
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
            self.worst_loss = max(self.worst_loss, worst)
            costs = {layer.name: layer.cost for layer in self.layers}
            for name, ranks in paid.items():
                self.change[name] -= ranks
                self.free += ranks * costs[name]
            self.take(taker)
            return True
        return False

    def take(self, taker: LayerState) -> None:
        """Give one rank to a layer, paid from what is free."""
        self.best_gain = max(self.best_gain, self.gain(taker))
        self.change[taker.name] += 1
        self.free -= taker.cost
        self.taken += 1

    def spend_change(self) -> None:
        """Spend what is left over, where it is less than a rank of the dearest layer.

        Not on gains below what was just given up: such a rank would be the next to go.
        """
        dearest = max((layer.cost for layer in self.layers), default=0)
        while self.free < dearest:
            able = [layer for layer in self.takers() if self.gain(layer) > self.worst_loss]
            fitting = [layer for layer in able if layer.cost <= self.free]
            if not fitting:
                return
            self.take(fitting[0])

    def moves(self) -> tuple[Move, ...]:
        """The layers whose rank changed."""
        return tuple(self._move(layer) for layer in self.layers if self.change[layer.name])

    def _move(self, layer: LayerState) -> Move:
        change = self.change[layer.name]
        score, against = (
            (layer.gains[0], self.worst_loss) if change > 0 else (layer.losses[-change - 1], self.best_gain)
        )
        return Move(layer.name, layer.rank, layer.rank + change, score, against)


def starting_ranks(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], limits: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The ranks to start with, or to keep, under any budget down to one component: the best per parameter.

    Greedy by gain / cost while something fits. What the known gains leave over is spread evenly,
    the lowest rank first: a last gain, which may be all but noise, says nothing of the next. Ties
    go to the layer named first.

    Where gains are what components hold and limits how many there are, the ranks are those that
    an adapter keeps: the least per parameter go until the rest fits, then what still fits comes
    back. With equal costs no choice keeps more; with others, none keeps more by as much as the
    first component that did not fit.

    Args:
        gains: what one, then two, three … ranks promise at each layer, descending, not yet per
            parameter; layers without any are known to promise nothing.
        costs: what a rank costs at each layer.
        limits: the largest rank of each layer.
        budget: most parameters that Σ rank · cost may reach.

    Returns:
        A rank for every layer; Σ rank · cost ≤ budget, and no layer with room left costs less
        than what is left over.
    """
    ranks = dict.fromkeys(costs, 0)
    free = budget

    def merit(name: str) -> tuple[float, int]:
        known, rank = gains.get(name, ()), ranks[name]
        return (known[rank] / costs[name] if rank < len(known) else 0.0, -rank)

    while able := [name for name in costs if ranks[name] < limits[name] and costs[name] <= free]:
        best = max(able, key=merit)
        ranks[best] += 1
        free -= costs[best]
    return ranks
