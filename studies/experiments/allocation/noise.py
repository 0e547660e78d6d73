"""How well a window of a few batches tells layers apart, with the noise rule and without it.

    python studies/experiments/allocation/noise.py --data DIR --model DIR

A window of 12 batches estimates what the next rank at each layer gains; the truth is read from
the gradient over 3,200 rows. Gains are products of two halves of the window (the rule), or
energies of the whole window's mean (without it). Printed: rank correlation with the truth over
the layers, and what an estimate is of the truth in total, mean and range over windows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import run
import torch
from torch import Tensor, nn

from autorank import sketch
from autorank.gradient import probe_gains
from autorank.train import BatchOrder

WINDOWS, TRUTH_BATCHES = 12, 400


def true_gains(bed: run.Bed) -> dict[str, float]:
    """The largest energy of each layer's mean gradient, as a rank at that layer would find it."""
    base = bed.bench.base
    model = copy.deepcopy(base.model)
    weights = {layer.name: model.get_submodule(layer.name).weight for layer in bed.layers}
    for weight in weights.values():
        weight.requires_grad_()
    order = BatchOrder([len(example.input_ids) for example in bed.bench.train], run.BATCH, 12345)
    for step in range(TRUTH_BATCHES):
        batch = bed.bench.task.collate([bed.bench.train[r] for r in order.rows(step)], base.pad_token_id)
        (bed.bench.task.loss(model(**batch.inputs).logits, batch) / TRUTH_BATCHES).backward()
    return {name: float(torch.linalg.svdvals(w.grad.double())[0] ** 2) for name, w in weights.items()}


def places(values: list[float]) -> Tensor:
    """Ranks of the values, centred and of unit length."""
    order = torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
    return nn.functional.normalize(order - order.mean(), dim=0)


def main() -> None:
    """Estimate, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    for setting in run.SETTINGS:
        bed = run.make_bed(setting, arguments.data, arguments.model)
        truth = true_gains(bed)
        costs = {layer.name: layer.cost for layer in bed.layers}
        for rule, conclude in (("two halves", run.CONCLUDE), ("no rule", run.with_noise)):
            sketch._conclude = conclude
            alike, shares = [], []
            for seed in range(WINDOWS):
                gains = {n: g[0] for n, g in probe_gains(bed.bench, bed.layers, seed=seed).items() if g}
                known = list(gains)
                seen, true = ([g[n] / costs[n] for n in known] for g in (gains, truth))
                alike.append(float(places(seen) @ places(true)))
                shares.append(sum(gains.values()) / sum(truth[name] for name in known))
            print(
                f"{setting}, {rule}: rank correlation {statistics.mean(alike):.3f} "
                f"({min(alike):.3f} to {max(alike):.3f}), gains over truth {statistics.mean(shares):.2f} "
                f"({min(shares):.2f} to {max(shares):.2f})"
            )


if __name__ == "__main__":
    main()
