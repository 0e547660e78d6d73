"""What to try next: TPE, or a Gaussian process, on a copy of the study's history, in memory.

A proposal is a pure function of the history, the space and a seed. So a study that was killed
and opened again proposes what it would have proposed, and no half-made trial is ever stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from autorank.space import Space, TrialParams

__all__ = ["Direction", "Sampler", "propose", "quiet_optuna"]

Direction = Literal["maximize", "minimize"]
Sampler = Literal["tpe", "gp"]

# With fewer finished trials than this there is nothing to model, and the draw is random.
_LEAST_HISTORY = 2


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's log to errors within the block; the level before is restored."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def propose(
    space: Space,
    history: Sequence[FrozenTrial],
    *,
    direction: Direction,
    seed: int,
    fixed: Mapping[str, str],
    sampler: Sampler = "tpe",
) -> TrialParams:
    """Propose the parameters of the next trial.

    Multivariate TPE (Optuna's, after arXiv 2304.11127) over every dimension that is not fixed.
    Running trials count as bad ones (the constant liar), so that lanes do not try the same thing.
    Or Optuna's Gaussian process with expected improvement, which knows values alone: trials that were
    stopped count with their last report, and running ones not at all.

    Args:
        space: What a trial may be.
        history: COMPLETE, PRUNED and RUNNING trials of the space, by number.
        direction: Which values are better.
        seed: All that the draw depends on besides the history.
        fixed: Dimensions that are given, with their values.
        sampler: Who proposes.
    """
    free = {name: dist for name, dist in space.distributions().items() if name not in fixed}
    known = [_narrowed(trial, set(free)) for trial in history]
    with quiet_optuna():
        if sampler == "gp":
            known = [trial for trial in map(_valued, known) if trial is not None]
        study = optuna.create_study(direction=direction, sampler=_sampler(sampler, seed))
        study.add_trials(known)
        drawn: dict[str, Any] = study.ask(free).params
    return space.from_optuna({**drawn, **fixed})


def _sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    if name == "gp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.GPSampler(
                n_startup_trials=_LEAST_HISTORY, deterministic_objective=False, seed=seed
            )
    return optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, n_startup_trials=_LEAST_HISTORY, seed=seed
    )


def _valued(trial: FrozenTrial) -> FrozenTrial | None:
    """A trial as one that came to the last value it has; None where it has none."""
    reports = trial.intermediate_values
    if trial.state == TrialState.COMPLETE or not reports:
        return trial if trial.state == TrialState.COMPLETE else None
    return create_trial(value=reports[max(reports)], params=trial.params, distributions=trial.distributions)


def _narrowed(trial: FrozenTrial, names: set[str]) -> FrozenTrial:
    """A copy of a trial with these parameters alone and none of its attributes."""
    return create_trial(
        state=trial.state,
        values=trial.values,
        params={name: value for name, value in trial.params.items() if name in names},
        distributions={name: dist for name, dist in trial.distributions.items() if name in names},
        intermediate_values=trial.intermediate_values,
    )
