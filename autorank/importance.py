"""How much each component of a layer matters: scores in its singular basis, in float64.

Components are singular directions, so no score depends on the gauge of (B, A): any invertible R
gives B R and R⁻¹ A the same scores. They are not yet per parameter; `allocator.py` divides by cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autorank.truncation import Basis

__all__ = ["Sensitivity", "gradient_norm", "sensitivity", "singular_value"]


def gradient_norm(to_a: Tensor, a: Tensor, heard: Tensor) -> Tensor:
    """The mean square of the gradient along each component: E ‖G_t v_i‖², v_i its unit right direction.

    A component (b_i, a_i) with a_i ∝ v_i sees ∂L/∂b_i = scaling · G_t a_i in step t (LoRA, arXiv
    2106.09685, chain rule). The mean of squares, not the square of the mean: a component that has
    learnt its direction sees gradients of either sign, as large as the direction matters. The
    norm of the gradient decides ranks in GoRA (arXiv 2502.12171), before training.

    Args:
        to_a: the components as mixtures of A's rows, v_i ∝ to_a_i A; shape (components, rank).
        a: float64 on the CPU, shape (rank, in_features).
        heard: `Reading.heard`, E (A G_tᵀ G_t Aᵀ), shape (rank, rank).

    Returns:
        shape (components,), at least 0.
    """
    squares = (to_a @ a).square().sum(1)
    return ((to_a @ heard) * to_a).sum(1).clamp_min(0) / squares.clamp_min(1e-300)


def singular_value(basis: Basis, scaling: float) -> Tensor:
    """Energies of the components: the squares of σ(scaling · B A).

    The energy is what truncation loses: ‖ΔW − ΔW'‖²_F is the sum of the energies dropped
    (Eckart and Young 1936).

    Returns:
        shape (mature,), descending.
    """
    return basis.energies * scaling**2


def sensitivity(b: Tensor, gradient_b: Tensor) -> Tensor:
    """The effect on the loss of deleting components, to first order, in every basis at once.

    Deleting component i changes the loss by −⟨b_i, ∂L/∂b_i⟩ = −⟨a_i, ∂L/∂a_i⟩: AdaLoRA's sensitivity
    (arXiv 2303.10512, eq. 8), for the whole component rather than its entries. In another basis,
    B' = B · to_b, the effects are the diagonal of to_bᵀ K to_aᵀ.

    Args:
        b: shape (out_features, rank).
        gradient_b: ∂L/∂B, shape (out_features, rank).

    Returns:
        K = Bᵀ ∂L/∂B, float32 on the device of B, shape (rank, rank).
    """
    return b.detach().float().T @ gradient_b.detach().float()


@dataclass
class Sensitivity:
    """Deletion effects of one layer's components, smoothed with their uncertainty.

    AdaLoRA, arXiv 2303.10512, eqs. 9 to 11: Ī ← β Ī + (1 − β) I, Ū ← β Ū + (1 − β) |I − Ī|, and the score
    is Ī · Ū. The components are the singular directions of the time it was made.

    Args:
        to_b, to_a: that basis, float32 on the layer's device, shape (rank, rank).
        directions: its right directions, float64 on the CPU, shape (rank, in_features).
    """

    to_b: Tensor
    to_a: Tensor
    directions: Tensor
    mean: Tensor
    deviation: Tensor

    BETA = 0.85

    @classmethod
    def start(cls, basis: Basis, a: Tensor) -> Sensitivity:
        """Nothing seen yet, in the basis that a layer has now."""
        mean = torch.zeros(len(a), device=a.device)
        to_b, to_a = (t.to(a.device, torch.float32).contiguous() for t in (basis.to_b, basis.to_a))
        directions = basis.to_a @ a.detach().to("cpu", torch.float64)
        return cls(to_b, to_a, directions, mean, mean.clone())

    def update(self, effects: Tensor) -> None:
        """Take in one optimizer step's effects, as `sensitivity` gives them."""
        effect = ((self.to_b.T @ effects) * self.to_a).sum(1).abs()
        # A step that overflowed is skipped by its optimizer, and here.
        effect = torch.where(effect.isfinite().all(), effect, self.mean)
        self.mean = self.BETA * self.mean + (1 - self.BETA) * effect
        self.deviation = self.BETA * self.deviation + (1 - self.BETA) * (effect - self.mean).abs()

    def scores(self, directions: Tensor) -> Tensor:
        """The scores of components with these right directions, shape (rank, in_features).

        Components turn a little in a window; each is worth its share of the old ones.
        """
        old, new = (torch.nn.functional.normalize(d, dim=1) for d in (self.directions, directions))
        score = (self.mean * self.deviation).to("cpu", torch.float64)
        return (new @ old.T).square() @ score
