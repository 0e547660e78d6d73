"""The search space: what a trial may be, which settings come first, and what a rank may be.

A space is made once, is stored with its study and never changes. It knows Optuna's
distributions; it draws nothing (`sampler.py` does) and stores nothing (`study.py` does).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from autorank.allocation import starting_ranks
from autorank.config import REGULARISERS, Dimension, SpaceConfig
from autorank.errors import CommandError, StudyError
from autorank.plan import LayerSpec, RankPlan, snap_scaling, uniform_plan

__all__ = ["Allocation", "Dim", "Space", "Start", "TrialParams", "build_space", "largest_rank"]

Allocation = Literal["uniform", "adaptive"]
Start = Literal["uniform", "gradient"]
Value = int | float | str

_COUNTABLE = 1_000
_HEAD_DIMS = ("head_learning_rate", "head_scale")
_ALLOCATIONS: tuple[str, ...] = ("uniform", "adaptive")
# Where a range is not given: low, high. All are searched on a log scale. Scaling · learning rate is
# what must be right: of 19 trials on banking77 the six best have 4e-3 to 4.3e-3, and those from
# 2.7e-2 ended below the frozen base. So the far corners are left out.
_RANGES = {
    "scaling": (1.0, 8.0),
    "learning_rate": (5e-4, 4e-3),
    "head_learning_rate": (2e-4, 1e-2),
    "head_scale": (0.2, 1.0),
}
# The groups by what evidence there is for them, best first.
_GROUPS = ("all-linear", "mlp", "attention", "query-value")
# The start-up points, see `Space.startup`.
_STARTUP: tuple[dict[str, Any], ...] = (
    {
        "group": "all-linear",
        "start": "uniform",
        "allocation": "uniform",
        "scaling": 2.0,
        "learning_rate": 2e-3,
        "head_learning_rate": 1e-3,
        "head_scale": 0.3,
    },
    {
        "group": "mlp",
        "start": "uniform",
        "allocation": "adaptive",
        "scaling": 8.0,
        "learning_rate": 5e-4,
        "head_learning_rate": 2e-3,
        "head_scale": 0.3,
    },
    {
        "group": "all-linear",
        "start": "gradient",
        "allocation": "adaptive",
        "scaling": 4.0,
        "learning_rate": 1e-3,
        "head_learning_rate": 5e-4,
        "head_scale": 1.0,
    },
)


@dataclass(frozen=True, slots=True)
class TrialParams:
    """The parameters of one trial.

    `rank` is the rank that the starting plan really has at the layers of the group, so two trials
    that train the same thing have the same parameters. It is 0 where they have none in common: the
    gradient gives each layer its own, for the whole budget. `head_scale` is the share of the
    linear probe's logits that the head starts with; it and `head_learning_rate` are None where the
    task has no head. `dropout` is of what the adapter reads, `weight_decay` AdamW's of its A and B,
    `label_smoothing` the share of each target that is spread over all classes in the training loss.
    """

    rank: int
    scaling: float
    learning_rate: float
    head_learning_rate: float | None
    head_scale: float | None
    target_modules: str
    allocation: Allocation
    dropout: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0

    @property
    def start(self) -> Start:
        """What decides the starting plan: one rank for all layers, or the gradient."""
        return "uniform" if self.rank else "gradient"

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to equal parameters."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialParams:
        """Read what `to_json` wrote."""
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension: fixed choices, or a range of whole numbers or of floats.

    Choices reach Optuna as strings, numbers too, so that a stored study says exactly what
    they were.
    """

    name: str
    choices: tuple[Value, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    def distribution(self) -> BaseDistribution:
        """What Optuna samples from."""
        if self.choices is not None:
            return CategoricalDistribution([str(choice) for choice in self.choices])
        assert self.low is not None and self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def values(self) -> tuple[Value, ...] | None:
        """All values there are, None where they cannot be counted."""
        if self.choices is not None:
            return self.choices
        if isinstance(self.low, int) and isinstance(self.high, int):
            return tuple(range(self.low, self.high + 1))
        return (self.low,) if self.low is not None and self.low == self.high else None

    def contains(self, value: Any) -> bool:
        """Whether a trial may have this value."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None and self.high is not None
        number = int if isinstance(self.low, int) else float
        return type(value) is number and self.low <= value <= self.high

    def nearest(self, value: Value) -> Value:
        """The allowed value next to `value`, at least 0; the first choice where words differ."""
        if self.choices is None:
            assert self.low is not None and self.high is not None and not isinstance(value, str)
            return min(max(value, self.low), self.high)
        if value in self.choices or isinstance(value, str):
            return value if value in self.choices else self.choices[0]
        if value == 0:
            return min(self.choices, key=float)
        return min(self.choices, key=lambda choice: abs(math.log(float(choice) / value)))

    def to_optuna(self, value: Value) -> Value:
        """The value as Optuna stores it."""
        return value if self.choices is None else str(value)

    def from_optuna(self, value: Any) -> Value:
        """The value of what Optuna stores.

        Raises:
            StudyError: the dimension does not hold it.
        """
        known: Any = value
        if self.choices is not None:
            known = next((choice for choice in self.choices if str(choice) == value), None)
        if not self.contains(known):
            raise StudyError(f"{self.name} is {value!r}, outside the stored space ({self.describe()})")
        return cast(Value, known)

    def describe(self) -> str:
        """The dimension in a few words: `1..12, log` or `attention, mlp`."""
        if self.choices is not None:
            return ", ".join(str(choice) for choice in self.choices)
        return f"{self.low}..{self.high}" + (", log" if self.log else "")


@dataclass(frozen=True)
class Space:
    """All that trials of a study may be: dimensions, the layers of each group, the budget.

    A group whose layers cannot all have rank 1 within the budget starts from the gradient, and so
    may others where the space has a dimension `start`. `gains` are what the gradient probe
    measured (`gradient.probe_gains`), by layer; they are stored with the space, so that a starting
    plan is a function of it alone. `fixed` are the regularisers that all trials share, where they
    are not 0; those that are searched are dimensions.
    """

    dims: tuple[Dim, ...]
    groups: Mapping[str, tuple[LayerSpec, ...]]
    budget: int
    max_rank: int | None = None
    gains: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)

    @property
    def has_head(self) -> bool:
        """Whether the task has a head with a learning rate of its own."""
        return any(dim.name == "head_learning_rate" for dim in self.dims)

    def dim(self, name: str) -> Dim:
        """The dimension of that name."""
        return next(dim for dim in self.dims if dim.name == name)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by name, in the order of the dimensions."""
        return {dim.name: dim.distribution() for dim in self.dims}

    def largest_rank(self, group: str) -> int:
        """The largest rank that every layer of a group can have within the budget; 0 where none fits."""
        return largest_rank(self.groups[group], self.budget, self.max_rank)

    def starts(self, group: str) -> tuple[Start, ...]:
        """How trials of a group may start."""
        if not self.largest_rank(group):
            return ("gradient",)
        choices = next((dim.choices for dim in self.dims if dim.name == "start"), None)
        return cast(tuple[Start, ...], choices or ("uniform",))

    @property
    def gradient_groups(self) -> dict[str, tuple[LayerSpec, ...]]:
        """The groups with trials that start from the gradient: their layers' gains must be measured."""
        return {name: layers for name, layers in self.groups.items() if "gradient" in self.starts(name)}

    def with_gains(self, gains: Mapping[str, tuple[float, ...]]) -> Space:
        """The same space with what the gradient probe measured."""
        return replace(self, gains=dict(gains))

    def from_optuna(self, raw: Mapping[str, Any]) -> TrialParams:
        """The parameters that Optuna's values stand for, its rank and scaling made usable.

        The rank is lowered to what the group affords, and is 0 where the trial starts from the
        gradient; the scaling is made a multiple of 1/1024 (`plan.snap_scaling`).

        Raises:
            StudyError: a value is missing, unknown or outside the space.
        """
        if set(raw) != {dim.name for dim in self.dims}:
            raise StudyError(f"a trial has the parameters {sorted(raw)}, not those of the stored space")
        values: dict[str, Any] = {dim.name: dim.from_optuna(raw[dim.name]) for dim in self.dims}
        values["scaling"] = snap_scaling(float(values["scaling"]))
        values["learning_rate"] = float(values["learning_rate"])
        for name in _HEAD_DIMS:
            value = values.get(name)
            values[name] = None if value is None else float(value)
        values |= self.fixed
        group = str(values["target_modules"])
        starts = self.starts(group)
        uniform = values.pop("start", starts[0]) == "uniform" and "uniform" in starts
        values["rank"] = self._usable_rank(int(values["rank"]), group) if uniform else 0
        return TrialParams(**values)

    def to_optuna(self, params: TrialParams) -> dict[str, Any]:
        """The values that Optuna stores for these parameters.

        A trial that starts from the gradient has none of the ranks there are to choose from: it
        is always stored with the lowest.
        """
        values = {**params.to_json(), "start": params.start}
        for dim in self.dims:
            if dim.name == "rank" and not params.rank:
                values["rank"] = dim.nearest(1)
        return {dim.name: dim.to_optuna(values[dim.name]) for dim in self.dims}

    @cached_property
    def points(self) -> tuple[TrialParams, ...] | None:
        """Every set of parameters that a trial can have, each once; None where they are too many to count."""
        known = [dim.values() for dim in self.dims]
        listed = [values for values in known if values is not None]
        if len(listed) < len(known) or math.prod(map(len, listed)) > _COUNTABLE:
            return None
        raw = (
            {dim.name: dim.to_optuna(value) for dim, value in zip(self.dims, values, strict=True)}
            for values in itertools.product(*listed)
        )
        return tuple(dict.fromkeys(map(self.from_optuna, raw)))

    def starting_plan(self, params: TrialParams) -> RankPlan:
        """The plan that a trial starts with, within the budget.

        Uniform: its rank at every layer of its group; layers whose full rank is below it get
        their full rank. Or the group's `gradient_plan`.

        Raises:
            ValueError: the plan starts from gains that were never measured.
        """
        group = params.target_modules
        if params.start == "gradient":
            return self.gradient_plan(group, params.scaling)
        rank = self._usable_rank(params.rank, group)
        return uniform_plan(self.groups[group], rank, params.scaling, self.budget)

    def gradient_plan(self, group: str, scaling: float) -> RankPlan:
        """What the gains per parameter buy for the whole budget, see `allocation.starting_ranks`.

        Layers may be at rank 0, never all of them. The probe knows the first rank of each layer, so
        with larger budgets the plan comes near the uniform one.

        Raises:
            ValueError: the gains were never measured.
        """
        return RankPlan(self.groups[group], self._gradient_ranks[group], scaling)

    @cached_property
    def _gradient_ranks(self) -> dict[str, dict[str, int]]:
        """The starting ranks from the gradient, by group; a study asks for them at every look."""
        return {name: self._ranks_by_gain(layers) for name, layers in self.gradient_groups.items()}

    def _ranks_by_gain(self, layers: tuple[LayerSpec, ...]) -> dict[str, int]:
        unknown = [layer.name for layer in layers if layer.name not in self.gains]
        if unknown:
            raise ValueError(
                f"the gradient was not measured at {unknown[0]} and {len(unknown) - 1} more layers"
            )
        costs = {layer.name: layer.cost for layer in layers}
        limits = {layer.name: min(layer.full_rank, self.max_rank or layer.full_rank) for layer in layers}
        return starting_ranks(self.gains, costs, limits, self.budget)

    def startup(self) -> tuple[TrialParams, ...]:
        """The settings that come first, before the sampler proposes any. The first is the default.

        All start at the largest rank the budget affords, and keep scaling · learning rate at 4e-3.
        The first two take a group that may start uniform, where there is one; the third starts
        from the gradient, where the space has that:

        - all linear layers: "LoRA Without Regret" (attention-only loses at matched parameters) and
          AdaLoRA (arXiv 2303.10512, table 14: all matrices 85.6, two of them 83.8 on RTE);
        - MLP layers: PEFT's MetaMathQA benchmark, 49.4 % against 47.8 % for query/value at 9M;
        - scaling 2 is the common default; 8 gained 3.9 points there at one learning rate;
        - learning rate 2e-3 at scaling 2: measured by hand with MiniLM on banking77. With Adam the
          first steps of ΔW grow with scaling · learning rate, so higher scalings start lower;
          "Learning Rate Matters" (arXiv 2602.04998): the learning rate is what must be tuned;
        - a head that starts with 0.3 of the probe's logits, which changes no prediction: rows that
          the probe is sure of keep a gradient. Measured: 0.917 against 0.912 in the mean of four
          trials of 600 steps on banking77, and worse in short trials (the quickstart fixes it at
          1). So one point starts from the whole probe, and the search decides.

        Dimensions that were fixed or narrowed get the nearest value they allow, so fewer than
        three points may remain: none is there twice. Regularisers start at the least they allow.
        """
        points: list[TrialParams] = []
        for settings in _STARTUP:
            point = self._startup_point(settings)
            if point not in points:
                points.append(point)
        return tuple(points)

    def _startup_point(self, settings: Mapping[str, Any]) -> TrialParams:
        choices = [str(name) for name in self.dim("target_modules").choices or ()]
        able = [name for name in choices if settings["start"] in self.starts(name)] or choices
        ranking = [settings["group"], *_GROUPS, *able]
        group = next(name for name in ranking if name in able)
        wanted = {**dict.fromkeys(REGULARISERS, 0.0), **settings, "target_modules": group}
        wanted["rank"] = max(1, self.largest_rank(group))
        return self.from_optuna({d.name: d.to_optuna(d.nearest(wanted[d.name])) for d in self.dims})

    def _usable_rank(self, rank: int, group: str) -> int:
        rank = min(rank, self.largest_rank(group))
        choices = self.dim("rank").choices
        if choices is None:
            return rank
        # The least choice fits every group, or the group would not be here.
        return max(int(choice) for choice in choices if int(choice) <= rank)

    def fingerprint(self) -> dict[str, str]:
        """What identifies the space, a line for each dimension, so that a difference can be named."""
        described = {f"space.{dim.name}": dim.describe() for dim in self.dims}
        described |= {f"space.{name}": str(value) for name, value in self.fixed.items()}
        layers = json.dumps(self.to_json()["groups"], sort_keys=True)
        digest = hashlib.sha256(layers.encode()).hexdigest()[:16]
        counts = ", ".join(f"{name} {len(layers)}" for name, layers in self.groups.items())
        return {**described, "space.layers": f"{counts} (sha256:{digest})"}

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal space; `gains` and `fixed` if not empty."""
        gains = {name: list(known) for name, known in self.gains.items()}
        return {
            "dims": [asdict(dim) for dim in self.dims],
            "groups": {
                name: [[layer.name, layer.in_features, layer.out_features] for layer in layers]
                for name, layers in self.groups.items()
            },
            "budget": self.budget,
            "max_rank": self.max_rank,
            **({"gains": gains} if gains else {}),
            **({"fixed": dict(self.fixed)} if self.fixed else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Space:
        """Read what `to_json` wrote."""
        dims = [
            Dim(**{**dim, "choices": None if dim["choices"] is None else tuple(dim["choices"])})
            for dim in data["dims"]
        ]
        groups = {
            str(name): tuple(LayerSpec(str(n), int(i), int(o)) for n, i, o in layers)
            for name, layers in data["groups"].items()
        }
        limit = data["max_rank"]
        gains = {str(name): tuple(map(float, known)) for name, known in data.get("gains", {}).items()}
        fixed = {str(name): float(value) for name, value in data.get("fixed", {}).items()}
        limit = None if limit is None else int(limit)
        return cls(tuple(dims), groups, int(data["budget"]), limit, gains, fixed)


def largest_rank(layers: tuple[LayerSpec, ...], budget: int, max_rank: int | None = None) -> int:
    """The largest rank that all these layers can have within the budget; 0 where none fits.

    A layer takes its full rank where that is less, so the rank ends at the largest full rank.
    """
    top = max(layer.full_rank for layer in layers)
    low, high = 0, top if max_rank is None else min(top, max_rank)
    while low < high:
        middle = (low + high + 1) // 2
        if _cost_at(layers, middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _cost_at(layers: tuple[LayerSpec, ...], rank: int) -> int:
    return sum(min(rank, layer.full_rank) * layer.cost for layer in layers)


def build_space(
    config: SpaceConfig,
    groups: Mapping[str, tuple[LayerSpec, ...]],
    budget: int,
    *,
    has_head: bool,
    max_rank: int | None,
    min_rank: int = 0,
) -> tuple[Space, list[str]]:
    """Make the space of a study from its settings and the groups of layers found in the model.

    A group that does not fit the budget at rank 1 starts from the gradient, down to one component
    at its cheapest layer. Where ranks, a uniform start or a least rank are asked for, a group that
    does not fit them is left out.

    Returns:
        The space, its gains not measured yet, and a line for each thing that was left out or limited.

    Raises:
        CommandError: the budget buys nothing in any group, or a setting names what is not there.
    """
    notes: list[str] = []
    named = _named_groups(config.target_modules, groups, notes)
    starts = _words(config.start)
    if config.rank is None and min_rank == 0 and starts != ("uniform",):
        fitting = _affordable_groups(named, budget, notes)
    else:
        lowest = 1 if config.rank is None else int(min(config.rank.numbers))
        fitting = _fitting_groups(named, budget, lowest, max_rank, notes)
    full = max(_cost_at(layers, largest_rank(layers, 2**62, max_rank)) for layers in fitting.values())
    if budget > full:
        rule = "the largest rank allowed" if max_rank is not None else "full rank"
        notes.append(f"the budget of {budget:,} is more than {rule} takes: at most {full:,} can be used")
    top = max(largest_rank(layers, budget, max_rank) for layers in fitting.values())
    uniform = top > 0 and starts != ("gradient",)  # or no trial has one rank at all layers
    dims = [_rank_dim(config.rank, min(max(1, min_rank), top), top, notes)] if uniform else []
    dims += [Dim("start", starts)] if starts else []
    dims.append(_range_dim("scaling", config.scaling, notes))
    dims.append(_range_dim("learning_rate", config.learning_rate, notes))
    for name in _HEAD_DIMS:
        wanted: Dimension | None = getattr(config, name)
        if has_head:
            dims.append(_range_dim(name, wanted, notes))
        elif wanted is not None:
            notes.append(f"the task has no head: {name} is not used")
    regularised = {name: wanted for name in REGULARISERS if (wanted := getattr(config, name)) is not None}
    dims += [_range_dim(name, dim, notes) for name, dim in regularised.items() if not dim.is_fixed]
    fixed = {name: float(dim.numbers[0]) for name, dim in regularised.items() if dim.is_fixed}
    _check_decay(dims, fixed)
    dims.append(Dim("target_modules", tuple(fitting)))
    dims.append(Dim("allocation", _words(config.allocation) or _ALLOCATIONS))
    fixed = {name: value for name, value in fixed.items() if value}
    return Space(tuple(dims), fitting, budget, max_rank, fixed=fixed), notes


def _check_decay(dims: Sequence[Dim], fixed: Mapping[str, float]) -> None:
    """Refuse a weight decay that would turn weights round in one step."""
    most = {"weight_decay": 0.0, **fixed}
    for dim in dims:
        if dim.name in ("learning_rate", "weight_decay"):
            most[dim.name] = max(map(float, dim.choices or (dim.high or 0.0,)))
    rate, decay = most["learning_rate"], most["weight_decay"]
    if rate * decay >= 1:
        raise CommandError(
            f"space.weight_decay {decay:g} at learning rate {rate:g} takes all of a weight in one step: "
            f"keep it below {1 / rate:.3g}, or lower space.learning_rate"
        )


def _words(dimension: Dimension | None) -> tuple[str, ...]:
    return tuple(str(word) for word in dimension.choices or ()) if dimension is not None else ()


def _named_groups(
    wanted: Dimension | None, groups: Mapping[str, tuple[LayerSpec, ...]], notes: list[str]
) -> dict[str, tuple[LayerSpec, ...]]:
    """The groups to search over: those asked for, and each set of layers once."""
    found = {name: layers for name, layers in groups.items() if layers}
    if not found:
        raise CommandError("no layers to adapt were found: name some with --target-modules")
    unknown = [name for name in _words(wanted) if name not in found]
    if unknown:
        raise CommandError(
            f"space.target_modules names {', '.join(unknown)}, but the groups found in this model are "
            f"{', '.join(found)}: use these, or name layers with --target-modules"
        )
    named: dict[str, tuple[LayerSpec, ...]] = {}
    for name in _words(wanted) or found:
        twin = next((other for other in named if set(named[other]) == set(found[name])), None)
        if twin is None:
            named[name] = tuple(found[name])
        else:
            notes.append(f"{name} is left out: it has the same layers as {twin}")
    return named


def _affordable_groups(
    named: Mapping[str, tuple[LayerSpec, ...]], budget: int, notes: list[str]
) -> dict[str, tuple[LayerSpec, ...]]:
    """The groups of which the budget buys a component; a note on those that it does not buy at rank 1."""
    found: dict[str, tuple[LayerSpec, ...]] = {}
    for name, layers in named.items():
        least, whole = min(layer.cost for layer in layers), _cost_at(layers, 1)
        if least > budget:
            notes.append(f"{name} is left out: one component costs at least {least:,}, over the budget")
            continue
        found[name] = layers
        if whole > budget:
            notes.append(
                f"{name} cannot have rank 1 at every layer, which costs {whole:,}: the gradient chooses "
                "where it starts"
            )
    if not found:
        cheapest = min((layer for layers in named.values() for layer in layers), key=lambda layer: layer.cost)
        raise CommandError(
            f"--budget {budget:,} buys nothing here: one component of the cheapest layer, {cheapest.name}, "
            f"costs {cheapest.cost:,}; raise it to that or more"
        )
    return found


def _fitting_groups(
    named: Mapping[str, tuple[LayerSpec, ...]],
    budget: int,
    lowest: int,
    max_rank: int | None,
    notes: list[str],
) -> dict[str, tuple[LayerSpec, ...]]:
    """The groups that the budget affords at the lowest rank of the space."""
    fitting: dict[str, tuple[LayerSpec, ...]] = {}
    needs: dict[str, int] = {}
    for name, layers in named.items():
        if largest_rank(layers, 2**62, max_rank) < lowest:
            limit = max_rank if max_rank is not None else max(layer.full_rank for layer in layers)
            raise CommandError(
                f"rank {lowest} is above what {name} can have, {limit}: lower space.rank"
                + ("" if max_rank is None else " or raise max_rank")
            )
        needs[name] = _cost_at(layers, lowest)
        if needs[name] <= budget:
            fitting[name] = layers
        else:
            notes.append(f"{name} is left out: rank {lowest} costs {needs[name]:,}, over the budget")
    if not fitting:
        cheapest = min(needs, key=needs.__getitem__)
        raise CommandError(
            f"--budget {budget:,} buys nothing here: the cheapest group, {cheapest}, needs "
            f"{needs[cheapest]:,} at rank {lowest}; raise it"
            + (" or narrow --target-modules" if lowest == 1 else " or lower space.rank")
        )
    return fitting


def _rank_dim(wanted: Dimension | None, low: int, top: int, notes: list[str]) -> Dim:
    """The rank's dimension, from `low` where none is wanted, to `top`, the largest that any group affords."""
    if wanted is None:
        return Dim("rank", None, low, top, log=True)
    if wanted.choices is not None:
        kept = tuple(sorted(int(choice) for choice in wanted.choices if int(choice) <= top))
        if len(kept) < len(wanted.choices):
            notes.append(f"ranks above {top} are left out: the budget buys none of them")
        return Dim("rank", kept)
    assert wanted.low is not None and wanted.high is not None
    if wanted.high > top:
        notes.append(f"ranks end at {top}, not {wanted.high}: the budget buys no more")
    log = True if wanted.log is None else wanted.log
    return Dim("rank", None, int(wanted.low), min(int(wanted.high), top), log)


def _range_dim(name: str, wanted: Dimension | None, notes: list[str]) -> Dim:
    """A dimension of floats, on a log scale but for regularisers; scalings are made multiples of 1/1024."""
    if wanted is None:
        low, high = _RANGES[name]
        return Dim(name, None, low, high, log=True)
    usable = {float(n): snap_scaling(n) if name == "scaling" else float(n) for n in wanted.numbers}
    for number, snapped in usable.items():
        if not math.isclose(number, snapped, rel_tol=1e-9):
            notes.append(f"scaling {number:g} is used as {snapped:g}: scalings are multiples of 1/1024")
    if wanted.choices is not None:
        return Dim(name, tuple(dict.fromkeys(usable.values())))
    low, high = min(usable.values()), max(usable.values())
    log = name not in REGULARISERS if wanted.log is None else wanted.log
    return Dim(name, None, low, high, log=log)
