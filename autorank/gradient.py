"""The gradient probe: at which layers of the frozen base a first rank promises most.

A few training batches, forward and backward, on the base with its solved head. Nothing is trained,
no rank is decided, and the base is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from autorank.plan import LayerSpec
from autorank.sketch import Sketch
from autorank.train import BatchOrder

if TYPE_CHECKING:
    from autorank.lane import Bench

__all__ = ["BATCHES", "probe_gains"]

BATCHES = 4
"""Batches of each of the sketch's three phases."""


def probe_gains(bench: Bench, layers: Sequence[LayerSpec], *, seed: int) -> dict[str, tuple[float, ...]]:
    """What the first, second, third … rank at each layer promises, before any training.

    These are the energies ‖Gᵀu‖² of the leading left directions u of the loss gradient G = ∂L/∂W,
    shape (out_features, in_features), averaged over batches; the batches that find a direction are
    not those that rate it (`sketch.py`), and noise cancels in them as it does in moves. The base's
    dropout is off, and its head, where the task has one, must be solved: it decides the gradient.

    Args:
        bench: the base model without an adapter, the task and the training rows.
        layers: the layers to look at.
        seed: which batches are drawn, and the sketch's random directions.

    Returns:
        For every layer its gains, descending, at least 0, not yet per parameter: at most
        `sketch.WIDTH`, and none where no gradient arrives.
    """
    base = bench.base
    sketch = Sketch(
        {layer.name: base.model.get_submodule(layer.name) for layer in layers},
        {},
        {layer.name: (layer.in_features, layer.out_features) for layer in layers},
        phase_steps=BATCHES,
        key=f"gradient/{seed}",
    )
    order = BatchOrder([len(example.input_ids) for example in bench.train], bench.recipe.batch_size, seed)
    sketch.attach()
    try:
        with _gradient_from_the_input(base.model):
            for step in range(3 * BATCHES):
                examples = [bench.train[row] for row in order.rows(step)]
                batch = bench.task.collate(examples, base.pad_token_id).to(base.device)
                bench.task.loss(base.model(**batch.inputs).logits, batch).backward()
                sketch.commit()
    finally:
        sketch.detach()
    readings = sketch.read({})
    return {
        layer.name: tuple(readings[layer.name].gains.tolist()) if layer.name in readings else ()
        for layer in layers
    }


@contextmanager
def _gradient_from_the_input(model: nn.Module) -> Iterator[None]:
    """Let the gradient reach every layer, though no parameter of the model wants one."""

    def ask(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(ask)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
