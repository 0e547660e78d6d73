"""The whole street on tiny models: a search, its result, a kill, a resume."""

from __future__ import annotations

import gc
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autorank.evaluate as evaluate_module
from autorank.adapter import lora_layers
from autorank.config import StudyConfig, load_config
from autorank.coordinator import Coordinator
from autorank.display import Display
from autorank.engine import Report, local
from autorank.errors import (
    AllTrialsFailed,
    AutorankError,
    CommandError,
    DataError,
    FileError,
    ModelError,
    StudyError,
)
from autorank.export import export
from autorank.lane import Bench, Lane, TrialSpec
from autorank.lease import Lease
from autorank.preflight import measure_gains, prepare
from autorank.references import _note_test
from autorank.search import plan, resume, search
from autorank.study import Study, list_studies
from autorank.tasks import TextClassification

TRIALS = 6


def settings(base: Path, rows: Path, studies: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(base),
        "data": str(rows),
        "budget": "3k",
        "trials": TRIALS,
        "steps": 20,
        "batch_size": 8,
        "max_length": 16,
        "name": "tiny",
        "studies_dir": str(studies),
        **changes,
    }


def config(base: Path, rows: Path, studies: Path, **changes: Any) -> StudyConfig:
    return load_config(None, settings(base, rows, studies, **changes))


@pytest.fixture(scope="module")
def report(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One finished search; the tests below look at different sides of it."""
    result = search(config(tiny_bert, tiny_data, tmp_path_factory.mktemp("studies")))
    return {**json.loads(json.dumps(result.report)), "folder": str(result.folder)}


def outline(trials: list[dict[str, Any]]) -> list[Any]:
    """What must not depend on interruptions: everything but the time it took."""
    keys = ("number", "state", "value", "params", "ranks", "steps", "samples", "metrics", "seed", "reason")
    return [{key: trial[key] for key in keys} for trial in trials]


def test_the_report_has_what_show_promises(report: dict[str, Any]) -> None:
    assert {"name", "metric", "direction", "budget", "trials", "best", "references"} <= report.keys()
    assert len(report["trials"]) == TRIALS
    for trial in report["trials"]:
        assert {
            "number", "state", "value", "params", "trainable_parameters", "ranks", "steps", "samples",
            "reason",
        } <= trial.keys()  # fmt: skip
        assert trial["state"] in ("COMPLETE", "PRUNED")
        assert trial["trainable_parameters"] <= report["budget"] == 3000
    assert set(report["references"]) == {"frozen_base", "uniform", "control"}


def test_uniform_ranks_get_their_share_and_the_winner_its_control(report: dict[str, Any]) -> None:
    kinds = [trial["params"]["allocation"] for trial in report["trials"]]
    assert kinds.count("uniform") >= 2 and kinds.count("adaptive") >= 2
    last = report["trials"][-1]
    pair = report["trials"][last["control_of"]]
    assert last["seed"] == pair["seed"]
    assert {**last["params"], "allocation": 0} == {**pair["params"], "allocation": 0}
    assert last["params"]["allocation"] != pair["params"]["allocation"]
    assert last["state"] == "COMPLETE"
    control = report["references"]["control"]
    if report["best"]["number"] in (last["number"], pair["number"]):
        assert control["difference"]["low"] <= control["difference"]["mean"] <= control["difference"]["high"]


def test_start_up_points_are_few_and_the_first_is_the_default(report: dict[str, Any]) -> None:
    first = report["trials"][0]["params"]
    assert (first["target_modules"], first["allocation"], first["scaling"]) == ("all-linear", "uniform", 2.0)


def test_adaptive_trials_end_with_ranks_that_differ(report: dict[str, Any]) -> None:
    adaptive = [t for t in report["trials"] if t["params"]["allocation"] == "adaptive"]
    assert any(len(set(t["ranks"].values())) > 1 for t in adaptive)
    for trial in report["trials"]:
        if trial["params"]["allocation"] == "uniform":
            assert len(set(trial["ranks"].values())) == 1


def test_test_is_read_after_the_last_trial(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    score, tell = evaluate_module.evaluate, Study.tell_complete

    def spy(model: Any, task: Any, examples: Any, **settings: Any) -> Any:
        ids = {tuple(example.input_ids) for example in examples}
        seen.append("test" if ids & tests else "other")
        return score(model, task, examples, **settings)

    def told(study: Study, *arguments: Any) -> Any:
        seen.append("told")
        return tell(study, *arguments)

    settings_ = config(tiny_bert, tiny_data, tmp_path, trials=3)
    setup = prepare(settings_, Display.silent())
    tests = {tuple(e.input_ids) for e in setup.test} - {tuple(e.input_ids) for e in setup.bench.validation}
    for module in ("preflight", "lane"):
        monkeypatch.setattr(f"autorank.{module}.evaluate", spy)
    monkeypatch.setattr(Study, "tell_complete", told)
    report = search(settings_).report
    assert seen.count("told") == 3 and "test" in seen
    assert seen.index("test") > len(seen) - 1 - seen[::-1].index("told")
    assert report["references"]["frozen_base"]["test"]["accuracy"] >= 0


def test_a_kill_before_the_result_is_made_up_for(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(config(tiny_bert, tiny_data, tmp_path, trials=2))
    with monkeypatch.context() as patch:

        def killed(*arguments: Any, **settings: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(sys.modules["autorank.search"], "conclude", killed)
        with pytest.raises(KeyboardInterrupt):
            resume("tiny", studies_dir=tmp_path, trials=4)
    report = resume("tiny", studies_dir=tmp_path).report
    with Study.open_read_only(tmp_path / "tiny") as study:
        result = study.result()
    assert result is not None and result["trials"] == 4 == len(report["trials"])
    assert result["best"] == report["best"]["number"]


def test_a_later_winner_is_marked_and_stays_so(tmp_path: Path) -> None:
    class Log:
        """The two calls that the note needs of a study."""

        def __init__(self) -> None:
            self.kept: list[dict[str, Any]] = [{"kind": "stopped"}]

        def events(self) -> list[dict[str, Any]]:
            return self.kept

        def log_event(self, kind: str, **facts: Any) -> None:
            self.kept.append({"kind": kind, **facts})

    log: Any = Log()
    assert [_note_test(log, best) for best in (1, 1, 3, 3, 1)] == [False, False, True, True, False]


def test_weights_that_are_not_finite_are_refused_before_a_study_is_made(
    tiny_llama: Path, tiny_completions: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, broken / "model.safetensors")
    with pytest.raises(ModelError, match="damaged"):
        search(config(broken, tiny_completions, tmp_path / "studies", budget="6k"))
    assert not (tmp_path / "studies").exists()


def test_the_winner_is_the_best_of_the_finished(report: dict[str, Any]) -> None:
    finished = [t for t in report["trials"] if t["state"] == "COMPLETE"]
    assert report["best"]["value"] == max(t["value"] for t in finished)


def test_the_stored_adapter_gives_the_recorded_value(
    report: dict[str, Any], tiny_bert: Path, tiny_data: Path
) -> None:
    best = report["best"]
    folder = Path(report["folder"])
    with Study.open_read_only(folder) as study:
        result = study.result()
    assert result is not None
    uniform = report["references"]["uniform"]
    value = next(t["value"] for t in report["trials"] if t["number"] == uniform["number"])
    assert uniform["validation"]["accuracy"] == pytest.approx(value, abs=1e-4)
    assert (folder / "artifacts" / f"trial-{best['number']}" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("lanes", "trials"), [(1, 5), (2, 20)])
def test_trials_leave_the_base_as_it_was(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, lanes: int, trials: int
) -> None:
    setup = prepare(config(tiny_bert, tiny_data, tmp_path), Display.silent())
    model, startup = setup.base.model, setup.space.startup()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = local.LocalEngine(setup.bench, lanes=lanes)
    held = []
    for first in range(0, trials, lanes):
        for number in range(first, first + lanes):
            params = startup[number % len(startup)]
            plan_ = setup.space.starting_plan(params)
            engine.start(TrialSpec.of(params, number=number, seed=number, plan=plan_))
        steps = 12 if first < 4 else 2  # ranks move in some
        for _ in range(steps * lanes):
            engine.advance()
        engine.close()
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
        assert not lora_layers(model) and not hasattr(model, "peft_config")
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any("forward" in vars(m) for m in model.modules())
        gc.collect()
        held.append(sum(o.nbytes for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)))
    assert held[-1] == pytest.approx(held[2 // lanes - 1 + (lanes == 1)], rel=0.02)


def run(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "autorank", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        cwd=Path(__file__).parents[1],
    )


def interrupt(process: subprocess.Popen[str], line: str, number: int) -> str:
    """Send a signal as soon as the process has printed a line that starts so."""
    assert process.stdout is not None
    printed = ""
    for text in process.stdout:
        printed += text
        if text.startswith(line):
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    return printed + rest


def test_a_stop_while_the_winner_is_scored_is_told_and_made_good(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """All trials have ended by then, so that nothing else says that the study is not whole."""

    class Stopped(Display):
        def scoring(self, what: str, at: int, total: int) -> None:
            super().scoring(what, at, total)
            if at == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(config(tiny_bert, tiny_data, tmp_path, trials=2), display=Stopped(io.StringIO()))
    with Study.open_read_only(tmp_path / "tiny") as study:
        cut = study.to_json()
    assert cut["result"] is None and not cut["scored"]
    (listed,) = list_studies(tmp_path)
    assert listed["states"] == {"COMPLETE": 2} and not listed["scored"]
    out = io.StringIO()
    whole = resume("tiny", studies_dir=tmp_path, display=Display(out)).report
    assert whole["result"] and whole["scored"] and whole["trials"] == cut["trials"]
    best, uniform = whole["best"]["number"], whole["references"]["uniform"]["number"]
    winner = "winner and best uniform" if uniform == best else "winner"
    pair = "paired run" if uniform == best else "best uniform and paired run"
    assert re.findall(r"scoring (\d of \d: .*)", out.getvalue()) == [
        f"1 of 3: {winner}, trial {best}, on validation and test",
        f"2 of 3: {pair}, trial {1 - best}, on validation and test",
        "3 of 3: frozen base on test",
    ]


CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGKILL, signal.SIGKILL), (signal.SIGTERM, signal.SIGINT)]
)
def test_a_search_killed_twice_resumes_to_the_same_end(
    report: dict[str, Any],
    tiny_bert: Path,
    tiny_data: Path,
    tmp_path: Path,
    first: signal.Signals,
    second: signal.Signals,
) -> None:
    options = settings(tiny_bert, tiny_data, tmp_path)
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    process = run("search", *flags)
    # Trials print a line when they start: the third is then in training.
    printed = interrupt(process, "trial 2 starts", first)
    assert process.returncode == CODES[first], printed
    with Study.open_read_only(tmp_path / "tiny") as study:
        states = [record.state for record in study.trials()]
    assert states == ["RUNNING"] * 3, printed  # two of them wait for peers
    process = run("resume", "tiny", "--studies-dir", str(tmp_path))
    printed_then = interrupt(process, "trial 4 starts", second)
    assert process.returncode == CODES[second], printed_then
    if first == signal.SIGKILL:
        assert "trial 2 was interrupted and starts over\ntrial 2 starts" in printed_then
        assert printed_then.count("starts over") == 1
    else:  # it had the time to store how far it was
        assert "all lanes are saved" in printed and "autorank resume tiny" in printed
        assert "starts over" not in printed_then
        assert re.search(r"\ntrial 2 goes on · step \d+ of 20\n", printed_then)
    result = resume("tiny", studies_dir=tmp_path)
    trials = json.loads(json.dumps(result.report))["trials"]
    assert outline(trials) == outline(report["trials"])
    assert "RUNNING" not in {trial["state"] for trial in trials}
    assert result.report["references"]["control"] == report["references"]["control"]
    assert result.report["cost"] == report["cost"]


def test_resume_adds_up_to_the_total_and_no_further(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> None:
    search(config(tiny_bert, tiny_data, tmp_path, trials=1))
    assert len(resume("tiny", studies_dir=tmp_path, trials=3).report["trials"]) == 3
    for given in ({}, {"trials": 3}):  # asked for before, and once more
        assert len(resume("tiny", studies_dir=tmp_path, **given).report["trials"]) == 3


def test_columns_are_stored_with_the_study_and_mapped_again_on_resume(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for file in tiny_data.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.dumps({"question": row["text"], "intent": row["label"]}) for row in rows]
        (renamed / file.name).write_text("\n".join(lines))
    columns = {"text": "question", "label": "intent"}
    search(config(tiny_bert, renamed, tmp_path, trials=1, columns=columns))
    mapped = resume("tiny", studies_dir=tmp_path, trials=2).report
    search(config(tiny_bert, tiny_data, tmp_path / "plain", trials=2))
    plain = resume("tiny", studies_dir=tmp_path / "plain").report
    assert outline(mapped["trials"]) == outline(plain["trials"])


def test_a_name_that_exists_is_refused_before_anything_is_read(report: dict[str, Any]) -> None:
    folder = Path(report["folder"])
    with pytest.raises(StudyError, match="autorank resume tiny"):
        search(config(Path("nowhere"), Path("nowhere"), folder.parent))


def test_a_second_process_on_a_study_is_refused_with_the_name_of_the_first(report: dict[str, Any]) -> None:
    folder = Path(report["folder"])
    before = (folder / "study.db").read_bytes()
    with Lease(folder), pytest.raises(FileError, match=f"in use by process {os.getpid()} on"):
        resume(folder.name, studies_dir=folder.parent, trials=99)
    assert (folder / "study.db").read_bytes() == before
    with Lease(folder), Study.open_read_only(folder) as study:  # readers need no lease
        assert len(study.trials()) == TRIALS


def test_a_study_whose_data_changed_is_refused(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_bytes((tiny_data / f"{split}.jsonl").read_bytes())
    search(config(tiny_bert, data, tmp_path / "studies", trials=1))
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more", "label": "food"}) + "\n")
    with pytest.raises(StudyError, match=r"data \(stored .* given"):
        resume("tiny", studies_dir=tmp_path / "studies", trials=2)


def test_a_failed_trial_never_ends_the_study(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = local.train_lanes

    def fail_once(bench: Bench, lanes: list[Lane], **settings: Any) -> Any:
        if lanes[0].spec.number == 1 and lanes[0].step == 5:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return train(bench, lanes, **settings)

    monkeypatch.setattr(local, "train_lanes", fail_once)
    report = search(config(tiny_bert, tiny_data, tmp_path, trials=3)).report
    assert [trial["state"] for trial in report["trials"]] == ["COMPLETE", "FAIL", "COMPLETE"]
    failed = report["trials"][1]
    assert failed["reason"] == "out of memory (tried to allocate 2 GiB) at step 6"
    assert failed["value"] is None and failed["steps"] == 5


def test_when_every_trial_fails_the_reasons_are_counted(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    space = {"learning_rate": 1e30, "head_learning_rate": 1e30}
    with pytest.raises(AllTrialsFailed, match=r"3 trials .*failed: 3 x"):
        search(config(tiny_bert, tiny_data, tmp_path, trials=9, space=space))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budget": 63}, CommandError, "63 buys nothing here"),
        ({"budget": 100, "min_rank": 1}, CommandError, "100 buys nothing here"),
        ({"target_modules": ["query", "FAKE"]}, ModelError, "FAKE"),
        ({"metric": "bleu"}, DataError, "accuracy"),
        ({"steps": 5}, CommandError, "at least"),
        ({"min_rank": 99}, CommandError, "min_rank 99"),
        ({"max_rank": 99}, CommandError, "max_rank 99"),
        ({"patience": 4}, CommandError, "patience 4 ends no trial early: of 5 evaluations only 3 can count"),
        ({"space": {"weight_decay": 500}}, CommandError, "space.weight_decay 500"),
        ({"data": "nowhere"}, DataError, "nowhere"),
        ({"model": "./nowhere"}, ModelError, "nowhere"),
        ({"device": "tpu"}, AutorankError, "tpu"),
    ],
)
def test_the_preflight_refuses_and_writes_nothing(
    tiny_bert: Path,
    tiny_data: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    studies = tmp_path / "studies"
    with pytest.raises(error, match=words):
        search(config(tiny_bert, tiny_data, studies, **changes))
    assert not studies.exists()


def test_smoothing_is_refused_where_targets_are_no_classes(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextClassification, "smooths", False)
    asked = config(tiny_bert, tiny_data, tmp_path, space={"label_smoothing": [0, 0.1]})
    with pytest.raises(CommandError, match=r"space.label_smoothing means nothing to the task text-class"):
        prepare(asked, Display.silent())
    prepare(config(tiny_bert, tiny_data, tmp_path, space={"label_smoothing": 0}), Display.silent())


def test_what_holds_trials_back_is_recorded_and_exported(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    space = {"dropout": 0.1, "weight_decay": [0.5, 2], "label_smoothing": {"low": 0.05, "high": 0.1}}
    asked = config(tiny_bert, tiny_data, tmp_path, trials=2, space=space)
    result = search(asked)
    winner = result.report["best"]["params"]
    assert (winner["dropout"], winner["weight_decay"], winner["label_smoothing"]) == (0.1, 0.5, 0.05)
    folder = export(asked.name, tmp_path / "out", studies_dir=tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    assert json.loads((folder / "autorank_export.json").read_text())["params"] == winner
    card = (folder / "README.md").read_text()
    assert "| regularisation | dropout 0.1, weight decay 0.5, label smoothing 0.05 |" in card
    assert prepare(asked, Display.silent()).fingerprint["space.dropout"] == "0.1"


def test_patience_is_part_of_what_a_study_is(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> None:
    facts = [
        prepare(config(tiny_bert, tiny_data, tmp_path, patience=patience), Display.silent()).fingerprint
        for patience in (None, 2)
    ]
    assert facts[1] == {**facts[0], "patience": "2"} and "dropout" not in facts[0]


LOADER = """
import json, sys
sys.modules["autorank"] = None
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3)
model = PeftModel.from_pretrained(base, sys.argv[2])
layers = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
size = sum(tensor.numel() for name, tensor in model.named_parameters() if "lora_" in name)
print(json.dumps([{name.removeprefix("base_model.model."): rank for name, rank in layers.items()}, size]))
"""


@pytest.mark.filterwarnings("ignore:ranks stayed as they were")
def test_a_budget_of_a_few_components_is_searched_and_exported(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 parameters: three components in attention, or two in the MLP; rank 1 costs 256 and more."""
    few = config(tiny_bert, tiny_data, tmp_path, budget=200, trials=1)
    search(few)
    with monkeypatch.context() as patch:
        # What was measured is stored: a study that goes on does not measure again.
        patch.setattr("autorank.preflight.probe_gains", None)
        report = resume("tiny", studies_dir=tmp_path, trials=5).report
    trials = report["trials"]
    assert {trial["state"] for trial in trials} <= {"COMPLETE", "PRUNED"}
    assert {trial["params"]["allocation"] for trial in trials} == {"uniform", "adaptive"}
    for trial in trials:
        assert trial["params"]["rank"] == 0
        start = trial["starting_ranks"]
        assert 1 <= sum(start.values()) <= 3 and 0 in start.values()
        assert 64 <= trial["trainable_parameters"] <= 200
        if trial["params"]["allocation"] == "uniform":
            assert trial["ranks"] == start
    starts = [
        trial["starting_ranks"] for trial in trials if trial["params"]["target_modules"] == "all-linear"
    ]
    assert len(starts) > 1 and all(start == starts[0] for start in starts)
    # No trial had one rank at all its layers, so there is no uniform LoRA to compare with.
    assert report["references"]["uniform"] is None and report["references"]["control"] is not None
    best = report["best"]
    out = export("tiny", tmp_path / "adapter", studies_dir=tmp_path)
    loaded = subprocess.run(
        [sys.executable, "-c", LOADER, str(tiny_bert), str(out)], capture_output=True, text=True, check=True
    )
    assert json.loads(loaded.stdout.splitlines()[-1]) == [
        {name: rank for name, rank in best["ranks"].items() if rank}, best["trainable_parameters"],
    ]  # fmt: skip


def test_adaptive_ranks_move_between_single_components(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    space = {"allocation": "adaptive", "target_modules": "attention", "learning_rate": 1e-2}
    report = search(
        config(
            tiny_bert, tiny_data, tmp_path, budget=130, trials=3, steps=40, space=space, importance="random"
        )
    ).report
    for trial in report["trials"]:
        assert sum(trial["ranks"].values()) == 2
    assert any(trial["ranks"] != trial["starting_ranks"] for trial in report["trials"])


@pytest.mark.filterwarnings("ignore:ranks stayed as they were")
def test_a_larger_budget_can_start_from_the_gradient_too(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    space = {"start": ["uniform", "gradient"]}
    trials = search(config(tiny_bert, tiny_data, tmp_path, trials=4, space=space)).report["trials"]
    assert [trial["params"]["rank"] > 0 for trial in trials[:3]] == [True, True, False]
    start = trials[2]["starting_ranks"]
    # Rank 3 is the largest for all; the gradient spends what that leaves over, and not evenly.
    assert sum(start.values()) > 3 and len(set(start.values())) > 1
    assert 2688 < trials[2]["trainable_parameters"] <= 3000


def test_a_gradient_in_which_no_layer_stands_out_is_said(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = config(tiny_bert, tiny_data, tmp_path, budget=200, target_modules="mlp")
    setup = prepare(settings_, Display.silent())
    for gains, flat in (((9.0, 0.0, 0.0, 0.0), False), ((0.0,) * 4, True)):
        notes: list[str] = []
        display = Display.silent()
        monkeypatch.setattr(display, "note", notes.append)
        monkeypatch.setattr(
            "autorank.preflight.probe_gains",
            lambda bench, layers, seed, gains=gains: {
                layer.name: (gain,) for layer, gain in zip(layers, gains, strict=True)
            },
        )
        space = measure_gains(setup, display).space
        assert notes[1] == "mlp starts with 192 parameters at 2 of 4 layers"
        assert len(notes[2:]) == flat
        assert not flat or "no layer of mlp stands out of the gradient's noise: ranks are spread" in notes[2]
        assert len(space.gradient_plan("mlp", 1.0).live) == 2
    large = prepare(config(tiny_bert, tiny_data, tmp_path), Display.silent())
    assert measure_gains(large, Display.silent()) is large


@pytest.mark.parametrize(
    ("steps", "schedule", "points"),
    [
        (100, {}, (25, 44, 62, 81, 100)),
        (20, {}, (9, 12, 14, 17, 20)),  # ranks moved at 3 and 6
        (100, {"warmup": 0.3}, (38, 54, 69, 84, 100)),  # at 30 and 35, and newborns need some steps
    ],
)
def test_trials_are_scored_first_when_ranks_have_moved_and_newborns_have_learnt(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, steps: int, schedule: Any, points: Any
) -> None:
    given = config(tiny_bert, tiny_data, tmp_path, steps=steps, evaluations=5, schedule=schedule)
    recipe = prepare(given, Display.silent()).bench.recipe
    assert recipe.evaluate_at == points and points[0] >= recipe.schedule.moves[1] + 3
    uniform = config(
        tiny_bert, tiny_data, tmp_path, steps=steps, evaluations=2, space={"allocation": "uniform"}
    )
    assert prepare(uniform, Display.silent()).bench.recipe.evaluate_at == (steps // 4, steps)


def test_an_unwritable_folder_is_refused_first(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "tiny").symlink_to("tiny")
    for place in ("file/studies", "tiny", "x" * 300):
        with pytest.raises(FileError, match="--studies-dir"):
            search(config(Path("nowhere"), tiny_data, tmp_path / place))
    with pytest.raises(StudyError, match="exists already"):  # whatever that is
        search(config(Path("nowhere"), tiny_data, tmp_path))


def test_plan_tells_what_a_search_would_do_and_writes_nothing(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    facts = plan(config(tiny_bert, tiny_data, tmp_path / "studies"))
    groups = {group["name"]: group for group in facts["groups"]}
    # Per block: attention 4 x (32 + 32), MLP 2 x (32 + 64).
    assert groups["all-linear"] | {"x": 0} == {
        "name": "all-linear", "layers": 12, "cost": 896, "largest_rank": 3, "parameters": 2688, "x": 0,
        "start": ["uniform"],
    }  # fmt: skip
    assert facts["steps"] == 20 and facts["seconds"] > 0 and facts["memory_bytes"] > 10**7
    assert not (tmp_path / "studies").exists()


def test_plan_tells_of_lanes_and_of_memory_that_does_not_hold_them(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    with monkeypatch.context() as patch:  # a clock that goes on by a second whenever it is read
        patch.setattr("autorank.preflight.time.monotonic", lambda: float(next(ticks)))
        patch.setattr("autorank.engine.probe._now", lambda device: float(next(ticks)))
        one, three = (plan(config(tiny_bert, tiny_data, tmp_path, lanes=lanes)) for lanes in (1, 3))
    assert (one["lanes"], three["lanes"]) == (1, 3)
    assert one["seconds_per_step"] == three["seconds_per_step"] == pytest.approx(1 / 3)
    # Three share a pass, and are scored one by one.
    assert one["seconds"] - three["seconds"] == pytest.approx(TRIALS * 20 * 2 / 9)
    train = Lane.__init__

    def full(lane: Lane, spec: TrialSpec, *more: Any, **named: Any) -> None:
        train(lane, spec, *more, **named)
        if spec.number == 2:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Lane, "__init__", full)
    with pytest.raises(ModelError, match="does not hold 3 lanes of 8 rows each: lower --lanes"):
        plan(config(tiny_bert, tiny_data, tmp_path, lanes=3))
    assert not (tmp_path / "studies").exists()


def test_a_study_whose_time_is_up_ends_at_the_next_step_and_goes_on(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    stopped = search(config(tiny_bert, tiny_data, tmp_path, trials=2, time_s=0.01))
    assert stopped.report["best"] is None and stopped.report["result"] is None
    assert [trial["state"] for trial in stopped.report["trials"]] == ["RUNNING"]
    assert (stopped.folder / "events.jsonl").read_text().count('"stopped"') == 1
    ended = resume("tiny", studies_dir=tmp_path, time_s=1e6)
    assert [trial["state"] for trial in ended.report["trials"]] == ["COMPLETE"] * 2
    assert ended.report["trials"][0]["steps"] == 20 and ended.report["result"]["best"] in (0, 1)


def test_where_activations_are_computed_twice_trials_train_alone(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    facts = plan(config(tiny_bert, tiny_data, tmp_path, lanes="auto", gradient_checkpointing=True))
    assert facts["lanes"] == 1


def test_a_search_that_ends_by_failures_before_any_trial_has_finished_says_so(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Lane.__init__

    def broken(lane: Lane, spec: TrialSpec, bench: Bench, state: Any = None, **named: Any) -> None:
        more = (bench, state)
        if spec.number > 1 or state is not None:  # two wait, and the rest fails: the best of the two at last
            raise ValueError("broken")
        start(lane, spec, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "__init__", broken)
        with pytest.raises(
            AllTrialsFailed, match=r"no trial has finished.*ValueError: broken.*resume tiny` goes on"
        ):
            search(config(tiny_bert, tiny_data, tmp_path))
    states = [trial["state"] for trial in resume("tiny", studies_dir=tmp_path, trials=5).report["trials"]]
    assert states.count("FAIL") == 3 and states.count("COMPLETE") >= 2


@pytest.fixture(scope="module")
def halfway(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of studies with one of two trials, with its result, and a third that was interrupted."""
    studies = tmp_path_factory.mktemp("halfway")
    search(config(tiny_bert, tiny_data, studies, trials=2))
    handled = Coordinator._handle

    def interrupted(self: Coordinator, event: Any) -> None:
        handled(self, event)
        if event.number == 2 and isinstance(event, Report) and event.step > 9 and self._save(2):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "_handle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resume("tiny", studies_dir=studies, trials=3)
    return studies


def _changed(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change a JSON file of the study."""

    def change(study: Path) -> None:
        path = study / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _result(**changes: Any) -> Callable[[Path], None]:
    """Change the stored result."""

    def change(study: Path) -> None:
        with closing(sqlite3.connect(study / "study.db")) as database:
            find = "select rowid, value_json from study_user_attributes where key = 'result'"
            ((row, value),) = database.execute(find).fetchall()
            text = json.dumps({**json.loads(value), **changes})
            database.execute("update study_user_attributes set value_json = ? where rowid = ?", (text, row))
            database.commit()

    return change


def _holds(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Put something else in a file of the study."""
    data = content.encode() if isinstance(content, str) else content
    return lambda study: (study / name).write_bytes(data)


class _Payload:
    """Makes a file if it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch unpickled",))


PICKLE = pickle.dumps(_Payload())
LANE, FROZEN = "artifacts/lane-2", "artifacts/frozen"


def _linked(name: str) -> Callable[[Path], object]:
    """Move a part of the study out of it and leave a link."""

    def change(study: Path) -> None:
        (study / name).rename(Path("s") / "elsewhere")
        (study / name).symlink_to((Path("s") / "elsewhere").absolute())

    return change


NOT_OURS: dict[str, Callable[[Path], object]] = {
    "a state that is no JSON": _holds(f"{LANE}/lane.json", "{"),
    "a pickle for the state's tensors": _holds(f"{LANE}/lane.safetensors", PICKLE),
    "a step beyond the last": _changed(f"{LANE}/lane.json", step=10**9),
    "a step before the first": _changed(f"{LANE}/lane.json", step=-1),
    "a step that is no number": _changed(f"{LANE}/lane.json", step="x"),
    "a plan that is none": _changed(f"{LANE}/lane.json", plan=[]),
    "progress that is none": _holds(f"{LANE}/progress.json", "[]"),
    "a score without a step": _changed(f"{LANE}/progress.json", scores={"x": {"value": 1.0}}),
    "a score that is no number": _changed(f"{LANE}/progress.json", scores={"9": {"value": "x"}}),
    "a score that is not finite": _changed(f"{LANE}/progress.json", scores={"9": {"value": math.inf}}),
    "a pickle for the head": _holds(f"{FROZEN}/head.safetensors", PICKLE),
    "scores of the frozen base that are none": _holds(f"{FROZEN}/scores.json", "[]"),
    "a score of the frozen base in words": _holds(f"{FROZEN}/scores.json", '{"accuracy": "x"}'),
    "limits in words": _holds("events.jsonl", '{"a": 1}\n{"kind": "limits", "trials": "x"}\n'),
    "limits below one": _holds("events.jsonl", '{"kind": "limits", "trials": -5}\n'),
    "a configuration that is none": _holds("config.json", "[]"),
    "a result without references": _result(references=None),
    "a reference that is none": _result(references={"control": 5}),
    "events that are elsewhere": _linked("events.jsonl"),
    "artifacts that are elsewhere": _linked("artifacts"),
    "an artifact that is elsewhere": _linked("artifacts/trial-0"),
    "a figure in words": _result(test={"accuracy": "x"}),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_what_autorank_did_not_write_is_refused_and_runs_nothing(
    halfway: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(halfway, "s")
    NOT_OURS[what](Path("s/tiny"))
    with pytest.raises(StudyError):
        resume("tiny", studies_dir="s", trials=3)
    assert os.listdir() == ["s"]


def test_events_of_another_kind_are_passed_over(halfway: Path, tmp_path: Path) -> None:
    shutil.copytree(halfway, tmp_path / "s")
    lines = '{"a": 1}\n5\n{"kind": "stopped"}\n{"kind": "test"}\n{"kind": 7}\n'
    (tmp_path / "s" / "tiny" / "events.jsonl").write_text(lines)
    report = resume("tiny", studies_dir=tmp_path / "s", trials=3).report
    assert [trial["state"] for trial in report["trials"]] == ["COMPLETE"] * 3


def test_one_of_several_processes_of_a_launcher_is_refused(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CommandError, match="WORLD_SIZE is 2: autorank trains in one process"):
        search(config(tiny_bert, tiny_data, tmp_path / "studies"))
    with pytest.raises(CommandError, match="WORLD_SIZE is 2"):
        resume("tiny", studies_dir=tmp_path)
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_a_target_that_is_no_limit_is_refused_on_resume_too(halfway: Path, target: float) -> None:
    with pytest.raises(CommandError, match=f"target is {target}: it must be a finite number"):
        resume("tiny", studies_dir=halfway, target=target)
