"""Changing the rank of a live LoRA layer, with its gradients and optimizer state carried along.

The layer gets new parameters of the new shape, in the same place of the same parameter group, so
learning rates and schedules stay bound. What the new components are is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autorank.truncation import Rebase

__all__ = ["LoraLayer", "grow", "remove", "shrink"]

_LINEAR = frozenset({"exp_avg", "momentum_buffer"})
_SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq"})


class LoraLayer(Protocol):
    """The part of PEFT's LoRA layer that a resize touches; all keyed by adapter name."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop one adapter from the layer."""


def shrink(layer: LoraLayer, name: str, optimizer: Optimizer, rebase: Rebase) -> None:
    """Truncate the layer to the components that `rebase` keeps; its scaling stays.

    First moments are linear in the gradient and move exactly. Second moments move as if the
    old components' gradients were independent: E[(Σ m_ij g_j)²] ≈ Σ m_ij² E[g_j²].
    """
    to_a, to_b = rebase.to_a, rebase.to_b
    a, b = _factors(layer, name)
    new_a = _carry(
        optimizer,
        a,
        lambda value: to_a @ value,
        lambda gradient: to_b.T @ gradient,
        lambda squares: to_b.T.square() @ squares,
    )
    new_b = _carry(
        optimizer,
        b,
        lambda value: value @ to_b,
        lambda gradient: gradient @ to_a.T,
        lambda squares: squares @ to_a.T.square(),
    )
    _install(layer, name, new_a, new_b)


def grow(layer: LoraLayer, name: str, optimizer: Optimizer, rows: Tensor) -> None:
    """Append components with the given rows of A, shape (count, in_features), and zero columns of B.

    The function is unchanged. First moments of the new components start at zero, second moments
    at the mean of the old ones': the optimizer's step count is shared, so with a second moment
    of zero Adam would divide by almost nothing and overshoot up to sixfold for tens of steps.
    """
    count = rows.shape[0]
    a, b = _factors(layer, name)
    columns = torch.zeros(b.shape[0], count)

    def below(value: Tensor, new: Tensor) -> Tensor:
        return torch.cat([value, new.to(value)])

    def beside(value: Tensor, new: Tensor) -> Tensor:
        return torch.cat([value, new.to(value)], dim=1)

    zero_rows = torch.zeros_like(rows)
    new_a = _carry(
        optimizer,
        a,
        lambda value: below(value, rows),
        lambda gradient: below(gradient, zero_rows),
        lambda squares: below(squares, squares.mean(0, keepdim=True).expand(count, -1)),
    )
    new_b = _carry(
        optimizer,
        b,
        lambda value: beside(value, columns),
        lambda gradient: beside(gradient, columns),
        lambda squares: beside(squares, squares.mean(1, keepdim=True).expand(-1, count)),
    )
    _install(layer, name, new_a, new_b)


def remove(layer: LoraLayer, name: str, optimizer: Optimizer) -> None:
    """Take the adapter off the layer: rank 0. It leaves forward, backward, optimizer and file."""
    for parameter in _factors(layer, name):
        for group in optimizer.param_groups:
            group["params"] = [other for other in group["params"] if other is not parameter]
        optimizer.state.pop(parameter, None)
    layer.delete_adapter(name)


def _factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters A and B of one adapter."""
    a = cast(nn.Linear, layer.lora_A[name]).weight
    b = cast(nn.Linear, layer.lora_B[name]).weight
    return cast(nn.Parameter, a), cast(nn.Parameter, b)


def _install(layer: LoraLayer, name: str, a: nn.Parameter, b: nn.Parameter) -> None:
    """Put the new parameters in the layer and keep its scaling: alpha follows the rank."""
    rank = a.shape[0]
    module_a = cast(nn.Linear, layer.lora_A[name])
    module_b = cast(nn.Linear, layer.lora_B[name])
    module_a.weight, module_a.out_features = a, rank
    module_b.weight, module_b.in_features = b, rank
    layer.r[name] = rank
    layer.lora_alpha[name] = layer.scaling[name] * rank


def _carry(
    optimizer: Optimizer,
    old: nn.Parameter,
    value: Callable[[Tensor], Tensor],
    linear: Callable[[Tensor], Tensor],
    squared: Callable[[Tensor], Tensor],
) -> nn.Parameter:
    """A new parameter in the old one's place, with gradient and optimizer state mapped along.

    Raises:
        ValueError: the optimizer holds per-element state of a kind that is not known here; to
            guess would train wrongly in silence.
    """

    def apply(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        # In float64 on the CPU, where the basis is: moves are few, and not every device has float64.
        return function(tensor.detach().to("cpu", torch.float64)).to(tensor).contiguous()

    new = nn.Parameter(apply(value, old))
    if old.grad is not None:
        new.grad = apply(linear, old.grad)
    for group in optimizer.param_groups:
        group["params"] = [new if other is old else other for other in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        for key, entry in state.items():
            if not isinstance(entry, Tensor) or entry.shape != old.shape:
                continue
            if key in _LINEAR:
                state[key] = apply(linear, entry)
            elif key in _SQUARED:
                state[key] = apply(squared, entry)
            else:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} per parameter, which a rank change "
                    "cannot carry over: use AdamW, Adam or SGD"
                )
        optimizer.state[new] = state
    return new
