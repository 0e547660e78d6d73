"""Deciding ranks: which layers give up a rank and which gain one, under an exact budget.

Pure arithmetic on importances, costs and ranks; no torch, no schedule. Importances are per
parameter, because a rank at a wide layer costs more than one at a narrow layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LayerState", "Move", "reallocate", "starting_ranks"]


@dataclass(frozen=True)
class LayerState:
    """What the decision knows of one layer.

    `losses` says what giving up one rank, then a second, a third … loses, each per parameter and
    ascending; it ends where the layer may give no more (newborn components are not in it).
    `gains` says what one more rank, then a second … promises, per parameter and descending, not in
    the unit of `losses`; 0, or no entry, where nothing is known to gain. `likely` is the best guess
    where that is not known, and `bound` the most that one more rank may promise for all that is
    known: at least the first of `gains`.
    """

    name: str
    rank: int
    cost: int
    min_rank: int
    max_rank: int
    losses: Sequence[float]
    gains: Sequence[float]
    likely: Sequence[float] = ()
    bound: float = 0.0

    @property
    def gain(self) -> float:
        """What the next rank promises; 0 where nothing is known to gain."""
        return max(self.gains, default=0.0)

    @property
    def most(self) -> float:
        """The most that the next rank may promise."""
        return max(self.bound, self.gain)


@dataclass(frozen=True)
class Move:
    """One changed layer: the ranks before and after, and the gains that were compared.

    `score` is what one more rank promised at the layer itself, per parameter. `against` is the other
    side of its swaps: the most that one more rank might have promised at a layer that paid, or did at
    one that was paid; 0 where what was free paid.
    """

    layer: str
    before: int
    after: int
    score: float
    against: float


def _rounded(score: float) -> float:
    """Scores that differ by rounding alone are equal."""
    return float(f"{score:.3g}")


def reallocate(
    layers: Sequence[LayerState], *, budget: int, swaps: int, margin: float = 1.5
) -> tuple[Move, ...]:
    """Give ranks to the layers that gain most, of what is free and from the layers that lose least.

    What a component has learnt and what a new one may learn have no honest exchange rate, so losses
    are compared with losses and gains with gains. Greedy: the layer with the highest gain takes a
    rank, paid from parameters that are free and then by the components of least loss, of layers
    that might not gain as much if it were `margin` times less: so ranks near a tie stay put, to go
    back takes as much again, and a layer does not pay because its own gain was not seen for the
    noise. What is free afterwards goes back to who gave it up, where it pays for that, and then where
    a gain is likely, though not known: what is left over buys no rank that promises anything. A layer
    gives or takes in one call, never both. Ties go to the layer named first.

    Args:
        layers: the layers, in the model's order.
        budget: most parameters that Σ rank · cost may reach; the ranks given must be within it.
        swaps: most ranks that layers gain in this call for what others give up, at least 0; and most
            that these give up, but that two may go where one does not pay.
        margin: at least 1.

    Returns:
        The changed layers, in the order given; empty where nothing should move.
    """
    free = budget - sum(layer.rank * layer.cost for layer in layers)
    if free < 0:
        raise ValueError(f"the ranks given cost {-free:,} parameters more than the budget of {budget:,}")
    book = _Book(layers, free, swaps, margin)
    for act in (book.give_one, book.give_back, book.spend_one):
        while act():
            pass
    return book.moves()


class _Book:
    """The ranks while they move, and the parameters that are free."""

    def __init__(self, layers: Sequence[LayerState], free: int, swaps: int, margin: float) -> None:
        self.layers = layers
        self.costs = {layer.name: layer.cost for layer in layers}
        self.gains = {layer.name: [_rounded(gain) for gain in layer.gains] for layer in layers}
        self.likely = {layer.name: [_rounded(gain) for gain in layer.likely] for layer in layers}
        self.losses = {layer.name: [_rounded(loss) for loss in layer.losses] for layer in layers}
        self.needed = {layer.name: margin * _rounded(layer.most) for layer in layers}
        self.free = free
        self.takes = swaps  # ranks that may still be gained for others
        self.gives = max(2, swaps)  # and be given up for them
        self.change = {layer.name: 0 for layer in layers}
        self.against = {layer.name: 0.0 for layer in layers}

    def gain(self, layer: LayerState) -> float:
        """What the next rank at this layer promises, 0 where it may take none."""
        return self._next(layer, self.gains[layer.name])

    def guess(self, layer: LayerState) -> float:
        """What it is likely to promise, 0 where it may take none."""
        return self._next(layer, self.likely[layer.name])

    def _next(self, layer: LayerState, known: Sequence[float]) -> float:
        taken = self.change[layer.name]
        if taken < 0 or taken >= len(known) or layer.rank + taken >= layer.max_rank:
            return 0.0
        return known[taken]

    def takers(self) -> list[LayerState]:
        """Layers that may take a rank, the highest gain first."""
        able = [layer for layer in self.layers if self.gain(layer) > 0]
        return sorted(able, key=lambda layer: -self.gain(layer))

    def payers(self, taker: LayerState) -> dict[str, int] | None:
        """The components of least loss that free enough for `taker`, as ranks by layer; None without any."""
        gain, missing = self.gain(taker), taker.cost - self.free
        able = [
            (index, layer)
            for index, layer in enumerate(self.layers)
            if self.change[layer.name] <= 0 and gain > self.needed[layer.name]
        ]
        paid: dict[str, int] = {}
        while missing > 0:
            offers = [
                (self.losses[layer.name][given], index)
                for index, layer in able
                for given in [paid.get(layer.name, 0) - self.change[layer.name]]
                if given < len(layer.losses) and layer.rank - given > layer.min_rank
            ]
            if not offers:
                return None
            payer = self.layers[min(offers)[1]]
            paid[payer.name] = paid.get(payer.name, 0) + 1
            missing -= payer.cost
        for name in list(paid):  # those that came first, where a later one pays for them as well
            while paid[name] and missing + self.costs[name] <= 0:
                paid[name] -= 1
                missing += self.costs[name]
        return {name: ranks for name, ranks in paid.items() if ranks}

    def give_one(self) -> bool:
        """Give one rank to the layer that gains most and can be paid for; False where none can."""
        for taker in self.takers():
            if taker.cost > self.free and not (self.takes and self.swap_for(taker)):
                continue
            self._give(taker)
            return True
        return False

    def give_back(self) -> bool:
        """Give the dearest component back that what is free pays for: nobody pays who need not."""
        given = [
            (self.losses[layer.name][-change - 1], -index, layer)
            for index, layer in enumerate(self.layers)
            for change in [self.change[layer.name]]
            if change < 0 and layer.cost <= self.free
        ]
        if not given:
            return False
        self._give(max(given)[2])
        return True

    def spend_one(self) -> bool:
        """Spend what is free on the likeliest gain that it buys; False where it buys none."""
        able = [layer for layer in self.layers if layer.cost <= self.free]
        best = max(able, key=self.guess, default=None)
        if best is None or not self.guess(best):
            return False
        self._give(best)
        return True

    def _give(self, taker: LayerState) -> None:
        self.change[taker.name] += 1
        self.free -= taker.cost

    def swap_for(self, taker: LayerState) -> bool:
        """Free what a rank costs; False where nobody can pay for it, or only with more than may go."""
        paid = self.payers(taker)
        if paid is None or sum(paid.values()) > self.gives:
            return False
        for payer in self.layers:
            ranks = paid.get(payer.name, 0)
            self.change[payer.name] -= ranks
            self.free += ranks * payer.cost
            if ranks:
                self.against[payer.name] = max(self.against[payer.name], taker.gain)
                self.against[taker.name] = max(self.against[taker.name], payer.most)
        self.takes -= 1
        self.gives -= sum(paid.values())
        return True

    def moves(self) -> tuple[Move, ...]:
        """The layers whose rank changed."""
        return tuple(self._move(layer) for layer in self.layers if self.change[layer.name])

    def _move(self, layer: LayerState) -> Move:
        change = self.change[layer.name]
        return Move(layer.name, layer.rank, layer.rank + change, layer.gain, self.against[layer.name])


def starting_ranks(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], limits: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The ranks to start with, or to keep, under any budget down to one component: the best per parameter.

    Greedy by gain / cost while something fits. What the known gains leave over is spread evenly,
    the lowest rank first: a last gain, which may be all but noise, says nothing of the next. Ties
    go to the layer named last, for layers below the lowest adapted one cost no backward pass.

    Where gains are what components hold and limits how many there are, the ranks are those that
    an adapter keeps: the least per parameter go until the rest fits, then what still fits comes
    back. With equal costs no choice keeps more; with others, none keeps more by as much as the
    first component that did not fit.

    Args:
        gains: what one, then two, three … ranks promise at each layer, descending, not yet per
            parameter; a layer without any is one that no gradient reaches, and takes what no other can.
        costs: what a rank costs at each layer.
        limits: the largest rank of each layer.
        budget: most parameters that Σ rank · cost may reach.

    Returns:
        A rank for every layer; Σ rank · cost ≤ budget, and no layer with room left costs less
        than what is left over.
    """
    ranks = dict.fromkeys(costs, 0)
    free = budget

    def merit(name: str) -> tuple[bool, float, int]:
        known, rank = gains.get(name, ()), ranks[name]
        return bool(known), known[rank] / costs[name] if rank < len(known) else 0.0, -rank

    order = list(costs)[::-1]
    while able := [name for name in order if ranks[name] < limits[name] and costs[name] <= free]:
        best = max(able, key=merit)
        ranks[best] += 1
        free -= costs[best]
    return ranks
