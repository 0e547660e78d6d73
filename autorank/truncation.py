"""Which directions a layer keeps when its rank shrinks: the leading ones of its singular basis.

Pure torch arithmetic on B and A; the live layer and its optimizer change in `resize.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rebase", "truncate"]

_WORST_CONDITION = 1e6


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


def truncate(b: Tensor, a: Tensor, keep: int, *, protected: int = 0) -> Rebase:
    """Keep the `keep` leading singular directions of B A, and the last `protected` components as they are.

    The basis: with QR factorisations B = Q_b R_b and Aᵀ = Q_a R_a and the core R_b R_aᵀ = U S Vᵀ,
    the kept components are A' = ν (Q_a V)ᵀ and B' = Q_b U S / ν, where ν is the root mean square
    norm of A's rows. Then B' A' is the best approximation of B A at that rank (Eckart and Young
    1936). Giving all of S to B, rather than a root of it to each side, keeps LoRA's proportions
    (A at the size it was drawn with, B near 0), on which Adam's step depends; and it needs the
    inverse of R_a only, never of S, so it holds at B = 0 and for newborns with b = 0, where a
    balanced basis would turn both factors to zero.

    Where A's rows are nearly dependent, R_a cannot be inverted safely; then components are kept
    as they are, those with the largest ‖b_i‖‖a_i‖.

    Args:
        b: shape (out_features, rank).
        a: shape (rank, in_features).
        keep: ranks kept in all, in protected..rank.
        protected: newborn components, last in order, left untouched.
    """
    rank = a.shape[0]
    if not protected <= keep <= rank:
        raise ValueError(f"keep {keep} is not in {protected}..{rank}")
    mature = rank - protected
    to_b, to_a = _singular_basis(
        b[:, :mature].to("cpu", torch.float64), a[:mature].to("cpu", torch.float64), keep - protected
    )
    newborn = torch.eye(protected, dtype=torch.float64)
    return Rebase(torch.block_diag(to_b, newborn), torch.block_diag(to_a, newborn))


def _singular_basis(b: Tensor, a: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """to_b, shape (rank, keep), and to_a, shape (keep, rank), for the leading `keep` directions."""
    rank = a.shape[0]
    if keep == 0:
        return b.new_zeros(rank, 0), b.new_zeros(0, rank)
    r_a = torch.linalg.qr(a.T, mode="r").R
    spread = torch.linalg.svdvals(r_a)
    if spread[-1] * _WORST_CONDITION < spread[0] or spread[0] == 0:
        return _select(b, a, keep)
    r_b = torch.linalg.qr(b, mode="r").R
    _, _, vh = torch.linalg.svd(r_b @ r_a.T)
    v = vh[:keep].T
    norm = a.square().sum(1).mean().sqrt()
    to_b = r_a.T @ v / norm
    to_a = norm * torch.linalg.solve_triangular(r_a, v, upper=True).T
    signs = _signs(to_a @ a)
    return to_b * signs, to_a * signs[:, None]


def _signs(rows: Tensor) -> Tensor:
    """±1 per row, so that its largest entry is positive: an SVD fixes no sign of its own."""
    largest = rows.abs().argmax(1, keepdim=True)
    return torch.where(rows.gather(1, largest) < 0, -1.0, 1.0).squeeze(1).to(rows.dtype)


def _select(b: Tensor, a: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` components with the largest norm of b_i a_iᵀ, in their order."""
    norms = b.norm(dim=0) * a.norm(dim=1)
    kept = torch.sort(torch.argsort(norms, descending=True, stable=True)[:keep]).values
    rows = torch.eye(a.shape[0], dtype=a.dtype)[kept]
    return rows.T, rows
