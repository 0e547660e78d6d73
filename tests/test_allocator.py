"""The allocator on a real PEFT model in a training loop of its own."""

from __future__ import annotations

import functools
import gc
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autorank
from autorank.adapter import lora_layers
from autorank.allocator import RankAllocator, RankAllocatorWarning
from autorank.errors import CommandError
from autorank.evidence import Evidence, LayerEvidence, Promises
from autorank.growth import plain_components
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import factors, reshape
from autorank.schedule import Schedule, make_schedule
from autorank.sketch import Reading
from autorank.truncation import Basis

STEPS = 40
V_PROJ, K_PROJ, DOWN = (
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
)
IMPORTANCES = ("gradient_norm", "singular_value", "sensitivity", "random")


def base_llama() -> LlamaForCausalLM:
    """Grouped queries and an MLP: layers that differ in cost."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def tiny_llama(device: str = "cpu") -> nn.Module:
    """With an adapter of rank 4 on every linear layer."""
    return adapted(base_llama()).to(device)


def adapted(base: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        return peft.get_peft_model(base, config)


def batch(step: int) -> torch.Tensor:
    """Sequences that count upwards, so that there is something to learn."""
    start = torch.randint(0, 20, (8, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(12)) % 40


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    allocator: RankAllocator,
    steps: range,
    check: Callable[[int, bool], None] = lambda step, moved: None,
) -> list[float]:
    losses = []
    for step in steps:
        ids = batch(step).to(next(model.parameters()).device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        moved = allocator.step()
        check(step, moved)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make(
    importance: str = "singular_value", device: str = "cpu", **settings: object
) -> tuple[nn.Module, torch.optim.Optimizer, RankAllocator]:
    model = tiny_llama(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = make_schedule(STEPS, share=0.25)
    allocator = RankAllocator(
        model,
        optimizer,
        total_steps=STEPS,
        importance=importance,
        schedule=schedule,
        **settings,  # type: ignore[arg-type]
    )
    return model, optimizer, allocator


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_ranks_move_for_real_and_never_over_budget(importance: str, device: str) -> None:
    model, optimizer, allocator = make(importance, device)
    start = allocator.plan.ranks
    budget = allocator.budget

    def check(step: int, moved: bool) -> None:
        lora = [p for n, p in model.named_parameters() if "lora_" in n]
        assert sum(p.numel() for p in lora) == allocator.plan.parameters <= budget
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in lora}
        assert set(map(id, optimizer.state)) <= held
        assert {p.device.type for p in lora} == {device}
        assert not moved or step in make_schedule(STEPS).moves

    losses = train(model, optimizer, allocator, range(STEPS), check)
    assert allocator.plan.ranks != start and len(set(allocator.plan.ranks.values())) > 1
    assert losses[-1] < losses[0] - 0.1
    live = {n: m.r["default"] for n, m in lora_layers(model).items()}
    assert live == {name: rank for name, rank in allocator.plan.ranks.items() if rank}
    assert budget - allocator.plan.parameters < max(layer.cost for layer in allocator.plan.layers)


def test_every_live_parameter_trains_after_the_moves(device: str) -> None:
    model, optimizer, allocator = make(device=device)
    train(model, optimizer, allocator, range(STEPS - 2))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, optimizer, allocator, range(STEPS - 2, STEPS))
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)


def test_the_scaling_stays_when_ranks_move() -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(STEPS))
    assert {module.scaling["default"] for module in lora_layers(model).values()} == {2.0}
    assert {m.lora_alpha["default"] / m.r["default"] for m in lora_layers(model).values()} == {2.0}


def test_the_ledger_tells_what_all_layers_hold_after_the_step() -> None:
    model, optimizer, allocator = make("random")
    held: dict[int, int] = {}
    train(
        model,
        optimizer,
        allocator,
        range(STEPS),
        lambda step, _: held.update({step: allocator.plan.parameters}),
    )
    assert allocator.ledger and all(entry.parameters == held[entry.step] for entry in allocator.ledger)


def test_the_ledger_tells_every_move() -> None:
    model, optimizer, allocator = make()
    ranks = dict(allocator.plan.ranks)
    train(model, optimizer, allocator, range(STEPS))
    assert allocator.ledger
    for entry in allocator.ledger:
        assert ranks[entry.layer] == entry.before
        ranks[entry.layer] = entry.after
        assert entry.parameters <= allocator.budget
        if entry.after > entry.before:
            assert entry.score > 1.5 * entry.against
        else:
            assert entry.against > 1.5 * entry.score
    assert ranks == allocator.plan.ranks


def test_limits_of_ranks_hold() -> None:
    model, optimizer, allocator = make(min_rank=2, max_rank=5)
    train(model, optimizer, allocator, range(STEPS))
    assert set(allocator.plan.ranks.values()) <= {2, 3, 4, 5}
    assert len(set(allocator.plan.ranks.values())) > 1


def test_where_no_gradient_comes_nothing_moves_and_it_says_so() -> None:
    _, optimizer, allocator = make()
    with pytest.warns(RankAllocatorWarning) as said:
        for _ in range(STEPS):
            assert not allocator.step()
            optimizer.step()
    assert allocator.ledger == ()
    assert [str(warning.message)[:60] for warning in said] == [
        "no layer had a gradient when allocator.step() was called, up",
        "ranks stayed as they were: in 4 of 4 rounds of moves no fini",
        "14 of 14 layers have learnt nothing in 20 steps: model.layer",
    ]


def test_layers_that_learn_nothing_are_named() -> None:
    """A layer whose output is thrown away: its B stays 0, and a NaN is nothing learnt either."""
    model, optimizer, allocator = make()
    quiet, broken = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"
    model.get_base_model().get_submodule(quiet).register_forward_hook(lambda m, i, out: out.detach())  # type: ignore[operator]
    train(model, optimizer, allocator, range(3))
    assert allocator.idle == (quiet,)
    factors(model.get_base_model().get_submodule(broken), "default")[1].data[0, 0] = float("nan")  # type: ignore[operator]
    assert allocator.idle == (quiet, broken)


def all_alike(patch: pytest.MonkeyPatch, gain: float) -> None:
    """Every layer promises the same per parameter."""

    def alike(evidence: Evidence, layer: LayerSpec, *_: object) -> Promises:
        return Promises([gain * layer.cost] * 4, [gain * layer.cost] * 4, gain * layer.cost)

    patch.setattr(Evidence, "_promises", alike)


def test_gains_that_are_alike_move_nothing_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    all_alike(monkeypatch, 1.0)
    model, optimizer, allocator = make(margin=1.25)
    said = "no layer gained 1.25 times what one that could pay for it would gain itself"
    with pytest.warns(RankAllocatorWarning, match=said):
        train(model, optimizer, allocator, range(STEPS))
    assert allocator.ledger == ()


def test_noise_moves_nothing_and_it_says_so() -> None:
    """Labels drawn at random, and a loss that is as often turned round: its gradient is 0 on average."""
    model = tiny_llama()
    for module in lora_layers(model).values():
        _, b = factors(module, "default")
        b.data = torch.randn(b.shape, generator=torch.Generator().manual_seed(1)) / 50
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0
    )
    allocator = RankAllocator(model, optimizer, total_steps=120)
    stream = torch.Generator().manual_seed(2)
    with pytest.warns(RankAllocatorWarning, match="no gain stood out of the noise"):
        for _ in range(61):
            ids, labels = torch.randint(0, 40, (2, 8, 12), generator=stream)
            sign = 1 if torch.rand(1, generator=stream) < 0.5 else -1
            (sign * model(input_ids=ids, labels=labels).loss).backward()
            allocator.step()
            optimizer.step()
            optimizer.zero_grad()
    assert allocator.ledger == ()


def test_uniform_never_moves_and_need_not_say_so() -> None:
    model, optimizer, allocator = make("uniform")
    train(model, optimizer, allocator, range(STEPS))
    assert allocator.ledger == () and set(allocator.plan.ranks.values()) == {4}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"growth": "magic"}, "growth 'magic': choose one of gradient, plain"),
        ({"margin": 0.1}, "margin 0.1 must be a number of at least 1"),
        ({"margin": float("nan")}, "margin nan must be"),
        ({"margin": float("inf")}, "margin inf must be"),
        ({"min_rank": -1}, "min_rank -1 must be at least 0"),
        ({"min_rank": 6, "max_rank": 2}, "min_rank 6 is above max_rank 2: lower it"),
        ({"max_rank": 0}, "max_rank 0 must be at least 1"),
        ({"max_rank": 3}, r"14 layers start above max_rank 3, model\.layers\.0\S+ at rank 4: start from"),
    ],
)
@pytest.mark.parametrize("importance", ["gradient_norm", "uniform"])
def test_settings_that_mean_nothing_are_refused(
    importance: str, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(CommandError, match=said):
        make(importance, **settings)


def test_a_schedule_of_another_length_is_refused() -> None:
    model, optimizer, _ = make()
    with pytest.raises(CommandError, match="made for 4000 steps and total_steps is 40: make it with"):
        RankAllocator(model, optimizer, total_steps=STEPS, schedule=make_schedule(4000))


def test_training_that_ends_before_any_move_is_warned_about_once() -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(3))
    with pytest.warns(RankAllocatorWarning, match="after 3 of 40 planned steps, before .* at step 20: ranks"):
        allocator.close()
    allocator.close()


@pytest.mark.parametrize(
    ("importance", "steps"), [("gradient_norm", 0), ("gradient_norm", 20), ("uniform", 3), ("uniform", 40)]
)
def test_training_that_moved_or_never_could_ends_in_silence(importance: str, steps: int) -> None:
    model, optimizer, allocator = make(importance)
    train(model, optimizer, allocator, range(steps))
    allocator.close()


def test_training_that_ends_before_the_moves_are_over_is_warned_about() -> None:
    """Ranks moved, and were never fixed: total_steps may have been counted in passes."""
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(10))
    assert allocator.ledger
    with pytest.warns(RankAllocatorWarning, match="ended after 10 of 40 planned steps, before the moves"):
        allocator.close()
    allocator.close()


def test_training_in_which_the_allocator_was_never_called_is_warned_about() -> None:
    model, _, allocator = make()
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    other.step()
    with pytest.warns(RankAllocatorWarning, match=r"trained and allocator\.step\(\) was never called"):
        allocator.close()


def test_a_closed_allocator_does_nothing_and_one_that_is_gone_leaves_no_hooks() -> None:
    model, optimizer, allocator = make("uniform")
    allocator.close()
    assert not allocator.step() and allocator.state_dict()["facts"]["step"] == 0
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(4))
    assert any(module._forward_hooks for module in model.modules())
    del allocator
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks or optimizer.step() is None


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_loss_scale_that_is_none_is_refused(scale: float) -> None:
    _, _, allocator = make()
    with pytest.raises(CommandError, match=r"loss_scale .* must be a number above 0"):
        allocator.step(loss_scale=scale)


def test_what_is_frozen_on_the_way_stays_frozen_and_keeps_its_rank() -> None:
    model, optimizer, allocator = make("random")
    train(model, optimizer, allocator, range(3))
    frozen = factors(lora_layers(model)[V_PROJ], "default")
    for factor in frozen:
        factor.requires_grad_(False)
    train(model, optimizer, allocator, range(3, STEPS))
    assert allocator.plan.ranks[V_PROJ] == 4 and len(allocator.ledger) > 4
    now = factors(lora_layers(model)[V_PROJ], "default")
    assert all(one is other and not one.requires_grad for one, other in zip(now, frozen, strict=True))


def test_the_names_of_an_optimizer_follow_its_parameters() -> None:
    model = tiny_llama()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=5e-3)
    allocator = RankAllocator(
        model, optimizer, total_steps=STEPS, importance="random", schedule=make_schedule(STEPS, share=0.25)
    )
    train(model, optimizer, allocator, range(STEPS))
    assert {entry.after for entry in allocator.ledger} & {0}
    names = {id(p): name for name, p in model.named_parameters()}
    [group] = optimizer.param_groups
    assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_a_run_that_said_why_nothing_moved_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    all_alike(monkeypatch, 1.0)
    model, optimizer, allocator = make()
    with pytest.warns(RankAllocatorWarning, match="no layer gained"):
        train(model, optimizer, allocator, range(20))
    allocator.close()


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_gone_move_nothing_and_it_says_so(importance: str, to_none: bool) -> None:
    """`step()` after `optimizer.zero_grad()`: scores of nothing would empty the first layers."""
    model, optimizer, allocator = make(importance)
    with pytest.warns(RankAllocatorWarning) as said:
        for step in range(STEPS):
            ids = batch(step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            assert not allocator.step()
    assert set(allocator.plan.ranks.values()) == {4} and not allocator.ledger
    late, first, second = (str(warning.message) for warning in said)
    assert "is called after optimizer.step()" in late
    assert "was called, up to step 4, so no rank moves: call it after loss.backward() and before" in first
    assert "in 4 of 4 rounds of moves no finite gradient" in second
    assert not any(module._forward_hooks for module in model.modules())


def test_one_step_with_a_gradient_is_enough_of_a_window() -> None:
    """Warnings are errors here: that of no gradient does not come, nor after the state was stored."""
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(3))
    rebuilt = again(model, optimizer, allocator.budget)
    rebuilt.load_state_dict(allocator.state_dict())
    assert not rebuilt.step()
    rebuilt.step()
    assert rebuilt.state_dict()["facts"]["moves_done"] == 1


def again(
    model: nn.Module, optimizer: torch.optim.Optimizer, budget: int, **settings: object
) -> RankAllocator:
    """An allocator made anew, with the settings of `make`, for a model that has its ranks already."""
    defaults = {"total_steps": STEPS, "schedule": make_schedule(STEPS, share=0.25), "budget": budget}
    return RankAllocator(model, optimizer, **{**defaults, **settings})  # type: ignore[arg-type]


def test_no_hook_is_left_on_the_optimizer() -> None:
    model, optimizer, allocator = make()
    hooks = optimizer._optimizer_step_pre_hooks
    assert len(hooks) == 1
    allocator.close()
    assert not hooks
    allocator = again(model, optimizer, allocator.budget)
    train(model, optimizer, allocator, range(9))  # it has seen enough
    assert not hooks


def test_an_optimizer_in_the_wrapping_of_accelerate_is_used_as_it_is() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model, optimizer, plain = make()
        plain.close()
        wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
        allocator = again(model, wrapped, plain.budget)
        train(model, wrapped, allocator, range(6))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert allocator.ledger == tuple(
        entry for entry in straight("singular_value")[1].ledger if entry.step < 6
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"importance": "sensitivity"},
            "importance is 'sensitivity', the allocator's state says 'singular_value'",
        ),
        ({"growth": "plain"}, "growth is 'plain'"),
        ({"seed": 7}, "seed is 7, the allocator's state says 0"),
        ({"margin": 9}, r"margin is 9\.0, the allocator's state says 1\.5"),
        ({"min_rank": 1}, "min_rank is 1"),
        ({"max_rank": 8}, "max_rank is 8, the allocator's state says None"),
        ({"schedule": make_schedule(STEPS)}, r"first_share is 0\.1"),
        ({"schedule": make_schedule(STEPS, share=0.25, moves=2)}, r"moves is \[4, 12\]"),
        (
            {"schedule": make_schedule(80), "total_steps": 80},
            "total_steps is 80, the allocator's state says 40",
        ),
    ],
)
def test_state_of_other_settings_is_refused(settings: dict[str, object], said: str) -> None:
    model, optimizer, allocator = make()
    state = json.loads(json.dumps(allocator.state_dict()["facts"]))
    allocator.close()
    other = again(model, optimizer, allocator.budget, **settings)
    with pytest.raises(CommandError, match=said):
        other.load_state_dict({"facts": state, "tensors": {}})
    again(model, optimizer, allocator.budget).load_state_dict({"facts": state, "tensors": {}})


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"lora_alpha": 32}, "scaling is 8, the allocator's state says 2: put the adapter on with the alpha"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"differ in the layer model\.layers\.0\.mlp\.down_proj"),
    ],
)
def test_state_of_another_adapter_is_refused(adapter: dict[str, Any], said: str) -> None:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **adapter})
    model = peft.get_peft_model(base_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    other = RankAllocator(model, optimizer, total_steps=STEPS, schedule=make_schedule(STEPS, share=0.25))
    with pytest.raises(CommandError, match=said):
        other.load_state_dict(make()[2].state_dict())


def by_depth(model: nn.Module, rates: Sequence[float] = (1e-3, 7e-3)) -> torch.optim.Optimizer:
    """An optimizer with a parameter group for each of the model's two layers."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in named if f"layers.{depth}." in name], "lr": rate}
            for depth, rate in enumerate(rates)
        ]
    )


def test_layers_that_come_back_after_a_resume_join_the_group_they_left() -> None:
    model = tiny_llama()
    settings: dict[str, Any] = {"importance": "random", "seed": 1, "total_steps": STEPS}
    settings["schedule"] = make_schedule(STEPS, share=0.5, moves=9, until=0.8)
    optimizer = by_depth(model)
    allocator = RankAllocator(model, optimizer, **settings)
    train(model, optimizer, allocator, range(15))
    gone = {name for name, rank in allocator.plan.ranks.items() if not rank and ".layers.1." in name}
    state = json.loads(json.dumps(allocator.state_dict()["facts"])), allocator.state_dict()["tensors"]
    with pytest.warns(RankAllocatorWarning, match="before the moves were over"):
        allocator.close()
    rebuilt = by_depth(model)
    rebuilt.load_state_dict(optimizer.state_dict())
    resumed = RankAllocator(model, rebuilt, budget=allocator.budget, **settings)
    resumed.load_state_dict({"facts": state[0], "tensors": state[1]})
    train(model, rebuilt, resumed, range(15, STEPS))
    assert any(resumed.plan.ranks[name] for name in gone)
    for depth, group in enumerate(rebuilt.param_groups):
        expected = {id(p) for n, p in model.named_parameters() if "lora_" in n and f"layers.{depth}." in n}
        assert {id(p) for p in group["params"]} == expected


def test_state_of_an_optimizer_with_more_groups_is_refused() -> None:
    model = tiny_llama()
    schedule = make_schedule(STEPS, share=0.25)
    allocator = RankAllocator(model, by_depth(model), total_steps=STEPS, schedule=schedule)
    _, _, other = make()
    with pytest.raises(CommandError, match=r"has 1 parameter groups, .* is of one with 2 or more"):
        other.load_state_dict(allocator.state_dict())


def test_an_optimizer_that_steps_alone_is_warned_about() -> None:
    model, optimizer, _allocator = make()
    ids = batch(0)
    with pytest.warns(RankAllocatorWarning, match=r"allocator.step\(\) was never called"):
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()


def test_hooks_are_on_in_windows_only_and_none_is_left() -> None:
    model, optimizer, allocator = make()
    hooked = []
    train(
        model, optimizer, allocator, range(STEPS),
        lambda step, moved: hooked.append(any(m._forward_hooks for m in model.modules())),
    )  # fmt: skip
    assert any(hooked) and not any(hooked[20:])


def test_a_closed_allocator_has_no_hooks_on_the_model() -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(6))
    assert any(module._forward_hooks for module in model.modules())
    with pytest.warns(RankAllocatorWarning, match="before the moves were over"):
        allocator.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_passes_of_one_step_add_up() -> None:
    """Two halves of a batch before one step move ranks as the whole batch does, twice."""
    runs = []
    for parts in (1, 2):
        model, optimizer, allocator = make()
        for step in range(9):
            for ids in batch(step).chunk(parts):
                (model(input_ids=ids, labels=ids).loss / parts).backward()
            allocator.step()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(allocator)
    assert runs[0].plan == runs[1].plan and runs[0].ledger


def test_clipping_and_scaling_change_no_decision() -> None:
    """Gradients that are scaled up in backward, scaled back and clipped afterwards."""
    runs = []
    for scale in (1.0, 1024.0):
        model, optimizer, allocator = make()
        for step in range(STEPS):
            ids = batch(step)
            (model(input_ids=ids, labels=ids).loss * scale).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
            allocator.step()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(allocator.plan)
    assert runs[0] == runs[1]


def test_a_loss_scale_that_changes_changes_no_decision() -> None:
    runs = []
    for changes in (False, True):
        model, optimizer, allocator = make()
        for step in range(STEPS):
            ids, scale = batch(step), 2.0 ** (step % 5) if changes else 1.0
            (model(input_ids=ids, labels=ids).loss * scale).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            allocator.step(loss_scale=scale)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(allocator)
    assert runs[0].plan == runs[1].plan and runs[0].ledger


def test_a_grad_scaler_stays_bound_to_what_is_trained(device: str) -> None:
    """Real float16, with a scale that overflows at first: those steps are skipped and move nothing."""
    model, optimizer, allocator = make(device=device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=1000)
    before: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        ids = batch(step).to(device)
        with torch.autocast(device, torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        allocator.step(loss_scale=scaler.get_scale())
        if step == STEPS - 1:
            before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**24  # some steps overflowed
    assert allocator.ledger and allocator.plan.parameters <= allocator.budget
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)


def test_ranks_move_within_bfloat16_autocast(device: str) -> None:
    """What is trained, and its moments, stay in float32."""
    model, optimizer, allocator = make(device=device)

    def check(step: int, moved: bool) -> None:
        assert allocator.plan.parameters <= allocator.budget

    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.autocast(device, torch.bfloat16):
        losses = train(model, optimizer, allocator, range(STEPS), check)
    assert allocator.ledger and losses[-1] < losses[0] - 0.05
    live = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in live.values()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}
    assert not any(n in before and torch.equal(before[n], p) for n, p in live.items())


def test_gradient_checkpointing_changes_no_decision(device: str) -> None:
    model, optimizer, allocator = make(device=device)
    base = model.get_base_model()  # type: ignore[operator]
    # Some releases of transformers 5 know the older name alone.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    model.enable_input_require_grads()  # type: ignore[operator]
    model.train()
    train(model, optimizer, allocator, range(STEPS))
    plain, other, straight = make(device=device)
    plain.enable_input_require_grads()  # type: ignore[operator]
    train(plain, other, straight, range(STEPS))
    assert allocator.plan == straight.plan and allocator.ledger


def emptied(
    keep: set[str], importance: str = "gradient_norm", **settings: object
) -> tuple[nn.Module, torch.optim.Optimizer, RankAllocator]:
    """An adapter with rank 1 at a few layers and 0 at all others."""
    model = tiny_llama()
    for name, module in lora_layers(model).items():
        reshape(module, "default", int(name in keep))
        if name in keep:
            a, _ = factors(module, "default")
            a.data = plain_components(1, a.shape[1], torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    allocator = RankAllocator(
        model,
        optimizer,
        total_steps=STEPS,
        importance=importance,  # type: ignore[arg-type]
        **{"schedule": make_schedule(STEPS, share=0.25), **settings},  # type: ignore[arg-type]
    )
    return model, optimizer, allocator


def test_one_component_moves_to_a_layer_that_had_none() -> None:
    start = "model.layers.0.self_attn.k_proj"
    schedule = make_schedule(STEPS, warmup=0.3, until=0.8, moves=1)
    model, optimizer, allocator = emptied({start}, schedule=schedule)
    assert sum(allocator.plan.ranks.values()) == 1

    def check(step: int, moved: bool) -> None:
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        live = [p for n, p in model.named_parameters() if "lora_" in n]
        assert held == [id(p) for p in live]
        assert sum(p.numel() for p in live) == allocator.plan.parameters <= allocator.budget

    losses = train(model, optimizer, allocator, range(STEPS), check)
    moved = [name for name, rank in allocator.plan.ranks.items() if rank]
    assert moved and moved != [start] and sum(allocator.plan.ranks.values()) == 1
    assert losses[-1] < losses[0]
    loaded = {name: module.r["default"] for name, module in lora_layers(model).items()}
    assert loaded == {moved[0]: 1}


def test_layers_that_no_gradient_reaches_stay_empty() -> None:
    """Backward ends at the lowest adapted layer, and the allocator does not change that."""
    keep = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    model, optimizer, allocator = emptied(keep)
    train(model, optimizer, allocator, range(STEPS))
    assert allocator.ledger
    assert not any(rank for name, rank in allocator.plan.ranks.items() if ".layers.0." in name)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_weight_that_is_no_number_moves_nothing_and_is_named(importance: str) -> None:
    model, optimizer, allocator = make(importance)
    name = allocator.plan.layers[3].name
    factors(lora_layers(model)[name], "default")[1].data[0, 0] = float("nan")
    with pytest.warns(RankAllocatorWarning) as said:
        train(model, optimizer, allocator, range(20))
    assert allocator.ledger == () and name in allocator.idle
    assert any("learnt nothing in 20 steps" in str(one.message) and name in str(one.message) for one in said)


def told(
    allocator: RankAllocator,
    scores: Callable[[str, int], list[float]],
    gains: Callable[[str], list[float]],
    reading: Callable[[str], Reading | None] = lambda name: None,
) -> dict[str, int]:
    """Let one move read this, and nothing else; the number of components that were old enough to score."""
    mature: dict[str, int] = {}

    def take(plan: RankPlan, step: int, bases: dict[str, Basis]) -> dict[str, LayerEvidence]:
        mature.update({name: len(basis.energies) for name, basis in bases.items()})
        return {
            layer.name: LayerEvidence(
                scores(layer.name, mature.get(layer.name, 0)),
                Promises(gains(layer.name)),
                reading(layer.name),
                0.5,
                1.0,
            )
            for layer in plan.layers
        }

    allocator._evidence.take = take  # type: ignore[method-assign]
    allocator._move(0.25)
    return mature


def test_a_move_gains_the_schedules_share_of_all_components() -> None:
    _, _, allocator = make()
    told(
        allocator,
        lambda name, count: [1.0 if name == V_PROJ else 1e-6] * count,
        lambda name: [10.0] * 64 if name == V_PROJ else [],
    )
    # A quarter of 14 layers' 4 ranks; v_proj is cheap and takes what it has room for, up to its full rank.
    assert allocator.plan.ranks[V_PROJ] == 8
    assert sum(allocator.plan.ranks.values()) >= 14 * 4 - 14 + 4


def test_scores_and_gains_count_per_parameter() -> None:
    """Equal components: of the dear layer they go; equal promises: the cheap layer takes."""
    _, _, allocator = make()
    told(
        allocator,
        lambda name, count: [1.0 if name in (V_PROJ, DOWN) else 9.0] * count,
        lambda name: [10.0] if name == K_PROJ else [],
    )
    assert allocator.plan.ranks[DOWN] == 3 and allocator.plan.ranks[V_PROJ] == 4
    _, _, allocator = make(budget=sum(4 * layer.cost for layer in allocator.plan.layers) + 24)
    told(allocator, lambda name, count: [], lambda name: [10.0] if name in (V_PROJ, DOWN) else [])
    assert allocator.plan.ranks[DOWN] == 4 and allocator.plan.ranks[V_PROJ] == 5


def test_the_components_that_score_least_are_dropped() -> None:
    model, _, allocator = make()
    module = lora_layers(model)[DOWN]
    a, b = factors(module, "default")
    b.data = torch.randn(b.shape, generator=torch.Generator().manual_seed(1))
    before = b.detach() @ a.detach()
    u, s, vh = torch.linalg.svd(before)
    told(
        allocator,
        lambda name, count: [5.0, 1e-9, 4.0, 3.0] if name == DOWN else [9.0] * count,
        lambda name: [10.0] if name == K_PROJ else [],
    )
    assert allocator.plan.ranks[DOWN] == 3 and allocator.plan.ranks[K_PROJ] == 5
    a, b = factors(module, "default")
    expected = before - s[1] * torch.outer(u[:, 1], vh[1])
    assert torch.allclose(b.detach() @ a.detach(), expected, atol=1e-4)


def test_of_components_that_score_alike_the_one_with_least_energy_goes() -> None:
    model, _, allocator = make()
    module = lora_layers(model)[DOWN]
    a, b = factors(module, "default")
    b.data = torch.randn(b.shape, generator=torch.Generator().manual_seed(4))
    before = torch.linalg.svdvals((b @ a).detach())[:4]
    told(
        allocator,
        lambda name, count: [1e-9 if name == DOWN else 9.0] * count,
        lambda name: [10.0] if name == K_PROJ else [],
    )
    a, b = factors(module, "default")
    assert torch.allclose(torch.linalg.svdvals((b @ a).detach())[:3], before[:3], rtol=1e-4)


def test_newborns_lie_along_the_leading_direction() -> None:
    model, _, allocator = make()
    layer = next(layer for layer in allocator.plan.layers if layer.name == K_PROJ)
    q = torch.linalg.qr(
        torch.randn(layer.in_features, 4, generator=torch.Generator().manual_seed(2))
    ).Q.double()
    left = torch.linalg.qr(torch.randn(layer.out_features, 4, generator=torch.Generator().manual_seed(3))).Q
    none = torch.zeros(4, 4, dtype=torch.float64)
    loud = torch.tensor([16.0, 4.0, 1.0, 1.0], dtype=torch.float64)
    reading = Reading(loud, torch.zeros(()), left.double(), q, loud, none)
    told(
        allocator,
        lambda name, count: [1e-9] * count if name == DOWN else [9.0] * count,
        lambda name: [10.0] if name == K_PROJ else [],
        lambda name: reading if name == K_PROJ else None,
    )
    assert allocator.plan.ranks[K_PROJ] == 5
    a, _ = factors(lora_layers(model)[K_PROJ], "default")
    # As long as lets it see what is usual, 1.0: a quarter of a direction of loudness 16.
    assert torch.allclose(a[-1].detach(), q[:, 0].float() / 4, atol=1e-5)


def test_newborns_have_no_score_for_two_moves() -> None:
    _, _, allocator = make("singular_value")
    plain = lambda name, count: [1e-9] * count if name == DOWN else [9.0] * count  # noqa: E731
    told(allocator, plain, lambda name: [10.0] if name == K_PROJ else [])
    assert allocator.plan.ranks[K_PROJ] == 5
    counts = [told(allocator, plain, lambda name: [])[K_PROJ] for _ in range(4)]
    assert counts == [4, 4, 5, 5]


def test_a_newborn_is_protected_also_where_its_layer_shrinks() -> None:
    _, _, allocator = make("singular_value")
    told(
        allocator,
        lambda name, count: [1e-9] * count if name == DOWN else [9.0] * count,
        lambda name: [10.0] if name == K_PROJ else [],
    )
    assert allocator.plan.ranks[K_PROJ] == 5
    told(
        allocator,
        lambda name, count: [1e-9] * count if name == K_PROJ else [9.0] * count,
        lambda name: [10.0, 9.0, 8.0] if name == V_PROJ else [],
    )
    rank = allocator.plan.ranks[K_PROJ]
    assert rank < 5
    counts = told(allocator, lambda name, count: [9.0] * count, lambda name: [])
    assert counts[K_PROJ] == rank - 1


@functools.cache
def straight(importance: str, device: str = "cpu") -> tuple[nn.Module, RankAllocator]:
    """A run that was not interrupted."""
    model, optimizer, allocator = make(importance, device)
    train(model, optimizer, allocator, range(STEPS))
    return model, allocator


@pytest.mark.parametrize("at", [0, 3, 9])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_state_goes_on_exactly(importance: str, at: int, device: str, tmp_path: Path) -> None:
    """A run that is stored in the middle of its moves and rebuilt equals one that was not."""
    model, allocator = straight(importance, device)
    one, half, stored = make(importance, device)
    train(one, half, stored, range(at))
    state = stored.state_dict()
    save_file(state["tensors"], str(tmp_path / "state.safetensors"))
    facts = json.loads(json.dumps(state["facts"]))
    state = {"facts": facts, "tensors": load_file(str(tmp_path / "state.safetensors"))}
    del stored
    rebuilt = RankAllocator(
        one, half, total_steps=STEPS, importance=importance,  # type: ignore[arg-type]
        schedule=make_schedule(STEPS, share=0.25),
    )  # fmt: skip
    rebuilt.load_state_dict(state)
    assert rebuilt.budget == allocator.budget
    train(one, half, rebuilt, range(at, STEPS))
    assert rebuilt.plan == allocator.plan and rebuilt.ledger == allocator.ledger
    for first, second in zip(model.parameters(), one.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_run_of_ones_own_loop_goes_on_by_public_names_alone(tmp_path: Path) -> None:
    """Stored as anyone would, and read into a model made anew; layers have left by then."""
    settings: dict[str, Any] = {"importance": "random", "total_steps": STEPS}
    settings["schedule"] = autorank.make_schedule(STEPS, share=0.25)
    model = tiny_llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    allocator = autorank.RankAllocator(model, optimizer, **settings)
    train(model, optimizer, allocator, range(15))
    assert 0 in allocator.plan.ranks.values()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "loop.pt")
    save_file(allocator.state_dict()["tensors"], str(tmp_path / "allocator.safetensors"))
    (tmp_path / "allocator.json").write_text(json.dumps(allocator.state_dict()["facts"]))
    train(model, optimizer, allocator, range(15, STEPS))

    again = tiny_llama()
    stored = torch.load(tmp_path / "loop.pt", weights_only=True)
    state = {
        "facts": json.loads((tmp_path / "allocator.json").read_text()),
        "tensors": load_file(str(tmp_path / "allocator.safetensors")),
    }
    plan = autorank.shape_from_state(again, state)
    assert 0 in plan.ranks.values()
    again.load_state_dict(stored["model"])
    other = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=5e-3)
    other.load_state_dict(stored["optimizer"])
    resumed = autorank.RankAllocator(again, other, **settings)
    resumed.load_state_dict(state)
    train(again, other, resumed, range(15, STEPS))
    assert resumed.ledger == allocator.ledger
    ended = again.state_dict()
    assert all(torch.equal(ended[key], value) for key, value in model.state_dict().items())


def test_a_budget_that_is_given_is_not_that_of_the_state() -> None:
    model, optimizer, allocator = make(budget=9_000)
    train(model, optimizer, allocator, range(9))
    state = allocator.state_dict()
    for budget, held in ((None, 9_000), (12_000, 12_000)):
        schedule = make_schedule(STEPS, share=0.25)
        again = RankAllocator(model, optimizer, total_steps=STEPS, schedule=schedule, budget=budget)
        again.load_state_dict(state)
        assert again.budget == held > again.plan.parameters


def test_state_of_other_ranks_is_refused() -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(STEPS))
    _, _, fresh = make()
    with pytest.raises(CommandError, match="stored ranks"):
        fresh.load_state_dict(allocator.state_dict())


def test_what_cannot_work_is_refused() -> None:
    model, optimizer, _ = make()
    with pytest.raises(CommandError, match="no LoRA layer"):
        RankAllocator(nn.Linear(2, 2), optimizer, total_steps=STEPS)
    with pytest.raises(CommandError, match="over the budget"):
        RankAllocator(model, optimizer, total_steps=STEPS, budget=100)
    with pytest.raises(CommandError, match="at least"):
        RankAllocator(model, optimizer, total_steps=5)
    with pytest.raises(CommandError, match="importance"):
        RankAllocator(model, optimizer, total_steps=STEPS, importance="magic")  # type: ignore[arg-type]
    with pytest.raises(
        CommandError, match=r"14 layers start below min_rank 5, .*q_proj at rank 4: start from"
    ):
        RankAllocator(model, optimizer, total_steps=STEPS, min_rank=5)
    with pytest.raises(CommandError, match="no rank can ever move: 0 layers may give one up"):
        RankAllocator(model, optimizer, total_steps=STEPS, min_rank=4, max_rank=4)
    with pytest.raises(CommandError, match=r"and 14 may take .*, for which the budget of 2,240 must pay"):
        RankAllocator(model, optimizer, total_steps=STEPS, min_rank=4)
    next(iter(lora_layers(model).values())).scaling["default"] = 3.0
    with pytest.raises(CommandError, match="scalings differ"):
        RankAllocator(model, optimizer, total_steps=STEPS)


def test_a_resized_model_saves_and_loads_in_plain_peft(tmp_path: Path) -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(STEPS))
    assert len(set(allocator.plan.ranks.values())) > 1
    ids = batch(99)
    live = model(input_ids=ids).logits
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)  # type: ignore[operator]
    loaded = peft.PeftModel.from_pretrained(base_llama(), str(tmp_path))
    assert torch.allclose(loaded(input_ids=ids).logits, live, atol=1e-5)
    ranks = {name: module.r["default"] for name, module in lora_layers(loaded).items()}
    assert ranks == {name: rank for name, rank in allocator.plan.ranks.items() if rank}


SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
SHAPES: dict[str, tuple[str, str, dict[str, Any], list[str] | str]] = {
    "fused": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "tied": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        ["wte", "c_attn", "c_proj", "c_fc"],
    ),
    "used at every depth": (
        "AlbertConfig",
        "AlbertForMaskedLM",
        {**SMALL, "embedding_size": 8, "num_attention_heads": 4, "max_position_embeddings": 32},
        ["query", "value", "dense", "ffn", "ffn_output"],
    ),
    "bfloat16": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_attention_heads": 4}, "all-linear"),
}


def shaped(kind: str) -> nn.Module:
    """A tiny base model of that shape."""
    config, model, settings, _ = SHAPES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return base.bfloat16() if kind == "bfloat16" else base


@pytest.mark.parametrize("kind", SHAPES)
def test_layers_of_any_shape_move_train_and_load_in_plain_peft(kind: str, tmp_path: Path) -> None:
    base = shaped(kind)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, lora_alpha=8, target_modules=SHAPES[kind][3], fan_in_fan_out=kind == "tied"
        )
        # PEFT would keep B and A of a bfloat16 base in float32.
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = make_schedule(STEPS, share=0.25)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, schedule=schedule, max_rank=6)
    costs = {layer.name: layer.cost for layer in allocator.plan.layers}

    def check(step: int, moved: bool) -> None:
        live = {name: p for name, p in model.named_parameters() if "lora_" in name}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in live.values()} == held
        assert sum(p.numel() for p in live.values()) == allocator.plan.parameters <= allocator.budget

    losses = train(model, optimizer, allocator, range(STEPS), check)
    assert losses[-1] < losses[0] and allocator.idle == ()
    assert {entry.layer for entry in allocator.ledger if entry.after > entry.before}
    assert allocator.plan.parameters == sum(costs[n] * r for n, r in allocator.plan.ranks.items())
    for module in lora_layers(model).values():
        a, b = factors(module, "default")
        assert bool(a.any(1).all()) and bool(b.any(0).all())  # every component trains, newborns too
    ids = batch(99)
    live_logits = model.eval()(input_ids=ids).logits  # GPT-2 has dropout
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(shaped(kind), str(tmp_path), autocast_adapter_dtype=False)
    assert torch.allclose(loaded(input_ids=ids).logits, live_logits, atol=1e-5)
    after = model.unload().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def loaded_quantised(bits: int, device: str, folder: Path) -> nn.Module:
    """The tiny base model as transformers loads it with weights of 4 or 8 bits."""
    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
    base_llama().save_pretrained(folder)
    base: nn.Module = LlamaForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        dtype=torch.float32,
        device_map={"": device},
    )
    return base.train()  # in evaluation bitsandbytes packs 4-bit weights anew for some CPUs


READ_BY = {4: {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}, 8: {"SCB"}}
"""What bitsandbytes stores beside a weight, to read it by."""


@pytest.mark.parametrize("importance", ["singular_value", "random"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_transformers_loads_quantised_stays_as_it_is(
    bits: int, importance: str, device: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes has the layers of 4 and 8 bits")
    model = adapted(loaded_quantised(bits, device, tmp_path))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    if importance == "random":
        allocator = random_moves(model, optimizer)
    else:
        schedule = make_schedule(STEPS, share=0.25)
        allocator = RankAllocator(model, optimizer, total_steps=STEPS, schedule=schedule)

    def base_of(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in tensors.items() if "lora_" not in key}

    before = {key: value.clone() for key, value in base_of(model.state_dict()).items()}
    parameters = base_of(dict(model.named_parameters()))
    for name in allocator.plan.ranks:
        [weight] = [key for key in parameters if f".{name}." in key]
        assert parameters[weight].dtype == (torch.uint8 if bits == 4 else torch.int8)
        assert {key.rpartition(".")[2] for key in before if f".{name}." in key} >= READ_BY[bits]
    lora = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    def check(step: int, moved: bool) -> None:
        live = [p.numel() for n, p in model.named_parameters() if "lora_" in n]
        assert sum(live) == allocator.plan.parameters <= allocator.budget

    losses = train(model, optimizer, allocator, range(STEPS), check)
    assert allocator.ledger and losses[-1] < losses[0] - 0.1
    assert returned(allocator) or importance != "random"
    after = base_of(model.state_dict())
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key
    now = base_of(dict(model.named_parameters()))
    assert now.keys() == parameters.keys()
    assert all(now[name] is parameter and parameter.grad is None for name, parameter in parameters.items())
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert not any(torch.equal(lora[n], p) for n, p in trained.items() if n in lora)


def test_state_that_cannot_follow_stops_a_move_before_it_changes_anything() -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(4))
    last = factors(lora_layers(model)[DOWN], "default")[1]
    optimizer.state[last]["master"] = torch.zeros_like(last)
    before = list(model.parameters())
    with pytest.raises(ValueError, match="'master'"):
        train(model, optimizer, allocator, range(4, STEPS))
    moved = {entry.layer for entry in allocator.ledger if entry.step == allocator._step}
    assert not moved and len(before) == len(list(model.parameters()))
    assert all(m.r["default"] == allocator.plan.ranks[n] for n, m in lora_layers(model).items())


@pytest.mark.parametrize("gap", [1, 2])
def test_a_layer_that_has_just_come_back_is_not_idle(gap: int) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = Schedule(STEPS, (4, 9, 14), first_share=0.5, final_step=14 + gap)
    allocator = RankAllocator(
        model, optimizer, total_steps=STEPS, importance="random", schedule=schedule, seed=3
    )
    back: list[str] = []

    def check(step: int, moved: bool) -> None:
        back.extend(
            entry.layer for entry in allocator.ledger if entry.step == step == 14 and not entry.before
        )

    train(model, optimizer, allocator, range(STEPS), check)  # a warning would be an error
    assert back and allocator.idle == ()


def test_an_optimizer_without_the_adapter_is_refused() -> None:
    model = tiny_llama()
    other = nn.Linear(2, 2)
    with pytest.raises(CommandError, match="optimizer does not hold"):
        RankAllocator(model, torch.optim.AdamW(other.parameters()), total_steps=STEPS)


def test_factors_that_two_layers_share_are_refused() -> None:
    model = tiny_llama()
    layers = [m for n, m in lora_layers(model).items() if n.endswith("q_proj")]
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(CommandError, match=r"layers\.1.*q_proj shares a LoRA factor with .*layers\.0"):
        RankAllocator(model, optimizer, total_steps=STEPS)


def test_variants_with_parts_of_a_ranks_shape_are_refused() -> None:
    model = tiny_llama()
    layer = next(iter(lora_layers(model).values()))

    class KasaLinearVariant:
        pass

    layer.lora_variant["default"] = KasaLinearVariant()  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(CommandError, match="KasaLinearVariant, whose parts a change of rank does not carry"):
        RankAllocator(model, optimizer, total_steps=STEPS)


@pytest.mark.parametrize("rank", [3, 7, 8])
def test_a_saved_adapter_is_opened_again_where_alpha_over_rank_rounds(rank: int, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", use_rslora=True)
        model = peft.get_peft_model(base_llama(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        schedule = make_schedule(STEPS, share=0.25)
        allocator = RankAllocator(model, optimizer, total_steps=STEPS, schedule=schedule, importance="random")
        train(model, optimizer, allocator, range(STEPS))
        state = allocator.state_dict()
        model.save_pretrained(str(tmp_path))
        again = peft.PeftModel.from_pretrained(base_llama(), str(tmp_path), is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad])
    other = RankAllocator(again, optimizer, total_steps=STEPS)
    live = {name: found for name, found in allocator.plan.ranks.items() if found}
    assert {name: found for name, found in other.plan.ranks.items() if found} == live
    assert len(set(live.values())) > 1 and state["facts"]["plan"]


def test_a_window_that_was_closed_is_stored_and_a_closed_allocator_takes_no_state() -> None:
    model, optimizer, allocator = make()
    move = make_schedule(STEPS, share=0.25).moves[0]
    train(model, optimizer, allocator, range(move - 1))
    tensors = allocator.state_dict()["tensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        allocator.close()
    state = allocator.state_dict()
    assert tensors and state["tensors"].keys() == tensors.keys()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(CommandError, match="the allocator is closed"):
        allocator.load_state_dict(state)


class Experts(nn.Module):
    """Two linear layers, of which a step uses one or both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 10, bias=False), nn.Linear(12, 10, bias=False)

    def forward(self, x: torch.Tensor, which: str) -> torch.Tensor:
        return sum(getattr(self, name)(x) for name in which)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:ranks stayed as they were")
@pytest.mark.parametrize("importance", ["singular_value", "gradient_norm", "sensitivity"])
def test_a_layer_that_only_some_steps_reach_does_not_pay_for_what_they_missed(importance: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Experts()
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["a", "b"])
        model = peft.get_peft_model(base, config)  # type: ignore[arg-type]
        target = torch.randn(10, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    schedule = Schedule(40, (24,), first_share=0.5, final_step=25)
    allocator = RankAllocator(model, optimizer, total_steps=40, schedule=schedule, importance=importance)  # type: ignore[arg-type]
    for step in range(30):
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
        first_phase = 24 - 12 < step <= 24 - 8  # where directions are looked for
        loss = (model(x, "a" if first_phase else "ab") - x @ target.T).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        allocator.step()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.plan.ranks["b"] == 2


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"lora_bias": True}])
def test_magnitudes_and_biases_stay_and_are_counted_apart(extra: dict[str, bool]) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules="all-linear", **extra)  # type: ignore[arg-type]
        model = peft.get_peft_model(base_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    others = {n: id(p) for n, p in model.named_parameters() if p.requires_grad and not factor(n)}
    assert others
    schedule = make_schedule(STEPS, share=0.25)
    allocator = RankAllocator(model, optimizer, total_steps=STEPS, schedule=schedule)
    train(model, optimizer, allocator, range(STEPS))
    assert allocator.ledger and min(allocator.plan.ranks.values()) >= 1
    assert {n: id(p) for n, p in model.named_parameters() if p.requires_grad and not factor(n)} == others
    counted = sum(p.numel() for n, p in model.named_parameters() if factor(n))
    assert counted == allocator.plan.parameters <= allocator.budget


def factor(name: str) -> bool:
    return name.endswith(("lora_A.default.weight", "lora_B.default.weight"))


def test_spare_budget_is_spent_first_and_what_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    all_alike(monkeypatch, 1.0)
    _, _, allocator = make()
    start = allocator.plan.parameters
    model, optimizer, roomy = make(budget=start + 400)
    train(model, optimizer, roomy, range(STEPS))
    assert roomy.ledger and {entry.step for entry in roomy.ledger} == {make_schedule(STEPS).moves[0]}
    assert all(entry.after > entry.before and entry.against == 0 for entry in roomy.ledger)
    assert roomy.budget - roomy.plan.parameters < min(layer.cost for layer in roomy.plan.layers)
    assert "free" not in roomy.summary
    model, optimizer, rich = make(budget=20 * start, max_rank=5)
    train(model, optimizer, rich, range(STEPS))
    assert set(rich.plan.ranks.values()) == {5} and "free" not in rich.summary  # no layer has room
    all_alike(monkeypatch, 0.0)
    model, optimizer, poor = make(budget=start + 400)
    with pytest.warns(RankAllocatorWarning, match="no gain stood out of the noise"):
        train(model, optimizer, poor, range(STEPS))
    assert poor._unspent.startswith(f"; 400 of the budget's {start + 400:,} parameters are free, for fewer")


def random_moves(
    model: nn.Module, optimizer: torch.optim.Optimizer, adapter_name: str = "default"
) -> RankAllocator:
    """Many moves, and layers that leave and come back."""
    return RankAllocator(
        model,
        optimizer,
        total_steps=STEPS,
        importance="random",
        schedule=make_schedule(STEPS, share=0.5, moves=9, until=0.8),
        adapter_name=adapter_name,
    )


def returned(allocator: RankAllocator) -> set[str]:
    """Layers that came back from rank 0 and are live now."""
    return {
        entry.layer for entry in allocator.ledger if entry.before == 0 and allocator.plan.ranks[entry.layer]
    }


def test_a_revived_layer_is_back_in_its_own_groups() -> None:
    """Every layer's A and B have a learning rate of their own."""
    model = tiny_llama()
    names = list(lora_layers(model))
    rates = {}
    groups = []
    for place, (name, module) in enumerate(lora_layers(model).items()):
        for half, parameter in enumerate(factors(module, "default")):
            rates[name, half] = 1e-3 * (1 + 2 * place + half)
            groups.append({"params": [parameter], "lr": rates[name, half]})
    optimizer = torch.optim.AdamW(groups)
    allocator = random_moves(model, optimizer)
    train(model, optimizer, allocator, range(STEPS))
    assert returned(allocator) - {names[0]}
    held = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {
        (name, half): held[id(parameter)]
        for name, module in lora_layers(model).items()
        for half, parameter in enumerate(factors(module, "default"))
    }
    assert found == {key: rates[key] for key in found}


def test_a_layer_without_an_adapter_belongs_where_its_kind_is() -> None:
    """LoRA+ gives embeddings a learning rate of their own; the first live layer is one here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "q_proj", "down_proj"])
        model = peft.get_peft_model(base_llama(), config)
    modules = lora_layers(model)
    quiet = "model.layers.0.self_attn.q_proj"
    reshape(modules[quiet], "default", 0)
    live = {name: factors(m, "default") for name, m in modules.items() if name != quiet}
    groups = [
        {"params": list(live["model.embed_tokens"]), "lr": 1e-6},
        {"params": [a for name, (a, _) in live.items() if name != "model.embed_tokens"], "lr": 1e-3},
        {"params": [b for name, (_, b) in live.items() if name != "model.embed_tokens"], "lr": 1e-2},
    ]
    allocator = RankAllocator(model, torch.optim.AdamW(groups), total_steps=STEPS)
    assert allocator._groups[quiet] == (1, 2) and allocator._groups["model.embed_tokens"] == (0, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_revived_layers_train_under_momentum(fused: bool, device: str) -> None:
    model = tiny_llama(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=fused)
    allocator = random_moves(model, optimizer)
    train(model, optimizer, allocator, range(STEPS))
    assert returned(allocator)
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters() if p.requires_grad)


def test_moves_of_one_adapter_leave_the_other_alone() -> None:
    model = tiny_llama()
    other = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model.add_adapter("other", other)  # type: ignore[operator]
    model.set_adapter("other")  # type: ignore[operator]
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    assert kept
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            kept[name] = parameter.data.normal_(generator=torch.Generator().manual_seed(0)).clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    allocator = random_moves(model, optimizer, "other")
    assert {name.rpartition(".")[2] for name in allocator.plan.ranks} == {"q_proj", "v_proj", "down_proj"}
    train(model, optimizer, allocator, range(STEPS))
    assert any(entry.after == 0 for entry in allocator.ledger)
    now = {n: p for n, p in model.named_parameters() if ".default." in n}
    assert now.keys() == kept.keys()
    assert not any(parameter.requires_grad for parameter in now.values())
    assert all(torch.equal(parameter, kept[name]) for name, parameter in now.items())
    assert all(m.active_adapters == ["other"] for m in lora_layers(model).values())
    rebuilt = random_moves(model, optimizer, "other")  # finds the layers at rank 0 again
    assert rebuilt.plan.ranks == allocator.plan.ranks


class Wrapped(nn.Module):
    """A model of the user's own around a PEFT model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.backbone(**inputs)
        return out


@pytest.mark.parametrize("kind", ["wrapped", "rslora"])
def test_what_is_saved_after_moves_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    if kind == "rslora":
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)
        model = peft.get_peft_model(base_llama(), config)
    outer = Wrapped(model) if kind == "wrapped" else model
    optimizer = torch.optim.AdamW([p for p in outer.parameters() if p.requires_grad], lr=5e-3)
    schedule = make_schedule(STEPS, share=0.25)
    allocator = RankAllocator(outer, optimizer, total_steps=STEPS, schedule=schedule)
    train(outer, optimizer, allocator, range(STEPS))
    live = lora_layers(model)
    assert allocator.ledger and len({module.r["default"] for module in live.values()}) > 1
    assert {m.scaling["default"] for m in live.values()} == {4.0 if kind == "rslora" else 2.0}
    ids = batch(99)
    logits = model(input_ids=ids).logits
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)  # type: ignore[operator]
    again = peft.PeftModel.from_pretrained(base_llama(), str(tmp_path))
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in lora_layers(again).items()} == {
        n: (m.r["default"], m.scaling["default"]) for n, m in live.items()
    }
    assert torch.allclose(again(input_ids=ids).logits, logits, atol=1e-5)


class DistributedDataParallel(nn.Module):
    """Known by its name, as torch's own is; that one needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_models_whose_ranks_cannot_move_are_refused() -> None:
    model, optimizer, _ = make()
    wrapped = {
        "DistributedDataParallel.*one process": DistributedDataParallel(model),
        "DataParallel.*one process on one device": nn.DataParallel(model),
        "torch.compile keeps": torch.compile(model, backend="eager"),
        "several PEFT models": nn.ModuleList([model, tiny_llama()]),
    }
    for message, outer in wrapped.items():
        held = torch.optim.AdamW([p for p in outer.parameters() if p.requires_grad])
        with pytest.raises(CommandError, match=message):
            RankAllocator(outer, held, total_steps=STEPS)  # type: ignore[arg-type]
    next(iter(model.get_base_model().model.layers)).compile(backend="eager")  # type: ignore[operator]
    with pytest.raises(CommandError, match=r"model\.layers\.0 .*uncompiled"):
        RankAllocator(model, optimizer, total_steps=STEPS)


def test_an_optimizer_that_no_rank_can_move_under_is_refused_at_the_start() -> None:
    model = tiny_llama()
    optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(CommandError, match=r"Adagrad.*use one of"):
        RankAllocator(model, optimizer, total_steps=STEPS)
    RankAllocator(model, optimizer, total_steps=STEPS, importance="uniform")


class Images(nn.Module):
    """A layer that has no two matrices, between two that have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.image = nn.Conv2d(1, 4, 3)
        self.last = nn.Linear(4, 4)


def test_a_layer_without_two_matrices_is_refused_by_name() -> None:
    config = peft.LoraConfig(r=2, target_modules=["first", "image", "last"])
    model = peft.get_peft_model(Images(), config)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(CommandError, match=r"image is a Conv2d .*leave it out of target_modules"):
        RankAllocator(model, optimizer, total_steps=STEPS)
