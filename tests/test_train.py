from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autorank.tasks import Batch
from autorank.train import NotFinite, batch_rows, train_step


@given(rows=st.integers(1, 40), size=st.integers(1, 16), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_holds_every_row_once(rows: int, size: int, epochs: int, seed: int) -> None:
    steps = -(-rows * epochs // size)
    order = [row for step in range(steps) for row in batch_rows(step, rows=rows, batch_size=size, seed=seed)]
    assert len(order) == steps * size
    for epoch in range(epochs):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_the_order_is_a_function_of_the_seed() -> None:
    first = [batch_rows(step, rows=50, batch_size=8, seed=1) for step in range(9)]
    assert first == [batch_rows(step, rows=50, batch_size=8, seed=1) for step in range(9)]
    assert first != [batch_rows(step, rows=50, batch_size=8, seed=2) for step in range(9)]
    assert first[0] != first[6]


class Line(nn.Module):
    """y = w x, with the shape of a model's answer."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, x: torch.Tensor) -> nn.Module:
        self.logits = x * self.weight
        return self


class Square:
    """A task whose loss is the mean square of the logits."""

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return logits.square().mean()


def step_on(model: Line, value: float, clip: float = 1e9) -> float:
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.1}], lr=99.0)
    batch = Batch({"x": torch.tensor([value])}, torch.zeros(1), 1)
    return train_step(
        model, Square(), batch, optimizer, None, step=0, total_steps=1, gradient_clip=clip  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_step_goes_down_the_gradient_at_the_scheduled_rate() -> None:
    model = Line(2.0)
    assert step_on(model, 3.0) == pytest.approx(36)
    assert model.weight.item() == pytest.approx(2 - 0.1 * 2 * 2 * 9)
    assert model.weight.grad is None


def test_the_gradient_is_clipped() -> None:
    model = Line(2.0)
    step_on(model, 3.0, clip=1.0)
    assert model.weight.item() == pytest.approx(2 - 0.1, abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_before_the_update(value: float) -> None:
    model = Line(2.0)
    with pytest.raises(NotFinite, match="step 1"):
        step_on(model, value)
    assert model.weight.item() == 2.0
