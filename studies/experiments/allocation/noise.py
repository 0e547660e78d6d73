"""What the noise rule does: how well a window tells layers apart, and what moves by chance.

    python studies/experiments/allocation/noise.py --data DIR --model DIR

First, a window of 12 batches estimates what the next rank at each layer gains; the truth is read
from the gradient over 3,200 rows. Gains are what different batches agree on (the rule), or
energies of the whole window's mean (without it). Printed: rank correlation with the truth over
the layers, and what an estimate is of the truth in total, mean and range over windows.

Then, ranks that the allocator moves in 220 steps at learning rate 0, where the loss is turned round
at random, so that its gradient is 0 on average, and where it is not: with the rule, without the
threshold on what chance makes, and with the mean's energies as well.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import run
import torch
from torch import Tensor, nn

from autorank import evidence, gradient, sketch
from autorank.adapter import lora_layers
from autorank.evidence import Promises
from autorank.resize import factors
from autorank.train import BatchOrder

WINDOWS, TRUTH_BATCHES, MOVE_SEEDS = 12, 400, 3


def true_gains(bed: run.Bed) -> dict[str, float]:
    """The largest energy of each layer's mean gradient, as a rank at that layer would find it."""
    base = bed.bench.base
    model = copy.deepcopy(base.model)
    weights = {layer.name: model.get_submodule(layer.name).weight for layer in bed.layers}
    for weight in weights.values():
        weight.requires_grad_()
    order = BatchOrder([example.length for example in bed.bench.train], run.BATCH, 12345)
    for step in range(TRUTH_BATCHES):
        batch = bed.bench.task.collate([bed.bench.train[r] for r in order.rows(step)], base.pad_token_id)
        (bed.bench.task.loss(model(**batch.inputs).logits, batch) / TRUTH_BATCHES).backward()
    return {name: float(torch.linalg.svdvals(w.grad.double())[0] ** 2) for name, w in weights.items()}


def seen_energies(bed: run.Bed, seed: int) -> dict[str, float]:
    """The largest energy that a window of 12 batches sees at each layer, before it is made a promise."""
    promises = gradient.promises  # type: ignore[attr-defined]
    try:
        gradient.promises = lambda reading, *_: Promises(reading.gains.tolist())  # type: ignore[attr-defined]
        found = gradient.probe_gains(bed.bench, bed.layers, seed=seed)
    finally:
        gradient.promises = promises  # type: ignore[attr-defined]
    return {name: known[0] for name, known in found.items() if known}


def places(values: list[float]) -> Tensor:
    """Ranks of the values, centred and of unit length."""
    order = torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
    return nn.functional.normalize(order - order.mean(), dim=0)


def ranks_moved(bed: run.Bed, seed: int, *, turned: bool) -> int:
    """Ranks gained at learning rate 0, from rank 1 everywhere and a B that is not 0."""
    arm = run.Arm(bed, run.Run("", "gradient_norm", 0.0, seed))
    stream = torch.Generator().manual_seed(seed)
    for module in lora_layers(arm.model).values():
        _, b = factors(module, "default")
        b.data = torch.randn(b.shape, generator=stream) / 100
    pad = bed.bench.base.pad_token_id
    order = BatchOrder([example.length for example in bed.bench.train], run.BATCH, seed)
    assert arm.allocator is not None
    for step in range(220):
        batch = bed.bench.task.collate([bed.bench.train[row] for row in order.rows(step)], pad)
        sign = -1 if turned and float(torch.rand(1, generator=stream)) < 0.5 else 1
        (sign * bed.bench.task.loss(arm.model(**batch.inputs).logits, batch)).backward()
        arm.allocator.step()
        arm.optimizer.step()
        arm.optimizer.zero_grad()
    return sum(max(0, entry.after - entry.before) for entry in arm.allocator.ledger)


def print_moves(bed: run.Bed, setting: str) -> None:
    """What moves of chance, and what of a gradient that is there."""
    for name, agreement, threshold in (
        ("the rule", run.AGREEMENT, run.NOISE),
        ("no threshold", run.AGREEMENT, 0.0),
        ("no rule", run.with_noise, 0.0),
    ):
        sketch._agreement, evidence.NOISE = agreement, threshold  # type: ignore[misc]
        for turned in (True, False):
            moved = [ranks_moved(bed, seed, turned=turned) for seed in range(MOVE_SEEDS)]
            print(f"{setting}, {name}, {'noise' if turned else 'signal'}: ranks moved {moved}", flush=True)
    run.set_rule(True)


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
        for rule, on in (("agreement", True), ("no rule", False)):
            run.set_rule(on)
            alike, shares = [], []
            for seed in range(WINDOWS):
                gains = seen_energies(bed, seed)
                known = list(gains)
                seen, true = ([g[n] / costs[n] for n in known] for g in (gains, truth))
                alike.append(float(places(seen) @ places(true)))
                shares.append(sum(gains.values()) / sum(truth[name] for name in known))
            print(
                f"{setting}, {rule}: rank correlation {statistics.mean(alike):.3f} "
                f"({min(alike):.3f} to {max(alike):.3f}), gains over truth {statistics.mean(shares):.2f} "
                f"({min(shares):.2f} to {max(shares):.2f})",
                flush=True,
            )
        print_moves(bed, setting)


if __name__ == "__main__":
    main()
