"""Does holding a trial back help where rows are few? README.md beside this is the plan.

    python studies/experiments/regularisers/run.py --data shared/data/banking77
    python studies/experiments/regularisers/run.py --report

Each finished run is a line of results.jsonl; a run that is there is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from autorank.config import load_config
from autorank.display import Display
from autorank.evaluate import evaluate
from autorank.lane import Lane, TrialSpec
from autorank.preflight import Setup, prepare
from autorank.references import score_frozen_base

ARMS: dict[str, dict[str, float]] = {
    "off": {},
    "dropout 0.1": {"dropout": 0.1},
    "weight decay 1": {"weight_decay": 1.0},
    "label smoothing 0.1": {"label_smoothing": 0.1},
}
SEEDS = (0, 1)
TRAIN, VALIDATION, STEPS, BATCH, LENGTH = 1_000, 300, 150, 32, 48
RESULTS = Path(__file__).with_name("results.jsonl")


def main() -> None:
    """Run what is missing, or report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder of banking77")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        report()
        return
    if options.data is None:
        parser.error("--data is missing: the folder of banking77")
    done = {(line["seed"], line["arm"]) for line in results()}
    for seed in SEEDS:
        missing = [arm for arm in ARMS if (seed, arm) not in done]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            setup = make_setup(options.data, Path(folder), seed)
        for arm in missing:
            line = {"seed": seed, "arm": arm, **train(setup, ARMS[arm], seed)}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def results() -> list[dict[str, Any]]:
    """The runs that are done."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def make_setup(data: Path, folder: Path, seed: int) -> Setup:
    """Rows drawn by the seed: some to train on, some to choose the step by, and others to score."""
    stream = random.Random(seed)
    drawn = {
        split: stream.sample((data / f"{split}.jsonl").read_text().splitlines(), count)
        for split, count in (("train", TRAIN), ("validation", 1_000))
    }
    known = {json.loads(row)["label"] for row in drawn["train"]}
    rows = [row for row in drawn["validation"] if json.loads(row)["label"] in known]
    splits = {"train": drawn["train"], "validation": rows[:VALIDATION], "test": rows[VALIDATION:]}
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"model": "builtin:minilm", "data": str(folder), "budget": "170k", "steps": STEPS}
    settings |= {"batch_size": BATCH, "max_length": LENGTH, "seed": seed, "evaluations": 6}
    setup = prepare(load_config(None, {**settings, "space": {"allocation": "uniform"}}), Display())
    score_frozen_base(setup, Display())
    return setup


def train(setup: Setup, held: dict[str, float], seed: int) -> dict[str, Any]:
    """The default setting, held back so; scored on the rows that chose the step, and on the others."""
    began = time.monotonic()
    params = replace(setup.space.startup()[0], **held)
    plan = setup.space.starting_plan(params)
    lane = Lane(TrialSpec.of(params, number=0, seed=seed, plan=plan), setup.bench)
    losses = []
    try:
        while not lane.finished:
            losses.append(lane.train())
            if lane.step in setup.bench.recipe.evaluate_at:
                lane.evaluate()
        assert lane.best is not None
        lane.adapter.load(lane.best.tensors)
        found = evaluate(
            setup.base.model,
            setup.task,
            setup.test,
            batch_size=BATCH,
            pad_token_id=setup.base.pad_token_id,
        )
    finally:
        lane.close()
    return {
        "step": lane.best.step,
        "validation": lane.best.scores,
        "others": found.scores,
        "rows": len(setup.test),
        "training_loss": statistics.fmean(losses[-20:]),
        "seconds": round(time.monotonic() - began, 1),
    }


def report() -> None:
    """One line for each arm, and its difference to `off` on each seed."""
    lines = {(line["seed"], line["arm"]): line for line in results()}
    for arm, split in itertools.product(ARMS, ("validation", "others")):
        values = [lines[seed, arm][split] for seed in SEEDS if (seed, arm) in lines]
        gaps = [
            lines[seed, arm][split]["accuracy"] - lines[seed, "off"][split]["accuracy"]
            for seed in SEEDS
            if {(seed, arm), (seed, "off")} <= lines.keys()
        ]
        accuracies = ", ".join(f"{value['accuracy']:.4f}" for value in values)
        losses = ", ".join(f"{value['loss']:.3f}" for value in values)
        print(f"{arm:20} {split:10} accuracy {accuracies}  loss {losses}  " + _signed(gaps))


def _signed(gaps: list[float]) -> str:
    return "against off: " + ", ".join(f"{gap:+.4f}" for gap in gaps)


if __name__ == "__main__":
    main()
