"""A lane: one trial in training on the shared base model, and the state to go on from.

A lane knows neither the study nor its peers; the engine decides when it steps.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autorank.adapter import Adapter, idle_layers, load_adapter, lora_layers, save_adapter
from autorank.allocator import Importance, RankAllocator, RankAllocatorWarning
from autorank.dropout import AdapterDropout, has_dropout
from autorank.errors import StudyError
from autorank.evaluate import evaluate, standard_error
from autorank.model import Base
from autorank.plan import RankPlan
from autorank.routing import Routing
from autorank.schedule import Schedule
from autorank.tasks import Example, HeadTask, Task
from autorank.train import BatchOrder, Learner, NotFinite, train_step

if TYPE_CHECKING:
    from autorank.space import TrialParams

__all__ = ["Bench", "Checkpoint", "Lane", "LaneState", "Recipe", "TrialSpec", "train_lanes"]

STATE_VERSION = 4


@dataclass(frozen=True)
class Recipe:
    """How every trial of a study is trained, whatever its parameters.

    Under `strict` a warning of the allocator is an error. A trial that was no better for `patience`
    evaluations, counted from the first after step `settled`, ends there; None for no such end.
    """

    steps: int
    batch_size: int
    evaluate_at: tuple[int, ...]
    gradient_clip: float
    importance: Importance
    schedule: Schedule
    min_rank: int
    max_rank: int | None
    strict: bool = False
    patience: int | None = None
    settled: int = 0


@dataclass(frozen=True)
class TrialSpec:
    """One trial: where it starts, how fast it learns and what holds it back.

    The plan's cost is the trial budget. `dropout` is of what the adapter reads, in [0, 1),
    `weight_decay` AdamW's of its A and B, `label_smoothing` of the training loss, in [0, 1).
    """

    number: int
    seed: int
    plan: RankPlan
    adaptive: bool
    learning_rate: float
    head_learning_rate: float | None
    head_scale: float | None
    dropout: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0

    @classmethod
    def of(
        cls, params: TrialParams, *, number: int, seed: int, plan: RankPlan, adaptive: bool | None = None
    ) -> TrialSpec:
        """A trial of these parameters; ranks move where they say so, or `adaptive` does."""
        moves = params.allocation == "adaptive" if adaptive is None else adaptive
        return cls(
            number,
            seed,
            plan,
            moves,
            params.learning_rate,
            params.head_learning_rate,
            params.head_scale,
            params.dropout,
            params.weight_decay,
            params.label_smoothing,
        )


@dataclass(frozen=True)
class Checkpoint:
    """The tensors that were scored: what is exported if this trial wins."""

    step: int
    value: float
    scores: dict[str, float]
    plan: RankPlan
    tensors: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Bench:
    """What the lanes of a process share: the base model, the tokenised data, the recipe.

    `head` names the final linear layer of a task with a head.
    """

    base: Base
    task: Task
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    recipe: Recipe
    head: str | None = None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """What is trained in full beside the adapter: fresh modules, and a head that was loaded."""
        # The whole module on top of the backbone: PEFT adds `classifier` by itself, and a part of it
        # saved beside it would not load again.
        backbone = f"{getattr(self.base.model, 'base_model_prefix', '')}."
        names = [*self.base.fresh, *([] if self.head is None else [self.head])]
        tops = [name if name.startswith(backbone) else name.partition(".")[0] for name in names]
        return tuple(dict.fromkeys(tops))

    @property
    def head_parameters(self) -> int:
        """How many parameters the modules have that are trained in full."""
        modules = [self.base.model.get_submodule(name) for name in self.modules_to_save]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    @property
    def unit(self) -> float:
        """The size of what the final layer's outputs tell apart; see `HeadTask.unit`."""
        return self.task.unit if isinstance(self.task, HeadTask) else 1.0

    @cached_property
    def dropout(self) -> bool:
        """Whether a step wants the base in training mode: to drop anything, or to compute it twice."""
        return self.base.recomputes or has_dropout(self.base.model)

    def put_on(
        self, plan: RankPlan, seed: int, name: str = "default", dropout: AdapterDropout | None = None
    ) -> Adapter:
        """A fresh adapter on the shared base model, its head a copy of the base's."""
        return Adapter(
            self.base.model,
            plan,
            modules_to_save=self.modules_to_save,
            task_type=self.task.peft_task_type,
            seed=seed,
            name=name,
            dropout=dropout,
        )

    def put_back(self, folder: Path, plan: RankPlan) -> Adapter:
        """A stored adapter on the shared base model."""
        return load_adapter(
            self.base.model,
            folder,
            plan,
            modules_to_save=self.modules_to_save,
            task_type=self.task.peft_task_type,
        )

    def save(self, folder: Path, checkpoint: Checkpoint, *, dropout: float) -> None:
        """Write a checkpoint as a plain PEFT adapter folder; `dropout` is what it was trained with."""
        save_adapter(
            folder,
            checkpoint.tensors,
            checkpoint.plan,
            modules_to_save=self.modules_to_save,
            task_type=self.task.peft_task_type,
            base_name=self.base.path,
            dropout=dropout,
        )


@dataclass(frozen=True)
class LaneState:
    """Everything a lane needs to go on elsewhere: safetensors and JSON, never pickle."""

    step: int
    samples: int
    plan: RankPlan
    tensors: dict[str, Tensor] = field(repr=False)
    optimizer: dict[str, Tensor] = field(repr=False)
    allocator: dict[str, Any] | None = field(repr=False)
    best: Checkpoint | None

    def save(self, folder: Path) -> None:
        """Write the state into an existing folder; the caller makes that atomic."""
        tensors = {f"adapter/{key}": value for key, value in self.tensors.items()}
        tensors |= {f"optimizer/{key}": value for key, value in self.optimizer.items()}
        facts: dict[str, Any] = {
            "version": STATE_VERSION,
            "step": self.step,
            "samples": self.samples,
            "plan": self.plan.to_json(),
            "allocator": None if self.allocator is None else self.allocator["facts"],
            "best": None,
        }
        if self.allocator is not None:
            tensors |= {f"allocator/{key}": value for key, value in self.allocator["tensors"].items()}
        if self.best is not None:
            tensors |= {f"best/{key}": value for key, value in self.best.tensors.items()}
            facts["best"] = {
                "step": self.best.step,
                "value": self.best.value,
                "scores": self.best.scores,
                "plan": self.best.plan.to_json(),
            }
        save_file(tensors, str(folder / "lane.safetensors"))
        (folder / "lane.json").write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LaneState:
        """Read what `save` wrote.

        Raises:
            StudyError: the files are missing, damaged or of another version.
        """
        try:
            facts = json.loads((folder / "lane.json").read_text(encoding="utf-8"))
            tensors = load_file(str(folder / "lane.safetensors"))
            if facts["version"] != STATE_VERSION:
                raise StudyError(f"the state in {folder} has version {facts['version']}, not {STATE_VERSION}")
            allocator, best = facts["allocator"], facts["best"]
            return cls(
                int(facts["step"]),
                int(facts["samples"]),
                RankPlan.from_json(facts["plan"]),
                _part(tensors, "adapter/"),
                _part(tensors, "optimizer/"),
                None if allocator is None else {"facts": allocator, "tensors": _part(tensors, "allocator/")},
                None
                if best is None
                else Checkpoint(
                    int(best["step"]),
                    float(best["value"]),
                    dict(best["scores"]),
                    RankPlan.from_json(best["plan"]),
                    _part(tensors, "best/"),
                ),
            )
        except StudyError:
            raise
        except Exception as error:
            raise StudyError(
                f"the state in {folder} cannot be read ({error}): restore it from a copy, or remove it to "
                "start the trial over"
            ) from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class Lane:
    """One trial in training.

    Args:
        spec: the trial.
        bench: what it shares with other lanes.
        state: where to go on; None for the start.
        name: PEFT's name of its adapter; lanes that are there together have different ones.
        routing: sends samples through the adapters of the lanes; a lane alone needs none.
    """

    def __init__(
        self,
        spec: TrialSpec,
        bench: Bench,
        state: LaneState | None = None,
        *,
        name: str = "default",
        routing: Routing | None = None,
    ) -> None:
        self.spec = spec
        self._bench = bench
        self._routing = routing
        self.step = 0 if state is None else state.step
        self.best = None if state is None else state.best
        self._dropout = AdapterDropout(spec.dropout) if spec.dropout else None
        plan = spec.plan if state is None else state.plan
        try:
            self.adapter = bench.put_on(plan, spec.seed, name, self._dropout)
        finally:
            if routing is not None:  # PEFT makes active what it puts on, whether it stays or not
                routing.renew()
        try:
            if state is None and bench.head is not None and spec.head_scale is not None:
                with torch.no_grad():
                    for parameter in self.adapter.own_copy(bench.head).parameters():
                        parameter.mul_(spec.head_scale)
            self._make_ready(state)
        except BaseException:
            self.close()
            raise

    def _make_ready(self, state: LaneState | None) -> None:
        """Optimizer, allocator and the order of the data; then what is stored."""
        spec, bench = self.spec, self._bench
        self._optimizer = self._make_optimizer()
        self.allocator = self._make_allocator() if spec.adaptive else None
        self._plan = spec.plan
        lengths = [example.length for example in bench.train]
        self._order = BatchOrder(lengths, bench.recipe.batch_size, spec.seed)
        if state is not None:
            self._restore(state)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; its weight decay pulls A and B towards the base's own function, and no head towards 0.

        Fused, for an adapter is many small tensors, and the calls for each would cost more than they do.
        """
        groups: list[dict[str, Any]] = [
            {
                "params": list(self.adapter.parameters().values()),
                "initial_lr": self.spec.learning_rate,
                "weight_decay": self.spec.weight_decay,
            }
        ]
        rate = self.spec.head_learning_rate
        rate = self.spec.learning_rate if rate is None else rate
        final = [] if self._bench.head is None else list(self.adapter.own_copy(self._bench.head).parameters())
        behind = {id(parameter) for parameter in final}
        whole = [p for p in self.adapter.head_parameters().values() if id(p) not in behind]
        unit = self._bench.unit
        groups += [
            {"params": parameters, "initial_lr": size}
            for parameters, size in ((whole, rate), (final, rate * unit))
            if parameters
        ]
        if unit != 1.0:
            # As if the layer's weights were counted in the unit: so is their gradient, beside that of
            # all other parameters in the norm that is clipped.
            for parameter in final:
                parameter.register_hook(lambda gradient: gradient * unit)
        return torch.optim.AdamW(groups, lr=self.spec.learning_rate, weight_decay=0.0, fused=True)

    def _make_allocator(self) -> RankAllocator:
        recipe = self._bench.recipe
        return RankAllocator(
            self._bench.base.model,
            self._optimizer,
            total_steps=recipe.steps,
            budget=self.spec.plan.parameters,
            importance=recipe.importance,
            schedule=recipe.schedule,
            min_rank=recipe.min_rank,
            max_rank=recipe.max_rank,
            seed=self.spec.seed,
            adapter_name=self.adapter.name,
            # Nothing of the lane, which would then live as long as the allocator that it holds.
            rows=None if self._routing is None else partial(self._routing.rows, self.adapter.name),
        )

    @property
    def plan(self) -> RankPlan:
        """The ranks the lane has now."""
        return self._plan if self.allocator is None else self.allocator.plan

    @property
    def samples(self) -> int:
        """Training samples consumed so far."""
        return self.step * self._order.size

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self._bench.recipe.steps

    def train(self) -> float:
        """One optimizer step; returns the batch's loss.

        Raises:
            NotFinite: the loss or the gradient is NaN or infinite.
            RankAllocatorWarning: the recipe is strict, and no rank moved or layers have learnt nothing.
        """
        found = train_lanes(self._bench, [self], routing=self._routing)[0]
        if isinstance(found, Exception):
            raise found
        return found

    def examples(self) -> list[Example]:
        """The rows of the next step."""
        return [self._bench.train[row] for row in self._order.rows(self.step)]

    def learner(self) -> Learner:
        """What it brings to the next step."""
        self.adapter.renew_dropout()
        return Learner(
            self.adapter.name,
            self._order.size,
            self._optimizer,
            self.allocator,
            self.step,
            self.spec.seed,
            self._dropout,
            self.spec.label_smoothing,
        )

    def evaluate(self, batch_size: int | None = None) -> tuple[float, float]:
        """Score the validation split and keep the tensors if they are the best so far.

        Args:
            batch_size: rows of a pass; None for that of the recipe.

        Returns:
            The metric and its standard error.

        Raises:
            NotFinite: the metric or a weight is NaN or infinite.
        """
        bench = self._bench
        if self._routing is not None:
            self._routing.only(self.adapter.name)
        result = evaluate(
            bench.base.model,
            bench.task,
            bench.validation,
            batch_size=bench.recipe.batch_size if batch_size is None else batch_size,
            pad_token_id=bench.base.pad_token_id,
            writer=bench.base.writer,
        )
        value = result.scores[bench.task.metric.name]
        if not math.isfinite(value):
            raise NotFinite(f"the validation {bench.task.metric.name} is {value} at step {self.step}")
        sign = 1 if bench.task.metric.direction == "maximize" else -1
        if self.best is None or sign * value > sign * self.best.value:
            tensors = self.adapter.tensors()
            broken = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
            if broken:
                raise NotFinite(f"the weight {broken[0]} is not finite at step {self.step}")
            self.best = Checkpoint(self.step, value, result.scores, self.plan, tensors)
        return value, standard_error(bench.task, result.outcomes)

    def state(self) -> LaneState:
        """Everything needed to go on from here."""
        names = {id(parameter): name for name, parameter in self._named().items()}
        optimizer = {
            f"{names[id(parameter)]}/{key}": value.detach().to("cpu", copy=True).contiguous()
            for parameter, entries in self._optimizer.state.items()
            for key, value in entries.items()
        }
        return LaneState(
            self.step,
            self.samples,
            self.plan,
            self.adapter.tensors(),
            optimizer,
            None if self.allocator is None else self.allocator.state_dict(),
            self.best,
        )

    def _restore(self, state: LaneState) -> None:
        """Put stored tensors, optimizer state and allocator in place."""
        self.adapter.load(state.tensors)
        named = self._named()
        for key, value in state.optimizer.items():
            name, _, entry = key.rpartition("/")
            if name not in named:
                raise StudyError(f"the stored optimizer state names {name}, which the adapter has not")
            parameter = named[name]
            self._optimizer.state[parameter][entry] = value.to(parameter.device, copy=True)
        if self.allocator is not None and state.allocator is not None:
            self.allocator.load_state_dict(state.allocator)

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return self.adapter.parameters() | self.adapter.head_parameters()

    def ledger(self) -> list[dict[str, Any]]:
        """Every rank move so far."""
        return [] if self.allocator is None else [asdict(entry) for entry in self.allocator.ledger]

    @property
    def idle(self) -> tuple[str, ...]:
        """Layers that have learnt nothing so far."""
        if self.allocator is not None:
            return self.allocator.idle
        return idle_layers(lora_layers(self._bench.base.model, self.adapter.name), self.adapter.name)

    @property
    def moved(self) -> str | None:
        """What moves came to, and what has learnt nothing; None where ranks are uniform and all has."""
        idle = self.idle
        learnt = [f"{len(idle)} layers have learnt nothing: {', '.join(idle)}"] if idle else []
        moves = [] if self.allocator is None else [self.allocator.summary]
        return "; ".join(moves + learnt) or None

    def close(self) -> None:
        """Leave the base model as it was without the lane."""
        allocator: RankAllocator | None = getattr(self, "allocator", None)  # none where it could not be made
        if allocator is not None:
            with warnings.catch_warnings():  # a trial that ends early is no mistake
                warnings.simplefilter("ignore", RankAllocatorWarning)
                allocator.close()
        self.adapter.remove()
        if self._routing is not None:
            self._routing.renew()


def train_lanes(
    bench: Bench, lanes: Sequence[Lane], *, routing: Routing | None = None, parts: int = 1
) -> list[float | Exception]:
    """One optimizer step of every lane, all in one pass; see `train.train_step`, which says what it gives."""
    examples = [example for lane in lanes for example in lane.examples()]
    batch = bench.task.collate(examples, bench.base.pad_token_id).to(bench.base.device)
    with warnings.catch_warnings():
        # The trial's record says it, and so does the result.
        warnings.simplefilter("error" if bench.recipe.strict else "ignore", RankAllocatorWarning)
        found = train_step(
            bench.base.model,
            bench.task,
            batch,
            [lane.learner() for lane in lanes],
            total_steps=bench.recipe.steps,
            gradient_clip=bench.recipe.gradient_clip,
            routing=routing,
            parts=parts,
            dropout=bench.dropout,
        )
    for lane, loss in zip(lanes, found, strict=True):
        lane.step += not isinstance(loss, Exception)
    return found
