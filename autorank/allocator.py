"""The allocator: moves ranks between the live LoRA layers of one adapter under an exact budget.

It reads gradients, decides when (`schedule.py`) and which (`allocation.py`), and resizes
(`truncation.py`, `growth.py`, `resize.py`). It knows no task, no study and no data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autorank.adapter import follow_plan, lora_layers
from autorank.allocation import LayerState, Move, reallocate
from autorank.budget import format_count, parse_budget
from autorank.errors import CommandError
from autorank.growth import plain_components
from autorank.importance import gradient_norm, singular_value
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import LoraLayer, grow, remove, shrink
from autorank.schedule import Schedule, make_schedule
from autorank.truncation import truncate

__all__ = ["Importance", "LedgerEntry", "RankAllocator"]

Importance = Literal["gradient_norm", "singular_value"]

PROTECTED_MOVES = 2
"""Moves during which a newborn component may not be given up: its σ starts at 0."""


@dataclass(frozen=True)
class LedgerEntry:
    """One move in the ledger: at `step`, `layer` went from rank `before` to `after`.

    `score` is what the layer was rated at, `against` the score of the other side of the swap,
    both per parameter; `parameters` is what all layers hold after the step.
    """

    step: int
    layer: str
    before: int
    after: int
    score: float
    against: float
    parameters: int


class RankAllocator:
    """Moves ranks between the LoRA layers of a PEFT model while it trains.

    Call `step()` once per optimizer step, after `backward()` and before gradient clipping and
    `optimizer.step()`:

        allocator = RankAllocator(model, optimizer, budget="2M", total_steps=700)
        loss.backward()
        allocator.step()
        optimizer.step()
        optimizer.zero_grad()

    Parameters are replaced when ranks move: hold on to the optimizer, not to its parameters.

    Args:
        model: a model with PEFT LoRA layers (linear, no DoRA) that share one scaling.
        optimizer: AdamW, Adam or SGD over the adapter's parameters.
        budget: most trainable adapter parameters at any step; None for what the adapter has now.
        total_steps: optimizer steps of the whole run.
        importance: `gradient_norm` or `singular_value`, see `importance.py`.
        schedule: when ranks move; None for the default of `make_schedule`.
        min_rank: least rank of a layer; at 0 a layer can leave the adapter (and stays out).
        max_rank: largest rank of a layer; None for its full rank.
        margin: how many times a gain must exceed the loss that pays for it.
        seed: seeds the new components.
        adapter_name: PEFT's name of the adapter.

    Raises:
        CommandError: the model has no LoRA layer of that name, its scalings differ, it is over
            the budget already, or the schedule can never fire.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        budget: str | int | None = None,
        importance: Importance = "gradient_norm",
        schedule: Schedule | None = None,
        min_rank: int = 0,
        max_rank: int | None = None,
        margin: float = 1.5,
        seed: int = 0,
        adapter_name: str = "default",
    ) -> None:
        if importance not in ("gradient_norm", "singular_value"):
            raise CommandError(f"importance {importance!r}: choose gradient_norm or singular_value")
        self._name = adapter_name
        self._optimizer = optimizer
        self._modules: dict[str, LoraLayer] = dict(lora_layers(model, adapter_name))
        if not self._modules:
            raise CommandError(f"the model has no LoRA layer with an adapter named {adapter_name!r}")
        self._model = model
        self._plan = _read_plan(self._modules, adapter_name)
        self._check()
        self._budget = self._plan.parameters if budget is None else parse_budget(budget)
        if self._plan.parameters > self._budget:
            raise CommandError(
                f"the adapter has {format_count(self._plan.parameters)} parameters already, over the "
                f"budget of {format_count(self._budget)}: start from lower ranks or raise the budget"
            )
        self._importance: Importance = importance
        self._schedule = schedule or make_schedule(total_steps)
        self._min_rank, self._max_rank, self._margin = min_rank, max_rank, margin
        self._seed = seed
        self._step = 0
        self._moves_done = 0
        self._gradients: dict[str, Tensor] = {}
        # Newborns are the last components of a layer; each entry is the move they came with.
        self._newborns: dict[str, list[int]] = {layer.name: [] for layer in self._plan.layers}
        self._ledger: list[LedgerEntry] = []

    def _check(self) -> None:
        """Refuse what would train nothing, or more than the plan counts."""
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        factors = [factor for layer in self._plan.layers for factor in self._factors(layer.name)]
        if not all(id(factor) in held for factor in factors):
            raise CommandError(
                "the optimizer does not hold the adapter's parameters: make it after the adapter, "
                "from the parameters that require a gradient"
            )
        trained = sum(
            parameter.numel()
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and ".lora_" in f".{name}" and f".{self._name}" in name
        )
        if trained != self._plan.parameters:
            raise CommandError(
                f"the adapter trains {format_count(trained)} parameters, its A and B are "
                f"{format_count(self._plan.parameters)}: DoRA, lora_bias and embeddings cannot be resized; "
                "use plain LoRA on linear layers, with both factors trained"
            )

    @property
    def plan(self) -> RankPlan:
        """The current ranks by full layer name, and the scaling."""
        return self._plan

    @property
    def budget(self) -> int:
        """Most trainable adapter parameters at any step."""
        return self._budget

    @property
    def ledger(self) -> tuple[LedgerEntry, ...]:
        """Every move so far, in order."""
        return tuple(self._ledger)

    def step(self) -> bool:
        """Read this step's gradients and, where the schedule says so, move ranks.

        Returns:
            Whether any rank moved.
        """
        if self._step < self._schedule.final_step and self._importance == "gradient_norm":
            self._observe()
        share = self._schedule.share(self._step)
        moved = self._move(share) if share > 0 else False
        self._step += 1
        return moved

    def _observe(self) -> None:
        """Add this step's gradient norms to the window's sums."""
        for layer in self._plan.live:
            a, b = self._factors(layer.name)
            if a.grad is not None and b.grad is not None:
                norm = gradient_norm(a.grad, b.grad)
                seen = self._gradients.get(layer.name)
                self._gradients[layer.name] = norm if seen is None else seen + norm

    def _move(self, share: float) -> bool:
        """Decide and carry out one round of moves; start a new window."""
        components = sum(self._plan.ranks.values())
        moves = reallocate(
            [self._state(layer) for layer in self._plan.live],
            budget=self._budget,
            swaps=max(1, round(share * components)),
            margin=self._margin,
        )
        self._resize(moves)
        self._moves_done += 1
        self._gradients.clear()
        return bool(moves)

    def _state(self, layer: LayerSpec) -> LayerState:
        """What the decision needs of one layer: scores per parameter, and how far it may go."""
        rank = self._plan.ranks[layer.name]
        top = layer.full_rank if self._max_rank is None else min(self._max_rank, layer.full_rank)
        mature = rank - self._protected(layer.name)
        a, b = self._factors(layer.name)
        if self._importance == "gradient_norm":
            # Diminishing returns: the utility e · log(rank) makes the best rank proportional to e.
            energy = float(self._gradients.get(layer.name, 0.0)) / layer.cost
            losses, gain = [energy / (rank - given) for given in range(mature)], energy / (rank + 1)
        else:
            energies = singular_value(b[:, :mature], a[:mature], self._plan.scaling) / layer.cost
            losses = sorted(energies.tolist())
            # Water-filling: the layer whose weakest direction still carries most is short of rank.
            gain = losses[0] if losses else 0.0
        return LayerState(layer.name, rank, layer.cost, self._min_rank, top, losses, gain)

    def _protected(self, name: str) -> int:
        """How many of a layer's last components are too young to be given up."""
        return sum(self._moves_done - born <= PROTECTED_MOVES for born in self._newborns[name])

    def _resize(self, moves: tuple[Move, ...]) -> None:
        """Change the live layers, the ones that shrink first, so that no moment is over budget."""
        for move in sorted(moves, key=lambda move: move.after > move.before):
            module = self._modules[move.layer]
            if move.after == 0:
                remove(module, self._name, self._optimizer)
                self._newborns[move.layer] = []
            elif move.after < move.before:
                protected = self._protected(move.layer)
                a, b = self._factors(move.layer)
                rebase = truncate(b.detach(), a.detach(), move.after, protected=protected)
                shrink(module, self._name, self._optimizer, rebase)
                self._newborns[move.layer] = self._newborns[move.layer][-protected:] if protected else []
            else:
                self._grow(move)
            self._plan = self._plan.with_ranks({**self._plan.ranks, move.layer: move.after})
            self._ledger.append(
                LedgerEntry(step=self._step, **asdict(move), parameters=self._plan.parameters)
            )
        if moves:
            follow_plan(self._model, self._name, self._plan)

    def _grow(self, move: Move) -> None:
        """Append newborn components to one layer; the draw depends on seed, step and layer only."""
        count = move.after - move.before
        a, _ = self._factors(move.layer)
        key = hashlib.sha256(f"{self._seed}/{self._step}/{move.layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        rows = plain_components(count, a.shape[1], generator)
        grow(self._modules[move.layer], self._name, self._optimizer, rows)
        self._newborns[move.layer] += [self._moves_done] * count

    def _factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A, shape (rank, in_features), and B, shape (out_features, rank), of a live layer."""
        module = self._modules[name]
        a = cast(nn.Linear, module.lora_A[self._name]).weight
        b = cast(nn.Linear, module.lora_B[self._name]).weight
        return cast(nn.Parameter, a), cast(nn.Parameter, b)

    def state_dict(self) -> dict[str, Any]:
        """The allocator's own state as a JSON object; the tensors are the model's and optimizer's."""
        return {
            "plan": self._plan.to_json(),
            "step": self._step,
            "moves_done": self._moves_done,
            "gradients": {name: float(norm) for name, norm in self._gradients.items()},
            "newborns": {name: list(born) for name, born in self._newborns.items()},
            "ledger": [asdict(entry) for entry in self._ledger],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the model must have the ranks of that moment already.

        Raises:
            CommandError: the model's ranks differ from the state's.
        """
        plan = RankPlan.from_json(state["plan"])
        for layer in self._plan.layers:
            if plan.ranks.get(layer.name) != self._plan.ranks[layer.name]:
                raise CommandError(
                    f"{layer.name} has rank {self._plan.ranks[layer.name]}, the allocator's state says "
                    f"{plan.ranks.get(layer.name)}: give the model the stored ranks before loading"
                )
        self._plan = plan
        self._step = int(state["step"])
        self._moves_done = int(state["moves_done"])
        self._gradients = {
            str(name): torch.tensor(norm, dtype=torch.float32, device=self._factors(name)[0].device)
            for name, norm in state["gradients"].items()
        }
        self._newborns = {str(k): [int(m) for m in v] for k, v in state["newborns"].items()}
        self._ledger = [LedgerEntry(**entry) for entry in state["ledger"]]


def _read_plan(modules: Mapping[str, LoraLayer], name: str) -> RankPlan:
    """The plan that the live layers make up."""
    scalings = {module.scaling[name] for module in modules.values()}
    if len(scalings) > 1:
        raise CommandError(
            f"the adapter's scalings differ between layers ({min(scalings):g} to {max(scalings):g}): "
            "ranks can move between layers of one scaling only; set alpha to the same multiple of "
            "each rank"
        )
    specs, ranks = [], {}
    for layer_name, module in modules.items():
        a: Tensor = cast(nn.Linear, module.lora_A[name]).weight
        b: Tensor = cast(nn.Linear, module.lora_B[name]).weight
        specs.append(LayerSpec(layer_name, a.shape[1], b.shape[0]))
        ranks[layer_name] = a.shape[0]
    return RankPlan(tuple(specs), ranks, scalings.pop())
