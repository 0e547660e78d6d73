from __future__ import annotations

import logging

import numpy
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from study_world import make_space, score

from autorank.sampler import Sampler, propose, quiet_optuna
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


def test_a_gaussian_process_proposes_from_every_score_and_knows_no_running_trial() -> None:
    space = make_space()
    mixed = history(space, ("COMPLETE", "PRUNED", "RUNNING"))
    running = create_trial(
        state=TrialState.RUNNING,
        params=space.to_optuna(space.startup()[0]),
        distributions=space.distributions(),
    )

    def drawn(trials: list[FrozenTrial]) -> object:
        return propose(space, trials, direction="maximize", seed=0, fixed={}, sampler="gp")

    assert drawn(mixed) == drawn(mixed) == drawn([*mixed, running])
    assert drawn(mixed) != propose(space, mixed, direction="maximize", seed=0, fixed={})
    assert drawn(mixed) != drawn(mixed[:2])
    fixed = {"allocation": "adaptive"}
    given = propose(space, mixed, direction="maximize", seed=0, fixed=fixed, sampler="gp")
    assert given.allocation == "adaptive"


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_no_global_random_state_is_touched(sampler: Sampler) -> None:
    space = make_space()
    before = numpy.random.get_state(legacy=False)  # noqa: NPY002
    torch_before = torch.get_rng_state()
    propose(space, history(space), direction="maximize", seed=1, fixed={}, sampler=sampler)
    assert torch.equal(torch_before, torch.get_rng_state())
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
