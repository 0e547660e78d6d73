"""Windows between moves: when hooks watch, and what they say of a layer."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn

from autorank.allocation import LayerState, reallocate
from autorank.evidence import Evidence, Importance, LayerEvidence, promises
from autorank.growth import plain_size
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import factors, reshape
from autorank.schedule import Schedule
from autorank.sketch import Reading, _conclude, _Layer
from autorank.truncation import Basis, singular_basis

NAMES = ("first", "second")


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class World:
    """Two adapted layers of rank 2 in training, with a move after 9 steps or where the caller says."""

    def __init__(self, importance: Importance = "gradient_norm", moves: tuple[int, ...] = (9, 20)) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(NAMES), init_lora_weights=False)
            self.model = peft.get_peft_model(Stack(), config)
        self.modules = {name: self.model.base_model.model.get_submodule(name) for name in NAMES}
        layers = (LayerSpec("first", 12, 10), LayerSpec("second", 10, 8))
        self.plan = RankPlan(layers, dict.fromkeys(NAMES, 2), 2.0)
        schedule = Schedule(40, moves, first_share=0.1, final_step=moves[-1] + 5)
        self.evidence = Evidence(self.modules, "default", importance=importance, schedule=schedule, seed=0)

    def basis(self, name: str) -> Basis:
        a, b = factors(self.modules[name], "default")
        return singular_basis(b, a)

    @property
    def watched(self) -> bool:
        return any(module._forward_hooks for module in self.modules.values())

    def run(self, steps: range) -> list[int]:
        """Steps of gradient descent; the steps in which hooks watched."""
        seen = []
        for step in steps:
            if self.watched:
                seen.append(step)
            x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
            self.model.zero_grad()
            (self.model(x) - 1).square().mean().backward()
            self.evidence.observe()
            self.evidence.open(self.plan, step + 1, self.basis)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
        return seen

    def take(self, step: int) -> dict[str, LayerEvidence]:
        bases = {layer.name: self.basis(layer.name) for layer in self.plan.live}
        return self.evidence.take(self.plan, step, bases)


@pytest.mark.parametrize(
    ("moves", "watched"),
    [
        ((9, 20), [1, 2, 3, 4, 5, 6, 7, 8, 9]),  # three phases of three steps
        ((15, 30), [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]),  # of four, which is the most
        ((15, 18), [13, 14, 15]),  # of one, which is all that the second move leaves
        ((3, 30), [1, 2, 3]),  # or the first
    ],
)
def test_hooks_watch_just_long_enough_before_a_move(moves: tuple[int, ...], watched: list[int]) -> None:
    world = World(moves=moves)
    assert world.run(range(moves[0] + 1)) == watched
    world.take(moves[0])
    assert not world.watched


def test_what_was_seen_becomes_scores_and_gains() -> None:
    world = World()
    world.run(range(10))
    found = world.take(9)
    for layer in found.values():
        assert layer.reading is not None
        assert len(layer.scores) == 2 and min(layer.scores) >= 0
        for gains in (layer.promises.clear, layer.promises.likely):
            assert list(gains) == sorted(gains, reverse=True)
    assert any(layer.promises.clear[0] > 0 for layer in found.values())


def test_gains_are_what_adam_makes_of_signal_and_noise() -> None:
    world = World()
    reading = Reading(
        torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64),
        torch.tensor(0.0), torch.zeros(8, 4), torch.zeros(10, 4),
        torch.tensor([16.0, 4.0, 10.0, 1.0], dtype=torch.float64),
        torch.zeros(2, 2),
    )  # fmt: skip
    layer, size = world.plan.layers[1], 3.1**-0.5  # a random row of that size hears 31 / 10 · size² = 1
    found = promises(reading, layer, size, "a")
    # √8 elements of B; a quarter signal, at most the usual 1 heard. The second would promise more, but
    # takes its direction after the first; the third has a fifth of signal, and the last hears its size.
    whole = [8**0.5 / 4, 8**0.5 / 4, 8**0.5 / 5, 8**0.5 / 5]
    assert found.clear == pytest.approx(whole) and found.likely == found.clear
    assert found.bound == pytest.approx(whole[0])
    alone = replace(reading, gains=reading.gains[3:], loudness=reading.loudness[3:])
    assert promises(alone, layer, 0.5, "a").clear == pytest.approx([8**0.5 * 0.5 / 10**0.5])
    found = promises(replace(reading, noise=torch.tensor(1.5)), layer, size, "a")
    assert found.clear == pytest.approx([8**0.5 / 4, 0.0, 0.0, 0.0])  # 3 is not more than twice 1.5
    assert found.likely == pytest.approx(whole) and found.bound == pytest.approx(8**0.5 / 4)
    # What is not seen for the noise may be there, up to all that is heard.
    for noise, most in ((3.0, 6 / 16), (99.0, 1.0)):
        found = promises(replace(reading, noise=torch.tensor(noise)), layer, size, "a")
        assert found.clear == [0.0] * 4 and found.bound == pytest.approx(8**0.5 * most)
    assert promises(reading, layer, size, "b").clear[0] == pytest.approx(10**0.5 / 4 * (10 / 8) ** 0.5)


def rated(signal: float, stream: torch.Generator) -> Reading:
    """A window of twelve steps of a layer with one direction in all steps, and noise of norm 8."""
    seen = torch.randn(8, 4, 64, generator=stream, dtype=torch.float64)
    seen[:, 0] += signal / 8
    none = torch.zeros(64, 0)
    layer = _Layer(nn.Linear(64, 64), torch.zeros(4, 64), none.T, None)
    layer.left, layer.seen = torch.eye(64)[:4], list(seen)
    return _conclude(layer, None, 4, 1.0)


@pytest.mark.parametrize("signal", [0.0, 2.0, 3.0, 3.5, 4.0, 5.0, 8.0])
def test_layers_that_are_alike_seldom_swap_whatever_the_signal(signal: float) -> None:
    """Where the gain of some stands out of the noise and that of others does not, all the more."""
    stream, swaps = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        states = []
        for number in range(14):
            found = promises(rated(signal, stream), LayerSpec("l", 64, 64), 1.0, "a")
            known = found.clear, found.likely, found.bound
            states.append(LayerState(f"l{number}", 4, 1, 0, 64, [0.1] * 4, *known))
        moves = reallocate(states, budget=56, swaps=6)
        swaps += sum(max(0, move.after - move.before) for move in moves)
    assert swaps < 20 * 6 / 2


def test_layers_that_gain_more_take_from_those_that_do_not() -> None:
    stream, right, swaps = torch.Generator().manual_seed(0), 0, 0
    for _ in range(10):
        states = []
        for number in range(14):
            reading = rated(8.0 if number < 4 else 1.0, stream)
            found = promises(reading, LayerSpec("l", 64, 64), 1.0, "a")
            known = found.clear, found.likely, found.bound
            states.append(LayerState(f"l{number}", 4, 1, 0, 64, [0.1] * 4, *known))
        for move in reallocate(states, budget=56, swaps=6):
            swaps += max(0, move.after - move.before)
            right += max(0, move.after - move.before) * (int(move.layer[1:]) < 4)
    assert swaps >= 20 and right == swaps


def test_a_layer_without_components_hears_what_a_random_row_would() -> None:
    world = World()
    reshape(world.modules["second"], "default", 0)
    world.plan = world.plan.with_ranks({"first": 2, "second": 0})
    world.run(range(10))
    found = world.take(9)
    empty, live = found["second"], found["first"]
    assert empty.reading is not None and live.reading is not None
    assert empty.size == plain_size(10)
    assert empty.usual == pytest.approx(plain_size(10) ** 2 * float(empty.reading.loudness.sum()) / 10)
    a, _ = factors(world.modules["first"], "default")
    assert live.size == pytest.approx(float(a.detach().square().sum(1).mean().sqrt()))
    assert live.usual == pytest.approx(float(live.reading.heard.diagonal().mean()))


def test_singular_values_are_scaled_as_the_layer_is() -> None:
    world = World("singular_value")
    world.run(range(10))
    for name, found in world.take(9).items():
        a, b = factors(world.modules[name], "default")
        expected = torch.linalg.svdvals(2.0 * b.detach() @ a.detach())[:2].square()
        assert found.scores == pytest.approx(expected.tolist(), rel=1e-4)


def test_without_a_gradient_there_is_nothing_to_gain() -> None:
    world = World()
    for step in range(10):
        world.evidence.observe()
        world.evidence.open(world.plan, step + 1, world.basis)
    for found in world.take(9).values():
        assert found.reading is None and list(found.promises.clear) == [] and list(found.scores) == [0.0, 0.0]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids)
        return out


def test_an_embedding_draws_b_and_learns_a() -> None:
    """Its usual row is a column of B, which hears what a random one would; A has an element per id."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["table"], init_lora_weights=False)
        model = peft.get_peft_model(Table(), config)
    modules = {"table": model.base_model.model.table}
    layer = LayerSpec("table", 20, 6)
    plan = RankPlan((layer,), {"table": 2}, 2.0)
    schedule = Schedule(40, (12, 30), first_share=0.1, final_step=35)
    evidence = Evidence(modules, "default", importance="gradient_norm", schedule=schedule, seed=0)
    a, b = factors(modules["table"], "default")
    for step in range(13):
        evidence.open(plan, step, lambda name: singular_basis(b, a))
        model.zero_grad()
        ids = torch.randint(20, (5, 7), generator=torch.Generator().manual_seed(step))
        (model(ids) - 1).square().mean().backward()
        evidence.observe()
    found = evidence.take(plan, 12, {"table": singular_basis(b, a, drawn="b")})["table"]
    assert found.reading is not None
    assert found.size == pytest.approx(float(b.detach().square().sum(0).mean().sqrt()))
    assert found.usual == pytest.approx(found.size**2 * float(found.reading.loudness.sum()) / 6)
    gains, loudness = found.reading.gains, found.reading.loudness
    clear = torch.where(gains > 2 * found.reading.noise, gains, 0.0)
    heard = (found.size * loudness.sqrt()).clamp_max(found.usual**0.5)
    assert found.promises.clear[0] == pytest.approx(float(20**0.5 * clear[0] / loudness[0] * heard[0])) != 0


def test_sensitivities_are_smoothed_over_the_window_and_start_anew_after_it() -> None:
    world = World("sensitivity")
    world.run(range(10))
    first = world.take(9)
    assert not world.evidence.state_dict()  # the window is over
    world.run(range(10, 12))
    again = world.evidence.state_dict()
    assert any(key.startswith("sensitivity/") for key in again)
    short = World("sensitivity")
    short.run(range(1))
    short.evidence.drop()
    short.run(range(1, 10))  # without the first step: its scores say less
    assert short.take(9)["first"].scores != pytest.approx(first["first"].scores, rel=1e-3)


def test_after_the_final_step_nothing_is_watched() -> None:
    world = World(moves=(9, 20))
    assert world.run(range(21))[-1] == 20
    world.take(20)
    assert world.run(range(21, 40)) == []
    assert World("sensitivity", moves=(9, 20)).evidence.state_dict() == {}
    late = World("sensitivity")
    late.run(range(24, 30))
    assert late.evidence.state_dict() == {}


def test_random_scores_depend_on_seed_step_and_layer_alone() -> None:
    draws = []
    for _ in range(2):
        world = World("random")
        world.run(range(10))
        torch.rand(3)
        draws.append({name: (found.scores, found.promises) for name, found in world.take(9).items()})
    assert draws[0] == draws[1] and draws[0]["first"] != draws[0]["second"]


def test_uniform_watches_nothing() -> None:
    assert World("uniform").run(range(10)) == []


@pytest.mark.parametrize("cut", [2, 3, 5, 8])
@pytest.mark.parametrize("importance", ["gradient_norm", "sensitivity"])
def test_a_window_goes_on_from_its_state(importance: Importance, cut: int) -> None:
    """Cut within its first, second and third phase of three steps each."""
    straight = World(importance)
    straight.run(range(10))
    broken = World(importance)
    broken.run(range(cut))
    state = broken.evidence.state_dict()
    broken.evidence.close()
    other = World(importance)
    other.model.load_state_dict(broken.model.state_dict())
    other.evidence.load_state_dict(state, other.plan, cut)
    other.run(range(cut, 10))
    for one, two in zip(straight.take(9).values(), other.take(9).values(), strict=True):
        assert one.scores == two.scores and one.promises == two.promises
