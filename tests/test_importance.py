import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autorank.importance import gradient_norm, singular_value


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(rank=st.integers(1, 5), seed=st.integers(0, 50))
def test_energies_are_the_dense_singular_values(rank: int, seed: int) -> None:
    b, a = draw(seed, 9, rank), draw(seed + 1, rank, 7)
    expected = torch.linalg.svdvals(2.5 * b.double() @ a.double())[:rank].square()
    assert torch.allclose(singular_value(b, a, 2.5), expected, rtol=1e-8, atol=1e-8)


def test_energies_do_not_depend_on_the_gauge() -> None:
    b, a, mix = draw(0, 9, 4), draw(1, 4, 7), draw(2, 4, 4)
    mixed = singular_value(b @ mix, torch.linalg.inv(mix) @ a, 2.0)
    assert torch.allclose(singular_value(b, a, 2.0), mixed, rtol=1e-3)


def test_gradient_norm_is_the_mean_over_components() -> None:
    g_a, g_b = torch.full((4, 3), 2.0), torch.full((5, 4), 1.0)
    assert gradient_norm(g_a, g_b) == pytest.approx(4 * 3 + 5)


def test_at_the_start_it_sketches_the_full_gradient() -> None:
    """With B = 0 and random A the score grows with ‖G‖², whatever the rank."""
    gradient = draw(0, 40, 30)
    for rank in (4, 16):
        a = draw(rank, rank, 30)
        score = gradient_norm(torch.zeros(rank, 30), gradient @ a.T)
        assert score == pytest.approx(gradient.square().sum().item(), rel=0.25)
        assert gradient_norm(torch.zeros(rank, 30), 3 * gradient @ a.T) == pytest.approx(9 * score)


def test_half_precision_gradients_are_summed_in_float32() -> None:
    g = torch.full((2, 4096), 20.0, dtype=torch.float16)
    assert gradient_norm(g, g.T) == pytest.approx(2 * 4096 * 400, rel=1e-6)
