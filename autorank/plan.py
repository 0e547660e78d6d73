"""Layers, what a rank costs at each, and the plan that gives every layer its rank.

Pure arithmetic, no torch. A plan says what an adapter looks like; it holds no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autorank.errors import CommandError

__all__ = ["LayerSpec", "RankPlan", "alpha_for", "snap_scaling", "uniform_plan"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer that can carry an adapter: W has shape (out_features, in_features)."""

    name: str
    in_features: int
    out_features: int

    @property
    def cost(self) -> int:
        """Parameters that one rank costs here: a row of A and a column of B."""
        return self.in_features + self.out_features

    @property
    def full_rank(self) -> int:
        """The largest rank that ΔW can have."""
        return min(self.in_features, self.out_features)


@dataclass(frozen=True)
class RankPlan:
    """Layer → rank, with the one scaling that all of them share.

    `ranks` holds every target layer, those at rank 0 too. The scaling is a property of the
    function, not of the rank: it stays when ranks move.
    """

    layers: tuple[LayerSpec, ...]
    ranks: Mapping[str, int]
    scaling: float

    def __post_init__(self) -> None:
        names = {layer.name for layer in self.layers}
        if names != set(self.ranks):
            raise ValueError(f"the plan's ranks and layers differ: {sorted(names ^ set(self.ranks))}")
        for layer in self.layers:
            if not 0 <= self.ranks[layer.name] <= layer.full_rank:
                raise ValueError(
                    f"{layer.name}: rank {self.ranks[layer.name]} is not in 0..{layer.full_rank}"
                )

    @property
    def parameters(self) -> int:
        """Trainable adapter parameters: Σ rank · (in_features + out_features)."""
        return sum(self.ranks[layer.name] * layer.cost for layer in self.layers)

    @property
    def live(self) -> tuple[LayerSpec, ...]:
        """The layers whose rank is above 0."""
        return tuple(layer for layer in self.layers if self.ranks[layer.name] > 0)

    def with_ranks(self, ranks: Mapping[str, int]) -> RankPlan:
        """The same layers and scaling with other ranks."""
        return RankPlan(self.layers, dict(ranks), self.scaling)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal plan."""
        return {
            "layers": [[layer.name, layer.in_features, layer.out_features] for layer in self.layers],
            "ranks": dict(self.ranks),
            "scaling": self.scaling,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankPlan:
        """Read what `to_json` wrote."""
        layers = tuple(LayerSpec(str(n), int(i), int(o)) for n, i, o in data["layers"])
        return cls(layers, {str(k): int(v) for k, v in data["ranks"].items()}, float(data["scaling"]))


def uniform_plan(layers: tuple[LayerSpec, ...], rank: int, scaling: float, budget: int) -> RankPlan:
    """The plan that gives every layer `rank`, capped by the layer's full rank.

    Raises:
        CommandError: the plan costs more than the budget.
    """
    plan = RankPlan(layers, {layer.name: min(rank, layer.full_rank) for layer in layers}, scaling)
    if plan.parameters > budget:
        raise CommandError(
            f"rank {rank} at {len(layers)} layers costs {plan.parameters:,} parameters, "
            f"over the budget of {budget:,}: lower the rank or raise --budget"
        )
    return plan


def snap_scaling(scaling: float) -> float:
    """The nearest multiple of 1/1024, at least 1/1024.

    Such a scaling times any rank is exact in binary floating point, so the alpha written to a
    file gives the very same scaling when it is divided by the rank again.
    """
    return max(1, round(scaling * 1024)) / 1024


def alpha_for(scaling: float, rank: int) -> float:
    """The alpha for which `alpha / rank` is `scaling`.

    Exact for scalings from `snap_scaling`; for others the quotient is the nearest that exists,
    at most one unit in the last place away.
    """
    alpha = scaling * rank
    neighbours = (alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return min(neighbours, key=lambda candidate: abs(candidate / rank - scaling))
