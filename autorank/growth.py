"""What a new component starts as: a direction that can learn at once and changes nothing yet.

One factor of a newborn is zero, so the function is unchanged; the other is not, so the zero one
has a gradient. Which factor is drawn is LoRA's choice: A, and B for embeddings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autorank.truncation import Drawn

__all__ = ["aligned_components", "plain_components", "plain_size"]


def plain_size(features: int, drawn: Drawn = "a") -> float:
    """The root mean square norm of a row of `plain_components`."""
    return 1 / math.sqrt(3) if drawn == "a" else math.sqrt(features)


def plain_components(count: int, features: int, generator: torch.Generator, drawn: Drawn = "a") -> Tensor:
    """Rows drawn as PEFT draws them at the start.

    A is uniform in ±1/√features (`kaiming_uniform_(a=√5)`), B of an embedding standard normal.

    Args:
        count: new components.
        features: the length of a row.
        generator: a CPU generator; nothing else is random.
        drawn: the factor that is drawn.

    Returns:
        float32 on the CPU, shape (count, features).
    """
    if drawn == "b":
        return torch.randn(count, features, generator=generator)
    bound = 1 / math.sqrt(features)
    return (torch.rand(count, features, generator=generator) * 2 - 1) * bound


def aligned_components(directions: Tensor, energies: Tensor, size: float, usual: float) -> Tensor:
    """Rows along given directions, so that the first step moves along the gradient they come from.

    LoRA-GA (arXiv 2407.05000) starts all of A along the gradient's leading directions; here newborns
    alone do. A row of the usual size along a leading direction would see a gradient many times
    that of other rows and, at a learning rate tuned for those, change the function as many times
    faster: so it is as short as it takes to see what they see.

    Args:
        directions: unit rows v, shape (count, features).
        energies: the square of the gradient that each would see at unit length, shape (count,).
        size: the usual size of a row, which is the most that a newborn gets.
        usual: the square of the gradient that a usual row sees.

    Returns:
        float32 on the CPU, shape (count, features).
    """
    sizes = (usual / energies.clamp_min(1e-300)).sqrt().clamp_max(size)
    return (directions * sizes[:, None]).to("cpu", torch.float32)
