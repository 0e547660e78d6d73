"""A plain Optuna search over LoRA, as a competent user writes it: TPE, MedianPruner, PEFT.

The tokenised rows, the metric and the head come from autorank's preflight, so that both searches differ in
nothing but how they search.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import optuna
import peft
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from autorank.evaluate import evaluate
from autorank.preflight import Setup

EVALUATIONS = 10


def plain_search(setup: Setup, *, trials: int, seed: int, rates: tuple[float, float]) -> dict[str, Any]:
    """Search, and say what it cost.

    Args:
        setup: the preflight's, with the warm-started head in the base model.
        trials: how many.
        seed: of sampler, data order and adapters.
        rates: the least and the largest learning rate.

    Returns:
        `best`, `samples` and `evaluation_samples` of the whole search, and `curve`: the best score so
        far against training samples, a pair for each better score.
    """
    bench, task = setup.bench, setup.task
    recipe, base = bench.recipe, bench.base
    maximize = task.metric.direction == "maximize"
    device = base.device
    cost = {"samples": 0, "evaluation_samples": 0}
    curve: list[list[float]] = []
    began = time.monotonic()

    def collate(rows: Any) -> Any:
        return task.collate(rows, base.pad_token_id)

    def objective(trial: optuna.Trial) -> float:
        group = trial.suggest_categorical("target_modules", sorted(setup.space.groups))
        layers = setup.space.groups[group]
        rank = trial.suggest_int("r", 1, 32, log=True)
        rank = max(1, min(rank, setup.config.budget // sum(layer.cost for layer in layers)))
        alpha = trial.suggest_categorical("alpha_over_r", [1, 2, 4, 8]) * rank
        rate = trial.suggest_float("learning_rate", *rates, log=True)
        torch.manual_seed(seed * 1000 + trial.number)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=[layer.name for layer in layers],
            modules_to_save=list(bench.modules_to_save) or None,
            task_type=task.peft_task_type,
        )
        model = peft.get_peft_model(copy.deepcopy(base.model), config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * recipe.steps), recipe.steps)
        loader = DataLoader(
            bench.train,  # type: ignore[arg-type]
            batch_size=recipe.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=collate,
        )
        points = {round(recipe.steps * (n + 1) / EVALUATIONS) for n in range(EVALUATIONS)}
        best, step = None, 0
        while step < recipe.steps:
            for batch in loader:
                batch = batch.to(device)
                model.train()
                task.loss(model(**batch.inputs).logits, batch).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                cost["samples"] += batch.samples
                if step in points:
                    model.eval()
                    result = evaluate(
                        model,
                        task,
                        bench.validation,
                        batch_size=recipe.batch_size,
                        pad_token_id=base.pad_token_id,
                    )
                    value = result.scores[task.metric.name]
                    cost["evaluation_samples"] += len(bench.validation)
                    better = max if maximize else min
                    best = value if best is None else better(best, value)
                    if not curve or better(value, curve[-1][1]) != curve[-1][1]:
                        curve.append([cost["samples"], value])
                    trial.report(value, step)
                    if trial.should_prune():
                        raise optuna.TrialPruned
                if step == recipe.steps:
                    break
        assert best is not None
        return best

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction=task.metric.direction,
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(),
    )
    study.optimize(objective, n_trials=trials, catch=(ValueError, RuntimeError))
    states = [trial.state.name for trial in study.trials]
    return {
        "best": curve[-1][1],
        **cost,
        "curve": curve,
        "states": {state: states.count(state) for state in sorted(set(states))},
        "params": study.best_params,
        "seconds": round(time.monotonic() - began),
    }
