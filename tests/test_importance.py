import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autorank.importance import Sensitivity, gradient_norm, sensitivity, singular_value
from autorank.truncation import singular_basis


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def right(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return singular_basis(b, a).to_a @ a


@given(rank=st.integers(1, 5), seed=st.integers(0, 50))
def test_energies_are_the_dense_singular_values(rank: int, seed: int) -> None:
    b, a = draw(seed, 9, rank), draw(seed + 1, rank, 7)
    expected = torch.linalg.svdvals(2.5 * b @ a)[:rank].square()
    assert torch.allclose(singular_value(singular_basis(b, a), 2.5), expected)


def test_gradient_norm_is_that_of_the_gradient_along_each_component() -> None:
    b, a, gradient = draw(0, 9, 3), draw(1, 3, 7), draw(2, 9, 7)
    _, _, vh = torch.linalg.svd(b @ a, full_matrices=False)
    heard = (gradient @ a.T).T @ (gradient @ a.T)
    expected = (gradient @ vh[:3].T).square().sum(0)
    assert torch.allclose(gradient_norm(singular_basis(b, a).to_a, a, heard), expected)


def test_deleting_a_component_changes_the_loss_by_its_sensitivity() -> None:
    """For a loss linear in ΔW first order is exact, in any basis."""
    b, a, gradient = draw(0, 9, 3), draw(1, 3, 7), draw(2, 9, 7)
    effects = sensitivity(b, gradient @ a.T)
    basis = singular_basis(b, a)
    rotated = (basis.to_b.T @ effects.double() * basis.to_a).sum(1)
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    expected = [float(s[i] * u[:, i] @ gradient @ vh[i]) for i in range(3)]
    assert rotated.tolist() == pytest.approx(expected, rel=1e-5)
    assert sensitivity(b, gradient @ a.T).diagonal().tolist() == pytest.approx(
        [float(b[:, i] @ gradient @ a[i]) for i in range(3)], rel=1e-5
    )


def test_smoothing_is_the_papers_recurrence() -> None:
    b, a = draw(0, 9, 2), draw(1, 2, 7)
    basis = singular_basis(b, a)
    smoothed = Sensitivity.start(basis, a)
    mean, deviation = torch.zeros(2), torch.zeros(2)
    for step in range(5):
        gradient = draw(10 + step, 9, 7)
        smoothed.update(sensitivity(b, gradient @ a.T))
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        effect = torch.tensor([abs(float(s[i] * u[:, i] @ gradient @ vh[i])) for i in range(2)])
        mean = 0.85 * mean + 0.15 * effect
        deviation = 0.85 * deviation + 0.15 * (effect - mean).abs()
    assert smoothed.scores(right(b, a)).tolist() == pytest.approx((mean * deviation).tolist(), rel=1e-4)


def test_components_that_turned_are_worth_their_share_of_the_old_ones() -> None:
    b, a = draw(0, 9, 2), draw(1, 2, 7)
    smoothed = Sensitivity.start(singular_basis(b, a), a)
    for step in range(3):
        smoothed.update(sensitivity(b, draw(10 + step, 9, 7) @ a.T))
    one, other = smoothed.scores(smoothed.directions).tolist()
    first, second = torch.nn.functional.normalize(smoothed.directions, dim=1)
    turned = torch.stack([0.8 * first + 0.6 * second, 0.8 * second - 0.6 * first])
    expected = [0.64 * one + 0.36 * other, 0.64 * other + 0.36 * one]
    assert smoothed.scores(turned).tolist() == pytest.approx(expected)


@given(seed=st.integers(0, 30))
def test_no_score_depends_on_the_gauge(seed: int) -> None:
    b, a, gradient, mix = draw(seed, 9, 3), draw(seed + 1, 3, 7), draw(seed + 2, 9, 7), draw(seed + 3, 3, 3)
    mix += 3 * torch.eye(3)
    scores = []
    for one, other in ((b, a), (b @ torch.linalg.inv(mix), mix @ a)):
        basis = singular_basis(one, other)
        smoothed = Sensitivity.start(basis, other)
        smoothed.update(sensitivity(one, gradient @ other.T))
        heard = (gradient @ other.T).T @ (gradient @ other.T)
        norms = gradient_norm(basis.to_a, other, heard)
        scores.append([singular_value(basis, 2.0), norms, smoothed.scores(right(one, other))])
    for first, second in zip(*scores, strict=True):
        assert torch.allclose(first, second, rtol=1e-3, atol=1e-5)


def test_half_precision_gradients_are_summed_in_float32() -> None:
    b = torch.full((4096, 2), 20.0, dtype=torch.float16)
    assert sensitivity(b, b).dtype == torch.float32
    assert sensitivity(b, b)[0, 0] == pytest.approx(4096 * 400, rel=1e-6)
