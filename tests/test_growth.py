import torch

from autorank.growth import plain_components


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
