"""The one training step and the order of the data; both depend on their arguments alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from autorank.schedule import learning_rate_factor
from autorank.tasks import Batch, Task

if TYPE_CHECKING:
    from autorank.allocator import RankAllocator

__all__ = ["NotFinite", "batch_rows", "train_step"]


class NotFinite(ArithmeticError):
    """The loss or the gradient is NaN or infinite: the trial cannot go on."""


def batch_rows(step: int, *, rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of the batch at a step (from 0): epochs are shuffled one by one and laid end to end.

    A function of its arguments, so that a trial can go on at any step without a stored cursor.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    chosen: list[int] = []
    for epoch in range(first // rows, (last - 1) // rows + 1):
        key = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        order = torch.randperm(rows, generator=generator)
        start = epoch * rows
        chosen += order[max(0, first - start) : min(rows, last - start)].tolist()
    return chosen


def train_step(
    model: nn.Module,
    task: Task,
    batch: Batch,
    optimizer: Optimizer,
    allocator: RankAllocator | None,
    *,
    step: int,
    total_steps: int,
    gradient_clip: float,
) -> float:
    """One optimizer step on one batch; ranks may move in it.

    Importance is read before the gradient is clipped, so that one wild batch elsewhere in the
    model does not shrink a layer's score.

    Args:
        step: this step's number, from 0.
        gradient_clip: largest norm of the whole gradient.

    Returns:
        The batch's loss before the step.

    Raises:
        NotFinite: the loss or the gradient is NaN or infinite; nothing was updated.
    """
    factor = learning_rate_factor(step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    loss = task.loss(model(**batch.inputs).logits, batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NotFinite(f"the loss is {value} at step {step + 1}")
    loss.backward()
    if allocator is not None:
        allocator.step()
    norm = float(nn.utils.clip_grad_norm_(_parameters(optimizer), gradient_clip))
    if not math.isfinite(norm):
        raise NotFinite(f"the gradient is {norm} at step {step + 1}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def _parameters(optimizer: Optimizer) -> Sequence[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
