"""What is read of an adapter's layers between two moves, and what it says of each: scores and gains.

Hooks and gradients come in, numbers go out. Which ranks move is decided in `allocation.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autorank.growth import plain_size
from autorank.importance import Sensitivity, gradient_norm, sensitivity, singular_value
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import LoraLayer, drawn_factor, drawn_features, factors, is_frozen
from autorank.schedule import Schedule
from autorank.sketch import Reading, Rows, Sketch, seeded
from autorank.truncation import Basis, Drawn

__all__ = ["Evidence", "Importance", "LayerEvidence", "Promises", "promises"]

Importance = Literal["gradient_norm", "singular_value", "sensitivity", "random", "uniform"]

NOISE = 2.0
"""How many times what chance makes a gain must be to count.

Of windows of pure noise so many then have a gain that counts, of layers with four directions or more:
at most 0.3 % in windows of 12 steps, 1.3 % in those of 9, 4 % of 6, and 21 % of 3, which hold but two
steps to compare. Of layers with one or two: 2.5, 4.4, 19 and 49 %. Noise is taken to be as likely to
have one sign as the other, and steps to be independent; where they are not, more pass.
"""

PHASE_STEPS = 4
"""Most optimizer steps of each phase of the sketch before a move."""


@dataclass(frozen=True)
class Promises:
    """How fast a first, a second, a third … new component of a layer would take something off the loss.

    Attributes:
        clear: of what stands out of the noise, descending; 0 for what does not.
        likely: of all that was seen, noise and all, descending: the best guess there is.
        bound: the most that the first may promise: what is not seen for the noise may still be there.
    """

    clear: Sequence[float] = ()
    likely: Sequence[float] = ()
    bound: float = 0.0


@dataclass(frozen=True)
class LayerEvidence:
    """What a window found out about one layer.

    Attributes:
        scores: what each mature component is worth, in the order of the layer's basis; none where
            what the layer would gain is not known.
        promises: what more components promise; of nothing where no gradient came.
        reading: the sketch of its gradient; None where no gradient came.
        size: the root mean square norm of the layer's rows of the drawn factor, or of new ones.
        usual: the mean square of the gradient that the layer's rows see in a step; without any, what a
            random row sees of the sketch's directions.
    """

    scores: Sequence[float]
    promises: Promises
    reading: Reading | None
    size: float
    usual: float


class Evidence:
    """The windows before the moves of one adapter.

    Args:
        modules: PEFT's layers by name, those at rank 0 too.
        adapter_name: PEFT's name of the adapter.
        importance: what scores are; see `importance.py`.
        schedule: when ranks move. A window ends with a move.
        seed: of the sketches' probes and of random scores.
        rows: see `Sketch`.
    """

    def __init__(
        self,
        modules: Mapping[str, LoraLayer],
        adapter_name: str,
        *,
        importance: Importance,
        schedule: Schedule,
        seed: int,
        rows: Rows | None = None,
    ) -> None:
        self._rows = rows
        self._modules = modules
        self._name = adapter_name
        self._importance = importance
        self._schedule = schedule
        self._seed = seed
        self._sketch: Sketch | None = None
        self._sensitivities: dict[str, Sensitivity] = {}

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of a live layer."""
        return factors(self._modules[name], self._name)

    def observe(self, scale: float = 1.0) -> None:
        """Take in the backward passes of one optimizer step.

        A step with a gradient that is not finite adds nothing: its optimizer step will be skipped.

        Args:
            scale: what the loss was multiplied by.
        """
        if self._sketch is not None:
            self._sketch.commit(scale=scale)
        for name, smoothed in self._sensitivities.items():
            _, b = self._pair(name)
            if b.grad is not None:
                smoothed.update(sensitivity(b, b.grad))

    def forget_step(self) -> None:
        """Drop what was seen since the last step: its optimizer step is not taken."""
        if self._sketch is not None:
            self._sketch.forget_step()

    def open(self, plan: RankPlan, step: int, basis: Callable[[str], Basis]) -> None:
        """Start what must be watched from the next step on, if anything.

        Args:
            plan: the ranks the layers have.
            step: the next step's number, from 0.
            basis: gives the basis of a live layer.
        """
        if self._importance == "uniform" or step > self._schedule.moves[-1]:
            self.drop()
            return
        if self._importance == "sensitivity" and not self._sensitivities:
            for layer in plan.live:
                a, _ = self._pair(layer.name)
                self._sensitivities[layer.name] = Sensitivity.start(basis(layer.name), a)
        if self._sketch is None and step == self._sketch_start(step):
            self._sketch = self._make_sketch(plan, step)
            self._sketch.attach()

    def _phase_steps(self) -> int:
        """Steps of each phase of a sketch: as many as the moves leave room for."""
        moves = self._schedule.moves
        gaps = [moves[0], *(after - before for before, after in itertools.pairwise(moves))]
        return max(1, min(PHASE_STEPS, min(gaps) // 3))

    def _sketch_start(self, step: int) -> int:
        """The step from which hooks must watch, so that three phases end with the next move."""
        following = [move for move in self._schedule.moves if move >= step]
        return following[0] - 3 * self._phase_steps() + 1 if following else -1

    def _make_sketch(self, plan: RankPlan, step: int) -> Sketch:
        watched = {
            name: module
            for name, module in self._modules.items()
            if isinstance(module, nn.Module) and not is_frozen(module, self._name)
        }
        return Sketch(
            watched,
            {layer.name: self._pair(layer.name)[1] for layer in plan.live},
            {layer.name: (layer.in_features, layer.out_features) for layer in plan.layers},
            scaling=plan.scaling,
            phase_steps=self._phase_steps(),
            key=f"sketch/{self._seed}/{step}",
            rows=self._rows,
        )

    def take(self, plan: RankPlan, step: int, bases: Mapping[str, Basis]) -> dict[str, LayerEvidence]:
        """End the window: what it found out, by layer.

        Args:
            plan: the ranks the layers have.
            step: the number of the step at which ranks move.
            bases: the bases of the live layers.
        """
        a = {layer.name: self._a(layer.name) for layer in plan.live}
        readings = {} if self._sketch is None else self._sketch.read(a)
        # Reached by some steps, such as an expert, but by none of those that look for directions: what it
        # would gain is not known, so it neither takes nor pays.
        unknown = set() if self._sketch is None else self._sketch.heard() - readings.keys()
        found = {}
        for layer in plan.layers:
            reading, scores = readings.get(layer.name), list[float]()
            if layer.name in bases and layer.name not in unknown:
                scores = self._scores(layer.name, step, bases[layer.name], a[layer.name], reading)
            size, usual, promised = 0.0, 0.0, Promises()
            if reading is not None:
                size = self._usual_size(layer.name)
                usual = self._usual_energy(layer.name, reading, size)
                promised = self._promises(layer, step, reading, size)
            found[layer.name] = LayerEvidence(scores, promised, reading, size, usual)
        self.drop()
        return found

    def drop(self) -> None:
        """End the window, and forget what it found out."""
        self.close()
        self._sketch = None
        self._sensitivities.clear()

    def _a(self, name: str) -> Tensor:
        """A of a live layer, float64 on the CPU."""
        return self._pair(name)[0].detach().to("cpu", torch.float64)

    def _scores(self, name: str, step: int, basis: Basis, a: Tensor, reading: Reading | None) -> list[float]:
        mature = len(basis.energies)
        to_a = basis.to_a[:mature]
        if self._importance == "singular_value":
            values = singular_value(basis, self._modules[name].scaling[self._name])
        elif self._importance == "sensitivity":
            values = self._sensitivities[name].scores(to_a @ a)
        elif self._importance == "random":
            values = torch.rand(mature, generator=seeded("random", self._seed, step, name))
        elif reading is None:
            values = torch.zeros(mature)  # no gradient came through: nothing is learnt here
        else:
            values = gradient_norm(to_a, a, reading.heard)
        return [float(value) for value in values]

    def _usual_size(self, name: str) -> float:
        """The size of a layer's row of the drawn factor; that of a new one where there is none."""
        module = self._modules[name]
        drawn = drawn_factor(module)
        if self._name not in module.scaling:
            return plain_size(drawn_features(module), drawn)
        a, b = self._pair(name)
        rows = (a if drawn == "a" else b.T).detach().to("cpu", torch.float64)
        return float(rows.square().sum(1).mean().sqrt())

    def _usual_energy(self, name: str, reading: Reading, size: float) -> float:
        """The mean square of the gradient that the layer's rows see: a row of A sees G a."""
        module = self._modules[name]
        heard = float(reading.heard.diagonal().mean()) if len(reading.heard) else 0.0
        if drawn_factor(module) == "a" and heard > 0:
            return heard
        return random_energy(reading, size, drawn_features(module))

    def _promises(self, layer: LayerSpec, step: int, reading: Reading, size: float) -> Promises:
        """What new components promise; at random, where that is wanted."""
        if self._importance == "random":
            draw = float(torch.rand(1, generator=seeded("gain", self._seed, step, layer.name)))
            drawn = [draw * layer.cost] * len(reading.gains)
            return Promises(drawn, drawn, drawn[0])
        return promises(reading, layer, size, drawn_factor(self._modules[layer.name]))

    def close(self) -> None:
        """Take the hooks off the model; what was seen stays, to be stored."""
        if self._sketch is not None:
            self._sketch.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that `load_state_dict` goes on from."""
        tensors: dict[str, Tensor] = {}
        for name, smoothed in self._sensitivities.items():
            parts = vars(smoothed)
            tensors |= {
                f"sensitivity/{name}/{key}": value.to("cpu", copy=True) for key, value in parts.items()
            }
        if self._sketch is not None:
            tensors |= {f"sketch/{key}": value for key, value in self._sketch.state_dict().items()}
        return {key: value.contiguous() for key, value in tensors.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], plan: RankPlan, step: int) -> None:
        """Go on from `state_dict()`, with the plan and before the step of that moment."""
        self.drop()
        for layer in plan.live:
            parts = _under(f"sensitivity/{layer.name}/", tensors)
            if parts:
                device = self._pair(layer.name)[0].device
                on_device = {k: v if k == "directions" else v.to(device) for k, v in parts.items()}
                self._sensitivities[layer.name] = Sensitivity(**on_device)
        stored = _under("sketch/", tensors)
        if stored:
            # Its probes are drawn from the step at which it began.
            self._sketch = self._make_sketch(plan, step - int(stored["step"]))
            self._sketch.load_state_dict(stored)
            self._sketch.attach()


def promises(reading: Reading, layer: LayerSpec, size: float, drawn: Drawn) -> Promises:
    """How fast new components would take something off the loss, as far as a window can tell.

    Adam moves an element by its mean gradient over the root of its mean square (arXiv 1412.6980),
    so n elements that see ‖g‖² in signal and ‖G‖² with noise lower the loss by √n ‖g‖² / ‖G‖
    in a step, up to the learning rate. All layers are taken to let a newborn see what a random row
    does, or less: what their own rows see is their luck so far, and decides on its length only.

    Args:
        reading: what was seen of the layer's gradient.
        layer: its shape.
        size: that of a row of the factor that is drawn.
        drawn: that factor; the other one starts at 0 and learns.
    """
    row, learning = layer.in_features, layer.out_features
    if drawn == "b":
        row, learning = learning, row
    heard = (size * reading.loudness.sqrt()).clamp_max(random_energy(reading, size, row) ** 0.5)

    def promise(signal: Tensor) -> list[float]:
        share = (signal / reading.loudness.clamp_min(1e-300)).clamp_max(1)
        # Newborns take directions in their order: none may promise more than the one before.
        return [float(value) for value in (learning**0.5 * share * heard).cummin(0).values]

    hidden = NOISE * reading.noise
    clear = torch.where(reading.gains > hidden, reading.gains, 0.0)
    return Promises(promise(clear), promise(reading.gains), promise(reading.gains.clamp_min(hidden))[0])


def random_energy(reading: Reading, size: float, features: int) -> float:
    """The mean square of the gradient that a random row of that size sees, in the sketch's directions.

    All of ‖G‖² would be an estimate as rough as the few probes it comes from; this is what was seen.
    """
    return size**2 * float(reading.loudness.sum()) / features


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
