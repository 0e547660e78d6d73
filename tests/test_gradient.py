"""The gradient probe on tiny models, against dense gradients by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from image_world import KINDS, save_vit, write_squares
from seq2seq_world import save_seq2seq, write_reversals
from test_allocator import base_llama, batch, train
from torch import Tensor, nn

from autorank.adapter import lora_layers
from autorank.allocator import RankAllocator
from autorank.config import load_config
from autorank.display import Display
from autorank.errors import CommandError
from autorank.evidence import Promises
from autorank.gradient import BATCHES, probe_gains, start_from_gradient
from autorank.lane import Bench
from autorank.plan import LayerSpec
from autorank.preflight import prepare
from autorank.references import score_frozen_base
from autorank.resize import factors
from autorank.schedule import make_schedule
from autorank.train import BatchOrder
from autorank.watch import RankAllocatorWarning

World = tuple[Bench, tuple[LayerSpec, ...]]


def make_world(model: Path, data: Path, studies: Path, **more: object) -> World:
    """A bench with its head solved, and all its layers."""
    settings: dict[str, Any] = {"model": str(model), "data": str(data), "studies_dir": str(studies)}
    settings |= {"budget": "3k", "steps": 24, "batch_size": 8, "max_length": 16, **more}
    setup = prepare(load_config(None, settings), Display.silent())
    score_frozen_base(setup, Display.silent())
    return setup.bench, setup.space.groups["all-linear"]


@pytest.fixture(scope="module")
def world(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_bert, tiny_data, tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path, tiny_completions: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_llama, tiny_completions, tmp_path_factory.mktemp("studies"))


def dense(bench: Bench, layers: tuple[LayerSpec, ...], steps: range, seed: int) -> dict[str, Tensor]:
    """The mean of ∂L/∂W over the batches of some steps, by autograd."""
    model = bench.base.model
    order = BatchOrder([len(e.input_ids) for e in bench.train], bench.recipe.batch_size, seed)
    weights = {layer.name: model.get_submodule(layer.name).weight for layer in layers}
    for weight in weights.values():
        weight.requires_grad = True
    for step in steps:
        rows = [bench.train[row] for row in order.rows(step)]
        batch = bench.task.collate(rows, bench.base.pad_token_id)
        (bench.task.loss(model(**batch.inputs).logits, batch) / len(steps)).backward()
    found = {}
    for name, weight in weights.items():
        found[name] = weight.grad.double().clone()
        weight.requires_grad, weight.grad = False, None
    return found


def energies_seen(bench: Bench, layers: Sequence[LayerSpec], seed: int) -> dict[str, tuple[float, ...]]:
    """What the probe sees, before it is made a promise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autorank.gradient.promises", lambda reading, *_: Promises(reading.gains.tolist()))
        return probe_gains(bench, layers, seed=seed)


def test_gains_are_what_moves_promise_for_rows_as_lora_draws_them(world: World) -> None:
    """All signal: a component hears what a random row would, or the direction itself where that is less."""
    bench, layers = world
    few = replace(bench, train=bench.train[:2])
    gains = probe_gains(few, layers, seed=0)
    for layer in layers:
        energies = torch.linalg.svdvals(dense(few, layers, range(1), 0)[layer.name]).square()
        heard = min(energies[0], energies.sum() / layer.in_features) ** 0.5
        most = float(layer.out_features**0.5 * 3**-0.5 * heard)
        assert 0.7 * most < gains[layer.name][0] < 1.01 * most  # four directions hold most of it


def test_without_noise_the_dense_gradients_energies_are_seen(world: World) -> None:
    """Two rows make every batch the same, and gradients that a sketch of four directions can hold."""
    bench, layers = world
    few = replace(bench, train=bench.train[:2])
    gains = energies_seen(few, layers, 0)
    exact = 0
    for name, gradient in dense(few, layers, range(1), 0).items():
        first = float(torch.linalg.svdvals(gradient)[0].square())
        # A direction found in a random sketch never carries more than the leading one does.
        assert 0.7 * first < gains[name][0] < (1 + 1e-4) * first
        if torch.linalg.matrix_rank(gradient, rtol=1e-4) <= 4:
            assert gains[name] == pytest.approx([first], rel=1e-3)
            exact += 1
    assert exact >= 2  # behind the last attention only the first token's gradient flows


def test_layers_rank_as_their_dense_gradients_do(world: World) -> None:
    """The batches of the two rating phases, whole: where most energy lies, most is found."""
    bench, layers = world
    gains = energies_seen(bench, layers, 3)
    gradients = dense(bench, layers, range(BATCHES, 3 * BATCHES), 3)
    energy = {name: float(torch.linalg.matrix_norm(g, 2).square()) for name, g in gradients.items()}
    order = sorted(energy, key=lambda name: -energy[name])
    assert max(gains, key=lambda name: gains[name][0]) in order[:2]
    upper, lower = order[:4], order[-4:]
    assert min(gains[name][0] for name in upper) > max(gains[name][0] for name in lower)


def test_every_layer_of_a_decoder_is_seen(decoder: World) -> None:
    bench, layers = decoder
    gains = probe_gains(bench, layers, seed=0)
    assert list(gains) == [layer.name for layer in layers]
    for known in gains.values():
        assert len(known) == 1 and known[0] > 0


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_every_layer_on_both_sides_of_an_encoder_decoder_is_seen(tmp_path: Path, kind: str) -> None:
    apart = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    model = save_seq2seq(tmp_path / kind, kind, **(apart if kind == "marian" else {}))
    bench, layers = make_world(model, write_reversals(tmp_path / "data"), tmp_path)
    gains = probe_gains(bench, layers, seed=0)
    assert gains.keys() == {layer.name for layer in layers} and all(gains.values())
    sides = {name for name, found in gains.items() if found[0] > 0}
    assert any("encoder" in name.split(".")[:2] for name in sides)
    assert any("decoder" in name.split(".")[:2] for name in sides)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_behind_the_patches_of_an_image_is_seen(tmp_path: Path, kind: str) -> None:
    bench, layers = make_world(save_vit(tmp_path / kind, kind), write_squares(tmp_path / "data"), tmp_path)
    gains = probe_gains(bench, layers, seed=0)
    assert all(gains[layer.name] for layer in layers)  # nothing where no gradient arrives
    assert is_clean(bench)


def test_gains_depend_on_the_seed_alone(world: World) -> None:
    bench, layers = replace(world[0], train=world[0].train[:8]), world[1]  # one batch: no noise
    with torch.random.fork_rng(devices=[]):
        first = probe_gains(bench, layers, seed=5)
        torch.manual_seed(99)
        state = torch.random.get_rng_state()
        assert probe_gains(bench, layers, seed=5) == first
        assert torch.equal(torch.random.get_rng_state(), state)
    assert probe_gains(bench, layers, seed=6) != first


def is_clean(bench: Bench) -> bool:
    model = bench.base.model
    hooks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    wants = any(p.requires_grad or p.grad is not None for p in model.parameters())
    return not hooks and not wants and not any(m.training for m in model.modules())


def test_the_base_is_left_as_it_was(world: World) -> None:
    bench, layers = world
    model = bench.base.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(vars(model))
    probe_gains(bench, layers, seed=0)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert is_clean(bench) and set(vars(model)) == attributes
    batch = bench.task.collate(bench.train[:2], bench.base.pad_token_id)
    assert not model(**batch.inputs).logits.requires_grad


def test_a_probe_that_breaks_off_leaves_no_hook(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, layers = world

    def full(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(type(bench.task), "loss", full)
    with pytest.raises(MemoryError):
        probe_gains(bench, layers, seed=0)
    assert is_clean(bench)


def test_a_layer_that_no_gradient_reaches_has_no_gain(world: World) -> None:
    """BERT's classifier reads the pooler; a layer beside the way to the loss sees nothing."""
    bench, layers = world
    bench = replace(bench, train=bench.train[:2])
    model = bench.base.model
    model.add_module("aside", torch.nn.Linear(4, 4).requires_grad_(False))
    try:
        gains = probe_gains(bench, (*layers[-1:], LayerSpec("aside", 4, 4)), seed=0)
    finally:
        del model.aside
    assert gains["aside"] == () and gains[layers[-1].name][0] > 0


# -- a start for a model of one's own ------------------------------------------------------------


def fresh(targets: Any = "all-linear", **settings: Any) -> nn.Module:
    """A tiny Llama with a fresh adapter of rank 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=1, lora_alpha=2, target_modules=targets, **settings)
        return peft.get_peft_model(base_llama(), config)


def losses(model: nn.Module, count: int = 3 * BATCHES) -> Iterator[Tensor]:
    return (model(input_ids=batch(step), labels=batch(step)).loss for step in range(count))


@pytest.mark.parametrize("budget", [24, 100, 560, 1200])
def test_a_start_fits_any_budget_and_changes_no_function(budget: int) -> None:
    model = fresh()
    rows = {name: factors(m, "default")[0].detach().clone() for name, m in lora_layers(model).items()}
    before = model(input_ids=batch(50)).logits
    plan = start_from_gradient(model, losses(model), budget=budget)
    live = lora_layers(model)
    assert {name: m.r["default"] for name, m in live.items()} == {n: r for n, r in plan.ranks.items() if r}
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert held == plan.parameters <= budget
    least = min(layer.cost for layer in plan.layers if plan.ranks[layer.name] < layer.full_rank)
    assert budget - plan.parameters < least
    assert torch.equal(model(input_ids=batch(50)).logits, before)
    for name, module in live.items():
        a, b = factors(module, "default")
        assert torch.equal(a[:1], rows[name]) and bool(a.any(1).all()) and not b.any()
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_one_component_starts_where_the_dense_gradient_is_largest_per_parameter() -> None:
    model = fresh()
    weights = {name: m.get_base_layer().weight.requires_grad_() for name, m in lora_layers(model).items()}
    (sum(losses(model)) / 12).backward()  # type: ignore[union-attr]
    worth = {}
    for name, weight in weights.items():
        worth[name] = float(torch.linalg.matrix_norm(weight.grad, 2) ** 2) / sum(weight.shape)
        weight.requires_grad_(False).grad = None
    model.zero_grad()
    plan = start_from_gradient(model, losses(model), budget=80)
    best = sorted(worth, key=lambda name: -worth[name])
    assert {layer.name for layer in plan.live} <= set(best[:3])


def test_ranks_move_on_from_a_start() -> None:
    model = fresh()
    start_from_gradient(model, losses(model), budget=120)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = make_schedule(40, share=0.5, warmup=0.3, until=0.8, moves=2)
    allocator = RankAllocator(model, optimizer, budget=400, total_steps=40, schedule=schedule)
    scores = train(model, optimizer, allocator, range(40))
    assert allocator.ledger and scores[-1] < scores[0]
    assert allocator.plan.parameters <= 400


def test_a_start_from_noise_is_even_from_the_last_layer_down_and_says_so() -> None:
    """The sign of each loss is drawn: no gradient stands out."""
    model = fresh()
    draw = torch.Generator().manual_seed(0)
    signs = torch.randperm(12, generator=draw).remainder(2).mul(2).sub(1).tolist()
    noise = (sign * model(input_ids=batch(0), labels=batch(0)).loss for sign in signs)
    with pytest.warns(RankAllocatorWarning, match="no layer's gradient stands out of the noise"):
        plan = start_from_gradient(model, noise, budget=200)
    free = 200
    for layer in reversed(plan.layers):
        assert plan.ranks[layer.name] == (layer.cost <= free)
        free -= layer.cost if layer.cost <= free else 0


def test_a_layer_that_no_loss_depends_on_gets_what_no_other_can() -> None:
    model = fresh(["q_proj", "v_proj"])
    aside = model.base_model.model.model.layers[1].self_attn.v_proj

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach()

    handle = aside.register_forward_hook(cut)
    try:
        plan = start_from_gradient(model, losses(model), budget=600)
    finally:
        handle.remove()
    ranks = plan.ranks
    assert ranks["model.layers.1.self_attn.v_proj"] == 0
    assert min(rank for name, rank in ranks.items() if "1.self_attn.v_proj" not in name) > 0


def test_a_start_depends_on_its_losses_and_its_seed_alone() -> None:
    found = []
    for seed in (4, 4, 5):
        torch.rand(7)
        model = fresh()
        start_from_gradient(model, losses(model), budget=1500, seed=seed)
        found.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
    first, same, other = found
    assert first.keys() == same.keys() and all(torch.equal(first[name], same[name]) for name in first)
    wide = [name for name in first.keys() & other.keys() if min(len(first[name]), len(other[name])) > 1]
    assert any(not torch.equal(first[name][1:2], other[name][1:2]) for name in wide if "lora_A" in name)
    rows = [a[1:2] for name, a in first.items() if "lora_A" in name and len(a) > 1 and a.shape[1] == 16]
    assert all(not torch.equal(one, two) for one, two in itertools.combinations(rows, 2)) and len(rows) > 1


def test_embeddings_start_too() -> None:
    model = fresh(["embed_tokens", "down_proj"])
    plan = start_from_gradient(model, losses(model), budget=10 * 56)
    assert plan.ranks["model.embed_tokens"] > 1
    _, b = factors(lora_layers(model)["model.embed_tokens"], "default")
    assert bool(b.any(dim=0).all()) and len(b.unique()) == b.numel()  # each component can learn, and its own
    assert torch.isfinite(model(input_ids=batch(1)).logits).all()


def test_what_cannot_start_is_refused_and_left_alone() -> None:
    model = fresh()
    for wrong, said in (
        (
            {"budget": 23},
            "a budget of 23 buys nothing here: one component of the cheapest layer, .*, costs 24",
        ),
        ({"budget": "x"}, "'x'"),
        ({"losses": losses(model, 5)}, "needs 12 losses, .* and there are 5"),
        ({"losses": list(losses(model))}, "and no layer saw a gradient"),
    ):
        given = {"losses": losses(model), "budget": 100, **wrong}
        with pytest.raises(CommandError, match=said):
            start_from_gradient(model, **given)  # type: ignore[arg-type]
        assert all(m.r["default"] == 1 for m in lora_layers(model).values())
        assert all(p.grad is None for p in model.parameters())
    with pytest.raises(CommandError, match=r"as by \(model\(\*\*batch\)\.loss for batch .* yields a dict"):
        start_from_gradient(model, [{"input_ids": 1}], budget=100)  # type: ignore[list-item]
    with pytest.raises(CommandError, match=r"a loss has no gradient: .*enable_input_require_grads"):
        start_from_gradient(model, (torch.zeros(()) for _ in range(12)), budget=100)
    once = fresh()
    start_from_gradient(once, losses(once), budget=100)
    with pytest.raises(CommandError, match=r"'default' has left \d+ layers already: a start is for"):
        start_from_gradient(once, losses(once), budget=100)
    model.add_adapter("other", peft.LoraConfig(r=1, target_modules="all-linear"))  # type: ignore[operator]
    with pytest.raises(CommandError, match="'other' is not active"):
        start_from_gradient(model, losses(model), budget=100, adapter_name="other")
    with pytest.raises(CommandError, match="14 layers have a DoRA magnitude or a bias"):
        start_from_gradient(fresh(use_dora=True), iter(()), budget=100)
    factors(next(iter(lora_layers(model).values())), "default")[1].data += 1
    with pytest.raises(CommandError, match=r"layers\.0\.self_attn\.q_proj is not fresh"):
        start_from_gradient(model, losses(model), budget=100)


def test_a_base_that_computes_twice_is_probed_so_with_the_same_gains(
    tiny_llama: Path, tiny_completions: Path, tmp_path: Path
) -> None:
    found, kept = [], []
    for twice in (False, True):
        bench, layers = make_world(tiny_llama, tiny_completions, tmp_path, gradient_checkpointing=twice)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(probe_gains(bench, layers, seed=3))
        kept.append(sum(sizes))
        assert not bench.base.model.training
    assert found[0] == found[1] and any(found[0].values())
    assert kept[1] < 0.5 * kept[0]
