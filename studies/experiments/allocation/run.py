"""Does it pay to move ranks? Arms at equal budget on two tasks; README.md beside this is the plan.

    python studies/experiments/allocation/run.py --data DIR --model DIR [--workers 2]
    python studies/experiments/allocation/run.py --report

Each finished run is a line of results.jsonl; a run that is there is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from autorank import RankAllocator, evidence, sketch
from autorank.adapter import Adapter
from autorank.allocation import starting_ranks
from autorank.data import read_data
from autorank.evaluate import evaluate
from autorank.gradient import probe_gains
from autorank.lane import Bench, Recipe
from autorank.model import Base, load_base
from autorank.plan import LayerSpec, RankPlan, uniform_plan
from autorank.schedule import learning_rate_factor, make_schedule
from autorank.tasks import Batch, Example, choose_task
from autorank.train import BatchOrder

SETTINGS = {"rewrite": "disfl_qa", "describe": "e2e_nlg"}
ARMS = (
    "uniform",
    "uniform4",
    "uniform16",
    "random",
    "gradient_norm",
    "singular_value",
    "sensitivity",
    "plain_growth",
    "no_noise_rule",
    "probe",
    "probe_moves",
    "adalora",
    "eva",
    "quarter_random",
    "quarter_last",
    "quarter_probe",
    "quarter_moves",
)
FIXED = ("uniform", "uniform4", "uniform16", "probe", "adalora", "eva")
FIXED += ("quarter_random", "quarter_last", "quarter_probe")
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
STEPS, BATCH, LENGTH, SCALING, CLIP = 400, 8, 192, 2.0, 1.0
RESULTS = Path(__file__).with_name("results.jsonl")
STUDENT_T = 2.776  # 97.5 %, 4 degrees of freedom


@dataclass(frozen=True)
class Run:
    """One training run."""

    setting: str
    arm: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """What identifies it among the results."""
        return f"{self.setting}/{self.arm}/{self.rate:g}/{self.seed}"


@dataclass
class Bed:
    """What the runs of a setting share."""

    bench: Bench
    test: tuple[Example, ...]
    layers: tuple[LayerSpec, ...]


def make_bed(setting: str, data: Path, model: Path) -> Bed:
    """Base model, tokenised data and the layers to adapt."""
    rows = read_data(str(data / SETTINGS[setting]), eval_fraction=0.1, seed=0)
    task, _ = choose_task("auto", rows)
    base = load_base(str(model), auto_class=task.auto_class, model_kwargs={}, device="cpu")
    splits = {name: task.encode(part, base.tokenizer, LENGTH).examples for name, part in rows.splits.items()}
    layers = tuple(
        LayerSpec(name, module.in_features, module.out_features)
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    recipe = Recipe(STEPS, BATCH, (STEPS,), CLIP, "gradient_norm", make_schedule(STEPS), 0, None)
    bench = Bench(base, task, splits["train"], splits["validation"], recipe)
    return Bed(bench, splits["test"], layers)


def one_each(order: Sequence[LayerSpec], layers: tuple[LayerSpec, ...], budget: int) -> RankPlan:
    """Rank 1 at every layer that still fits, in the order given."""
    ranks = dict.fromkeys((layer.name for layer in layers), 0)
    for layer in order:
        if layer.cost <= budget:
            ranks[layer.name], budget = 1, budget - layer.cost
    return RankPlan(layers, ranks, SCALING)


class Arm:
    """A model with an adapter, its optimizer, and what moves its ranks."""

    def __init__(self, bed: Bed, run: Run) -> None:
        self.run = run
        self.base = bed.bench.base
        self.model: nn.Module = copy.deepcopy(self.base.model)
        self.allocator: RankAllocator | None = None
        torch.manual_seed(run.seed)
        if run.arm == "adalora":
            self._adalora(bed.layers)
        elif run.arm == "eva":
            self._eva(bed)
        else:
            self._autorank(bed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)
        self._make_allocator()

    def _targets(self, layers: tuple[LayerSpec, ...]) -> list[str]:
        return sorted({layer.name.rpartition(".")[2] for layer in layers})

    def _adalora(self, layers: tuple[LayerSpec, ...]) -> None:
        config = peft.AdaLoraConfig(
            init_r=2,
            target_r=1,
            lora_alpha=int(2 * SCALING),  # PEFT divides by the rank that it starts with
            tinit=STEPS // 10,
            tfinal=3 * STEPS // 10,
            deltaT=10,
            total_step=STEPS,
            target_modules=self._targets(layers),
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(self.model, config)

    def _eva(self, bed: Bed) -> None:
        config = peft.LoraConfig(
            r=1,
            lora_alpha=int(SCALING),
            target_modules=self._targets(bed.layers),
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(rho=2.0),
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(self.model, config)
        order = BatchOrder([len(e.input_ids) for e in bed.bench.train], BATCH, self.run.seed)
        pad = self.base.pad_token_id
        batches = [
            bed.bench.task.collate([bed.bench.train[row] for row in order.rows(step)], pad).inputs
            for step in range(len(bed.bench.train) // BATCH)
        ]
        peft.initialize_lora_eva_weights(self.model, batches, show_progress_bar=False)

    def _autorank(self, bed: Bed) -> None:
        rank = int(self.run.arm.removeprefix("uniform") or 1) if "uniform" in self.run.arm else 1
        plan = uniform_plan(bed.layers, rank, SCALING, 2**62)
        quarter = self.run.arm.startswith("quarter")
        budget = plan.parameters // 4 if quarter else plan.parameters
        if self.run.arm == "quarter_random":
            order = torch.randperm(len(bed.layers), generator=torch.Generator().manual_seed(self.run.seed))
            plan = one_each([bed.layers[place] for place in order], bed.layers, budget)
        elif self.run.arm == "quarter_last":
            plan = one_each(bed.layers[::-1], bed.layers, budget)
        elif quarter or self.run.arm.startswith("probe"):
            gains = probe_gains(bed.bench, bed.layers, seed=self.run.seed)
            costs = {layer.name: layer.cost for layer in bed.layers}
            limits = {layer.name: layer.full_rank for layer in bed.layers}
            plan = RankPlan(bed.layers, starting_ranks(gains, costs, limits, budget), SCALING)
        Adapter(self.model, plan, modules_to_save=(), task_type="CAUSAL_LM", seed=self.run.seed)
        self.budget = budget

    def _make_allocator(self) -> None:
        arm = self.run.arm
        if arm in FIXED:
            return
        importance: Any = "singular_value" if arm == "quarter_moves" else "gradient_norm"
        if arm in ("random", "singular_value", "sensitivity"):
            importance = arm
        self.allocator = RankAllocator(
            self.model,
            self.optimizer,
            total_steps=STEPS,
            budget=self.budget,
            importance=importance,
            growth="plain" if arm == "plain_growth" else "gradient",
            seed=self.run.seed,
        )

    def step(self, number: int, batch: Batch, bed: Bed) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.rate * learning_rate_factor(number, STEPS)
        if self.run.arm == "adalora":  # its regulariser is added to the model's own loss alone
            loss = self.model(**batch.inputs, labels=batch.labels).loss
        else:
            loss = bed.bench.task.loss(self.model(**batch.inputs).logits, batch)
        loss.backward()
        if self.allocator is not None:
            self.allocator.step()
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], CLIP)
        self.optimizer.step()
        if self.run.arm == "adalora":
            self.model.base_model.update_and_allocate(number + 1)
        self.optimizer.zero_grad()

    def ranks(self, layers: tuple[LayerSpec, ...]) -> dict[str, int]:
        """The ranks in use now; AdaLoRA's are those that its mask leaves."""
        found = dict.fromkeys((layer.name for layer in layers), 0)
        for name, parameter in self.model.named_parameters():
            layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            if self.run.arm == "adalora" and rest.startswith("E."):
                found[layer] = int((parameter != 0).sum())
            elif self.run.arm != "adalora" and rest.startswith("A."):
                found[layer] = parameter.shape[0]
        return found


def with_noise(products: Tensor, signs: Tensor) -> Tensor:
    """The energies of the window's mean gradient, noise and all, for each choice of signs of the steps."""
    steps, width = products.shape[:2]
    signs = signs.to(products)
    pairs = (signs[:, :, None] * signs[:, None, :]).flatten(1)
    found: Tensor = pairs @ products.transpose(1, 2).reshape(steps * steps, width * width)
    return found.view(-1, width, width) / steps**2


AGREEMENT, NOISE = sketch._agreement, evidence.NOISE


def set_rule(on: bool) -> None:
    """Switch the noise rule."""
    sketch._agreement = AGREEMENT if on else with_noise
    evidence.NOISE = NOISE if on else 0.0  # type: ignore[misc]


def carry_out(run: Run, bed: Bed) -> dict[str, Any]:
    """Train, then score: validation always, test for the seeds that are reported."""
    began = time.perf_counter()
    set_rule(run.arm != "no_noise_rule")
    arm = Arm(bed, run)
    bench: Bench = bed.bench
    base: Base = bench.base
    order = BatchOrder([example.length for example in bench.train], BATCH, run.seed)
    arm.model.train()
    for number in range(STEPS):
        rows = [bench.train[row] for row in order.rows(number)]
        arm.step(number, bench.task.collate(rows, base.pad_token_id), bed)
    arm.model.eval()
    scores = {}
    splits = {"validation": bench.validation} | ({"test": bed.test} if run.seed in SEEDS else {})
    for split, examples in splits.items():
        pad = base.pad_token_id
        scores[split] = evaluate(arm.model, bench.task, examples, batch_size=64, pad_token_id=pad).scores
    ranks = arm.ranks(bed.layers)
    return {
        "key": run.key,
        **vars(run),
        **scores,
        "parameters": sum(ranks[layer.name] * layer.cost for layer in bed.layers),
        "ranks": list(ranks.values()),
        "moves": 0 if arm.allocator is None else len(arm.allocator.ledger),
        "seconds": round(time.perf_counter() - began, 1),
    }


BEDS: dict[str, Bed] = {}


def work(job: tuple[Run, Path, Path]) -> dict[str, Any]:
    """One run in a worker process, on one thread."""
    run, data, model = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if run.setting not in BEDS:
        BEDS[run.setting] = make_bed(run.setting, data, model)
    try:
        return carry_out(run, BEDS[run.setting])
    except ArithmeticError as error:
        return {"key": run.key, **vars(run), "failed": str(error)}


def read_results() -> dict[str, dict[str, Any]]:
    """All finished runs by key."""
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {line["key"]: line for line in lines}


def loss_of(result: dict[str, Any]) -> float:
    """The validation loss; infinite where training failed."""
    loss = result.get("validation", {}).get("loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def tuned(results: dict[str, dict[str, Any]], setting: str, arm: str) -> float | None:
    """The best learning rate of an arm, once all have been tried."""
    tries = [results.get(Run(setting, arm, rate, TUNING_SEED).key) for rate in RATES]
    if not all(tries):
        return None
    return min((one for one in tries if one), key=loss_of)["rate"]


def pending(results: dict[str, dict[str, Any]], settings: list[str], arms: list[str]) -> list[Run]:
    """What can be run now: the tuning, and the seeds of arms that are tuned."""
    runs = []
    for setting in settings:
        for arm in arms:
            rate = tuned(results, setting, arm)
            if rate is None:
                runs += [Run(setting, arm, rate, TUNING_SEED) for rate in RATES]
            else:
                runs += [Run(setting, arm, rate, seed) for seed in SEEDS]
    return [run for run in runs if run.key not in results]


def seeds_of(results: dict[str, dict[str, Any]], setting: str, arm: str) -> list[dict[str, Any]]:
    """The runs of an arm at its tuned rate, one for each seed; empty where one is missing."""
    rate = tuned(results, setting, arm)
    runs = [results.get(Run(setting, arm, rate or 0, seed).key) for seed in SEEDS]
    return [run for run in runs if run] if rate is not None and all(runs) else []


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over the seeds."""
    mean = statistics.mean(values)
    half = STUDENT_T * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def report(results: dict[str, dict[str, Any]]) -> None:
    """A table for each setting: the tuned rate, the scores, and the paired differences to the reference.

    That is `uniform`, or `quarter_random` for the arms at a quarter of the budget.
    """
    for setting in SETTINGS:
        print(f"\n### {setting}\n")
        print(
            "| arm | rate | parameters | validation loss | minus its reference "
            "| accuracy minus its reference | test loss minus its reference |"
        )
        print("|---|---|---|---|---|---|---|")
        for arm in ARMS:
            reference = "quarter_random" if arm.startswith("quarter") else "uniform"
            runs, base = seeds_of(results, setting, arm), seeds_of(results, setting, reference)
            rate = tuned(results, setting, arm)
            if not runs or not base:
                continue
            pairs = list(zip(runs, base, strict=True))
            losses = [one["validation"]["loss"] for one in runs]
            row = [arm, f"{rate:g}", f"{statistics.mean(one['parameters'] for one in runs):,.0f}"]
            row.append(f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}")
            for split, metric in (("validation", "loss"), ("validation", "token_accuracy"), ("test", "loss")):
                row.append(
                    ""
                    if arm == reference
                    else interval([a[split][metric] - b[split][metric] for a, b in pairs])
                )
            print("| " + " | ".join(row) + " |")


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of the data sets")
    parser.add_argument("--model", type=Path, help="the folder of stories260k")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        report(read_results())
        return
    settings, arms = arguments.settings.split(","), arguments.arms.split(",")
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers) as pool, RESULTS.open("a", encoding="utf-8") as file:
        while runs := pending(read_results(), settings, arms):
            jobs = [(run, arguments.data, arguments.model) for run in runs]
            for number, result in enumerate(pool.imap_unordered(work, jobs), start=1):
                file.write(json.dumps(result) + "\n")
                file.flush()
                seconds = result.get("seconds")
                print(f"{number} of {len(runs)}: {result['key']} {loss_of(result):.4f} in {seconds} s")


if __name__ == "__main__":
    main()
