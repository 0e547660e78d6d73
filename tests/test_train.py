from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autorank.tasks import Batch
from autorank.train import BatchOrder, NotFinite, train_step

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@given(lengths=lengths, size=st.integers(1, 16), seed=st.integers(0, 9))
def test_every_epoch_holds_every_row_at_most_once(lengths: list[int], size: int, seed: int) -> None:
    order = BatchOrder(lengths, size, seed)
    batches = len(lengths) // order.size
    for epoch in range(3):
        rows = [row for at in range(batches) for row in order.rows(epoch * batches + at)]
        assert len(rows) == batches * order.size == len(set(rows))
        assert len(lengths) - len(rows) < order.size


def test_the_order_is_a_function_of_seed_and_step() -> None:
    lengths = [i % 7 for i in range(50)]
    one, other = BatchOrder(lengths, 8, 1), BatchOrder(lengths, 8, 1)
    forward = [one.rows(step) for step in range(12)]
    assert forward == [other.rows(step) for step in reversed(range(12))][::-1]
    assert forward != [BatchOrder(lengths, 8, 2).rows(step) for step in range(12)]
    assert forward[:6] != forward[6:]


def test_like_lengths_come_together_in_random_order() -> None:
    lengths = [i * 37 % 400 for i in range(400)]
    order = BatchOrder(lengths, 10, 0)
    batches = [[lengths[row] for row in order.rows(step)] for step in range(40)]
    assert max(max(batch) - min(batch) for batch in batches) < 150
    means = [sum(batch) / 10 for batch in batches[:16]]
    assert means != sorted(means) and means != sorted(means, reverse=True)


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
        model, Square(), batch, optimizer, None, step=0, total_steps=1, gradient_clip=clip, seed=0  # type: ignore[arg-type]
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


def test_dropout_is_drawn_from_seed_and_step_alone() -> None:
    class Dropping(Line):
        def forward(self, x: torch.Tensor) -> nn.Module:
            self.logits = nn.functional.dropout(x * self.weight, training=self.training)
            return self

    def loss(step: int, seed: int) -> float:
        model = Dropping(2.0)
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.1}])
        batch = Batch({"x": torch.arange(64.0)}, torch.zeros(1), 64)
        value = train_step(
            model, Square(), batch, optimizer, None, step=step, total_steps=9, gradient_clip=1.0, seed=seed  # type: ignore[arg-type]
        )  # fmt: skip
        assert not model.training
        return value

    state = torch.random.get_rng_state()
    assert loss(1, 5) == loss(1, 5)
    assert len({loss(1, 5), loss(2, 5), loss(1, 6)}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)
