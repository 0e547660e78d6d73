"""The main path, to be read as a story: preflight, study, trials, verdict.

It holds what the rooms below do together and does none of their work itself. Nothing is written
before the preflight has passed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autorank.artifacts import ArtifactStore, write_json
from autorank.config import StudyConfig, config_from_json, config_to_json
from autorank.display import Display
from autorank.engine import Engine, Failed, Finished, Report
from autorank.engine.local import LocalEngine
from autorank.errors import StudyError
from autorank.halving import goes_on
from autorank.lane import TrialSpec
from autorank.lease import Lease
from autorank.preflight import Setup, check_writable, dry_run, measure_gains, prepare
from autorank.record import TrialRecord, TrialSlot
from autorank.references import FrozenBase, conclude, is_current, score_frozen_base
from autorank.study import Study, study_folder

__all__ = ["Result", "plan", "resume", "search"]

FAILURES_IN_A_ROW = 3
"""So many trials failing alike, one after the other, end the search: the next would fail too."""


@dataclass(frozen=True)
class Result:
    """A finished search: where it is stored, and everything `autorank show --json` prints."""

    folder: Path
    report: dict[str, Any]

    @property
    def best(self) -> dict[str, Any]:
        """The winner's record."""
        best: dict[str, Any] = self.report["best"]
        return best


def search(config: StudyConfig, *, display: Display | None = None) -> Result:
    """Search for the best adapter under the configuration's budget, as a new study.

    Raises:
        AutorankError: see `errors.py`; nothing is written where the preflight fails.
    """
    display = display or Display.silent()
    folder = study_folder(config.studies_dir, config.name)
    if folder.exists() and any(folder.iterdir()):
        raise StudyError(
            f"the study {config.name!r} exists in {config.studies_dir}: go on with "
            f"`autorank resume {config.name}`, or give the new one a --name"
        )
    check_writable(folder.parent)
    setup = prepare(config, display)
    frozen = score_frozen_base(setup, display)
    setup = measure_gains(setup, display)
    study = Study.create(
        folder,
        config=config_to_json(config),
        fingerprint=setup.fingerprint,
        space=setup.space,
        direction=setup.task.metric.direction,
        metric=setup.task.metric.name,
        seed=config.seed,
    )
    with study, Lease(folder):
        return _run(study, setup, frozen, display, total=config.trials, time_s=config.time_s)


def resume(
    name: str,
    *,
    studies_dir: str | Path = "studies",
    trials: int | None = None,
    time_s: float | None = None,
    display: Display | None = None,
) -> Result:
    """Go on with a stored study until it has `trials` trials in total.

    Args:
        name: the study's name.
        studies_dir: where studies are stored.
        trials: None for the number the study was asked for last.
        time_s: seconds from now after which no trial starts; None for the limit that the study
            was started with, counted anew.
        display: who watches; None for nobody.

    Raises:
        AutorankError: see `errors.py`.
    """
    display = display or Display.silent()
    folder = study_folder(studies_dir, name)
    with Study.open(folder) as study, Lease(folder):
        config = config_from_json({**study.config, "studies_dir": str(studies_dir)})
        total = trials or _asked_total(study, config)
        setup = prepare(config, display)
        study.check_fingerprint(setup.fingerprint)
        if trials is not None:
            study.log_event("trials", total=trials)
        time_s = config.time_s if time_s is None else time_s
        return _run(study, setup, None, display, total=total, time_s=time_s)


def _asked_total(study: Study, config: StudyConfig) -> int:
    """How many trials were asked for last."""
    totals = [event["total"] for event in study.events() if event.get("kind") == "trials"]
    return int(totals[-1]) if totals else config.trials


# The study


def _run(
    study: Study,
    setup: Setup,
    frozen: FrozenBase | None,
    display: Display,
    *,
    total: int,
    time_s: float | None,
) -> Result:
    """Run the trials that are missing, then read the test split and write the result."""
    for note in study.notes:
        display.note(note)
    store = ArtifactStore(study.folder / "artifacts")
    records = [record.to_json() for record in study.trials()]
    if total <= sum(record["state"] != "RUNNING" for record in records) and is_current(study):
        display.note(f"the study has its {total} trials already: --trials asks for more")
        return Result(study.folder, study.to_json())
    frozen = frozen or FrozenBase.load(store) or score_frozen_base(setup, display)
    frozen.put_on(setup)
    if not store.exists("frozen"):
        frozen.save(store)
    task = setup.task
    display.study_started(
        study.name,
        metric=task.metric.name,
        direction=task.metric.direction,
        budget=study.budget,
        total=total,
        trials=records,
        time_s=time_s,
    )
    engine = LocalEngine(setup.bench)
    try:
        _run_trials(study, setup, store, engine, display, total=total, time_s=time_s)
    finally:
        engine.close()
    display.finished()
    conclude(study, setup, store, frozen, display)
    return Result(study.folder, study.to_json())


# The trials


def _run_trials(
    study: Study,
    setup: Setup,
    store: ArtifactStore,
    engine: Engine,
    display: Display,
    *,
    total: int,
    time_s: float | None,
) -> None:
    """Ask, train, tell, until there are enough trials or the time is up."""
    began, longest = time.monotonic(), 0.0
    while True:
        spent = time.monotonic() - began
        last = time_s is not None and spent + 2 * longest > time_s
        if time_s is not None and (spent >= time_s or spent + longest > time_s) and longest > 0:
            study.log_event("stopped", why="time", spent_s=round(spent, 1))
            display.note("the time is up: no further trial starts")
            return
        slot = study.ask(total, last=last)
        if slot is None:
            return
        record = _run_trial(study, setup, store, engine, display, slot, total)
        longest = max(longest, time.monotonic() - began - spent)
        display.trial_ended(record.to_json())
        if _hopeless(study.trials()):
            study.log_event("stopped", why="failures", reason=record.reason)
            display.note(f"{FAILURES_IN_A_ROW} trials in a row failed alike: no further trial starts")
            return


def _run_trial(
    study: Study,
    setup: Setup,
    store: ArtifactStore,
    engine: Engine,
    display: Display,
    slot: TrialSlot,
    total: int,
) -> TrialRecord:
    """Train one trial to its end, whatever that is, and tell the study."""
    params, began = slot.params, time.monotonic()
    plan = study.space.starting_plan(params)
    if slot.continued:
        display.note(f"trial {slot.number} was interrupted and starts over")
    steps = setup.bench.recipe.steps
    display.trial_started(slot.number, total, params.to_json(), plan.parameters, study.budget, steps)
    engine.start(
        TrialSpec(
            slot.number,
            slot.seed,
            plan,
            params.allocation == "adaptive",
            params.learning_rate,
            params.head_learning_rate,
            params.head_scale,
        )
    )
    facts: dict[str, Any] = {"trainable_parameters": plan.parameters, "ranks": dict(plan.ranks)}
    while True:
        event = engine.advance()
        if isinstance(event, Report):
            if event.value is None:
                display.step(event.step, steps, event.loss or 0.0, event.parameters)
            elif not _keep_going(study, slot, event, steps, display):
                state = engine.pause(slot.number)
                facts |= {"steps": state.step, "samples": state.samples}
                facts |= {"trainable_parameters": state.plan.parameters, "ranks": dict(state.plan.ranks)}
                return study.tell_pruned(slot.number, facts | {"seconds": time.monotonic() - began})
        elif isinstance(event, Failed):
            facts |= {"steps": event.steps, "samples": event.samples, "seconds": time.monotonic() - began}
            return study.tell_failed(slot.number, event.reason, facts)
        elif isinstance(event, Finished):
            digest = _store(setup, store, slot.number, event)
            facts |= _finished_facts(event) | {"artifact": digest, "seconds": time.monotonic() - began}
            return study.tell_complete(slot.number, event.checkpoint.value, facts)
        else:
            raise RuntimeError(f"the engine sent {event!r}, which a search in one process cannot get")


def _keep_going(study: Study, slot: TrialSlot, event: Report, steps: int, display: Display) -> bool:
    """Store a score; at a rung, whether the trial is worth its remaining steps.

    Every evaluation comes after ranks were fixed, so no trial is stopped before its ranks have
    had their moves. A control always runs to its end: without it there is no verdict.
    """
    assert event.value is not None
    study.report(slot.number, event.step, event.value)
    best = study.best()
    display.evaluated(event.step, event.value, None if best is None else best.value)
    if event.step >= steps or slot.control_of is not None:
        return True
    peers = study.intermediate(event.step, slot.number)
    return goes_on(event.value, peers, direction=study.direction, noise=event.noise or 0.0)


def _store(setup: Setup, store: ArtifactStore, number: int, event: Finished) -> dict[str, str]:
    """Write the checkpoint as a plain PEFT adapter before the study hears of it."""
    key = f"trial-{number}"

    def fill(folder: Path) -> None:
        setup.bench.save(folder, event.checkpoint)
        if setup.task.labels is not None:
            write_json(folder / "labels.json", list(setup.task.labels))

    store.write_folder(key, fill)
    return store.digest(key)


def _finished_facts(event: Finished) -> dict[str, Any]:
    checkpoint = event.checkpoint
    return {
        "trainable_parameters": checkpoint.plan.parameters,
        "head_parameters": event.head_parameters,
        "ranks": dict(checkpoint.plan.ranks),
        "plan": checkpoint.plan.to_json(),
        "steps": event.steps,
        "samples": event.samples,
        "metrics": checkpoint.scores,
        "best_step": checkpoint.step,
        "ledger": event.ledger,
        "moved": event.moved,
    }


def _hopeless(records: Sequence[TrialRecord]) -> bool:
    """Whether the last trials all failed, and alike but for numbers."""
    tail = records[-FAILURES_IN_A_ROW:]
    if len(tail) < FAILURES_IN_A_ROW or any(record.state != "FAIL" for record in tail):
        return False
    return len({re.sub(r"[-+\d.e]+", "#", record.reason or "") for record in tail}) == 1


def plan(config: StudyConfig, *, display: Display | None = None) -> dict[str, Any]:
    """What a search would do, from the preflight and one probe step; nothing is written.

    Where trials start from the gradient it is measured, as a search would.

    Returns:
        The facts that `preflight.dry_run` lists.

    Raises:
        AutorankError: see `errors.py`.
    """
    display = display or Display.silent()
    setup = prepare(config, display)
    if setup.space.gradient_groups:
        score_frozen_base(setup, display)
        setup = measure_gains(setup, display)
    return dry_run(setup)
