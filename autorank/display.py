"""The live view of a search: what runs, how far it is, what was best, how long it will take.

Drawn with rich on a terminal, as plain lines anywhere else. It is told things and shows them: it
reads no study, decides nothing, and a terminal that fails never stops a search.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autorank.budget import format_count
from autorank.figures import counted, format_duration, format_value, param_parts, printable
from autorank.report import STATE_STYLES, STATE_WORDS
from autorank.winner import is_better

__all__ = ["Display", "end_output", "open_console"]

_REDRAW_S = 0.15
_PLAIN_EVERY_S = 30.0
_LEAST_FOR_BAR = 40  # columns
_ASCII = str.maketrans({"·": "-", "…": "."})  # rich sees to its own lines and bars


class _SafeStream(io.TextIOBase):
    """A text stream that swallows what must not stop a search: closed pipes, unknown characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open = True
        self.failure: Exception | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's own; a stream in memory, which has none, takes everything."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        if not self.encoding.lower().startswith("utf"):
            text = text.translate(_ASCII).encode(self.encoding, "replace").decode(self.encoding)
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self._open:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self._open, self.failure = False, error
            self._point_at_nothing()

    def _point_at_nothing(self) -> None:
        """Let the interpreter's own flush at exit find an open file, as Python's signal docs advise."""
        if self._stream not in (sys.__stdout__, sys.__stderr__):
            return
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def open_console(stream: TextIO | None = None, *, width: int | None = None) -> Console:
    """A rich console on `stream` (stdout by default) that survives closed pipes and any encoding."""
    target = cast(IO[str], _SafeStream(sys.stdout if stream is None else stream))
    return Console(file=target, width=width, markup=False, highlight=False, emoji=False)


def end_output(console: Console) -> OSError | None:
    """Flush what was printed on one of `open_console`.

    Returns:
        Why it could not be written, as on a full disk; that its reader has gone (`| head`) is no reason.
    """
    console.file.flush()
    failure = getattr(console.file, "failure", None)
    return failure if isinstance(failure, OSError) and not isinstance(failure, BrokenPipeError) else None


@dataclass(frozen=True)
class _Folded:
    """Parts joined by dots; a part that does not fit starts a new, indented line."""

    parts: Sequence[Text | str]
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(1, options.max_width - self.indent)
        line, filled = Text(), False
        for part in self.parts:
            piece = Text(part) if isinstance(part, str) else part
            if filled and line.cell_len + 3 + piece.cell_len > options.max_width:
                yield line
                line, filled = Text(" " * self.indent), False
            if filled:
                line.append(" · ", style="dim")
            # A part too long for any line is folded between words, under itself.
            first, *more = piece.wrap(console, room) or [Text()]
            line.append_text(first)
            for folded in more:
                yield line
                line = Text(" " * self.indent).append_text(folded)
            filled = True
        yield line

    def plain(self) -> str:
        """The same on one line."""
        return " · ".join(part if isinstance(part, str) else part.plain for part in self.parts)


@dataclass(frozen=True)
class _Bar:
    """A short bar with words beside it; the words alone where there is little room."""

    done: int
    total: int
    parts: Sequence[Text | str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        words = _Folded(self.parts)
        if options.max_width < _LEAST_FOR_BAR:
            yield words
            return
        total = max(1, self.total)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=16)
        grid.add_column(ratio=1)
        grid.add_row(ProgressBar(total=total, completed=min(self.done, total), width=16), words)
        yield grid


@dataclass
class _Running:
    """What is known of the trial in training."""

    number: int
    steps: int
    params: Mapping[str, Any]
    plan_parameters: int
    parameters: int
    started: float
    step: int = 0
    trained: int = 0
    loss: float | None = None
    value: float | None = None
    shown: float = 0.0
    told_parameters: int = 0
    line: _Folded | None = None
    """What is to be told of the last step, unless its validation score says the same and more."""


class Display:
    """Watches one search on one stream.

    On a terminal: a line per finished trial, and below them a view that is redrawn in place. Where
    there is no terminal, with `TERM=dumb` or with `NO_COLOR`: plain lines, a few per trial.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
        plain: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = open_console(stream) if console is None else console
        no_view = self.console.no_color or self.console.is_dumb_terminal or not self.console.is_terminal
        self._plain = no_view if plain is None else plain
        self._clock = clock
        self._live: Live | None = None
        self._drawn = -math.inf
        self._began = clock()
        self._name = ""
        self._metric, self._direction = "score", "maximize"
        self._budget = 0
        self._total = 0
        self._time_s: float | None = None
        self._states: Counter[str] = Counter()
        self._earlier = 0
        self._best: Mapping[str, Any] | None = None
        self._running: dict[int, _Running] = {}
        self._limit: tuple[str, float] | None = None
        self._scoring: tuple[str, int, int] | None = None
        self._seconds = 0.0
        self._steps = 0
        self._length = 0

    @classmethod
    def silent(cls) -> Display:
        """A display that takes every call and shows nothing: for use as a library."""
        return cls(console=Console(file=io.StringIO(), quiet=True), plain=True)

    def __enter__(self) -> Display:
        if not self._plain:
            self._live = Live(
                self._view(),
                console=self.console,
                auto_refresh=False,
                transient=True,
                # What libraries print goes above the view, but a redirected stream is left alone.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            # A killed search must not leave a terminal without its cursor.
            self.console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """One entry for the person: what was chosen, dropped or found."""
        self._say(Text(printable(text, lines=True)))

    def study_started(
        self,
        name: str,
        *,
        metric: str,
        direction: str,
        budget: int,
        total: int,
        trials: Sequence[Mapping[str, Any]] = (),
        time_s: float | None = None,
    ) -> None:
        """The study is open: `trials` are the records it already holds, `time_s` its time limit."""
        self._name, self._metric, self._direction = name, metric, direction
        self._budget, self._total, self._time_s = budget, total, time_s
        self._began = self._clock()
        for record in trials:
            self._count(record)
        self._earlier = sum(self._states.values())
        self._redraw(at_once=True)

    def trial_started(
        self,
        number: int,
        total: int,
        params: Mapping[str, Any],
        plan_parameters: int,
        budget: int,
        steps: int,
        *,
        step: int = 0,
    ) -> None:
        """A trial starts: `plan_parameters` is what its starting plan costs, `steps` its whole length.

        One that goes on does so after `step` steps.
        """
        now = self._clock()
        self._total, self._budget, self._length = total, budget, steps
        running = _Running(
            number,
            steps,
            params,
            plan_parameters,
            plan_parameters,
            now,
            step,
            shown=now,
            told_parameters=plan_parameters,
        )
        self._running[number] = running
        if self._plain and step:
            self._say(_Folded([f"trial {number} goes on", f"step {step} of {steps}"]))
        elif self._plain:
            parts = [f"trial {number} starts", *param_parts(params)]
            parts += [f"{format_count(plan_parameters)} parameters", f"{format_count(steps)} steps"]
            self._say(_Folded(parts))
        self._redraw(at_once=True)

    def nearest(self, limit: str, used: float) -> None:
        """Of all limits of the search, most is used of this one: a share from 0 to 1."""
        self._limit = limit, used

    def step(self, number: int, step: int, steps: int, loss: float, parameters: int) -> None:
        """Training step `step` of `steps` is done; `parameters` is what the adapter costs now."""
        running = self._running.get(number)
        if running is None:
            return
        if running.line is not None:
            self._say(running.line)
            running.line = None
        running.step, running.steps, running.loss, running.parameters = step, steps, loss, parameters
        # Not `step`: a trial that goes on from a stored state was not trained here from its start.
        running.trained += 1
        now = self._clock()
        if self._plain and now - running.shown >= _PLAIN_EVERY_S:
            running.line = self._progress(running)
        self._redraw()

    def evaluated(self, number: int, step: int, value: float, best: float | None) -> None:
        """A validation pass of a running trial gave `value`; `best` is the study's best so far."""
        running = self._running.get(number)
        if running is None:
            return
        running.value = value
        if self._plain:
            running.line = None
            running.step = step
            self._say(self._progress(running, f"validation {self._metric} {format_value(value)}"))
        self._redraw(at_once=True)

    def _progress(self, running: _Running, *more: str) -> _Folded:
        """How far a trial is, as a plain line; its parameters where they are others than those told last."""
        running.shown = self._clock()
        parts = [f"trial {running.number}", f"step {running.step} of {running.steps}"]
        parts += [] if running.loss is None else [f"loss {format_value(running.loss)}"]
        if running.parameters != running.told_parameters:
            running.told_parameters = running.parameters
            parts.append(f"{format_count(running.parameters)} parameters")
        return _Folded([*parts, *more, f"search: {self._time_left()}"])

    def trial_paused(self, number: int, step: int, value: float) -> None:
        """A trial waits at a rung, where it scored `value`."""
        self._leave(number)
        if self._plain:
            score = f"{self._metric} {format_value(value)}"
            self._say(_Folded([f"trial {number} waits", f"step {step}", score]))
        self._redraw(at_once=True)

    def _leave(self, number: int) -> None:
        """A trial is on no lane any more, if it was on one."""
        running = self._running.pop(number, None)
        if running is not None:
            # Only what was trained here and now tells how fast this machine is.
            self._seconds += self._clock() - running.started
            self._steps += running.trained

    def trial_ended(self, record: Mapping[str, Any]) -> None:
        """A trial ended, however it did; `record` is the study's record of it."""
        self._leave(int(record["number"]))
        first = self._count(record)
        self._say(_Folded(self._ending(record, first), indent=4))
        self._redraw(at_once=True)

    def finished(self) -> None:
        """No more trials will come."""
        self._running = {}
        spent = format_duration(self._clock() - self._began)
        done = sum(self._states.values())
        now = f"{done - self._earlier} of them now, " if self._earlier else ""
        self._say(Text(f"{counted(done, 'trial')} done ({now}in {spent}): {self._tally()}"))
        self._name = ""
        self._redraw(at_once=True)

    def scoring(self, what: str, at: int, total: int) -> None:
        """The trials are done; `what` is scored now, `at` of `total` from 1 on."""
        self._scoring = what, at, total
        if self._plain:
            self._say(Text(f"scoring {at} of {total}: {what}"))
        self._redraw(at_once=True)

    def _ending(self, record: Mapping[str, Any], first: bool) -> list[Text | str]:
        """What one line says of a trial that has ended."""
        state = str(record.get("state"))
        head = Text(f"trial {record.get('number')} ")
        head.append(STATE_WORDS.get(state, state), style=STATE_STYLES.get(state, ""))
        parts: list[Text | str] = [head]
        if state == "COMPLETE":
            score = Text(f"{self._metric} {format_value(record.get('value'))}")
            score.append(", best so far" if first else "", style="bold green")
            parts.append(score)
        if record.get("trainable_parameters") is not None:
            parts.append(f"{format_count(int(record['trainable_parameters']))} parameters")
        if stopped := record.get("stopped_early"):
            parts.append(f"stopped early at step {stopped['step']} of {stopped['of']}")
        if record.get("seconds") is not None:
            parts.append(format_duration(float(record["seconds"])))
        if record.get("control_of") is not None:
            parts.append(f"paired with trial {record['control_of']}")
        parts += [] if self._plain else [Text(part, "dim") for part in param_parts(record["params"])]
        if state != "COMPLETE" and record.get("reason"):
            parts.append(printable(str(record["reason"])))
        return [*parts, *(self._nearest() if self._plain else [])]

    def _count(self, record: Mapping[str, Any]) -> bool:
        """Take an ended trial in; whether it is the best so far."""
        state = str(record.get("state"))
        if state == "RUNNING":
            return False
        self._states[state] += 1
        better = is_better(record, self._best, direction=self._direction, budget=self._budget)
        if better:
            self._best = record
        return better

    def _tally(self) -> str:
        """How the trials ended: 3 complete, 1 pruned."""
        known = [state for state in STATE_WORDS if self._states[state]]
        return ", ".join(f"{self._states[state]} {STATE_WORDS[state]}" for state in known)

    def _seconds_left(self) -> float | None:
        """From measured steps: this trial at its own speed, the trials to come at the mean speed."""
        now, steps, seconds, left = self._clock(), self._steps, self._seconds, 0.0
        for running in self._running.values():
            if running.trained:
                own = now - running.started
                left += own / running.trained * max(0, running.steps - running.step)
                steps, seconds = steps + running.trained, seconds + own
        if steps == 0:
            return None
        started = sum(self._states.values()) + len(self._running)
        left += seconds / steps * self._length * max(0, self._total - started)
        for running in self._running.values():
            if not running.trained:
                left += seconds / steps * (running.steps - running.step)
        left /= max(1, len(self._running))  # lanes that train side by side share the time
        limit = math.inf if self._time_s is None else self._time_s - (now - self._began)
        return max(0.0, min(left, limit))

    def _time_left(self) -> str:
        left = self._seconds_left()
        return "time left unknown yet" if left is None else f"about {format_duration(left)} left"

    def _say(self, line: RenderableType) -> None:
        """Print one entry above the view, or as one plain line that is never wrapped."""
        if self._plain:
            text = line.plain() if isinstance(line, _Folded) else line
            self.console.print(text, soft_wrap=True)
        else:
            self.console.print(line)

    def _redraw(self, *, at_once: bool = False) -> None:
        if self._live is None:
            return
        now = self._clock()
        if at_once or now - self._drawn >= _REDRAW_S:
            self._drawn = now
            self._live.update(self._view(), refresh=True)

    def _view(self) -> RenderableType:
        """The part that is redrawn: the study, its best, the running trial, its budget."""
        if self._scoring is not None:
            what, at, total = self._scoring
            return _Bar(at - 1, total, [f"scoring {at} of {total}", what])
        if not self._name and not self._running:
            return ""
        rows: list[tuple[str, RenderableType]] = [("trials", self._trials_row())]
        if self._best is not None:
            rows.append(("best", self._best_row(self._best)))
        for running in self._running.values():
            rows += self._running_rows(running)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(ratio=1)
        for label, content in rows:
            grid.add_row(label, content)
        title: list[Text | str] = [
            Text(self._name, "bold"),
            f"budget {format_count(self._budget)} parameters",
        ]
        title.append(f"{self._metric}, {self._direction}")
        return Group(Text(), _Folded(title, indent=2), grid)

    def _trials_row(self) -> RenderableType:
        done = sum(self._states.values())
        tally = [self._tally()] if done else []
        parts = [f"{done} of {self._total} done", self._time_left(), *tally, *self._nearest()]
        return _Bar(done, self._total, parts)

    def _nearest(self) -> list[str]:
        """The limit of which most is used, where it is not the number of trials, which is told anyway."""
        if self._limit is None or self._limit[0] == "trials":
            return []
        name, used = self._limit
        return [f"nearest limit: {name}, {used:.0%} used"]

    def _best_row(self, best: Mapping[str, Any]) -> RenderableType:
        score = Text(f"{self._metric} {format_value(best.get('value'))}", "bold green")
        return _Folded([score, f"trial {best.get('number')}", *param_parts(best["params"])])

    def _running_rows(self, running: _Running) -> list[tuple[str, RenderableType]]:
        parts: list[Text | str] = [f"step {running.step} of {running.steps}"]
        if running.loss is not None:
            parts.append(f"loss {format_value(running.loss)}")
        if running.value is not None:
            parts.append(f"validation {self._metric} {format_value(running.value)}")
        share = running.parameters / self._budget if self._budget else 0.0
        use = f"{format_count(running.parameters)} of {format_count(self._budget)} ({share:.0%})"
        return [
            (f"trial {running.number}", _Bar(running.step, running.steps, parts)),
            ("", _Folded([Text(part, "dim") for part in param_parts(running.params)])),
            ("budget", _Bar(running.parameters, self._budget, [use])),
        ]
