from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autorank.evaluate import evaluate, paired_difference, standard_error
from autorank.tasks import CausalLM, Example, Metric, TextClassification

TASK = TextClassification(("text",), ("a", "b", "c"), Metric("accuracy", "maximize"))


class Counting(nn.Module):
    """Predicts the first token modulo 3; remembers the shapes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids[:, 0] % 3, 3).float())


def test_outcomes_come_back_in_the_split_s_order() -> None:
    examples = [Example([i, *[1] * (i * 7 % 5)], i % 3 if i % 4 else (i + 1) % 3) for i in range(1, 21)]
    model = Counting()
    result = evaluate(model, TASK, examples, batch_size=6, pad_token_id=0)
    assert result.outcomes[:, 0].tolist() == [i % 3 for i in range(1, 21)]
    assert result.outcomes[:, 1].tolist() == [e.labels for e in examples]
    assert result.scores["accuracy"] == pytest.approx(15 / 20)
    assert [shape[0] for shape in model.shapes] == [6, 6, 6, 2]
    assert sorted(shape[1] for shape in model.shapes) == [shape[1] for shape in model.shapes]


def outcomes(correct: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [correct.double(), torch.ones(len(correct)).double(), torch.zeros(len(correct)).double()], 1
    )


def test_the_standard_error_of_accuracy_is_the_binomial_one() -> None:
    rows = outcomes(torch.arange(400) % 5 != 0)
    assert standard_error(TASK, rows, resamples=400) == pytest.approx(math.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_a_difference_is_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    second = torch.rand(500, generator=generator) < 0.7
    first = second.clone()
    first[(~second).nonzero()[:25]] = True
    found = paired_difference(TASK, outcomes(first), outcomes(second))
    assert found.mean == pytest.approx(0.05) and found.n == 500
    # 25 rows of 500 differ, all one way: sqrt(0.05 * 0.95 / 500) = 0.0097, far below the unpaired 0.028.
    assert found.low == pytest.approx(0.05 - 1.96 * 0.0097, abs=0.004)
    assert found.high == pytest.approx(0.05 + 1.96 * 0.0097, abs=0.004)
    assert paired_difference(TASK, outcomes(second), outcomes(first)).mean == pytest.approx(-0.05)


def test_less_loss_is_a_positive_difference() -> None:
    task = CausalLM(("text",), Metric("loss", "minimize"))
    better = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 1.0]]).double()
    worse = torch.tensor([[2.0, 2.0, 1.0], [4.0, 4.0, 1.0]]).double()
    assert paired_difference(task, better, worse).mean == pytest.approx(0.5)


def test_equal_outcomes_differ_by_nothing() -> None:
    rows = outcomes(torch.arange(50) % 2 == 0)
    found = paired_difference(TASK, rows, rows)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
