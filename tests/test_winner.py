"""The winner, differences and the sentence that may be said."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.winner import gain, is_better, remarks, verdict

VALUES = st.floats(-10, 10)


def record(number: int, value: float | None, allocation: str = "uniform", **facts: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": "COMPLETE",
        "value": value,
        "trainable_parameters": 100,
        "params": {"allocation": allocation},
        **facts,
    }


@given(VALUES, VALUES)
def test_plus_means_better_in_both_directions(winner: float, other: float) -> None:
    up, down = gain(winner, other, "maximize"), gain(winner, other, "minimize")
    assert up is not None and down is not None
    assert up == -down
    assert (up > 0) == (winner > other)


def test_no_gain_without_two_numbers() -> None:
    assert gain(None, 1.0, "maximize") is None
    assert gain(1.0, None, "minimize") is None


@given(st.lists(VALUES, min_size=1), st.sampled_from(["maximize", "minimize"]))
def test_the_best_is_the_first_of_the_extreme_ones(values: list[float], direction: str) -> None:
    best = None
    for number, value in enumerate(values):
        given = record(number, value)
        best = given if is_better(given, best, direction=direction, budget=100) else best
    assert best is not None
    assert best["number"] == values.index((max if direction == "maximize" else min)(values))


def test_what_may_not_win() -> None:
    losers = [
        record(0, math.inf),
        record(1, math.nan),
        record(2, 5.0, trainable_parameters=101),
        record(3, 5.0, state="PRUNED"),
        record(4, None, state="FAIL"),
    ]
    for loser in losers:
        assert not is_better(loser, None, direction="maximize", budget=100)
        assert not is_better(loser, record(5, 0.1), direction="maximize", budget=100)
    assert is_better(record(5, 0.1), None, direction="maximize", budget=100)


def result(
    low: float | None,
    *,
    best: int = 1,
    base: float = 0.5,
    test: float | None = None,
    uniform: dict[str, Any] | None = None,
) -> dict[str, Any]:
    control = {"number": 2, "difference": {"mean": 0.02, "low": low, "high": 0.04, "n": 1500}}
    return {
        "best": best,
        "test": None if test is None else {"accuracy": test},
        "references": {
            "frozen_base": {"validation": {"accuracy": base}},
            "uniform": {"number": 0, **(uniform or {})},
            "control": None if low is None else control,
        },
    }


TRIALS = [record(0, 0.8), record(1, 0.9, "adaptive"), record(2, 0.88)]


def say(result: dict[str, Any], trials: list[dict[str, Any]] = TRIALS, direction: str = "maximize") -> str:
    """The sentence on uniform ranks, behind that on the frozen base where there is one."""
    whole = verdict(result, trials=trials, metric="accuracy", direction=direction)
    assert whole.endswith(".") and "\n" not in whole
    return whole.rpartition(". ")[2]


def test_how_far_the_winner_is_ahead_of_the_frozen_base_comes_first() -> None:
    """On test where there is one: a newcomer's first question, also where the winner is uniform."""

    def first(test: float | None, base_test: float | None, best: int = 0) -> str:
        facts = result(0.01, best=best, base=0.7, test=test)
        facts["references"]["frozen_base"]["test"] = base_test and {"accuracy": base_test}
        whole = verdict(facts, trials=TRIALS, metric="accuracy", direction="maximize")
        assert (". No gain over uniform: " if best == 0 else ". Adaptive ranks beat uniform") in whole
        return whole.partition(". ")[0]

    assert first(0.75, 0.5) == "The winner is ahead of the frozen base by 0.2500 on test"
    assert first(None, None) == "The winner is ahead of the frozen base by 0.1000 on validation"
    assert first(None, None, best=1) == "The winner is ahead of the frozen base by 0.2000 on validation"
    level = "The winner is level with the frozen base on test, ahead by 0.1000 on validation"
    assert first(0.5, 0.5) == level
    facts = result(0.01, best=0)
    facts["references"]["frozen_base"] = None
    whole = verdict(facts, trials=TRIALS, metric="accuracy", direction="maximize")
    assert whole.startswith("No gain over uniform: the winner, trial 0, is uniform itself")


def test_no_gain_is_claimed_on_a_handful_of_rows() -> None:
    facts = result(0.005, uniform={"validation": {"accuracy": 0.8}})
    facts["references"]["control"]["difference"]["n"] = 99
    assert say(facts).startswith(
        "No verdict on uniform, for 99 samples are too few to claim a gain: validation"
    )
    facts["references"]["control"]["difference"]["n"] = 100
    assert say(facts).startswith("Adaptive ranks beat uniform here")


def test_a_gain_is_claimed_with_its_interval_and_what_it_rests_on() -> None:
    sentence = say(result(0.005, uniform={"validation": {"accuracy": 0.8}}))
    assert sentence.startswith("Adaptive ranks beat uniform here: validation accuracy better by 0.0200")
    for part in (
        "(95 % interval +0.0050 to +0.0400 on 1,500 samples; + favours the winner)",
        "trial 1",
        "trial 2",
        "one pair, one seed",
    ):
        assert part in sentence


@pytest.mark.parametrize("low", [0.0, -0.01])
def test_an_interval_that_reaches_zero_is_no_gain(low: float) -> None:
    assert say(result(low)).startswith("No gain over uniform: validation accuracy better by 0.0200")


@pytest.mark.parametrize(
    ("mean", "words"),
    [
        (0.0032, "better by 0.0032"),
        (-0.0032, "worse by 0.0032"),
        (-0.00001, "no different"),
        (0.0, "no different"),
    ],
)
def test_a_difference_of_a_loss_is_told_in_words(mean: float, words: str) -> None:
    """A loss of +0.0032 would read as one that went up."""
    trials = [record(0, 0.8), record(1, 0.6, "adaptive"), record(2, 0.7)]
    facts = result(-0.01, base=0.95)
    facts["references"]["control"]["difference"]["mean"] = mean
    assert f"validation accuracy {words} (95 %" in say(facts, trials, "minimize")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_gain_where_a_uniform_trial_is_ahead(split: str) -> None:
    sentence = say(result(0.005, test=0.85, uniform={split: {"accuracy": 0.91}}))
    lead = {"validation": "0.0100", "test": "0.0600"}[split]
    assert sentence.startswith("No gain over uniform")
    assert f"and the best uniform trial, 0, is ahead by {lead} on {split}." in sentence


def test_a_control_that_is_the_best_uniform_trial_is_named_once() -> None:
    rival = {"number": 2, "validation": {"accuracy": 0.9}, "test": {"accuracy": 0.8}}
    for low in (-0.01, 0.005):
        facts = result(low, test=0.85, uniform=rival)
        facts["references"]["control"] |= rival
        sentence = say(facts)
        assert sentence.startswith("No gain over uniform") and "uniform trial" not in sentence
        assert sentence.count("trial 2") == 1
        # Where the pair itself speaks for the winner, what speaks against it must be told.
        why = ", and the control is level on validation, though the winner is ahead by 0.0500 on test."
        assert sentence.endswith(why) == (low > 0)


def test_no_gain_where_the_winner_is_uniform() -> None:
    sentence = say(result(0.01, best=0))
    assert sentence.startswith("No gain over uniform: the winner, trial 0, is uniform itself")


def test_a_control_from_the_gradient_is_not_called_uniform() -> None:
    """Below rank 1 both of the pair start from the gradient; one keeps those ranks."""
    trials = [
        record(0, 0.8),
        record(1, 0.9, params={"allocation": "adaptive", "rank": 0}),
        record(2, 0.88, params={"allocation": "uniform", "rank": 0}),
    ]
    behind = {"validation": {"accuracy": 0.8}}
    assert say(result(0.005, uniform=behind), trials).startswith("Adaptive ranks beat fixed ranks here: ")
    assert say(result(-0.01), trials).startswith("No gain over fixed ranks: validation accuracy")
    ahead = say(result(0.005, uniform={"validation": {"accuracy": 0.91}}), trials)
    assert ahead.startswith("No gain over fixed ranks: ") and "the best uniform trial, 0, is ahead" in ahead
    assert say(result(None), trials).startswith("No verdict on fixed ranks: ")
    sentence = say(result(0.01, best=2), trials)
    assert sentence.startswith("No gain over fixed ranks: the winner, trial 2, has these itself")


@pytest.mark.parametrize(
    ("base", "test", "words"),
    [
        (0.95, 0.9, "ahead by 0.0500 on validation, though the winner is ahead by 0.2000 on test"),
        (0.95, 0.7, "ahead by 0.0500 on validation, level on test"),
        (0.95, 0.6, "ahead by 0.0500 on validation and by 0.1000 on test"),
        (0.95, None, "ahead by 0.0500 on validation"),
        (0.9, 0.9, "level on validation, though the winner is ahead by 0.2000 on test"),
        (0.9, 0.7, "level on validation and on test"),
        (0.9, None, "level on validation"),
        (0.6, 0.5, "ahead by 0.2000 on test, though the winner is ahead by 0.3000 on validation"),
    ],
)
def test_where_the_frozen_base_is_not_behind_both_splits_are_told(
    base: float, test: float | None, words: str
) -> None:
    facts = result(0.01, base=base, test=test)
    facts["references"]["frozen_base"]["test"] = {"accuracy": 0.7}
    assert say(facts).startswith(
        f"No gain over the frozen base, which is {words}; validation accuracy better by 0.0200"
    )


def test_a_uniform_trial_that_is_level_leaves_no_gain() -> None:
    sentence = say(result(0.005, uniform={"validation": {"accuracy": 0.9}}))
    assert sentence.endswith("and the best uniform trial, 0, is level on validation.")


def test_less_is_better_where_the_metric_is_minimised() -> None:
    trials = [record(0, 0.8), record(1, 0.6, "adaptive"), record(2, 0.7)]
    facts = {"validation": {"accuracy": 0.8}, "test": {"accuracy": 0.8}}
    assert say(result(0.01, base=0.95, test=0.6, uniform=facts), trials, "minimize").startswith(
        "Adaptive ranks beat"
    )
    assert say(result(0.01, base=0.55), trials, "minimize").startswith("No gain over the frozen base")
    facts["test"] = {"accuracy": 0.5}
    assert "ahead by 0.1000 on test" in say(
        result(0.01, base=0.95, test=0.6, uniform=facts), trials, "minimize"
    )


def test_no_pair_no_verdict() -> None:
    assert say(result(None)) == "No verdict on uniform: trial 1 has no complete paired control."
    assert say(result(0.01, best=7)).startswith("No verdict: no trial")


def test_the_verdict_rests_on_test_where_there_is_one() -> None:
    facts = result(0.005, test=0.9, uniform={"validation": {"accuracy": 0.8}, "test": {"accuracy": 0.8}})
    control = facts["references"]["control"]
    control |= {"test": {"accuracy": 0.935}, "test_difference": {"mean": -0.035, "low": -0.05, "high": -0.02}}
    assert say(facts).startswith("No gain over uniform: test accuracy worse by 0.0350")
    control["test"] = {"accuracy": 0.88}
    control["test_difference"] = {"mean": 0.02, "low": 0.01, "high": 0.03, "n": 500}
    assert say(facts).startswith("Adaptive ranks beat uniform here: test accuracy better by 0.0200")


def test_a_difference_that_is_no_number_gives_no_verdict() -> None:
    facts = result(0.01)
    facts["references"]["control"]["difference"] |= {"mean": 0.02, "low": None, "high": None}
    assert say(facts).startswith(
        "No verdict on uniform: validation accuracy better by 0.0200 (95 % interval - to -"
    )


def test_a_control_that_is_level_leaves_no_gain() -> None:
    facts = result(0.005, uniform={"validation": {"accuracy": 0.8}})
    facts["references"]["control"]["validation"] = {"accuracy": 0.9}
    assert say(facts).startswith("No gain over uniform")


def remarked(
    values: list[float | None], *, metric: str = "accuracy", best: int = 0, **facts: Any
) -> list[str]:
    trials = [record(number, value, **facts) for number, value in enumerate(values)]
    direction = "minimize" if metric == "loss" else "maximize"
    base = {"frozen_base": {"validation": {metric: values[0]}}}
    return remarks({"best": best, "references": base}, trials=trials, metric=metric, direction=direction)


def test_scores_that_tell_something_are_not_remarked_on() -> None:
    assert remarked([0.9, 0.8], metrics={"accuracy": 0.9, "mcc": 0.7}) == []
    assert remarked([0.9985, 0.8]) == remarked([0.9]) == remarked([2.0, 1.0], metric="loss") == []
    for unbounded in ("chrf", "mine:points"):
        assert remarked([99.0, 98.0], metric=unbounded) == []
    assert remarks({"best": None}, trials=[], metric="accuracy", direction="maximize") == []


def test_a_score_with_nothing_left_to_gain_is_remarked_on() -> None:
    (said,) = remarked([0.9991, 0.8])
    assert said.startswith("Validation accuracy is 0.9991: little is left to gain")


def test_trials_that_all_score_the_same_are_remarked_on() -> None:
    (said,) = remarked([0.75, 0.75, 0.75])
    assert said.startswith("All 3 complete trials score 0.7500 on validation, as the frozen base does: more")
    other = [record(0, 0.75), record(1, 0.75), record(2, 0.1) | {"state": "PRUNED"}]
    (said,) = remarks({"best": 0}, trials=other, metric="accuracy", direction="maximize")
    assert said.startswith("Both complete trials score 0.7500 on validation: more")


@pytest.mark.parametrize("name", ["mcc", "pearson"])
def test_a_winner_that_says_the_same_of_every_row_is_remarked_on(name: str) -> None:
    (said,) = remarked([0.8, 0.7], metrics={"accuracy": 0.8, name: 0.0})
    assert said.startswith(f"The winner's {name} on validation is exactly 0: it says the same of every row")
    # Half of two classes right, for example, is 0 too, whatever was said of which row.
    assert ("by chance" in said) == (name == "mcc")
