"""What a search costs, against a plain Optuna script. The plan stands in the README beside this file.

python studies/experiments/search_cost/run.py --data DIR --model DIR
python studies/experiments/search_cost/run.py --report
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from plain import plain_search

from autorank.config import load_config
from autorank.display import Display
from autorank.preflight import prepare
from autorank.references import score_frozen_base
from autorank.search import search

RESULTS = Path(__file__).with_name("results.jsonl")
TRIALS, SEEDS = 12, (0, 1)
RATES = {"low": 1e-4, "high": 1e-2}
"""The learning rates of both searches."""
ROWS: dict[str, dict[str, int]] = {
    "describe": {"train": 600, "validation": 300, "test": 50},
    "banking77": {"train": 2000, "validation": 500, "test": 50},
}
"""So many of each split, drawn at random, so that a trial of a few minutes is near its end."""
SETTINGS: dict[str, dict[str, Any]] = {
    "describe": {
        "data": "e2e_nlg",
        "metric": "loss",
        "budget": "20k",
        "steps": 600,
        "batch_size": 8,
        "max_length": 192,
    },
    "banking77": {"data": "banking77", "budget": "170k", "steps": 375, "batch_size": 16, "max_length": 64},
}


def done() -> dict[tuple[str, str, int], dict[str, Any]]:
    """What was run before, by setting, arm and seed."""
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {(line["setting"], line["arm"], line["seed"]): line for line in lines}


def settings_of(name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The settings of a study, whose rows are written into the folder."""
    given = dict(SETTINGS[name])
    source, data = options.data / given["data"], folder / given["data"]
    data.mkdir()
    for split, count in ROWS[name].items():
        lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(lines)
        (data / f"{split}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    model = "builtin:minilm" if name == "banking77" else str(options.model)
    given |= {"model": model, "data": str(data), "seed": seed, "name": name}
    given |= {"space": {"learning_rate": RATES}, "studies_dir": str(folder / "studies")}
    return given | ({"steps": options.steps} if options.steps else {})


def run_plain(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The plain script."""
    with tempfile.TemporaryDirectory() as folder:
        given = settings_of(name, seed, options, Path(folder))
        setup = prepare(load_config(None, given), Display.silent())
        frozen = score_frozen_base(setup, Display.silent())
        found = plain_search(setup, trials=options.trials, seed=seed, rates=(RATES["low"], RATES["high"]))
    return {**found, "frozen": frozen.scores[setup.task.metric.name]}


def run_autorank(name: str, seed: int, target: float, options: argparse.Namespace) -> dict[str, Any]:
    """A search with that target; its cost is read off its own ledger."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        given = settings_of(name, seed, options, Path(folder)) | {"trials": options.trials}
        report = search(load_config(None, given | {"target": target}), display=Display.silent()).report
    curve = report["cost"]["curve"]
    sign = 1 if report["direction"] == "maximize" else -1
    reached = next((spent for spent, value in curve if sign * value >= sign * target), None)
    states = [trial["state"] for trial in report["trials"]]
    return {
        "best": curve[-1][1],
        "target": target,
        "reached_at": reached,
        "samples": report["cost"]["samples"],
        "evaluation_samples": report["cost"]["evaluation_samples"],
        "curve": curve,
        "states": {state: states.count(state) for state in sorted(set(states))},
        "seconds": round(time.monotonic() - began),
    }


def report() -> None:
    """The table."""
    found = done()
    print(
        "| setting | seed | plain: best | at, of samples | autorank: reached at | share of plain's | best |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, arm, seed in sorted(found):
        other = found.get((name, "autorank", seed))
        if arm != "plain" or other is None:
            continue
        plain = found[name, arm, seed]
        at = other["reached_at"]
        spent = next(s for s, value in plain["curve"] if value == plain["best"])
        share = "not reached" if at is None else f"{at / plain['samples']:.2f}"
        print(
            f"| {name} | {seed} | {plain['best']:.4f} | {spent:,} of {plain['samples']:,} | "
            f"{'-' if at is None else format(int(at), ',')} of {other['samples']:,} | {share} | "
            f"{other['best']:.4f} |"
        )


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--only", choices=SETTINGS)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--steps", type=int, help="another length, to try the script out")
    parser.add_argument("--out", type=Path, help="another file of results")
    options = parser.parse_args()
    global RESULTS
    RESULTS = options.out or RESULTS
    if options.report:
        report()
        return
    warnings.simplefilter("ignore")
    for seed in SEEDS:
        for name in [options.only] if options.only else SETTINGS:
            for arm in ("plain", "autorank"):
                if (name, arm, seed) in done():
                    continue
                if arm == "plain":
                    result = run_plain(name, seed, options)
                else:
                    target = done()[name, "plain", seed]["best"]
                    result = run_autorank(name, seed, target, options)
                line = {"setting": name, "arm": arm, "seed": seed, **result}
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps({k: v for k, v in line.items() if k != "curve"}), flush=True)


if __name__ == "__main__":
    main()
