import peft
import pytest
import torch
from torch import nn

from autorank.growth import aligned_components, plain_components, plain_size
from autorank.truncation import Drawn


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


def test_aligned_rows_see_what_other_rows_see_and_are_not_longer() -> None:
    gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    rows = aligned_components(vh[:3], s[:3].square(), size=0.5, usual=0.3)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows / rows.norm(dim=1, keepdim=True), vh[:3].float(), atol=1e-6)
    seen = (gradient @ rows.double().T).square().sum(0)
    assert torch.allclose(seen, torch.full((3,), 0.3, dtype=torch.float64), rtol=1e-5)
    weak = aligned_components(vh[5:], s[5:].square() * 1e-6, size=0.5, usual=0.3)
    assert weak.norm() == pytest.approx(0.5)
    assert aligned_components(vh[:1], torch.zeros(1), size=0.5, usual=0.3).norm() == pytest.approx(0.5)


@pytest.mark.parametrize("drawn", ["a", "b"])
def test_the_plain_size_is_that_of_drawn_rows(drawn: Drawn) -> None:
    rows = plain_components(4000, 8, torch.Generator().manual_seed(0), drawn)
    assert rows.square().sum(1).mean().sqrt() == pytest.approx(plain_size(8, drawn), rel=0.02)


@pytest.mark.parametrize("drawn", ["a", "b"])
def test_plain_rows_are_drawn_as_peft_draws_them(drawn: Drawn) -> None:
    layer = nn.Linear(500, 400) if drawn == "a" else nn.Embedding(30, 400)
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=50, target_modules=["0"]))
    b_or_a = ".lora_A." if drawn == "a" else ".lora_embedding_B."
    theirs = next(p for n, p in model.named_parameters() if b_or_a in n or n.endswith(b_or_a[1:-1]))
    ours = plain_components(50, 500 if drawn == "a" else 400, torch.Generator().manual_seed(0), drawn)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3)
