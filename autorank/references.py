"""What the study came to: the frozen base, the winner and its references, scored side by side.

The test split is read here and nowhere else. Trials are not trained here; the sentence that
people read is made in `report.py` from the result stored here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from autorank.artifacts import ArtifactStore
from autorank.display import Display
from autorank.evaluate import Evaluation, paired_difference
from autorank.head import fit_probe, frozen_features, warm_start
from autorank.plan import RankPlan
from autorank.preflight import Setup
from autorank.record import TrialRecord
from autorank.study import Study
from autorank.tasks import Batch

__all__ = ["conclude", "start_from_the_probe"]


def start_from_the_probe(setup: Setup, store: ArtifactStore, display: Display) -> None:
    """Give the base model the head that a linear probe finds, and score that frozen base.

    Linear probing, then fine-tuning: arXiv 2202.10054. The head is stored, so that a study that
    is resumed goes on from the very same one.
    """
    model, name = setup.base.model, setup.bench.head
    if store.exists("frozen"):
        if name is not None:
            head = load_file(str(store.path("frozen") / "head.safetensors"))
            warm_start(model, name, head["weight"], head.get("bias"))
        return
    head = {}
    if name is not None:
        display.note("solving the linear probe on the frozen base's features")
        weight, bias = _solve_probe(setup, name)
        warm_start(model, name, weight, bias)
        head = {"weight": weight.contiguous()} | ({} if bias is None else {"bias": bias.contiguous()})
    scores = setup.evaluate(setup.bench.validation).scores

    def fill(folder: Path) -> None:
        if head:
            save_file(head, str(folder / "head.safetensors"))

    store.write_json("frozen.json", scores)
    store.write_folder("frozen", fill)
    metric = setup.task.metric.name
    display.note(f"frozen base: validation {metric} {scores[metric]:.4f}")


def _solve_probe(setup: Setup, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear probe on what the final linear layer reads."""
    features, labels = frozen_features(setup.base.model, name, _batches(setup))
    has_bias = getattr(setup.base.model.get_submodule(name), "bias", None) is not None
    classes = len(setup.task.labels or ())
    return fit_probe(features, labels, classes, bias=has_bias, seed=setup.config.seed)


def _batches(setup: Setup) -> Iterator[Batch]:
    """The training rows in order, alike lengths together, for the frozen features."""
    rows = sorted(setup.bench.train, key=lambda example: len(example.input_ids))
    size = setup.config.batch_size
    for start in range(0, len(rows), size):
        batch = setup.task.collate(rows[start : start + size], setup.base.pad_token_id)
        yield batch.to(setup.base.device)


def conclude(study: Study, setup: Setup, store: ArtifactStore, display: Display) -> None:
    """Score the winner and its references on validation and, once, on test; store the result."""
    best = study.winner()
    uniform = _best_uniform(study)
    control = study.pair_of(best)
    if control is not None and control.state != "COMPLETE":
        control = None
    earlier = study.result()
    display.note("scoring the winner and its references" + (", reading the test split" if setup.test else ""))
    scored = {
        record.number: _score(study, setup, store, record)
        for record in {r.number: r for r in (best, uniform, control) if r is not None}.values()
    }
    validation, test = scored[best.number]
    recorded = best.value or 0.0
    found = validation.scores[setup.task.metric.name]
    if not math.isclose(found, recorded, rel_tol=1e-4, abs_tol=1e-4):
        display.note(
            f"the stored adapter of trial {best.number} scores {found:.5f}, its record says {recorded:.5f}"
        )
    references: dict[str, Any] = {
        "frozen_base": {
            "validation": store.read_json("frozen.json"),
            "test": setup.evaluate(setup.test).scores if setup.test else None,
        }
    }
    for name, record in (("uniform", uniform), ("control", control)):
        references[name] = None if record is None else _reference(record, *scored[record.number])
    if control is not None:
        other = scored[control.number]
        references["control"]["difference"] = paired_difference(
            setup.task, validation.outcomes, other[0].outcomes
        ).to_json()
        if test is not None and other[1] is not None:
            references["control"]["test_difference"] = paired_difference(
                setup.task, test.outcomes, other[1].outcomes
            ).to_json()
    study.set_result(
        {
            "best": best.number,
            "references": references,
            "test": None if test is None else test.scores,
            "test_read_at": None if test is None else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "test_seen_before": bool(
                earlier and earlier.get("test_read_at") and earlier["best"] != best.number
            ),
        }
    )


def _best_uniform(study: Study) -> TrialRecord | None:
    """The best finished trial with uniform ranks."""
    sign = 1 if study.direction == "maximize" else -1
    done = [r for r in study.trials() if r.state == "COMPLETE" and r.params.allocation == "uniform"]
    return max(done, key=lambda record: sign * (record.value or 0.0), default=None)


def _score(
    study: Study, setup: Setup, store: ArtifactStore, record: TrialRecord
) -> tuple[Evaluation, Evaluation | None]:
    """Put the stored adapter of a trial on the base model and score it on validation and test."""
    folder = store.check(f"trial-{record.number}", record.extra["artifact"])
    adapter = setup.bench.put_back(folder, RankPlan.from_json(record.extra["plan"]))
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
