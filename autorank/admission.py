"""What the allocator takes: settings, models and layers; all else is refused, with the way out.

Nothing is changed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

from autorank.adapter import can_resize, config_owners
from autorank.errors import CommandError
from autorank.evidence import Importance
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import LoraLayer, factors

__all__ = ["Growth", "check_model", "check_settings", "kept_layers", "read_plan"]

Growth = Literal["gradient", "plain"]


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
    scalings = {module.scaling[name] for module in live.values()}
    if len(scalings) > 1:
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
