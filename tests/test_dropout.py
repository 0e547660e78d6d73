"""Dropout by trial: what a trial's rows see does not depend on who shares the pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from autorank.dropout import AdapterDropout, dropout_on, has_dropout


class Dropping(nn.Module):
    """A module of dropout, a function of it, and an attention that drops."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)
        self.attention_dropout = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.attention_dropout if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)
        x = nn.functional.dropout(self.drop(x), p=p, training=self.training)
        return x + nn.functional.dropout(torch.ones(1, 3, 1, 1), p=0.0)


def run(model: nn.Module, x: torch.Tensor, keys: Sequence[str], sizes: Sequence[int]) -> torch.Tensor:
    with dropout_on(model, x.device, keys) as streams:
        passes = []
        for _ in range(2):
            with streams(sizes):
                passes.append(model(x))
    return torch.stack(passes)


def test_each_trial_sees_the_masks_that_it_would_see_alone() -> None:
    model = Dropping(0.4)
    x = torch.randn(9, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    sizes, keys = [2, 3, 4], ["a", "b", "c"]
    found = run(model, x, keys, sizes)
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    for part, key, size in zip(x.split(sizes), keys, sizes, strict=True):
        alone = run(model, part, [key], [size])
        start = sum(sizes[: keys.index(key)])
        assert torch.equal(found[:, start : start + size], alone)
        assert not torch.equal(alone[0], alone[1])


def test_what_all_trials_share_is_dropped_once() -> None:
    class Table(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.dropout(torch.ones(1, 4), p=0.5, training=self.training)

    model = nn.Sequential(Table(), nn.Dropout(0.1))
    found = run(model, torch.zeros(5, 4), ["a", "b"], [2, 3])
    assert found.shape == (2, 5, 4)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_model_without_dropout_is_known(p: float) -> None:
    assert has_dropout(Dropping(p)) == (p > 0)
    assert not has_dropout(nn.Linear(2, 2))


def test_an_adapters_dropout_is_a_function_of_its_key_and_keeps_the_mean() -> None:
    dropout, x = AdapterDropout(0.25), torch.ones(200, 50)
    assert dropout(x) is x
    seen = []
    for key in ("a", "a", "b"):
        dropout.start(key)
        seen.append((dropout(x), dropout(x)))
        dropout.stop()
    assert dropout(x) is x
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][0], seen[0][1]) and not torch.equal(seen[0][0], seen[2][0])
    assert float(seen[0][0].mean()) == pytest.approx(1, abs=0.02)
    assert seen[0][0].unique().tolist() == pytest.approx([0.0, 4 / 3])
    state = torch.random.get_rng_state()
    dropout.start("a")
    dropout(x)
    assert torch.equal(torch.random.get_rng_state(), state)
