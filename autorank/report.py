"""What a study says, for people: tables, a map of ranks and the verdict, drawn with rich.

Read-only: it takes records and results as the study stores them (JSON shapes) and returns things
to print. Differences are written so that + means that the winner is better, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from autorank.budget import format_count
from autorank.config import REGULARISERS
from autorank.figures import (
    counted,
    format_bytes,
    format_difference,
    format_duration,
    format_rate,
    format_value,
    name_lines,
    printable,
)
from autorank.rankmap import rank_map
from autorank.winner import gain, is_better, remarks, score_of, verdict

__all__ = [
    "STATE_STYLES",
    "STATE_WORDS",
    "moves_report",
    "plan_table",
    "result_table",
    "scores_table",
    "studies_table",
    "study_report",
    "trials_table",
]

Record = Mapping[str, Any]

STATE_WORDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
STATE_STYLES = {"COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red", "RUNNING": "cyan"}
_LONGEST_LINE = 14  # of a head or a text in a table; what is longer goes on in further lines


# -- cells ---------------------------------------------------------------------------------------


def _narrow_head(metric: str) -> str:
    """A metric's name as a head that a narrow column can carry."""
    return "\n".join(name_lines(printable(metric), 10))


def _text(value: object) -> str:
    return "-" if value is None else printable(str(value))


def _count_or_dash(value: object) -> str:
    return format_count(int(value)) if isinstance(value, (int, float)) else "-"


def _rank(value: object) -> str:
    """A starting rank; 0 stands for the ranks that the gradient gave each layer."""
    return "gradient" if value == 0 else _text(value)


def _scaling(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else "-"


def _seconds(value: object) -> str:
    return format_duration(float(value)) if isinstance(value, (int, float)) else "-"


# -- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column of a table of records, as wide as its widest cell: nothing in it is ever cut.

    Args:
        head: what stands above it.
        cell: what it says of a record.
        justify: to which side its cells go.
        need: which columns are left out where not all fit: those that are needed least come first,
            of equals the last. The first column of a table always stays.
        most: texts that are longer than this go on in further lines; numbers are given none.
        name: what it is called where it is left out, if its head does not say it.
    """

    head: str
    cell: Callable[[Record], str | Text]
    justify: JustifyMethod = "right"
    need: int = 0
    most: int | None = None
    name: str = ""

    def width(self, records: Sequence[Record]) -> int:
        """The columns of a terminal that it takes."""
        cells = (self.cell(record) for record in records)
        widest = max(
            (cell.cell_len if isinstance(cell, Text) else cell_len(cell) for cell in cells), default=0
        )
        head = max(map(cell_len, self.head.split("\n")))
        return max(head, widest if self.most is None else min(widest, self.most))

    @property
    def spoken(self) -> str:
        """Its name in a sentence."""
        return self.name or self.head.replace("\n", " ")


@dataclass(frozen=True)
class _RecordsTable:
    """A table with as many columns, and as much air, as fit the width there is; below, what was left out."""

    columns: Sequence[_Column]
    records: Sequence[Record]
    bold: Record | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width
        widths = {column: column.width(self.records) for column in self.columns}
        first, *others = self.columns
        widths[first] = min(widths[first], room)
        by_need = [first, *sorted(others, key=lambda column: -column.need)]
        while len(by_need) > 1 and sum(widths[column] + 1 for column in by_need) - 1 > room:
            by_need.pop()
        shown = [column for column in self.columns if column in by_need]
        airy = sum(widths[column] + 3 for column in shown) - 3 <= room
        table = Table(
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1) if airy else (0, 0),
            header_style="bold",
        )
        for column in shown:
            table.add_column(
                column.head,
                justify=column.justify,
                overflow="fold",
                width=widths[column],
                min_width=widths[column],
            )
        for record in self.records:
            cells = (column.cell(record) for column in shown)
            table.add_row(*cells, style="bold" if record is self.bold else None)
        yield table
        left_out = [column.spoken for column in self.columns if column not in shown]
        if left_out:
            yield Text(f"left out: {', '.join(left_out)}; widen the terminal, or see --json", "dim")


def trials_table(
    records: Sequence[Record],
    *,
    metric: str,
    budget: int,
    best: int | None,
    name: str = "NAME",
    owner: str | None = None,
) -> RenderableType:
    """Every trial with its value, size and settings, number `best` in bold; below, why trials failed.

    Args:
        records: the trials.
        metric: the study's metric.
        budget: the study's budget.
        best: the number of the trial in bold.
        name: the study's.
        owner: who trains the study now, if anyone does.
    """
    columns = _trial_columns(metric, records)
    notes = [note for record in records for note in _trial_notes(record, budget, name, owner)]
    bold = next((record for record in records if record.get("number") == best), None)
    return Group(_RecordsTable(columns, records, bold), *notes)


def _trial_columns(metric: str, records: Sequence[Record]) -> list[_Column]:
    def param(key: str) -> Callable[[Record], object]:
        return lambda record: (record.get("params") or {}).get(key)

    rank, scaling = param("rank"), param("scaling")
    modules, allocation = param("target_modules"), param("allocation")
    rate, head_rate = param("learning_rate"), param("head_learning_rate")
    head_scale = param("head_scale")
    used = [name for name in REGULARISERS if any(map(param(name), records))]
    return [
        _Column("trial", lambda r: str(r.get("number"))),
        _Column(_narrow_head(metric), _outcome, need=9),
        _Column("parameters", lambda r: _count_or_dash(r.get("trainable_parameters")), need=5),
        _Column("target\nmodules", lambda r: _text(modules(r)), "left", need=7, most=_LONGEST_LINE),
        _Column("allocation", lambda r: _text(allocation(r)), "left", need=8),
        _Column("rank", lambda r: _rank(rank(r)), need=8),
        _Column("scaling", lambda r: _scaling(scaling(r)), need=4),
        _Column("learning\nrate", lambda r: format_rate(rate(r)), need=6),
        _Column("head\nrate", lambda r: format_rate(head_rate(r)), need=3),
        _Column("head\nscale", lambda r: _scaling(head_scale(r)), need=1),
        *(_regulariser(name) for name in used),
        _Column("steps", lambda r: _count_or_dash(r.get("steps"))),
        _Column("time", lambda r: _seconds(r.get("seconds"))),
    ]


def _regulariser(name: str) -> _Column:
    def cell(record: Record) -> str:
        return _scaling((record.get("params") or {}).get(name))

    return _Column(name.replace("_", "\n"), cell, need=2)


def _outcome(record: Record) -> Text:
    """The value of a complete trial, the state of another."""
    state = str(record.get("state"))
    style = STATE_STYLES.get(state, "")
    return Text(
        format_value(record.get("value")) if state == "COMPLETE" else STATE_WORDS.get(state, state), style
    )


def _trial_notes(record: Record, budget: int, name: str, owner: str | None) -> list[Text]:
    """What a row of numbers cannot say of a trial."""
    state, number = record.get("state"), record.get("number")
    notes = []
    if record.get("control_of") is not None:
        notes.append(
            f"trial {number} and trial {record['control_of']} are a pair: they differ in allocation alone"
        )
    if record.get("reason") and state != "COMPLETE":
        word = STATE_WORDS.get(str(state), str(state))
        notes.append(f"trial {number} {word}: {printable(str(record['reason']))}")
    if state == "PRUNED" and not record.get("reason"):
        value = format_value(record.get("value"))
        notes.append(f"trial {number} pruned at step {record.get('steps')}, at {value}")
    if stopped := record.get("stopped_early"):
        notes.append(
            f"trial {number} stopped early at step {stopped['step']} of {stopped['of']}: it got no better"
        )
    if state == "RUNNING" and not record.get("reason"):
        steps = f" from step {record['steps']}" if record.get("steps") else ""
        if owner is not None:
            notes.append(
                f"trial {number} is in training{steps}, or waits for others to come as far ({owner})"
            )
        else:
            notes.append(
                f"trial {number} was interrupted; `autorank resume {printable(name)}` goes on{steps}"
            )
    parameters = record.get("trainable_parameters")
    if parameters is not None and parameters > budget:
        notes.append(f"trial {number} is over the budget of {format_count(budget)} and cannot win")
    return [Text(note, STATE_STYLES["FAIL"] if state == "FAIL" else "dim") for note in notes]


def result_table(
    best: Record | None,
    references: Mapping[str, Any],
    *,
    trials: Sequence[Record],
    metric: str,
    direction: str,
    budget: int,
    test: Mapping[str, Any] | None = None,
) -> RenderableType:
    """The winner beside its references: validation, how far the winner is ahead, test, parameters.

    Args:
        best: the winner's record.
        references: `frozen_base`, `uniform` and `control` as the study stores them.
        trials: all records; the references name theirs by number.
        metric: the study's metric.
        direction: `maximize` or `minimize`.
        budget: the study's budget.
        test: the winner's metrics on the test rows, where there are any.
    """
    if best is None:
        return Text("no trial may win: none is complete, finite and within the budget", "red")
    by_number = {record.get("number"): record for record in trials}
    rows = [_result_row("winner", best, {"validation": {metric: best.get("value")}, "test": test}, metric)]
    number = {key: (references.get(key) or {}).get("number") for key in ("control", "uniform")}
    same = number["control"] is not None and number["control"] == number["uniform"]
    for label, key in (
        ("paired run,\nbest uniform" if same else "paired run", "control"),
        ("best uniform", "uniform"),
        ("frozen base", "frozen_base"),
    ):
        reference = references.get(key)
        shown = key == "uniform" and same
        if reference and not shown and reference.get("number", "base") != best.get("number"):
            rows.append(_result_row(label, by_number.get(reference.get("number"), {}), reference, metric))
    columns = [
        _Column("", lambda row: row["label"], "left"),
        _Column("trial", lambda row: _text(row["number"]), need=5),
        _Column("allocation", lambda row: row["allocation"], "left", need=4),
        _Column("parameters", lambda row: format_count(row["parameters"]), need=3),
        _Column("validation", lambda row: format_value(row["validation"]), need=9),
        _ahead(rows[0], "validation", direction, need=8),
        _Column("test", lambda row: format_value(row["test"]), need=7),
        _ahead(rows[0], "test", direction, need=6),
    ]
    less = " (less is better)" if direction == "minimize" else ""
    text = f"{metric}{less}; parameters: trainable in the adapter, budget {format_count(budget)}"
    head = best.get("head_parameters")
    text += f"; a head of {format_count(head)} is counted apart" if head else ""
    return Group(_RecordsTable(columns, rows, rows[0]), Text(text, "dim"))


def _result_row(label: str, record: Record, scores: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        "label": label,
        "number": record.get("number"),
        "allocation": str((record.get("params") or {}).get("allocation", "-")),
        "parameters": int(record.get("trainable_parameters") or 0),
        "validation": score_of(scores.get("validation"), metric),
        "test": score_of(scores.get("test"), metric),
    }


def _ahead(winner: Record, split: str, direction: str, *, need: int) -> _Column:
    """How far the winner is ahead of each on a split."""

    def cell(row: Record) -> str:
        return "" if row is winner else format_difference(gain(winner[split], row[split], direction))

    return _Column("winner\nahead by", cell, need=need, name=f"winner ahead by ({split})")


def studies_table(studies: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The studies there are, one line each."""
    if not studies:
        return Text("no studies here yet; `autorank search --budget 100k` starts one")
    columns = [
        _Column("study", lambda s: _text(s.get("name")), "left", most=24),
        _Column("model", lambda s: _text(s.get("model")), "left", need=2, most=30),
        _Column("data", lambda s: _text(s.get("data")), "left", need=1, most=30),
        _Column("budget", lambda s: _count_or_dash(s.get("budget")), need=3),
        _Column("trials", lambda s: _text(s.get("trials")), need=4),
        _Column("metric", lambda s: _text(s.get("metric")), "left", need=5, most=_LONGEST_LINE),
        _Column("best", lambda s: format_value(s.get("best")), need=6),
    ]
    notes = [Text(note, "red") for study in studies for note in _study_notes(study)]
    return Group(_RecordsTable(columns, studies), *notes)


def _study_notes(study: Record) -> list[str]:
    name, owner = printable(str(study.get("name"))), study.get("owner")
    if study.get("error"):
        return [printable(str(study["error"]))]
    if (study.get("states") or {}).get("RUNNING"):
        return [
            f"{name} is in training: {printable(str(owner))}"
            if owner
            else f"{name} was interrupted; `autorank resume {name}` goes on"
        ]
    if study.get("best") is not None and not study.get("scored"):
        return [f"{name}: {_not_scored(f'`autorank resume {name}`', owner)}"]
    return []


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """A dry run for people: what each group of layers costs, and what a search would take.

    Args:
        plan: `groups` (each with `name`, `layers`, `cost` of one rank at all of them,
            `largest_rank` of all under the budget, how trials `start`, and the most `parameters`
            that one starts with), and whichever of `model`, `data`, `task`, `budget`, `trials`,
            `lanes`, `steps`, `parameters`, `head_parameters`, `memory_bytes`,
            `seconds_per_step`, `seconds` are known.
    """
    columns = [
        _Column("group", lambda g: _text(g.get("name")), "left", most=24),
        _Column("layers", lambda g: _count_or_dash(g.get("layers")), need=1),
        _Column("cost of\nrank 1", lambda g: _count_or_dash(g.get("cost")), need=5),
        _Column(
            "largest\nrank",
            lambda g: "<1" if g.get("largest_rank") == 0 else _text(g.get("largest_rank")),
            need=4,
        ),
        _Column("start", lambda g: ", ".join(g.get("start", ("uniform",))), "left", need=2),
        _Column("most\nparameters", lambda g: _count_or_dash(g.get("parameters")), need=3),
    ]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, label, show in _PLAN_FACTS:
        if plan.get(name) is not None:
            facts.add_row(label, show(plan[name]))
    groups = [_with_parameters(group) for group in plan.get("groups", ())]
    return Group(facts, Text(), _RecordsTable(columns, groups))


def scores_table(found: Mapping[str, Any]) -> RenderableType:
    """What an exported adapter scores on rows, the study's own metric first.

    Args:
        found: `scores` and `standard_errors` by metric, the study's `metric`, `examples`, `truncated`,
            `dropped` by reason.
    """
    scores, errors, own = found["scores"], found["standard_errors"], found["metric"]
    names = sorted(scores, key=lambda name: name != own)
    columns = [
        _Column("metric", lambda row: row["name"], "left", most=30),
        _Column("score", lambda row: format_value(row["score"]), need=1),
        _Column("standard\nerror", lambda row: format_value(row["error"])),
    ]
    rows = [{"name": name, "score": scores[name], "error": errors.get(name)} for name in names]
    parts = [f"{counted(found['examples'], 'example')} scored"]
    if found["truncated"]:
        parts.append(f"{found['truncated']:,} of them cut")
    parts += [f"{count:,} dropped ({reason})" for reason, count in found["dropped"].items()]
    table = _RecordsTable(columns, rows, rows[0])
    return Group(table, Text(printable("; ".join(parts)), "dim"))


def _with_parameters(group: Record) -> dict[str, Any]:
    """What the largest rank costs, where the group does not say so itself."""
    cost, rank = group.get("cost"), group.get("largest_rank")
    known = cost * rank if isinstance(cost, int) and isinstance(rank, int) else None
    return {"parameters": known, **group}


_PLAN_FACTS: tuple[tuple[str, str, Callable[[object], str]], ...] = (
    ("model", "model", lambda value: printable(str(value))),
    ("data", "data", lambda value: printable(str(value))),
    ("task", "task", lambda value: printable(str(value))),
    ("budget", "budget", lambda value: f"{_count_or_dash(value)} parameters"),
    ("parameters", "first trial", lambda value: f"{_count_or_dash(value)} parameters"),
    (
        "head_parameters",
        "head",
        lambda value: f"{_count_or_dash(value)} parameters, counted apart" if value else "none",
    ),
    ("memory_bytes", "memory", format_bytes),
    ("steps", "steps per trial", _count_or_dash),
    ("lanes", "lanes", lambda value: f"{value} in one pass" if value != 1 else "1"),
    ("seconds_per_step", "one pass", lambda value: f"{value:.3g} s" if isinstance(value, float) else "-"),
    ("trials", "trials", _count_or_dash),
    ("seconds", "all trials", lambda value: f"at most about {_seconds(value)}"),
)


# -- whole pages ---------------------------------------------------------------------------------


def study_report(study: Mapping[str, Any]) -> RenderableType:
    """A whole study on one page: trials, the winner beside its references, verdict, rank map.

    Args:
        study: what `show NAME --json` gives: name, metric, direction, budget, trials, best,
            references, and the stored result where the search has ended.
    """
    metric, direction, budget = str(study["metric"]), str(study["direction"]), int(study["budget"])
    trials: Sequence[Record] = study["trials"]
    kinds = {"metric": metric, "direction": direction}
    count = counted(len(trials), "trial")
    head = f"  {metric}, {direction}; budget {format_count(budget)} parameters; {count}"
    parts: list[RenderableType] = [
        Text.assemble((printable(str(study["name"])), "bold"), (head, "dim")),
        Text(),
    ]
    result, best = study.get("result") or {}, study.get("best")
    resume = f"`autorank resume {printable(str(study['name']))}`"
    if trials:
        number = best["number"] if best else None
        name, owner = str(study["name"]), study.get("owner")
        parts += [trials_table(trials, metric=metric, budget=budget, best=number, name=name, owner=owner)]
        parts += [*_cost_lines(study.get("cost") or {}, metric), Text()]
    if result and best and result.get("best") != best["number"]:
        parts += [Text(f"the result is out of date: {resume} brings it up to date", "yellow"), Text()]
    elif result and best:
        references = study.get("references") or result.get("references") or {}
        table = result_table(best, references, trials=trials, budget=budget, test=result.get("test"), **kinds)
        sentence = verdict({**result, "references": references}, trials=trials, **kinds)
        parts += [table, *_test_note(result), Text(), Text(sentence, "bold")]
        parts += [*(Text(remark, "yellow") for remark in remarks(result, trials=trials, **kinds))]
        if not study["scored"]:
            parts.append(Text(f"trials have ended since: {resume} brings the verdict up to date", "yellow"))
        parts.append(Text())
    elif best and not any(trial.get("state") == "RUNNING" for trial in trials):
        parts += [Text(_not_scored(resume, study.get("owner")), "yellow"), Text()]
    if best:
        parts.append(Text(f"ranks of trial {best['number']}, the best", "bold"))
        parts += [Text(printable(str(best["moved"])), "dim")] if best.get("moved") else []
        parts.append(rank_map(best.get("ranks") or {}, starting=best.get("starting_ranks")))
    return Group(*parts)


def _not_scored(resume: str, owner: object) -> str:
    """Of a study whose trials have all ended: a kill came before their result, or it is being made."""
    if owner is not None:
        return f"the winner and its references are being scored: {printable(str(owner))}"
    return f"the final scoring of the winner and its references was not done: {resume} does it"


def _cost_lines(cost: Mapping[str, Any], metric: str) -> list[Text]:
    """What the trials cost together, and how the best score came with it."""
    if not cost.get("samples"):
        return []
    counts = {name: format_count(cost[name]) for name in ("samples", "tokens", "evaluation_samples")}
    tokens = "" if cost["tokens"] == cost["samples"] else f", {counts['tokens']} tokens"  # images have none
    scored = f"{counts['evaluation_samples']} samples scored besides"
    lines = [f"trained on {counts['samples']} samples{tokens}; {scored}"]
    curve = [f"{format_value(value)} at {format_count(int(samples))}" for samples, value in cost["curve"]]
    # The first and the last points say most: where it began, and what the end cost.
    shown = curve if len(curve) <= 5 else [curve[0], "…", *curve[-3:]]
    lines += [f"best {metric} by samples: {', '.join(shown)}"] if curve else []
    return [Text(line, "dim") for line in lines]


def moves_report(study: Mapping[str, Any]) -> RenderableType:
    """How ranks moved in the best trial that has any moves, each with the scores compared, and the map.

    Args:
        study: as for `study_report`.
    """
    direction, budget = str(study["direction"]), int(study["budget"])
    best: Record | None = None
    for trial in study["trials"]:
        if trial.get("ledger") and is_better(trial, best, direction=direction, budget=budget):
            best = trial
    if best is None:
        told = [t for t in study["trials"] if t.get("moved")]
        words = [f"trial {t['number']}: {printable(str(t['moved']))}" for t in told]
        return Group(Text("no finished trial has moved a rank"), *(Text(line, "dim") for line in words))
    columns = [
        _Column("step", lambda m: _count_or_dash(m.get("step"))),
        _Column("layer", lambda m: printable(str(m.get("layer"))), "left", need=5, most=40),
        _Column("rank", lambda m: f"{m.get('before')} → {m.get('after')}", need=4),
        _Column("score", lambda m: _score(m.get("score")), need=3),
        _Column("against", lambda m: _score(m.get("against")), need=2),
        _Column("parameters", lambda m: _count_or_dash(m.get("parameters")), need=1),
    ]
    ledger: Sequence[Record] = best["ledger"]
    head = Text(f"rank moves of trial {best['number']}: {printable(str(best.get('moved') or ''))}", "bold")
    legend = (
        "score: what one more rank promised at the layer, per parameter; against: the same of the other side "
        "of the swap, 0 where free parameters paid, or layers that gain nothing; "
        f"budget {format_count(budget)}"
    )
    return Group(
        head,
        _RecordsTable(columns, ledger),
        Text(legend, "dim"),
        Text(),
        rank_map(best.get("ranks") or {}, starting=best.get("starting_ranks")),
    )


def _score(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else "-"


def _test_note(result: Mapping[str, Any]) -> list[Text]:
    """When the test rows were read, and whether they had been read before this winner was chosen."""
    if not result.get("test_read_at"):
        return []
    seen = "; they had been read before this winner was chosen" if result.get("test_seen_before") else ""
    return [Text(f"test rows read at {printable(str(result['test_read_at']))}{seen}", "dim")]
