"""The gradient probe on tiny models, against dense gradients by autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autorank.config import load_config
from autorank.display import Display
from autorank.gradient import BATCHES, probe_gains
from autorank.lane import Bench
from autorank.plan import LayerSpec
from autorank.preflight import prepare
from autorank.references import score_frozen_base
from autorank.train import BatchOrder

World = tuple[Bench, tuple[LayerSpec, ...]]


def make_world(model: Path, data: Path, studies: Path) -> World:
    """A bench with its head solved, and all its layers."""
    settings: dict[str, Any] = {"model": str(model), "data": str(data), "studies_dir": str(studies)}
    settings |= {"budget": "3k", "steps": 24, "batch_size": 8, "max_length": 16}
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


def test_without_noise_gains_are_energies_of_the_dense_gradient(world: World) -> None:
    """Two rows make every batch the same, and gradients that a sketch of four directions can hold."""
    bench, layers = world
    few = replace(bench, train=bench.train[:2])
    gains = probe_gains(few, layers, seed=0)
    exact = 0
    for name, gradient in dense(few, layers, range(1), 0).items():
        energies = torch.linalg.svdvals(gradient).square()
        found = torch.tensor(gains[name], dtype=torch.float64)
        assert len(found) == 4
        # Directions found in a random sketch never carry more than the leading ones do.
        assert found.sum() <= energies[:4].sum() * (1 + 1e-4)
        assert found[0] > 0.7 * energies[0]
        if energies[4:].sum() < 1e-8 * energies.sum():
            assert found.tolist() == pytest.approx(
                energies[:4].tolist(), rel=1e-3, abs=1e-6 * float(energies[0])
            )
            exact += 1
    assert exact >= 2  # behind the last attention only the first token's gradient flows


def test_layers_rank_as_their_dense_gradients_do(world: World) -> None:
    """The batches of the two rating phases, whole: where most energy lies, most is found."""
    bench, layers = world
    gains = probe_gains(bench, layers, seed=3)
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
        assert known[0] > 0 and list(known) == sorted(known, reverse=True) and known[-1] >= 0


def test_gains_depend_on_the_seed_alone(world: World) -> None:
    bench, layers = world
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
    model = bench.base.model
    model.add_module("aside", torch.nn.Linear(4, 4).requires_grad_(False))
    try:
        gains = probe_gains(bench, (*layers[-1:], LayerSpec("aside", 4, 4)), seed=0)
    finally:
        del model.aside
    assert gains["aside"] == () and gains[layers[-1].name][0] > 0
