import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autorank.truncation import singular_basis, singular_factors


def factors(out: int, into: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=generator)
    a = torch.randn(rank, into, generator=generator)
    return b, a


@given(
    out=st.integers(4, 24),
    into=st.integers(4, 24),
    rank=st.integers(1, 4),
    dropped=st.sets(st.integers(0, 3)),
    seed=st.integers(0, 99),
    drawn=st.sampled_from(["a", "b"]),
)
def test_the_change_is_exactly_the_dropped_singular_values(
    out: int, into: int, rank: int, dropped: set[int], seed: int, drawn: str
) -> None:
    b, a = factors(out, into, rank, seed)
    lost = [i for i in sorted(dropped) if i < rank]
    basis = singular_basis(b, a, drawn=drawn)  # type: ignore[arg-type]
    rebase = basis.without(lost)
    kept = (b.double() @ rebase.to_b) @ (rebase.to_a @ a.double())
    u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    wanted = (u[:, lost] * s[lost]) @ vh[lost]
    assert torch.allclose(b.double() @ a.double() - kept, wanted, atol=1e-7)
    assert torch.allclose(basis.energies, s[:rank].square(), atol=1e-7, rtol=1e-7)
    size = rank - len(lost)
    assert torch.allclose(rebase.to_a @ rebase.to_b, torch.eye(size, dtype=torch.float64), atol=1e-7)


@pytest.mark.parametrize("drawn", ["a", "b"])
def test_the_drawn_factor_keeps_the_size_it_had(drawn: str) -> None:
    b, a = factors(12, 10, 4, 0)
    small = (b * 1e-3, a) if drawn == "a" else (b, a * 1e-3)
    basis = singular_basis(*small, drawn=drawn)  # type: ignore[arg-type]
    new = basis.to_a @ a.double() if drawn == "a" else (b.double() @ basis.to_b).T
    old = a.double() if drawn == "a" else b.double().T
    assert torch.allclose(new.norm(dim=1), old.square().sum(1).mean().sqrt().expand(4))


@pytest.mark.parametrize("drawn", ["a", "b"])
def test_at_the_start_nothing_dies(drawn: str) -> None:
    """With B = 0 every singular value is 0; a balanced basis would turn A to 0 as well."""
    b, a = factors(12, 10, 4, 0)
    b, a = (torch.zeros(12, 4), a) if drawn == "a" else (b, torch.zeros(4, 10))
    rebase = singular_basis(b, a, drawn=drawn).without([0, 3])  # type: ignore[arg-type]
    new_b, new_a = b.double() @ rebase.to_b, rebase.to_a @ a.double()
    zero, alive = (new_b, new_a) if drawn == "a" else (new_a, new_b.T)
    assert not zero.any()
    assert alive.norm(dim=1).min() > 1


def test_newborns_stay_as_they_are() -> None:
    b, a = factors(12, 10, 5, 1)
    b[:, 3:] = 0
    rebase = singular_basis(b, a, newborns=2).without([1, 2])
    new_b, new_a = b.double() @ rebase.to_b, rebase.to_a @ a.double()
    assert torch.equal(new_a[1:], a[3:].double()) and torch.equal(new_b[:, 1:], b[:, 3:].double())
    best = torch.linalg.svdvals(b[:, :3].double() @ a[:3].double())
    assert torch.linalg.norm(new_b[:, :1] @ new_a[:1]) == pytest.approx(best[0].item())


def test_just_after_growth_the_newborn_survives_a_rebase() -> None:
    b, a = factors(12, 10, 4, 2)
    b[:, 3] = 0
    rebase = singular_basis(b, a).without([])
    new_a = rebase.to_a @ a.double()
    assert new_a.norm(dim=1).min() > 1


def test_dependent_rows_are_selected_not_mixed() -> None:
    b, a = factors(12, 10, 3, 3)
    a[2] = a[0]
    b[:, 1] *= 100
    rebase = singular_basis(b, a).without([1, 2])
    assert torch.equal(rebase.to_a, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))


def test_the_basis_does_not_depend_on_the_gauge() -> None:
    """The same directions, mixed differently, come out the same."""
    b, a = factors(8, 6, 3, 4)
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    first, second = singular_basis(b, a), singular_basis(b @ torch.linalg.inv(mix), mix @ a)
    one, two = (
        torch.nn.functional.normalize(m, dim=1)
        for m in (first.to_a @ a.double(), second.to_a @ (mix @ a).double())
    )
    assert torch.allclose(one, two, atol=1e-5)
    assert torch.allclose(first.energies, second.energies, rtol=1e-4)


@given(
    out=st.integers(1, 12), into=st.integers(1, 12), rank=st.integers(1, 6), seed=st.integers(0, 99),
    equal=st.booleans(),
)  # fmt: skip
def test_factors_made_anew_are_the_singular_directions(
    out: int, into: int, rank: int, seed: int, equal: bool
) -> None:
    b, a = factors(out, into, rank, seed)
    if equal:
        a[-1] = a[0]
    energies, new_b, new_a = singular_factors(b, a)
    whole = b.double() @ a.double()
    count = min(out, into, rank)
    assert new_b.shape == (out, count) and new_a.shape == (count, into)
    assert torch.allclose(energies, torch.linalg.svdvals(whole)[:count].square(), atol=1e-9, rtol=1e-9)
    assert torch.allclose(new_b @ new_a, whole, atol=1e-9)
    gram = new_a @ new_a.T / a.double().square().sum(1).mean()
    assert torch.allclose(gram, torch.eye(count, dtype=torch.float64), atol=1e-9)


def test_an_adapter_that_holds_nothing_has_no_energy() -> None:
    energies, new_b, new_a = singular_factors(torch.zeros(4, 2), torch.zeros(2, 3))
    assert not energies.any() and not (new_b @ new_a).any()
