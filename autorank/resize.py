"""Changing the rank of a live LoRA layer, with its gradients and optimizer state carried along.

The layer gets new parameters of the new shape, in the same place of the same parameter group, so
learning rates and schedules stay bound. What the new components are is decided elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autorank.errors import CommandError
from autorank.truncation import Drawn, Rebase

__all__ = [
    "LoraLayer",
    "check_optimizer",
    "check_state",
    "drawn_factor",
    "drawn_features",
    "factors",
    "grow",
    "has_left",
    "is_frozen",
    "remove",
    "reshape",
    "revive",
    "row_order",
    "shrink",
    "start_moments",
]

_LINEAR = frozenset({"exp_avg", "momentum_buffer"})
_SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
_OPTIMIZERS = (
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.SGD,
)
"""Those whose per-element state is named above."""

_LEFT = "_autorank_left"
"""The attribute of a PEFT layer that names the adapters which have reached rank 0 there."""


class LoraLayer(Protocol):
    """The part of PEFT's LoRA layer that a resize touches; all keyed by adapter name."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    in_features: int
    out_features: int
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    active_adapters: list[str]

    def get_base_layer(self) -> nn.Module:
        """The frozen layer that is wrapped."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop one adapter from the layer."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of every adapter, and of the frozen layer."""

    def set_adapter(self, adapter_names: str | list[str]) -> None:
        """Make adapters of the layer active and trainable, and all others not."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any) -> None:
        """Put a new adapter on the layer."""


def factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A, shape (rank, in_features), and B, shape (out_features, rank), of one adapter of a layer."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    a = cast(nn.Linear, layer.lora_A[name]).weight
    b = cast(nn.Linear, layer.lora_B[name]).weight
    return cast(nn.Parameter, a), cast(nn.Parameter, b)


def drawn_factor(layer: LoraLayer) -> Drawn:
    """The factor that LoRA draws at random for this layer: B of an embedding, else A."""
    return "b" if isinstance(layer.get_base_layer(), nn.Embedding) else "a"


def drawn_features(layer: LoraLayer) -> int:
    """The length of a row of the drawn factor: in_features, or out_features where that is B."""
    return layer.in_features if drawn_factor(layer) == "a" else layer.out_features


def has_left(layer: LoraLayer, name: str) -> bool:
    """Whether the adapter was on this layer and is at rank 0 now.

    PEFT's configuration does not tell: it names live layers only, and other adapters may be here.
    """
    return name in getattr(layer, _LEFT, ())


def is_frozen(layer: LoraLayer, name: str) -> bool:
    """Whether the adapter is on this layer and does not train: A or B wants no gradient."""
    return name in layer.scaling and not all(factor.requires_grad for factor in factors(layer, name))


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state could not follow a rank, by what a wrapper such as accelerate's holds.

    Raises:
        CommandError: it is none of those whose state is known here.
    """
    inner = optimizer
    while not isinstance(inner, _OPTIMIZERS) and isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer  # type: ignore[attr-defined]
    if not isinstance(inner, _OPTIMIZERS):
        known = ", ".join(kind.__name__ for kind in _OPTIMIZERS)
        raise CommandError(
            f"ranks cannot move under {type(inner).__name__}, whose state a change of rank cannot carry "
            f"over: use one of torch.optim's {known}, or a subclass"
        )


def check_state(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Refuse per-element state of a kind that is not known here: to guess would train wrongly in silence.

    Raises:
        ValueError: there is some.
    """
    for key, entry in optimizer.state.get(parameter, {}).items():
        per_element = isinstance(entry, Tensor) and entry.ndim > 0
        known = key in _LINEAR or key in _SQUARED
        if per_element and not (known and entry.shape == parameter.shape):
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} per parameter, which a rank change "
                "cannot carry over: use AdamW, Adam or SGD"
            )


def shrink(layer: LoraLayer, name: str, optimizer: Optimizer, rebase: Rebase) -> None:
    """Truncate the layer to the components that `rebase` keeps; its scaling stays.

    First moments are linear in the gradient and move exactly. Second moments move as if the
    old components' gradients were independent: E[(Σ m_ij g_j)²] ≈ Σ m_ij² E[g_j²].
    """
    to_a, to_b = rebase.to_a, rebase.to_b
    a, b = factors(layer, name)
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
    """Append components with the given rows in the drawn factor, and zeros in the other.

    The function is unchanged. First moments of the new components start at zero, second moments
    at the mean of the old ones': the optimizer's step count is shared, so with a second moment
    of zero Adam would divide by almost nothing and overshoot up to sixfold for tens of steps.

    Args:
        rows: shape (count, in_features), new rows of A; of an embedding (count, out_features), new
            columns of B.
    """
    count = rows.shape[0]
    a, b = factors(layer, name)
    draws_a = drawn_factor(layer) == "a"
    zeros = torch.zeros(count, b.shape[0] if draws_a else a.shape[1])
    new_rows, new_columns = (rows, zeros.T) if draws_a else (zeros, rows.T)

    def below(value: Tensor, new: Tensor) -> Tensor:
        return torch.cat([value, new.to(value)])

    def beside(value: Tensor, new: Tensor) -> Tensor:
        return torch.cat([value, new.to(value)], dim=1)

    new_a = _carry(
        optimizer,
        a,
        lambda value: below(value, new_rows),
        lambda gradient: below(gradient, torch.zeros_like(new_rows)),
        lambda squares: below(squares, squares.mean(0, keepdim=True).expand(count, -1)),
    )
    new_b = _carry(
        optimizer,
        b,
        lambda value: beside(value, new_columns),
        lambda gradient: beside(gradient, torch.zeros_like(new_columns)),
        lambda squares: beside(squares, squares.mean(1, keepdim=True).expand(-1, count)),
    )
    _install(layer, name, new_a, new_b)


def remove(layer: LoraLayer, name: str, optimizer: Optimizer | None = None) -> None:
    """Take the adapter off the layer: rank 0. It leaves forward, backward, optimizer and file."""
    for parameter in factors(layer, name) if optimizer is not None else ():
        assert optimizer is not None
        for group in optimizer.param_groups:
            kept = [place for place, other in enumerate(group["params"]) if other is not parameter]
            for key in ("params", "param_names") if "param_names" in group else ("params",):
                group[key] = [group[key][place] for place in kept]
        optimizer.state.pop(parameter, None)
    _take_off(layer, name)


def revive(layer: LoraLayer, name: str, config: Any, rows: Tensor, scaling: float, like: Tensor) -> None:
    """Put an adapter on a layer that was at rank 0; the caller hands its parameters to the optimizer.

    Its parameters are new to the optimizer, so that Adam counts their steps, and corrects its bias,
    from their own start.

    Args:
        config: the adapter's `LoraConfig`; its initialisation is not run, for some change the base.
        rows: as for `grow`.
        scaling: of every layer of the adapter.
        like: a parameter of a live layer, whose dtype is taken; the device is that of the layer itself.
    """
    count = rows.shape[0]
    config = copy.copy(config)
    config.init_lora_weights = True
    # PEFT draws weights that are replaced below.
    with torch.random.fork_rng(devices=[]), _others_kept(layer, name):
        layer.update_layer(name, r=count, lora_alpha=count, config=config)
    getattr(layer, _LEFT, set()).discard(name)
    layer.scaling[name] = scaling
    a, b = factors(layer, name)
    new_a, new_b = torch.zeros(a.shape), torch.zeros(b.shape)
    if drawn_factor(layer) == "a":
        new_a = rows
    else:
        new_b = rows.T
    _install(
        layer, name, *(nn.Parameter(row_order(value.to(a.device, like.dtype))) for value in (new_a, new_b))
    )


def reshape(layer: LoraLayer, name: str, rank: int) -> None:
    """Give a layer's adapter another rank, its tensors zeros that are yet to be loaded.

    At rank 0 the adapter leaves the layer. No optimizer may hold the parameters yet.
    """
    if rank == 0:
        _take_off(layer, name)
        return
    a, b = factors(layer, name)
    _install(
        layer, name, nn.Parameter(a.new_zeros(rank, a.shape[1])), nn.Parameter(b.new_zeros(b.shape[0], rank))
    )


def start_moments(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> None:
    """Give a parameter that joins a group of a running SGD the momentum of zero that its first step needs.

    Fused SGD takes a group where all parameters have momentum, or none. Adam makes its own.
    """
    states = (optimizer.state.get(other, {}) for other in group["params"] if other is not parameter)
    if any(state.get("momentum_buffer") is not None for state in states):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def leave(layer: LoraLayer, name: str) -> None:
    """Take the adapter off the layer for good, with what remembers it."""
    if name in layer.scaling:
        _take_off(layer, name)
    getattr(layer, _LEFT, set()).discard(name)


def _take_off(layer: LoraLayer, name: str) -> None:
    """Drop the adapter from the layer, and remember that it was there."""
    with _others_kept(layer, name):
        layer.delete_adapter(name)
    vars(layer).setdefault(_LEFT, set()).add(name)


@contextmanager
def _others_kept(layer: LoraLayer, name: str) -> Iterator[None]:
    """Let one adapter come to a layer, or leave it, with all others as they were.

    PEFT would choose another one to be active, and make those that are active trainable. An adapter
    that has left is still listed as active, as in PEFT's layers that never had it.
    """
    active = list(layer.active_adapters)
    trained = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter([])  # what is inactive leaves without a successor
    try:
        yield
    finally:
        layer.set_adapter(active if name in active else [*active, name])
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _install(layer: LoraLayer, name: str, a: nn.Parameter, b: nn.Parameter) -> None:
    """Put the new parameters in the layer and keep its scaling: alpha follows the rank."""
    rank = a.shape[0]
    if name in layer.lora_embedding_A:
        layer.lora_embedding_A[name], layer.lora_embedding_B[name] = a, b
    else:
        module_a = cast(nn.Linear, layer.lora_A[name])
        module_b = cast(nn.Linear, layer.lora_B[name])
        module_a.weight, module_a.out_features = a, rank
        module_b.weight, module_b.in_features = b, rank
    layer.r[name] = rank
    layer.lora_alpha[name] = layer.scaling[name] * rank
    layer.use_rslora[name] = False  # or PEFT would read that alpha as one over the root of the rank


def row_order(tensor: Tensor) -> Tensor:
    """A copy with the strides that a stored tensor is read back with; sums depend on them in the last bits.

    At rank 1 `contiguous()` leaves those of a transposed tensor as they are.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def _carry(
    optimizer: Optimizer,
    old: nn.Parameter,
    value: Callable[[Tensor], Tensor],
    linear: Callable[[Tensor], Tensor],
    squared: Callable[[Tensor], Tensor],
) -> nn.Parameter:
    """A new parameter in the old one's place, with gradient and optimizer state mapped along.

    Raises:
        ValueError: see `check_state`.
    """

    def apply(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        # In float64 on the CPU, where the basis is: moves are few, and not every device has float64.
        return row_order(function(tensor.detach().to("cpu", torch.float64)).to(tensor))

    check_state(optimizer, old)
    new = nn.Parameter(apply(value, old), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = apply(linear, old.grad)
    for group in optimizer.param_groups:
        group["params"] = [new if other is old else other for other in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        for key, entry in state.items():
            if not isinstance(entry, Tensor) or entry.shape != old.shape:
                continue
            state[key] = apply(linear if key in _LINEAR else squared, entry)
        optimizer.state[new] = state
    return new
