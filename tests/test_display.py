"""The live view, drawn to text; the clock is the test's."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any, TextIO

import pytest
from rich.console import Console

from autorank.display import Display

PARAMS = {
    "target_modules": "all-linear",
    "allocation": "adaptive",
    "rank": 4,
    "scaling": 2.0,
    "learning_rate": 2e-3,
    "head_learning_rate": 1e-3,
    "head_scale": 1.0,
}


class Terminal(io.StringIO):
    """A stream in memory that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(number: int, state: str = "COMPLETE", value: float | None = None, **facts: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": state,
        "value": value,
        "params": PARAMS,
        "trainable_parameters": 165_888,
        "seconds": 130.0,
        "reason": None,
        "control_of": None,
        **facts,
    }


@pytest.fixture(autouse=True)
def bare_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def begin(display: Display, **facts: Any) -> None:
    settings = {"metric": "accuracy", "direction": "maximize", "budget": 170_000, "total": 4, **facts}
    display.study_started("minilm-banking77", **settings)


def run_trial(
    display: Display, clock: Clock, ended: dict[str, Any], *, steps: int = 10, step_s: float = 1.0
) -> None:
    display.trial_started(ended["number"], 4, PARAMS, 165_888, 170_000, steps)
    for step in range(1, steps + 1):
        clock.now += 1
        display.step(ended["number"], step, steps, 2.0 / step, 165_888 - step)
    display.trial_ended(ended)


# -- plain lines -----------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal() -> None:
    out, clock = io.StringIO(), Clock()
    with Display(out, clock=clock) as display:
        display.note("data: JSONL folder")
        begin(display)
        run_trial(display, clock, record(0, value=0.91))
        run_trial(display, clock, record(1, "FAIL", reason="the loss became NaN at step 4"))
        display.trial_started(2, 4, PARAMS, 165_888, 170_000, 10)
        display.step(2, 5, 10, 0.5, 165_000)
        display.evaluated(2, 5, 0.93, 0.93)
        display.trial_ended(record(2, value=0.93, control_of=0))
        display.finished()
    lines = out.getvalue().splitlines()
    assert lines[0] == "data: JSONL folder"
    settings = "all-linear · adaptive · rank 4 · scaling 2 · rate 2e-3 · head 1e-3"
    assert lines[1] == f"trial 0 starts · {settings} · 165,888 parameters · 10 steps"
    assert lines[2] == "trial 0 complete · accuracy 0.9100, best so far · 165,888 parameters · 2m 10s"
    assert lines[4].endswith("the loss became NaN at step 4")
    told = "trial 2 · step 5 of 10 · loss 0.5000 · 165,000 parameters · validation accuracy 0.9300"
    assert lines[6] == f"{told} · search: about 10s left"
    assert lines[7].endswith("paired with trial 0")
    assert lines[8] == "3 trials done (in 20s): 2 complete, 1 failed"
    assert "\x1b" not in out.getvalue()


def test_plain_steps_are_told_twice_a_minute() -> None:
    out, clock = io.StringIO(), Clock()
    with Display(out, clock=clock) as display:
        begin(display)
        run_trial(display, clock, record(0, value=0.9), steps=70)
    assert re.findall(r"step (\d+) of 70", out.getvalue()) == ["30", "60"]


def test_a_step_is_told_once_with_its_score_where_it_has_one() -> None:
    """A line of its own would say the same a moment before, in less words."""
    out, clock = io.StringIO(), Clock()
    with Display(out, clock=clock) as display:
        begin(display)
        display.trial_started(0, 4, PARAMS, 165_888, 170_000, 100)
        for step in range(1, 66):
            clock.now += 1
            display.step(0, step, 100, 0.5, 165_888)
            if step == 30:
                clock.now += 40  # a long validation pass
                display.evaluated(0, step, 0.9, None)
    assert re.findall(r"step (\d+) of 100 · loss 0.5000 ·( validation)?", out.getvalue()) == [
        ("30", " validation"),
        ("60", ""),
    ]


def test_parameters_are_told_where_they_have_changed() -> None:
    out = io.StringIO()
    with Display(out, clock=Clock()) as display:
        begin(display)
        display.trial_started(0, 4, PARAMS, 165_888, 170_000, 100)
        for step, parameters in ((1, 165_888), (2, 165_120), (3, 165_120), (4, 164_352)):
            display.step(0, step, 100, 0.5, parameters)
            display.evaluated(0, step, 0.9, None)
    told = [re.findall(r"([\d,]+) parameters", line) for line in out.getvalue().splitlines()[1:]]
    assert told == [[], ["165,120"], [], ["164,352"]]


def test_what_is_scored_at_the_end_is_told_with_a_count() -> None:
    out = io.StringIO()
    with Display(out) as display:
        begin(display)
        display.finished()
        display.scoring("winner, trial 0, on test", 2, 3)
        view = " ".join(draw(display).split())
    assert out.getvalue().endswith("scoring 2 of 3: winner, trial 0, on test\n")
    assert view.endswith("scoring 2 of 3 · winner, trial 0, on test")


def test_no_color_means_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    with Display(out) as display:
        begin(display)
        display.trial_ended(record(0, value=0.9))
    assert "\x1b" not in out.getvalue()


def test_a_trial_that_stopped_early_says_where() -> None:
    stream = io.StringIO()
    display = Display(stream)
    begin(display)
    display.trial_ended(record(0, value=0.9, stopped_early={"step": 75, "of": 100}))
    assert "165,888 parameters · stopped early at step 75 of 100 · 2m 10s" in stream.getvalue()


def test_the_best_so_far_follows_direction_and_budget() -> None:
    out = io.StringIO()
    with Display(out) as display:
        begin(display, metric="loss", direction="minimize")
        for number, value in enumerate((0.5, 0.6, 0.4, 0.4)):
            display.trial_ended(record(number, value=value))
        display.trial_ended(record(4, value=0.1, trainable_parameters=170_001))
    told = [line for line in out.getvalue().splitlines() if "best so far" in line]
    assert [line.split()[1] for line in told] == ["0", "2"]


def test_a_resumed_study_counts_what_it_holds() -> None:
    out = io.StringIO()
    with Display(out) as display:
        begin(display, trials=[record(0, value=0.9), record(1, "PRUNED"), record(2, "RUNNING")])
        display.trial_ended(record(2, value=0.8))
        display.finished()
    assert "best so far" not in out.getvalue()
    assert "3 trials done (1 of them now, in" in out.getvalue()


# -- time left ---------------------------------------------------------------------------------------


def time_left(display: Display) -> str:
    return draw(display).split("about ")[1].split(" left")[0] if "about" in draw(display) else "unknown"


def draw(display: Display, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(display._view())
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_time_left_comes_from_measured_steps() -> None:
    clock = Clock()
    with Display(io.StringIO(), clock=clock) as display:
        begin(display)
        assert time_left(display) == "unknown"
        display.trial_started(0, 4, PARAMS, 165_888, 170_000, 10)
        for step in (1, 2):
            clock.now += 2
            display.step(0, step, 10, 0.5, 165_888)
        assert time_left(display) == "1m 16s"  # 8 steps here and 3 trials of 10, at 2 s each
        for step in range(3, 11):
            clock.now += 2
            display.step(0, step, 10, 0.5, 165_888)
        display.trial_ended(record(0, value=0.9))
        assert time_left(display) == "1m 00s"
        display.trial_started(1, 4, PARAMS, 165_888, 170_000, 10)
        assert time_left(display) == "1m 00s"


def test_a_continued_trial_is_timed_from_where_it_goes_on() -> None:
    clock = Clock()
    with Display(io.StringIO(), clock=clock) as display:
        begin(display, total=1)
        display.trial_started(0, 1, PARAMS, 165_888, 170_000, 100)
        for step in range(51, 61):
            clock.now += 1
            display.step(0, step, 100, 0.5, 165_888)
        assert time_left(display) == "40s"


def test_time_left_is_never_over_the_limit() -> None:
    clock = Clock()
    with Display(io.StringIO(), clock=clock) as display:
        begin(display, time_s=30.0)
        display.trial_started(0, 4, PARAMS, 165_888, 170_000, 1000)
        clock.now += 10
        display.step(0, 1, 1000, 0.5, 165_888)
        assert time_left(display) == "20s"


# -- the view ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_the_view_tells_all_and_fits(width: int) -> None:
    clock = Clock()
    with Display(io.StringIO(), clock=clock) as display:
        begin(display)
        run_trial(display, clock, record(0, value=0.9123))
        run_trial(display, clock, record(1, "PRUNED", 0.7))
        display.trial_started(2, 4, PARAMS, 165_888, 170_000, 700)
        clock.now += 1
        display.step(2, 35, 700, 0.4213, 85_000)
        display.evaluated(2, 35, 0.8765, 0.8765)
        text = draw(display, width)
    flat = " ".join(text.split())
    for part in (
        "minilm-banking77",
        "2 of 4 done",
        "1 complete, 1 pruned",
        "accuracy 0.9123",
        "step 35 of 700",
        "loss 0.4213",
        "accuracy 0.8765",
        "85,000 of 170,000 (50%)",
        "left",
    ):
        assert part in flat
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_trials_side_by_side_wait_and_go_on() -> None:
    clock, out = Clock(), io.StringIO()
    with Display(out, clock=clock) as display:
        begin(display)
        for number in (0, 1):
            display.trial_started(number, 4, PARAMS, 165_888, 170_000, 10)
        for step in range(1, 6):
            clock.now += 1
            for number in (0, 1):
                display.step(number, step, 10, 0.5, 165_888)
        view = draw(display, 120)
        assert "trial 0" in view and "trial 1" in view
        display.evaluated(0, 5, 0.7, None)
        display.trial_paused(0, 5, 0.7)
        # Trial 1 at 1 s a step, and two trials that were not begun; the one that waits counts as one.
        assert time_left(display) == "35s"
        display.trial_started(0, 4, PARAMS, 165_888, 170_000, 10, step=5)
    told = out.getvalue()
    assert "trial 0 waits · step 5 · accuracy 0.7000\n" in told
    assert told.endswith("trial 0 goes on · step 5 of 10\n")


def test_the_nearest_limit_is_told_where_it_is_not_the_number_of_trials() -> None:
    out = io.StringIO()
    with Display(out, clock=Clock()) as display:
        begin(display)
        display.nearest("trials", 0.5)
        assert "nearest limit" not in draw(display, 120)
        display.nearest("samples", 0.75)
        assert "nearest limit: samples, 75% used" in " ".join(draw(display, 120).split())
        display.trial_ended(record(0, value=0.9))
    assert out.getvalue().endswith(" · nearest limit: samples, 75% used\n")


def test_a_long_reason_is_folded_under_itself() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, highlight=False, markup=False)
    with Display(console=console, plain=False) as display:
        begin(display)
        display.trial_ended(record(0, "FAIL", reason="word " * 40))
    lines = [line for line in out.getvalue().splitlines() if "word" in line]
    assert len(lines) > 3
    assert all(line.startswith("    word") and len(line.rstrip()) <= 60 for line in lines)


def test_silence() -> None:
    with Display.silent() as display:
        begin(display)
        run_trial(display, Clock(), record(0, value=0.9))
        display.evaluated(0, 1, 0.5, None)
        display.finished()
        assert display.console.file.getvalue() == ""  # type: ignore[attr-defined]


# -- terminals that fail -----------------------------------------------------------------------------


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    calls = 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_closed_pipe_does_not_stop_a_search() -> None:
    out = Broken()
    with Display(out) as display:
        begin(display)
        for number in range(5):
            display.trial_ended(record(number, value=0.9))
    assert out.calls == 1


def test_a_closed_stream_does_not_stop_a_search() -> None:
    out = io.StringIO()
    with Display(out) as display:
        begin(display)
        out.close()
        display.trial_ended(record(0, value=0.9))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf8(encoding: str) -> None:
    raw = io.BytesIO()
    stream: TextIO = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    with Display(stream) as display:
        begin(display)
        display.note("the label 日本 — and a bar ━")
        display.trial_ended(record(0, value=0.9))
    lines = raw.getvalue().decode(encoding).splitlines()
    assert lines[0].startswith("the label ??")
    assert lines[1].startswith("trial 0 complete - accuracy 0.9000, best so far - 165,888 parameters")


def test_a_closed_stdout_leaves_no_trace_at_exit() -> None:
    program = "from autorank.display import open_console\nfor n in range(9999): open_console().print(n)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()


def test_on_a_terminal_the_view_is_redrawn_and_the_cursor_stays() -> None:
    out, clock = Terminal(), Clock()
    with Display(out, clock=clock) as display:
        begin(display)
        display.trial_started(0, 4, PARAMS, 165_888, 170_000, 10)
        for step in range(1, 6):
            clock.now += 0.05
            display.step(0, step, 10, 0.5, 165_888)
        shown = out.getvalue()
        # Redraws are few: steps come faster than eyes.
        assert re.findall(r"step (\d) of 10", shown) == ["0", "4"]
        # A killed search leaves the cursor on.
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
        display.trial_ended(record(0, value=0.9))
        display.finished()
        assert draw(display).strip() == ""
    assert "trial 0" in out.getvalue() and "best so far" in out.getvalue()
