"""The main path, to be read as a story: preflight, study, trials, verdict.

It holds what the rooms below do together and does none of their work itself. Nothing is written
before the preflight has passed.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autorank.artifacts import ArtifactStore, check_writable
from autorank.config import StudyConfig, config_from_json, config_to_json
from autorank.coordinator import Coordinator
from autorank.display import Display
from autorank.engine.local import LocalEngine
from autorank.engine.probe import Throughput, measure_lanes
from autorank.errors import AllTrialsFailed, CommandError, FileError, StudyError
from autorank.figures import counted, format_bytes
from autorank.folder import StudyFolder, study_folder
from autorank.lane import TrialSpec
from autorank.lease import Lease
from autorank.limits import Limits
from autorank.preflight import Setup, check_alone, check_memory, dry_run, measure_gains, prepare
from autorank.references import FrozenBase, conclude, score_frozen_base
from autorank.shelf import Shelf, forecast
from autorank.space import Space
from autorank.study import Study

__all__ = ["Result", "plan", "resume", "search"]


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
    check_writable(folder.parent, "--studies-dir")
    StudyFolder(folder).check_free()
    setup = prepare(config, display)
    limits = _limits(config)
    _check_able(limits, setup, display)
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
        return _run(study, setup, frozen, display, limits)


def resume(
    name: str,
    *,
    studies_dir: str | Path = "studies",
    trials: int | None = None,
    time_s: float | None = None,
    samples: int | None = None,
    target: float | None = None,
    plateau: int | None = None,
    lanes: int | str | None = None,
    metric: str | None = None,
    trust_remote_code: bool = False,
    display: Display | None = None,
) -> Result:
    """Go on with a stored study until it has `trials` trials in total, or another limit is reached.

    Args:
        name: the study's name.
        studies_dir: where studies are stored.
        trials: how many there are to be in total. This and all other limits: None for what the
            study was asked for last.
        time_s: seconds from now after which it ends; None for the limit that the study was started
            with, counted anew.
        samples: training samples in total, see `limits.Limits`, like those below.
        target: a validation score.
        plateau: trials without a better score.
        lanes: trials that train together, or `auto`; None for what the study was started with.
        metric: the study's, if it is a function of the user's own, which is run only where it is named.
        trust_remote_code: run code that comes with the model, where the study does.
        display: who watches; None for nobody.

    Raises:
        AutorankError: see `errors.py`.
    """
    display = display or Display.silent()
    check_alone()
    if target is not None and not math.isfinite(target):
        raise CommandError(f"target is {target}: it must be a finite number")
    folder = study_folder(studies_dir, name)
    with Study.open(folder) as study, Lease(folder):
        here = {"studies_dir": str(studies_dir), **({} if lanes is None else {"lanes": lanes})}
        config = config_from_json(
            {**study.config, **here}, metric=metric, trust_remote_code=trust_remote_code
        )
        asked = {"trials": trials, "samples": samples, "target": target, "plateau": plateau}
        given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        limits = replace(_limits(config), **{**_asked_before(study), **given})
        limits = limits if time_s is None else replace(limits, time_s=time_s)
        setup = prepare(config, display)
        study.check_fingerprint(setup.fingerprint)
        _check_able(limits, setup, display)
        if given:
            study.log_event("limits", **given)
        return _run(study, setup, None, display, limits)


def _limits(config: StudyConfig) -> Limits:
    return Limits(config.trials, config.time_s, config.samples, config.target, config.plateau)


def _check_able(limits: Limits, setup: Setup, display: Display) -> None:
    """Refuse limits without room for a trial, a sampler that is not installed, and too large a batch."""
    if setup.config.sampler == "gp" and importlib.util.find_spec("scipy") is None:
        raise CommandError("sampler gp needs scipy, which is not installed: `pip install scipy`, or use tpe")
    recipe = setup.bench.recipe
    limits.check(recipe.steps * min(recipe.batch_size, len(setup.bench.train)))
    check_memory(setup, display)


def _asked_before(study: Study) -> dict[str, Any]:
    """The limits that were given when the study was gone on with, the last of each."""
    asked: dict[str, Any] = {}
    for event in study.events():
        if event.get("kind") == "limits":
            asked |= {key: event[key] for key in ("trials", "samples", "target", "plateau") if key in event}
    counts = [asked[key] for key in ("trials", "samples", "plateau") if key in asked]
    if not all(type(count) is int and count > 0 for count in counts) or not isinstance(
        asked.get("target", 0.0), (int, float)
    ):
        raise StudyError(
            f"the limits in {study.folder / 'events.jsonl'} cannot be used ({asked}): restore it from a copy"
        )
    return asked


# The study


def _run(study: Study, setup: Setup, frozen: FrozenBase | None, display: Display, limits: Limits) -> Result:
    """Run the trials that are missing, then read the test split and write the result."""
    for note in study.notes:
        display.note(note)
    store = ArtifactStore(study.folder / "artifacts")
    records = study.trials()
    ended = sum(record.state != "RUNNING" for record in records)
    if limits.trials <= ended == len(records) and study.is_scored():
        display.note(f"the study has {counted(ended, 'trial')} already: a larger --trials asks for more")
        return Result(study.folder, study.to_json())
    frozen = frozen or FrozenBase.load(store) or score_frozen_base(setup, display)
    frozen.put_on(setup)
    if not store.exists("frozen"):
        frozen.save(store)
    if all(event.get("kind") != "usage" for event in study.events()):
        study.log_event("usage", **setup.usage)
    bench, task, keep = setup.bench, setup.task, setup.config.keep
    most = forecast(bench, study.space, trials=limits.trials, keep=keep)
    display.note(f"the study's folder holds at most {format_bytes(most)}: the best {keep} adapters stay")
    display.study_started(
        study.name,
        metric=task.metric.name,
        direction=task.metric.direction,
        budget=study.budget,
        total=limits.trials,
        trials=[record.to_json() for record in records],
        time_s=limits.time_s,
    )
    lanes, measured = _choose_lanes(setup, study.space, limits.trials, display)
    if measured:
        study.log_event("lanes", chosen=lanes, measured=[one.to_json() for one in measured])
    engine = LocalEngine(bench, lanes=lanes)
    shelf = Shelf(store, bench, task.labels, keep=keep)
    try:
        Coordinator(study, bench, shelf, engine, display, limits).run()
    except FileError as error:
        raise FileError(
            f"{error}; what was stored before is whole, and `autorank resume {study.name}` goes on from there"
        ) from error
    finally:
        engine.close()
    display.finished()
    if study.best() is None and any(record.state == "RUNNING" for record in study.trials()):
        stops = [event for event in study.events() if event["kind"] == "stopped"]
        if stops and stops[-1].get("why") == "failures":
            raise AllTrialsFailed(
                f"no trial has finished, and the last ones failed alike ({stops[-1].get('reason')}): once "
                f"that is mended, `autorank resume {study.name}` goes on with those that wait"
            )
        display.note(f"no trial has finished yet: `autorank resume {study.name}` goes on")
    elif not study.is_scored():
        conclude(study, setup, store, frozen, display)
    return Result(study.folder, study.to_json())


def _choose_lanes(setup: Setup, space: Space, trials: int, display: Display) -> tuple[int, list[Throughput]]:
    """How many trials train together, as asked for or as pays on this machine, and what was measured."""
    asked, device = setup.config.lanes, setup.base.device
    if asked is None or setup.base.recomputes:
        asked = "auto" if device.type == "cuda" and not setup.base.recomputes else 1
    if isinstance(asked, int):
        if asked > 1:
            display.note(f"{asked} lanes: so many trials train together, in one pass where that can be")
        return asked, []
    specs = [
        TrialSpec.of(params, number=0, seed=setup.config.seed, plan=space.starting_plan(params))
        for params in space.startup()
    ]
    chosen, measured = measure_lanes(setup.bench, specs, most=max(1, trials - 1))
    figures = ", ".join(
        f"{one.lanes}: {f'{one.samples_per_s:.3g}' if one.samples_per_s else one.reason}" for one in measured
    )
    display.note(f"{counted(chosen, 'lane')}; measured samples per second by lanes: {figures}")
    return chosen, measured


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
    _check_able(_limits(config), setup, display)
    if setup.space.gradient_groups:
        score_frozen_base(setup, display)
        setup = measure_gains(setup, display)
    lanes, _ = _choose_lanes(setup, setup.space, config.trials, display)
    return dry_run(setup, lanes)
