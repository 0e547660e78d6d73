"""What the allocator takes: settings, models and layers; all else is refused, with the way out.

Nothing is changed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.optim import Optimizer

from autorank.adapter import can_resize, config_owners
from autorank.budget import format_count
from autorank.errors import CommandError
from autorank.evidence import Importance
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import LoraLayer, factors

__all__ = [
    "Growth",
    "RankLimits",
    "check_budget",
    "check_held",
    "check_limits",
    "check_model",
    "check_room",
    "check_settings",
    "kept_layers",
    "read_plan",
]

Growth = Literal["gradient", "plain"]


@dataclass(frozen=True)
class RankLimits:
    """How far the rank of a layer may go: not below `min_rank`, nor above `max_rank` or its full rank.

    Layers in `kept` do not leave the adapter, whatever `min_rank` is.
    """

    min_rank: int
    max_rank: int | None
    kept: frozenset[str]

    def low(self, layer: LayerSpec) -> int:
        """The least rank of a layer."""
        return max(self.min_rank, 1 if layer.name in self.kept else 0)

    def top(self, layer: LayerSpec) -> int:
        """The largest rank of a layer."""
        return layer.full_rank if self.max_rank is None else min(self.max_rank, layer.full_rank)


def check_settings(importance: str, growth: str, margin: float, min_rank: int, max_rank: int | None) -> None:
    """Refuse settings that mean nothing, whatever the model is."""
    for name, value, known in (("importance", importance, Importance), ("growth", growth, Growth)):
        if value not in get_args(known):
            raise CommandError(f"{name} {value!r}: choose one of {', '.join(get_args(known))}")
    if not 1 <= margin < math.inf:
        raise CommandError(
            f"margin {margin:g} must be a number of at least 1, for a gain must be worth what pays for it; "
            "importance 'uniform' keeps ranks as they are"
        )
    if min_rank < 0:
        raise CommandError(f"min_rank {min_rank} must be at least 0, where a layer can leave the adapter")
    if max_rank is not None and max_rank < 1:
        raise CommandError(
            f"max_rank {max_rank} must be at least 1; leave it out for every layer's full rank"
        )
    if max_rank is not None and max_rank < min_rank:
        raise CommandError(f"min_rank {min_rank} is above max_rank {max_rank}: lower it or raise max_rank")


_WRAPPERS = {
    "OptimizedModule": "torch.compile keeps the graph of the ranks it first saw: train the model uncompiled",
    "DataParallel": "ranks move in one process on one device: pass the model that it wraps and train that",
    "DistributedDataParallel": "ranks move in one process: pass the model that it wraps and train that",
    "FullyShardedDataParallel": "ranks move in one process: train the model unsharded",
    "FSDPModule": "ranks move in one process: train the model unsharded",
}
"""What a model must not be wrapped in, by the class's name: its module may cost a long import."""


def check_model(model: nn.Module, name: str) -> None:
    """Refuse a model whose hooks do not fire, whose parameters are sharded, or with two configurations."""
    for key, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if module._compiled_call_impl is not None:
            kinds.add("OptimizedModule")
        for kind in sorted(kinds & _WRAPPERS.keys()):
            raise CommandError(f"ranks cannot move in {key or 'a model'} ({kind}): {_WRAPPERS[kind]}")
    if len(config_owners(model, name)) > 1:
        raise CommandError(
            f"the model holds several PEFT models with an adapter {name!r}, each with a configuration of "
            "its own: give each its own allocator"
        )


def kept_layers(modules: Mapping[str, LoraLayer], name: str) -> frozenset[str]:
    """Layers that carry more than A and B, a DoRA magnitude or a bias, which rank 0 would lose."""

    def extra(module: LoraLayer) -> bool:
        biases = getattr(module, "lora_bias", {})
        return name in getattr(module, "lora_magnitude_vector", {}) or bool(biases.get(name, False))

    return frozenset(layer for layer, module in modules.items() if extra(module))


def read_plan(modules: Mapping[str, LoraLayer], name: str) -> RankPlan:
    """The plan that the layers make up; those without the adapter are at rank 0."""
    live = {layer: module for layer, module in modules.items() if name in module.scaling}
    if not live:
        raise CommandError(
            f"the model has no LoRA layer with an adapter named {name!r}: put one on with "
            "peft.get_peft_model, or give its name as adapter_name"
        )
    for layer_name, module in live.items():
        if not can_resize(module):
            raise CommandError(
                f"{layer_name} is a {type(module.get_base_layer()).__name__} under PEFT's "
                f"{type(module).__name__}, whose rank cannot move: leave it out of target_modules and "
                "target_parameters; linear layers and embeddings can be adapted"
            )
    _check_unmerged(live)
    _check_variants(live, name)
    _check_untied(live, name)
    scalings = {module.scaling[name] for module in live.values()}
    if not math.isclose(min(scalings), max(scalings), rel_tol=1e-6):  # alpha over rank rounds
        raise CommandError(
            f"the adapter's scalings differ between layers ({min(scalings):g} to {max(scalings):g}): "
            "ranks can move between layers of one scaling only; set alpha to the same multiple of "
            "each rank"
        )
    specs, ranks = [], {}
    for layer_name, module in modules.items():
        if layer_name in live:
            a, b = factors(module, name)
            specs.append(LayerSpec(layer_name, a.shape[1], b.shape[0]))
            if a.shape[0] > specs[-1].full_rank:
                raise CommandError(
                    f"{layer_name} has rank {a.shape[0]}, more than its full rank of {specs[-1].full_rank}: "
                    "give it a lower one, with PEFT's rank_pattern and an alpha_pattern of the same scaling"
                )
            ranks[layer_name] = a.shape[0]
        else:
            specs.append(LayerSpec(layer_name, module.in_features, module.out_features))
            ranks[layer_name] = 0
    return RankPlan(tuple(specs), ranks, scalings.pop())


def _check_unmerged(live: Mapping[str, LoraLayer]) -> None:
    """Refuse adapters that are part of the weights, where no rank moves."""
    for layer_name, module in live.items():
        merged: list[str] = getattr(module, "merged_adapters", [])
        if merged:
            raise CommandError(
                f"adapter {', '.join(merged)!r} is merged into the weight of {layer_name}: "
                "call unmerge_adapter() on the PEFT model first"
            )


def _check_variants(live: Mapping[str, LoraLayer], name: str) -> None:
    """Refuse variants of LoRA that keep more of a rank's shape than A and B."""
    for layer_name, module in live.items():
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None and not type(variant).__name__.startswith("Dora"):
            raise CommandError(
                f"{layer_name} is adapted by PEFT's {type(variant).__name__}, whose parts a change of rank "
                "does not carry: use plain LoRA, rsLoRA or DoRA"
            )


def _check_untied(live: Mapping[str, LoraLayer], name: str) -> None:
    """Refuse two layers that share a factor, for a rank moves at one layer alone."""
    owners: dict[int, str] = {}
    for layer_name, module in live.items():
        for factor in factors(module, name):
            other = owners.setdefault(factor.data_ptr(), layer_name) if factor.device.type != "meta" else ""
            if other not in ("", layer_name):
                raise CommandError(
                    f"{layer_name} shares a LoRA factor with {other}, and ranks move layer by layer: "
                    "leave ensure_weight_tying out, or adapt one of them"
                )


def check_budget(plan: RankPlan, budget: int) -> None:
    """Refuse a start above the budget."""
    if plan.parameters > budget:
        raise CommandError(
            f"the adapter has {format_count(plan.parameters)} parameters already, over the budget of "
            f"{format_count(budget)}: start from lower ranks, below rank 1 everywhere with "
            "autorank.start_from_gradient, or raise the budget"
        )


def check_held(optimizer: Optimizer, factors: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer that does not train the factors."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not all(id(factor) in held and factor.requires_grad for factor in factors):
        raise CommandError(
            "the optimizer does not hold the adapter's parameters: make it after the adapter, from the "
            "parameters that require a gradient, A and B both"
        )


def check_limits(plan: RankPlan, limits: RankLimits) -> None:
    """Refuse layers that start outside of the limits."""
    ranks = plan.ranks
    above = [layer.name for layer in plan.layers if ranks[layer.name] > limits.top(layer)]
    below = [layer.name for layer in plan.layers if ranks[layer.name] < limits.min_rank]
    if above:
        raise CommandError(
            f"{len(above)} layers start above max_rank {limits.max_rank}, {above[0]} at rank "
            f"{ranks[above[0]]}: start from lower ranks or raise max_rank"
        )
    if below:
        raise CommandError(
            f"{len(below)} layers start below min_rank {limits.min_rank}, {below[0]} at rank "
            f"{ranks[below[0]]}: start from higher ranks or lower min_rank"
        )


def check_room(plan: RankPlan, budget: int, limits: RankLimits) -> None:
    """Refuse where no layer could ever get what a rank costs."""
    ranks, spare = plan.ranks, budget - plan.parameters
    room = [layer for layer in plan.layers if ranks[layer.name] < limits.top(layer)]
    give = {layer.name: layer.cost * (ranks[layer.name] - limits.low(layer)) for layer in plan.live}
    if not any(taker.cost <= spare + sum(give.values()) - give.get(taker.name, 0) for taker in room):
        raise CommandError(
            f"no rank can ever move: {sum(map(bool, give.values()))} layers may give one up (min_rank "
            f"{limits.min_rank}) and {len(room)} may take one (max_rank {limits.max_rank}), for which the "
            f"budget of {format_count(budget)} must pay: adapt more layers, or widen the limits or the budget"
        )
