"""The allocator on a real PEFT model in a training loop of its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autorank.adapter import lora_layers
from autorank.allocator import RankAllocator
from autorank.errors import CommandError
from autorank.schedule import make_schedule

STEPS = 40
IMPORTANCES = ("gradient_norm", "singular_value")


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


def tiny_llama() -> nn.Module:
    """With an adapter of rank 4 on every linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        return peft.get_peft_model(base_llama(), config)


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
        ids = batch(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        moved = allocator.step()
        check(step, moved)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make(
    importance: str = "gradient_norm", **settings: object
) -> tuple[nn.Module, torch.optim.Optimizer, RankAllocator]:
    model = tiny_llama()
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
def test_ranks_move_for_real_and_never_over_budget(importance: str) -> None:
    model, optimizer, allocator = make(importance)
    start = allocator.plan.ranks
    budget = allocator.budget

    def check(step: int, moved: bool) -> None:
        lora = [p for n, p in model.named_parameters() if "lora_" in n]
        assert sum(p.numel() for p in lora) == allocator.plan.parameters <= budget
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in lora}
        assert set(map(id, optimizer.state)) <= held
        assert not moved or step in make_schedule(STEPS).moves

    losses = train(model, optimizer, allocator, range(STEPS), check)
    assert allocator.plan.ranks != start and len(set(allocator.plan.ranks.values())) > 1
    assert losses[-1] < losses[0] - 0.1
    live = {n: m.r["default"] for n, m in lora_layers(model).items()}
    assert live == {name: rank for name, rank in allocator.plan.ranks.items() if rank}
    assert budget - allocator.plan.parameters < max(layer.cost for layer in allocator.plan.layers)


def test_every_live_parameter_trains_after_the_moves() -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(STEPS - 2))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, optimizer, allocator, range(STEPS - 2, STEPS))
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)


def test_the_scaling_stays_when_ranks_move() -> None:
    model, optimizer, allocator = make()
    train(model, optimizer, allocator, range(STEPS))
    assert {module.scaling["default"] for module in lora_layers(model).values()} == {2.0}
    assert {m.lora_alpha["default"] / m.r["default"] for m in lora_layers(model).values()} == {2.0}


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
            assert entry.score > entry.against
    assert ranks == allocator.plan.ranks


def test_limits_of_ranks_hold() -> None:
    model, optimizer, allocator = make(min_rank=2, max_rank=5)
    train(model, optimizer, allocator, range(STEPS))
    assert set(allocator.plan.ranks.values()) <= {2, 3, 4, 5}
    assert len(set(allocator.plan.ranks.values())) > 1


def test_flat_importance_moves_nothing() -> None:
    model, _optimizer, allocator = make()
    for _ in range(STEPS):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        assert not allocator.step()
    assert allocator.ledger == ()


def test_newborns_are_protected_for_two_moves() -> None:
    model, optimizer, allocator = make("singular_value")
    grown: dict[str, int] = {}
    train(model, optimizer, allocator, range(5))
    first = [entry for entry in allocator.ledger if entry.after > entry.before]
    assert first
    for entry in first:
        grown[entry.layer] = entry.after - entry.before
    train(model, optimizer, allocator, range(5, 13))
    for entry in allocator.ledger[len(first) :]:
        if entry.layer in grown and entry.step > first[0].step and entry.after < entry.before:
            assert entry.after >= grown[entry.layer]


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_state_goes_on_exactly(importance: str) -> None:
    """A run that is stored in the middle of its moves and rebuilt equals one that was not."""
    model, optimizer, allocator = make(importance)
    train(model, optimizer, allocator, range(STEPS))

    one, half, stored = make(importance)
    train(one, half, stored, range(9))
    state = json.loads(json.dumps(stored.state_dict()))
    rebuilt = RankAllocator(
        one, half, total_steps=STEPS, importance=importance, budget=stored.budget,  # type: ignore[arg-type]
        schedule=make_schedule(STEPS, share=0.25),
    )  # fmt: skip
    rebuilt.load_state_dict(state)
    train(one, half, rebuilt, range(9, STEPS))
    assert rebuilt.plan == allocator.plan and rebuilt.ledger == allocator.ledger
    for first, second in zip(model.parameters(), one.parameters(), strict=True):
        assert torch.equal(first, second)


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


def test_an_optimizer_without_the_adapter_is_refused() -> None:
    model = tiny_llama()
    other = nn.Linear(2, 2)
    with pytest.raises(CommandError, match="optimizer does not hold"):
        RankAllocator(model, torch.optim.AdamW(other.parameters()), total_steps=STEPS)


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"lora_bias": True}])
def test_parameters_that_the_budget_would_not_count_are_refused(extra: dict[str, bool]) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules="all-linear", **extra)  # type: ignore[arg-type]
        model = peft.get_peft_model(base_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(CommandError, match="cannot be resized"):
        RankAllocator(model, optimizer, total_steps=STEPS)


def test_spare_budget_is_spent_a_few_ranks_at_a_time() -> None:
    _, _, allocator = make()
    start = sum(allocator.plan.ranks.values())
    model, optimizer, roomy = make(budget=10 * allocator.budget)
    train(model, optimizer, roomy, range(5))
    assert 0 < sum(roomy.plan.ranks.values()) - start <= round(0.25 * start)
