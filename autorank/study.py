"""A stored study: trials are asked for, reported on and told about, and nothing is lost.

Optuna's home, with `space.py`, `sampler.py` and `database.py`. One process writes, each trial
appears whole in a single commit, and a killed study opened again goes on as if it had not been.
It trains nothing and draws no verdict.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from autorank.cost import cost_of
from autorank.database import (
    copy_database,
    create_database,
    network_filesystem,
    open_database,
    storage_errors,
)
from autorank.errors import AllTrialsFailed, AutorankError, StudyError
from autorank.fingerprint import check_fingerprint
from autorank.folder import StudyFolder, study_folder, study_names
from autorank.lease import owner
from autorank.record import Score, TrialRecord, TrialSlot, best_of, plain
from autorank.sampler import Direction, quiet_optuna
from autorank.slot import SlotContent, control_slot, fill_slot, untried
from autorank.space import Space

__all__ = ["Study", "list_studies", "study_folder"]

_FORMAT = 1
_MOUNTS = Path("/proc/mounts")


class Study:
    """A study in its folder. Make one with `create`, `open` or `open_read_only`; close it after use."""

    def __init__(self, folder: StudyFolder, storage: RDBStorage) -> None:
        self.folder = folder.path
        self.name = folder.name
        self._files = folder
        self._storage = storage
        self._read: list[FrozenTrial] | None = None
        try:
            with self._reading():
                self._id = storage.get_all_studies()[0]._study_id
                self._read_facts(storage.get_study_user_attrs(self._id).get("autorank"))
                self._check_direction(storage.get_study_directions(self._id))
            self.trials()
        except BaseException:
            self.close()
            raise

    # Opening and closing

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        fingerprint: Mapping[str, str],
        space: Space,
        direction: Direction,
        metric: str,
        seed: int,
    ) -> Study:
        """Make a new study. It appears at once and complete, or not at all.

        Raises:
            StudyError: there is a study of that name already.
            FileError: the folder cannot be written.
        """
        facts = {
            "format": _FORMAT,
            "metric": metric,
            "direction": direction,
            "seed": seed,
            "space": space.to_json(),
            "fingerprint": dict(fingerprint),
        }

        def fill(path: Path) -> None:
            storage = create_database(path)
            try:
                with storage_errors(path), quiet_optuna():
                    study_id = storage.create_new_study([StudyDirection[direction.upper()]], folder.name)
                    storage.set_study_user_attr(study_id, "autorank", facts)
            finally:
                _close(storage)

        StudyFolder(folder).create(config, fill)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, str] | None = None) -> Study:
        """Open a study to go on with it, checking its fingerprint where one is given.

        Raises:
            StudyError: it is missing, damaged, not a study, or not the same study any more.
            FileError: it cannot be read or written.
        """
        files = StudyFolder(folder)
        files.check()
        study = cls(files, open_database(files.database))
        if fingerprint is not None:
            try:
                study.check_fingerprint(fingerprint)
            except BaseException:
                study.close()
                raise
        return study

    @classmethod
    def open_read_only(cls, folder: Path) -> Study:
        """Open a copy of a study in memory, to look at it; also while it is being written.

        Raises:
            StudyError, FileError: as `open`.
        """
        files = StudyFolder(folder)
        files.check()
        return cls(files, copy_database(files.database))

    def close(self) -> None:
        """Close the database. Everything told has long been stored."""
        _close(self._storage)

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_fingerprint(self, given: Mapping[str, str]) -> None:
        """Make sure that this is still the study that was started.

        Raises:
            StudyError: facts differ; the message lists each.
        """
        check_fingerprint(self.name, self.fingerprint, given)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was stored, for `config.config_from_json`."""
        return self._files.config()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about where the study lies."""
        try:
            mounts = _MOUNTS.read_text(errors="replace")
        except OSError:  # not every system tells what is mounted
            return ()
        kind = network_filesystem(self.folder.resolve(), mounts)
        if kind is None:
            return ()
        return (f"{self.folder} lies on a network file system ({kind}), where SQLite's locks may not hold",)

    # Asking

    def unfinished(self) -> list[TrialSlot]:
        """The trials that have not ended, by number: in training, paused, or interrupted by a kill."""
        self._read = None  # what was read before the lease was taken may be old
        return [self._slot(trial) for trial in self._frozen() if trial.state == TrialState.RUNNING]

    def ask(self, total: int) -> TrialSlot | None:
        """A new trial, or None when the study has `total` trials, or everything was tried.

        What it trains is said in `slot.fill_slot`; the last one is the paired control.
        """
        self._read = None
        count = len(self._frozen())
        if count >= total:
            return None
        control = self.ask_control() if count == total - 1 or self.left() == 0 else None
        content = None if control is not None else self._fill_slot()
        return control if content is None else self._add(content)

    def left(self) -> int | None:
        """How many sets of parameters were not tried yet; None where they cannot be counted."""
        left = untried(self.space, self.trials())
        return None if left is None else len(left)

    def ask_control(self) -> TrialSlot | None:
        """The paired control of the best trial as a new trial; None where there is nothing to pair."""
        control = control_slot(self.space, self.trials(), direction=self.direction)
        return None if control is None else self._add(control)

    def _fill_slot(self) -> SlotContent | None:
        trials = self._frozen()
        return fill_slot(
            self.space,
            [self._record(trial) for trial in trials],
            [_as_history(trial) for trial in trials if trial.state != TrialState.FAIL],
            direction=self.direction,
            study_seed=self.seed,
            sampler="gp" if self.config.get("sampler") == "gp" else "tpe",
        )

    def _add(self, content: SlotContent) -> TrialSlot:
        """Store a new trial."""
        template = create_trial(
            state=TrialState.RUNNING,
            params=self.space.to_optuna(content.params),
            distributions=self._distributions,
            user_attrs={"slot": len(self._frozen()), "seed": content.seed, "control_of": content.control_of},
        )
        # One commit: a trial is stored with all its parameters, or it is not there.
        with self._writing():
            self._storage.create_new_trial(self._id, template)
        return self._slot(self._frozen()[-1])

    def _slot(self, trial: FrozenTrial) -> TrialSlot:
        record = self._record(trial)
        return TrialSlot(record.number, record.slot, record.params, record.seed, record.control_of)

    # Telling

    def report(self, number: int, step: int, score: Score) -> None:
        """Store a score of a running trial. The first of a step stands, for it may have been acted on.

        A score that is not finite is not stored: nothing can be compared with it.
        """
        trial = self._frozen()[number]
        if step in trial.intermediate_values or not math.isfinite(score.value):
            return
        facts = {key: fact for key, fact in asdict(score).items() if key != "value"}
        told = {**trial.user_attrs.get("scores", {}), str(step): facts}
        with self._writing():
            # The value last: with it the score is there.
            trial_id = self._trial_id(number)
            self._storage.set_trial_user_attr(trial_id, "scores", told)
            self._storage.set_trial_intermediate_value(trial_id, step, float(score.value))

    def tell_complete(self, number: int, value: float, record: Mapping[str, Any]) -> TrialRecord:
        """Store the value of a finished trial and what there is to know about it.

        A value that is not finite, or a trial over the budget, is stored as FAIL with the reason.
        `record` holds `trainable_parameters`, and as far as known `head_parameters`, `ranks`,
        `steps`, `samples`, `seconds` and `metrics`; other keys are kept as they are.
        """
        parameters = int(record["trainable_parameters"])
        if not math.isfinite(value):
            settings = ", ".join(f"{k} {v}" for k, v in self.trial(number).params.to_json().items())
            reason = f"the value is {value} after {record.get('steps', '?')} steps ({settings})"
            return self.tell_failed(number, reason, record)
        if parameters > self.budget:
            reason = f"over budget: {parameters:,} trainable parameters, the budget is {self.budget:,}"
            return self.tell_failed(number, reason, record)
        return self._tell(number, TrialState.COMPLETE, float(value), record, None)

    def tell_pruned(self, number: int, record: Mapping[str, Any]) -> TrialRecord:
        """Store that a trial was stopped early; its value is its last report."""
        reports = self._frozen()[number].intermediate_values
        value = reports[max(reports)] if reports else None
        return self._tell(number, TrialState.PRUNED, value, record, None)

    def tell_failed(self, number: int, reason: str, record: Mapping[str, Any] | None = None) -> TrialRecord:
        """Store that a trial failed, and why."""
        return self._tell(number, TrialState.FAIL, None, record or {}, reason)

    def _tell(
        self,
        number: int,
        state: TrialState,
        value: float | None,
        record: Mapping[str, Any],
        reason: str | None,
    ) -> TrialRecord:
        """End a trial; one that has ended stays as it is, for the database is the truth."""
        stored = self.trial(number)
        if stored.state != "RUNNING":
            return stored
        facts = {"record": plain(record), "reason": reason}
        # Read as it will stand there: what could not be read is never written.
        trial = copy.copy(self._frozen()[number])
        trial.state, trial.user_attrs = state, {**trial.user_attrs, **facts}
        self._record(trial)
        trial_id = self._trial_id(number)
        with self._writing():
            for key, fact in facts.items():
                self._storage.set_trial_user_attr(trial_id, key, fact)
            self._storage.set_trial_state_values(trial_id, state, None if value is None else [value])
        return self.trial(number)

    # Looking

    def trials(self) -> list[TrialRecord]:
        """All trials, by number."""
        return [self._record(trial) for trial in self._frozen()]

    def trial(self, number: int) -> TrialRecord:
        """One trial.

        Raises:
            StudyError: there is no such trial.
        """
        trials = self._frozen()
        if not 0 <= number < len(trials):
            there = f"it has 0 to {len(trials) - 1}" if trials else "it has none yet"
            raise StudyError(f"study {self.name!r} has no trial {number}: {there}")
        return self._record(trials[number])

    def best(self) -> TrialRecord | None:
        """The best trial that is COMPLETE, finite and within the budget; the first of equals."""
        return best_of(self.trials(), self.direction, self.budget)

    def winner(self) -> TrialRecord:
        """The best trial, which must exist.

        Raises:
            AllTrialsFailed: every trial failed; the reasons are counted.
            StudyError: no trial has finished, or none is within the budget.
        """
        best = self.best()
        if best is not None:
            return best
        ended = [record for record in self.trials() if record.state != "RUNNING"]
        sizes = [record.trainable_parameters or 0 for record in ended]
        if ended and min(sizes) > self.budget:
            raise StudyError(
                f"every trial of study {self.name!r} is over its budget of {self.budget:,} parameters; "
                f"the smallest has {min(sizes):,}"
            )
        if ended and all(record.state == "FAIL" for record in ended):
            kinds = Counter(record.failure for record in ended)
            first = {record.failure: record.reason or "unknown" for record in reversed(ended)}
            counted = "; ".join(f"{count} x {first[kind]}" for kind, count in kinds.most_common())
            failed = "the only trial" if len(ended) == 1 else f"all {len(ended)} trials"
            raise AllTrialsFailed(
                f"{failed} of study {self.name!r} failed: {counted}; mend what they failed "
                "of, and start another study with --name"
            )
        raise StudyError(
            f"study {self.name!r} has no finished trial yet ({len(ended)} ended early): "
            f"go on with `autorank resume {self.name}`"
        )

    def pair_of(self, record: TrialRecord) -> TrialRecord | None:
        """The trial that differs from this one in nothing but allocation, if it was run."""
        return next((other for other in self.trials() if other.is_pair_of(record)), None)

    def to_json(self) -> dict[str, Any]:
        """The whole study as a JSON object, as `show` gives it."""
        best, result = self.best(), self.result()
        trials = [record.to_json() for record in self.trials()]
        references = (result or {}).get("references", {})
        return {
            "name": self.name,
            "metric": self.metric,
            "direction": self.direction,
            "budget": self.budget,
            "trials": trials,
            "best": None if best is None else best.to_json(),
            "references": {"frozen_base": None, "uniform": None, "control": None, **references},
            "cost": cost_of(trials, self.direction),
            "result": result,
            "scored": self.is_scored(),
            "owner": owner(self.folder),
        }

    # What is kept beside the trials

    def set_result(self, result: Mapping[str, Any]) -> None:
        """Store the result of the study; an older one is replaced."""
        with self._writing():
            self._storage.set_study_user_attr(self._id, "result", plain(result))

    def result(self) -> dict[str, Any] | None:
        """The stored result, if there is one."""
        with self._reading():
            result = self._storage.get_study_user_attrs(self._id).get("result")
            if result is not None:
                _check_result(result)
        return result

    def is_scored(self) -> bool:
        """Whether the stored result, winner and references scored, is that of the trials there are."""
        result, best, trials = self.result(), self.best(), self.trials()
        return (
            result is not None
            and best is not None
            and result["best"] == best.number
            and result["trials"] == len(trials)
            and result.get("ended") == sum(record.state != "RUNNING" for record in trials)
        )

    def log_event(self, kind: str, **facts: Any) -> None:
        """Append what happened and when, such as a decision that depended on the clock."""
        self._files.log_event(kind, cast(dict[str, Any], plain(facts)))

    def events(self) -> list[dict[str, Any]]:
        """All events, in order."""
        return self._files.events()

    # Below: the database

    def _frozen(self) -> list[FrozenTrial]:
        """All trials as Optuna has them, by number; nobody else writes, so what was read holds."""
        if self._read is None:
            with self._reading():
                self._read = self._storage.get_all_trials(self._id, deepcopy=False)
        return self._read

    def _trial_id(self, number: int) -> int:
        with self._reading():
            return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        with self._reading():
            if trial.distributions != self._distributions:
                raise StudyError(
                    f"trial {trial.number} of study {self.name!r} has other dimensions than the stored "
                    "space: something else made or changed it. Restore the study from a copy"
                )
            value = trial.values[0] if trial.values else None
            return TrialRecord.from_stored(
                self.space,
                trial.number,
                trial.state.name,
                value,
                trial.params,
                trial.user_attrs,
                trial.intermediate_values,
            )

    def _read_facts(self, facts: Any) -> None:
        if not isinstance(facts, dict) or "format" not in facts:
            raise StudyError(
                f"{self._files.database} is an Optuna study that autorank did not make: "
                "name a study that autorank made"
            )
        if facts["format"] != _FORMAT:
            raise StudyError(
                f"{self._files.database} has format {facts['format']!r}, this autorank reads {_FORMAT}: "
                "use the autorank version that made it"
            )
        self.metric = str(facts["metric"])
        self.direction = cast(Direction, facts["direction"])
        self.seed = int(facts["seed"])
        self.fingerprint = {str(key): str(value) for key, value in facts["fingerprint"].items()}
        self.space = Space.from_json(facts["space"])
        self._move_dropout()
        self.budget = self.space.budget
        self._distributions = self.space.distributions()

    def _move_dropout(self) -> None:
        """Read a study of the time when dropout was one setting beside the space: it is of the space now."""
        stored = float(self.fingerprint.pop("dropout", 0.0))
        if stored:
            self.space = replace(self.space, fixed={"dropout": stored})
            self.fingerprint["space.dropout"] = str(stored)

    def _check_direction(self, directions: list[StudyDirection]) -> None:
        found = [direction.name.lower() for direction in directions]
        if found != [self.direction]:
            raise StudyError(
                f"{self._files.database} has the directions {', '.join(found)}, but the study was made to "
                f"{self.direction} {self.metric}: it was changed. Restore it from a copy"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._read = None
        with storage_errors(self._files.database), quiet_optuna():
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What cannot be read is one error, whatever Optuna or JSON made of it."""
        try:
            with storage_errors(self._files.database), quiet_optuna():
                yield
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise StudyError(
                f"{self._files.database} holds what autorank did not write ({error}): restore it from a copy"
            ) from error


def _check_result(result: Any) -> None:
    """Refuse a result that `references.conclude` did not write.

    Raises:
        TypeError: a part is of another kind.
    """
    figures = [result.get("test")]
    for reference in result.get("references", {}).values():
        figures += [] if reference is None else [reference.get(name) for name in _FIGURES]
    numbers = [result.get("best"), result.get("trials")]
    numbers += [value for found in figures if found is not None for value in found.values()]
    if not all(value is None or isinstance(value, (int, float)) for value in numbers):
        raise TypeError("a figure of the result is no number")


_FIGURES = ("validation", "test", "difference", "test_difference")
"""What the result tells of a reference, each numbers by name."""


def _as_history(trial: FrozenTrial) -> FrozenTrial:
    """A trial as the sampler shall see it: one that is on its way counts by the scores it has.

    Optuna takes RUNNING trials for bad ones. That keeps lanes apart until there is a score, and
    then it would hold against a trial that it is paused.
    """
    if trial.state != TrialState.RUNNING or not trial.intermediate_values:
        return trial
    seen = copy.copy(trial)
    seen.state = TrialState.PRUNED
    return seen


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def list_studies(studies_dir: str | Path) -> list[dict[str, Any]]:
    """A line about each study there is, by name; a damaged one has an `error` and hides no other."""
    return [_summary(study_folder(studies_dir, name)) for name in study_names(studies_dir)]


def _summary(folder: Path) -> dict[str, Any]:
    try:
        with Study.open_read_only(folder) as study:
            states = Counter(record.state for record in study.trials())
            best = study.best()
            return {
                "name": study.name,
                **{key: study.config.get(key) for key in ("model", "data")},
                "metric": study.metric,
                "direction": study.direction,
                "budget": study.budget,
                "trials": states.total(),
                "states": dict(states),
                "best": None if best is None else best.value,
                "scored": study.is_scored(),
                "owner": owner(folder),
                "error": None,
            }
    except AutorankError as error:
        return {"name": folder.name, "error": str(error)}
