from __future__ import annotations

from typing import Any

from autorank.cost import cost_of, curve, total_cost


def trial(number: int, *scores: tuple[int, float], state: str = "COMPLETE", **counts: int) -> dict[str, Any]:
    told = {str(step): {"spent": spent, "value": value} for step, (spent, value) in enumerate(scores)}
    return {"number": number, "state": state, "scores": told, **counts}


# Trial 1 waited while trial 2 was trained, and went on afterwards.
TRIALS = [
    trial(0, (40, 0.6), (80, 0.7), samples=80, tokens=800, evaluation_samples=20),
    trial(1, (120, 0.72), (200, 0.69), state="PRUNED", samples=80, tokens=700, evaluation_samples=20),
    trial(2, (160, 0.75), state="RUNNING", samples=40, tokens=400, evaluation_samples=10),
    trial(3, (240, 0.99), state="FAIL", samples=60, tokens=None, evaluation_samples=10),  # type: ignore[arg-type]
]


def test_every_trial_counts_however_it_ended() -> None:
    assert total_cost(TRIALS) == {"samples": 260, "tokens": 1900, "evaluation_samples": 60}
    assert total_cost([]) == {"samples": 0, "tokens": 0, "evaluation_samples": 0}


def test_the_curve_follows_the_order_in_which_samples_were_spent() -> None:
    assert curve(TRIALS, "maximize") == [[40, 0.6], [80, 0.7], [120, 0.72], [160, 0.75]]
    assert curve(TRIALS, "minimize") == [[40, 0.6]]
    assert curve([], "maximize") == []
    assert cost_of(TRIALS, "minimize")["curve"] == [[40, 0.6]]
