"""Which trial is on the lane, and that a kill at any write changes nothing of it."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from sqlalchemy import event
from sqlalchemy.engine import Engine as Database

from autorank import database
from autorank.adapter import lora_layers
from autorank.artifacts import ArtifactStore
from autorank.config import SpaceConfig, config_to_json, load_config
from autorank.coordinator import Coordinator
from autorank.display import Display
from autorank.engine import Engine, Event, Lost, Paused, Report, local
from autorank.engine.local import LocalEngine
from autorank.errors import FileError
from autorank.halving import stalled
from autorank.lane import Bench, Lane, LaneState, TrialSpec
from autorank.limits import Limits
from autorank.preflight import Setup, measure_gains, prepare
from autorank.shelf import Shelf, forecast
from autorank.study import Study

TRIALS = 5
KEEP = 1


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A killed process needs no disk, only the system; and what was there before is no garbage."""

    def connected(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    gc.collect()
    gc.freeze()
    event.listen(Database, "connect", connected)
    yield
    event.remove(Database, "connect", connected)
    gc.unfreeze()


@pytest.fixture(scope="module")
def setup(tiny_llama: Path, tiny_completions: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    settings = {
        "model": str(tiny_llama),
        "data": str(tiny_completions),
        "budget": "3k",
        "steps": 12,
        "evaluations": 3,
        "batch_size": 4,
        "max_length": 24,
        "name": "study",
        "studies_dir": str(tmp_path_factory.mktemp("studies")),
        # Wide, so that some trials are clearly worse.
        "space": {"learning_rate": {"low": 1e-4, "high": 3e-2}},
    }
    return prepare(load_config(None, settings), Display.silent())


def create(setup: Setup, folder: Path) -> Path:
    Study.create(
        folder,
        config=config_to_json(setup.config),
        fingerprint=setup.fingerprint,
        space=setup.space,
        direction=setup.task.metric.direction,
        metric=setup.task.metric.name,
        seed=setup.config.seed,
    ).close()
    return folder


def go_on(
    setup: Setup,
    folder: Path,
    display: Display | None = None,
    *,
    save_every_s: float = 1e9,
    engine: Engine | None = None,
    **limits: Any,
) -> list[dict[str, Any]]:
    """Run a study to its end, or as far as it comes; returns its trials."""
    engine = engine or LocalEngine(setup.bench)
    with Study.open(folder) as study:
        shelf = Shelf(ArtifactStore(folder / "artifacts"), setup.bench, setup.task.labels, keep=KEEP)
        try:
            Coordinator(
                study,
                setup.bench,
                shelf,
                engine,
                display or Display.silent(),
                Limits(**{"trials": TRIALS, **limits}),
                save_every_s=save_every_s,
            ).run()
        finally:
            engine.close()
        return [record.to_json() for record in study.trials()]


def outline(trials: list[dict[str, Any]]) -> list[Any]:
    """Everything but the time it took."""
    return json.loads(json.dumps([{k: v for k, v in trial.items() if k != "seconds"} for trial in trials]))


def contents(folder: Path) -> set[str]:
    return {path.name for path in (folder / "artifacts").iterdir()}


def trials_of(folder: Path) -> list[dict[str, Any]]:
    with Study.open_read_only(folder) as study:
        return [record.to_json() for record in study.trials()]


@pytest.fixture(scope="module")
def whole(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str, Path]:
    """One study without interruptions: its trials, what was said, its folder."""
    said = io.StringIO()
    folder = create(setup, tmp_path_factory.mktemp("whole") / "study")
    trials = go_on(setup, folder, Display(said))
    return outline(trials), said.getvalue(), folder


# -- which trial is on the lane --------------------------------------------------------------------


def test_trials_wait_at_the_first_rung_for_peers_and_the_best_goes_on_first(whole: Any) -> None:
    trials, said, _ = whole
    first = [trial["scores"]["6"]["value"] for trial in trials[:4]]
    turns = re.findall(r"^trial \d+ (?:starts|waits|goes on|complete|pruned)", said, re.MULTILINE)
    assert turns[:7] == [
        "trial 0 starts", "trial 0 waits", "trial 1 starts", "trial 1 waits", "trial 2 starts",
        "trial 2 waits", "trial 3 starts",
    ]  # fmt: skip
    best = min(range(4), key=first.__getitem__)
    assert next(turn for turn in turns[6:] if turn.endswith("goes on")) == f"trial {best} goes on"
    assert {trial["state"] for trial in trials} == {"COMPLETE", "PRUNED"}


def test_who_is_pruned_was_at_a_rung_and_is_no_control(whole: Any) -> None:
    trials, _, _ = whole
    pruned = [trial for trial in trials if trial["state"] == "PRUNED"]
    assert pruned and all(trial["steps"] in (6, 9) and trial["control_of"] is None for trial in pruned)
    for trial in pruned:
        assert trial["samples"] == trial["steps"] * 4 and trial["value"] == trial["scores"]["6"]["value"]
        assert trial["trainable_parameters"] <= 3000 and set(trial["ranks"]) == set(trial["starting_ranks"])
    winner = min((t for t in trials[:4] if t["state"] == "COMPLETE"), key=lambda t: t["value"])
    assert trials[4]["control_of"] == winner["number"] and trials[4]["state"] == "COMPLETE"


def test_the_ledger_counts_every_sample_once(whole: Any, setup: Setup) -> None:
    trials, _, folder = whole
    lengths = [example.length for example in setup.bench.train]
    for trial in trials:
        assert trial["samples"] == 4 * trial["steps"]
        assert trial["evaluation_samples"] == len(trial["scores"]) * len(setup.bench.validation)
        assert trial["samples"] * min(lengths) <= trial["tokens"] <= trial["samples"] * max(lengths)
    cost = json.loads((folder / "cost.json").read_text())
    with Study.open_read_only(folder) as study:
        assert study.to_json()["cost"] == cost
    assert cost["samples"] == sum(trial["samples"] for trial in trials)
    assert max(s["spent"] for t in trials for s in t["scores"].values()) == cost["samples"]
    samples, values = zip(*cost["curve"], strict=True)
    assert list(samples) == sorted(samples) and list(values) == sorted(values, reverse=True)
    assert values[-1] == min(s["value"] for t in trials for s in t["scores"].values())


def test_storing_states_between_rungs_changes_nothing(whole: Any, setup: Setup, tmp_path: Path) -> None:
    saves: list[int] = []
    folder = create(setup, tmp_path / "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autorank.coordinator.SAVING_SHARE", 1e9)
        save = Shelf.save_lane

        def counted(shelf: Shelf, number: int, state: LaneState, progress: Any) -> None:
            saves.append(state.step)
            save(shelf, number, state, progress)

        patch.setattr(Shelf, "save_lane", counted)
        trials = go_on(setup, folder, save_every_s=0.0)
    assert outline(trials) == whole[0]
    # At every step but those where an evaluation is due, and after that.
    assert saves.count(6) == 5 and saves.count(5) == 5


class Counting(LocalEngine):
    """Remembers how many lanes were in use at once."""

    most = 0

    def start(self, spec: TrialSpec, state: LaneState | None = None) -> None:
        super().start(spec, state)
        self.most = max(self.most, len(self._lanes))


@pytest.mark.parametrize("lanes", [2, 4])
def test_lanes_train_side_by_side_and_the_control_comes_last(
    setup: Setup, tmp_path: Path, lanes: int
) -> None:
    engine = Counting(setup.bench, lanes=lanes)
    said = io.StringIO()
    trials = go_on(setup, create(setup, tmp_path / "study"), Display(said), engine=engine, trials=6)
    assert engine.most == lanes and engine.free == lanes
    assert len(trials) == 6 and "RUNNING" not in {trial["state"] for trial in trials}
    assert trials[-1]["control_of"] is not None
    ends = [
        said.getvalue().rindex(f"trial {number} {word}")
        for number in range(5)
        for word in ("complete", "pruned")
        if f"trial {number} {word}" in said.getvalue()
    ]
    assert len(ends) == 5 and said.getvalue().index("trial 5 starts") > max(ends)
    assert sum(trial["samples"] for trial in trials) <= 6 * 48


def test_a_noise_that_is_not_finite_ends_no_search(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, noise in enumerate((float("nan"), float("inf"))):
        monkeypatch.setattr("autorank.lane.standard_error", lambda *_, noise=noise: noise)
        trials = go_on(setup, create(setup, tmp_path / str(number) / "study"), trials=2)
        assert [trial["state"] for trial in trials] == ["COMPLETE"] * 2
        assert {score["noise"] for score in trials[0]["scores"].values()} == {0.0}


class Forgetful(LocalEngine):
    """An engine that loses a trial, and hands another one back, as one on a cluster may."""

    def __init__(self, setup: Setup, lose: tuple[int, int], pause: tuple[int, int]) -> None:
        super().__init__(setup.bench)
        self._lose, self._pause = {lose}, {pause}

    def advance(self) -> Event:
        event = super().advance()
        place = event.number, getattr(event, "step", 0)
        if place in self._lose and isinstance(event, Report) and event.value is None:
            self._lose.clear()
            self.close()
            return Lost(event.number)
        if place in self._pause and isinstance(event, Report) and event.value is None:
            self._pause.clear()
            return Paused(event.number, self.pause(event.number))
        return event


def test_a_trial_that_an_engine_loses_or_hands_back_goes_on(whole: Any, setup: Setup, tmp_path: Path) -> None:
    for name, lose in (("from the start", (0, 4)), ("from a rung", (0, 8))):
        folder, said = create(setup, tmp_path / name.replace(" ", "-")), io.StringIO()
        engine = Forgetful(setup, lose, (1, 5))
        assert outline(go_on(setup, folder, Display(said), engine=engine)) == whole[0]
        assert ("trial 0 was interrupted and starts over" in said.getvalue()) == (lose[1] < 6)
        assert "trial 1 goes on · step 5 of 12" in said.getvalue()


# -- nothing is lost -------------------------------------------------------------------------------


def watch_writes(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Call `act` before and after everything that changes the disk."""

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **settings: Any) -> Any:
            act(f"before {name}")
            found = real(*arguments, **settings)
            act(f"after {name}")
            return found

        monkeypatch.setattr(owner, name, watched)

    for name in ("rename", "replace", "fsync"):
        wrap(os, name)
    wrap(shutil, "rmtree")
    for owner, name in ((Path, "mkdir"), (Path, "write_text"), (Path, "unlink")):
        wrap(owner, name)
    monkeypatch.setattr("autorank.lane.save_file", _then(act, "tensors", "autorank.lane.save_file"))


def _then(act: Callable[[str], None], name: str, path: str) -> Callable[..., Any]:
    from safetensors.torch import save_file

    def watched(*arguments: Any, **settings: Any) -> Any:
        act(f"before {name}")
        save_file(*arguments, **settings)
        act(f"after {name}")

    return watched


def meaning(folder: Path) -> str:
    """What a process that opens the study finds, leftovers swept: two of a kind go on alike."""
    store = ArtifactStore(folder / "artifacts")
    states = {key: store.digest(key) for key in store.names()}
    for digest in states.values():
        digest.pop("progress.json", None)  # holds seconds
    database = [path.read_bytes().hex() for path in sorted(folder.glob("study.db*"))]
    return json.dumps([database, states], sort_keys=True)


def test_a_kill_at_any_write_changes_nothing(
    whole: Any, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk as it is at each write, and at each commit, is what a kill there would leave."""
    folder = create(setup, tmp_path / "run" / "study")
    found: dict[str, Path] = {}
    seen: set[Any] = set()
    writes = 0
    busy = False

    def keep(what: str) -> None:
        nonlocal writes, busy
        if busy:
            return
        writes += 1
        stats = {path: path.lstat() for path in folder.rglob("*")}
        disk = tuple(sorted((str(path), s.st_size, s.st_mtime_ns) for path, s in stats.items()))
        if disk in seen:
            return
        seen.add(disk)
        busy = True
        copy = tmp_path / f"at-{writes}" / "study"
        shutil.copytree(folder, copy)
        found.setdefault(meaning(copy), copy)
        busy = False

    def committed(_: object) -> None:
        keep("commit")

    event.listen(Database, "commit", committed)
    try:
        with monkeypatch.context() as patch:
            watch_writes(patch, keep)
            assert outline(go_on(setup, folder)) == whole[0]
    finally:
        event.remove(Database, "commit", committed)
    assert writes > 400
    assert len(found) > 40
    # What each of these writes left was opened; some of the states are gone on from here, and
    # states at random instants by the script in studies/experiments/kills.
    for copy in list(found.values())[3::8]:
        assert outline(go_on(setup, copy)) == whole[0], copy
        assert contents(copy) == contents(whole[2])


@pytest.mark.parametrize("place", ["autorank.lane.save_file", "autorank.adapter.save_file", "study.db"])
def test_a_disk_that_is_full_ends_the_search_with_one_message_and_loses_nothing(
    whole: Any, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = create(setup, tmp_path / "study")
    real, calls = (sqlite3.connect if place == "study.db" else safetensors.torch.save_file), 0

    def full(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if place == "study.db":
            connection = real(*arguments, **settings)
            if calls > 60:
                connection.execute(f"PRAGMA max_page_count = {(folder / place).stat().st_size // 4096}")
            return connection
        if calls == (7 if "lane" in place else 2):  # in the words of its own library
            raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(*((database.sqlite3, "connect") if place == "study.db" else (place,)), full)  # type: ignore[call-overload]
        with pytest.raises(FileError, match=r"(No space left on device|is full).*[\d,]+ bytes") as refused:
            go_on(setup, folder)
    assert str(folder) in str(refused.value)
    assert outline(go_on(setup, folder)) == whole[0]


def interrupted_at(number: int, step: int, signals: list[signal.Signals]) -> Display:
    """A display that sends this process signals when a trial comes to a step."""

    class Sender(Display):
        def step(self, trial: int, at: int, *rest: Any) -> None:
            super().step(trial, at, *rest)
            if (trial, at) == (number, step) and signals:
                os.kill(os.getpid(), signals.pop(0))

    return Sender(io.StringIO())


@pytest.mark.parametrize(("step", "saved"), [(4, 4), (6, 6)])
def test_the_first_ctrl_c_saves_what_is_on_the_lane(
    whole: Any, setup: Setup, tmp_path: Path, step: int, saved: int
) -> None:
    folder = create(setup, tmp_path / "study")
    display = interrupted_at(0, step, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        go_on(setup, folder, display)
    assert LaneState.load(folder / "artifacts" / "lane-0").step == saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trial = trials_of(folder)[0]
    # An evaluation that is due is made before the state is stored.
    assert trial["state"] == "RUNNING" and set(trial["scores"]) == {s for s in ("6",) if saved >= 6}
    assert outline(go_on(setup, folder)) == whole[0]


@pytest.mark.parametrize("step", [4, 6])
def test_lanes_that_are_interrupted_are_all_saved_and_go_on_on_fewer(
    setup: Setup, tmp_path: Path, step: int
) -> None:
    folder = create(setup, tmp_path / "study")
    with pytest.raises(KeyboardInterrupt):
        go_on(
            setup,
            folder,
            interrupted_at(1, step, [signal.SIGINT]),
            engine=LocalEngine(setup.bench, lanes=3),
            trials=6,
        )
    assert {LaneState.load(folder / "artifacts" / f"lane-{number}").step for number in range(3)} == {step}
    assert [trial["steps"] for trial in trials_of(folder)] == ([step] * 3 if step == 6 else [None] * 3)
    trials = go_on(setup, folder, engine=LocalEngine(setup.bench, lanes=2), trials=6)
    assert len(trials) == 6 and "RUNNING" not in {trial["state"] for trial in trials}
    assert all(trial["samples"] <= 48 and trial["samples"] == 4 * trial["steps"] for trial in trials)
    assert not lora_layers(setup.base.model)


def test_a_second_ctrl_c_stops_where_it_is(
    whole: Any, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(setup, tmp_path / "study")
    save = Shelf.save_lane

    def again(shelf: Shelf, number: int, state: LaneState, progress: Any) -> None:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second signal came too late")
        save(shelf, number, state, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "save_lane", again)
        with pytest.raises(KeyboardInterrupt):
            go_on(setup, folder, interrupted_at(0, 4, [signal.SIGINT]))
    assert contents(folder) == set()
    assert outline(go_on(setup, folder)) == whole[0]


# -- patience --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient(setup: Setup) -> Setup:
    """The same with a score at every step from the first rung on, that has two to get better."""
    more = {"evaluations": 7, "patience": 2, "metric": "token_accuracy"}
    return prepare(setup.config.model_copy(update=more), Display.silent())


@pytest.fixture(scope="module")
def ended(patient: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str, list[Path]]:
    """A study with patience: its trials, what was said, and the disk just before each early end."""
    folder, said, copies = create(patient, tmp_path_factory.mktemp("patient") / "study"), io.StringIO(), []
    finish, save_adapter = LocalEngine.finish, Shelf.save_adapter

    def keep() -> None:
        copies.append(tmp_path_factory.mktemp("copy") / "study")
        shutil.copytree(folder, copies[-1])

    def watched(engine: LocalEngine, number: int) -> None:
        keep()
        finish(engine, number)

    def stored(shelf: Shelf, *arguments: Any, **settings: Any) -> Any:
        digest = save_adapter(shelf, *arguments, **settings)
        keep()
        return digest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "finish", watched)
        patch.setattr(Shelf, "save_adapter", stored)
        trials = go_on(patient, folder, Display(said))
    return outline(trials), said.getvalue(), copies


def test_a_trial_that_gets_no_better_ends_early_with_its_best(ended: Any, patient: Setup) -> None:
    trials, said, _ = ended
    recipe = patient.bench.recipe
    assert recipe.settled == recipe.schedule.moves[-1] and recipe.patience == 2
    early = [trial for trial in trials if trial["state"] == "COMPLETE" and trial["steps"] < 12]
    assert early and len(early) < len(trials)
    for trial in trials:
        scores = {int(step): score["value"] for step, score in trial["scores"].items()}
        held = [
            stalled(
                {step: value for step, value in scores.items() if step <= last},
                direction="maximize", patience=2, settled=recipe.settled,
            )
            for last in sorted(scores)
        ]  # fmt: skip
        # It ends at the first step at which it may, and not before.
        assert not any(held[:-1]) and (trial in early) == (held[-1] and trial["steps"] < 12)
        assert trial["samples"] == 4 * trial["steps"]
    for trial in early:
        assert trial["stopped_early"] == {"step": trial["steps"], "of": 12}
        assert trial["value"] == max(score["value"] for score in trial["scores"].values())
        assert trial["scores"][str(trial["best_step"])]["value"] == trial["value"]
        assert max(map(int, trial["scores"])) == trial["steps"] > trial["best_step"]
        assert re.search(
            rf"trial {trial['number']} complete .*stopped early at step {trial['steps']} of 12", said
        )
    assert not any("stopped_early" in trial for trial in trials if trial not in early)


def test_a_kill_before_an_early_end_is_stored_changes_nothing(
    ended: Any, patient: Setup, tmp_path: Path
) -> None:
    trials, _, copies = ended
    assert len(copies) >= 2
    for number, copy in enumerate(copies):
        folder = tmp_path / str(number) / "study"
        shutil.copytree(copy, folder)
        assert outline(go_on(patient, folder)) == trials, copy


def test_a_trial_whose_patience_has_ended_is_not_judged_by_its_peers(
    ended: Any, patient: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trials, _, copies = ended
    shutil.copytree(copies[0], tmp_path / "study")
    lost = [trial["number"] for trial in trials_of(tmp_path / "study") if trial["state"] == "RUNNING"]
    monkeypatch.setattr("autorank.coordinator.verdict", lambda *_, **__: "lost")
    found = go_on(patient, tmp_path / "study", trials=len(lost))
    early = next(trial for trial in trials if "stopped_early" in trial)
    assert early["number"] in lost and found[early["number"]]["state"] == "COMPLETE"
    assert outline(found)[early["number"]] == early


def test_a_trial_whose_patience_ends_in_an_interruption_ends_when_the_study_goes_on(
    ended: Any, patient: Setup, tmp_path: Path
) -> None:
    trials, _, _ = ended
    trial = next(trial for trial in trials if "stopped_early" in trial)
    folder = create(patient, tmp_path / "study")
    with pytest.raises(KeyboardInterrupt):
        go_on(patient, folder, interrupted_at(trial["number"], trial["steps"], [signal.SIGINT]))
    found = trials_of(folder)[trial["number"]]
    assert found["state"] == "RUNNING" and found["steps"] == trial["steps"]
    assert outline(go_on(patient, folder)) == trials


def test_lanes_side_by_side_end_early_too(patient: Setup, tmp_path: Path) -> None:
    engine = Counting(patient.bench, lanes=2)
    trials = go_on(patient, create(patient, tmp_path / "study"), engine=engine, trials=6)
    assert engine.most == 2 and engine.free == 2 and not lora_layers(patient.base.model)
    assert len(trials) == 6 and "RUNNING" not in {trial["state"] for trial in trials}
    assert any("stopped_early" in trial for trial in trials)


# -- limits ------------------------------------------------------------------------------------------


def stopped(folder: Path) -> list[str]:
    with Study.open_read_only(folder) as study:
        return [event["why"] for event in study.events() if event["kind"] == "stopped"]


@pytest.mark.parametrize("lanes", [1, 2])
def test_memory_that_is_never_there_ends_the_search_with_advice_and_it_goes_on_elsewhere(
    setup: Setup, tmp_path: Path, lanes: int
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    folder, said = create(setup, tmp_path / "study"), io.StringIO()
    hook = setup.base.model.register_forward_pre_hook(full)
    try:
        trials = go_on(setup, folder, Display(said), engine=LocalEngine(setup.bench, lanes=lanes), trials=9)
    finally:
        hook.remove()
    assert [trial["state"] for trial in trials] == ["FAIL"] * len(trials)
    assert 3 <= len(trials) < 3 + lanes and stopped(folder) == ["failures"]
    assert all("out of memory" in trial["reason"] for trial in trials)
    text = " ".join(said.getvalue().split())
    assert "3 trials in a row failed alike: no further trial starts; lower --batch-size, --max-length" in text
    # Where there is room for them it goes on, with smaller ones than those that failed.
    least = min(trial["trainable_parameters"] for trial in trials)
    more = go_on(setup, folder, trials=len(trials) + 2)[len(trials) :]
    if least == min(sum(layer.cost for layer in group) for group in setup.space.groups.values()):
        assert not more
    else:
        assert "COMPLETE" in {trial["state"] for trial in more}
        assert max(trial["trainable_parameters"] for trial in more) < least


@pytest.mark.parametrize("samples", [48, 150])
def test_samples_are_never_exceeded_and_the_control_has_its_share(
    setup: Setup, tmp_path: Path, samples: int
) -> None:
    folder = create(setup, tmp_path / "study")
    trials = go_on(setup, folder, trials=50, samples=samples)
    assert sum(trial["samples"] for trial in trials) <= samples
    assert stopped(folder) == ["samples"]
    assert "RUNNING" not in {trial["state"] for trial in trials}
    if samples >= 100:
        assert trials[-1]["control_of"] is not None and trials[-1]["state"] == "COMPLETE"
    # The limit still holds when the study is gone on with, and a higher one lets it go on.
    assert outline(go_on(setup, folder, trials=50, samples=samples)) == outline(trials)
    assert len(go_on(setup, folder, trials=len(trials) + 1, samples=10_000)) == len(trials) + 1


@pytest.mark.parametrize("lanes", [2, 3, 6])
@pytest.mark.parametrize("samples", [200, 260, 400])
def test_samples_are_not_exceeded_by_lanes_either(
    setup: Setup, tmp_path: Path, lanes: int, samples: int
) -> None:
    folder = create(setup, tmp_path / "study")
    engine = LocalEngine(setup.bench, lanes=lanes)
    trials = go_on(setup, folder, trials=50, samples=samples, engine=engine)
    assert sum(trial["samples"] for trial in trials) <= samples and stopped(folder) == ["samples"]
    assert "RUNNING" not in {trial["state"] for trial in trials}
    assert "COMPLETE" in {trial["state"] for trial in trials}


def test_failures_count_on_after_a_kill_and_anew_after_they_ended_a_search(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter(["20 MiB", "1.5 GiB", "3 KiB", "7 MiB", "9 GiB"])

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory: {size}")

    tell = Study.tell_failed

    def killed(study: Study, number: int, *more: Any) -> Any:
        nonlocal size
        size = next(sizes)  # of the next trial
        record = tell(study, number, *more)
        if number == 1:
            raise KeyboardInterrupt
        return record

    size, folder = "12 MiB", create(setup, tmp_path / "study")
    hook = setup.base.model.register_forward_pre_hook(full)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Study, "tell_failed", killed)
            with pytest.raises(KeyboardInterrupt):
                go_on(setup, folder, trials=9)
        trials = go_on(setup, folder, trials=9)
    finally:
        hook.remove()
    assert [trial["state"] for trial in trials] == ["FAIL"] * 3 and stopped(folder) == ["failures"]
    assert "COMPLETE" in {trial["state"] for trial in go_on(setup, folder, trials=5)}


def test_a_target_ends_the_search_when_its_trial_and_the_control_are_done(
    whole: Any, setup: Setup, tmp_path: Path
) -> None:
    target = max(score["value"] for trial in whole[0] for score in trial["scores"].values())
    folder = create(setup, tmp_path / "study")
    trials = go_on(setup, folder, target=target + 1.0)  # any first score
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 2
    assert trials[1]["control_of"] == 0 and stopped(folder) == ["target"]


def test_a_plateau_counts_trials_without_a_better_score(setup: Setup, tmp_path: Path) -> None:
    folder = create(setup, tmp_path / "study")
    trials = go_on(setup, folder, trials=30, plateau=2)
    ordinary = [trial for trial in trials if trial["control_of"] is None]
    best = min(ordinary, key=lambda t: min(s["value"] for s in t["scores"].values()))
    assert len(ordinary) == best["number"] + 3 and stopped(folder) == ["plateau"]
    assert trials[-1]["control_of"] == best["number"]


def test_when_the_time_is_up_the_lane_is_saved_at_the_next_step(
    whole: Any, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(setup, tmp_path / "study")
    said = io.StringIO()
    with monkeypatch.context() as patch:
        times = iter(range(10**6))
        patch.setattr("autorank.coordinator.time.monotonic", lambda: float(next(times)))
        trials = go_on(setup, folder, Display(said), time_s=30.0)
    assert [trial["state"] for trial in trials] == ["RUNNING"]
    assert stopped(folder) == ["time"] and "the time is up" in said.getvalue()
    assert 0 < LaneState.load(folder / "artifacts" / "lane-0").step < 12
    assert outline(go_on(setup, folder)) == whole[0]


@pytest.mark.parametrize("lanes", [1, 4])
def test_the_time_limit_leaves_room_for_the_control(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    folder = create(setup, tmp_path / "study")
    passes = 0
    train = local.train_lanes

    def counted(bench: Bench, lanes: list[Lane], **settings: Any) -> Any:
        nonlocal passes
        passes += 1
        return train(bench, lanes, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(local, "train_lanes", counted)  # a clock that shows the passes that were made
        patch.setattr("autorank.coordinator.time.monotonic", lambda: float(passes))
        engine = LocalEngine(setup.bench, lanes=lanes)
        trials = go_on(setup, folder, trials=200, time_s=60.0, engine=engine)
    assert 48 < passes <= 60 and stopped(folder) == ["time"]
    control = trials[-1]
    assert control["control_of"] is not None and control["state"] == "COMPLETE"
    # Those that wait are not given up: the next process has as much time again.
    assert lanes > 1 or {trial["state"] for trial in trials} >= {"COMPLETE", "RUNNING"}


def test_a_space_in_which_everything_was_tried_ends_the_search_early(setup: Setup, tmp_path: Path) -> None:
    space = {
        "rank": 1, "scaling": 2.0, "learning_rate": [1e-2, 2e-2], "target_modules": "attention",
        "allocation": ["uniform", "adaptive"],
    }  # fmt: skip
    config = setup.config.model_copy(update={"space": SpaceConfig.model_validate(space)})
    small = prepare(config, Display.silent())
    folder, said = create(small, tmp_path / "study"), io.StringIO()
    trials = go_on(small, folder, Display(said), trials=30)
    params = [json.dumps(trial["params"]) for trial in trials if trial["control_of"] is None]
    assert len(params) == len(set(params)) == 4 and len(trials) == 5
    assert "everything in the space was tried" in said.getvalue() and stopped(folder) == ["exhausted"]
    assert outline(go_on(small, folder, trials=30)) == outline(trials)


# -- bounded disk ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ranks stayed as they were")
@pytest.mark.parametrize("budget", [3000, 130])
def test_the_disk_holds_the_best_and_what_goes_on_and_never_more_than_was_forecast(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    if budget < 3000:
        config = setup.config.model_copy(update={"budget": budget})
        setup = measure_gains(prepare(config, Display.silent()), Display.silent())
    folder = create(setup, tmp_path / "study")
    peak = 0

    def measure(what: str) -> None:
        nonlocal peak
        peak = max(peak, sum(path.lstat().st_size for path in folder.rglob("*") if path.exists()))

    with monkeypatch.context() as patch:
        watch_writes(patch, measure)
        trials = go_on(setup, folder)
    assert peak < forecast(setup.bench, setup.space, trials=TRIALS, keep=KEEP)
    numbers = {int(key.removeprefix("trial-")) for key in contents(folder)}
    best = min((t for t in trials if t["state"] == "COMPLETE"), key=lambda t: t["value"])
    assert best["number"] in numbers and len(numbers) <= KEEP + 2
