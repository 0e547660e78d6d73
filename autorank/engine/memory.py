"""Memory: what a training step needs of it, how an error says that it ran out, and what can be had back."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import torch
from torch import Tensor

from autorank.dropout import dropout_on
from autorank.lane import Bench, Lane, TrialSpec
from autorank.tasks.task import logits_of

__all__ = ["free_memory", "is_full", "step_bytes"]


def is_full(error: BaseException) -> bool:
    """Whether it says that memory is not there."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def free_memory() -> None:
    """Collect what nobody holds any more, and give the device's cache back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_bytes(bench: Bench, spec: TrialSpec) -> int:
    """What a training step keeps from its forward pass for its backward pass, of a batch of longest rows.

    Told from one row: what autograd saves of it, the model's own tensors left out. It is the least that a
    step takes beside the model, whose peak was 2 to 4 times as much on a CPU: what is in use for a moment
    is not in it, nor what an allocator keeps.
    """
    lane = Lane(spec, bench)
    model = bench.base.model
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        row = max(bench.train, key=lambda example: example.length)
        batch = bench.task.collate([row], bench.base.pad_token_id).to(bench.base.device)
        mode = dropout_on(model, bench.base.device, ["memory"]) if bench.dropout else nullcontext()
        with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            bench.task.loss(logits_of(model(**batch.inputs)), batch)
    finally:
        lane.close()
    return sum(saved.values()) * min(bench.recipe.batch_size, len(bench.train))
