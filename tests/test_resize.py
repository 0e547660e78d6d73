"""A live PEFT layer changes its rank while it trains: function, gradients and optimizer state."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autorank.errors import CommandError
from autorank.growth import plain_components
from autorank.resize import (
    check_optimizer,
    drawn_factor,
    factors,
    grow,
    remove,
    reshape,
    revive,
    shrink,
    start_moments,
)
from autorank.sketch import seeded
from autorank.truncation import Rebase, singular_basis

IN, OUT = 6, 5
_KNOWN = (torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD)
KINDS = ("linear", "conv1d", "embedding", "dora")


class Base(nn.Module):
    """One layer that can carry an adapter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "embedding":
            self.layer: nn.Module = nn.Embedding(IN, OUT)
        else:
            self.layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def make(
    kind: str = "linear", rank: int = 4, *, alive: bool = True, device: str = "cpu"
) -> tuple[nn.Module, Any]:
    """A PEFT model with an adapter of scaling 2, and its one LoRA layer."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["layer"],
            use_dora=kind == "dora",
            fan_in_fan_out=kind == "conv1d",
        )
        model = peft.get_peft_model(Base(kind), config).to(device)  # type: ignore[arg-type]
    layer = next(m for m in model.modules() if isinstance(m, PeftLoraLayer))
    if alive:
        for place, factor in enumerate(factors(layer, "default")):
            factor.data = torch.randn(factor.shape, generator=seeded("factor", place)).to(device) / 2
    return model, layer


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def data(kind: str, step: int, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    y = torch.randn(8, OUT, generator=seeded("y", step)).to(device)
    if kind == "embedding":
        return torch.randint(0, IN, (8,), generator=seeded("x", step)).to(device), y
    return torch.randn(8, IN, generator=seeded("x", step)).to(device), y


def train(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, steps: range) -> None:
    for step in steps:
        x, y = data(kind, step, next(model.parameters()).device)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def loraplus(model: nn.Module) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.05, loraplus_lr_ratio=4.0
    )
    return made


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.0),
    "amsgrad": lambda model: torch.optim.AdamW(trained(model), lr=0.05, amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(trained(model), lr=0.05, momentum=0.9),
    "sgd": lambda model: torch.optim.SGD(trained(model), lr=0.05),
    "loraplus": loraplus,
}


def newborns(layer: Any, kind: str, count: int) -> Tensor:
    return plain_components(count, OUT if kind == "embedding" else IN, seeded("rows", count))


def drop(layer: Any, dropped: list[int]) -> Rebase:
    a, b = factors(layer, "default")
    return singular_basis(b, a, drawn=drawn_factor(layer)).without(dropped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_holds_exactly_the_live_parameters(kind: str, name: str) -> None:
    model, layer = make(kind)
    optimizer = OPTIMIZERS[name](model)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    before_a, before_b = (rates[id(p)] for p in factors(layer, "default"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, kind, range(3))
    shrink(layer, "default", optimizer, drop(layer, [1, 3]))
    grow(layer, "default", optimizer, newborns(layer, kind, 3))
    a, b = factors(layer, "default")
    assert a.shape == (5, IN) and b.shape == (OUT, 5)
    assert layer.r["default"] == 5 and layer.scaling["default"] == 2.0 and layer.lora_alpha["default"] == 10.0
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in trained(model))
    assert {id(p) for p in optimizer.state} <= set(held)
    for parameter, state in optimizer.state.items():
        for entry in state.values():
            if isinstance(entry, Tensor) and entry.ndim:
                assert entry.shape == parameter.shape
    scheduler.step()
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert (rates[id(a)], rates[id(b)]) == (before_a / 2, before_b / 2)
    before = [p.detach().clone() for p in trained(model)]
    train(model, optimizer, kind, range(3, 5))
    assert all(not torch.equal(old, p) for old, p in zip(before, trained(model), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_growth_changes_nothing_but_room(kind: str, device: str) -> None:
    model, layer = make(kind, 3, device=device)
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, kind, range(2))
    x, _ = data(kind, 9, device)
    before = model(x).detach()
    a, _ = factors(layer, "default")
    old, moments = a.detach().clone(), optimizer.state[a]["exp_avg"].clone()
    grow(layer, "default", optimizer, newborns(layer, kind, 2))
    assert torch.allclose(model(x), before, atol=1e-6 if device == "cpu" else 1e-5)
    a, b = factors(layer, "default")
    assert torch.equal(a[:3], old)
    state = optimizer.state[a]
    assert torch.equal(state["exp_avg"][:3], moments) and not state["exp_avg"][3:].any()
    alive = b[:, 3:] if kind == "embedding" else a[3:]
    assert alive.abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_changes_the_function_by_the_dropped_components(kind: str) -> None:
    model, layer = make(kind)
    optimizer = OPTIMIZERS["adamw"](model)
    a, b = factors(layer, "default")
    u, s, vh = torch.linalg.svd((b @ a).detach().double(), full_matrices=False)
    wanted = (u[:, [0, 2]] * s[[0, 2]]) @ vh[[0, 2]]
    magnitude = [p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n]
    shrink(layer, "default", optimizer, drop(layer, [1, 3]))
    a, b = factors(layer, "default")
    assert torch.allclose((b @ a).double(), wanted, atol=1e-5)
    kept = [p for n, p in model.named_parameters() if "magnitude" in n]
    assert len(kept) == (kind == "dora")
    assert all(torch.equal(old, p) for old, p in zip(magnitude, kept, strict=True))


def test_a_newborn_does_not_overshoot() -> None:
    """Adam's first steps of a fresh row stay within the learning rate, however late it is born."""
    model, layer = make(rank=3)
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, "linear", range(50))
    grow(layer, "default", optimizer, newborns(layer, "linear", 1))
    largest = 0.0
    for step in range(50, 70):
        before = factors(layer, "default")[1][:, 3].detach().clone()
        train(model, optimizer, "linear", range(step, step + 1))
        largest = max(largest, (factors(layer, "default")[1][:, 3] - before).abs().max().item())
    assert 0 < largest < 2 * 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_move_along_exactly(kind: str, device: str) -> None:
    """After a full-rank rebase the carried gradient is the one that backward would give."""
    model, layer = make(kind, device=device)
    optimizer = OPTIMIZERS["sgd"](model)
    x, y = data(kind, 0, device)
    (model(x) - y).square().mean().backward()
    shrink(layer, "default", optimizer, drop(layer, []))
    carried = [p.grad.clone() for p in factors(layer, "default") if p.grad is not None]
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    for one, other in zip(carried, factors(layer, "default"), strict=True):
        assert torch.allclose(one, other.grad, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dropping_components_equals_freezing_them_at_zero(name: str, device: str) -> None:
    """In the same basis, a run that drops rows equals one that keeps them frozen at zero."""
    (short, one_layer), (full, two_layer) = make(device=device), make(device=device)
    one, two = OPTIMIZERS[name](short), OPTIMIZERS[name](full)
    train(short, one, "linear", range(3))
    train(full, two, "linear", range(3))
    # Both in the singular basis, which has not the same axes as the one trained in.
    shrink(two_layer, "default", two, drop(two_layer, []))
    shrink(one_layer, "default", one, drop(one_layer, [1, 3]))
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    for step in range(3, 8):
        train(short, one, "linear", range(step, step + 1))
        a, b = factors(two_layer, "default")
        with torch.no_grad():
            a.mul_(mask[:, None])
            b.mul_(mask)
        train(full, two, "linear", range(step, step + 1))
    for part, whole in zip(factors(one_layer, "default"), factors(two_layer, "default"), strict=True):
        kept = whole[[0, 2]] if whole.shape[0] == 4 else whole[:, [0, 2]]
        assert torch.allclose(part, kept, atol=1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_a_layer_leaves_and_comes_back(kind: str, device: str) -> None:
    model, layer = make(kind, 2, device=device)
    config = model.peft_config["default"]
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, kind, range(2))
    like = factors(layer, "default")[0].detach()
    remove(layer, "default", optimizer)
    assert optimizer.param_groups[0]["params"] == [] and not optimizer.state
    assert "default" not in layer.scaling and not trained(model)
    x, _ = data(kind, 9, device)
    base = layer.base_layer(x)
    assert torch.equal(model(x), base)
    revive(layer, "default", config, newborns(layer, kind, 3), 2.0, like)
    assert torch.equal(model(x), base)
    assert layer.scaling["default"] == 2.0 and layer.r["default"] == 3
    optimizer.param_groups[0]["params"] += list(factors(layer, "default"))
    before = [p.detach().clone() for p in trained(model)]
    train(model, optimizer, kind, range(2, 5))
    assert all(not torch.equal(old, p) for old, p in zip(before, trained(model), strict=True))
    # Adam counts its steps from its own start: the first one is the learning rate, not three times it.
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_takes_the_shape_of_what_will_be_loaded(kind: str) -> None:
    _, layer = make(kind, 2)
    reshape(layer, "default", 4)
    a, b = factors(layer, "default")
    assert a.shape == (4, IN) and b.shape == (OUT, 4) and a.requires_grad and b.requires_grad
    assert layer.scaling["default"] == 2.0
    reshape(layer, "default", 0)
    assert "default" not in layer.scaling


def test_unknown_optimizer_state_is_refused_and_nothing_changed() -> None:
    model, layer = make()
    optimizer = torch.optim.Rprop(trained(model))
    train(model, optimizer, "linear", range(2))
    before, held = copy.deepcopy(model.state_dict()), list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match="prev"):
        grow(layer, "default", optimizer, newborns(layer, "linear", 1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(one is two for one, two in zip(held, optimizer.param_groups[0]["params"], strict=True))
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_of_one_lies_in_memory_as_a_loaded_one_does(kind: str) -> None:
    """Or sums over it, and with them a resumed run, would differ in their last bits."""
    model, layer = make(kind)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    train(model, optimizer, kind, range(2))
    a, b = factors(layer, "default")
    basis = singular_basis(b, a, newborns=0, drawn=drawn_factor(layer))
    shrink(layer, "default", optimizer, basis.without([1, 2, 3]))
    shrunk = factors(layer, "default")
    moments = [value for factor in shrunk for value in optimizer.state[factor].values()]
    like = shrunk[0].detach()
    if kind != "dora":
        remove(layer, "default", optimizer)
        features = OUT if kind == "embedding" else IN
        revive(layer, "default", peft.LoraConfig(), torch.ones(features, 1).T, 2.0, like)
    for tensor in (*shrunk, *moments, *factors(layer, "default")):
        assert tensor.stride() == torch.empty(tensor.shape).stride()


def test_a_newborn_of_a_long_run_takes_steps_of_the_learning_rate() -> None:
    """Late in a run Adam corrects no bias: with second moments of zero the first steps would be threefold."""
    model, layer = make(rank=3)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.0)
    train(model, optimizer, "linear", range(50))
    for state in optimizer.state.values():
        state["step"].fill_(3000.0)
    grow(layer, "default", optimizer, newborns(layer, "linear", 1))
    largest = 0.0
    for step in range(50, 60):
        before = factors(layer, "default")[1][:, 3].detach().clone()
        train(model, optimizer, "linear", range(step, step + 1))
        largest = max(largest, (factors(layer, "default")[1][:, 3] - before).abs().max().item())
    assert 0 < largest < 1.2 * 0.05


def test_second_moments_move_by_the_squares_of_what_moves_the_gradient() -> None:
    """E[(Σ m_ij g_j)²] ≈ Σ m_ij² E[g_j²], with m = to_bᵀ for A and to_aᵀ from the right for B."""
    model, layer = make()
    optimizer = OPTIMIZERS["amsgrad"](model)
    train(model, optimizer, "linear", range(3))
    old = [optimizer.state[factor] for factor in factors(layer, "default")]
    rebase = Rebase(
        to_a=torch.tensor([[2.0, 0.0, -1.0, 0.0], [0.0, 3.0, 0.0, 0.5]], dtype=torch.float64),
        to_b=torch.tensor([[0.5, 0.0], [-0.25, 1.0], [0.0, -2.0], [1.0, 0.0]], dtype=torch.float64),
    )
    kept = [{key: state[key].clone().double() for key in state} for state in old]
    shrink(layer, "default", optimizer, rebase)
    new_a, new_b = (optimizer.state[factor] for factor in factors(layer, "default"))
    of_a, of_b = kept
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        rows = [sum(float(rebase.to_b[j, i]) ** 2 * of_a[key][j] for j in range(4)) for i in range(2)]
        columns = [sum(float(rebase.to_a[i, j]) ** 2 * of_b[key][:, j] for j in range(4)) for i in range(2)]
        assert torch.allclose(new_a[key].double(), torch.stack(rows), rtol=1e-5)  # type: ignore[arg-type]
        assert torch.allclose(new_b[key].double(), torch.stack(columns, 1), rtol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(new_a["exp_avg"].double(), rebase.to_b.T @ of_a["exp_avg"], atol=1e-6)
    assert torch.allclose(new_b["exp_avg"].double(), of_b["exp_avg"] @ rebase.to_a.T, atol=1e-6)


@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_other_adapters_of_the_layer_stay_as_they_are(kind: str, active: list[str]) -> None:
    model, layer = make(kind, 2)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["layer"]))  # type: ignore[operator]
    layer.set_adapter(active)
    for factor in factors(layer, "other"):
        factor.requires_grad_(False)
        factor.data.fill_(0.5)
    optimizer = OPTIMIZERS["adamw"](model)
    like = factors(layer, "default")[0].detach()
    x, _ = data(kind, 0)

    def others_kept() -> None:
        assert layer.active_adapters == active
        assert not any(factor.requires_grad for factor in factors(layer, "other"))

    remove(layer, "default", optimizer)
    others_kept()
    alone = model(x)
    assert torch.equal(alone, layer.base_layer(x)) == ("other" not in active)
    revive(layer, "default", model.peft_config["default"], newborns(layer, kind, 2), 2.0, like)
    others_kept()
    assert torch.equal(model(x), alone)
    assert all(factor.requires_grad for factor in factors(layer, "default"))
    reshape(layer, "default", 0)
    others_kept()


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "corda", "loftq"])
def test_a_layer_comes_back_to_the_base_that_it_left(init: str) -> None:
    """Some initialisations subtract what they draw from the frozen weight, or need what is gone by then."""
    model, layer = make(rank=2)
    config = model.peft_config["default"]
    config.init_lora_weights = init
    weight = layer.base_layer.weight.detach().clone()
    remove(layer, "default")
    revive(layer, "default", config, newborns(layer, "linear", 2), 2.0, weight)
    assert torch.equal(layer.base_layer.weight, weight)
    assert config.init_lora_weights == init


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_alpha_is_over_the_rank_after_a_move_with_rslora_too(kind: str) -> None:
    model, layer = make(kind)
    layer.use_rslora["default"] = True
    grow(layer, "default", OPTIMIZERS["sgd"](model), newborns(layer, kind, 1))
    layer.set_scale("default", 1.0)
    assert layer.scaling["default"] == 2.0


def test_second_moments_of_newborns_are_the_mean_of_those_there_are() -> None:
    model, layer = make()
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    train(model, optimizer, "linear", range(3))
    old = [optimizer.state[factor]["exp_avg_sq"].clone() for factor in factors(layer, "default")]
    grow(layer, "default", optimizer, newborns(layer, "linear", 2))
    of_a, of_b = (optimizer.state[factor]["exp_avg_sq"] for factor in factors(layer, "default"))
    torch.testing.assert_close(of_a, torch.cat([old[0], old[0].mean(0).expand(2, -1)]))
    torch.testing.assert_close(of_b, torch.cat([old[1], old[1].mean(1)[:, None].expand(-1, 2)], dim=1))


class OtherAdam(torch.optim.Adam):
    """A subclass keeps the state of its parent."""


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: it forwards to the one that it holds."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_optimizers_are_judged_by_the_state_that_they_keep() -> None:
    model, _ = make()
    parameters = trained(model)
    fits = [kind(parameters, lr=0.1) for kind in (*_KNOWN, OtherAdam)]
    for optimizer in (*fits, loraplus(model), Wrapper(fits[0])):
        check_optimizer(optimizer)
    for kind in (torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adafactor, torch.optim.Rprop):
        with pytest.raises(CommandError, match=f"under {kind.__name__}.*AdamW, Adam, NAdam, RAdam, SGD"):
            check_optimizer(Wrapper(kind(parameters)))


@pytest.mark.parametrize("optimizer", _KNOWN)
def test_every_known_optimizer_is_carried_through_a_move(optimizer: Any, device: str) -> None:
    model, layer = make(device=device)
    made = optimizer(trained(model), lr=0.05)
    train(model, made, "linear", range(3))
    shrink(layer, "default", made, drop(layer, [1, 3]))
    grow(layer, "default", made, newborns(layer, "linear", 1))
    before = [p.detach().clone() for p in trained(model)]
    train(model, made, "linear", range(3, 5))
    assert all(not torch.equal(old, p) for old, p in zip(before, trained(model), strict=True))


def test_momentum_of_zero_is_given_where_others_have_momentum() -> None:
    """Fused SGD would fail in its first step with a parameter that has none."""
    old, new = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = torch.optim.SGD([old], lr=0.1, momentum=0.9, fused=True)
    group = optimizer.param_groups[0]
    start_moments(optimizer, group, new)
    assert not optimizer.state
    old.grad = torch.ones(2, 2)
    optimizer.step()
    group["params"].append(new)
    start_moments(optimizer, group, new)
    new.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.allclose(new, torch.full((2, 2), 0.9))
