from __future__ import annotations

import logging

import numpy
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from study_world import make_space, score

from autorank.sampler import propose, quiet_optuna
from autorank.space import Space


def history(space: Space, states: tuple[str, ...] = ("COMPLETE",) * 3) -> list[FrozenTrial]:
    trials = []
    for params, state in zip(space.startup(), states, strict=True):
        trials.append(
            create_trial(
                state=TrialState[state],
                value=score(params) if state == "COMPLETE" else None,
                params=space.to_optuna(params),
                distributions=space.distributions(),
                intermediate_values={1: score(params)},
                user_attrs={"seed": 1},
                system_attrs={"tpe:relative_params:0": "not JSON"},
            )
        )
    return trials


def test_what_is_fixed_is_kept_and_the_rest_is_drawn() -> None:
    space = make_space()
    for allocation in ("uniform", "adaptive"):
        drawn = propose(space, history(space), direction="maximize", seed=1, fixed={"allocation": allocation})
        assert drawn.allocation == allocation
        assert drawn not in space.startup()


def test_a_space_with_nothing_to_draw_proposes_its_only_point() -> None:
    space = make_space(
        rank=1,
        scaling=1,
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        head_scale=1.0,
        target_modules="mlp",
        allocation="uniform",
    )
    only = space.startup()[0]
    trial = create_trial(
        state=TrialState.COMPLETE,
        value=1.0,
        params=space.to_optuna(only),
        distributions=space.distributions(),
    )
    for trials in ([], [trial] * 3):
        assert propose(space, trials, direction="minimize", seed=0, fixed={"allocation": "uniform"}) == only


def test_running_and_pruned_trials_are_part_of_the_history() -> None:
    space = make_space()
    mixed = history(space, ("COMPLETE", "PRUNED", "RUNNING"))
    drawn = [
        [propose(space, trials, direction="maximize", seed=seed, fixed={}) for seed in range(3)]
        for trials in (mixed, mixed, mixed[:2])
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_no_global_random_state_is_touched() -> None:
    space = make_space()
    before = numpy.random.get_state(legacy=False)  # noqa: NPY002
    propose(space, history(space), direction="maximize", seed=1, fixed={})
    after = numpy.random.get_state(legacy=False)  # noqa: NPY002
    assert str(before) == str(after)


def test_optuna_is_quiet_inside_and_as_it_was_outside(capsys: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(logging.INFO)
    with pytest.raises(RuntimeError), quiet_optuna():
        assert optuna.logging.get_verbosity() == logging.ERROR
        raise RuntimeError
    assert optuna.logging.get_verbosity() == logging.INFO
    propose(make_space(), [], direction="maximize", seed=1, fixed={})
    assert capsys.readouterr() == ("", "")
