"""Memory that runs out: how an error says so, and what can be had back."""

from __future__ import annotations

import gc

import torch

__all__ = ["free_memory", "is_full"]


def is_full(error: BaseException) -> bool:
    """Whether it says that memory is not there."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def free_memory() -> None:
    """Collect what nobody holds any more, and give the device's cache back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
