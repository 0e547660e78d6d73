"""Who calls the allocator in the wrong place is told, once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from autorank.watch import RankAllocatorWarning, StepWatch


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def test_one_call_before_each_step_is_right(optimizer: torch.optim.Optimizer) -> None:
    """Warnings are errors here."""
    watch = StepWatch(optimizer)
    for _ in range(20):
        watch.note_call()
        optimizer.step()


def test_an_optimizer_that_steps_alone_is_warned_about_once(optimizer: torch.optim.Optimizer) -> None:
    _watch = StepWatch(optimizer)
    optimizer.step()
    with pytest.warns(RankAllocatorWarning, match=r"allocator.step\(\) was never called") as said:
        optimizer.step()
    optimizer.step()
    assert said[0].filename == __file__  # the line that calls optimizer.step() is named


def test_a_call_with_every_pass_is_warned_about_once(optimizer: torch.optim.Optimizer) -> None:
    watch = StepWatch(optimizer)
    with pytest.warns(RankAllocatorWarning) as said:
        for step in range(5):
            for _ in range(4):
                watch.note_call()
            optimizer.step()
            assert len(said) == (step >= 2)  # the third time is no accident
    assert "called 4 times per optimizer.step(), so that ranks move 4 times too early" in str(said[0].message)


def test_a_call_after_each_step_is_warned_about_once(optimizer: torch.optim.Optimizer) -> None:
    watch = StepWatch(optimizer)
    with pytest.warns(RankAllocatorWarning, match=r"is called after optimizer.step\(\)") as said:
        for step in range(5):
            optimizer.step()
            watch.note_call()
            assert len(said) == (step >= 2)


def test_optimizer_steps_that_a_scaler_skips_are_no_mistake(optimizer: torch.optim.Optimizer) -> None:
    """Two overflows in a row, and two calls before each of two steps in a row."""
    watch = StepWatch(optimizer)
    for skipped in (1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0):
        watch.note_call()
        if not skipped:
            optimizer.step()


def test_an_optimizer_that_never_steps_is_warned_about_once(optimizer: torch.optim.Optimizer) -> None:
    """Made anew after the allocator, another one would train parameters that a move has replaced."""
    watch = StepWatch(optimizer)
    for _ in range(7):
        watch.note_call()
    with pytest.warns(RankAllocatorWarning, match="8 times and the allocator's optimizer has made no step"):
        watch.note_call()
    watch.note_call()


def test_the_hook_is_gone_after_enough_steps_or_when_closed(optimizer: torch.optim.Optimizer) -> None:
    hooks = optimizer._optimizer_step_pre_hooks
    watch = StepWatch(optimizer)
    for _ in range(8):
        assert len(hooks) == 1
        watch.note_call()
        optimizer.step()
    watch.note_call()
    assert not hooks
    watch = StepWatch(optimizer)
    watch.close()
    assert not hooks


def test_a_watch_that_nobody_holds_says_nothing(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer may outlive the allocator; a warning would be an error here."""
    watch = StepWatch(optimizer)
    gone = weakref.ref(watch)
    del watch
    gc.collect()
    assert gone() is None
    optimizer.step()
    optimizer.step()
