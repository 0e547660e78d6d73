"""A LoRA layer changes its rank while it trains: function, gradients and optimizer state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autorank.growth import plain_components
from autorank.resize import grow, remove, shrink
from autorank.truncation import Rebase, truncate


class Layer(nn.Module):
    """The attributes of PEFT's LoRA layer that a resize touches."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = nn.ModuleDict({"x": nn.Linear(6, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"x": nn.Linear(rank, 5, bias=False)})
        self.r, self.lora_alpha, self.scaling = {"x": rank}, {"x": 2.0 * rank}, {"x": 2.0}
        for factor in (self.lora_A["x"], self.lora_B["x"]):
            factor.weight.data = torch.randn(factor.weight.shape, generator=generator)

    def delete_adapter(self, adapter_name: str) -> None:
        del self.lora_A[adapter_name], self.lora_B[adapter_name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lora_B["x"](self.lora_A["x"](x)) * self.scaling["x"]
        return out


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
}


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)


def train(layer: Layer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = data(step)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()


def live(layer: Layer) -> set[int]:
    return {id(p) for p in layer.parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_holds_exactly_the_live_parameters(kind: str) -> None:
    layer, other = Layer(4, 0), nn.Linear(2, 2)
    optimizer = OPTIMIZERS[kind](
        [{"params": list(other.parameters())}, {"params": list(layer.parameters()), "lr": 0.01}]
    )
    train(layer, optimizer, range(3))
    a, b = layer.lora_A["x"].weight, layer.lora_B["x"].weight
    shrink(layer, "x", optimizer, truncate(b.detach(), a.detach(), 2))
    grow(layer, "x", optimizer, plain_components(3, 6, torch.Generator().manual_seed(1)))
    group = optimizer.param_groups[1]
    assert {id(p) for p in group["params"]} == live(layer) and group["lr"] == 0.01
    assert {id(p) for p in optimizer.state} <= live(layer) | {id(p) for p in other.parameters()}
    assert layer.lora_A["x"].weight.shape == (5, 6) and layer.lora_B["x"].weight.shape == (5, 5)
    assert layer.r["x"] == 5 and layer.scaling["x"] == 2.0 and layer.lora_alpha["x"] == 10.0
    for parameter, state in optimizer.state.items():
        for entry in state.values():
            if isinstance(entry, torch.Tensor) and entry.ndim:
                assert entry.shape == parameter.shape
    before = {id(p): p.detach().clone() for p in layer.parameters()}
    train(layer, optimizer, range(3, 5))
    assert all(not torch.equal(before[id(p)], p) for p in layer.parameters())


def test_growth_changes_nothing_but_room() -> None:
    layer = Layer(3, 0)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    train(layer, optimizer, range(2))
    x, _ = data(9)
    before = layer(x).detach()
    old = layer.lora_A["x"].weight.detach().clone()
    moments = optimizer.state[layer.lora_A["x"].weight]["exp_avg"].clone()
    grow(layer, "x", optimizer, plain_components(2, 6, torch.Generator().manual_seed(1)))
    assert torch.allclose(layer(x), before, atol=1e-5)
    assert torch.equal(layer.lora_A["x"].weight[:3], old)
    state = optimizer.state[layer.lora_A["x"].weight]
    assert torch.equal(state["exp_avg"][:3], moments) and not state["exp_avg"][3:].any()


def test_a_newborn_does_not_overshoot() -> None:
    """Adam's first steps of a fresh row stay within the learning rate, however late it is born."""
    layer = Layer(3, 0)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    train(layer, optimizer, range(50))
    grow(layer, "x", optimizer, plain_components(1, 6, torch.Generator().manual_seed(1)))
    largest = 0.0
    for step in range(50, 70):
        before = layer.lora_B["x"].weight[:, 3].detach().clone()
        train(layer, optimizer, range(step, step + 1))
        largest = max(largest, (layer.lora_B["x"].weight[:, 3] - before).abs().max().item())
    assert 0 < largest < 2 * 0.05


def test_gradients_move_along_exactly() -> None:
    """After a full-rank rebase the carried gradient is the one that backward would give."""
    layer = Layer(4, 0)
    optimizer = OPTIMIZERS["sgd"](layer.parameters())
    x, y = data(0)
    (layer(x) - y).square().mean().backward()
    a, b = layer.lora_A["x"].weight, layer.lora_B["x"].weight
    shrink(layer, "x", optimizer, truncate(b.detach(), a.detach(), 4))
    carried = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    optimizer.zero_grad()
    (layer(x) - y).square().mean().backward()
    for one, other in zip(carried, layer.parameters(), strict=True):
        assert torch.allclose(one, other.grad, atol=1e-4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dropping_components_equals_freezing_them_at_zero(kind: str) -> None:
    """In the same basis, a run that drops rows equals one that keeps them frozen at zero."""
    short, full = Layer(4, 0), Layer(4, 0)
    one, two = OPTIMIZERS[kind](short.parameters()), OPTIMIZERS[kind](full.parameters())
    train(short, one, range(3))
    train(full, two, range(3))
    rows = torch.eye(4, dtype=torch.float64)[[0, 2]]
    shrink(short, "x", one, Rebase(rows.T, rows))
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for step in range(3, 8):
        train(short, one, range(step, step + 1))
        with torch.no_grad():
            full.lora_A["x"].weight.mul_(mask[:, None])
            full.lora_B["x"].weight.mul_(mask)
        train(full, two, range(step, step + 1))
    assert torch.allclose(short.lora_A["x"].weight, full.lora_A["x"].weight[[0, 2]], atol=1e-5)
    assert torch.allclose(short.lora_B["x"].weight, full.lora_B["x"].weight[:, [0, 2]], atol=1e-5)


def test_rank_0_leaves_layer_and_optimizer() -> None:
    layer = Layer(4, 0)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    train(layer, optimizer, range(2))
    remove(layer, "x", optimizer)
    assert optimizer.param_groups[0]["params"] == [] and not optimizer.state
    assert "x" not in layer.lora_A and "x" not in layer.lora_B


def test_unknown_optimizer_state_is_refused() -> None:
    layer = Layer(4, 0)
    optimizer = torch.optim.Rprop(layer.parameters())
    train(layer, optimizer, range(2))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="prev"):
        grow(layer, "x", optimizer, plain_components(1, 6, torch.Generator().manual_seed(0)))
    after = layer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
