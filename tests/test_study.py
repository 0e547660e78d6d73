from __future__ import annotations

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from study_world import BUDGET, make_space, make_study, next_slot, record, run, score, story

from autorank.errors import AllTrialsFailed, StudyError
from autorank.record import Score, TrialRecord, TrialSlot
from autorank.study import Study, list_studies, study_folder

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}


@pytest.fixture
def study(tmp_path: Path) -> Any:
    with make_study(tmp_path / "study") as study:
        yield study


def take(study: Study, total: int = 100) -> TrialSlot:
    slot = study.ask(total)
    assert slot is not None
    return slot


def again(study: Study) -> TrialSlot:
    """The trial that a kill interrupted."""
    (slot,) = study.unfinished()
    return slot


def complete(study: Study, value: float | None = None, **more: Any) -> TrialRecord:
    slot = take(study)
    told = {**record(study, slot.params), **more}
    return study.tell_complete(slot.number, score(slot.params) if value is None else value, told)


# -- asking and telling --------------------------------------------------------------------------


def test_a_study_ends_with_exactly_the_trials_asked_for(study: Study) -> None:
    rows = run(study, 6)
    assert [row[0] for row in rows] == list(range(6))
    assert {row[3] for row in rows} == {"COMPLETE"}
    assert study.ask(6) is None
    assert rows[5][6] is not None


def test_a_larger_total_adds_slots_and_a_control_of_its_own(study: Study) -> None:
    first = run(study, 4)
    rows = run(study, 8)
    assert [row[:7] for row in rows[:4]] == [row[:7] for row in first]
    assert [row[0] for row in rows] == list(range(8))
    best = study.best()
    assert best is not None and study.pair_of(best) is not None


def test_one_trial_is_the_default_and_two_are_the_default_and_its_control(tmp_path: Path) -> None:
    with make_study(tmp_path / "one") as one, make_study(tmp_path / "two") as two:
        assert [row[5] for row in run(one, 1)] == [one.space.startup()[0]]
        default, control = run(two, 2)
        assert control[6] == 0
        assert (default[2], default[5].rank) == (control[2], control[5].rank)
        assert {default[5].allocation, control[5].allocation} == {"uniform", "adaptive"}


def test_the_last_slot_can_come_early(study: Study) -> None:
    complete(study)
    slot = study.ask_control()
    assert slot is not None and slot.control_of == 0
    study.tell_complete(slot.number, 0.5, record(study, slot.params))
    assert study.ask_control() is None


def test_a_minimised_study_pairs_the_least(tmp_path: Path) -> None:
    with make_study(tmp_path / "s", direction="minimize") as study:
        for value in (3.0, 1.0, 2.0):
            complete(study, value)
        slot = take(study, 4)
        assert slot.control_of == 1
        best = study.best()
        assert best is not None and best.number == 1


def test_several_trials_may_run_at_once(study: Study) -> None:
    slots = [take(study) for _ in range(5)]
    assert [slot.number for slot in slots] == list(range(5))
    assert study.unfinished() == slots
    assert {r.state for r in study.trials()} == {"RUNNING"}


def test_what_is_told_is_what_is_read(study: Study) -> None:
    slot = take(study)
    plan = study.space.starting_plan(slot.params)
    layer = plan.layers[0].name
    told = study.tell_complete(
        slot.number,
        0.75,
        {
            "trainable_parameters": plan.parameters,
            "head_parameters": 10,
            "ranks": {**plan.ranks, layer: 0},
            "steps": 7,
            "samples": 224,
            "seconds": 1.5,
            "metrics": {"accuracy": 0.75, "loss": math.nan},
            "artifact": {"adapter.safetensors": "ab12"},
        },
    )
    assert told == study.trial(0) == study.trials()[0]
    assert (told.state, told.value, told.head_parameters, told.seconds) == ("COMPLETE", 0.75, 10, 1.5)
    assert told.ranks[layer] == 0 and told.starting_ranks[layer] == slot.params.rank
    assert told.metrics == {"accuracy": 0.75, "loss": None}
    assert told.extra == {"artifact": {"adapter.safetensors": "ab12"}}
    assert json.loads(json.dumps(told.to_json(), allow_nan=False))["steps"] == 7


def test_telling_twice_changes_nothing(study: Study) -> None:
    first = complete(study, 0.5)
    assert study.tell_complete(0, 0.9, {"trainable_parameters": 1}) == first
    assert study.tell_failed(0, "late") == first
    assert study.tell_pruned(0, {}) == first
    assert study.trials() == [first]


def test_ranks_of_unknown_layers_are_refused_before_they_are_stored(study: Study) -> None:
    slot = take(study)
    with pytest.raises(StudyError, match=r"base_model\.x"):
        study.tell_complete(slot.number, 0.5, {"trainable_parameters": 1, "ranks": {"base_model.x": 1}})
    assert study.trial(0).state == "RUNNING"


def test_there_is_no_trial_beyond_those_there_are(study: Study) -> None:
    for number in (0, -1, 7):
        with pytest.raises(StudyError, match=f"no trial {number}: it has none yet"):
            study.trial(number)
    complete(study)
    with pytest.raises(StudyError, match="no trial 1: it has 0 to 0"):
        study.tell_failed(1, "x")


def test_the_first_report_of_a_step_stands_and_tells_what_the_trial_cost(study: Study) -> None:
    one, two = take(study), take(study)
    first = Score(0.5, 0.02, samples=80, tokens=900, evaluation_samples=30, spent=80)
    study.report(one.number, 10, first)
    study.report(one.number, 10, Score(0.6))
    study.report(two.number, 10, Score(math.nan))
    assert study.trial(0).scores == {10: first} and study.trial(1).scores == {}
    later = Score(0.4, 0.03, samples=160, tokens=1800, evaluation_samples=60, spent=240)
    study.report(one.number, 20, later)
    running = study.trial(0)
    assert running.scores == {10: first, 20: later}
    assert (running.steps, running.samples, running.tokens, running.evaluation_samples) == (20, 160, 1800, 60)
    ended = study.tell_pruned(one.number, {"seconds": 2.0})
    assert (ended.steps, ended.samples, ended.value) == (20, 160, 0.4)
    assert study.to_json()["cost"] == {
        "samples": 160, "tokens": 1800, "evaluation_samples": 60, "curve": [[80, 0.5]],
    }  # fmt: skip


def test_a_trial_that_is_paused_is_proposed_on_by_its_score(tmp_path: Path) -> None:
    """Optuna's TPE takes RUNNING trials for bad ones; with a score it is a trial like any other."""
    proposals = {}
    for name, value in (("none", None), ("good", 0.9), ("bad", 0.1)):
        with make_study(tmp_path / name) as study:
            for number in range(3):
                slot = take(study)
                if number < 2:
                    study.report(slot.number, 5, Score(0.5))
                    study.tell_pruned(slot.number, {})
                elif value is not None:
                    study.report(slot.number, 5, Score(value))
            proposals[name] = take(study).params
            assert study.trial(2).state == "RUNNING"
    assert proposals["good"] != proposals["bad"] == proposals["none"]


def test_a_pruned_trial_has_its_last_report_and_never_wins(study: Study) -> None:
    slot = take(study)
    for step, value in ((5, 0.99), (10, 0.98)):
        study.report(slot.number, step, Score(value))
    pruned = study.tell_pruned(slot.number, record(study, slot.params))
    assert (pruned.state, pruned.value, pruned.steps) == ("PRUNED", 0.98, 10)
    assert study.best() is None
    assert complete(study, 0.1) == study.best()
    bare = study.tell_pruned(take(study).number, {})
    assert (bare.state, bare.value) == ("PRUNED", None)


# -- who can win ---------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_failure(tmp_path: Path, direction: str, value: float) -> None:
    with make_study(tmp_path / "s", direction=direction) as study:
        failed = complete(study, value)
        assert (failed.state, failed.value, failed.steps) == ("FAIL", None, 10)
        assert failed.reason is not None
        assert failed.reason.startswith(f"the value is {value} after 10 steps (rank 8, scaling 2.0, ")
        assert "learning_rate 0.002" in failed.reason
        finite = complete(study, 0.0)
        assert study.best() == study.winner() == finite


def test_a_trial_over_the_budget_is_a_failure_and_never_wins(study: Study) -> None:
    over = complete(study, 1.0, trainable_parameters=BUDGET + 1)
    assert over.state == "FAIL"
    assert over.reason == "over budget: 4,001 trainable parameters, the budget is 4,000"
    with pytest.raises(StudyError, match="over its budget of 4,000 parameters; the smallest has 4,001"):
        study.winner()
    exact = complete(study, 0.1, trainable_parameters=BUDGET)
    assert study.winner() == exact


def test_a_stored_trial_over_the_budget_or_infinite_is_not_chosen_either(study: Study) -> None:
    complete(study, 0.5)
    complete(study, 0.6)
    complete(study, 0.4)
    with sqlite3.connect(study.folder / "study.db") as connection:
        connection.execute(
            "UPDATE trial_user_attributes SET value_json = '{\"trainable_parameters\": 4001}' "
            "WHERE key = 'record' AND trial_id = 1"
        )
        connection.execute("UPDATE trial_values SET value = 9, value_type = 'FINITE' WHERE trial_id = 1")
        connection.execute("UPDATE trial_values SET value = NULL, value_type = 'INF_POS' WHERE trial_id = 2")
    connection.close()
    with Study.open_read_only(study.folder) as reader:
        assert [r.value for r in reader.trials()] == [9.0, math.inf, 0.4]
        assert reader.winner().number == 2


def test_when_every_trial_failed_the_reasons_are_counted(study: Study) -> None:
    for reason in ("no room for 2 GiB", "loss is nan at step 3", "no room for 5 GiB"):
        study.tell_failed(take(study).number, reason)
    said = r"all 3 trials .* failed: 2 x no room for 2 GiB; 1 x loss is nan at step 3; mend"
    with pytest.raises(AllTrialsFailed, match=said):
        study.winner()


def test_without_a_finished_trial_there_is_no_winner(study: Study) -> None:
    with pytest.raises(StudyError, match="autorank resume study"):
        study.winner()
    take(study)
    with pytest.raises(StudyError, match="no finished trial"):
        study.winner()


# -- interruptions -------------------------------------------------------------------------------


def test_a_study_reopened_at_every_point_is_the_same_study(tmp_path: Path) -> None:
    with make_study(tmp_path / "a", seed=3) as study:
        expected = run(study, 6)
    make_study(tmp_path / "b", seed=3).close()
    for number in range(6):
        with Study.open(tmp_path / "b") as study:
            first = take(study, 6)
            study.report(number, 1, Score(score(first.params) - 0.1))
        with Study.open(tmp_path / "b") as study:
            assert again(study) == first and first.number == number
            # A run that is repeated says what it said before.
            for step in (1, 2):
                study.report(number, step, Score(score(first.params) - 0.1 / step))
        with Study.open(tmp_path / "b") as study:
            assert again(study) == first
            study.tell_complete(number, score(first.params), record(study, first.params))
    with Study.open(tmp_path / "b") as study:
        assert story(study) == expected
        assert study.ask(6) is None


def test_what_was_read_before_the_lease_was_taken_is_read_again(tmp_path: Path) -> None:
    with make_study(tmp_path / "s") as before:
        with Study.open(tmp_path / "s") as other:
            complete(other)
        assert take(before).number == 1


def test_an_interrupted_trial_is_gone_on_with_even_beyond_the_total(tmp_path: Path) -> None:
    with make_study(tmp_path / "s") as study:
        run(study, 2)
        assert take(study, 3).number == 2
    with Study.open(tmp_path / "s") as study:
        assert study.ask(1) is None
        assert again(study).number == 2
        study.tell_failed(2, "x")
        assert next_slot(study, 1) is None
        assert [r.state for r in study.trials()] == ["COMPLETE", "COMPLETE", "FAIL"]


KILL_EVERYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from study_world import make_study, run, story
from autorank.study import Study

folder, total, stride = Path(sys.argv[1]), 4, int(sys.argv[2])

@event.listens_for(Engine, "connect")
def quick(connection, _):
    connection.execute("PRAGMA synchronous = OFF")  # a killed process needs no disk, only the system

def killed(job, moment):
    \"\"\"Do a job in a fork that kills itself at a statement or commit; whether it came to that.\"\"\"
    child = os.fork()
    if child == 0:
        seen = 0
        def tick(*_):
            nonlocal seen
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        for name in ("before_cursor_execute", "commit"):
            event.listen(Engine, name, tick)
        job()
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

def go_on(path):
    with Study.open(path) as study:
        run(study, total)

with make_study(folder / "whole", seed=5) as study:
    shutil.copytree(folder / "whole", folder / "start")
    expected = run(study, total)

made, moment = 0, 1
while killed(lambda: make_study(folder / f"new-{moment}", seed=5), moment):
    if (folder / f"new-{moment}").exists():
        made += 1
        Study.open(folder / f"new-{moment}").close()
    moment += stride

moments, moment = 0, 1
while True:
    path = folder / f"run-{moment}"
    shutil.copytree(folder / "start", path)
    if not killed(lambda: go_on(path), moment):
        break
    with Study.open(path) as study:
        left = [record.state for record in study.trials()]
        assert set(left[:-1]) <= {"COMPLETE"} and set(left[-1:]) <= {"COMPLETE", "RUNNING"}, left
        assert run(study, total) == expected, (moment, story(study))
    shutil.rmtree(path)
    moments, moment = moments + 1, moment + stride
drafts = len(list(folder.glob(".tmp-*")))
print(json.dumps({"made": made, "drafts": drafts, "moments": moments}))
"""


def test_a_kill_at_any_statement_or_commit_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        # Every 41st moment here; 1 in its place tries them all, in minutes.
        [sys.executable, "-W", "error", "-c", KILL_EVERYWHERE, str(tmp_path), "41"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    # Killed while the study was made: it was whole, or there is but a draft that nobody reads.
    assert outcome["drafts"] > 0
    assert outcome["moments"] > 6


ENDLESS = """
import sys
from pathlib import Path
from study_world import make_study, run

with make_study(Path(sys.argv[1]), seed=5) as study:
    print("open", flush=True)
    run(study, 100)
"""


def test_a_process_killed_from_outside_leaves_a_study_that_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path / "s")],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.send_signal(signal.SIGKILL)
    with Study.open(tmp_path / "s") as study, make_study(tmp_path / "whole", seed=5) as whole:
        begun = len(study.trials())
        assert begun < 100
        expected = [row[:7] for row in run(whole, begun + 3)]
        assert [row[:7] for row in run(study, begun + 3)] == expected
        assert study.ask(begun + 3) is None


# -- opening -------------------------------------------------------------------------------------


def test_a_changed_study_is_refused_and_the_same_one_goes_on(tmp_path: Path) -> None:
    with make_study(tmp_path / "s") as study:
        given = dict(study.fingerprint)
    Study.open(tmp_path / "s", given).close()
    with pytest.raises(StudyError, match=r"model \(stored m1, given m2\)"):
        Study.open(tmp_path / "s", {**given, "model": "m2"})


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_a_study_of_the_time_when_dropout_was_no_part_of_the_space_goes_on(
    tmp_path: Path, dropout: str
) -> None:
    space, folder = make_space(), tmp_path / "study"
    old = {"model": "m1", "seed": "0", "dropout": dropout, **space.fingerprint()}
    Study.create(
        folder, config={"name": "study", "trials": 6, "dropout": float(dropout)}, fingerprint=old,
        space=space, direction="maximize", metric="accuracy", seed=0,
    ).close()  # fmt: skip
    with make_study(tmp_path / "today", dropout=float(dropout)) as today:
        expected, given = run(today, 6), today.fingerprint
    with Study.open(folder, given) as study:
        assert {slot.dropout for slot in study.space.startup()} == {float(dropout)}
        assert run(study, 6) == expected
    with pytest.raises(StudyError, match=r"space.dropout \(stored"):
        Study.open(folder, {**given, "space.dropout": "0.3"})


def test_a_choice_added_on_resume_is_a_fingerprint_error(tmp_path: Path) -> None:
    with make_study(tmp_path / "s", target_modules=["mlp"]) as study:
        given = dict(study.fingerprint)
        run(study, 1)
    wider = make_space(target_modules=["mlp", "attention"]).fingerprint()
    with pytest.raises(StudyError, match=r"space.target_modules \(stored mlp, given mlp, attention\)"):
        Study.open(tmp_path / "s", {**given, **wider})


def test_a_name_that_exists_is_refused_and_the_study_is_untouched(tmp_path: Path) -> None:
    with make_study(tmp_path / "s") as study:
        run(study, 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    with pytest.raises(StudyError, match="autorank resume s"):
        make_study(tmp_path / "s")
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_reading_changes_nothing_and_works_while_another_writes(study: Study) -> None:
    run(study, 2)
    take(study)
    database = study.folder / "study.db"
    before = (database.read_bytes(), sorted(path.name for path in study.folder.iterdir()))
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM trials")
    with Study.open_read_only(study.folder) as reader:
        assert [r.state for r in reader.trials()] == ["COMPLETE", "COMPLETE", "RUNNING"]
        assert reader.to_json()["best"]["value"] == max(score(r.params) for r in reader.trials()[:2])
        # What a reader does stays in its copy.
        reader.tell_failed(2, "only here")
    writer.execute("ROLLBACK")
    writer.close()
    assert (database.read_bytes(), sorted(path.name for path in study.folder.iterdir())) == before
    assert study.trial(2).state == "RUNNING"


def test_config_result_and_events_are_kept(study: Study) -> None:
    assert study.config == {"name": "study", "trials": 6}
    assert study.result() is None
    study.set_result({"best": 1, "references": {"frozen_base": {"validation": {"accuracy": math.nan}}}})
    study.set_result({"best": 2, "references": {"frozen_base": {"validation": {"accuracy": 0.5}}}})
    study.log_event("time is up", seconds=3.0, bad=math.inf)
    study.log_event("resumed")
    with Study.open_read_only(study.folder) as reader:
        assert reader.result() == {
            "best": 2,
            "references": {"frozen_base": {"validation": {"accuracy": 0.5}}},
        }
        events = reader.events()
    assert [event["kind"] for event in events] == ["time is up", "resumed"]
    assert (events[0]["seconds"], events[0]["bad"]) == (3.0, None)


def test_a_whole_study_as_json_has_what_show_promises(study: Study) -> None:
    run(study, 2)
    study.set_result({"best": 0, "references": {"control": {"number": 1}}})
    facts = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert (facts["name"], facts["metric"], facts["direction"]) == ("study", "accuracy", "maximize")
    assert facts["budget"] == BUDGET
    assert [trial["number"] for trial in facts["trials"]] == [0, 1]
    assert facts["best"] in facts["trials"]
    assert facts["references"] == {"frozen_base": None, "uniform": None, "control": {"number": 1}}


def test_studies_are_listed_and_a_damaged_one_hides_no_other(tmp_path: Path) -> None:
    assert list_studies(tmp_path / "none") == []
    with make_study(tmp_path / "b") as study:
        run(study, 2)
        study.ask(9)
        best = study.winner().value
    make_study(tmp_path / "a").close()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.db").write_bytes(b"no database")
    (tmp_path / ".tmp-c-1").mkdir()
    (tmp_path / ".tmp-c-1" / "study.db").touch()
    (tmp_path / "notes").mkdir()
    with make_study(tmp_path / "scored") as study:
        run(study, 2)
        told = {"best": study.winner().number, "trials": 2, "references": {}}
        study.set_result({**told, "ended": 1})
        assert not study.is_scored() and not study.to_json()["scored"]
        study.set_result({**told, "ended": 2})
        assert study.to_json()["scored"]
    a, b, broken, scored = list_studies(tmp_path)
    assert [one["scored"] for one in (a, b, scored)] == [False, False, True]
    assert (a["name"], a["trials"], a["best"], a["error"]) == ("a", 0, None, None)
    assert (b["name"], b["trials"], b["best"]) == ("b", 3, best)
    assert b["states"] == {"COMPLETE": 2, "RUNNING": 1}
    assert broken["name"] == "broken" and "not a SQLite database" in broken["error"]


def test_a_network_file_system_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    monkeypatch.setattr("autorank.study._MOUNTS", mounts)
    with make_study(tmp_path / "s") as study:
        assert study.notes == ()
        mounts.write_text("/dev/sda1 / ext4 rw 0 0\n")
        assert study.notes == ()
        mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
        (note,) = study.notes
    assert "network file system (nfs4)" in note and str(tmp_path / "s") in note


def test_a_path_of_any_characters_will_do(tmp_path: Path) -> None:
    folder = tmp_path / "a {b} %20 ?c#d é" / "s"
    with make_study(folder) as study:
        run(study, 1)
    with Study.open_read_only(folder) as reader:
        assert len(reader.trials()) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "../s", "a/b", "-x", ".x", "a b", "x" * 65, "a\n"])
def test_names_cannot_lead_anywhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyError, match="no name of a study"):
        study_folder(tmp_path, name)
    assert study_folder(tmp_path, "a.b-c_1") == tmp_path / "a.b-c_1"


def test_optuna_reads_the_study_as_its_own(study: Study) -> None:
    rows = run(study, 4)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own = optuna.load_study(study_name="study", storage=f"sqlite:///{study.folder}/study.db")
    assert own.direction.name == "MAXIMIZE"
    assert [trial.value for trial in own.trials] == [row[4] for row in rows]
    assert own.best_trial.number == study.winner().number
    own._storage._backend.engine.dispose()  # type: ignore[attr-defined]


def test_nothing_is_printed_and_optunas_log_level_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(logging.INFO)
    with make_study(tmp_path / "s") as study:
        run(study, 5)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == logging.INFO


def test_importing_changes_no_log_level() -> None:
    script = (
        "import optuna; optuna.logging.set_verbosity(10); import autorank.study; "
        "print(optuna.logging.get_verbosity())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.stdout == "10\n"


def test_a_study_asks_the_sampler_that_its_configuration_names(tmp_path: Path) -> None:
    proposals = []
    for name in ("tpe", "gp"):
        with make_study(tmp_path / name) as study:
            path = study.folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "sampler": name}))
            for _ in range(3):
                complete(study)
            proposals.append(take(study).params)
    assert proposals[0] != proposals[1]
