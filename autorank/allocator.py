"""The allocator: moves ranks between the live LoRA layers of one adapter under an exact budget.

It reads gradients (`evidence.py`), decides when (`schedule.py`) and which (`allocation.py`), and
resizes (`truncation.py`, `growth.py`, `resize.py`). It knows no task, no study and no data.
"""

from __future__ import annotations

import bisect
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from autorank.adapter import adapter_config, follow_plan, idle_layers, lora_layers, take_plan
from autorank.admission import (
    Growth,
    RankLimits,
    check_budget,
    check_held,
    check_limits,
    check_model,
    check_room,
    check_settings,
    kept_layers,
    read_plan,
)
from autorank.allocation import LayerState, Move, reallocate
from autorank.budget import parse_budget
from autorank.errors import CommandError
from autorank.evidence import Evidence, Importance, LayerEvidence
from autorank.growth import aligned_components, plain_components
from autorank.plan import LayerSpec, RankPlan
from autorank.resize import (
    LoraLayer,
    check_optimizer,
    check_state,
    drawn_factor,
    drawn_features,
    factors,
    grow,
    is_frozen,
    remove,
    revive,
    shrink,
    start_moments,
)
from autorank.schedule import Schedule, make_schedule
from autorank.sketch import WIDTH, Rows, seeded
from autorank.truncation import Basis, singular_basis
from autorank.watch import RankAllocatorWarning, StepWatch

__all__ = [
    "Growth",
    "Importance",
    "LedgerEntry",
    "RankAllocator",
    "RankAllocatorWarning",
    "shape_from_state",
]

PROTECTED_MOVES = 2
"""Moves during which a newborn component may not be given up: its σ starts at 0."""


@dataclass(frozen=True)
class LedgerEntry:
    """One move in the ledger: at `step`, `layer` went from rank `before` to `after`.

    `score` is what one more rank promised at the layer, per parameter, `against` the most that one
    promised at a layer on the other side of its swaps; 0 where free parameters paid, or layers
    without a gain. Who pays is decided by the importance: the components worth least per parameter.
    `parameters` is what all layers hold after the step.
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

    Call `step()` once per optimizer step, right before `optimizer.step()`:

        allocator = RankAllocator(model, optimizer, budget="2M", total_steps=700)
        loss.backward()
        allocator.step()
        optimizer.step()
        optimizer.zero_grad()

    Call `close()` where training ends: it says so where that was too early for any rank to move.
    Parameters are replaced when ranks move: hold on to the optimizer, not to its parameters.
    Gradient accumulation and checkpointing, a constant loss scale and mixed precision change no
    decision (pass a scale that changes to `step`); nor does clipping, but that `sensitivity` reads
    gradients as they are when it is called. Ranks move where gradients come: with
    `enable_input_require_grads()`, as checkpointing wants, also below the lowest adapted layer.

    Each move asks which layers would gain from one more direction (`sketch.py`: the gradient that
    the adapter cannot see, where the steps of the window agree on it by more than chance would)
    and which components are worth least (`importance`), both per parameter. What a component has
    learnt and what a newborn may learn have no honest exchange rate, so gains are compared with
    gains: the layers that gain most take from the components worth least, of layers that would
    gain less for all that the noise may hide. No more components go in a move than the schedule's
    share of all, or two. Parameters of the budget that are free are spent on what gains most, and
    at last on what only seems to gain: idle ones gain nothing.

    Args:
        model: a model with PEFT LoRA layers that share one scaling. Biases of LoRA and
            magnitudes of DoRA stay, are counted apart, and keep their layers above rank 0.
        optimizer: AdamW, Adam or SGD over the adapter's parameters, also as accelerate wraps it.
        total_steps: optimizer steps of the whole run; those that `schedule` is made for.
        budget: most trainable adapter parameters at any step; None for what the adapter has now, or
            what the run began with whose state is loaded.
        importance: what a component is worth, see `importance.py`; or a control: `random` scores,
            or `uniform`, which never moves.
        schedule: when ranks move; None for the default of `make_schedule`.
        growth: how newborns start: along the gradient they come from, or `plain`, as LoRA draws.
        min_rank: least rank of a layer; at 0 a layer can leave the adapter, and come back.
        max_rank: largest rank of a layer, at the start too; None for its full rank.
        margin: how many times what a layer gains must exceed what a layer that pays for it would gain
            itself; at least 1.
        seed: seeds probes, new components and the random control.
        adapter_name: PEFT's name of the adapter.
        rows: tells of a layer, in a forward pass, which samples of the batch go through this adapter,
            where several share the pass; none is an empty slice. None where all do.

    Raises:
        CommandError: a setting is out of range, the model has no LoRA layer of that name, its
            scalings differ, it is over the budget or `max_rank` already, the schedule can never
            fire or is of another length, or no rank could ever move.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        budget: str | int | None = None,
        importance: Importance = "singular_value",
        schedule: Schedule | None = None,
        growth: Growth = "gradient",
        min_rank: int = 0,
        max_rank: int | None = None,
        margin: float = 1.5,
        seed: int = 0,
        adapter_name: str = "default",
        rows: Rows | None = None,
    ) -> None:
        check_settings(importance, growth, margin, min_rank, max_rank)
        self._name = adapter_name
        self._model = model
        self._optimizer = _bare_optimizer(optimizer)
        self._modules: dict[str, LoraLayer] = dict(lora_layers(model, adapter_name, live=False))
        self._plan = read_plan(self._modules, adapter_name)
        self._importance: Importance = importance
        self._growth: Growth = growth
        self._schedule = make_schedule(total_steps) if schedule is None else schedule
        if self._schedule.total_steps != total_steps:
            raise CommandError(
                f"the schedule is made for {self._schedule.total_steps} steps and total_steps is "
                f"{total_steps}: make it with make_schedule({total_steps}, ...)"
            )
        self._margin = margin
        self._seed = seed
        self._limits = RankLimits(min_rank, max_rank, kept_layers(self._modules, adapter_name))
        self._check(budget)
        self._groups = self._find_groups()
        self._versions = self._factor_versions()
        self._step = 0
        self._closed = False
        self._reached = False  # whether a gradient was there at any step since the last move
        self._said_unreached = False
        self._moves_done = 0
        self._quiet = 0
        self._blind = 0
        self._evidence = Evidence(
            self._modules, adapter_name, importance=importance, schedule=self._schedule, seed=seed, rows=rows
        )
        # Newborns are the last components of a layer; each entry is the move they came with.
        self._newborns: dict[str, list[int]] = {layer.name: [] for layer in self._plan.layers}
        self._ledger: list[LedgerEntry] = []
        self._watch = StepWatch(self._optimizer)
        # Hooks of an allocator that nobody holds any more would go on reading gradients.
        weakref.finalize(self, self._evidence.close).atexit = False

    def _check(self, budget: str | int | None) -> None:
        """Refuse what would train nothing, more than the budget says, or could never move."""
        self._given_budget = budget is not None
        self._budget = self._plan.parameters if budget is None else parse_budget(budget)
        check_budget(self._plan, self._budget)
        check_held(self._optimizer, self._live_factors())
        check_limits(self._plan, self._limits)
        if self._importance != "uniform":
            check_optimizer(self._optimizer)
            check_model(self._model, self._name)
            check_room(self._plan, self._budget, self._limits)

    def _find_groups(self) -> dict[str, tuple[int, int]]:
        """The optimizer's parameter groups of A and of B of every layer, by number.

        A layer without an adapter belongs where the first live layer is, of its own kind where there is
        one: LoRA+ has a learning rate of its own for embeddings.
        """
        where = {
            id(parameter): number
            for number, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        found = {
            layer.name: (where[id(a)], where[id(b)])
            for layer in self._plan.live
            for a, b in [self._factors(layer.name)]
        }
        first: dict[str, tuple[int, int]] = {}
        for name, numbers in found.items():
            first.setdefault(drawn_factor(self._modules[name]), numbers)
        any_kind = next(iter(found.values()))
        return {
            name: found.get(name, first.get(drawn_factor(module), any_kind))
            for name, module in self._modules.items()
        }

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

    @property
    def idle(self) -> tuple[str, ...]:
        """Layers that have learnt nothing: the factor that starts at 0 is still 0, or is not finite.

        Without layers that came back from rank 0 a step or two ago.
        """
        just_back = {
            entry.layer for entry in self._ledger if not entry.before and entry.step >= self._step - 2
        }
        live = (layer.name for layer in self._plan.live if layer.name not in just_back)
        return idle_layers({name: self._modules[name] for name in live}, self._name)

    @property
    def summary(self) -> str:
        """What the moves came to, in one sentence."""
        rounds = f"{self._moves_done} round{'' if self._moves_done == 1 else 's'} of moves"
        if self._ledger:
            layers = len({entry.layer for entry in self._ledger})
            return f"ranks moved at {layers} of {len(self._plan.layers)} layers in {rounds}{self._unspent}"
        if self._importance == "uniform" or not self._moves_done:
            return "ranks have not moved"
        if self._blind:
            return (
                f"ranks stayed as they were: in {self._blind} of {rounds} no finite gradient reached a layer"
            )
        if 2 * self._quiet >= self._moves_done:
            return (
                f"ranks stayed as they were: in {self._quiet} of {rounds} no gain stood out of the noise, "
                "so nothing speaks for others"
            )
        return (
            f"ranks stayed as they were: in {rounds} no layer gained {self._margin:g} times what one that "
            "could pay for it would gain itself"
        )

    @property
    def _unspent(self) -> str:
        """What the budget would still buy after the last move, in words."""
        spare = self._budget - self._plan.parameters
        room = [
            layer.cost
            for layer in self._plan.layers
            if self._plan.ranks[layer.name] < self._limits.top(layer)
        ]
        if self._step < self._schedule.final_step or spare < min(room, default=math.inf):
            return ""
        return (
            f"; {spare:,} of the budget's {self._budget:,} parameters are free, for fewer gains were seen "
            f"than they would buy (a layer gains {WIDTH} ranks in a move at most)"
        )

    def step(self, *, loss_scale: float = 1.0) -> bool:
        """Read this step's gradients and, where the schedule says so, move ranks.

        Args:
            loss_scale: what the loss was multiplied by before backward, `scaler.get_scale()` with a
                gradient scaler, so that steps of different scales weigh the same. `sensitivity` reads
                gradients as they are: call `scaler.unscale_(optimizer)` before.

        Returns:
            Whether any rank moved; none does after `close()`.

        Raises:
            CommandError: the loss scale is not a number above 0.
        """
        if self._closed:
            return False
        if not 0 < loss_scale < math.inf:
            raise CommandError(
                f"loss_scale {loss_scale:g} must be a number above 0: what the loss was multiplied by before "
                "backward(), 1 where it was not"
            )
        self._watch.note_call()
        self._note_gradients()
        self._evidence.observe(loss_scale)
        share = 0.0 if self._importance == "uniform" else self._schedule.share(self._step)
        moved = self._move_if_reached(share) if share > 0 else False
        self._step += 1
        if self._step == self._schedule.final_step:
            self._say_what_did_not_happen()
        self._evidence.open(self._plan, self._step, self._basis)
        return moved

    def forget_step(self) -> None:
        """Drop what the passes since the last step showed, where their optimizer step is not taken."""
        self._evidence.forget_step()

    def _note_gradients(self) -> None:
        """Remember whether gradients were there, until the next move."""
        # Looked at until one is found: reading a tensor's values makes a GPU wait.
        self._reached = self._reached or any(
            factor.grad is not None and bool(factor.grad.any()) for factor in self._live_factors()
        )

    def _move_if_reached(self, share: float) -> bool:
        """Move ranks, but not where every gradient was 0 or gone: its scores would be noise.

        Nor where a weight is NaN or infinite, for it has no singular values; `idle` names the layer.
        """
        reached, self._reached = self._reached, False
        finite = all(bool(factor.isfinite().all()) for factor in self._live_factors())
        if reached and finite:
            return self._move(share)
        self._evidence.drop()  # the window ends all the same
        self._moves_done += 1
        self._blind += 1
        if reached:
            return False
        if not self._said_unreached:
            self._said_unreached = True
            warnings.warn(
                f"no layer had a gradient when allocator.step() was called, up to step {self._step}, so no "
                "rank moves: call it after loss.backward() and before optimizer.step() and "
                "optimizer.zero_grad()",
                RankAllocatorWarning,
                stacklevel=3,
            )
        return False

    def _say_what_did_not_happen(self) -> None:
        if not self._ledger and self._importance != "uniform":
            warnings.warn(self.summary, RankAllocatorWarning, stacklevel=3)
        idle = self.idle
        if idle:
            warnings.warn(
                f"{len(idle)} of {len(self._plan.live)} layers have learnt nothing in {self._step} steps: "
                f"{', '.join(idle)}; see that the loss depends on them and that, with gradient "
                "checkpointing, model.enable_input_require_grads() was called",
                RankAllocatorWarning,
                stacklevel=3,
            )

    def _move(self, share: float) -> bool:
        """Decide and carry out one round of moves; start a new window."""
        bases = {layer.name: self._basis(layer.name) for layer in self._plan.live}
        found = self._evidence.take(self._plan, self._step, bases)
        self._blind += all(evidence.reading is None for evidence in found.values())
        states = [self._state(layer, found[layer.name]) for layer in self._plan.layers]
        self._quiet += not any(state.gain for state in states)
        moves = reallocate(
            states,
            budget=self._budget,
            swaps=max(1, round(share * sum(self._plan.ranks.values()))),
            margin=self._margin,
        )
        self._resize(moves, bases, found)
        self._moves_done += 1
        return bool(moves)

    def _basis(self, name: str) -> Basis:
        # With a weight that is NaN nothing moves, and the basis serves to go on alone.
        a, b = (factor.detach().nan_to_num(0.0, 0.0, 0.0) for factor in self._factors(name))
        drawn = drawn_factor(self._modules[name])
        return singular_basis(b, a, newborns=self._protected(name), drawn=drawn)

    def _state(self, layer: LayerSpec, evidence: LayerEvidence) -> LayerState:
        """What the decision needs of one layer: scores per parameter, and how far it may go."""
        rank = self._plan.ranks[layer.name]
        losses = sorted(score / layer.cost for score in evidence.scores)
        clear, likely = (
            [gain / layer.cost for gain in gains]
            for gains in (evidence.promises.clear, evidence.promises.likely)
        )
        bound = evidence.promises.bound / layer.cost
        low, top = self._limits.low(layer), self._limits.top(layer)
        if is_frozen(self._modules[layer.name], self._name):
            low = top = rank  # frozen since the start: it keeps what it has
        return LayerState(layer.name, rank, layer.cost, low, top, losses, clear, likely, bound)

    def _protected(self, name: str) -> int:
        """How many of a layer's last components are too young to be given up."""
        return sum(self._moves_done - born <= PROTECTED_MOVES for born in self._newborns[name])

    def _resize(
        self,
        moves: tuple[Move, ...],
        bases: Mapping[str, Basis],
        found: Mapping[str, LayerEvidence],
    ) -> None:
        """Change the live layers, the ones that shrink first, so that no moment is over budget."""
        for move in moves:
            for factor in self._factors(move.layer) if move.before else ():
                check_state(self._optimizer, factor)  # all before the first changes
        # A layer that comes back takes its precision from one that is live before the moves.
        like = self._factors(self._plan.live[0].name)[0].detach()
        changed = {move.layer: move.after for move in moves}
        parameters = self._plan.with_ranks({**self._plan.ranks, **changed}).parameters
        for move in sorted(moves, key=lambda move: move.after > move.before):
            if move.after > move.before:
                self._grow(move, found[move.layer], like)
            elif move.after == 0:
                remove(self._modules[move.layer], self._name, self._optimizer)
                self._newborns[move.layer] = []
            else:
                self._shrink(move, bases[move.layer], found[move.layer].scores)
            self._plan = self._plan.with_ranks({**self._plan.ranks, move.layer: move.after})
            self._ledger.append(LedgerEntry(step=self._step, **asdict(move), parameters=parameters))
        if moves:
            follow_plan(self._model, self._name, self._plan)

    def _shrink(self, move: Move, basis: Basis, scores: Sequence[float]) -> None:
        """Drop the components that score least, of equals the ones with less energy."""
        order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
        rebase = basis.without(order[: move.before - move.after])
        protected = self._protected(move.layer)
        shrink(self._modules[move.layer], self._name, self._optimizer, rebase)
        self._newborns[move.layer] = self._newborns[move.layer][-protected:] if protected else []

    def _grow(self, move: Move, evidence: LayerEvidence, like: Tensor) -> None:
        """Append newborn components to one layer, or bring it back from rank 0."""
        module, count = self._modules[move.layer], move.after - move.before
        rows = self._newborn_rows(move.layer, count, evidence)
        if move.before:
            grow(module, self._name, self._optimizer, rows)
        else:
            config = adapter_config(self._model, self._name)
            revive(module, self._name, config, rows, self._plan.scaling, like)
            self._adopt(move.layer)
        self._newborns[move.layer] += [self._moves_done] * count

    def _newborn_rows(self, name: str, count: int, evidence: LayerEvidence) -> Tensor:
        """The drawn factor of new components; random ones depend on seed, step and layer only."""
        module, reading = self._modules[name], evidence.reading
        if self._growth == "plain" or reading is None or self._importance == "random":
            generator = seeded(self._seed, self._step, name)
            return plain_components(count, drawn_features(module), generator, drawn_factor(module))
        directions = reading.right if drawn_factor(module) == "a" else reading.left
        loudness = reading.loudness[:count]
        return aligned_components(directions.T[:count], loudness, evidence.size, evidence.usual)

    def _adopt(self, name: str) -> None:
        """Hand a revived layer's parameters to the optimizer, in the model's order where that is kept.

        An optimizer made anew for the resized model would hold them in that order, and its
        stored state is read by place.
        """
        named = dict(self._model.named_parameters())
        order = {id(parameter): place for place, parameter in enumerate(named.values())}
        names = {id(parameter): key for key, parameter in named.items()}
        for number, factor in zip(self._groups[name], self._factors(name), strict=True):
            group = self._optimizer.param_groups[number]
            start_moments(self._optimizer, group, factor)
            params = group["params"]
            places = [order.get(id(parameter), -1) for parameter in params]
            at = len(params)
            if places == sorted(places):
                at = bisect.bisect(places, order[id(factor)])
            params.insert(at, factor)
            if "param_names" in group:
                group["param_names"].insert(at, names[id(factor)])

    def _factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A, shape (rank, in_features), and B, shape (out_features, rank), of a live layer."""
        return factors(self._modules[name], self._name)

    def _live_factors(self) -> Iterator[nn.Parameter]:
        """A and B of every live layer, in order."""
        for layer in self._plan.live:
            yield from self._factors(layer.name)

    def close(self) -> None:
        """Take the hooks off model and optimizer where training ends; ranks stay as they are.

        Warns where the adapter was trained and `step()` never called, or training ended before the
        moves were over.
        """
        self._evidence.close()
        self._watch.close()
        closed, self._closed = self._closed, True
        if closed or self._importance == "uniform":
            return
        if not self._step and self._factor_versions() != self._versions:
            warnings.warn(
                "the adapter was trained and allocator.step() was never called, so no rank moved: call it "
                "right before every optimizer.step() of the optimizer that trains",
                RankAllocatorWarning,
                stacklevel=2,
            )
        if 0 < self._step < self._schedule.final_step:
            warnings.warn(
                f"training ended after {self._step} of {self._schedule.total_steps} planned steps, before "
                f"the moves were over at step {self._schedule.final_step}: {self.summary}. Plan for as many "
                "steps as training has: total_steps, or the steps that the schedule is made for",
                RankAllocatorWarning,
                stacklevel=2,
            )

    def _factor_versions(self) -> list[int]:
        """How often each live factor was written to; a version that nobody reads costs nothing."""
        return [factor._version for factor in self._live_factors()]

    def state_dict(self) -> dict[str, Any]:
        """The allocator's own state: JSON under `facts`, tensors under `tensors`.

        Weights and moments are the model's and the optimizer's to store.
        """
        facts = {
            "plan": self._plan.to_json(),
            "budget": self._budget,
            "step": self._step,
            "moves_done": self._moves_done,
            "quiet": self._quiet,
            "blind": self._blind,
            "newborns": {name: list(born) for name, born in self._newborns.items()},
            "reached": self._reached,
            "groups": {name: list(numbers) for name, numbers in self._groups.items()},
            "ledger": [asdict(entry) for entry in self._ledger],
            "settings": self._settings(),
        }
        return {"facts": facts, "tensors": self._evidence.state_dict()}

    def _settings(self) -> dict[str, Any]:
        """What decides on moves, apart from the budget, as JSON."""
        return {
            "importance": self._importance,
            "growth": self._growth,
            "seed": self._seed,
            "margin": float(self._margin),
            "min_rank": self._limits.min_rank,
            "max_rank": self._limits.max_rank,
            "total_steps": self._schedule.total_steps,
            "moves": list(self._schedule.moves),
            "first_share": self._schedule.first_share,
            "final_step": self._schedule.final_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the model must have the ranks of that moment already.

        Raises:
            CommandError: the model's layers, ranks or scaling differ from the state's, the
                allocator's settings or schedule do, the optimizer lacks parameter groups, or the
                allocator is closed.
        """
        if self._closed:
            raise CommandError("the allocator is closed: make a new one, and load the state into that")
        facts, tensors = state["facts"], state["tensors"]
        plan = RankPlan.from_json(facts["plan"])
        self._check_plan(plan)
        stored = facts.get("settings", {})
        for key, given in self._settings().items():
            if stored.get(key) != given:
                raise CommandError(
                    f"{key} is {given!r}, the allocator's state says {stored.get(key)!r}: make the allocator "
                    "with the settings and the schedule of its first start"
                )
        self._groups = self._stored_groups(facts["groups"])
        self._plan = plan
        if not self._given_budget:  # ranks need not have filled it when the state was stored
            self._budget = int(facts["budget"])
        self._step, self._moves_done = int(facts["step"]), int(facts["moves_done"])
        self._quiet, self._blind = int(facts["quiet"]), int(facts["blind"])
        self._reached = bool(facts["reached"])
        self._newborns = {str(k): [int(m) for m in v] for k, v in facts["newborns"].items()}
        self._ledger = [LedgerEntry(**entry) for entry in facts["ledger"]]
        self._evidence.load_state_dict(tensors, plan, self._step)

    def _check_plan(self, plan: RankPlan) -> None:
        """Refuse a state of other layers, another scaling or other ranks than the model has."""
        other = set(plan.layers) ^ set(self._plan.layers)
        if other:
            names = sorted(layer.name for layer in other)
            raise CommandError(
                f"the allocator's state and the model differ in the layer {names[0]}: put the adapter on "
                "the same model with the same target_modules as for the first start"
            )
        if not math.isclose(plan.scaling, self._plan.scaling):  # a file's alpha may round it
            raise CommandError(
                f"the adapter's scaling is {self._plan.scaling:g}, the allocator's state says "
                f"{plan.scaling:g}: put the adapter on with the alpha and rank of the first start"
            )
        for name, rank in self._plan.ranks.items():
            if plan.ranks[name] != rank:
                raise CommandError(
                    f"{name} has rank {rank}, the allocator's state says {plan.ranks[name]}: give the "
                    "model the stored ranks with autorank.shape_from_state before it is loaded"
                )

    def _stored_groups(self, stored: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
        """Where layers without an adapter belong, which only the state knows; others where they are."""
        count = len(self._optimizer.param_groups)
        most = 1 + max(number for numbers in stored.values() for number in numbers)
        if most > count:
            raise CommandError(
                f"the optimizer has {count} parameter groups, the allocator's state is of one with "
                f"{most} or more: make its groups as for the first start"
            )
        live = {layer.name for layer in self._plan.live}
        return {
            name: here if name in live else (stored[name][0], stored[name][1])
            for name, here in self._groups.items()
        }


def shape_from_state(
    model: nn.Module, state: Mapping[str, Any], *, adapter_name: str = "default"
) -> RankPlan:
    """Give a model the ranks of a stored run, before its tensors are loaded and its optimizer is made.

    A run of one's own loop then goes on exactly, layers at rank 0 included, which PEFT's own file
    does not name:

        model = peft.get_peft_model(base, config)  # as for the first start
        autorank.shape_from_state(model, state)
        model.load_state_dict(...)
        # Its parameters in the model's order, at the first start too: torch stores state by place.
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        optimizer.load_state_dict(...)
        allocator = autorank.RankAllocator(model, optimizer, ...)  # as for the first start
        allocator.load_state_dict(state)

    Args:
        model: with the adapter put on as for the first start.
        state: what `RankAllocator.state_dict` gave.
        adapter_name: PEFT's name of the adapter.

    Returns:
        The ranks that the model has now; its parameters are replaced.

    Raises:
        ModelError: the model's adapter has other layers than the stored one, or another scaling.
    """
    plan = RankPlan.from_json(state["facts"]["plan"])
    take_plan(model, adapter_name, plan)
    return plan


def _bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds hooks and state: accelerate's wrapper knows neither of its own."""
    inner = getattr(optimizer, "optimizer", None)
    return _bare_optimizer(inner) if isinstance(inner, Optimizer) else optimizer
