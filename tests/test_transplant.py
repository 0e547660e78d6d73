"""A trial's adapter at a smaller budget: what goes, what it scores, and what training brings back."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import autorank.lane as lane_module
from autorank.adapter import factor_keys, lora_layers
from autorank.artifacts import read_json, write_json
from autorank.config import load_config
from autorank.errors import AutorankError, CommandError, StudyError
from autorank.export import export
from autorank.lane import Lane
from autorank.plan import LayerSpec, RankPlan
from autorank.search import search
from autorank.train import NotFinite
from autorank.transplant import truncate

# -- the arithmetic ------------------------------------------------------------------------------------


def random_adapter(shapes: list[tuple[int, int, int]], seed: int) -> tuple[RankPlan, dict[str, Tensor]]:
    """An adapter of layers (in, out, rank), each of another size, and a head."""
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(LayerSpec(f"l{i}", into, out) for i, (into, out, _) in enumerate(shapes))
    plan = RankPlan(layers, {f"l{i}": rank for i, (_, _, rank) in enumerate(shapes)}, 0.75)
    tensors = {"base_model.model.head.weight": torch.randn(3, 4, generator=generator)}
    for layer in plan.live:
        a, b = factor_keys(layer.name)
        tensors[a] = torch.randn(plan.ranks[layer.name], layer.in_features, generator=generator)
        tensors[b] = torch.randn(layer.out_features, plan.ranks[layer.name], generator=generator)
        tensors[b] *= float(torch.rand(1, generator=generator)) + 0.1
    return plan, tensors


def update(plan: RankPlan, tensors: dict[str, Tensor], layer: LayerSpec) -> Tensor:
    """ΔW of a layer in float64; zero where it has no adapter."""
    a, b = factor_keys(layer.name)
    if a not in tensors:
        return torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    return plan.scaling * tensors[b].double() @ tensors[a].double()


def best_ranks(plan: RankPlan, tensors: dict[str, Tensor], budget: int) -> dict[str, int]:
    """The rule word for word: the least energy per parameter goes first, then what fits comes back."""
    components = sorted(
        (float(sigma**2) / layer.cost, layer.name, layer.cost)
        for layer in plan.live
        for sigma in torch.linalg.svdvals(update(plan, tensors, layer))[: plan.ranks[layer.name]]
    )
    left, gone = list(components), []
    while sum(cost for _, _, cost in left) > budget:
        gone.append(left.pop(0))
    for component in reversed(gone):
        if sum(cost for _, _, cost in left) + component[2] <= budget:
            left.append(component)
    return {layer.name: sum(name == layer.name for _, name, _ in left) for layer in plan.layers}


SHAPES = st.lists(
    st.tuples(st.integers(4, 12), st.integers(4, 12), st.integers(0, 4)), min_size=1, max_size=5
).filter(lambda shapes: any(rank for *_, rank in shapes))


@given(SHAPES, st.integers(0, 99), st.floats(0, 1))
def test_the_least_per_parameter_goes_and_nothing_else_changes(
    shapes: list[tuple[int, int, int]], seed: int, share: float
) -> None:
    plan, tensors = random_adapter(shapes, seed)
    least = min(layer.cost for layer in plan.live)
    budget = least + round(share * (plan.parameters - least))
    smaller, left, kept = truncate(plan, tensors, budget)
    assert smaller.ranks == best_ranks(plan, tensors, budget) and smaller.scaling == plan.scaling
    assert smaller.parameters <= budget
    dropped = [layer.cost for layer in plan.layers if smaller.ranks[layer.name] < plan.ranks[layer.name]]
    assert not dropped or smaller.parameters > budget - min(dropped)
    assert set(left) == {"base_model.model.head.weight"} | {
        key for layer in smaller.live for key in factor_keys(layer.name)
    }
    assert left["base_model.model.head.weight"] is tensors["base_model.model.head.weight"]
    assert all(tensor.dtype == torch.float32 for tensor in left.values())
    whole = lost = 0.0
    for layer in plan.layers:
        before, rank = update(plan, tensors, layer), smaller.ranks[layer.name]
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        wanted = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(update(smaller, left, layer), wanted, atol=1e-5, rtol=1e-5)
        whole, lost = whole + float(s.square().sum()), lost + float(s[rank:].square().sum())
    assert kept == pytest.approx(1 - lost / whole, abs=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any), st.integers(0, 99), st.floats(0, 1))
def test_no_other_ranks_keep_more_where_costs_are_equal(ranks: list[int], seed: int, share: float) -> None:
    """Brute force over all plans that fit."""
    plan, tensors = random_adapter([(6, 5, rank) for rank in ranks], seed)
    budget = 11 + round(share * (plan.parameters - 11))
    _, _, kept = truncate(plan, tensors, budget)
    sigmas = {layer.name: torch.linalg.svdvals(update(plan, tensors, layer)) for layer in plan.layers}
    energies = [
        sum(float(sigmas[f"l{i}"][:rank].square().sum()) for i, rank in enumerate(chosen))
        for chosen in itertools.product(*(range(rank + 1) for rank in ranks))
        if 11 * sum(chosen) <= budget
    ]
    whole = sum(float(s.square().sum()) for s in sigmas.values())
    assert kept == pytest.approx(max(energies) / whole, abs=1e-6)


@pytest.mark.parametrize("copied", [0, None])
def test_dependent_components_are_cut_as_well_as_any(copied: int | None) -> None:
    """Two equal rows of A, or one of zeros: the update has rank 2, and the best of rank 1 is found."""
    plan, tensors = random_adapter([(8, 6, 3)], 0)
    a, _ = factor_keys("l0")
    tensors[a][2] = 0.0 if copied is None else tensors[a][copied]
    u, s, vh = torch.linalg.svd(update(plan, tensors, plan.layers[0]), full_matrices=False)
    for budget, rank in ((14, 1), (28, 2), (41, 2)):
        smaller, left, kept = truncate(plan, tensors, budget)
        assert smaller.ranks == {"l0": rank}
        wanted = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(update(smaller, left, plan.layers[0]), wanted, atol=1e-5, rtol=1e-5)
        assert kept == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-6)


def test_a_budget_below_every_component_names_the_cheapest_that_holds_something() -> None:
    plan, tensors = random_adapter([(4, 4, 2), (4, 6, 2), (9, 9, 2)], 1)
    tensors[factor_keys("l0")[1]].zero_()
    with pytest.raises(CommandError, match=r"--budget 9 leaves nothing .* costs 10"):
        truncate(plan, tensors, 9)
    assert truncate(plan, tensors, 10)[0].ranks == {"l0": 0, "l1": 1, "l2": 0}


def test_an_adapter_that_has_learnt_nothing_is_not_cut() -> None:
    plan, tensors = random_adapter([(4, 4, 2), (4, 6, 2)], 1)
    for layer in ("l0", "l1"):
        tensors[factor_keys(layer)[1]].zero_()
    with pytest.raises(CommandError, match="has learnt nothing, all its components are 0"):
        truncate(plan, tensors, 30)


# -- a study, exported at smaller budgets --------------------------------------------------------------

TEXTS = ["we saw a cat today", "red of it again the green bear", "bread"]
BUDGET = 700
CHEAPEST = 64
"""A rank at a 32-32 layer of the tiny BERT; one at an MLP layer costs 96."""


@dataclass(frozen=True)
class World:
    """One trial whose head is half trained, so that more training always helps; lower is better."""

    studies: Path
    base: Path

    @property
    def artifact(self) -> Path:
        return self.studies / "tiny" / "artifacts" / "trial-0"

    def export(self, out: Path, **more: Any) -> dict[str, Any]:
        """Export and read what `autorank_export.json` tells."""
        facts: dict[str, Any] = read_json(
            export("tiny", out, studies_dir=self.studies, **more) / "autorank_export.json"
        )
        return facts


@pytest.fixture(scope="module")
def world(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    studies = tmp_path_factory.mktemp("studies")
    settings = {
        "model": str(tiny_bert),
        "data": str(tiny_data),
        "budget": "3k",
        "trials": 1,
        "steps": 20,
        "batch_size": 8,
        "max_length": 16,
        "metric": "loss",
        "name": "tiny",
        "studies_dir": str(studies),
        "space": {
            "rank": 3,
            "learning_rate": 1e-3,
            "head_learning_rate": 2e-3,
            "head_scale": 0.02,
            "scaling": 0.25,
        },
    }
    search(load_config(None, settings))
    return World(studies, tiny_bert)


def plain_model(world: World) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(world.base, num_labels=3).eval()


def logits_of(model: Any, folder: Path) -> Tensor:
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits: Tensor = model(**batch).logits
    return logits.clone()


def test_plain_peft_reads_the_truncated_update_and_nothing_else(world: World, tmp_path: Path) -> None:
    facts = world.export(tmp_path / "out", budget=BUDGET)
    tensors = load_file(str(world.artifact / "adapter_model.safetensors"))
    plan = RankPlan(
        tuple(
            LayerSpec(name, tensors[factor_keys(name)[0]].shape[1], tensors[factor_keys(name)[1]].shape[0])
            for name in facts["ranks"]
        ),
        dict.fromkeys(facts["ranks"], 3),
        0.25,
    )
    ranks = best_ranks(plan, tensors, BUDGET)
    assert len(set(ranks.values())) > 2 and 0 in ranks.values()
    model = peft.PeftModel.from_pretrained(plain_model(world), str(tmp_path / "out")).eval()
    found = {
        n: (m.r["default"], m.scaling["default"]) for n, m in lora_layers(model.base_model.model).items()
    }
    assert found == {name: (rank, 0.25) for name, rank in ranks.items() if rank}
    assert facts["ranks"] == ranks

    dense = plain_model(world)
    for layer in plan.layers:
        u, s, vh = torch.linalg.svd(update(plan, tensors, layer), full_matrices=False)
        kept = ranks[layer.name]
        with torch.no_grad():
            dense.get_submodule(layer.name).weight += ((u[:, :kept] * s[:kept]) @ vh[:kept]).float()
    dense.classifier.load_state_dict(
        {key: tensors[f"base_model.model.classifier.{key}"] for key in ("weight", "bias")}
    )
    wanted = logits_of(dense, tmp_path / "out")
    torch.testing.assert_close(logits_of(model, tmp_path / "out"), wanted, atol=1e-5, rtol=0)


def test_the_folder_tells_what_was_cut_and_what_it_cost(world: World, tmp_path: Path) -> None:
    facts = world.export(tmp_path / "out", budget="0.7k")
    told = facts["transplant"]
    assert BUDGET - CHEAPEST < facts["trainable_parameters"] == told["parameters"] <= told["budget"] == BUDGET
    stored = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    lora = [tensor.numel() for key, tensor in stored.items() if ".lora_" in key]
    assert sum(lora) == facts["trainable_parameters"]
    assert told["parameters_before"] == 2688 and 0 < told["energy_kept"] < 1
    before, after = told["validation"]["before"], told["validation"]["truncated"]
    with_all = world.export(tmp_path / "all")
    assert with_all["verdict"] is not None and facts["verdict"] is None
    assert before["loss"] == pytest.approx(with_all["value"], abs=1e-6)
    assert facts["validation"] == after != before and facts["value"] == after["loss"]
    assert (told["recover_steps"], told["best_step"], told["validation"]["recovered"]) == (0, 0, None)
    # The test rows were read for the whole adapter.
    assert with_all["test"] is not None and facts["test"] is None and with_all["transplant"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| truncated | from 2,688 parameters for a budget of 700, {told['energy_kept']:.1%}" in card
    assert f"{before['loss']:.4f} before, {after['loss']:.4f} truncated |" in card
    assert "| truncated |" not in (tmp_path / "all" / "README.md").read_text()


def test_more_budget_keeps_more_energy_and_a_score_nearer_to_the_whole(world: World, tmp_path: Path) -> None:
    sizes = (64, 700, 2600)
    told = [world.export(tmp_path / str(size), budget=size)["transplant"] for size in sizes]
    energies = [each["energy_kept"] for each in told]
    assert energies == sorted(energies) and 0 < energies[0] < energies[-1] < 1
    gaps = [abs(t["validation"]["truncated"]["loss"] - t["validation"]["before"]["loss"]) for t in told]
    assert gaps[-1] < gaps[0]


def test_recovery_trains_at_the_ranks_that_are_left(world: World, tmp_path: Path) -> None:
    cut = world.export(tmp_path / "cut", budget=BUDGET)
    facts = world.export(tmp_path / "recovered", budget=BUDGET, recover=12)
    told = facts["transplant"]
    assert facts["ranks"] == cut["ranks"] and told["validation"]["truncated"] == cut["validation"]
    assert facts["value"] == told["validation"]["recovered"]["loss"] < cut["value"]
    assert told["recover_steps"] == told["best_step"] == 12
    one, two = (
        load_file(str(tmp_path / name / "adapter_model.safetensors")) for name in ("cut", "recovered")
    )
    assert one.keys() == two.keys()
    assert not any(torch.equal(one[key], two[key]) for key in one)
    assert "then trained for 12 of 12 steps" in (tmp_path / "recovered" / "README.md").read_text()


def test_recovery_trains_as_the_trial_did(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    step_ = lane_module.train_step

    def spy(model: Any, task: Any, batch: Any, learners: Any, **settings: Any) -> Any:
        (one,) = learners
        rates = [group["initial_lr"] for group in one.optimizer.param_groups]
        seen.append((rates, one.allocator, one.step, settings["total_steps"], one.seed))
        return step_(model, task, batch, learners, **settings)

    monkeypatch.setattr(lane_module, "train_step", spy)
    seed = world.export(tmp_path / "out", budget=BUDGET, recover=3)["seed"]
    assert seen == [([1e-3, 2e-3], None, step, 3, seed) for step in range(3)]


def spoil(lane: Lane) -> float:
    lane.step += 1
    with torch.no_grad():
        for parameter in (lane.adapter.parameters() | lane.adapter.head_parameters()).values():
            parameter.neg_()
    return 0.0


def diverge(lane: Lane) -> float:
    raise NotFinite("the loss is nan at step 1")


@pytest.mark.parametrize("train", [spoil, diverge])
def test_where_training_helps_nothing_the_truncated_adapter_stays(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Callable[[Lane], float]
) -> None:
    cut = world.export(tmp_path / "cut", budget=BUDGET)
    monkeypatch.setattr(Lane, "train", train)
    facts = world.export(tmp_path / "kept", budget=BUDGET, recover=3)
    assert facts["transplant"]["best_step"] == 0 and facts["value"] == cut["value"]
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "3 steps of training afterwards made it no better" in card and "then trained" not in card
    one, two = (load_file(str(tmp_path / name / "adapter_model.safetensors")) for name in ("cut", "kept"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_only_validation_is_scored(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Any] = []
    evaluate = lane_module.evaluate

    def spy(model: Any, task: Any, examples: Any, **settings: Any) -> Any:
        scored.append(examples)
        return evaluate(model, task, examples, **settings)

    benches: list[Any] = []
    make_ready = Lane._make_ready

    def ready(lane: Lane, state: Any) -> None:
        benches.append(lane._bench)
        make_ready(lane, state)

    for module in ("lane", "preflight"):
        monkeypatch.setattr(f"autorank.{module}.evaluate", spy)
    monkeypatch.setattr(Lane, "_make_ready", ready)
    world.export(tmp_path / "out", budget=BUDGET, recover=7)
    assert len(benches) == 2 and all(examples is benches[0].validation for examples in scored)
    # The whole adapter, the truncated one, and five times on the way.
    assert len(scored) == 7


def test_the_configuration_alone_needs_neither_model_nor_data(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = world.export(tmp_path / "out", budget=BUDGET)["ranks"]
    monkeypatch.setattr("autorank.transplant.prepare", lambda *_: pytest.fail("the data were loaded"))
    out = export("tiny", tmp_path / "c", studies_dir=world.studies, budget=BUDGET, config_only=True)
    assert [path.name for path in out.iterdir()] == ["adapter_config.json"]
    config = peft.LoraConfig.from_pretrained(str(out))
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in trained(world, config)}
    assert found == {name: (rank, 0.25) for name, rank in ranks.items() if rank}
    assert not config.inference_mode
    world.export(tmp_path / "whole")


def trained(world: World, config: peft.LoraConfig) -> Any:
    return lora_layers(peft.get_peft_model(plain_model(world), config).base_model.model).items()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 2688}, "nothing to shrink: trial 0 has 2,688 parameters, which --budget 2,688 allows"),
        ({"budget": "1M"}, "nothing to shrink"),
        ({"budget": 63}, "--budget 63 leaves nothing .* costs 64"),
        ({"budget": "2X"}, "budget '2X' is not understood"),
        ({"recover": 5}, "--recover trains what --budget has cut"),
        ({"budget": 700, "recover": -1}, "recover is -1"),
        ({"budget": 700, "recover": 5, "config_only": True}, "--config-only writes no weights"),
    ],
)
def test_what_cannot_be_shrunk_is_refused_before_anything_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], match: str
) -> None:
    monkeypatch.setattr("autorank.transplant.prepare", lambda *_: pytest.fail("the data were loaded"))
    with pytest.raises(CommandError, match=match):
        export("tiny", tmp_path / "out", studies_dir=world.studies, **settings)
    assert list(tmp_path.iterdir()) == []


def test_one_parameter_less_than_the_trial_has_is_enough(world: World, tmp_path: Path) -> None:
    facts = world.export(tmp_path / "out", budget=2687)
    assert sum(facts["ranks"].values()) == 12 * 3 - 1


def test_data_that_are_not_those_of_the_study(world: World, tmp_path: Path) -> None:
    studies, rows = tmp_path / "studies", tmp_path / "rows"
    shutil.copytree(world.studies, studies)
    settings = read_json(studies / "tiny" / "config.json")
    shutil.copytree(settings["data"], rows)
    with (rows / "train.jsonl").open("a") as file:
        file.write('{"text": "one more", "label": "food"}\n')
    write_json(studies / "tiny" / "config.json", {**settings, "data": str(rows)})
    with pytest.raises(StudyError, match=r"data \(stored .* given"):
        export("tiny", tmp_path / "out", studies_dir=studies, budget=BUDGET)
    shutil.rmtree(rows)
    with pytest.raises(AutorankError, match="rows"):
        export("tiny", tmp_path / "out", studies_dir=studies, budget=BUDGET)
    assert not (tmp_path / "out").exists()
    assert export("tiny", tmp_path / "out", studies_dir=studies)


def test_the_study_is_only_read(world: World, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in world.studies.rglob("*") if path.is_file()}
    world.export(tmp_path / "out", budget=BUDGET, recover=1)
    assert {path: path.read_bytes() for path in world.studies.rglob("*") if path.is_file()} == before
