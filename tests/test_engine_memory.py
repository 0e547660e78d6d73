"""What a step keeps for its backward pass, against a pass of the whole batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autorank.adapter import lora_layers
from autorank.config import load_config
from autorank.display import Display
from autorank.engine.memory import _Live, step_bytes
from autorank.errors import CommandError
from autorank.lane import Lane, TrialSpec
from autorank.preflight import Setup, check_memory, prepare


def make(model: Path, data: Path, studies: Path, **more: object) -> Setup:
    settings = {"model": str(model), "data": str(data), "budget": "6k", "steps": 24, "batch_size": 8}
    settings["device"] = "cpu"
    return prepare(load_config(None, {**settings, "studies_dir": str(studies), **more}), Display.silent())


def trial(setup: Setup) -> TrialSpec:
    params = setup.space.startup()[0]
    return TrialSpec.of(params, number=0, seed=0, plan=setup.space.starting_plan(params), adaptive=False)


def test_steps_of_one_row_and_of_two_tell_of_a_batch_of_the_longest(
    tiny_llama: Path, tiny_completions: Path, tmp_path: Path
) -> None:
    """Against what autograd saves of that batch, of which some is let go before the last is made."""
    setup = make(tiny_llama, tiny_completions, tmp_path)
    bench = setup.bench
    longest = max(bench.train, key=lambda example: example.length)
    before = {key: value.clone() for key, value in setup.base.model.state_dict().items()}
    told = step_bytes(bench, trial(setup))
    after = setup.base.model.state_dict()
    assert not lora_layers(setup.base.model) and after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    lane, kept = Lane(trial(setup), bench), dict[int, int]()
    own = {tensor.untyped_storage().data_ptr() for tensor in setup.base.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = bench.task.collate([longest] * 8, bench.base.pad_token_id)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = bench.task.loss(setup.base.model(**batch.inputs).logits, batch)
    lane.close()
    assert loss.requires_grad and sum(kept.values()) < told < 1.6 * sum(kept.values())
    assert step_bytes(replace(bench, train=bench.train[:4]), trial(setup)) < told


def test_the_most_that_lives_at_once_is_counted() -> None:
    given = torch.zeros(100)
    with _Live((given,)) as live:
        first = given + 1.0  # 400 bytes
        second = first.double()  # 800 more
        del first
        third = second[:50] * 2  # 400, of a view that takes none
        del second, third
        torch.zeros(10)
    assert live.peak == 1200


def test_what_is_computed_twice_is_not_kept(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> None:
    once, twice = (
        make(tiny_bert, tiny_data, tmp_path, gradient_checkpointing=given) for given in (False, True)
    )
    assert step_bytes(twice.bench, trial(twice)) < 0.8 * step_bytes(once.bench, trial(once))


def test_a_batch_that_the_memory_does_not_hold_is_refused(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make(tiny_bert, tiny_data, tmp_path)
    free = SimpleNamespace(available=2**40)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    notes: list[str] = []
    display = Display.silent()
    monkeypatch.setattr(display, "note", notes.append)
    check_memory(setup, display)
    assert not lora_layers(setup.base.model) and not notes
    needed = step_bytes(setup.bench, trial(setup))
    free.available = int(1.5 * needed)
    check_memory(setup, display)
    assert len(notes) == 1 and notes[0].startswith("memory may run out: a step of 8 rows takes")
    free.available = needed // 2
    with pytest.raises(CommandError, match=r"a step of 8 rows takes .* lower --batch-size, --max-length, or"):
        check_memory(setup, display)
    shared = replace(setup, config=setup.config.model_copy(update={"lanes": 3}))
    with pytest.raises(
        CommandError, match=r"8 rows in each of 3 lanes takes .* --batch-size, --lanes, --max"
    ):
        check_memory(shared, display)
    free.available = 2 * needed
    with pytest.raises(CommandError, match="in each of 3 lanes"):
        check_memory(shared, display)
