"""What lanes give: samples per second of several trials in one forward pass, against one after the other.

    python studies/experiments/lanes/run.py --rounds 60 --out result.json
    python studies/experiments/lanes/run.py --shape llama --rounds 60      # for a GPU

The reference trains one trial at a time in a plain PEFT loop: AdamW, a learning rate schedule, clipped
gradients. All arms take turns within one run, in an order that is drawn anew in each round, so that a slow
minute of the machine is slow for all; a ratio is of steps of one round. Above 1, lanes do more samples per
second than the plain loop does. Weights are random: no time depends on them.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import torch
from torch import nn

from autorank.lane import Bench, Lane, Recipe, TrialSpec, train_lanes
from autorank.model import Base
from autorank.plan import LayerSpec, uniform_plan
from autorank.routing import Routing
from autorank.schedule import make_schedule
from autorank.tasks import Example
from autorank.tasks.causal_lm import CausalLM
from autorank.tasks.task import Metric
from autorank.tasks.text_classification import TextClassification

sys.path.insert(0, str(Path(__file__).parents[1]))
from paired import Step, machine, medians, take_turns, tell, time_ratio
from shapes import CLASSES, SHAPES

RANK, LANES = 8, (1, 2, 4, 8)
BATCHES = {"minilm": (8, 16), "llama": (4, 128)}
"""Rows, and tokens of each."""


def plain(name: str, steps: int, device: torch.device) -> Step:
    """A plain PEFT loop, as a competent user writes it."""
    shape, (rows, tokens) = SHAPES[name], BATCHES[name]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=shape.targets, task_type=shape.task_type
    )
    model = peft.get_peft_model(shape.model(device), config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)

    def step(_: int) -> None:
        ids = torch.randint(1000, 20000, (rows, tokens), generator=generator).to(device)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=shape.labels(ids)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def lanes(name: str, count: int, joined: bool, steps: int, device: torch.device) -> Step:
    """So many trials on lanes, as a search trains them."""
    shape, (rows, tokens) = SHAPES[name], BATCHES[name]
    model = shape.model(device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (16 * rows, tokens), generator=generator)
    if shape.task_type == "SEQ_CLS":
        task: Any = TextClassification(
            ("text",), tuple(map(str, range(CLASSES))), Metric("accuracy", "maximize")
        )
        examples = tuple(Example(row.tolist(), int(row[0]) % CLASSES) for row in ids)
    else:
        task = CausalLM(("text",), Metric("loss", "minimize"))
        examples = tuple(Example(row.tolist(), row.tolist()) for row in ids)
    fresh = ("classifier",) if shape.task_type == "SEQ_CLS" else ()
    base = Base(model, cast(Any, SimpleNamespace()), name, name, "", fresh, device, 0, tokens)
    recipe = Recipe(steps, rows, (steps,), 1.0, "singular_value", make_schedule(max(steps, 100)), 0, None)
    bench = Bench(base, task, examples, examples[:1], recipe)
    layers = tuple(
        LayerSpec(key, module.in_features, module.out_features)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(shape.targets, key)
    )
    plan = uniform_plan(layers, RANK, 2.0, 10**9)
    routing = Routing(model, joined=joined) if count > 1 else None
    made = [
        Lane(
            TrialSpec(number, number, plan, False, 1e-4, None, None),
            bench,
            name=f"lane{number}",
            routing=routing,
        )
        for number in range(count)
    ]

    def step(_: int) -> None:
        found = train_lanes(bench, made, routing=routing)
        assert all(isinstance(loss, float) for loss in found), found

    return step


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--way", choices=("plain", "joined", "both"), default="joined")
    parser.add_argument("--dropout", action="store_true", help="keep the base's own dropout (minilm)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if not arguments.dropout:
        for config in (shape.config for shape in SHAPES.values()):
            for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
                if hasattr(config, key):
                    setattr(config, key, 0.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, rounds = arguments.shape, arguments.rounds
    ways = {"plain": [False], "joined": [True], "both": [False, True]}[arguments.way]
    arms: dict[str, Step] = {"plain": plain(name, rounds, device)}
    counts: dict[str, int] = {}
    for count in LANES:
        for joined in ways if count > 1 else [True]:
            arm = "1 lane" if count == 1 else f"{count} lanes, {'joined' if joined else 'plain'}"
            counts[arm] = count
            arms[arm] = lanes(name, count, joined, rounds, device)
    warm = min(5, rounds // 4)
    seconds = take_turns(arms, rounds, warm=warm)
    rows, tokens = BATCHES[name]
    block = max(1, (rounds - warm) // 8)
    result = {
        **machine(device),
        "shape": name,
        "batch": f"{rows} x {tokens} tokens",
        "dropout": arguments.dropout,
        "rounds": rounds,
        "median_seconds": medians(seconds),
        "samples_per_second_over_plain": {
            arm: time_ratio(seconds["plain"], seconds[arm], block=block, errors=2.4, times=count, digits=3)
            for arm, count in counts.items()
        },
    }
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
