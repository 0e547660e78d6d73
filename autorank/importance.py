"""How much a layer's ranks matter: scores read from A, B and their gradients, in float32.

A score is per component or per layer and not yet per parameter; `allocator.py` divides by cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gradient_norm", "singular_value"]


def gradient_norm(gradient_a: Tensor, gradient_b: Tensor) -> Tensor:
    """Mean squared norm of the loss gradient that one component of the layer sees.

    With ΔW = s · B A and G = ∂L/∂W, component i sees ∂L/∂b_i = s · G a_i and ∂L/∂a_i = s · Gᵀ b_i
    (LoRA, arXiv 2106.09685, chain rule). At the start B = 0 and A is random, so the score is a
    random sketch of ‖G‖², as in the gradient-driven allocation of GoRA (arXiv 2502.12171).

    Args:
        gradient_a: ∂L/∂A, shape (rank, in_features).
        gradient_b: ∂L/∂B, shape (out_features, rank).

    Returns:
        (‖∂L/∂A‖² + ‖∂L/∂B‖²) / rank, at least 0: float32, shape (), on the gradients' device, so
        that reading it once per window, not per step, is all that the device waits for.
    """
    total = gradient_a.float().square().sum() + gradient_b.float().square().sum()
    return total / gradient_a.shape[0]


def singular_value(b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """Energies of the layer's components in the singular basis: the squares of σ(scaling · B A).

    The energy is what truncation loses: ‖ΔW − ΔW_r‖²_F is the sum of the energies cut off
    (Eckart and Young 1936), and no gauge of (B, A) changes it. Computed on the rank × rank core
    of two QR factorisations.

    Args:
        b: shape (out_features, rank).
        a: shape (rank, in_features).

    Returns:
        float64 on the CPU, shape (rank,), descending.
    """
    r_b = torch.linalg.qr(b.to("cpu", torch.float64), mode="r").R
    r_a = torch.linalg.qr(a.to("cpu", torch.float64).T, mode="r").R
    energies: Tensor = (torch.linalg.svdvals(r_b @ r_a.T) * scaling).square()
    return energies
