import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autorank.truncation import truncate


def factors(out: int, into: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=generator)
    a = torch.randn(rank, into, generator=generator)
    return b, a


@given(
    out=st.integers(4, 24),
    into=st.integers(4, 24),
    rank=st.integers(1, 4),
    keep=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_the_error_is_the_tail_of_the_singular_values(
    out: int, into: int, rank: int, keep: int, seed: int
) -> None:
    keep = min(keep, rank)
    b, a = factors(out, into, rank, seed)
    rebase = truncate(b, a, keep)
    kept = (b.double() @ rebase.to_b) @ (rebase.to_a @ a.double())
    dense = b.double() @ a.double()
    tail = torch.linalg.svdvals(dense)[keep:].square().sum().sqrt()
    assert torch.linalg.norm(dense - kept) == pytest.approx(tail.item(), abs=1e-8, rel=1e-8)


@given(rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_keeping_every_rank_keeps_the_function(rank: int, seed: int) -> None:
    b, a = factors(9, 7, rank, seed)
    rebase = truncate(b, a, rank)
    assert torch.allclose((b.double() @ rebase.to_b) @ (rebase.to_a @ a.double()), b.double() @ a.double())
    assert torch.allclose(rebase.to_a @ rebase.to_b, torch.eye(rank, dtype=torch.float64), atol=1e-8)


def test_a_keeps_the_size_it_had() -> None:
    b, a = factors(12, 10, 4, 0)
    rebase = truncate(b * 1e-3, a, 3)
    new_a = rebase.to_a @ a.double()
    assert torch.allclose(new_a.norm(dim=1), a.double().square().sum(1).mean().sqrt().expand(3))


def test_at_the_start_nothing_dies() -> None:
    """With B = 0 every singular value is 0; a balanced basis would turn A to 0 as well."""
    _, a = factors(12, 10, 4, 0)
    b = torch.zeros(12, 4)
    rebase = truncate(b, a, 2)
    assert torch.equal(b.double() @ rebase.to_b, torch.zeros(12, 2, dtype=torch.float64))
    assert (rebase.to_a @ a.double()).norm(dim=1).min() > 1


def test_protected_components_stay_as_they_are() -> None:
    b, a = factors(12, 10, 5, 1)
    b[:, 3:] = 0
    rebase = truncate(b, a, 3, protected=2)
    new_b, new_a = b.double() @ rebase.to_b, rebase.to_a @ a.double()
    assert torch.equal(new_a[1:], a[3:].double()) and torch.equal(new_b[:, 1:], b[:, 3:].double())
    best = torch.linalg.svdvals(b[:, :3].double() @ a[:3].double())
    assert torch.linalg.norm(new_b[:, :1] @ new_a[:1]) == pytest.approx(best[0].item())


def test_just_after_growth_the_newborn_survives_a_rebase() -> None:
    b, a = factors(12, 10, 4, 2)
    b[:, 3] = 0
    rebase = truncate(b, a, 4)
    new_a = rebase.to_a @ a.double()
    assert new_a.norm(dim=1).min() > 1


def test_dependent_rows_are_selected_not_mixed() -> None:
    b, a = factors(12, 10, 3, 3)
    a[2] = a[0]
    b[:, 1] *= 100
    rebase = truncate(b, a, 1)
    assert torch.equal(rebase.to_a, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("keep", [-1, 5])
def test_ranks_out_of_range_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="keep"):
        truncate(*factors(6, 6, 4, 0), keep)


def test_the_basis_has_one_sign() -> None:
    """The same directions, mixed differently, come out the same."""
    b, a = factors(8, 6, 3, 4)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5))).Q
    first, second = truncate(b, a, 2), truncate(b @ mix.T, mix @ a, 2)
    assert torch.allclose(first.to_a @ a.double(), second.to_a @ (mix @ a).double(), atol=1e-5)
