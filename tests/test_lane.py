"""Lanes on a tiny BERT: a lane is a function of its spec, and goes on exactly from its state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from autorank.adapter import lora_layers
from autorank.config import load_config
from autorank.display import Display
from autorank.dropout import AdapterDropout
from autorank.errors import StudyError
from autorank.evaluate import evaluate
from autorank.lane import Bench, Checkpoint, Lane, LaneState, TrialSpec
from autorank.plan import RankPlan, uniform_plan
from autorank.preflight import Setup, prepare
from autorank.train import NotFinite


@pytest.fixture(scope="module")
def setup(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    config = load_config(
        None,
        {
            "model": str(tiny_bert),
            "data": str(tiny_data),
            "budget": "3k",
            "steps": 24,
            "batch_size": 8,
            "max_length": 16,
            "studies_dir": str(tmp_path_factory.mktemp("studies")),
        },
    )
    return prepare(config, Display.silent())


@pytest.fixture
def bench(setup: Setup) -> Bench:
    return setup.bench


def spec(setup: Setup, *, adaptive: bool = True, rate: float = 3e-2, seed: int = 5) -> TrialSpec:
    layers = setup.space.groups["all-linear"]
    return TrialSpec(0, seed, uniform_plan(layers, 2, 2.0, setup.space.budget), adaptive, rate, 3e-2, 1.0)


def run(lane: Lane, until: int | None = None) -> list[float]:
    losses = []
    while not lane.finished and lane.step != until:
        losses.append(lane.train())
        if lane.step in lane._bench.recipe.evaluate_at:
            lane.evaluate()
    return losses


def best(lane: Lane) -> Checkpoint:
    assert lane.best is not None
    return lane.best


def same(first: Checkpoint, second: Checkpoint) -> None:
    assert (first.step, first.value, first.plan) == (second.step, second.value, second.plan)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def test_a_lane_trains_and_leaves_the_base_clean(setup: Setup, bench: Bench) -> None:
    before = {key: value.clone() for key, value in bench.base.model.state_dict().items()}
    lane = Lane(spec(setup, adaptive=False), bench)
    start = lane.adapter.tensors()
    run(lane)
    end = lane.adapter.tensors()
    lane.close()
    assert all(not torch.equal(start[key], end[key]) for key in start)
    after = bench.base.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_adaptive_ranks_differ_and_fit_their_trial_budget(setup: Setup, bench: Bench) -> None:
    lane = Lane(spec(setup), bench)
    run(lane)
    plan = best(lane).plan
    assert len(set(plan.ranks.values())) > 1
    assert plan.parameters <= spec(setup).plan.parameters
    assert best(lane).step in bench.recipe.evaluate_at
    assert bench.recipe.evaluate_at[0] > bench.recipe.schedule.moves[0]
    assert lane.ledger()
    sizes = sum(v.numel() for k, v in best(lane).tensors.items() if "lora_" in k)
    assert sizes == plan.parameters
    lane.close()


def test_the_same_spec_gives_the_same_tensors(setup: Setup, bench: Bench) -> None:
    results = []
    for seed in (5, 5, 6):
        lane = Lane(spec(setup, seed=seed), bench)
        run(lane)
        results.append(best(lane))
        lane.close()
    same(results[0], results[1])
    one, other = results[0].tensors, results[2].tensors
    assert one.keys() != other.keys() or any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("pause", [1, 7, 15, 20])
def test_a_paused_lane_goes_on_exactly(
    setup: Setup, bench: Bench, tmp_path: Path, adaptive: bool, pause: int
) -> None:
    one = replace(spec(setup, adaptive=adaptive), dropout=0.2, weight_decay=0.5, label_smoothing=0.1)
    whole = Lane(one, bench)
    run(whole)
    expected = best(whole)
    whole.close()
    first = Lane(one, bench)
    run(first, until=pause)
    first.state().save(tmp_path)
    first.close()
    second = Lane(one, bench, LaneState.load(tmp_path))
    run(second)
    same(best(second), expected)
    layers = lora_layers(bench.base.model, second.adapter.name).values()
    assert len({id(layer.lora_dropout[second.adapter.name]) for layer in layers}) == 1  # type: ignore[attr-defined]
    second.close()


def test_layers_that_come_back_drop_as_all_others(setup: Setup, bench: Bench) -> None:
    bench = replace(bench, recipe=replace(bench.recipe, importance="random"))
    layers = setup.space.groups["all-linear"]
    ranks = {layer.name: 2 * int("attention" in layer.name) for layer in layers}
    one = replace(spec(setup), plan=RankPlan(layers, ranks, 2.0), dropout=0.2, weight_decay=0.5)
    lane = Lane(one, bench)
    while not lane.finished:
        lane.train()
    live = lora_layers(bench.base.model)
    assert live.keys() - {name for name, rank in ranks.items() if rank}
    assert all(isinstance(layer.lora_dropout["default"], AdapterDropout) for layer in live.values())  # type: ignore[attr-defined]
    decayed, head = lane._optimizer.param_groups
    assert {id(p) for p in decayed["params"]} == {id(p) for p in lane.adapter.parameters().values()}
    assert (decayed["weight_decay"], head["weight_decay"]) == (0.5, 0.0)
    lane.close()


def test_weights_decay_by_adamws_formula_on_a_and_b_alone(setup: Setup, bench: Bench) -> None:
    plain = spec(setup)  # ranks have moved by then
    lane = Lane(plain, bench)
    run(lane, until=20)
    state = lane.state()
    lane.close()
    found = []
    for decay in (0.0, 0.5):
        lane = Lane(replace(plain, weight_decay=decay), bench, state)
        assert lane.step == 20
        before = {name: p.detach().clone() for name, p in lane._named().items()}
        lane.train()
        found.append({name: p.detach().clone() for name, p in lane._named().items()})
        rate = lane._optimizer.param_groups[0]["lr"]
        heads = lane.adapter.head_parameters().keys()
        lane.close()
    assert before.keys() == found[0].keys() and heads and rate > 1e-4
    for name, start in before.items():
        share = 0.0 if name in heads else rate * 0.5
        expected = found[0][name] - share * start
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=1e-7, msg=name)
        assert torch.equal(found[0][name], found[1][name]) == (name in heads)


def test_smoothing_is_of_the_training_loss_alone(
    setup: Setup, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in bench.base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)
    plain = Lane(spec(setup), bench)
    plain.evaluate()
    plain.close()
    smooth = Lane(replace(spec(setup), label_smoothing=0.3), bench)
    smooth.evaluate()
    assert best(smooth).scores == best(plain).scores
    batch = bench.task.collate(smooth.examples(), bench.base.pad_token_id)
    with torch.no_grad():
        logits = bench.base.model(**batch.inputs).logits
    expected = functional.cross_entropy(logits, batch.labels, label_smoothing=0.3).item()
    assert expected != pytest.approx(functional.cross_entropy(logits, batch.labels).item())
    assert smooth.train() == pytest.approx(expected, rel=1e-5)
    smooth.close()


def test_the_checkpoint_is_what_was_scored(setup: Setup, bench: Bench, tmp_path: Path) -> None:
    lane = Lane(spec(setup), bench)
    run(lane)
    checkpoint = best(lane)
    bench.save(tmp_path, checkpoint, dropout=0.25)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    lane.close()
    adapter = bench.put_back(tmp_path, checkpoint.plan)
    again = evaluate(
        bench.base.model, bench.task, bench.validation, batch_size=8, pad_token_id=bench.base.pad_token_id
    )
    adapter.remove()
    assert again.scores == checkpoint.scores


def test_a_diverging_trial_is_not_finite(setup: Setup, bench: Bench) -> None:
    lane = Lane(spec(setup, adaptive=False), bench)
    lane.train()
    with torch.no_grad():
        next(iter(lane.adapter.parameters().values())).fill_(float("nan"))
    with pytest.raises(NotFinite, match="step 2"):
        lane.train()
    lane.close()


def test_weights_that_are_not_finite_are_never_kept(setup: Setup, bench: Bench) -> None:
    lane = Lane(spec(setup, adaptive=False), bench)
    with torch.no_grad():
        name, parameter = next(iter(lane.adapter.head_parameters().items()))
        parameter[..., 0] = float("inf")
    with pytest.raises(NotFinite):
        lane.evaluate()
    assert lane.best is None, name
    lane.close()


def test_layers_below_the_lowest_adapted_one_cost_no_backward_pass(setup: Setup, bench: Bench) -> None:
    layers = setup.space.groups["all-linear"]
    plan = RankPlan(layers, {layer.name: int(layer.name.endswith("1.output.dense")) for layer in layers}, 2.0)
    lane = Lane(replace(spec(setup, adaptive=False), plan=plan), bench)
    wanting: dict[str, bool] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: wanting.update({name: output.requires_grad})
        )
        for name, module in bench.base.model.named_modules()
        if isinstance(module, (torch.nn.Embedding, torch.nn.Linear)) and "lora" not in name
    ]
    lane.train()
    for hook in hooks:
        hook.remove()
    lane.close()
    lowest = next(layer.name for layer in plan.live)
    assert any(name.startswith(lowest) or "classifier" in name for name in wanting)
    for name, wants in wanting.items():
        above = name.startswith(lowest) or "pooler" in name or "classifier" in name
        assert above or not wants, name


def test_damaged_state_is_one_error(setup: Setup, bench: Bench, tmp_path: Path) -> None:
    lane = Lane(spec(setup), bench)
    lane.train()
    lane.state().save(tmp_path)
    lane.close()
    facts = json.loads((tmp_path / "lane.json").read_text())
    (tmp_path / "lane.json").write_text(json.dumps({**facts, "version": 99}))
    with pytest.raises(StudyError, match="version"):
        LaneState.load(tmp_path)
    (tmp_path / "lane.json").write_text("{")
    with pytest.raises(StudyError, match="cannot be read"):
        LaneState.load(tmp_path)


def test_the_head_learns_at_its_own_rate(setup: Setup, bench: Bench) -> None:
    lane = Lane(replace(spec(setup, adaptive=False), head_learning_rate=1e-12), bench)
    before = {n: p.detach().clone() for n, p in lane.adapter.head_parameters().items()}
    lane.train()
    assert all(torch.allclose(before[n], p, atol=1e-9) for n, p in lane.adapter.head_parameters().items())
    assert any(p.abs().max() > 1e-6 for n, p in lane.adapter.parameters().items() if "lora_B" in n)
    lane.close()


def test_a_head_that_was_loaded_is_trained_and_saved_too(bench: Bench) -> None:
    assert bench.modules_to_save == ("classifier",)
    loaded = replace(bench, base=replace(bench.base, fresh=()))
    assert loaded.modules_to_save == ("classifier",)
    assert replace(loaded, head=None).modules_to_save == ()
    nested = replace(loaded, head="classifier.out_proj")
    assert nested.modules_to_save == ("classifier",)
    pooled = replace(bench, base=replace(bench.base, fresh=("bert.pooler", "classifier")))
    assert pooled.modules_to_save == ("bert.pooler", "classifier")


def test_a_lane_that_cannot_be_made_leaves_no_adapter(
    setup: Setup, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(lane: Lane) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Lane, "_make_allocator", full)
    with pytest.raises(MemoryError):
        Lane(spec(setup), bench)
    assert not lora_layers(bench.base.model) and not hasattr(bench.base.model, "peft_config")
    assert not any(p.requires_grad for p in bench.base.model.parameters())


def test_a_trial_starts_from_its_share_of_the_probe_and_goes_on_from_where_it_was(
    setup: Setup, bench: Bench
) -> None:
    assert bench.head == "classifier"
    weight = bench.base.model.get_submodule("classifier").weight.clone()
    lane = Lane(replace(spec(setup), head_scale=0.25), bench)
    copied = lane.adapter.head_parameters()
    assert [tuple(p.shape) for p in copied.values()] == [tuple(weight.shape), (len(weight),)]
    assert torch.equal(next(iter(copied.values())), 0.25 * weight)
    state = lane.state()
    lane.close()
    assert torch.equal(bench.base.model.get_submodule("classifier").weight, weight)
    again = Lane(replace(spec(setup), head_scale=0.25), bench, state)
    assert torch.equal(next(iter(again.adapter.head_parameters().values())), 0.25 * weight)
    again.close()


@pytest.mark.parametrize("world", [("tiny_bert", "tiny_data"), ("tiny_llama", "tiny_completions")])
def test_activations_computed_twice_change_nothing_else(
    world: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """BERT drops something in training, Llama does not."""
    model, data = (str(request.getfixturevalue(name)) for name in world)
    found = []
    for checkpointing in (False, True):
        settings = {"model": model, "data": data, "budget": "6k", "steps": 24, "batch_size": 8}
        settings |= {"gradient_checkpointing": checkpointing, "studies_dir": str(tmp_path)}
        setup = prepare(load_config(None, settings), Display.silent())
        lane, calls = Lane(spec(setup, rate=1e-2), setup.bench), list[bool]()
        inner = next(m for name, m in setup.base.model.named_modules() if name.endswith(("query", "q_proj")))
        inner.register_forward_pre_hook(lambda *_, seen=calls: seen.append(torch.is_grad_enabled()))
        losses = run(lane)
        found.append((losses, best(lane).plan, sum(calls) / lane.step))
        assert not any(module.training for module in setup.base.model.modules())
        lane.close()
    (once, plan, one), (twice, again, two) = found
    assert (one, two) == (1, 2) and plan == again and len(set(plan.ranks.values())) > 1
    assert twice == pytest.approx(once, abs=1e-5)
