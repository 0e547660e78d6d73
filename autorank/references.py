"""What the study came to: the frozen base, the winner and its references, scored side by side.

The test split is read here and nowhere else. Trials are not trained here; the sentence that
people read is made in `report.py` from the result stored here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autorank.artifacts import ArtifactStore, read_json, write_json
from autorank.display import Display
from autorank.errors import ModelError, StudyError
from autorank.evaluate import Evaluation, paired_difference
from autorank.head import fit_probe, frozen_features, warm_start
from autorank.preflight import Setup
from autorank.record import TrialRecord, best_of
from autorank.study import Study
from autorank.tasks import Batch, HeadTask

__all__ = ["FrozenBase", "conclude", "score_frozen_base"]


@dataclass(frozen=True)
class FrozenBase:
    """The base model as it is before any trial: the probe's head, where there is one, and its scores."""

    head: dict[str, Tensor]
    scores: dict[str, float]

    def put_on(self, setup: Setup) -> None:
        """Give the base model this head."""
        if setup.bench.head is not None:
            warm_start(setup.base.model, setup.bench.head, self.head["weight"], self.head.get("bias"))

    def save(self, store: ArtifactStore) -> None:
        """Store it, so that a study that is resumed goes on from the very same head."""

        def fill(folder: Path) -> None:
            write_json(folder / "scores.json", self.scores)
            if self.head:
                save_file(self.head, str(folder / "head.safetensors"))

        store.write_folder("frozen", fill)

    @classmethod
    def load(cls, store: ArtifactStore) -> FrozenBase | None:
        """What `save` stored; None where a kill came before.

        Raises:
            StudyError: it is damaged.
        """
        if not store.exists("frozen"):
            return None
        folder = store.path("frozen")
        path, scores = folder / "head.safetensors", read_json(folder / "scores.json")
        try:
            head = load_file(str(path)) if path.exists() else {}
            if head and "weight" not in head:
                raise ValueError("no weight")
            found = {str(name): float(score) for name, score in scores.items()}
        except (SafetensorError, AttributeError, TypeError, ValueError) as error:
            raise StudyError(f"{folder} cannot be read ({error}): restore it from a copy") from error
        return cls(head, found)


def score_frozen_base(setup: Setup, display: Display) -> FrozenBase:
    """Solve the linear probe on the base's features, make it the head, and score the validation split.

    Linear probing, then fine-tuning: arXiv 2202.10054. Without a head the base is scored as it is.

    Raises:
        ModelError: the base model's scores are not finite.
    """
    head: dict[str, Tensor] = {}
    if setup.bench.head is not None:
        display.note("solving the linear probe on the frozen base's features")
        weight, bias = _solve_probe(setup, setup.bench.head, display)
        head = {"weight": weight.contiguous()} | ({} if bias is None else {"bias": bias.contiguous()})
    frozen = FrozenBase(head, {})
    frozen.put_on(setup)
    frozen = replace(frozen, scores=setup.evaluate(setup.bench.validation).scores)
    metric = setup.task.metric.name
    if not all(math.isfinite(score) for score in frozen.scores.values()):
        raise ModelError(
            f"the base model {setup.base.source} scores {frozen.scores[metric]} on validation before any "
            "training: its weights are damaged, or its precision is too low for them; check the model, or "
            "try --dtype float32"
        )
    display.note(f"frozen base: validation {metric} {frozen.scores[metric]:.4f}")
    return frozen


def _solve_probe(setup: Setup, name: str, display: Display) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear probe on what the final linear layer reads."""
    task, seed = setup.task, setup.config.seed
    assert isinstance(task, HeadTask)
    features, labels = frozen_features(setup.base.model, name, _batches(setup), seed=seed)
    has_bias = getattr(setup.base.model.get_submodule(name), "bias", None) is not None
    if task.probe == "ridge" and not has_bias and labels.mean().abs() > 3 * labels.std():
        display.note(
            f"the head {name} has no bias, and the numbers lie about {labels.mean():g}, far from 0 for their "
            f"spread of {labels.std():g}: subtract that from them to train better"
        )
    return fit_probe(task.probe, features, labels, task.outputs, bias=has_bias, seed=seed)


def _batches(setup: Setup) -> Iterator[Batch]:
    """The training rows in order, alike lengths together, for the frozen features."""
    rows = sorted(setup.bench.train, key=lambda example: example.length)
    size = setup.config.batch_size
    for start in range(0, len(rows), size):
        batch = setup.task.collate(rows[start : start + size], setup.base.pad_token_id)
        yield batch.to(setup.base.device)


def conclude(study: Study, setup: Setup, store: ArtifactStore, frozen: FrozenBase, display: Display) -> None:
    """Score the winner and its references on validation and, once, on test; store the result."""
    best = study.winner()
    pair = study.pair_of(best)
    control = pair if pair is not None and pair.state == "COMPLETE" else None
    uniform = [record for record in study.trials() if record.is_uniform]
    others = {"uniform": best_of(uniform, study.direction, study.budget), "control": control}
    seen_before = _note_test(study, best.number) if setup.test else False
    called = {"winner": best, "best uniform": others["uniform"], "paired run": control}
    numbers = {name: one.number for name, one in called.items() if one is not None}
    compared = {one.number: one for one in called.values() if one is not None}
    total = len(compared) + (1 if setup.test else 0)
    splits = "validation and test" if setup.test else "validation"
    scored = {}
    for at, trial in enumerate(compared.values(), 1):
        names = " and ".join(name for name, number in numbers.items() if number == trial.number)
        display.scoring(f"{names}, trial {trial.number}, on {splits}", at, total)
        scored[trial.number] = _score(setup, store, trial)
    if setup.test:
        display.scoring("frozen base on test", total, total)
    validation, test = scored[best.number]
    _check_record(best, validation.scores[setup.task.metric.name], display)
    references: dict[str, Any] = {
        "frozen_base": {
            "validation": frozen.scores,
            "test": setup.evaluate(setup.test).scores if setup.test else None,
        }
    }
    for name, record in others.items():
        references[name] = None if record is None else _reference(record, *scored[record.number])
    if control is not None:
        against = scored[control.number]
        references["control"] |= _differences(setup, (validation, test), against)
    study.set_result(
        {
            "best": best.number,
            "trials": len(study.trials()),
            "ended": sum(record.state != "RUNNING" for record in study.trials()),
            "references": references,
            "test": None if test is None else test.scores,
            "test_read_at": None if test is None else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "test_seen_before": seen_before,
        }
    )


def _note_test(study: Study, best: int) -> bool:
    """Log that the test split is about to be read; whether it was for another winner before this one.

    Logged first: a kill in between must not make the reading forgotten.
    """
    winners = [event.get("best") for event in study.events() if event.get("kind") == "test"]
    study.log_event("test", best=best)
    return any(winner != best for winner in winners[: winners.index(best) if best in winners else None])


def _check_record(best: TrialRecord, found: float, display: Display) -> None:
    """Say so where the stored adapter does not give the value that was recorded for it."""
    recorded = best.value or 0.0
    if not math.isclose(found, recorded, rel_tol=1e-4, abs_tol=1e-4):
        display.note(
            f"the stored adapter of trial {best.number} scores {found:.5f}, its record says {recorded:.5f}"
        )


def _differences(
    setup: Setup, first: tuple[Evaluation, Evaluation | None], second: tuple[Evaluation, Evaluation | None]
) -> dict[str, Any]:
    """How much better the first is than the second, on validation and, where there is one, on test."""
    found = {"difference": paired_difference(setup.task, first[0].outcomes, second[0].outcomes).to_json()}
    if first[1] is not None and second[1] is not None:
        test = paired_difference(setup.task, first[1].outcomes, second[1].outcomes)
        found["test_difference"] = test.to_json()
    return found


def _score(setup: Setup, store: ArtifactStore, record: TrialRecord) -> tuple[Evaluation, Evaluation | None]:
    """Put the stored adapter of a trial on the base model and score it on validation and test."""
    folder = store.check(f"trial-{record.number}", record.extra["artifact"])
    adapter = setup.bench.put_back(folder, record.plan)
    try:
        validation = setup.evaluate(setup.bench.validation)
        return validation, setup.evaluate(setup.test) if setup.test else None
    finally:
        adapter.remove()


def _reference(record: TrialRecord, validation: Evaluation, test: Evaluation | None) -> dict[str, Any]:
    return {
        "number": record.number,
        "trainable_parameters": record.trainable_parameters,
        "validation": validation.scores,
        "test": None if test is None else test.scores,
    }
