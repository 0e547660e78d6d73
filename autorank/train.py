"""The one training step and the order of the data; both depend on their arguments alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from autorank.schedule import learning_rate_factor
from autorank.sketch import seeded
from autorank.tasks import Batch, Task

if TYPE_CHECKING:
    from autorank.allocator import RankAllocator

__all__ = ["BatchOrder", "NotFinite", "train_step"]


class NotFinite(ArithmeticError):
    """The loss or the gradient is NaN or infinite: the trial cannot go on."""


class BatchOrder:
    """Which rows make up the batch at a step: shuffled every epoch, rows of like length together.

    Rows are shuffled, cut into pools of many batches, sorted by length within a pool, and the
    batches of a pool are shuffled again; so padding is small and the order still random. What does
    not fill a batch waits for another epoch. A function of its arguments and the step, so that a
    trial can go on at any step without a stored cursor.

    Args:
        lengths: the length of each row, in tokens.
        batch_size: rows of a batch; all rows where there are fewer.
        seed: what the order is drawn from.
    """

    _POOL = 16

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self.size = min(batch_size, len(lengths))
        self._seed = seed
        self._per_epoch = len(lengths) // self.size
        self._epoch = -1
        self._batches: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        """The row numbers of the batch at a step (from 0)."""
        epoch, index = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        return self._batches[index]

    def _draw(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch."""
        generator = seeded("order", self._seed, epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        order = order[: self._per_epoch * self.size]
        batches: list[list[int]] = []
        for start in range(0, len(order), self._POOL * self.size):
            pool = sorted(order[start : start + self._POOL * self.size], key=lambda row: self._lengths[row])
            cut = [pool[at : at + self.size] for at in range(0, len(pool), self.size)]
            batches += [cut[at] for at in torch.randperm(len(cut), generator=generator).tolist()]
        return batches


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
    seed: int,
) -> float:
    """One optimizer step on one batch; ranks may move in it.

    The base model's own dropout is on, drawn from (seed, step) alone: so a trial that goes on at
    any step sees what it would have seen, and the caller's random state is left as it was.

    Importance is read before the gradient is clipped, so that one wild batch elsewhere in the
    model does not shrink a layer's score.

    Args:
        step: this step's number, from 0.
        gradient_clip: largest norm of the whole gradient.
        seed: of the trial.

    Returns:
        The batch's loss before the step.

    Raises:
        NotFinite: the loss or the gradient is NaN or infinite; nothing was updated.
    """
    factor = learning_rate_factor(step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    with _dropout_on(model, batch.labels.device, f"dropout/{seed}/{step}"):
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


@contextmanager
def _dropout_on(model: nn.Module, device: torch.device, key: str) -> Iterator[None]:
    """The model in training mode, its dropout drawn from a key; eval mode and random state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeded(key).initial_seed())
        model.train()
        try:
            yield
        finally:
            model.eval()


def _parameters(optimizer: Optimizer) -> Sequence[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
