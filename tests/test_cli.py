from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from autorank import config as config_module
from autorank.cli import app, main
from autorank.config import StudyConfig
from autorank.errors import CommandError
from autorank.preflight import EPOCHS
from autorank.study import Study

Cli = Callable[..., Any]

SEARCH_FLAGS = {
    "--samples", "--target", "--plateau", "--keep", "--lanes", "--columns", "--template",
    "--budget", "--model", "--data", "--task", "--trials", "--time", "--steps", "--epochs", "--batch-size",
    "--max-length", "--eval-fraction", "--name", "--studies-dir", "--target-modules", "--importance",
    "--metric", "--seed", "--device", "--dtype", "--strict", "--set", "--json", "--debug",
}  # fmt: skip
COMMANDS = {
    "search": SEARCH_FLAGS,
    "plan": SEARCH_FLAGS,
    "resume": {
        "--trials", "--time", "--samples", "--target", "--plateau", "--lanes", "--metric",
        "--trust-remote-code", "--studies-dir", "--json", "--debug",
    },
    "train": {
        "--steps", "--out", "--trial", "--data", "--metric", "--trust-remote-code", "--studies-dir", "--json",
        "--debug",
    },
    "show": {"--ranks", "--studies-dir", "--json", "--debug"},
    "export": {
        "--out", "--trial", "--budget", "--recover", "--format", "--config-only", "--metric",
        "--trust-remote-code", "--studies-dir", "--json", "--debug",
    },
    "evaluate": {
        "--data", "--split", "--columns", "--metric", "--no-writing", "--batch-size", "--device",
        "--trust-remote-code", "--json", "--debug",
    },
    "predict": {
        "--data", "--out", "--split", "--columns", "--max-new-tokens", "--batch-size", "--device",
        "--trust-remote-code", "--json", "--debug",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder, where nothing that should not be written goes unseen."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(outcome: Any, code: int, *, shown: bool = False) -> str:
    """The message of a command that failed as the contract says: one line, nothing else.

    With `shown` the command has told what it found before it failed.
    """
    assert outcome.code == code, (outcome.out, outcome.err)
    assert shown or outcome.out == ""
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: ")
    return str(last.removeprefix("error: "))


def nothing_written(folder: Path) -> bool:
    return not any(folder.iterdir())


# -- help ----------------------------------------------------------------------------------------


def test_the_commands_and_their_flags_are_those_of_the_design() -> None:
    group: Any = typer.main.get_command(app)
    flags = {
        name: {option for parameter in command.params for option in parameter.opts if option[:2] == "--"}
        for name, command in group.commands.items()
    }
    assert flags == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples(cli: Cli, command: str) -> None:
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert "Examples:" in outcome.out
    assert f"autorank {command}" in outcome.out


def test_no_command_at_all_is_a_wish_for_help(cli: Cli) -> None:
    outcome = cli()
    assert outcome.code == 0
    assert outcome.out == cli("--help").out
    assert all(command in outcome.out for command in COMMANDS)


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli("--version").out == "autorank 0.1.0\n"


def test_the_defaults_that_help_tells_are_those_of_a_configuration(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = re.findall(
        r"--(\S+) +\w+ +[^\n]*?(?:by default|a new study has) ([\d.]+)", cli("search", "--help").out
    )
    defaults = {key.replace("_", "-"): field.default for key, field in StudyConfig.model_fields.items()}
    told_of = ("trials", "batch-size", "max-length", "eval-fraction", "keep", "seed")
    expected = {key: defaults[key] for key in told_of}
    lanes = {"lanes": 1}  # on a CPU; StudyConfig has None, for the device decides
    assert {key: float(value.rstrip(".")) for key, value in told} == expected | lanes | {"epochs": EPOCHS}


def test_help_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "peft", "optuna", "datasets", "numpy", "yaml"]
    code = (
        "import sys; from autorank.cli import main; codes = [main([c, '--help']) for c in "
        f"{list(COMMANDS)}]; print(codes, [m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{[0] * len(COMMANDS)} []"


def test_what_other_libraries_say_of_themselves_is_not_told(cli: Cli) -> None:
    cli("--version")
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "autorank", "search", "--budget", "2X"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: budget '2X' is not understood")


# -- bad commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("serach", "No such command 'serach'"),
        ("search --budgt 2M", "No such option: --budgt"),
        ("search --budget", "'--budget' requires an argument"),
        ("search --trials many", "'--trials'"),
        ("search a.yaml b.yaml", "unexpected extra argument"),
        ("search --lane-count 2", "No such option: --lane-count"),
        ("search --timeout 5", "No such option: --timeout (Possible options: --time)"),
        ("plan --learning-rate 5", "--learning-rate: do you mean --set space.learning_rate=VALUE?"),
        ("search --lora-alpha 5", "--lora-alpha: do you mean --set space.scaling=VALUE?"),
        ("resume some --lr 5", "No such option: --lr"),
        ("export name", "Missing option '--out'"),
        ("resume", "Missing argument 'NAME'"),
        ("search missing.yaml", "no such file"),
        ("search --model a", "model is 'a' but no data is named"),
        ("search --data a", "data is 'a' but no model is named"),
        ("search --model a --data b", "no budget is named"),
        ("search --steps 5 --epochs 1", "steps 5 and epochs 1.0 exclude each other"),
        ("search --trials 0", "trials is 0: it must be at least 1"),
        ("search --trials -2", "trials is -2: it must be at least 1"),
        ("search --steps 0", "steps is 0"),
        ("search --time 0", "time '0' cannot be used"),
        ("search --time -5", "time '-5' cannot be used"),
        ("search --eval-fraction 1.5", "eval_fraction is 1.5"),
        ("search --name ../up", "name '../up' cannot be used"),
        ("search --importance magic", "importance is 'magic'"),
        ("search --set trails=3", "trails is not a setting: do you mean trials?"),
        ("search --set space.scaling=-1", "scaling -1 must be above 0"),
        ("search --set min_rank=4 --set max_rank=2", "min_rank 4 is above max_rank 2"),
        ("search --set schedule.warmup=0.7", "warmup 0.7 leaves no time for moves"),
        ("plan --budget 0.5%", "budget '0.5%' is not understood"),
        ("resume some --trials 0", "trials is 0: it must be at least 1"),
        ("resume some --time 0s", "time '0s' cannot be used"),
        ("export some --out dir --budget 2X", "budget '2X' is not understood"),
        ("export some --out dir --recover 5", "--recover trains what --budget has cut"),
        ("export some --out dir --budget 1k --recover -5", "recover is -5: it must be at least 0"),
        ("export some --out dir --budget 1k --recover 5 --config-only", "--config-only writes no weights"),
        ("export some --out dir --format merged", "--format 'merged' is not known: the format is peft"),
    ],
)
def test_a_bad_command_is_one_line_and_exit_code_2(cli: Cli, inside: Path, arguments: str, said: str) -> None:
    assert said in refused(cli(*arguments.split()), 2)
    assert nothing_written(inside)


@pytest.mark.parametrize(
    "budget", ["2X", "abc", "", "0", "-1", "nan", "1e400", "2MB", "2,5M", "0.5%", "1.5", "1001B"]
)
def test_a_bad_budget_is_refused_with_the_forms_there_are(cli: Cli, inside: Path, budget: str) -> None:
    message = refused(cli("search", "--budget", budget), 2)
    assert repr(budget) in message
    assert any(rule in message for rule in ("such as 170k, 2M", "whole number", "from 1 to 1000B"))
    assert nothing_written(inside)


def test_with_json_an_error_is_an_object_on_stdout(cli: Cli) -> None:
    outcome = cli("search", "--budget", "2X", "--json")
    assert outcome.code == 2
    assert outcome.err == ""
    error = outcome.json["error"]
    assert (error["type"], error["exit_code"]) == ("CommandError", 2)
    assert error["message"].startswith("budget '2X' is not understood")
    assert cli("serach", "--json").json["error"]["exit_code"] == 2


def test_with_debug_an_error_shows_where_it_came_from(cli: Cli) -> None:
    outcome = cli("search", "--budget", "2X", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "parse_budget" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: budget '2X'")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(28, "No space left on device"), 6, "No space left on device"),
        (MemoryError(), 4, "out of memory (no memory is left): lower --batch-size"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            4,
            "out of memory (CUDA out of memory. Tried)",
        ),
        (RuntimeError("a\nb"), 1, "unexpected RuntimeError: a b; run it again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(config_module, "build_config", fail)
    assert said in refused(cli("search", "--budget", "1k"), code)


# -- studies that are not there ------------------------------------------------------------------


@pytest.mark.parametrize("command", [["show"], ["resume"], ["export", "--out", "dir"]])
@pytest.mark.parametrize("name", ["nope", "../nope", ".."])
def test_a_study_that_is_not_there_is_exit_code_5(
    cli: Cli, inside: Path, command: list[str], name: str
) -> None:
    assert name in refused(cli(*command, name), 5)
    assert nothing_written(inside)


def test_no_studies_are_an_empty_list(cli: Cli, inside: Path) -> None:
    assert cli("show", "--json").json == []
    assert "autorank search" in cli("show").out
    assert nothing_written(inside)


def test_studies_in_a_file_are_exit_code_6(cli: Cli, inside: Path) -> None:
    (inside / "file").touch()
    assert "must be a folder" in refused(cli("show", "--studies-dir", "file"), 6)
    assert "must be a folder" in refused(cli("show", "some", "--studies-dir", "file"), 6)


def test_the_quickstart_says_that_it_was_chosen(cli: Cli, inside: Path) -> None:
    (inside / "file").touch()
    outcome = cli("search", "--studies-dir", "file")
    assert "--studies-dir must be a folder" in refused(outcome, 6)
    first = outcome.err.splitlines()[0]
    assert first == "no model and no data named: the quickstart, builtin:minilm on builtin:stdlib-docs"


# -- a whole small study -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tiny_bert: Path, tiny_data: Path) -> list[str]:
    """What every search here is asked for: a tiny model, few steps."""
    settings = f"--model {tiny_bert} --data {tiny_data} --budget 2k --steps 20 --batch-size 8 --max-length 16"
    return f"{settings} --set schedule.moves=2 --set evaluations=2".split()


@pytest.fixture(scope="module")
def studies(cli: Cli, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished study, `done`."""
    folder = tmp_path_factory.mktemp("studies")
    outcome = cli("search", *flags, "--trials", 2, "--name", "done", "--studies-dir", folder)
    assert outcome.code == 0, outcome.err
    return folder


def test_a_search_ends_with_the_facts_that_the_issue_lists(cli: Cli, studies: Path) -> None:
    study = cli("show", "done", "--studies-dir", studies, "--json").json
    assert study["name"] == "done"
    assert (study["metric"], study["direction"], study["budget"]) == ("accuracy", "maximize", 2000)
    assert [trial["number"] for trial in study["trials"]] == [0, 1]
    for trial in study["trials"]:
        assert trial["state"] == "COMPLETE"
        assert 0 < trial["trainable_parameters"] <= 2000
        assert (trial["steps"], trial["samples"]) == (20, 160)
        assert isinstance(trial["value"], float)
        assert set(trial["params"]) >= {"rank", "scaling", "learning_rate", "target_modules", "allocation"}
        assert all(name.startswith("bert.encoder.layer.") for name in trial["ranks"])
        assert trial["reason"] is None
    assert study["best"] in study["trials"]
    assert study["best"]["value"] == max(trial["value"] for trial in study["trials"])
    assert {"frozen_base", "uniform", "control"} <= set(study["references"])


def test_when_every_trial_failed_it_is_exit_code_7_and_the_reasons_are_counted(
    cli: Cli, flags: list[str], inside: Path
) -> None:
    wild = [f"--set=space.{rate}.{end}={value}" for rate in ("learning_rate", "head_learning_rate")
            for end, value in (("low", "1e29"), ("high", "1e30"))]  # fmt: skip
    outcome = cli("search", *flags, *wild, "--trials", 9, "--name", "wild")
    said = r"all 3 trials of study 'wild' failed: 3 x the loss is nan at step \d \(learning rate \S+\); mend"
    assert re.match(said, refused(outcome, 7, shown=True))
    assert "3 trials in a row failed alike" in outcome.out
    error = cli("export", "wild", "--out", "dir", "--json").json["error"]
    assert (error["type"], error["exit_code"]) == ("AllTrialsFailed", 7) and re.match(said, error["message"])
    shown = cli("show", "wild").out
    assert shown.count(" failed: the loss is nan at step ") == 3 and "Traceback" not in shown
    assert cli("resume", "wild", "--trials", 3).code == 7 and not (inside / "dir").exists()


def test_a_study_is_shown_to_people(cli: Cli, studies: Path) -> None:
    listed = cli("show", "--studies-dir", studies)
    assert "done" in listed.out
    shown = cli("show", "done", "--studies-dir", studies)
    assert shown.code == 0
    for words in ("accuracy", "2,000", "frozen base", "uniform", "adaptive", "block"):
        assert words in shown.out, words
    assert [study["name"] for study in cli("show", "--studies-dir", studies, "--json").json] == ["done"]


def test_how_ranks_moved_is_shown(cli: Cli, studies: Path) -> None:
    shown = cli("show", "done", "--ranks", "--studies-dir", studies)
    assert shown.code == 0 and "rank moves of trial" in shown.out and "→" in shown.out
    assert "--ranks shows one study" in refused(cli("show", "--ranks", "--studies-dir", studies), 2)


def test_a_search_on_a_name_that_exists_names_resume(cli: Cli, flags: list[str], studies: Path) -> None:
    before = sorted(studies.rglob("*"))
    message = refused(cli("search", *flags, "--name", "done", "--studies-dir", studies), 5)
    assert "autorank resume done" in message
    assert sorted(studies.rglob("*")) == before


def test_resume_counts_trials_in_total(cli: Cli, flags: list[str], inside: Path) -> None:
    assert cli("search", *flags, "--trials", 1, "--name", "grow").code == 0
    outcome = cli("resume", "grow", "--trials", 3, "--json")
    assert outcome.code == 0, outcome.err
    assert [trial["number"] for trial in outcome.json["trials"]] == [0, 1, 2]
    assert outcome.json == cli("show", "grow", "--json").json
    again = cli("resume", "grow", "--json")
    assert [trial["number"] for trial in again.json["trials"]] == [0, 1, 2]


def test_a_plan_writes_nothing(cli: Cli, flags: list[str], inside: Path) -> None:
    outcome = cli("plan", *flags, "--json")
    assert outcome.code == 0, outcome.err
    facts = outcome.json
    groups = {group["name"]: group for group in facts["groups"]}
    assert groups["all-linear"]["cost"] == 2 * (4 * 64 + 2 * 96)
    assert groups["all-linear"]["largest_rank"] == 2000 // groups["all-linear"]["cost"]
    assert facts["steps"] == 20
    assert facts["seconds_per_step"] > 0
    assert "all-linear" in cli("plan", *flags).out
    assert nothing_written(inside)


def test_a_budget_below_one_component_names_the_smallest_that_would_do(
    cli: Cli, flags: list[str], inside: Path
) -> None:
    message = refused(cli("search", *flags, "--budget", "63"), 2, shown=True)
    assert "--budget 63 buys nothing here" in message
    assert re.search(r"attention\.self\.query, costs 64; raise it to that or more", message)
    assert nothing_written(inside)


def test_a_budget_below_rank_1_is_refused_to_who_asks_for_a_rank(
    cli: Cli, flags: list[str], inside: Path
) -> None:
    for setting in ("space.rank=1", "min_rank=1", "space.start=uniform"):
        message = refused(cli("search", *flags, "--budget", "255", "--set", setting), 2, shown=True)
        assert "query-value, needs 256 at rank 1" in message
    assert nothing_written(inside)


def test_a_plan_below_rank_1_shows_the_start_from_the_gradient(
    cli: Cli, flags: list[str], inside: Path
) -> None:
    outcome = cli("plan", *flags, "--budget", 200, "--json")
    assert outcome.code == 0, outcome.err
    facts = outcome.json
    for group in facts["groups"]:
        assert (group["largest_rank"], group["start"]) == (0, ["gradient"])
        assert 200 - 96 < group["parameters"] <= 200
    assert facts["parameters"] <= 200
    assert "probing the frozen base's gradient" in outcome.err
    text = cli("plan", *flags, "--budget", 200).out
    assert re.search(r"all-linear +12 +896 +<1 +gradient +1\d\d", text)
    assert nothing_written(inside)


def test_a_schedule_that_never_fires_is_refused(cli: Cli, flags: list[str], inside: Path) -> None:
    message = refused(cli("search", *flags, "--steps", "2"), 2, shown=True)
    assert "steps" in message
    assert nothing_written(inside)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("max_rank=999", "max_rank 999 is above the full rank 32"),
        ("min_rank=3", "min_rank 3 is more than the budget of 2,000 buys"),
        ("space.rank=40", "rank 40"),
        ("space.target_modules=[nope]", "nope"),
    ],
)
def test_ranks_and_groups_that_cannot_be_had_are_refused(
    cli: Cli, flags: list[str], inside: Path, setting: str, said: str
) -> None:
    assert said in refused(cli("search", *flags, "--set", setting), 2, shown=True)
    assert nothing_written(inside)


def test_what_is_left_out_or_capped_is_said(cli: Cli, flags: list[str]) -> None:
    small = cli("plan", *flags, "--budget", 300)
    assert "all-linear cannot have rank 1 at every layer, which costs 896: the gradient chooses" in small.out
    assert "all-linear is left out" in cli("plan", *flags, "--budget", 300, "--set", "space.rank=1").out
    full = 2 * 32 * (4 * 64 + 2 * 96)
    assert f"at most {full:,} can be used" in cli("plan", *flags, "--budget", "1M").out


def test_every_flag_reaches_the_stored_configuration(cli: Cli, flags: list[str], inside: Path) -> None:
    (inside / "study.yaml").write_text("trials: 9\nseed: 3\nspace: {scaling: 2}\n")
    more = "--task text-classification --metric f1_macro --seed 7 --device cpu --dtype float32 --trials 1"
    rest = "--importance singular_value --eval-fraction 0.2 --time 10m --target-modules query,value --strict"
    where = ["--name", "all", "--studies-dir", "here", "--set", "space.scaling=4", "--columns", "label=label"]
    outcome = cli("search", "study.yaml", *flags, *more.split(), *rest.split(), *where)
    assert outcome.code == 0, outcome.err
    assert "export it with `autorank export all --out DIR --studies-dir here`" in outcome.out
    stored = json.loads((inside / "here" / "all" / "config.json").read_text())
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    expected = {
        "model": given["--model"], "data": given["--data"], "budget": 2000, "steps": 20, "epochs": None,
        "batch_size": 8, "max_length": 16, "task": "text-classification", "metric": "f1_macro", "seed": 7,
        "device": "cpu", "dtype": "float32", "trials": 1, "importance": "singular_value", "evaluations": 2,
        "eval_fraction": 0.2, "time": 600, "target_modules": ["query", "value"], "name": "all",
        "studies_dir": "here", "strict": True, "columns": {"label": "label"},
    }  # fmt: skip
    assert {key: stored[key] for key in expected} == expected
    assert (stored["space"]["scaling"], stored["schedule"]["moves"]) == (4, 2)


@pytest.mark.parametrize(
    ("columns", "code", "said"),
    [
        ("label", 2, "'label' is not understood: columns are written role=column"),
        ("klass=label", 2, "'klass' is no role"),
        ("text=label,label=label", 2, "text and label both name 'label'"),
        (
            "label=lable",
            3,
            "no column 'lable', which is to be the label; the train rows have text, label: do",
        ),
    ],
)
@pytest.mark.parametrize("command", ["search", "plan"])
def test_columns_that_cannot_be_read_are_refused(
    cli: Cli, flags: list[str], inside: Path, command: str, columns: str, code: int, said: str
) -> None:
    assert said in refused(cli(command, *flags, "--columns", columns), code)
    assert nothing_written(inside)


def test_with_json_stdout_holds_one_object_and_nothing_else(cli: Cli, flags: list[str]) -> None:
    outcome = cli("search", *flags, "--trials", 1, "--name", "quiet", "--json")
    assert outcome.code == 0
    assert outcome.json["name"] == "quiet"
    assert "trial 0" in outcome.err


def test_an_export_says_where_it_went(cli: Cli, studies: Path, inside: Path) -> None:
    outcome = cli("export", "done", "--out", "adapter", "--studies-dir", studies, "--json")
    assert outcome.code == 0, outcome.err
    assert Path(outcome.json["out"]).resolve() == (inside / "adapter").resolve()
    assert {"adapter_config.json", "adapter_model.safetensors", "autorank_export.json"} <= {
        path.name for path in (inside / "adapter").iterdir()
    }
    assert "adapter" in refused(cli("export", "done", "--out", "adapter", "--studies-dir", studies), 6)
    assert "9" in refused(cli("export", "done", "--out", "x", "--trial", 9, "--studies-dir", studies), 5)


def test_the_configuration_alone_can_be_exported(cli: Cli, studies: Path, inside: Path) -> None:
    outcome = cli("export", "done", "--out", "settings", "--config-only", "--studies-dir", studies)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in (inside / "settings").iterdir()] == ["adapter_config.json"]
    assert "LoraConfig" in outcome.out
    assert "SFTTrainer" in outcome.out


def test_a_smaller_export_says_what_it_scores(cli: Cli, studies: Path, inside: Path) -> None:
    common = ("export", "done", "--trial", 0, "--studies-dir", studies, "--budget")
    outcome = cli(*common, "0.5k", "--recover", 4, "--out", "small")
    assert outcome.code == 0, outcome.err
    scores = [line for line in outcome.out.splitlines() if ": validation accuracy 0." in line]
    starts = ("trial 0, ", "truncated to ", "recovery, step 2", "recovery, step 4", "recovered: ")
    assert len(scores) == len(starts) and all(map(str.startswith, scores, starts)), outcome.out
    assert "of the energy" in scores[1] and "written to small" in outcome.out

    outcome = cli(*common, 500, "--out", "again", "--json")
    assert outcome.json["out"] == "again" and "truncated to" in outcome.err
    told = json.loads((inside / "again" / "autorank_export.json").read_text())["transplant"]
    assert outcome.json["transplant"] == told and 400 < told["parameters"] <= 500

    assert "nothing to shrink" in refused(cli(*common, "1M", "--out", "none"), 2)
    assert "costs 64" in refused(cli(*common, 10, "--out", "none"), 2)
    assert not (inside / "none").exists()


# -- pipes and signals ---------------------------------------------------------------------------


def test_a_reader_that_has_gone_is_no_error(studies: Path) -> None:
    command = [sys.executable, "-m", "autorank", "show", "done", "--studies-dir", str(studies)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def printed(*arguments: object) -> str:
    """What a command that ends well prints on a terminal that knows ASCII alone."""
    taken = io.BytesIO()
    with io.TextIOWrapper(taken, encoding="ascii") as stream, redirect_stdout(stream):
        assert main([str(argument) for argument in arguments]) == 0
        stream.flush()
        return taken.getvalue().decode()


def test_a_terminal_that_is_not_utf8_is_told_everything(
    flags: list[str], inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in ("30", "80"):  # what does not fit is cut, with three dots in one
        monkeypatch.setenv("COLUMNS", width)
        for command in COMMANDS:
            assert f"autorank {command}" in " ".join(printed(command, "--help").split())
    assert "trial 0 complete - " in printed("search", *flags, "--trials", 1, "--name", "plain")
    assert "frozen base" in printed("show", "plain")
    assert "written to adapter" in printed("export", "plain", "--out", "adapter")


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this machine has no disk that is always full")
@pytest.mark.parametrize("command", [["show"], ["show", "done"], ["show", "done", "--json"], ["--version"]])
def test_a_full_disk_under_stdout_is_an_error(studies: Path, command: list[str]) -> None:
    where = [] if command == ["--version"] else ["--studies-dir", str(studies)]
    told = io.StringIO()
    with suppress(OSError), FULL.open("w") as stream, redirect_stdout(stream), redirect_stderr(told):
        code = main([*command, *where])
    assert code == 6 and re.fullmatch(r"error: .*No space left on device.*\n", told.getvalue())


@pytest.mark.skipif(not FULL.exists(), reason="this machine has no disk that is always full")
def test_what_fails_keeps_its_exit_code_and_is_told_where_stdout_is_full() -> None:
    told = io.StringIO()
    with suppress(OSError), FULL.open("w") as stream, redirect_stdout(stream), redirect_stderr(told):
        code = main(["search", "--budget", "2X", "--json"])
    assert code == 2 and told.getvalue().startswith("error: budget '2X' is not understood")


def test_a_closed_stdout_is_no_error(studies: Path) -> None:
    command = f"{sys.executable} -m autorank show done --studies-dir {studies} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_search_says_how_to_go_on(
    cli: Cli, flags: list[str], number: signal.Signals, code: int
) -> None:
    # A process that a shell put in the background ignores Ctrl-C; that is not what is tested here.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send_when_a_trial_runs, args=[Path("studies/cut").absolute(), number])
    sender.start()
    try:
        outcome = cli("search", *flags, "--steps", 3000, "--trials", 2, "--name", "cut")
    finally:
        sender.join()
        signal.signal(signal.SIGINT, ctrl_c)
    assert "interrupted: go on with `autorank resume cut`" in refused(outcome, code, shown=True)
    assert [trial["state"] for trial in cli("show", "cut", "--json").json["trials"]] == ["RUNNING"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_keys_that_are_pressed_again_do_not_lose_how_to_go_on(
    cli: Cli, flags: list[str], inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        (inside / "studies" / "cut").mkdir(parents=True)
        raise KeyboardInterrupt

    def again(_: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return ""

    monkeypatch.setattr(importlib.import_module("autorank.search"), "search", interrupted)
    monkeypatch.setattr(importlib.import_module("autorank.cli"), "_elsewhere", again)
    before = signal.getsignal(signal.SIGINT)
    outcome = cli("search", *flags, "--name", "cut")
    assert refused(outcome, 130) == "interrupted: go on with `autorank resume cut`"
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("command", ["report", "status", "list"])
def test_what_other_tools_call_show_is_named(cli: Cli, command: str) -> None:
    assert refused(cli(command, "x"), 2) == f"No such command '{command}': try show; see `autorank --help`"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_of_any_kind_is_told(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        signal.raise_signal(number)

    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(importlib.import_module("autorank.predictor"), "evaluate_export", interrupted)
    try:
        assert refused(cli("evaluate", "adapter", "--data", "rows"), code) == "interrupted"
        told = cli("evaluate", "adapter", "--data", "rows", "--json").json["error"]
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    assert told == {"type": "Interrupted", "message": "interrupted", "exit_code": code}
    assert signal.getsignal(signal.SIGTERM) == before


def send_when_a_trial_runs(folder: Path, number: signal.Signals) -> None:
    """Send this process a signal in the middle of the first trial."""
    for _ in range(600):
        time.sleep(0.1)
        if folder.exists():
            with Study.open_read_only(folder) as study:
                running = bool(study.trials())
            if running:
                time.sleep(0.3)
                os.kill(os.getpid(), number)
                return


def test_a_template_may_hold_line_breaks(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def keep(config: Any, **_: Any) -> Any:
        seen.append(config)
        raise CommandError("far enough")

    monkeypatch.setattr(importlib.import_module("autorank.search"), "plan", keep)
    asked = ["--model", "m", "--data", "d", "--budget", "1k", "--template", r"Q: {q}\nA: "]
    assert cli("plan", *asked).code == 2
    assert seen[0].template == "Q: {q}\nA: "


def test_debug_shows_what_is_logged_and_nothing_stays(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        logging.getLogger("autorank.engine.local").debug("trial 3 failed")
        raise CommandError("far enough")

    monkeypatch.setattr(importlib.import_module("autorank.search"), "plan", failing)
    asked = ("plan", "--model", "m", "--data", "d", "--budget", "1k")
    assert "trial 3 failed" not in cli(*asked).err
    assert "trial 3 failed" in cli(*asked, "--debug").err
    log = logging.getLogger("autorank")
    assert not log.handlers and log.level == logging.NOTSET
