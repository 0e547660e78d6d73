from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autorank.tasks import Batch
from autorank.train import BatchOrder, Learner, NotFinite, train_step

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

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float) -> torch.Tensor:
        return logits.square().mean()

    def terms(self, batch: Batch) -> int:
        return batch.samples


def step_on(model: Line, values: list[float], clip: float = 1e9, parts: int = 1) -> float | Exception:
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.1}], lr=99.0)
    batch = Batch({"x": torch.tensor(values)}, torch.zeros(len(values)), len(values))
    learner = Learner("default", len(values), optimizer, None, 0, 0)
    return train_step(model, Square(), batch, [learner], total_steps=1, gradient_clip=clip, parts=parts)[0]  # type: ignore[arg-type]


def test_a_step_goes_down_the_gradient_at_the_scheduled_rate() -> None:
    model = Line(2.0)
    assert step_on(model, [3.0]) == pytest.approx(36)
    assert model.weight.item() == pytest.approx(2 - 0.1 * 2 * 2 * 9)
    assert model.weight.grad is None


def test_the_gradient_is_clipped() -> None:
    model = Line(2.0)
    step_on(model, [3.0], clip=1.0)
    assert model.weight.item() == pytest.approx(2 - 0.1, abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_before_the_update(value: float) -> None:
    model = Line(2.0)
    found = step_on(model, [value])
    assert isinstance(found, NotFinite) and "step 1" in str(found)
    assert model.weight.item() == 2.0 and model.weight.grad is None


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_cut_into_parts_takes_the_same_step(parts: int) -> None:
    values = [0.5, -1.0, 2.0, 0.25, 1.5]
    whole, cut = Line(2.0), Line(2.0)
    assert step_on(cut, values, parts=parts) == pytest.approx(step_on(whole, values))
    assert cut.weight.item() == pytest.approx(whole.weight.item())


def test_a_part_in_which_nothing_is_trained_adds_nothing() -> None:
    class Masked(Square):
        def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
            return logits[batch.labels > 0].square().mean()

        def terms(self, batch: Batch) -> int:
            return int((batch.labels > 0).sum())

    def step(parts: int) -> tuple[float | Exception, float]:
        model = Line(2.0)
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.1}], lr=99.0)
        batch = Batch({"x": torch.tensor([0.5, 1.5, 3.0, 7.0])}, torch.tensor([1, 1, 0, 0]), 4)
        learner = Learner("default", 4, optimizer, None, 0, 0)
        (loss,) = train_step(
            model,
            Masked(),
            batch,
            [learner],
            total_steps=1,
            gradient_clip=1e9,
            parts=parts,  # type: ignore[arg-type]
        )
        return loss, model.weight.item()

    assert step(2) == pytest.approx(step(1))


def test_a_pass_that_fails_leaves_no_gradient_and_no_update() -> None:
    class Full(Line):
        calls = 0

        def forward(self, x: torch.Tensor) -> nn.Module:
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError("no room")
            return super().forward(x)

    model = Full(2.0)
    with pytest.raises(torch.OutOfMemoryError):
        step_on(model, [1.0, 2.0, 3.0], parts=2)
    assert model.weight.item() == 2.0 and model.weight.grad is None and not model.training


def test_dropout_is_drawn_from_seed_and_step_alone() -> None:
    class Dropping(Line):
        def forward(self, x: torch.Tensor) -> nn.Module:
            self.logits = nn.functional.dropout(x * self.weight, training=self.training)
            return self

    def loss(step: int, seed: int) -> float:
        model = Dropping(2.0)
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.1}])
        batch = Batch({"x": torch.arange(64.0)}, torch.zeros(1), 64)
        learner = Learner("default", 64, optimizer, None, step, seed)
        (value,) = train_step(model, Square(), batch, [learner], total_steps=9, gradient_clip=1.0)  # type: ignore[arg-type]
        assert not model.training and isinstance(value, float)
        return value

    state = torch.random.get_rng_state()
    assert loss(1, 5) == loss(1, 5)
    assert len({loss(1, 5), loss(2, 5), loss(1, 6)}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)
