"""What people see of a study; read back from the drawn text."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console, RenderableType

from autorank.rankmap import rank_map
from autorank.report import (
    moves_report,
    plan_table,
    result_table,
    scores_table,
    studies_table,
    study_report,
    trials_table,
)

KINDS = {"attention.self.query": 768, "attention.output.dense": 768, "intermediate.dense": 1920}
NAMES = [f"bert.encoder.layer.{block}.{kind}" for block in range(6) for kind in KINDS]


def record(number: int, state: str = "COMPLETE", value: float | None = None, **facts: Any) -> dict[str, Any]:
    params = {
        "target_modules": facts.pop("target_modules", "all-linear"),
        "allocation": facts.pop("allocation", "uniform"),
        "rank": 4,
        "scaling": 2.0,
        "learning_rate": 2e-3,
        "head_learning_rate": 1e-3,
        "head_scale": 0.3,
    }
    return {
        "number": number,
        "state": state,
        "value": value,
        "params": params,
        "trainable_parameters": 165_888,
        "head_parameters": 29_645,
        "ranks": dict.fromkeys(NAMES, 4),
        "starting_ranks": dict.fromkeys(NAMES, 4),
        "steps": 700,
        "samples": 22_400,
        "seconds": 271.0,
        "reason": None,
        "control_of": None,
        "metrics": {"accuracy": value},
        **facts,
    }


TRIALS = [
    record(0, value=0.9187),
    record(1, value=0.9220, allocation="adaptive"),
    record(2, "PRUNED", 0.8713, target_modules="query-value", steps=280),
    record(
        3,
        "FAIL",
        reason="the loss became NaN at step 41\n(learning rate 9.7e-3, rank 4, all-linear, scaling 2.0)",
    ),
    record(4, value=0.95, trainable_parameters=170_001),
    record(5, value=0.9193, control_of=1),
    record(6, "RUNNING", steps=None),
]
REFERENCES = {
    "frozen_base": {"validation": {"accuracy": 0.898}, "test": {"accuracy": 0.895}},
    "uniform": {"number": 0, "validation": {"accuracy": 0.9187}, "test": None},
    "control": {
        "number": 5,
        "validation": {"accuracy": 0.9193},
        "test": {"accuracy": 0.9187},
        "difference": {"mean": 0.0027, "low": -0.006, "high": 0.0115, "n": 1500},
    },
}
RESULT = {
    "best": 1,
    "references": REFERENCES,
    "test": {"accuracy": 0.91},
    "test_read_at": "2026-01-02T03:04:05+00:00",
    "test_seen_before": True,
}
STUDY = {
    "name": "minilm-banking77",
    "metric": "accuracy",
    "direction": "maximize",
    "budget": 170_000,
    "trials": TRIALS,
    "best": TRIALS[1],
    "references": REFERENCES,
    "result": RESULT,
    "scored": True,
}


def draw(thing: RenderableType, width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, **options)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize("width", [80, 90, 100, 105, 110, 119, 120])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    assert "…" not in draw(trials_table(TRIALS, metric="accuracy", budget=170_000, best=1), width)


def _everything() -> dict[str, RenderableType]:
    """Every table there is, with numbers in all of its cells."""
    own = {**STUDY, "metric": "scores_of_mine:points_of_all_the_answers", "result": None, "scored": False}
    moves = [{"step": 1_020, "layer": "bert.encoder.layer.11.attention.self.query", "before": 14, "after": 12,
              "score": 1.25e-6, "against": 0.00251, "parameters": 165_888}]  # fmt: skip
    moved = record(1, value=0.7) | {"ledger": moves, "moved": "ranks moved"}
    kind = "a.feed_forward_network_of_the_second_expert.weight"
    deep = {f"layers.{block}.{kind}": 128 for block in range(101)}
    studies = [{"name": "a-study-that-has-a-very-long-name", "model": "builtin:minilm", "data": "rows " * 9,
                "budget": 170_000_000, "trials": 1_200, "metric": "loss", "best": 0.922}]  # fmt: skip
    groups = [{"name": "all-linear", "layers": 1_224, "cost": 18_432_000, "largest_rank": 1_024}]
    scored = {"scores": {"accuracy": 0.91234}, "standard_errors": {"accuracy": 0.01234}, "metric": "accuracy",
              "examples": 1_500, "truncated": 0, "dropped": {}}  # fmt: skip
    return {
        "a page": study_report(STUDY),
        "a page of an own metric": study_report(own),
        "moves": moves_report({"direction": "maximize", "budget": 170_000, "trials": [moved]}),
        "a deep map": rank_map(deep),
        "studies": studies_table(studies),
        "a plan": plan_table({"groups": groups, "budget": 170_000}),
        "scores": scores_table(scored),
    }


EVERYTHING = _everything()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("what", EVERYTHING)
def test_no_number_is_cut_at_any_width(what: str, width: int) -> None:
    text = draw(EVERYTHING[what], width)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width

    def numbers(text: str) -> set[str]:
        return {word for word in text.split() if word[-1].isdigit()}

    assert numbers(text) <= numbers(draw(EVERYTHING[what], 400))


def test_columns_are_left_out_in_a_stated_order_and_named() -> None:
    def left_out(thing: RenderableType, width: int) -> list[str]:
        said = " ".join(draw(thing, width).split())
        return re.findall(r"left out: (.*?); widen the terminal, or see --json", said)

    tables = trials_table(TRIALS, metric="accuracy", budget=170_000, best=1)
    assert left_out(tables, 120) == []
    assert left_out(tables, 60) == ["parameters, scaling, head rate, head scale, steps, time"]
    trials, references = left_out(study_report(STUDY), 40)
    assert trials.startswith("parameters, target modules, scaling")
    assert references == "trial, allocation, parameters, winner ahead by (test)"
    assert left_out(EVERYTHING["studies"], 40) == ["model, data, budget, trials"]


@pytest.mark.parametrize("width", [80, 120])
def test_trials_are_one_line_each(width: int) -> None:
    text = draw(trials_table(TRIALS, metric="accuracy", budget=170_000, best=1), width)
    found = {row[0]: row for row in rows(text) if row and row[0].isdigit()}
    assert set(found) == {str(number) for number in range(7)}
    assert found["1"][1:9] == ["0.9220", "165,888", "all-linear", "adaptive", "4", "2", "2e-3", "1e-3"]
    assert [found[n][1] for n in "236"] == ["pruned", "failed", "running"]
    assert found["2"][3] == "query-value"
    assert ("4m 31s" in text) == (width == 120)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [
        (80, False, "left out: head scale, dropout, label smoothing, steps, time; widen the terminal"),
        (100, True, "left out: steps, time; widen the terminal, or see --json"),
        (140, True, None),
    ],
)
def test_what_holds_trials_back_is_a_column_where_it_is_used(
    width: int, shown: bool, left_out: str | None
) -> None:
    held = [record(0, value=0.9), record(1, value=0.91)]
    held[1]["params"] |= {"dropout": 0.05, "weight_decay": 0.0, "label_smoothing": 0.1}
    text = draw(trials_table(held, metric="accuracy", budget=170_000, best=1), width)
    found = {row[0]: row for row in rows(text) if row and row[0].isdigit()}
    assert ("0.05" in found["1"]) == shown
    said = " ".join(text.split())
    assert left_out in said if left_out else "left out" not in said
    assert "…" not in text and "decay" not in text


def test_a_trial_that_stopped_early_says_where() -> None:
    stopped = record(0, value=0.9, steps=75, stopped_early={"step": 75, "of": 100})
    text = draw(trials_table([stopped], metric="accuracy", budget=170_000, best=0), 120)
    assert "trial 0 stopped early at step 75 of 100: it got no better" in text


def test_reasons_and_controls_are_told_below_the_table() -> None:
    text = draw(trials_table(TRIALS, metric="accuracy", budget=170_000, best=1), 200)
    assert "trial 2 pruned at step 280, at 0.8713" in text
    assert "trial 3 failed: the loss became NaN at step 41 (learning rate 9.7e-3" in text
    assert "trial 4 is over the budget of 170,000 and cannot win" in text
    assert "trial 5 and trial 1 are a pair: they differ in allocation alone" in text
    assert "trial 6 was interrupted; `autorank resume NAME` goes on" in text


def test_the_best_trial_is_bold() -> None:
    table = trials_table(TRIALS, metric="accuracy", budget=170_000, best=1)
    text = draw(table, force_terminal=True, color_system="standard")
    bold = [line for line in text.splitlines() if "\x1b[1m" in line and "165,888" in line]
    assert len(bold) == 1 and "adaptive" in bold[0]


def test_a_hostile_reason_does_not_reach_the_terminal() -> None:
    trials = [record(0, "FAIL", reason="\x1b]0;title\x07 [red]boom[/red]")]
    text = draw(trials_table(trials, metric="accuracy", budget=170_000, best=1))
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]boom[/red]" in text


def table(direction: str = "maximize", **changes: Any) -> list[list[str]]:
    facts: dict[str, Any] = {
        "best": TRIALS[1],
        "references": REFERENCES,
        "trials": TRIALS,
        "metric": "accuracy",
        "direction": direction,
        "budget": 170_000,
        "test": {"accuracy": 0.91},
        **changes,
    }
    return rows(draw(result_table(**facts)))


def test_the_winner_beside_its_references() -> None:
    found = table()
    assert ["winner", "1", "adaptive", "165,888", "0.9220", "0.9100"] in found
    control = ["paired", "run", "5", "uniform", "165,888", "0.9193", "+0.0027", "0.9187", "-0.0087"]
    assert control in found
    assert ["best", "uniform", "0", "uniform", "165,888", "0.9187", "+0.0033", "-", "-"] in found
    assert ["frozen", "base", "-", "-", "0", "0.8980", "+0.0240", "0.8950", "+0.0150"] in found


def test_plus_means_that_the_winner_is_better_where_less_is() -> None:
    found = table("minimize")
    assert ["frozen", "base", "-", "-", "0", "0.8980", "-0.0240", "0.8950", "-0.0150"] in found
    assert any("(less is better);" in " ".join(row) for row in found)


def test_a_uniform_winner_is_not_its_own_reference() -> None:
    found = table(best=TRIALS[0])
    assert not any(row[:2] == ["best", "uniform"] for row in found)
    assert any(row[:1] == ["winner"] for row in found)


def test_a_trial_that_is_two_references_is_one_row() -> None:
    both = {**REFERENCES, "uniform": {**REFERENCES["control"], "number": 5}}
    text = draw(
        result_table(TRIALS[1], both, trials=TRIALS, metric="accuracy", direction="maximize", budget=1)
    )
    assert [row[:2] for row in rows(text)].count(["best", "uniform"]) == 1
    numbers = [word for row in rows(text) for word in row if word == "5"]
    assert "paired run," in text and numbers == ["5"]


def test_no_trial_may_win() -> None:
    assert "no trial may win" in " ".join(table(best=None)[0])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_whole_page(width: int) -> None:
    text = draw(study_report(STUDY), width)
    flat = " ".join(text.split())
    for part in (
        "minilm-banking77",
        "No gain over uniform: validation accuracy better by 0.0027",
        "test rows read at 2026-01-02T03:04:05+00:00; they had been read before",
        "a head of 29,645 is counted apart",
        "ranks of trial 1, the best",
        "rank 4 at 18 layers; none moved",
    ):
        assert part in flat
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_what_the_study_cost_is_told_in_samples() -> None:
    points = [[100 * n, 0.5 + n / 20] for n in range(1, 8)]
    cost = {"samples": 12_000, "tokens": 300_000, "evaluation_samples": 900, "curve": points}
    flat = " ".join(draw(study_report({**STUDY, "cost": cost}), 120).split())
    assert "trained on 12,000 samples, 300,000 tokens; 900 samples scored besides" in flat
    assert "best accuracy by samples: 0.5500 at 100, …, 0.7500 at 500, 0.8000 at 600, 0.8500 at 700" in flat


def test_a_paused_trial_is_told_with_its_step_and_who_trains_the_study() -> None:
    study = {**STUDY, "trials": [record(6, "RUNNING", steps=350)], "best": None, "result": None}
    text = " ".join(draw(study_report({**study, "owner": None}), 120).split())
    assert "trial 6 was interrupted; `autorank resume minilm-banking77` goes on from step 350" in text
    text = " ".join(draw(study_report({**study, "owner": "process 1 on a, since 2026"}), 120).split())
    assert "trial 6 is in training from step 350, or waits for others to come as far (process 1 on a" in text


def test_one_trial_is_not_many() -> None:
    assert "; 1 trial\n" in draw(study_report({**STUDY, "trials": TRIALS[1:2]}), 120)
    assert f"; {len(TRIALS)} trials\n" in draw(study_report(STUDY), 120)


def test_a_result_of_an_earlier_winner_is_not_told() -> None:
    text = draw(study_report({**STUDY, "result": {**RESULT, "best": 0}}), 120)
    assert "out of date: `autorank resume minilm-banking77` brings it up to date" in text
    assert "ranks of trial 1, the best" in text
    for stale in ("test rows read", "winner", "frozen base", "No gain", "0.9100"):
        assert stale not in text
    assert "out of date" not in draw(study_report(STUDY), 120)


def test_a_study_whose_winner_was_not_scored_says_so() -> None:
    """A kill during the final scoring leaves no trial that runs, and no result."""
    ended = {**STUDY, "trials": TRIALS[:6], "result": None, "references": None, "scored": False}
    said = "the final scoring of the winner and its references was not done: `autorank resume"
    assert f"{said} minilm-banking77` does it" in draw(study_report(ended), 120)
    assert said not in draw(study_report({**ended, "trials": TRIALS}), 120)  # one runs: it says how to go on
    assert said not in draw(study_report(STUDY), 120)
    text = draw(study_report({**ended, "owner": "process 1 on a"}), 120)
    assert "are being scored: process 1 on a" in text and "resume" not in text
    later = draw(study_report({**STUDY, "scored": False}), 120)
    assert (
        "trials have ended since: `autorank resume minilm-banking77` brings the verdict up to date" in later
    )
    listed = {"name": "first", "best": 0.9, "states": {"COMPLETE": 7}, "scored": False, "error": None}
    assert "first: the final scoring of the winner and its references" in draw(studies_table([listed]), 120)
    for other in ({**listed, "scored": True}, {**listed, "best": None}):
        assert "scoring" not in draw(studies_table([other]), 120)


def test_a_study_that_has_just_begun() -> None:
    begun = {
        **STUDY,
        "trials": [record(0, "RUNNING", ranks={})],
        "best": None,
        "references": None,
        "result": None,
    }
    text = draw(study_report(begun))
    assert "running" in text and "winner" not in text and "ranks of" not in text
    assert "0 trials" in draw(study_report({**begun, "trials": []}))


def test_studies() -> None:
    assert "autorank search" in draw(studies_table([]))
    facts = {"model": "builtin:minilm", "metric": "accuracy", "budget": 170_000, "trials": 7, "best": 0.922}
    studies = [
        {"name": "first", **facts, "states": {"COMPLETE": 7}, "scored": True, "error": None},
        {"name": "second", **facts, "best": None, "states": {"COMPLETE": 2, "RUNNING": 1}, "error": None},
        {"name": "third", "error": "study.db is damaged: restore it from a copy"},
    ]
    text = draw(studies_table(studies))
    assert ["first", "builtin:minilm", "-", "170,000", "7", "accuracy", "0.9220"] in rows(text)
    assert ["third", *"------"] in rows(text)
    assert "`autorank resume second` goes on" in text and "resume first" not in text
    assert "study.db is damaged: restore it from a copy" in text
    text = draw(studies_table([{**studies[1], "owner": "process 1 on a"}]))
    assert "second is in training: process 1 on a" in text and "resume" not in text


def test_a_plan() -> None:
    groups = [
        {"name": "attention", "layers": 24, "cost": 18_432, "largest_rank": 9},
        {"name": "mlp", "layers": 12, "cost": 23_040, "largest_rank": 7, "parameters": 161_280},
        {
            "name": "whole",
            "layers": 90,
            "cost": 200_000,
            "largest_rank": 0,
            "start": ["gradient"],
            "parameters": 169_000,
        },
    ]
    text = draw(plan_table({"groups": groups, "budget": 170_000, "memory_bytes": 3 * 2**29, "seconds": 3900}))
    assert ["attention", "24", "18,432", "9", "uniform", "165,888"] in rows(text)
    assert ["mlp", "12", "23,040", "7", "uniform", "161,280"] in rows(text)
    assert ["whole", "90", "200,000", "<1", "gradient", "169,000"] in rows(text)
    for part in ("170,000 parameters", "1.5 GiB", "at most about 1h 05m"):
        assert part in text


def test_moves_are_told_one_by_one_with_the_scores_compared() -> None:
    moves = [
        {
            "step": 20,
            "layer": "m.0.a",
            "before": 4,
            "after": 2,
            "score": 1e-6,
            "against": 0.25,
            "parameters": 88,
        },
        {
            "step": 20,
            "layer": "m.1.a",
            "before": 4,
            "after": 6,
            "score": 0.25,
            "against": 1e-6,
            "parameters": 96,
        },
    ]
    moved = record(1, value=0.7, allocation="adaptive") | {
        "ledger": moves, "moved": "ranks moved at 2 of 2 layers", "ranks": {"m.0.a": 2, "m.1.a": 6},
    }  # fmt: skip
    better = record(2, value=0.9) | {"ledger": []}
    study = {"direction": "maximize", "budget": 170_000, "trials": [moved, better]}
    text = draw(moves_report(study), 100)
    assert "rank moves of trial 1: ranks moved at 2 of 2 layers" in text
    lines = [line.split() for line in text.splitlines() if "→" in line]
    assert lines == [
        ["20", "m.0.a", "4", "→", "2", "1e-06", "0.25", "88"],
        ["20", "m.1.a", "4", "→", "6", "0.25", "1e-06", "96"],
    ]
    still = record(3, value=0.8) | {"ledger": [], "moved": "ranks stayed as they were: flat"}
    text = draw(moves_report({**study, "trials": [still]}))
    assert "no finished trial has moved a rank" in text
    assert "trial 3: ranks stayed as they were: flat" in text
