"""A model whose layers are spread trains, writes and exports as it does in one place.

Two devices are the CPU twice, which shows that what moves tensors about changes nothing, and the CPU
and a GPU where there is one, which shows that no tensor is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import infer_auto_device_map, modeling
from conftest import write_jsonl
from seq2seq_world import LETTERS, save_seq2seq
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, LlamaForCausalLM

from autorank import model as model_module
from autorank import placement
from autorank.config import load_config
from autorank.display import Display
from autorank.errors import CommandError, ModelError
from autorank.export import export
from autorank.lane import Bench, Lane, TrialSpec
from autorank.model import load_base
from autorank.plan import RankPlan
from autorank.predictor import evaluate_export
from autorank.preflight import prepare
from autorank.search import search

Devices = tuple[torch.device, torch.device]

CPU = torch.device("cpu")


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda:0",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ),
    ]
)
def devices(request: pytest.FixtureRequest) -> Iterator[Devices]:
    """The CPU, and where the second half of a model lies."""
    with sdpa_kernel(SDPBackend.MATH):
        yield CPU, torch.device(request.param)


def halves(model: Any, devices: Devices) -> dict[str, torch.device]:
    """The first half of a model on the first device, the others on the second."""
    size = sum(tensor.nbytes for tensor in model.parameters())
    found = infer_auto_device_map(
        model,
        max_memory={0: int(0.7 * size), "cpu": 2 * size},
        no_split_module_classes=model._no_split_modules,
    )
    assert set(found.values()) == {0, "cpu"}
    return {name: devices[0 if where == 0 else 1] for name, where in found.items()}


@pytest.fixture
def spreading(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is loaded in halves."""
    monkeypatch.setattr(
        model_module, "place", lambda model, *_: placement.spread(model, halves(model, devices))
    )


def make(model: Path, data: Path, studies: Path, **changes: Any) -> dict[str, Any]:
    given = {"model": str(model), "data": str(data), "budget": "3k", "steps": 24, "batch_size": 8}
    return {**given, "max_length": 32, "device": "cpu", "studies_dir": str(studies), **changes}


def train(
    bench: Bench, layers: Any, dropout: float = 0.0
) -> tuple[list[float], dict[str, int], dict[str, Any]]:
    """Losses, ranks and score of a trial whose layers come back from rank 0."""
    ranks = {layer.name: 3 * (number % 2) for number, layer in enumerate(layers)}
    plan = RankPlan(layers, ranks, 2.0)
    bench = replace(bench, recipe=replace(bench.recipe, importance="random"))
    lane, losses = Lane(TrialSpec(0, 5, plan, True, 1e-2, 1e-2, 1.0, dropout=dropout), bench), []
    while not lane.finished:
        losses.append(lane.train())
        if lane.step in bench.recipe.evaluate_at:
            lane.evaluate()
    best = lane.best
    lane.close()
    assert best is not None and any(ranks[name] == 0 and rank for name, rank in best.plan.ranks.items())
    return losses, dict(best.plan.ranks), {"value": best.value}


# The first pass of a process that begins on the CPU.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context")
@pytest.mark.parametrize("world", ["text", "classes", "sequences", "recomputing"])
def test_a_spread_model_trains_as_in_one_place(
    world: str, request: pytest.FixtureRequest, devices: Devices, tmp_path: Path
) -> None:
    more: dict[str, Any] = {}
    if world == "sequences":
        model = save_seq2seq(tmp_path / "t5", dropout_rate=0.0)
        rows = [{"source": f"{one} {two}", "target": f"{two} {one}"} for one in LETTERS for two in LETTERS]
        data, more = write_jsonl(tmp_path / "rows.jsonl", rows), {"task": "seq2seq", "metric": "exact_match"}
        more["eval_fraction"] = 0.2
    else:
        names = ("tiny_bert", "tiny_data") if world == "classes" else ("tiny_llama", "tiny_completions")
        model, data = map(request.getfixturevalue, names)
        more = {"gradient_checkpointing": world == "recomputing"}
    setup = prepare(load_config(None, make(model, data, tmp_path, **more)), Display.silent())
    layers = setup.space.groups["all-linear"]
    for module in setup.base.model.modules():  # each device draws its own
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    whole = train(setup.bench, layers)
    placement.spread(setup.base.model, halves(setup.base.model, devices))
    assert len({p.device for p in setup.base.model.parameters()}) == len(set(devices))
    found = train(setup.bench, layers)
    exact = devices[1] == CPU
    assert found[0] == (whole[0] if exact else pytest.approx(whole[0], abs=1e-4))
    assert found[1] == whole[1]
    assert found[2] == (whole[2] if exact else pytest.approx(whole[2], abs=0.05))


def test_a_spread_model_drops_by_a_trials_seed(
    tiny_bert: Path, tiny_data: Path, devices: Devices, spreading: None, tmp_path: Path
) -> None:
    setup = prepare(load_config(None, make(tiny_bert, tiny_data, tmp_path)), Display.silent())
    assert setup.base.devices == tuple(dict.fromkeys(devices)) and setup.base.device == CPU
    layers = setup.space.groups["all-linear"]
    state = torch.cuda.get_rng_state(devices[1]) if devices[1] != CPU else torch.get_rng_state()
    first, again = (train(setup.bench, layers, dropout=0.3) for _ in range(2))
    assert first == again
    after = torch.cuda.get_rng_state(devices[1]) if devices[1] != CPU else torch.get_rng_state()
    assert torch.equal(state, after)
    assert first[0] != train(setup.bench, layers)[0]


def test_a_search_with_a_spread_model_exports_what_it_scored(
    tiny_bert: Path, tiny_data: Path, spreading: None, tmp_path: Path
) -> None:
    config = load_config(None, make(tiny_bert, tiny_data, tmp_path, trials=2, name="spread"))
    result = search(config)
    best = result.best
    export("spread", tmp_path / "adapter", studies_dir=tmp_path)
    found = evaluate_export(tmp_path / "adapter", str(tiny_data), split="validation", device="cpu")
    assert found["scores"]["accuracy"] == pytest.approx(best["value"], abs=1e-4)


def test_layers_are_spread_over_gpus_by_their_memory(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=6)
    model = LlamaForCausalLM(config)
    size = sum(tensor.nbytes for tensor in model.parameters())

    def memory(share: float) -> None:
        has = {0: int(share * size), 1: int(share * size), "cpu": 10 * size}
        monkeypatch.setattr(modeling, "get_max_memory", lambda given=None: given or dict(has))
        monkeypatch.setattr("accelerate.utils.get_max_memory", lambda given=None: given or dict(has))

    memory(4)
    found = placement._device_map(model, "a", "balanced")
    assert set(found.values()) == {torch.device("cuda:0"), torch.device("cuda:1")}
    assert found["model.embed_tokens"] == torch.device("cuda:0")
    assert {name.split(".self_attn")[0] for name in found} == set(found)
    assert set(placement._device_map(model, "a", "sequential").values()) == {torch.device("cuda:0")}
    memory(0.4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("balanced", "balanced_low_0", "sequential"):
        with pytest.raises(ModelError, match=r"a does not fit into the memory of 2 GPUs, and .* would lie"):
            placement._device_map(model, "a", name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nothing_is_spread_where_no_gpu_is(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="'balanced' spreads a model over GPUs, and this machine has none"):
        load_base(str(tiny_bert), auto_class="AutoModelForCausalLM", model_kwargs={}, device="balanced")


def test_lanes_and_a_spread_model_exclude_each_other(tmp_path: Path) -> None:
    given = make(tmp_path, tmp_path, tmp_path, device="balanced")
    assert load_config(None, {**given, "lanes": "auto"}).device == "balanced"
    with pytest.raises(CommandError, match="device balanced and lanes 2 exclude each other"):
        load_config(None, {**given, "lanes": 2})
