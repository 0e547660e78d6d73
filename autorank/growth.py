"""What a new component starts as: a direction that can learn at once and changes nothing yet."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["plain_components"]


def plain_components(count: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Rows of A drawn as LoRA draws them at the start; the matching columns of B are zero.

    Uniform in ±1/√in_features, which is what PEFT's `kaiming_uniform_(a=√5)` gives. As b = 0 the
    function is unchanged, and as a ≠ 0 the gradient of b is not zero, so the component is alive.

    Args:
        count: new components.
        generator: a CPU generator; nothing else is random.

    Returns:
        float32 on the CPU, shape (count, in_features).
    """
    bound = 1 / math.sqrt(in_features)
    return (torch.rand(count, in_features, generator=generator) * 2 - 1) * bound
