"""Memory: what a training step needs of it, how an error says that it ran out, and what can be had back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autorank.dropout import dropout_on
from autorank.lane import Bench, Lane, TrialSpec
from autorank.tasks import Example
from autorank.tasks.task import logits_of

__all__ = ["HELD", "HELD_RECOMPUTING", "free_memory", "is_full", "step_bytes"]

HELD, HELD_RECOMPUTING = 2.2, 4.5
"""How many times the bytes of its tensors a process on a CPU was seen to hold; where it recomputes, too."""


def is_full(error: BaseException) -> bool:
    """Whether it says that memory is not there."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def free_memory() -> None:
    """Collect what nobody holds any more, and give the device's cache back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_bytes(bench: Bench, spec: TrialSpec) -> int:
    """The most that tensors of a step's passes take at once beside the model, for a batch of longest rows.

    Passes of one such row and of two are tried, and what one row more takes is counted for each row of
    the batch. It is what tensors hold: a process on a CPU, whose allocator keeps room of several sizes, was
    seen to hold `HELD` times as much, or `HELD_RECOMPUTING` (studies/LOG.md).
    """
    longest = max(bench.train, key=lambda example: example.length)
    one, two = (_peak(bench, spec, (longest,) * rows) for rows in (1, 2))
    return one + max(0, two - one) * (min(bench.recipe.batch_size, len(bench.train)) - 1)


def _peak(bench: Bench, spec: TrialSpec, rows: tuple[Example, ...]) -> int:
    """The most bytes that the tensors of a forward and a backward pass of these rows take at once."""
    lane = Lane(spec, bench)
    model, device = bench.base.model, bench.base.device
    batch = bench.task.collate(rows, bench.base.pad_token_id).to(device)
    live = _Live((*model.parameters(), *model.buffers()))
    try:
        with dropout_on(model, device, ["memory"]) if bench.dropout else nullcontext(), live:
            bench.task.loss(logits_of(model(**batch.inputs)), batch).backward()
    finally:
        lane.close()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, of those that are made within it; `peak` is the most."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
