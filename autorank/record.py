"""What a study knows about one trial: the slot it was given, and the record of what came of it.

Plain values that go to JSON; where they are stored is `study.py`'s business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar, cast, get_args

from autorank.errors import StudyError, first_line
from autorank.plan import RankPlan
from autorank.space import Space, TrialParams

__all__ = ["Score", "TrialRecord", "TrialSlot", "best_of", "plain"]

State = Literal["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
_COUNTS = ("trainable_parameters", "head_parameters", "steps", "samples", "tokens", "evaluation_samples")
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class TrialSlot:
    """A trial to train now.

    `slot` is its place in the study's plan, from which its seed comes; `control_of` is the
    number of the trial whose paired control it is.
    """

    number: int
    slot: int
    params: TrialParams
    seed: int
    control_of: int | None


@dataclass(frozen=True, slots=True)
class Score:
    """What an evaluation of a trial gave, and what the trial, and the study, had cost by then.

    `noise` is the standard error of the value. `samples` and `tokens` were trained on,
    `evaluation_samples` scored, all by the trial; `spent` is what the whole study had trained on.
    """

    value: float
    noise: float = 0.0
    samples: int = 0
    tokens: int = 0
    evaluation_samples: int = 0
    spent: int = 0


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial as the study stores it.

    `value` of a PRUNED trial is its last report. `ranks` are the final ranks by full layer
    name, `starting_ranks` those of its starting plan, `scores` what it scored, by step. Counts are
    None until the trial has a score; those of a RUNNING trial are as of its last one.
    """

    number: int
    slot: int
    seed: int
    state: State
    value: float | None
    params: TrialParams
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    starting_ranks: Mapping[str, int] = field(default_factory=dict)
    steps: int | None = None
    samples: int | None = None
    tokens: int | None = None
    evaluation_samples: int | None = None
    seconds: float | None = None
    reason: str | None = None
    control_of: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    scores: Mapping[int, Score] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def out_of_memory(self) -> bool:
        """Whether it failed because it did not fit the memory."""
        return self.state == "FAIL" and bool(self.extra.get("out_of_memory", False))

    @property
    def plan(self) -> RankPlan:
        """The ranks and the scaling that its adapter ended with.

        Raises:
            StudyError: they are not stored, or not as autorank stores them.
        """
        try:
            return RankPlan.from_json(self.extra["plan"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StudyError(
                f"the record of trial {self.number} tells no ranks of its adapter ({first_line(error)}): "
                "restore the study from a copy, or choose another --trial"
            ) from error

    @property
    def failure(self) -> str:
        """What it failed of, the same for all that did alike: no memory, or one text but for numbers."""
        return "out of memory" if self.out_of_memory else re.sub(r"[-+\d.e]+", "#", self.reason or "")

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what the trial recorded beyond the named fields stands beside them."""
        return {
            **dict(self.extra),
            "number": self.number,
            "slot": self.slot,
            "seed": self.seed,
            "state": self.state,
            "value": plain(self.value),
            "params": self.params.to_json(),
            "trainable_parameters": self.trainable_parameters,
            "head_parameters": self.head_parameters,
            "ranks": dict(self.ranks),
            "starting_ranks": dict(self.starting_ranks),
            "steps": self.steps,
            "samples": self.samples,
            "seconds": plain(self.seconds),
            "reason": self.reason,
            "control_of": self.control_of,
            "metrics": plain(self.metrics),
            "tokens": self.tokens,
            "evaluation_samples": self.evaluation_samples,
            "scores": {str(step): asdict(score) for step, score in self.scores.items()},
        }

    @classmethod
    def from_stored(
        cls,
        space: Space,
        number: int,
        state: str,
        value: float | None,
        raw: Mapping[str, Any],
        attributes: Mapping[str, Any],
        reports: Mapping[int, float] | None = None,
    ) -> TrialRecord:
        """Read what a study's database holds, trusting none of it. `reports` are the values by step.

        Raises:
            StudyError: something is not what autorank writes, or lies outside the space.
        """
        if state not in get_args(State) or not {"slot", "seed", "control_of"} <= set(attributes):
            raise StudyError(f"autorank did not make trial {number} ({state}): restore the study from a copy")
        params = space.from_optuna(raw)
        plan = space.starting_plan(params)
        scores = _scores(reports or {}, attributes.get("scores") or {})
        stored: dict[str, Any] = {**_costs(scores)}
        if state != "RUNNING":
            stored |= attributes.get("record") or {}
        reason = attributes.get("reason") if state != "RUNNING" else None
        ranks = stored.pop("ranks", {})
        unknown = ", ".join(sorted(set(ranks) - set(plan.ranks))[:3])
        if unknown:
            raise StudyError(
                f"trial {number} has ranks for layers that {params.target_modules} lacks: {unknown}"
            )
        control_of = attributes["control_of"]
        return cls(
            number=number,
            slot=int(attributes["slot"]),
            seed=int(attributes["seed"]),
            state=cast(State, state),
            value=value,
            params=params,
            ranks={str(name): int(rank) for name, rank in ranks.items()},
            starting_ranks=dict(plan.ranks),
            reason=None if reason is None else str(reason),
            control_of=None if control_of is None else int(control_of),
            seconds=_number(float, stored.pop("seconds", None)),
            metrics={str(k): _number(float, v) for k, v in stored.pop("metrics", {}).items()},
            **{name: _number(int, stored.pop(name, None)) for name in _COUNTS},
            scores=scores,
            extra=stored,
        )

    @property
    def is_uniform(self) -> bool:
        """Whether the trial had one rank at all its layers, from start to end: plain LoRA."""
        return self.params.allocation == "uniform" and self.params.start == "uniform"

    def is_pair_of(self, other: TrialRecord) -> bool:
        """Whether the two differ in nothing but allocation: same parameters, seed and data order."""
        aligned = replace(self.params, allocation=other.params.allocation)
        return (
            self.seed == other.seed
            and self.params.allocation != other.params.allocation
            and aligned == other.params
        )


def best_of(records: Sequence[TrialRecord], direction: str, budget: int) -> TrialRecord | None:
    """The best record that is COMPLETE, finite and within the budget; the first of equals."""
    sign = 1.0 if direction == "maximize" else -1.0
    able = {
        record.number: sign * record.value
        for record in records
        if record.state == "COMPLETE"
        and record.value is not None
        and math.isfinite(record.value)
        and record.trainable_parameters is not None
        and record.trainable_parameters <= budget
    }
    number = max(able, key=able.__getitem__, default=None)
    return next((record for record in records if record.number == number), None)


def _scores(reports: Mapping[int, float], told: Mapping[str, Any]) -> dict[int, Score]:
    """The reports in order, each with what was told of it."""
    counts = ("samples", "tokens", "evaluation_samples", "spent")
    scores: dict[int, Score] = {}
    for step, value in sorted(reports.items()):
        if math.isfinite(value):
            facts = told.get(str(step), {})
            noise = float(facts.get("noise", 0.0))
            scores[int(step)] = Score(value, noise, **{name: int(facts.get(name, 0)) for name in counts})
    return scores


def _costs(scores: Mapping[int, Score]) -> dict[str, int]:
    """What a trial had cost by its last score."""
    if not scores:
        return {}
    step, last = max(scores.items())
    counts = {name: getattr(last, name) for name in ("samples", "tokens", "evaluation_samples")}
    return {"steps": step, **counts}


def _number(kind: type[_Number], value: Any) -> _Number | None:
    return None if value is None else kind(value)


def plain(value: Any) -> Any:
    """The value as strict JSON holds it: NaN and infinities, which it does not know, are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
