"""The transplant: a trial's adapter cut to a smaller budget, scored, and trained on where that is asked.

So one study serves several budgets. It writes nothing, and the test split is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from autorank.adapter import config_for, factor_keys
from autorank.allocation import starting_ranks
from autorank.budget import format_count
from autorank.config import config_from_json
from autorank.display import Display
from autorank.errors import CommandError
from autorank.figures import format_value
from autorank.lane import Checkpoint, Lane, LaneState, TrialSpec
from autorank.plan import RankPlan
from autorank.preflight import Setup, prepare
from autorank.record import TrialRecord, plain
from autorank.resize import row_order
from autorank.study import Study
from autorank.train import NotFinite
from autorank.truncation import singular_factors

__all__ = ["Transplant", "transplant", "truncate"]


@dataclass(frozen=True)
class Transplant:
    """A smaller adapter, in the parts of which an export is made.

    Attributes:
        record: the trial's, with the ranks, parameters and scores of the smaller adapter.
        config: PEFT's configuration, as JSON.
        tensors: everything the adapter's file holds, by PEFT's names.
        facts: what `autorank_export.json` tells of it.
    """

    record: TrialRecord
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    facts: dict[str, Any]


def transplant(
    study: Study,
    record: TrialRecord,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    budget: int,
    recover: int = 0,
    scored: bool = True,
    metric: str | None = None,
    trust_remote_code: bool = False,
    display: Display | None = None,
) -> Transplant:
    """Shrink a trial's adapter to a budget, and score it before and after on validation.

    Args:
        study: where the trial comes from.
        record: the finished trial.
        config: the stored configuration of its adapter.
        tensors: what its file holds, by PEFT's names.
        budget: most parameters that the smaller adapter may have.
        recover: steps of training after the truncation, at fixed ranks. The best of the truncated
            adapter and of the checkpoints on the way is what comes back.
        scored: False leaves model and data alone: nothing is scored or trained.
        metric: the study's, where it is a function of the user's own.
        trust_remote_code: run code that comes with the model, where the study does.
        display: who watches; None for nobody.

    Raises:
        CommandError: the adapter is within the budget already, or the budget buys no component.
        StudyError: model, data or settings are no longer those of the study.
        AutorankError: model or data cannot be loaded.
    """
    display = display or Display.silent()
    whole = record.plan
    if whole.parameters <= budget:
        raise CommandError(
            f"nothing to shrink: trial {record.number} has {format_count(whole.parameters)} parameters, "
            f"which --budget {format_count(budget)} allows; lower it, or leave it out"
        )
    plan, truncated, kept = truncate(whole, tensors, budget)
    record = replace(record, ranks=dict(plan.ranks), trainable_parameters=plan.parameters)
    facts: dict[str, Any] = {
        "budget": budget,
        "parameters": plan.parameters,
        "parameters_before": whole.parameters,
        "energy_kept": kept,
        "recover_steps": recover,
    }
    if scored:
        settings = config_from_json(study.config, metric=metric, trust_remote_code=trust_remote_code)
        setup = prepare(settings, display)
        study.check_fingerprint(setup.fingerprint)
        what = f"trial {record.number}, {format_count(whole.parameters)} parameters"
        before, _ = _train_on(setup, record, whole, tensors, 0, what, display)
        what = f"truncated to {format_count(plan.parameters)} parameters, {kept:.1%} of the energy"
        after, best = _train_on(setup, record, plan, truncated, recover, what, display)
        if recover:
            where = f"at step {best.step}" if best.step else "by the truncated adapter as it was"
            score = f"validation {setup.task.metric.name} {format_value(best.value)}"
            display.note(f"recovered: {score}, reached {where}")
        record = replace(record, value=best.value, metrics=plain(best.scores))
        truncated = best.tensors
        facts["best_step"] = best.step
        recovered = best.scores if recover else None
        facts["validation"] = plain(
            {"before": before.scores, "truncated": after.scores, "recovered": recovered}
        )
    return Transplant(record, config_for(config, plan), truncated, facts)


def truncate(
    plan: RankPlan, tensors: Mapping[str, Tensor], budget: int
) -> tuple[RankPlan, dict[str, Tensor], float]:
    """Keep the singular components with the most energy per parameter, over all layers.

    ΔW changes by exactly the components that go. All layers share one scaling, so that the σ² of
    B A rank components as those of ΔW do.

    Args:
        plan: of the whole adapter.
        tensors: by PEFT's names; those that are no A or B stay as they are.
        budget: most parameters that are left.

    Returns:
        The plan that is left, which costs at most the budget; its tensors, A and B in float32;
        and the share of the energy ‖ΔW‖², summed over the layers, that they keep, in (0, 1].

    Raises:
        CommandError: the budget is below the cheapest component, or no component holds anything.
    """
    found = {layer.name: singular_factors(*_factors(tensors, layer.name)) for layer in plan.live}
    energies: dict[str, list[float]] = {name: squares.tolist() for name, (squares, _, _) in found.items()}
    costs = {layer.name: layer.cost for layer in plan.layers}
    # A component without energy is worth no parameter.
    limits = {name: sum(energy > 0 for energy in energies.get(name, ())) for name in costs}
    if not any(limits.values()):
        raise CommandError(
            "the adapter has learnt nothing, all its components are 0: there is nothing to keep"
        )
    ranks = starting_ranks(energies, costs, limits, budget)
    if not any(ranks.values()):
        least = min(costs[name] for name, known in energies.items() if any(known))
        raise CommandError(
            f"--budget {format_count(budget)} leaves nothing of this adapter: "
            f"its cheapest component costs {format_count(least)}; raise it to that at least"
        )
    left = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    for name, (_, b, a) in found.items():
        if rank := ranks[name]:
            smaller = row_order(a[:rank].float()), row_order(b[:, :rank].float())
            left |= zip(factor_keys(name), smaller, strict=True)
    kept = sum(sum(known[: ranks[name]]) for name, known in energies.items())
    return plan.with_ranks(ranks), left, kept / sum(map(sum, energies.values()))


def _factors(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """B, shape (out_features, rank), and A, shape (rank, in_features), in float64."""
    key_a, key_b = factor_keys(layer)
    return tensors[key_b].double(), tensors[key_a].double()


def _train_on(
    setup: Setup,
    record: TrialRecord,
    plan: RankPlan,
    tensors: Mapping[str, Tensor],
    steps: int,
    what: str,
    display: Display,
) -> tuple[Checkpoint, Checkpoint]:
    """Score an adapter on validation, then train it as its trial was, but at fixed ranks.

    Args:
        setup: base model, task and data.
        record: the trial, whose learning rates and order of the data hold.
        plan: what the adapter looks like.
        tensors: the adapter, by PEFT's names.
        steps: how many; at 0 the adapter is scored only.
        what: what the display calls the adapter.
        display: who watches.

    Returns:
        The adapter as it was, and the best of it and of the checkpoints on the way.
    """
    count = min(setup.config.evaluations, steps)
    points = tuple(round(steps * (i + 1) / count) for i in range(count))
    recipe = replace(setup.bench.recipe, steps=steps, evaluate_at=points)
    spec = TrialSpec.of(record.params, number=record.number, seed=record.seed, plan=plan, adaptive=False)
    state = LaneState(0, 0, plan, dict(tensors), {}, None, None)
    lane = Lane(spec, replace(setup.bench, recipe=recipe), state)
    try:
        start = _evaluate(lane, setup, what, display)
        try:
            while not lane.finished:
                lane.train()
                if lane.step in points:
                    _evaluate(lane, setup, f"recovery, step {lane.step} of {steps}", display)
        except NotFinite as error:  # what was best before it still is
            display.note(f"recovery ends early: {error}")
        assert lane.best is not None
        return start, lane.best
    finally:
        lane.close()


def _evaluate(lane: Lane, setup: Setup, what: str, display: Display) -> Checkpoint:
    """Score the lane, say so, and return the best so far."""
    value, _ = lane.evaluate()
    display.note(f"{what}: validation {setup.task.metric.name} {format_value(value)}")
    assert lane.best is not None
    return lane.best
