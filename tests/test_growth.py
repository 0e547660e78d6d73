import torch

from autorank.growth import aligned_components, plain_components


def test_rows_are_drawn_as_peft_draws_them() -> None:
    rows = plain_components(200, 64, torch.Generator().manual_seed(0))
    bound = 1 / 8
    assert rows.shape == (200, 64)
    assert rows.abs().max() <= bound
    assert rows.abs().max() > 0.99 * bound
    assert abs(rows.var().item() / (bound**2 / 3) - 1) < 0.05


def test_only_the_generator_is_random() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = plain_components(2, 8, torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, plain_components(2, 8, torch.Generator().manual_seed(3)))


def test_aligned_rows_have_the_direction_given_and_the_size_of_the_others() -> None:
    directions = torch.eye(8, dtype=torch.float64)[:3]
    like = plain_components(5, 8, torch.Generator().manual_seed(0)) * 7
    rows = aligned_components(directions, like)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows / rows.norm(dim=1, keepdim=True), directions.float())
    assert torch.allclose(rows.norm(dim=1), like.square().sum(1).mean().sqrt().expand(3))


def test_without_others_aligned_rows_have_the_size_that_lora_draws() -> None:
    drawn = plain_components(4000, 8, torch.Generator().manual_seed(0)).square().sum(1).mean().sqrt()
    for like in (None, torch.zeros(0, 8), torch.zeros(2, 8)):
        rows = aligned_components(torch.eye(8, dtype=torch.float64)[:2], like)
        assert torch.allclose(rows.norm(dim=1), drawn.expand(2), rtol=0.02)
