"""Which directions a layer keeps when its rank shrinks: components of its singular basis.

Pure torch arithmetic on B and A; the live layer and its optimizer change in `resize.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Basis", "Rebase", "singular_basis", "singular_factors"]

_WORST_CONDITION = 1e6

Drawn = Literal["a", "b"]
"""Which factor LoRA draws at random; the other starts at 0. Embeddings draw B, all others A."""


@dataclass(frozen=True)
class Rebase:
    """New components as mixtures of old ones: B' = B @ to_b and A' = to_a @ A.

    `to_b` has shape (rank, kept), `to_a` (kept, rank), both float64 and on the CPU, for not every
    device has float64; to_a @ to_b is the identity. Gradients and first moments move exactly
    along: since the loss sees B' A' as it saw B A, ∂L/∂B' = ∂L/∂B @ to_aᵀ and
    ∂L/∂A' = to_bᵀ @ ∂L/∂A.
    """

    to_b: Tensor
    to_a: Tensor


@dataclass(frozen=True)
class Basis:
    """A layer's components as its singular directions, with whatever newborns follow them.

    Attributes:
        energies: σ² of B A (without its scaling) by component, shape (mature,), descending.
        to_b: B' = B @ to_b, shape (rank, rank).
        to_a: A' = to_a @ A, shape (rank, rank).
    """

    energies: Tensor
    to_b: Tensor
    to_a: Tensor

    def without(self, dropped: Sequence[int]) -> Rebase:
        """All components but the dropped ones, in their order.

        B' A' then differs from B A by exactly the dropped σ_i u_i v_iᵀ: where those are the smallest,
        no adapter of that rank is closer (Eckart and Young 1936).
        """
        kept = [i for i in range(len(self.to_a)) if i not in set(dropped)]
        return Rebase(self.to_b[:, kept], self.to_a[kept])


def singular_basis(b: Tensor, a: Tensor, *, newborns: int = 0, drawn: Drawn = "a") -> Basis:
    """The singular basis of B A, the last `newborns` components left as they are.

    With QR factorisations B = Q_b R_b and Aᵀ = Q_a R_a and the core R_b R_aᵀ = U S Vᵀ, components
    are A' = ν (Q_a V)ᵀ and B' = Q_b U S / ν, where ν is the root mean square norm of A's rows.
    Giving all of S to B, rather than a root of it to each side, keeps LoRA's proportions (A at the
    size it was drawn with, B near 0), on which Adam's step depends; and it needs the inverse of
    R_a only, never of S, so it holds at B = 0 and for components with b = 0, where a balanced basis
    would turn both factors to zero. Where LoRA draws B, the two change places.

    Where the rows of A are nearly dependent, R_a cannot be inverted safely; then the components
    stay as they are, in the order of ‖b_i‖‖a_i‖.

    Args:
        b: shape (out_features, rank).
        a: shape (rank, in_features).
        newborns: components, last in order, that are too young to be mixed with others.
        drawn: the factor that LoRA draws at random.
    """
    if drawn == "b":
        turned = singular_basis(a.T, b.T, newborns=newborns)
        return Basis(turned.energies, turned.to_a.T, turned.to_b.T)
    mature = a.shape[0] - newborns
    b, a = b.detach()[:, :mature], a.detach()[:mature]
    energies, to_b, to_a = _mature_basis(b.to("cpu", torch.float64), a.to("cpu", torch.float64))
    rest = torch.eye(newborns, dtype=torch.float64)
    return Basis(energies, torch.block_diag(to_b, rest), torch.block_diag(to_a, rest))


def _mature_basis(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, shape (rank,), and to_b and to_a, shape (rank, rank)."""
    rank = a.shape[0]
    if rank == 0:
        return b.new_zeros(0), b.new_zeros(0, 0), b.new_zeros(0, 0)
    r_a = torch.linalg.qr(a.T, mode="r").R
    spread = torch.linalg.svdvals(r_a)
    if len(spread) < rank or spread[-1] * _WORST_CONDITION < spread[0] or spread[0] == 0:
        return _as_they_are(b, a)
    r_b = torch.linalg.qr(b, mode="r").R
    _, sigma, vh = torch.linalg.svd(r_b @ r_a.T)
    v = vh.T
    norm = a.square().sum(1).mean().sqrt()
    to_b = r_a.T @ v / norm
    to_a = norm * torch.linalg.solve_triangular(r_a, v, upper=True).T
    signs = _signs(to_a @ a)
    energies = torch.zeros(rank, dtype=b.dtype)
    energies[: len(sigma)] = sigma.square()
    return energies, to_b * signs, to_a * signs[:, None]


def singular_factors(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ² of B A, and B' and A' whose components are its singular directions, in descending order.

    As in `singular_basis`, but made anew rather than mixed of what is there: so also where the rows
    of A are dependent, and only for an adapter that is not in training. The first n components are
    the adapter of rank n that is closest to B A (Eckart and Young 1936).

    Args:
        b: shape (out_features, rank).
        a: shape (rank, in_features).

    Returns:
        Shapes (n,), (out_features, n) and (n, in_features), float64, where n = min(rank, in, out).
    """
    b, a = b.detach().to("cpu", torch.float64), a.detach().to("cpu", torch.float64)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    norm = a.square().sum(1).mean().sqrt().clamp_min(1e-300)
    new_b, new_a = q_b @ u * sigma / norm, norm * (vh @ q_a.T)
    signs = _signs(new_a)
    sigma = torch.where(sigma > 1e-12 * sigma.max(), sigma, 0.0)  # what is left of dependent rows is rounding
    return sigma.square(), new_b * signs, new_a * signs[:, None]


def _signs(rows: Tensor) -> Tensor:
    """±1 per row, so that its largest entry is positive: an SVD fixes no sign of its own."""
    largest = rows.abs().argmax(1, keepdim=True)
    return torch.where(rows.gather(1, largest) < 0, -1.0, 1.0).squeeze(1).to(rows.dtype)


def _as_they_are(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The components themselves, the largest b_i a_iᵀ first."""
    energies = b.square().sum(0) * a.square().sum(1)
    order = torch.argsort(energies, descending=True, stable=True)
    rows = torch.eye(a.shape[0], dtype=a.dtype)[order]
    return energies[order], rows.T, rows
