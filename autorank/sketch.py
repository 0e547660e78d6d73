"""What the loss gradient of a frozen weight looks like, seen in a few directions by hooks.

The gradient G = ∂L/∂W of a frozen weight W, shape (out_features, in_features), is never formed. A
window of probe steps sees it in three phases: in the first its left directions u, in the other two
what each step's gradient carries along them, Gᵀu. The steps read different batches, so noise that
chose a direction does not also vouch for it, and noise of one step does not agree with another's.
What the adapter's own components see is in its gradient already: ∂L/∂B = scaling · G Aᵀ. A sketch
is no parameter: no budget and no optimizer knows it, and a layer whose output needs no gradient
is left in peace.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autorank.resize import row_order

__all__ = ["WIDTH", "Reading", "Rows", "Sketch", "seeded"]

Rows = Callable[[nn.Module], slice]
"""Tells which samples of the batch in the forward pass that runs go through an adapter.

It is asked for each layer, for an adapter sees no gradient of layers below its own lowest one, also where
that of another flows there: none is an empty slice.
"""

WIDTH = 4
"""Directions a sketch looks for at each layer, and so the most ranks a layer gains in one move."""


def seeded(*words: object) -> torch.Generator:
    """A CPU generator that depends on these words alone."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Reading:
    """What a window saw of one layer's mean gradient G; all float64 on the CPU.

    Attributes:
        gains: shape (width,), descending, at least 0: energies ‖Gᵀ u‖² of left directions u that
            the adapter cannot see, of the part that its A cannot see. Each is a mean of inner
            products of different steps, in which noise cancels: where steps disagree it is 0.
        noise: the most that chance makes of `gains`, shape (): the largest that comes out where the signs
            of half of the steps are turned round, over all halves there are. What is the same in
            all steps then cancels; noise is as it was, for it has no sign (a randomisation test).
        left: the unit directions u, shape (out_features, width).
        right: the unit directions of Gᵀ u, shape (in_features, width).
        loudness: shape (width,): the mean over steps of ‖G_tᵀ u‖², G_t the gradient of one step. It is
            that of gains and noise together, and more than the gain by the noise in a step.
        heard: the mean over steps of A G_tᵀ G_t Aᵀ, shape (rank, rank): what the components see in a
            step, signal and noise.
    """

    gains: Tensor
    noise: Tensor
    left: Tensor
    right: Tensor
    loudness: Tensor
    heard: Tensor


@dataclass
class _Layer:
    """One layer's sums, float32 on its device. Gradients are summed over the steps of a phase.

    All are few long rows: products of tokens with columns of that length take five times as long.
    """

    module: nn.Module
    probe: Tensor  # (width, in), random
    columns: Tensor  # (rank, out), orthonormal basis of B's columns
    b: Tensor | None  # (out, rank), whose gradient is read
    padding: int | None = None  # of an embedding: the row that never learns
    sums: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)
    left: Tensor | None = None  # (width, out), orthonormal, off the columns
    seen: list[Tensor] = field(default_factory=list)  # (width, in), Gᵀu of each step


class Sketch:
    """One window of probe steps over some layers of a model.

    Hooks are on from `attach` to `detach`; call `commit` once after each optimizer step's
    backward passes. Works under gradient accumulation (passes add up), gradient checkpointing,
    mixed precision and gradient scaling. Under gradient checkpointing the layers' inputs are kept
    all the same, from forward to backward, while hooks are on.

    Args:
        modules: the layers by name: Linear, Conv1D or Embedding, or PEFT's wrappers of them.
        b: B, which must want a gradient, by layer name, for those that have an adapter.
        shapes: (in_features, out_features) by layer name.
        scaling: that of the adapter.
        phase_steps: optimizer steps of each of the three phases, at least 1.
        key: what the random probes are drawn from.
        rows: the samples of the pass that runs which are this adapter's own; None for all.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        b: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, int]],
        *,
        scaling: float = 1.0,
        phase_steps: int,
        key: str,
        rows: Rows | None = None,
    ) -> None:
        self._scaling = scaling
        self._rows = rows
        self._phase_steps = phase_steps
        self._step = 0
        self._handles: list[RemovableHandle] = []
        self._layers = {
            name: _start(name, module, b.get(name), shapes[name], key) for name, module in modules.items()
        }

    def attach(self) -> None:
        """Watch the layers' inputs and the gradients of their outputs and of B."""
        for layer in self._layers.values():
            self._handles.append(layer.module.register_forward_hook(self._watch(layer), with_kwargs=True))
            if layer.b is not None:
                self._handles.append(layer.b.register_hook(self._listen(layer)))

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, layer: _Layer) -> Callable[[nn.Module, Any, dict[str, Any], Tensor], None]:
        def hook(module: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> None:
            # A deep copy of the model takes the hook along.
            if output.requires_grad and module is layer.module:
                own = slice(None) if self._rows is None else self._rows(module)
                seen = (*inputs, *named.values())[0].detach()[own]
                version = seen._version

                def read(gradient: Tensor) -> None:
                    if seen._version == version:  # else it was written over since
                        self._read(layer, seen, gradient.detach()[own])

                if len(seen):
                    output.register_hook(read)

        return hook

    def _listen(self, layer: _Layer) -> Callable[[Tensor], None]:
        # Not B.grad, which may be clipped or unscaled by the time it is looked at.
        return lambda gradient: _add(layer.pending, "heard", row_order(gradient.detach().float()))

    @torch.no_grad()
    def _read(self, layer: _Layer, inputs: Tensor, gradient: Tensor) -> None:
        """Add one backward pass: G = gradientᵀ · inputs, seen in this phase's directions."""
        with torch.autocast(gradient.device.type, enabled=False):  # a backward pass may lie within one
            self._add_pass(layer, inputs, gradient)

    def _add_pass(self, layer: _Layer, inputs: Tensor, gradient: Tensor) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1]).float()
        if layer.padding is not None and not inputs.is_floating_point():
            # Neither the row nor an adapter's part of it ever gets a gradient there.
            gradient = gradient * (inputs.reshape(-1, 1) != layer.padding)
        phase = self._step // self._phase_steps
        if phase == 0:
            _add(layer.pending, "left", _project(inputs, layer.probe) @ gradient)
        elif layer.left is not None:
            _add(layer.pending, "right", _spread(inputs, layer.left @ gradient.T, layer.probe.shape[1]))

    def forget_step(self) -> None:
        """Drop what was seen since the last step: its optimizer step is not taken."""
        for layer in self._layers.values():
            layer.pending = {}

    @torch.no_grad()
    def commit(self, *, scale: float = 1.0) -> None:
        """End an optimizer step; where a gradient is not finite, it adds nothing.

        Args:
            scale: what the loss was multiplied by.
        """
        counts = _finite([value for layer in self._layers.values() for value in layer.pending.values()])
        for layer in self._layers.values():
            pending, layer.pending = layer.pending, {}
            if not counts:
                continue
            if "heard" in pending:
                heard = pending["heard"] / scale
                _add(layer.sums, "heard", heard.T @ heard)
            if "left" in pending:
                _add(layer.sums, "left", pending["left"] / scale)
            if layer.left is not None:
                layer.seen.append(
                    pending["right"] / scale if "right" in pending else torch.zeros_like(layer.probe)
                )
        self._step += 1
        if self._step == self._phase_steps:
            for layer in self._layers.values():
                if "left" in layer.sums:
                    layer.left = _off(layer.sums.pop("left"), layer.columns).to(layer.probe.device)

    def read(self, rows: Mapping[str, Tensor]) -> dict[str, Reading]:
        """What the window saw, by layer; layers that no gradient reached are not in it.

        Args:
            rows: A as it is now, shape (rank, in_features), by layer name: what a gain leaves out.
        """
        return {
            name: _conclude(layer, rows.get(name), self._phase_steps, self._scaling)
            for name, layer in self._layers.items()
            if len(layer.seen) > 1 and any(bool(seen.any()) for seen in layer.seen)
        }

    def heard(self) -> set[str]:
        """The layers whose adapter saw a gradient in some step, whether there is a reading of it or not."""
        return {
            name
            for name, layer in self._layers.items()
            if "heard" in layer.sums and bool(layer.sums["heard"].any())
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that `load_state_dict` goes on from."""
        stored = {"step": torch.tensor(self._step)}
        for name, layer in self._layers.items():
            parts = {"columns": layer.columns, **layer.sums}
            if layer.left is not None:
                parts["directions"] = layer.left
            if layer.seen:
                parts["seen"] = torch.stack(layer.seen)
            stored |= {f"{name}/{key}": value.to("cpu", copy=True) for key, value in parts.items()}
        return stored

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict()`."""
        self._step = int(state["step"])
        for name, layer in self._layers.items():
            parts = {
                key.removeprefix(f"{name}/"): value.to(layer.probe.device, copy=True)
                for key, value in state.items()
                if key.startswith(f"{name}/")
            }
            layer.columns = parts.pop("columns")
            layer.left = parts.pop("directions", None)
            layer.seen = list(parts.pop("seen", ()))
            layer.sums, layer.pending = parts, {}


def _start(name: str, module: nn.Module, b: Tensor | None, shape: tuple[int, int], key: str) -> _Layer:
    in_features, out_features = shape
    device = next(module.parameters()).device
    width = min(WIDTH, in_features, out_features)
    probe = torch.randn(width, in_features, generator=seeded(key, name))
    columns = torch.zeros(0, out_features) if b is None else _orthonormal(b.T)
    padding = getattr(getattr(module, "base_layer", module), "padding_idx", None)
    return _Layer(module, probe.to(device), row_order(columns).to(device), b, padding)


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span; the columns of B = 0 span nothing, nor does NaN."""
    rows = rows.detach().to("cpu", torch.float64).nan_to_num(0.0, 0.0, 0.0)
    _, sigma, right = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = right[sigma > 1e-6 * sigma.max()] if float(sigma.max()) > 0 else right[:0]
    return kept.float()


def _off(sketch: Tensor, columns: Tensor) -> Tensor:
    """An orthonormal basis of the sketch's rows, as far as they lie off the given rows."""
    sketch, columns = sketch.to("cpu", torch.float64).T, columns.to("cpu", torch.float64).T
    basis: Tensor = torch.linalg.qr(sketch - columns @ (columns.T @ sketch)).Q
    # Once more, for a sketch that lay almost in the span is mostly rounding.
    basis = torch.linalg.qr(basis - columns @ (columns.T @ basis)).Q
    return row_order(basis.T.to(torch.float32))


def _project(inputs: Tensor, directions: Tensor) -> Tensor:
    """Inputs along the rows of directions, shape (n, tokens), float32; ids stand for one-hot rows."""
    if not inputs.is_floating_point():
        return directions.index_select(1, inputs.reshape(-1))
    return directions @ inputs.reshape(-1, inputs.shape[-1]).float().T


def _spread(inputs: Tensor, values: Tensor, features: int) -> Tensor:
    """Values, shape (n, tokens), times inputs: (n, in_features), float32; ids stand for one-hot rows."""
    if not inputs.is_floating_point():
        return values.new_zeros(len(values), features).index_add(1, inputs.reshape(-1), values)
    return values @ inputs.reshape(-1, inputs.shape[-1]).float()


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _conclude(layer: _Layer, rows: Tensor | None, steps: int, scaling: float) -> Reading:
    def small(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float64)

    assert layer.left is not None
    # Long rows are multiplied where they are, in float64 where the device has it; what is small goes on
    # on the CPU.
    exact = torch.float32 if layer.probe.device.type == "mps" else torch.float64
    seen = torch.stack(layer.seen).to(exact)
    count, width, _ = seen.shape
    flat = seen.flatten(0, 1)
    products = small(flat @ flat.T)
    loud = products.view(count, width, count, width).diagonal(dim1=0, dim2=2).mean(-1)
    mean = seen.mean(0)
    if rows is not None:
        basis = _orthonormal(rows).to(seen)
        along = flat @ basis.T
        products = products - small(along @ along.T)
        mean = mean - along.view(count, width, -1).mean(0) @ basis
    signs = torch.cat([torch.ones(1, count), _halves(count)])
    agreed = _agreement(products.view(count, width, count, width), signs)
    energies, mix = torch.linalg.eigh(agreed[0])
    gains, mix = energies.flip(0).clamp_min(0), mix.flip(1)
    rank = 0 if layer.b is None else layer.b.shape[1]
    heard = torch.zeros(rank, rank, dtype=torch.float64)
    if "heard" in layer.sums:
        heard = small(layer.sums["heard"]) / (3 * steps * scaling**2)
    return Reading(
        gains,
        torch.linalg.eigvalsh(agreed[1:]).max().clamp_min(0),
        small(layer.left).T @ mix,
        nn.functional.normalize(small(mean).T @ mix, dim=0),
        (mix.T @ loud @ mix).diagonal(),
        heard,
    )


def _agreement(products: Tensor, signs: Tensor) -> Tensor:
    """The mean of the inner products of different steps, for each choice of signs of the steps.

    With one of t for all pairs of steps, E = Gᵀu of the mean gradient is left, without the noise of
    any step: the U-statistic of ‖E‖² (Hoeffding 1948).

    Args:
        products: inner products of what steps saw along directions, shape (steps, width, steps, width).
        signs: ±1, shape (choices, steps).

    Returns:
        Symmetric, shape (choices, width, width).
    """
    steps, width = products.shape[:2]
    signs = signs.to(products)
    pairs = (signs[:, :, None] * signs[:, None, :] * (1 - torch.eye(steps, dtype=products.dtype))).flatten(1)
    found = pairs @ products.transpose(1, 2).reshape(steps * steps, width * width)
    return found.view(-1, width, width) / (steps * (steps - 1))


@functools.cache
def _halves(steps: int) -> Tensor:
    """Signs that turn half of the steps round, shape (choices, steps); of two opposite ones the first."""
    chosen = [c for c in itertools.combinations(range(steps), steps // 2) if 2 * len(c) < steps or 0 in c]
    signs = torch.ones(len(chosen), steps)
    for row, turned in enumerate(chosen):
        signs[row, list(turned)] = -1
    return signs


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite; the device is asked once."""
    return bool(nn.utils.get_total_norm(tensors, math.inf).isfinite())
