"""The one training step, of one trial or of several that share it, and the order of the data.

Both depend on their arguments alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autorank.dropout import AdapterDropout, Alone, dropout_on, undivided
from autorank.schedule import learning_rate_factor
from autorank.sketch import seeded
from autorank.tasks import Batch, Task
from autorank.tasks.task import logits_of

if TYPE_CHECKING:
    from autorank.allocator import RankAllocator
    from autorank.routing import Routing

__all__ = ["BatchOrder", "HalfTaken", "Learner", "NotFinite", "train_step"]


class NotFinite(ArithmeticError):
    """The loss or the gradient is NaN or infinite: the trial cannot go on."""


class HalfTaken(MemoryError):
    """Memory ran out in the allocator or the optimizer: the step is half taken, and not to be taken again."""


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


@dataclass(frozen=True)
class Learner:
    """What one trial brings to a step.

    Attributes:
        name: PEFT's name of its adapter.
        samples: how many rows of the batch are its own.
        optimizer: over its parameters; its groups have an `initial_lr`.
        allocator: where its ranks move.
        step: this step's number, from 0.
        seed: of the trial.
        dropout: of its adapter, where it has any.
        label_smoothing: of its loss, in [0, 1).
    """

    name: str
    samples: int
    optimizer: Optimizer
    allocator: RankAllocator | None
    step: int
    seed: int
    dropout: AdapterDropout | None = None
    label_smoothing: float = 0.0


def train_step(
    model: nn.Module,
    task: Task,
    batch: Batch,
    learners: Sequence[Learner],
    *,
    total_steps: int,
    gradient_clip: float,
    routing: Routing | None = None,
    parts: int = 1,
    dropout: bool = True,
) -> list[float | Exception]:
    """One optimizer step of every learner, on one batch; ranks may move in it.

    The learners' rows stand one after the other in the batch. Each has a loss of its own, and the
    sum of the losses has for every learner's parameters the gradient of its own loss alone: so all
    share one forward and backward pass, and each trains as it would by itself.

    The base model's own dropout is on, drawn from a learner's seed and step alone: so a trial that
    goes on at any step sees what it would have seen, and the caller's random state is left as it was.

    Importance is read before the gradient is clipped, so that one wild batch elsewhere in the
    model does not shrink a layer's score.

    Args:
        model: the base model with the learners' adapters on it.
        task: gives the loss.
        batch: the rows of all learners, on the model's device.
        learners: at least one.
        total_steps: over which the learning rate falls.
        gradient_clip: largest norm of the whole gradient of a learner.
        routing: sends rows through their adapters; only one learner needs none.
        parts: passes that the batch is cut into, at most as many as the fewest rows of a learner;
            their gradients add up to that of the whole.
        dropout: whether the base has dropout, which is on then; see `has_dropout`.

    Returns:
        For each learner the loss of its rows before the step, or why it did not take the step: its
        loss or gradient is NaN or infinite (`NotFinite`), its pass failed where another's spoilt the shared
        one, or its allocator or optimizer failed (`HalfTaken` where memory ran out). It does not touch the
        others.

    Raises:
        Exception: what the pass itself raised, memory that is not there above all. No learner took
            the step, and no gradient is left.
    """
    places = _places([learner.samples for learner in learners])
    for learner in learners:
        factor = learning_rate_factor(learner.step, total_steps)
        for group in learner.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    try:
        if len(learners) > 1:
            _trace(model, batch, learners, places, routing)
        for learner in learners:
            if learner.dropout is not None:
                learner.dropout.start(f"adapter/{learner.seed}/{learner.step}")
        losses = _passes(model, task, batch, learners, places, routing, parts, dropout)
        norms = [_norm(learner.optimizer).to(loss) for learner, loss in zip(learners, losses, strict=True)]
        # Read together: each reading makes a GPU wait.
        figures = torch.stack([*losses, *norms]).tolist()
    except BaseException:
        _forget(learners)
        raise
    finally:
        for learner in learners:
            if learner.dropout is not None:
                learner.dropout.stop()
    if len(learners) == 1 or all(map(math.isfinite, figures)):
        own = zip(learners, figures[: len(losses)], norms, figures[len(losses) :], strict=True)
        return [_update(*each, gradient_clip) for each in own]
    # Nothing times infinity is not nothing: in a shared product one who diverges can spoil the others.
    _forget(learners)
    found: list[float | Exception] = []
    for learner, rows in zip(learners, places, strict=True):
        try:
            found += train_step(
                model,
                task,
                batch.take(rows),
                [learner],
                total_steps=total_steps,
                gradient_clip=gradient_clip,
                routing=routing,
                parts=parts,
                dropout=dropout,
            )
        except Exception as error:  # others have taken the step already
            found.append(error)
    return found


def _trace(
    model: nn.Module,
    batch: Batch,
    learners: Sequence[Learner],
    places: Sequence[range],
    routing: Routing | None,
) -> None:
    """Let each allocator see the layers that it would see alone: gradients of others go further down."""
    assert routing is not None
    for learner, rows in zip(learners, places, strict=True):
        if learner.allocator is not None:
            routing.trace(learner.name, partial(model, **batch.take(rows[:1]).inputs))


def _norm(optimizer: Optimizer) -> Tensor:
    """The norm of the whole gradient."""
    return nn.utils.get_total_norm([p.grad for p in _parameters(optimizer) if p.grad is not None])


def _forget(learners: Sequence[Learner]) -> None:
    """Drop what the passes of this step have left."""
    for learner in learners:
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.allocator is not None:
            learner.allocator.forget_step()


def _passes(
    model: nn.Module,
    task: Task,
    batch: Batch,
    learners: Sequence[Learner],
    places: Sequence[range],
    routing: Routing | None,
    parts: int,
    dropout: bool,
) -> list[Tensor]:
    """The learners' losses, each shape (), their gradients in place."""
    terms = [task.terms(batch.take(place)) for place in places] if parts > 1 else []
    losses = [torch.zeros((), device=batch.labels.device)] * len(learners)
    keys = [f"dropout/{learner.seed}/{learner.step}" for learner in learners]
    with dropout_on(model, batch.labels.device, keys) if dropout else nullcontext(undivided) as streams:
        for part in range(parts):
            chosen = [_part(place, part, parts) for place in places]
            here = batch if parts == 1 else batch.take([row for place in chosen for row in place])
            sizes = [len(place) for place in chosen]
            with streams(sizes) as alone:
                found = _losses(model, task, here, learners, sizes, routing, alone)
            if parts > 1:
                counts = [task.terms(here.take(place)) for place in _places(sizes)]
                # A mean over nothing is NaN.
                found = [
                    count / whole * loss if count else 0.0 * loss.nan_to_num()
                    for loss, count, whole in zip(found, counts, terms, strict=True)
                ]
            total = sum(found[1:], found[0])
            if not total.requires_grad:
                raise RuntimeError("no layer with an adapter has a part in the loss")
            total.backward()
            losses = [loss + own.detach() for loss, own in zip(losses, found, strict=True)]
    return losses


def _losses(
    model: nn.Module,
    task: Task,
    batch: Batch,
    learners: Sequence[Learner],
    sizes: Sequence[int],
    routing: Routing | None,
    alone: Alone,
) -> list[Tensor]:
    """One forward pass: each learner's loss."""
    if len(learners) == 1:
        if routing is not None:
            routing.only(learners[0].name)
        logits = logits_of(model(**batch.inputs))
        return [task.loss(logits, batch, label_smoothing=learners[0].label_smoothing)]
    assert routing is not None
    places = _places(sizes)
    shared = {learner.name: place for learner, place in zip(learners, places, strict=True)}
    with routing.shared(shared, alone):
        # One split has one backward; slices would each write a gradient of the whole.
        logits = logits_of(model(**batch.inputs)).split(list(sizes))
    return [
        task.loss(own, batch.take(place), label_smoothing=learner.label_smoothing)
        for learner, own, place in zip(learners, logits, places, strict=True)
    ]


def _update(
    learner: Learner, loss: float, norm: Tensor, norm_value: float, gradient_clip: float
) -> float | Exception:
    """The learner's own part of the step: its allocator, its clipping, its optimizer."""
    number, optimizer = learner.step + 1, learner.optimizer
    try:
        for name, value in (("loss", loss), ("gradient", norm_value)):
            if not math.isfinite(value):
                return NotFinite(f"the {name} is {value} at step {number}")
        if learner.allocator is not None and learner.allocator.step():
            norm = _norm(optimizer)
        nn.utils.clip_grads_with_norm_(_parameters(optimizer), gradient_clip, norm)
        optimizer.step()
    except (torch.OutOfMemoryError, MemoryError) as error:
        return HalfTaken(*error.args)
    except Exception as error:  # this trial's alone
        return error
    finally:
        optimizer.zero_grad(set_to_none=True)
    return loss


def _places(sizes: Sequence[int]) -> list[range]:
    """The rows of each learner, one after the other."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _part(rows: range, part: int, parts: int) -> range:
    """One of so many parts of a learner's rows, alike in size."""
    return rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]


def _parameters(optimizer: Optimizer) -> Sequence[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
