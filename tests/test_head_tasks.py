"""Tasks with a head all the way: a search, its result, the export, and plain PEFT on it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from card_code import assert_card_predicts
from conftest import _FILLERS, _WORDS, Outcome, write_jsonl

from autorank.artifacts import read_json
from autorank.config import load_config
from autorank.display import Display
from autorank.evaluate import evaluate
from autorank.lane import Lane, LaneState, TrialSpec
from autorank.plan import uniform_plan
from autorank.preflight import Setup, prepare
from autorank.references import score_frozen_base

Cli = Callable[..., Outcome]
Rows = Callable[[random.Random], dict[str, Any]]
KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words}


def _words(stream: random.Random) -> list[str]:
    return stream.choices([*_FILLERS, *KIND_OF], k=stream.randint(3, 9))


def number(stream: random.Random) -> dict[str, Any]:
    """How many foods there are, in a unit far from 0 and 1."""
    words = _words(stream)
    foods = sum(KIND_OF.get(word) == "food" for word in words)
    return {"text": " ".join(words), "score": 500.0 + 20.0 * foods / len(words)}


def lists(stream: random.Random) -> dict[str, Any]:
    """Which kinds of words there are."""
    words = _words(stream)
    return {"text": " ".join(words), "label": sorted({KIND_OF[word] for word in words if word in KIND_OF})}


def tags(stream: random.Random) -> dict[str, Any]:
    """Runs of words of a kind are spans."""
    words, marked, before = _words(stream), [], None
    for word in words:
        kind = KIND_OF.get(word)
        marked.append("O" if kind is None else f"{'I' if kind == before else 'B'}-{kind}")
        before = kind
    return {"tokens": words, "tags": marked}


TASKS: dict[str, Rows] = {
    "regression": number,
    "multi-label-classification": lists,
    "token-classification": tags,
}


def write_data(folder: Path, rows: Rows) -> Path:
    stream = random.Random(1)
    for split, count in (("train", 120), ("validation", 48), ("test", 24)):
        write_jsonl(folder / f"{split}.jsonl", [rows(stream) for _ in range(count)])
    return folder


def settings(model: Path, data: Path, studies: Path) -> dict[str, Any]:
    return {
        "model": str(model), "data": str(data), "studies_dir": str(studies), "budget": "3k",
        "batch_size": 8, "max_length": 16, "steps": 12,
    }  # fmt: skip


def setup_of(model: Path, data: Path, studies: Path) -> Setup:
    return prepare(load_config(None, settings(model, data, studies)), Display.silent())


def outcomes_in_plain_peft(out: Path, setup: Setup) -> dict[str, float]:
    """Run the code of the card of an export, and score what it loads on validation."""
    found = re.search("```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(found[1], names)
    adapted: Any = names["model"].eval()
    wanted = setup.task.model_kwargs()
    assert adapted.config.num_labels == wanted["num_labels"]
    assert adapted.config.problem_type == wanted.get("problem_type")
    assert "id2label" not in wanted or adapted.config.id2label == wanted["id2label"]
    rows = setup.config.batch_size  # padded alike, logits round alike: of large numbers only a part is small
    given: dict[str, Any] = {"batch_size": rows, "pad_token_id": setup.base.pad_token_id}
    return evaluate(adapted.get_base_model(), setup.task, setup.bench.validation, **given).scores


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("lanes", [1, 2])
def test_what_a_search_exports_is_what_it_scored(
    cli: Cli, tmp_path: Path, tiny_bert: Path, tiny_llama: Path, name: str, lanes: int
) -> None:
    model = tiny_bert if lanes == 1 else tiny_llama
    data, studies = write_data(tmp_path / "data", TASKS[name]), tmp_path / "s"
    given = [f"--{key.replace('_', '-')}={value}" for key, value in settings(model, data, studies).items()]
    done = cli("search", *given, "--trials", 2, "--lanes", lanes, "--name", "heads")
    assert done.code == 0, done.err
    assert f"task {name} (columns" in done.err + done.out
    shown = cli("show", "heads", "--studies-dir", studies, "--json").json
    assert [trial["state"] for trial in shown["trials"]] == ["COMPLETE"] * 2
    out = tmp_path / "out"
    assert cli("export", "heads", "--out", out, "--studies-dir", studies).code == 0
    facts = read_json(out / "autorank_export.json")
    setup = setup_of(model, data, studies)
    assert (facts["task"], facts["task_type"]) == (name, setup.task.peft_task_type)
    assert tuple(facts["validation"]) == setup.task.metrics
    assert outcomes_in_plain_peft(out, setup) == pytest.approx(facts["validation"], rel=1e-5, abs=1e-6)
    column, variable = ("tokens", "words") if name == "token-classification" else ("text", "text")
    given = TASKS[name](random.Random(2))[column]
    for asked in (given, [*given, *given, *given] if variable == "words" else " ".join(9 * [given])):  # cut
        assert assert_card_predicts(out, {column: asked}, tmp_path, **{variable: repr(asked)})


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("name", TASKS)
def test_the_head_starts_from_what_the_frozen_features_tell(
    tiny_bert: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Random features of a bag of words tell much of these tasks."""
    model = tiny_bert if kind == "bert" else tiny_llama
    setup = setup_of(model, write_data(tmp_path / "data", TASKS[name]), tmp_path / "s")
    assert setup.bench.head is not None
    fresh = setup.evaluate(setup.bench.validation).scores
    notes: list[str] = []
    display = Display.silent()
    monkeypatch.setattr(display, "note", notes.append)
    frozen = score_frozen_base(setup, display)
    assert frozen.head["weight"].shape[0] == setup.task.outputs
    if name == "regression":
        numbers = torch.tensor([example.labels for example in setup.bench.validation])
        if kind == "bert":
            assert frozen.scores["mse"] < 1.2 * numbers.var() < 100 < fresh["mse"]
        # Without a bias only a part of the numbers' level is within the head's reach.
        assert frozen.scores["mse"] < 0.5 * fresh["mse"]
        assert len([note for note in notes if "subtract that from them" in note]) == (kind == "llama")
    elif name == "token-classification":
        assert frozen.scores["token_accuracy"] > 0.8 > fresh["token_accuracy"]
    else:
        assert frozen.scores["loss"] < 0.9 * fresh["loss"]
        assert frozen.scores["f1_micro"] > 0.7


def test_a_head_of_numbers_starts_as_the_probe_has_it(tiny_bert: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", number)
    space = setup_of(tiny_bert, data, tmp_path).space
    assert {point.head_scale for point in space.startup()} == {1.0}
    assert space.dim("head_scale").choices == (1.0,)
    asked = load_config(None, {**settings(tiny_bert, data, tmp_path), "space": {"head_scale": [0.5]}})
    assert prepare(asked, Display.silent()).space.dim("head_scale").choices == (0.5,)
    other = setup_of(tiny_bert, write_data(tmp_path / "other", lists), tmp_path).space
    assert other.dim("head_scale").choices is None


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_regression_learns_the_same_in_any_unit(
    tiny_bert: Path, tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    """Numbers times a power of two are the same digits: so is all that is learnt, but for that power."""
    model = tiny_bert if kind == "bert" else tiny_llama

    def learnt(exponent: int) -> tuple[list[float], LaneState]:
        def row(stream: random.Random) -> dict[str, Any]:
            plain = number(stream)
            return {**plain, "score": plain["score"] * 2.0**exponent}

        setup = setup_of(model, write_data(tmp_path / f"data{exponent}", row), tmp_path / "s")
        score_frozen_base(setup, Display.silent())
        layers = setup.space.groups["all-linear"]
        plan = uniform_plan(layers, 1, 2.0, setup.space.budget)
        lane = Lane(TrialSpec(0, 5, plan, True, 3e-2, 3e-2, 1.0), setup.bench)
        losses = []
        while not lane.finished:
            losses.append(lane.train())
        losses += lane.evaluate()
        state = lane.state()
        lane.close()
        return losses, state

    losses, plain = learnt(0)
    head = {key for key in plain.tensors if "lora_" not in key}
    assert len(head) == (2 if kind == "bert" else 1) and losses[0] != losses[-3]
    for exponent in (-20, 20):
        found, state = learnt(exponent)
        assert found == losses and state.plan == plain.plan
        for key, tensor in plain.tensors.items():
            assert torch.equal(state.tensors[key], tensor * (2.0**exponent if key in head else 1.0)), key
        assert all(torch.equal(state.optimizer[key], tensor) for key, tensor in plain.optimizer.items())
