"""The gradient probe: at which layers of the frozen base a first rank promises most.

A few training batches, forward and backward: on the base with its solved head, which is left as it
was, or on a PEFT model of the user's own, whose fresh adapter then starts there. Nothing is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autorank.adapter import lora_layers, take_plan
from autorank.admission import kept_layers, read_plan
from autorank.allocation import starting_ranks
from autorank.budget import format_count, parse_budget
from autorank.dropout import dropout_on
from autorank.errors import CommandError
from autorank.evidence import promises
from autorank.growth import plain_components, plain_size
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import LoraLayer, drawn_factor, factors
from autorank.sketch import Sketch, seeded
from autorank.tasks.task import logits_of
from autorank.train import BatchOrder
from autorank.truncation import Drawn
from autorank.watch import RankAllocatorWarning

if TYPE_CHECKING:
    from autorank.lane import Bench

__all__ = ["BATCHES", "probe_gains", "start_from_gradient"]

BATCHES = 4
"""Batches of each of the sketch's three phases."""


def probe_gains(bench: Bench, layers: Sequence[LayerSpec], *, seed: int) -> dict[str, tuple[float, ...]]:
    """What a first rank at each layer promises, before any training.

    This is the currency of moves, see `evidence.promises`: how fast a fresh component along the
    leading left direction of the loss gradient G = ∂L/∂W, shape (out_features, in_features), takes
    something off the loss, and nothing where it does not stand out of the noise of the batches; those
    that find a direction are not those that rate it (`sketch.py`). Of a second rank it says nothing:
    what the first leaves to learn shows in training, and a rank at another layer was worth more
    wherever it was tried (studies/LOG.md). The base's dropout is off, but where activations are computed
    twice, which models do in training mode alone. Its head, where the task has one, must be solved: it
    decides the gradient.

    Args:
        bench: the base model without an adapter, the task and the training rows.
        layers: the layers to look at.
        seed: which batches are drawn, and the sketch's random directions.

    Returns:
        For every layer a gain, at least 0, not yet per parameter; none where no gradient arrives.
    """
    base = bench.base
    order = BatchOrder([example.length for example in bench.train], bench.recipe.batch_size, seed)

    def losses() -> Iterator[Tensor]:
        for step in range(3 * BATCHES):
            examples = [bench.train[row] for row in order.rows(step)]
            batch = bench.task.collate(examples, base.pad_token_id).to(base.device)
            yield bench.task.loss(logits_of(base.model(**batch.inputs)), batch)

    modules = {layer.name: base.model.get_submodule(layer.name) for layer in layers}
    mode = dropout_on(base.model, base.device, [f"gradient/{seed}"]) if base.recomputes else nullcontext()
    with mode, _gradient_from_the_input(base.model):
        gains = _measure(modules, layers, losses(), seed)
    return {layer.name: gains.get(layer.name, ()) for layer in layers}


def _measure(
    modules: Mapping[str, nn.Module], layers: Sequence[LayerSpec], losses: Iterable[Tensor], seed: int
) -> dict[str, tuple[float, ...]]:
    """The gains of the layers that a gradient reaches; each loss is computed when it is asked for."""
    shapes = {layer.name: (layer.in_features, layer.out_features) for layer in layers}
    sketch = Sketch(modules, {}, shapes, phase_steps=BATCHES, key=f"gradient/{seed}")
    sketch.attach()
    try:
        for loss in losses:
            loss.backward()
            sketch.commit()
    finally:
        sketch.detach()
    found, readings = dict[str, tuple[float, ...]](), sketch.read({})
    for layer in layers:
        reading = readings.get(layer.name)
        if reading is not None:
            base = getattr(modules[layer.name], "base_layer", modules[layer.name])
            drawn: Drawn = "b" if isinstance(base, nn.Embedding) else "a"
            features = layer.in_features if drawn == "a" else layer.out_features
            # A row as LoRA draws it, for there is none yet, or it is fresh.
            size = plain_size(features, drawn)
            found[layer.name] = (promises(reading, layer, size, drawn).clear[0],)
    return found


def start_from_gradient(
    model: nn.Module,
    losses: Iterable[Tensor],
    *,
    budget: str | int,
    adapter_name: str = "default",
    seed: int = 0,
) -> RankPlan:
    """Give a fresh PEFT adapter the ranks that the gradient asks for, under any budget.

    Layers get a first rank in the order of what it promises per parameter; then ranks grow evenly.

    Call it before the optimizer is made, for parameters are replaced. PEFT has no rank 0, so put the
    adapter on at rank 1 of every layer that may get one:

        losses = (model(**batch).loss for batch in loader)
        autorank.start_from_gradient(model, losses, budget="10k")
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        allocator = autorank.RankAllocator(model, optimizer, total_steps=700)

    Args:
        model: with LoRA layers that share one scaling and have learnt nothing yet.
        losses: yields the loss of one batch after another, computed as it is asked for; 12 are taken.
        budget: most parameters that the adapter may have.
        adapter_name: PEFT's name of the adapter.
        seed: of the sketch's random directions, and of rows beyond those that the adapter has.

    Where no layer stands out of the noise, ranks are spread evenly, the last layers first, and a
    `RankAllocatorWarning` says so.

    Returns:
        The ranks that the model has now; layers at rank 0 have no adapter, and can get one back.

    Raises:
        CommandError: the adapter has learnt or was initialised, its layers cannot be at rank 0, the
            budget buys nothing, there are too few losses, or no gradient reached a layer.
    """
    modules = lora_layers(model, adapter_name, live=False)
    plan = read_plan(modules, adapter_name)
    limit = parse_budget(budget)
    _check_start(modules, adapter_name, plan, limit)
    gains = _gains_of(model, modules, plan, losses, seed)
    costs = {layer.name: layer.cost for layer in plan.layers}
    limits = {layer.name: layer.full_rank for layer in plan.layers}
    if not any(any(known) for known in gains.values()):
        warnings.warn(
            "no layer's gradient stands out of the noise of the batches: ranks are spread evenly, the last "
            "layers first; larger batches say more",
            RankAllocatorWarning,
            stacklevel=2,
        )
    plan = plan.with_ranks(starting_ranks(gains, costs, limits, limit))
    rows = {
        name: _drawn_rows(module, adapter_name, plan.ranks[name], seed, name)
        for name, module in modules.items()
    }
    take_plan(model, adapter_name, plan)
    for layer in plan.live:
        module = modules[layer.name]
        a, b = factors(module, adapter_name)
        with torch.no_grad():
            (a if drawn_factor(module) == "a" else b.T).copy_(rows[layer.name])
    return plan


def _check_start(modules: Mapping[str, LoraLayer], name: str, plan: RankPlan, limit: int) -> None:
    """Refuse adapters that are not fresh or cannot leave a layer, and budgets that buy nothing."""
    left = len(plan.layers) - len(plan.live)
    if left or not all(name in module.active_adapters for module in modules.values()):
        why = f"has left {left} layers already" if left else "is not active"
        raise CommandError(
            f"the adapter {name!r} {why}: a start is for an adapter that is active on all its layers, once"
        )
    kept = kept_layers(modules, name)
    if kept:
        raise CommandError(
            f"{len(kept)} layers have a DoRA magnitude or a bias, which rank 0 would lose, such as "
            f"{min(kept)}: put a plain LoRA adapter on"
        )
    for layer, module in modules.items():
        a, b = factors(module, name)
        if bool((b if drawn_factor(module) == "a" else a).any()):
            raise CommandError(
                f"the adapter of {layer} is not fresh: a start is for one that has learnt nothing and was "
                "initialised as LoRA does by default"
            )
    cheapest = min(plan.layers, key=lambda layer: layer.cost)
    if cheapest.cost > limit:
        raise CommandError(
            f"a budget of {format_count(limit)} buys nothing here: one component of the cheapest layer, "
            f"{cheapest.name}, costs {format_count(cheapest.cost)}; raise it to that or more"
        )


def _gains_of(
    model: nn.Module, modules: Mapping[str, LoraLayer], plan: RankPlan, losses: Iterable[Tensor], seed: int
) -> dict[str, tuple[float, ...]]:
    """What a first rank at each layer promises, as `probe_gains` measures it, not yet per parameter."""
    wrapped = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    try:
        gains = _measure(wrapped, plan.layers, _checked(losses), seed)
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    if not gains:
        raise _wrong_losses("no layer saw a gradient")
    return gains


def _checked(losses: Iterable[Tensor]) -> Iterator[Tensor]:
    """As many losses as a start takes, each one that a gradient can come from."""
    seen = 0
    for loss in islice(losses, 3 * BATCHES):
        if not isinstance(loss, Tensor):
            raise CommandError(
                f"losses must yield losses, as by (model(**batch).loss for batch in loader), and yields "
                f"a {type(loss).__name__}"
            )
        if not loss.requires_grad:
            raise CommandError(
                "a loss has no gradient: compute it outside of torch.no_grad(), and with gradient "
                "checkpointing call model.enable_input_require_grads() first"
            )
        yield loss
        seen += 1
    if seen < 3 * BATCHES:
        raise _wrong_losses(f"there are {seen}")


def _wrong_losses(why: str) -> CommandError:
    return CommandError(
        f"a start needs {3 * BATCHES} losses, each computed when it is asked for, as by "
        f"(model(**batch).loss for batch in loader), and {why}"
    )


def _drawn_rows(module: LoraLayer, name: str, rank: int, seed: int, layer: str) -> Tensor:
    """The drawn factor's first rows that an adapter has, and new ones beyond them, shape (rank, features)."""
    a, b = factors(module, name)
    drawn = drawn_factor(module)
    rows = (a if drawn == "a" else b.T).detach()
    more = max(0, rank - len(rows))
    new = plain_components(more, rows.shape[1], seeded("start", seed, layer), drawn)
    return torch.cat([rows[:rank], new.to(rows)])


@contextmanager
def _gradient_from_the_input(model: nn.Module) -> Iterator[None]:
    """Let the gradient reach every layer, though no parameter of the model wants one."""

    def ask(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):  # some models give more than patches, out of a convolution's
            output.requires_grad_()

    # Encoder and decoder each have their own, and a model that shares them need not call the shared one.
    # Images come in through a convolution.
    entrances = {module for module in model.modules() if isinstance(module, (nn.Embedding, nn.Conv2d))}
    with suppress(NotImplementedError):  # which models of images need not name
        entrances.add(model.get_input_embeddings())  # type: ignore[operator]
    handles = [module.register_forward_hook(ask) for module in entrances]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
