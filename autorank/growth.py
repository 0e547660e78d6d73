"""What a new component starts as: a direction that can learn at once and changes nothing yet.

One factor of a newborn is zero, so the function is unchanged; the other is not, so the zero one
has a gradient. Which factor is drawn is LoRA's choice: A, and B for embeddings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["aligned_components", "plain_components"]


def plain_components(count: int, features: int, generator: torch.Generator) -> Tensor:
    """Rows drawn as LoRA draws A at the start: uniform in ±1/√features, PEFT's `kaiming_uniform_(a=√5)`.

    Args:
        count: new components.
        features: the length of a row.
        generator: a CPU generator; nothing else is random.

    Returns:
        float32 on the CPU, shape (count, features).
    """
    bound = 1 / math.sqrt(features)
    return (torch.rand(count, features, generator=generator) * 2 - 1) * bound


def aligned_components(directions: Tensor, like: Tensor | None) -> Tensor:
    """Rows along given directions, so that the first step moves along the gradient they come from.

    LoRA-GA (arXiv 2407.05000) starts all of A along the gradient's leading directions; here newborns
    alone do, and the size is that of the layer's other rows, so that Adam treats them alike.

    Args:
        directions: unit rows, shape (count, features).
        like: the layer's drawn factor as rows, shape (rank, features); None for LoRA's own size.

    Returns:
        float32 on the CPU, shape (count, features).
    """
    size = 1 / math.sqrt(3)  # of a row of `plain_components`, whatever its length
    if like is not None and len(like):
        size = float(like.detach().float().square().sum(1).mean().sqrt()) or size
    return (directions * size).to("cpu", torch.float32)
