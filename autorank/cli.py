"""The command line: flags make a configuration, one call does the work, its result is printed.

Nothing is decided or drawn here. Heavy libraries are imported inside the commands, so that
`--help` is quick. Every error ends in `main` as one line and an exit code.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autorank import __version__
from autorank.errors import AutorankError, CommandError, FileError, ModelError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from autorank.config import StudyConfig
    from autorank.display import Display

__all__ = ["app", "main"]

app = typer.Typer(name="autorank", add_completion=False, pretty_exceptions_enable=False)


# -- flags ---------------------------------------------------------------------------------------

_STUDIES_DIR = "studies"
_LIMITS, _WHAT, _TRAINING, _STUDY = "Limits", "Model and data", "Training", "Study"


def _option(help_text: str, panel: str, metavar: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar, show_default=False)


File = Annotated[
    Path | None,
    typer.Argument(metavar="STUDY.yaml", help="Settings in a file; flags override them.", show_default=False),
]
Budget = Annotated[
    str | None, _option("Most trainable adapter parameters of a trial: 170k, 2M.", _LIMITS, "COUNT")
]
Trials = Annotated[
    int | None,
    _option(
        "Trials in total, those that a study has included; by default 12, of the quickstart 5.",
        _LIMITS,
        "COUNT",
    ),
]
Time = Annotated[str | None, _option("End after this time: 90s, 30m, 2h.", _LIMITS, "TIME")]
Samples = Annotated[
    str | None, _option("End after so many training samples, of all trials: 40k, 2M.", _LIMITS, "COUNT")
]
Target = Annotated[float | None, _option("End when the validation score is this good.", _LIMITS, "SCORE")]
Plateau = Annotated[int | None, _option("End after so many trials without a better score.", _LIMITS, "COUNT")]
Steps = Annotated[int | None, _option("Training steps of a trial; excludes --epochs.", _LIMITS, "COUNT")]
Epochs = Annotated[float | None, _option("Passes over the training rows; by default 3.", _LIMITS, "COUNT")]
Model = Annotated[str | None, _option("A local folder, a hub id or builtin:minilm.", _WHAT, "SOURCE")]
Data = Annotated[str | None, _option("A folder, a file, a hub id or builtin:stdlib-docs.", _WHAT, "SOURCE")]
Columns = Annotated[
    str | None, _option("Which column is what: text=question,label=intent.", _WHAT, "ROLE=COLUMN,...")
]
Task = Annotated[
    str | None,
    _option(
        "auto, text-classification, multi-label-classification, regression, image-classification, "
        "token-classification, question-answering, causal-lm or seq2seq.",
        _WHAT,
        "NAME",
    ),
]
Template = Annotated[
    str | None,
    _option(r"Makes a language model's prompts, columns in braces: 'Q: {question}\nA: '.", _WHAT, "TEXT"),
]
Metric = Annotated[
    str | None,
    _option("What the search optimises; auto: the task's own; or module:function of yours.", _WHAT, "NAME"),
]
EvalFraction = Annotated[
    float | None,
    _option("Share of the rows to hold out where no validation split is; by default 0.1.", _WHAT, "SHARE"),
]
BatchSize = Annotated[int | None, _option("Rows of a training step; by default 32.", _TRAINING, "COUNT")]
PassSize = Annotated[
    int | None, _option("Rows of a pass; by default those of a training step.", _TRAINING, "COUNT")
]
MaxLength = Annotated[
    int | None, _option("Tokens at which a text is cut; by default 128.", _TRAINING, "COUNT")
]
TargetModules = Annotated[
    str | None, _option("Layers to adapt: groups or modules as a,b, or a regex.", _TRAINING, "NAMES")
]
Importance = Annotated[
    str | None,
    _option("What moves ranks: singular_value, gradient_norm, sensitivity; or random.", _TRAINING, "NAME"),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        metavar="",
        help="Fail a trial whose ranks never move or whose layers learn nothing.",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    _option(
        "auto, cpu, cuda, cuda:1 or mps; balanced spreads the layers of a large model over all GPUs.",
        _TRAINING,
        "NAME",
    ),
]
Dtype = Annotated[str | None, _option("auto, float32 or bfloat16.", _TRAINING, "NAME")]
Lanes = Annotated[
    str | None,
    _option(
        "Trials that train together in one pass, or auto: as many as pay; by default 1, on CUDA auto.",
        _TRAINING,
        "COUNT",
    ),
]
Keep = Annotated[int | None, _option("Best adapters that stay on disk; by default 3.", _STUDY, "COUNT")]
Name = Annotated[str | None, _option("The study's name; by default of model and data.", _STUDY, "NAME")]
StudiesDir = Annotated[str | None, _option("Where studies are stored; by default studies.", _STUDY, "DIR")]
Seed = Annotated[int | None, _option("Where all randomness comes from; by default 0.", _STUDY, "NUMBER")]
Set = Annotated[
    list[str] | None,
    _option("Any setting by its dotted key: space.rank=4. Overrides flags.", _STUDY, "KEY=VALUE", "--set"),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout, all else on stderr.")
]
Debug = Annotated[
    bool, typer.Option("--debug", metavar="", help="Show tracebacks, of an error and of failed trials.")
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", metavar="", help="Run code that came with the base model, if it needs to."
    ),
]
OwnMetric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="The study's metric, where it is module:function: your code, run only if you name it.",
        metavar="MODULE:FUNCTION",
        show_default=False,
    ),
]
StudyName = Annotated[str, typer.Argument(metavar="NAME", help="A study; `autorank show` lists them.")]


# -- commands ------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autorank {__version__}")
        raise typer.Exit


@app.callback(
    epilog="\b\nExamples:\n"
    "  autorank search --budget 100k      the quickstart: needs nothing\n"
    "  autorank search --model DIR --data DIR --budget 2M\n"
    "  autorank show                      the studies there are\n"
    "  autorank export NAME --out DIR     the best adapter, for PEFT\n"
    "\n\b\n"
    "Exit codes:\n"
    "  0 done            2 command or budget   3 data\n"
    "  4 model, targets  5 study               6 files, processes\n"
    "  7 every trial failed                    130, 143 interrupted\n"
)
def _autorank(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Search for the best LoRA adapter under a budget of trainable parameters."""


@app.command(
    "plan",
    help="Dry run: layers and their costs, what the budget buys, memory and time from one probe step.",
    epilog="\b\nExamples:\n  autorank plan --budget 100k\n  autorank plan study.yaml --budget 1M --json\n",
)
@app.command(
    "search",
    help="Search for the best adapter that fits the budget. With neither model nor data: the quickstart.",
    epilog="\b\nExamples:\n"
    "  autorank search --budget 100k\n"
    "  autorank search study.yaml --trials 20 --time 2h\n"
    "  autorank search --model ./bert --data ./rows --budget 170k --name first\n"
    "  autorank search --budget 100k --set space.allocation=uniform\n",
)
def _search_or_plan(
    context: typer.Context,
    file: File = None,
    budget: Budget = None,
    trials: Trials = None,
    time: Time = None,
    samples: Samples = None,
    target: Target = None,
    plateau: Plateau = None,
    steps: Steps = None,
    epochs: Epochs = None,
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    task: Task = None,
    template: Template = None,
    metric: Metric = None,
    eval_fraction: EvalFraction = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    target_modules: TargetModules = None,
    importance: Importance = None,
    strict: Strict = None,
    device: Device = None,
    dtype: Dtype = None,
    lanes: Lanes = None,
    name: Name = None,
    studies_dir: StudiesDir = None,
    keep: Keep = None,
    seed: Seed = None,
    sets: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    from autorank.columns import parse_columns
    from autorank.config import build_config, is_quickstart, merge_settings

    not_settings = ("file", "sets", "as_json", "debug")
    flags = {key: value for key, value in context.params.items() if key not in not_settings}
    flags["target_modules"] = _module_names(target_modules)
    flags["columns"] = parse_columns(columns)
    # A shell hands on what stands for a line break as two characters.
    flags["template"] = None if template is None else template.replace("\\n", "\n")
    settings = merge_settings(file, flags, sets or ())
    config = build_config(settings)
    if is_quickstart(settings):
        typer.echo(f"no model and no data named: the quickstart, {config.model} on {config.data}", err=True)
    if context.info_name == "plan":
        _plan(config, as_json)
    else:
        _search(config, as_json)


def _search(config: StudyConfig, as_json: bool) -> None:
    from autorank.report import study_report
    from autorank.search import search

    with _resumable(config.studies_dir, config.name), _display(as_json) as display:
        result = search(config, display=display)
    _print(result.report, study_report, as_json)
    _tell_export(result.report, config.studies_dir, as_json)


def _tell_export(study: dict[str, Any], studies_dir: str, as_json: bool) -> None:
    """Say how to get at the winner, where there is one."""
    if not as_json and study["best"] is not None:
        _write(f"\nexport it with `autorank export {study['name']} --out DIR{_elsewhere(studies_dir)}`")


def _elsewhere(studies_dir: str) -> str:
    """The flag that names the folder of studies, where it is not the usual one."""
    return "" if studies_dir == _STUDIES_DIR else f" --studies-dir {shlex.quote(studies_dir)}"


def _plan(config: StudyConfig, as_json: bool) -> None:
    from autorank.report import plan_table
    from autorank.search import plan

    with _display(as_json) as display:
        facts = plan(config, display=display)
    _print(facts, plan_table, as_json)


@app.command(
    epilog="\b\nExamples:\n"
    "  autorank resume minilm-stdlib-docs\n"
    "  autorank resume minilm-stdlib-docs --trials 20     until there are 20 in total\n"
)
def resume(
    name: StudyName,
    trials: Trials = None,
    time: Time = None,
    samples: Samples = None,
    target: Target = None,
    plateau: Plateau = None,
    lanes: Lanes = None,
    metric: OwnMetric = None,
    trust_remote_code: TrustCode = False,
    studies_dir: StudiesDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a stored study: finish an interrupted trial, then run those that are missing."""
    from autorank.config import parse_lanes, parse_samples, parse_time

    for flag, count in (("trials", trials), ("plateau", plateau)):
        if count is not None and count < 1:
            raise CommandError(f"{flag} is {count}: it must be at least 1")
    limits: dict[str, Any] = {
        "trials": trials,
        "time_s": None if time is None else parse_time(time),
        "samples": None if samples is None else parse_samples(samples),
        "target": target,
        "plateau": plateau,
        "lanes": parse_lanes(lanes),
        "metric": metric,
        "trust_remote_code": trust_remote_code,
    }
    folder = studies_dir or _STUDIES_DIR
    from autorank.report import study_report
    from autorank.search import resume

    with _resumable(folder, name), _display(as_json) as display:
        result = resume(name, studies_dir=folder, display=display, **limits)
    _print(result.report, study_report, as_json)
    _tell_export(result.report, folder, as_json)


@app.command(
    epilog="\b\nExamples:\n"
    "  autorank show\n"
    "  autorank show minilm-stdlib-docs\n"
    "  autorank show minilm-stdlib-docs --ranks     how ranks moved, and why\n"
    "  autorank show minilm-stdlib-docs --json\n"
)
def show(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A study; by default all are listed.", show_default=False),
    ] = None,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks", metavar="", help="Every rank move of the best trial that has any, with its reason."
        ),
    ] = False,
    studies_dir: StudiesDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the studies there are, or show one: its trials, the best, its references and ranks."""
    folder = studies_dir or _STUDIES_DIR
    from autorank.report import moves_report, studies_table, study_report
    from autorank.study import Study, list_studies, study_folder

    if name is None:
        if ranks:
            raise CommandError("--ranks shows one study: give its NAME")
        _print(list_studies(folder), studies_table, as_json)
        return
    with Study.open_read_only(study_folder(folder, name)) as study:
        facts = study.to_json()
    _print(facts, moves_report if ranks else study_report, as_json)


@app.command(
    epilog="\b\nExamples:\n"
    "  autorank export minilm-stdlib-docs --out adapter\n"
    "  autorank export minilm-stdlib-docs --out adapter-3 --trial 3\n"
    "  autorank export minilm-stdlib-docs --out small --budget 40k --recover 40\n"
    "  autorank export minilm-stdlib-docs --out settings --config-only\n"
)
def export(
    name: StudyName,
    out: Annotated[
        Path, typer.Option(help="The folder to write; it must not exist, or be empty.", metavar="DIR")
    ],
    trial: Annotated[
        int | None,
        typer.Option(help="A trial's number; by default the best.", metavar="NUMBER", show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Shrink it to so many parameters: 40k, 1M; scored before and after.",
            metavar="COUNT",
            show_default=False,
        ),
    ] = None,
    recover: Annotated[
        int, typer.Option(help="Steps of training after that.", metavar="COUNT", show_default=False)
    ] = 0,
    format_: Annotated[
        str, typer.Option("--format", help="peft: PEFT's own format.", metavar="NAME")
    ] = "peft",
    config_only: Annotated[
        bool, typer.Option("--config-only", metavar="", help="Write the LoraConfig alone, and how to use it.")
    ] = False,
    metric: OwnMetric = None,
    trust_remote_code: TrustCode = False,
    studies_dir: StudiesDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the adapter of one trial, with its head, tokenizer and provenance."""
    if format_ != "peft":
        raise CommandError(f"--format {format_!r} is not known: the format is peft")
    from autorank.export import export

    usage: list[str] = []
    with _display(as_json) as display:
        folder = export(
            name,
            out,
            studies_dir=studies_dir or _STUDIES_DIR,
            trial=trial,
            budget=budget,
            recover=recover,
            config_only=config_only,
            metric=metric,
            trust_remote_code=trust_remote_code,
            say=usage.append,
            display=display,
        )
    *verdict, code = usage
    lines = [f"written to {folder}", *verdict, "", code]
    told = {"out": str(folder), "verdict": verdict[0] if verdict else None, **_shrunk(folder)}
    _write(json.dumps(told) if as_json else "\n".join(lines))


@app.command(
    epilog="\b\nExamples:\n"
    "  autorank train minilm-stdlib-docs --steps 2000 --out adapter\n"
    "  autorank train minilm-stdlib-docs --trial 3 --steps 2000 --data all --out adapter\n"
)
def train(
    name: StudyName,
    steps: Annotated[int, typer.Option(help="Training steps, from the start.", metavar="COUNT")],
    out: Annotated[
        Path, typer.Option(help="The folder to write; it must not exist, or be empty.", metavar="DIR")
    ],
    trial: Annotated[
        int | None,
        typer.Option(help="A trial's number; by default the best.", metavar="NUMBER", show_default=False),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="train: the best step by validation. all: its rows too, and the last step.", metavar="ROWS"
        ),
    ] = "train",
    metric: OwnMetric = None,
    trust_remote_code: TrustCode = False,
    studies_dir: StudiesDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train what a search found, at its ranks, for as long as you want, and export it."""
    if data not in ("train", "all"):
        raise CommandError(f"--data {data!r} is not known: it is train or all")
    from autorank.artifacts import read_json
    from autorank.card import FACTS
    from autorank.export import train

    usage: list[str] = []
    with _display(as_json) as display:
        folder = train(
            name,
            out,
            steps=steps,
            studies_dir=studies_dir or _STUDIES_DIR,
            trial=trial,
            whole=data == "all",
            metric=metric,
            trust_remote_code=trust_remote_code,
            say=usage.append,
            display=display,
        )
    facts = read_json(folder / FACTS)
    told = {key: facts[key] for key in ("trial", "step", "steps", "value")}
    scored = f"trial {facts['trial']}, trained for {facts['steps']:,} steps: "
    if facts["value"] is None:
        scored += "the last step's weights; no rows were left to score them"
    else:
        scored += f"{facts['metric']} {facts['value']:.4f} at step {facts['step']:,}"
    lines = [scored, f"written to {folder}", "", *usage]
    _write(json.dumps({"out": str(folder), **told}) if as_json else "\n".join(lines))


Export = Annotated[
    Path, typer.Argument(metavar="EXPORT", help="What `autorank export` or `autorank train` wrote.")
]
Rows = Annotated[str, typer.Option("--data", help="A file, a folder or a hub id.", metavar="SOURCE")]
Split = Annotated[
    str | None,
    typer.Option(
        help="Which rows of a folder: train, validation or test; by default test.",
        metavar="NAME",
        show_default=False,
    ),
]


@app.command(
    epilog="\b\nExamples:\n"
    "  autorank evaluate adapter --data rows/test.jsonl\n"
    "  autorank evaluate adapter --data rows --split validation --json\n"
)
def evaluate(
    export: Export,
    data: Rows,
    split: Split = None,
    columns: Columns = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="A metric of your own beside the task's: it takes a prediction and what is right.",
            metavar="MODULE:FUNCTION",
            show_default=False,
        ),
    ] = None,
    no_writing: Annotated[
        bool,
        typer.Option(
            "--no-writing",
            metavar="",
            help="Leave out metrics of text that the model writes: they take long.",
        ),
    ] = False,
    batch_size: PassSize = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score an exported adapter on rows that have answers: all metrics of its task."""
    from autorank.columns import parse_columns
    from autorank.predictor import evaluate_export
    from autorank.report import scores_table

    mapping = parse_columns(columns)
    with _display(as_json) as display:
        found = evaluate_export(
            export,
            data,
            split=split,
            columns=mapping,
            metric=metric,
            writing=not no_writing,
            batch_size=batch_size,
            device=device or "auto",
            trust_remote_code=trust_remote_code,
            say=display.note,
        )
    _print(found, scores_table, as_json)


@app.command(
    epilog="\b\nExamples:\n"
    "  autorank predict adapter --data questions.jsonl --out answers.jsonl\n"
    "  autorank predict adapter --data rows.csv --columns text=question --out answers.jsonl\n"
)
def predict(
    export: Export,
    data: Rows,
    out: Annotated[Path, typer.Option(help="The JSON lines to write; a new file.", metavar="FILE")],
    split: Split = None,
    columns: Columns = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest text to write; by default the length of a training row.",
            metavar="COUNT",
            show_default=False,
        ),
    ] = None,
    batch_size: PassSize = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what an exported adapter says to each row: the row as it is, and its `prediction`."""
    from autorank.columns import parse_columns
    from autorank.figures import counted
    from autorank.predictor import predict_export

    mapping = parse_columns(columns)
    with _display(as_json) as display:
        found = predict_export(
            export,
            data,
            out,
            split=split,
            columns=mapping,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=device or "auto",
            trust_remote_code=trust_remote_code,
            say=display.note,
        )
    unanswered = found["rows"] - found["answered"]
    left = f"; {unanswered:,} null, without a token or too long for the model" if unanswered else ""
    line = f"{counted(found['answered'], 'row')} answered in {found['out']}{left}"
    _write(json.dumps(found) if as_json else line)


def _shrunk(folder: Path) -> dict[str, Any]:
    """What an export tells of how it was made smaller, where it was."""
    from autorank.artifacts import read_json
    from autorank.card import FACTS

    told = read_json(folder / FACTS)["transplant"] if (folder / FACTS).exists() else None
    return {} if told is None else {"transplant": told}


# -- what the commands share ---------------------------------------------------------------------


def _module_names(text: str | None) -> list[str] | str | None:
    """Names as a list; anything that is more than names, dots and commas is a regex."""
    if text is None or re.fullmatch(r"[\w.,\s-]+", text) is None:
        return text
    return [name.strip() for name in text.split(",")]


def _display(as_json: bool) -> Display:
    """The live view: on stdout, which with --json is for the result alone."""
    from autorank.display import Display

    return Display(sys.stderr if as_json else sys.stdout)


def _print(facts: Any, draw: Callable[[Any], RenderableType], as_json: bool) -> None:
    """Print a result: as JSON, or as `draw` shows it to people."""
    from autorank.display import open_console
    from autorank.record import plain

    if as_json:
        _write(json.dumps(plain(facts), indent=2))
    else:
        console = open_console()
        console.print(draw(facts))
        _end(console)


def _write(text: str) -> None:
    """Print a line on stdout."""
    from autorank.display import open_console

    console = open_console()
    console.file.write(f"{text}\n")
    _end(console)


class _NotPrinted(FileError):
    """Stdout took not all of a result."""


def _end(console: Console) -> None:
    """See to it that what was printed has arrived."""
    from autorank.display import end_output

    failure = end_output(console)
    if failure is not None:
        raise _NotPrinted(f"stdout cannot be written: {failure.strerror}; make room, or print it elsewhere")


_INTERRUPTED = "interrupted before anything was stored"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program stands, as Ctrl-C is."""


class _Interrupted(BaseException):
    """A command was interrupted; the message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def _resumable(studies_dir: str, name: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line that says how to go on with the study."""
    try:
        yield
    except KeyboardInterrupt as error:
        if threading.current_thread() is threading.main_thread():  # to the end of the command
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # keys pressed again must not lose what is told now
        stored = (Path(studies_dir) / name).is_dir()
        message = (
            f"interrupted: go on with `autorank resume {name}{_elsewhere(studies_dir)}`"
            if stored
            else _INTERRUPTED
        )
        raise _Interrupted(message, 143 if isinstance(error, _Terminated) else 130) from error


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Let SIGTERM end a command as Ctrl-C does, which leaves nothing half written; yields those that came."""
    came: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise _Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread:
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- the way in and out --------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows `autorank`; by default those of this process.

    Returns:
        The exit code, as the help of `autorank` lists them.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _open_streams()
    with _logged() if "--debug" in given else nullcontext():
        return _run(given)


def _open_streams() -> None:
    """Open what a shell closed (`>&-`), and let stdout take any character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Opened now, it takes the place that a study's file would get, which others then print to.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and name == "stdout":  # stderr takes any already
            stream.reconfigure(errors="replace")


@contextmanager
def _logged() -> Iterator[None]:
    """Show on stderr what the package logs: the tracebacks of trials that fail."""
    log, handler = logging.getLogger("autorank"), logging.StreamHandler()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _run(given: Sequence[str]) -> int:
    """Run a command; whatever goes wrong in it becomes a message and an exit code."""
    as_json, debug = "--json" in given, "--debug" in given
    # PEFT imports it where it is installed, and it speaks of kernels that no command here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with _terminable() as terminated:
            code = typer.main.get_command(app).main(given, prog_name="autorank", standalone_mode=False)
    except SystemExit as end:  # typer ends so where the reader of its help has gone
        return end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _tell(error, as_json)
    if code == 130:  # what typer makes of Ctrl-C outside of a search, and of SIGTERM
        return _tell(_Interrupted("interrupted", 143 if terminated else code), as_json)
    return code if isinstance(code, int) else 0


def _tell(error: BaseException, as_json: bool) -> int:
    """Print an error on one line, or as an object, and return its exit code."""
    kind, message, code = _facts(error)
    if as_json and not isinstance(error, _NotPrinted):
        with suppress(_NotPrinted):
            _write(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}))
            return code
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    return code


def _as_setting(error: Any) -> str | None:
    """What to say of an unknown flag that has the name of a setting, which has no flag of its own."""
    from autorank.config import setting_named

    flag, context = getattr(error, "option_name", ""), getattr(error, "ctx", None)
    parameters, key = context.command.params if context else (), setting_named(flag)
    if key is None or not any(parameter.name == "sets" for parameter in parameters):
        return None
    if any(f"--{key.replace('_', '-')}" in parameter.opts for parameter in parameters):
        return None  # typer names it
    return f"No such option: {flag}: do you mean --set {key}=VALUE?"


def _facts(error: BaseException) -> tuple[str, str, int]:
    """Type, message and exit code of an error, whoever raised it."""
    kind = type(error).__name__.lstrip("_")
    if isinstance(error, (AutorankError, _Interrupted)):
        return kind, str(error), error.exit_code
    if hasattr(error, "format_message"):  # a usage error; typer keeps its class to itself
        context = getattr(error, "ctx", None)
        text = _as_setting(error) or " ".join(str(error.format_message()).split()).rstrip(".")
        text = re.sub(r"No such command '(list|ls|report|status)'.*", r"No such command '\1': try show", text)
        path = context.command_path if context is not None else "autorank"
        return CommandError.__name__, f"{text}; see `{path} --help`", CommandError.exit_code
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":  # torch's, outside of a trial
        text = " ".join(str(error).split()) or "no memory is left"
        advice = "lower --batch-size or --max-length, or give a smaller model"
        return ModelError.__name__, f"out of memory ({text[:200]}): {advice}", ModelError.exit_code
    if isinstance(error, OSError):
        return FileError.__name__, " ".join(str(error).split()), FileError.exit_code
    text = " ".join(f"{kind}: {error}".split())
    return kind, f"unexpected {text}; run it again with --debug and report what it shows", 1
