"""What tests of a stored study share: a small space, and trials that cost nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from autorank.config import SpaceConfig
from autorank.plan import LayerSpec
from autorank.record import Score, TrialSlot
from autorank.space import Space, TrialParams, build_space
from autorank.study import Study

ATTENTION = tuple(LayerSpec(f"block.{i}.attention", 32, 32) for i in range(3))
MLP = tuple(LayerSpec(f"block.{i}.mlp", 32, 64) for i in range(3))
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all-linear": ATTENTION + MLP}
BUDGET = 4_000


def make_space(budget: int = BUDGET, **settings: Any) -> Space:
    """A space over three groups of small layers."""
    config = SpaceConfig.model_validate(settings)
    return build_space(config, GROUPS, budget, has_head=True, max_rank=None)[0]


def make_study(folder: Path, *, seed: int = 0, direction: Any = "maximize", **settings: Any) -> Study:
    """A new study of that space."""
    space = make_space(**settings)
    return Study.create(
        folder,
        config={"name": folder.name, "trials": 6},
        fingerprint={"model": "m1", "seed": str(seed), **space.fingerprint()},
        space=space,
        direction=direction,
        metric="accuracy",
        seed=seed,
    )


def score(params: TrialParams) -> float:
    """A value for parameters: smooth, and best inside the space."""
    rate = math.log(params.learning_rate / 1.5e-3) ** 2 + math.log(params.scaling / 3) ** 2
    return 0.9 - 0.05 * rate + 0.01 * params.rank / 20 + (0.02 if params.allocation == "adaptive" else 0.0)


def record(study: Study, params: TrialParams, **more: Any) -> dict[str, Any]:
    """What a trial with its starting plan has to tell."""
    plan = study.space.starting_plan(params)
    return {"trainable_parameters": plan.parameters, "ranks": dict(plan.ranks), "steps": 10, **more}


def run(study: Study, total: int) -> list[tuple[Any, ...]]:
    """Run a study to the end; returns what each trial was and came to."""
    while (slot := next_slot(study, total)) is not None:
        value = score(slot.params)
        for step in (1, 2):
            study.report(slot.number, step, Score(value - 0.1 / step))
        study.tell_complete(slot.number, value, record(study, slot.params))
    return story(study)


def next_slot(study: Study, total: int) -> TrialSlot | None:
    """What a search in one process would train now: the trial that was interrupted, or a new one."""
    unfinished = study.unfinished()
    return unfinished[0] if unfinished else study.ask(total)


def story(study: Study) -> list[tuple[Any, ...]]:
    """Everything about the trials that must not depend on interruptions."""
    return [
        (r.number, r.slot, r.seed, r.state, r.value, r.params, r.control_of, tuple(r.scores.items()))
        for r in study.trials()
    ]
