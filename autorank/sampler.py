"""What to try next: TPE on a copy of the study's history, in memory.

A proposal is a pure function of the history, the space and a seed. So a study that was killed
and opened again proposes what it would have proposed, and no half-made trial is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, create_trial

from autorank.space import Space, TrialParams

__all__ = ["Direction", "propose", "quiet_optuna"]

Direction = Literal["maximize", "minimize"]

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
) -> TrialParams:
    """Propose the parameters of the next trial.

    Multivariate TPE (Optuna's, after arXiv 2304.11127) over every dimension that is not fixed.
    Running trials count as bad ones (the constant liar), so that lanes do not try the same thing.

    Args:
        space: What a trial may be.
        history: COMPLETE, PRUNED and RUNNING trials of the space, by number.
        direction: Which values are better.
        seed: All that the draw depends on besides the history.
        fixed: Dimensions that are given, with their values.
    """
    free = {name: dist for name, dist in space.distributions().items() if name not in fixed}
    with quiet_optuna():
        sampler = optuna.samplers.TPESampler(
            multivariate=True, constant_liar=True, n_startup_trials=_LEAST_HISTORY, seed=seed
        )
        study = optuna.create_study(direction=direction, sampler=sampler)
        study.add_trials([_narrowed(trial, set(free)) for trial in history])
        drawn: dict[str, Any] = study.ask(free).params
    return space.from_optuna({**drawn, **fixed})


def _narrowed(trial: FrozenTrial, names: set[str]) -> FrozenTrial:
    """A copy of a trial with these parameters alone and none of its attributes."""
    return create_trial(
        state=trial.state,
        values=trial.values,
        params={name: value for name, value in trial.params.items() if name in names},
        distributions={name: dist for name, dist in trial.distributions.items() if name in names},
        intermediate_values=trial.intermediate_values,
    )
