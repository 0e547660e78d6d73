"""Sketches of gradients, against the dense gradients of small layers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autorank.sketch import Reading, Sketch, _agreement, _halves, _off, _orthonormal, seeded


def draw(key: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(key))


SCALING = 0.5


class Adapted(nn.Linear):
    """A frozen layer with an adapter, as LoRA has it."""

    def __init__(self, name: str, into: int, out: int) -> None:
        super().__init__(into, out)
        self.weight.data, self.bias.data = draw(f"w{name}", out, into), draw(f"bias{name}", out)
        self.weight.requires_grad = self.bias.requires_grad = False
        self.register_buffer("a", draw(f"a{name}", 2, into))
        self.b = nn.Parameter(draw(f"b{name}", out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + SCALING * (x @ self.a.T) @ self.b.T


class Stack(nn.Module):
    """Two adapted layers behind an input that needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Adapted("first", 12, 10), Adapted("second", 10, 8)

    @property
    def adapted(self) -> dict[str, Adapted]:
        return {"first": self.first, "second": self.second}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


SHAPES = {"first": (12, 10), "second": (10, 8)}


def sketch_of(model: Stack, phase_steps: int = 1) -> Sketch:
    b = {name: layer.b for name, layer in model.adapted.items()}
    return Sketch(model.adapted, b, SHAPES, scaling=SCALING, phase_steps=phase_steps, key="k")


def agreement(seen: Tensor, signs: Tensor) -> Tensor:
    """Of steps that saw vectors along directions, shape (steps, width, features)."""
    return _agreement(torch.einsum("twf,svf->twsv", seen, seen), signs)


def window(
    model: Stack,
    batches: Callable[[int], list[Tensor]],
    *,
    phase_steps: int = 1,
    run: Callable[[Stack, Tensor], Tensor] = lambda model, x: model(x).square().sum() / 100,
) -> dict[str, Reading]:
    sketch = sketch_of(model, phase_steps)
    sketch.attach()
    for step in range(3 * phase_steps):
        for x in batches(step):
            run(model, x.requires_grad_()).backward()  # type: ignore[no-untyped-call]
        sketch.commit()
    sketch.detach()
    for layer in model.adapted.values():
        assert not layer._forward_hooks and not layer.b._backward_hooks
    return sketch.read({name: layer.a for name, layer in model.adapted.items()})


def dense(model: Stack, x: Tensor) -> dict[str, Tensor]:
    """∂L/∂W by autograd."""
    weights = {name: layer.weight.requires_grad_() for name, layer in model.adapted.items()}
    gradients = torch.autograd.grad(model(x).square().sum() / 100, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad = False
    return {name: double(gradient) for name, gradient in zip(weights, gradients, strict=True)}


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def off(basis: Tensor, matrix: Tensor) -> Tensor:
    """The matrix with what lies in the columns' span of `basis` taken out."""
    q = torch.linalg.qr(basis.double()).Q
    return matrix - q @ (q.T @ matrix)


def test_without_noise_gains_are_energies_of_the_gradient_that_the_adapter_cannot_see(device: str) -> None:
    """The same batch in every phase, and a gradient of rank ≤ width: the sketch is exact."""
    model = Stack().to(device)
    x = draw("x", 2, 12).to(device)  # two rows: the gradients have rank 2
    readings = window(model, lambda step: [x.clone()])
    for name, gradient in dense(model, x).items():
        b, a = double(model.adapted[name].b), double(model.adapted[name].a)
        unseen = off(b, off(a.T, gradient.T).T)
        reading = readings[name]
        energies = torch.linalg.svdvals(unseen).square()
        # Left directions are those of G off B; what they carry is Gᵀu off A: at most the energies.
        assert reading.gains.sum() == pytest.approx(energies.sum().item(), rel=1e-4)
        assert reading.gains[0] == pytest.approx(energies[0].item(), rel=1e-4)
        assert reading.gains[2:].abs().max() < 1e-6 * energies[0]
        assert (b.T @ reading.left).abs().max() < 1e-4
        assert (a @ reading.right[:, :2]).abs().max() < 1e-4
        moved = (reading.left[:, 0] @ unseen @ reading.right[:, 0]).abs()
        assert moved.square() == pytest.approx(energies[0].item(), rel=1e-4)


def test_what_the_adapter_sees_is_the_gradient_along_its_rows(device: str) -> None:
    model = Stack().to(device)
    x = draw("x", 6, 12).to(device)
    readings = window(model, lambda step: [x.clone()], phase_steps=2)
    for name, gradient in dense(model, x).items():
        along = gradient @ double(model.adapted[name].a).T
        assert torch.allclose(readings[name].heard, along.T @ along, rtol=1e-4)


def test_noise_is_heard_and_gains_nothing() -> None:
    """Steps that are loud and say the opposite of others: no gain, whatever each of them says."""
    model = Stack()
    x = draw("x", 6, 12)
    sign = iter([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    readings = window(
        model, lambda step: [x.clone()], phase_steps=2,
        run=lambda model, x: next(sign) * model(x).square().sum() / 100,
    )  # fmt: skip
    for reading in readings.values():
        assert reading.heard.diagonal().min() > 0 and reading.loudness[0] > 0
        assert reading.gains.max() == 0


def test_a_direction_is_as_loud_as_its_gradient_in_a_step() -> None:
    model = Stack()
    x = draw("x", 2, 12)
    readings = window(model, lambda step: [x.clone()])
    for name, gradient in dense(model, x).items():
        left = readings[name].left[:, 0]
        assert readings[name].loudness[0] == pytest.approx(
            (gradient.T @ left).square().sum().item(), rel=1e-3
        )


def test_passes_of_one_step_add_up() -> None:
    model = Stack()
    x = draw("x", 6, 12)
    whole = window(model, lambda step: [x.clone()])
    parts = window(model, lambda step: [x[:2].clone(), x[2:].clone()])
    for name in SHAPES:
        assert torch.allclose(whole[name].gains, parts[name].gains, rtol=1e-4, atol=1e-8)
        assert torch.allclose(whole[name].heard, parts[name].heard, rtol=1e-4, atol=1e-8)


class Shared(Stack):
    """The first layer serves twice in a pass, as ALBERT's do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Adapted("square", 12, 12)
        self.second = Adapted("last", 12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.first(x)))


def test_a_layer_that_serves_twice_in_a_pass_is_seen_whole() -> None:
    """One row, so that the gradient of the shared weight has rank 2: one from each place."""
    model, x = Shared(), draw("x", 1, 12)
    shapes = {"first": (12, 12), "second": (12, 8)}
    b = {name: layer.b for name, layer in model.adapted.items()}
    sketch = Sketch(model.adapted, b, shapes, scaling=SCALING, phase_steps=1, key="k")
    sketch.attach()
    for _ in range(3):
        (model(x.clone().requires_grad_()).square().sum() / 100).backward()  # type: ignore[no-untyped-call]
        sketch.commit()
    sketch.detach()
    layer = model.first
    reading = sketch.read({"first": layer.a})["first"]
    gradient = dense(model, x)["first"]
    assert int(torch.linalg.matrix_rank(gradient, rtol=1e-6)) == 2
    unseen = off(layer.a.T, off(layer.b.detach(), gradient).T).T
    expected = torch.linalg.svdvals(unseen).square()[:2]
    torch.testing.assert_close(reading.gains[:2], expected, rtol=1e-4, atol=0)
    seen = layer.a.double() @ gradient.T @ gradient @ layer.a.double().T
    torch.testing.assert_close(reading.heard, seen, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, device: str) -> None:
    model = Stack().to(device)
    x = draw("x", 6, 12).to(device)

    def again(model: Stack, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return out.square().sum() / 100

    whole = window(model, lambda step: [x.clone()])
    parts = window(model, lambda step: [x.clone()], run=again)
    for name in SHAPES:
        assert torch.allclose(whole[name].gains, parts[name].gains, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_pass_within_autocast_is_read_in_float32(dtype: torch.dtype, device: str) -> None:
    model = Stack().to(device)
    x = draw("x", 6, 12).to(device)
    sketch = sketch_of(model, phase_steps=2)  # of one step, the directions would be made already
    sketch.attach()
    with torch.autocast(device, dtype):
        model(x.requires_grad_()).float().square().sum().backward()
    sketch.detach()
    sketch.commit()
    assert "first/left" in sketch.state_dict()
    assert {value.dtype for value in sketch.state_dict().values()} <= {torch.float32, torch.int64}


def test_inputs_that_were_written_over_are_not_read() -> None:
    model = Stack()
    x = draw("x", 6, 12)
    seen = sketch_of(model, phase_steps=2)
    seen.attach()
    loss = model(x).square().sum()
    x.zero_()  # the layer's own backward pass does not need it, for its weight is frozen
    loss.backward()
    seen.detach()
    seen.commit()
    stored = seen.state_dict()
    assert "first/left" not in stored and "second/left" in stored


def test_the_passes_of_a_copy_are_not_evidence() -> None:
    model = Stack()
    sketch = sketch_of(model)
    sketch.attach()
    copy.deepcopy(model)(draw("x", 6, 12).requires_grad_()).sum().backward()
    sketch.detach()
    sketch.commit()
    assert "first/directions" not in sketch.state_dict()


def test_noise_alone_gains_almost_nothing_and_a_signal_stands_out() -> None:
    """The halves of a window disagree on noise: its gains are far below its energy."""

    def run(signal: float) -> Callable[[Stack, Tensor], Tensor]:
        direction = draw("d", 8)

        def loss(model: Stack, x: Tensor) -> Tensor:
            noise = draw(f"n{float(x.detach().sum())}", len(x), 8)
            return ((model(x) * (noise + signal * direction)).sum()) / len(x)

        return loss

    gains = {}
    for signal in (0.0, 1.0):
        readings = window(
            Stack(), lambda step: [1 + draw(f"x{step}", 16, 12)], phase_steps=4, run=run(signal)
        )
        gains[signal] = readings["second"].gains
    assert gains[1.0][0] > 10 * gains[0.0][0]


def test_noise_is_the_most_that_turned_signs_make() -> None:
    """Brute force: the largest eigenvalue over all ways to turn half of the steps round."""
    seen = draw("seen", 6, 3, 20).double()
    pairs = [(s, t) for s in range(6) for t in range(6) if s != t]
    largest = -math.inf
    for turned in itertools.combinations(range(6), 3):
        signs = [-1.0 if step in turned else 1.0 for step in range(6)]
        mean = sum(signs[s] * signs[t] * seen[s] @ seen[t].T for s, t in pairs) / len(pairs)
        largest = max(largest, float(torch.linalg.eigvalsh((mean + mean.T) / 2).max()))
    found = torch.linalg.eigvalsh(agreement(seen, _halves(6)))
    assert found.shape == (10, 3) and float(found.max()) == pytest.approx(largest)
    whole = sum(seen[s] @ seen[t].T for s, t in pairs) / len(pairs)
    assert torch.allclose(agreement(seen, torch.ones(1, 6))[0], whole)


@pytest.mark.parametrize(("steps", "choices"), [(2, 1), (3, 3), (4, 3), (5, 10), (6, 10), (8, 35)])
def test_half_of_the_signs_are_turned_in_every_way_once(steps: int, choices: int) -> None:
    signs = _halves(steps)
    assert signs.shape == (choices, steps) and set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert set((signs < 0).sum(1).tolist()) == {steps // 2}
    both = {tuple(row) for row in (*signs.tolist(), *(-signs).tolist())}
    assert len(both) == 2 * choices


@pytest.mark.parametrize("features", [4, 64, 512])
@pytest.mark.parametrize(("steps", "most"), [(8, 3), (6, 6), (4, 14)])
def test_chance_seldom_makes_twice_what_it_makes(features: int, steps: int, most: int) -> None:
    """Pure noise, of very unequal steps: of 200 layers few have a gain that counts; of signal all do."""
    stream = seeded("chance", features, steps)
    counted = {0.0: 0, 5.0: 0}
    for _ in range(200):
        noise = torch.randn(steps, 4, features, generator=stream, dtype=torch.float64)
        noise *= torch.randn(steps, 1, 1, generator=stream, dtype=torch.float64).exp()
        for signal in counted:
            seen = noise.clone()
            seen[:, 0, 0] += signal * float(noise.square().sum(2).mean().sqrt())
            gain = torch.linalg.eigvalsh(agreement(seen, torch.ones(1, steps))).max()
            chance = torch.linalg.eigvalsh(agreement(seen, _halves(steps))).max().clamp_min(0)
            counted[signal] += bool(gain > 2 * chance)
    assert counted[0.0] <= most and counted[5.0] > 150


def test_what_all_steps_say_is_no_noise() -> None:
    alike = window(Stack(), lambda step: [draw("one", 6, 12)], phase_steps=2)
    for name, reading in alike.items():
        assert float(reading.noise) < 1e-6 * float(reading.gains[0]), name


def test_one_layer_says_nothing_of_anothers_noise() -> None:
    """A layer whose input is all noise, or tiny, leaves the other's reading as it is."""
    plain = window(Stack(), lambda step: [draw(f"x{step}", 6, 12)], phase_steps=2)

    class Tiny(Stack):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            out: Tensor = self.second(torch.tanh(y.detach() + (y - y.detach()) * 1e-25))
            return out

    tiny = window(Tiny(), lambda step: [draw(f"x{step}", 6, 12)], phase_steps=2)
    assert torch.equal(plain["second"].noise, tiny["second"].noise) and float(plain["second"].noise) > 0
    assert tiny["first"].noise.isfinite()


def test_a_layer_may_be_called_by_keyword() -> None:
    class ByKeyword(Stack):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(x=torch.tanh(self.first(x=x)))
            return out

    x = draw("x", 3, 12)
    one, other = (window(model, lambda step: [x.clone()]) for model in (Stack(), ByKeyword()))
    assert all(torch.equal(one[name].gains, other[name].gains) for name in one)


def test_a_sketch_almost_within_the_span_of_b_is_still_taken_off_it() -> None:
    """Once off is not enough: what is left of it is mostly rounding, with the span in it."""
    columns = torch.linalg.qr(draw("span", 40, 3)).Q.T
    rows = draw("mix", 2, 3) @ columns + 1e-6 * draw("rest", 2, 40)
    basis = _off(rows, columns)
    assert float((basis @ columns.T).abs().max()) < 1e-6
    assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-6)


def test_a_step_that_overflows_counts_as_nothing() -> None:
    model = Stack()
    x = draw("x", 6, 12)
    clean = window(model, lambda step: [x.clone()], phase_steps=2)
    broken = window(
        model, lambda step: [x.clone() if step % 2 else x * float("inf")], phase_steps=2,
        run=lambda model, x: (model(x) * (1.0 if x.isfinite().all() else float("nan"))).square().sum() / 100,
    )  # fmt: skip
    for name in SHAPES:
        assert broken[name].gains.isfinite().all()
        assert torch.allclose(broken[name].gains, clean[name].gains, rtol=1e-3, atol=1e-8)


def test_one_step_alone_agrees_with_none() -> None:
    """Of the two rating steps the last overflows: there is no other to compare the first with."""
    model = Stack()
    x, scale = draw("x", 6, 12), iter((1.0, 1.0, math.inf))
    assert not window(
        model, lambda step: [x.clone()], run=lambda model, x: next(scale) * model(x).square().sum()
    )


def test_a_weak_component_is_seen_as_well() -> None:
    """Its column of B is a thousandth of the other's, and still nothing along it is a gain."""
    rows = torch.stack([draw("strong", 40), 1e-3 * draw("weak", 40)])
    assert len(_orthonormal(rows)) == 2
    assert len(_orthonormal(torch.stack([rows[0], 2 * rows[0]]))) == 1


def test_a_scaled_loss_is_scaled_back() -> None:
    model = Stack()
    x = draw("x", 6, 12)
    plain = window(model, lambda step: [x.clone()])
    sketch = sketch_of(model)
    sketch.attach()
    for scale in (1024.0, 512.0, 8.0):
        (model(x.clone().requires_grad_()).square().sum() / 100 * scale).backward()
        sketch.commit(scale=scale)
    sketch.detach()
    scaled = sketch.read({name: layer.a for name, layer in model.adapted.items()})
    for name, reading in plain.items():
        for key, value in vars(reading).items():
            assert torch.allclose(getattr(scaled[name], key), value, rtol=1e-4, atol=1e-6), key


def test_layers_that_no_gradient_reaches_are_left_out() -> None:
    model = Stack()
    readings = window(
        model, lambda step: [draw("x", 4, 12)],
        run=lambda model, x: model.second(torch.tanh(model.first(x)).detach().requires_grad_()).sum(),
    )  # fmt: skip
    assert set(readings) == {"second"}


def test_a_layer_that_only_some_steps_reach_gains_less() -> None:
    """A step that does not reach it, as in a mixture of experts, says nothing of it and is no repetition."""
    model = Stack()
    x = draw("x", 2, 12)
    whole = window(model, lambda step: [x.clone()], phase_steps=2)
    steps = iter(range(6))

    def run(model: Stack, x: Tensor) -> Tensor:
        hidden = torch.tanh(model.first(x))
        return (hidden.detach() if next(steps) == 5 else model.second(hidden)).square().sum() / 100

    def loss(model: Stack, x: Tensor) -> Tensor:
        return run(model, x) + 0 * x.sum()

    part = window(model, lambda step: [x.clone()], phase_steps=2, run=loss)
    # Four rating steps, of which the last is silent: 3 · 2 of 4 · 3 pairs agree.
    assert part["second"].gains[0] == pytest.approx(float(whole["second"].gains[0]) / 2, rel=1e-3)
    assert part["second"].loudness[0] == pytest.approx(float(whole["second"].loudness[0]) * 3 / 4, rel=1e-3)


def test_a_layer_whose_input_is_written_over_is_not_read() -> None:
    """Autograd does not need the input of a frozen layer, and does not complain."""
    frozen = nn.Linear(12, 10)
    frozen.weight.requires_grad = False
    for spoil in (False, True):
        sketch = Sketch({"l": frozen}, {}, {"l": (12, 10)}, phase_steps=1, key="k")
        sketch.attach()
        for _ in range(3):
            x = draw("x", 6, 12)
            out = frozen(x)
            if spoil:
                x.zero_()
            out.square().sum().backward()
            sketch.commit()
        sketch.detach()
        assert bool(sketch.read({})) is not spoil


def test_names_that_begin_alike_are_told_apart_in_a_state() -> None:
    def two() -> tuple[Adapted, Adapted, Sketch]:
        one, ten = Adapted("one", 12, 10), Adapted("ten", 12, 10)
        layers = {"l.1": one, "l.1/0": ten}
        b = {name: layer.b for name, layer in layers.items()}
        return one, ten, Sketch(layers, b, dict.fromkeys(layers, (12, 10)), phase_steps=1, key="k")

    def go_on(one: Adapted, ten: Adapted, sketch: Sketch, steps: range) -> None:
        sketch.attach()
        for step in steps:
            x = draw(f"x{step}", 3, 12)
            (one(x).square().sum() + ten(x).sum()).backward()
            sketch.commit()
        sketch.detach()

    whole, (first, second, cut) = two(), two()
    go_on(*whole, range(3))
    go_on(first, second, cut, range(2))
    one, ten, again = two()
    again.load_state_dict(cut.state_dict())
    go_on(one, ten, again, range(2, 3))
    rows = {"l.1": one.a, "l.1/0": ten.a}
    found, expected = again.read(rows), whole[2].read(rows)
    assert all(torch.equal(found[name].gains, expected[name].gains) for name in rows)


def test_a_padding_row_of_an_embedding_which_never_learns_is_not_seen() -> None:
    def seen(padding: int | None) -> Reading:
        layer = nn.Embedding(6, 5, padding_idx=padding)
        layer.weight.data = draw("table", 6, 5)
        sketch = Sketch({"layer": layer}, {}, {"layer": (6, 5)}, phase_steps=2, key="k")
        sketch.attach()
        for step in range(6):
            ids = torch.tensor([[0, 0, 0, 1, 2], [0, 0, 3, 4, 5]]).roll(step, 1)
            layer(ids).square().sum().backward()  # type: ignore[no-untyped-call]
            sketch.commit()
        sketch.detach()
        return sketch.read({})["layer"]

    assert float(seen(0).right[0].abs().max()) < 1e-6
    assert float(seen(None).right[0].abs().max()) > 0.1


def test_ids_stand_for_one_hot_rows() -> None:
    table = nn.Embedding(12, 8)
    table.weight.data = draw("t", 12, 8)
    ids = torch.tensor([[3, 3, 5], [1, 0, 5]])
    target = draw("y", 2, 3, 8)
    # Needs a gradient at its output, as a LoRA wrapper's has.
    table.weight.requires_grad = True
    b, a = draw("b", 8, 2).requires_grad_(), draw("a", 2, 12)
    sketch = Sketch({"t": table}, {"t": b}, {"t": (12, 8)}, phase_steps=1, key="k")
    sketch.attach()
    for _ in range(3):
        table.zero_grad()
        (table(ids) - target).square().sum().backward()
        sketch.commit()
    assert table.weight.grad is not None
    gradient = table.weight.grad.double().T
    reading = sketch.read({"t": a})["t"]
    unseen = off(b.detach(), off(a.T, gradient.T).T)
    assert reading.gains[0] == pytest.approx(torch.linalg.svdvals(unseen)[0].square().item(), rel=0.05)


def test_state_goes_on_exactly(device: str) -> None:
    model = Stack().to(device)
    current = sketch_of(model, phase_steps=2)
    current.attach()
    for step in range(6):
        if step == 3:
            state = current.state_dict()
            current.detach()
            b = {name: layer.b for name, layer in model.adapted.items()}
            kept = model.first.b.data
            model.first.b.data = kept + 1  # what B is by now decides nothing
            current = Sketch(model.adapted, b, SHAPES, scaling=SCALING, phase_steps=2, key="k")
            model.first.b.data = kept
            current.load_state_dict(state)
            current.attach()
        (model(draw(f"x{step}", 4, 12).to(device).requires_grad_()).square().sum() / 100).backward()
        current.commit()
    current.detach()
    straight = window(model, lambda step: [draw(f"x{step}", 4, 12).to(device)], phase_steps=2)
    for name, reading in current.read({n: layer.a for n, layer in model.adapted.items()}).items():
        for key, value in vars(straight[name]).items():
            assert torch.equal(getattr(reading, key), value)


def test_what_is_stored_lies_in_memory_as_it_is_read_back() -> None:
    """Strides of transposed tensors of rank 1 would change sums in their last bits."""
    model = Stack()
    model.first.b, model.first.a = nn.Parameter(draw("b", 1, 10).T), draw("a", 12, 1).T
    sketch = Sketch({"first": model.first}, {"first": model.first.b}, SHAPES, phase_steps=1, key="k")
    sketch.attach()
    model(draw("x", 4, 12).requires_grad_()).sum().backward()
    sketch.commit()
    sketch.detach()
    for tensor in sketch.state_dict().values():
        assert tensor.stride() == torch.empty(tensor.shape).stride()
