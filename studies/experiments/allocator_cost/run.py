"""What the allocator costs: step time and peak memory against plain PEFT LoRA and PEFT's AdaLoRA.

    python studies/experiments/allocator_cost/run.py --rounds 160 --out result.json
    python studies/experiments/allocator_cost/run.py --shape llama --rounds 160    # for a GPU

Three copies of a model take the same batches in turn within one run, so that a slow minute of the
machine is slow for all; a ratio is of steps of one round. The allocator moves ranks every 20
steps; AdaLoRA reallocates every 20. Peak memory is that of a process of its own for each arm.
Weights are random: no time depends on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import platform
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch

from autorank import RankAllocator
from autorank.schedule import Schedule

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes import SHAPES

ARMS = ("plain", "autorank", "adalora")
EVERY, RANK = 20, 4

Step = Callable[[int], None]


BATCHES = {"minilm": (32, 32), "llama": (4, 512)}
"""Rows, and tokens of each."""


def make(name: str, arm: str, steps: int, device: torch.device) -> Step:
    """One arm: a function that does training step number i."""
    shape, (batch, tokens) = SHAPES[name], BATCHES[name]
    torch.manual_seed(0)
    base = shape.model(device)
    common = {"lora_alpha": 2 * RANK, "target_modules": shape.targets, "task_type": shape.task_type}
    if arm == "adalora":
        # The budget falls from 1.5 times the target, as in its paper.
        ranks = {"init_r": RANK * 3 // 2, "target_r": RANK}
        times = {"tinit": EVERY, "tfinal": EVERY, "deltaT": EVERY, "total_step": steps}
        config: peft.PeftConfig = peft.AdaLoraConfig(**ranks, **times, **common)
    else:
        config = peft.LoraConfig(r=RANK, **common)
    model = peft.get_peft_model(base, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    allocator = None
    if arm == "autorank":
        moves = tuple(range(EVERY, steps - EVERY, EVERY))
        schedule = Schedule(steps, moves, first_share=0.1, final_step=moves[-1] + 1)
        allocator = RankAllocator(model, optimizer, total_steps=steps, schedule=schedule)

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1000, 20000, (batch, tokens), generator=generator).to(device)
        model(input_ids=ids, labels=shape.labels(ids)).loss.backward()
        if allocator is not None:
            allocator.step()
        optimizer.step()
        if arm == "adalora":
            model.base_model.update_and_allocate(number + 1)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(shape: str, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step of every arm; the order within a round is drawn anew each time."""
    arms = {arm: make(shape, arm, rounds, device) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    for number in range(rounds):
        for arm in order.sample(ARMS, len(ARMS)):
            began = time.perf_counter()
            arms[arm](number)
            seconds[arm].append(time.perf_counter() - began)
    return {arm: values[EVERY:] for arm, values in seconds.items()}  # the first steps warm up


def ratio(seconds: dict[str, list[float]], arm: str, other: str) -> dict[str, float]:
    """Total time of one arm over another's, with a 95 % interval from blocks of one move each."""
    pairs = list(zip(seconds[arm], seconds[other], strict=True))
    blocks = [pairs[start : start + EVERY] for start in range(0, len(pairs) - EVERY + 1, EVERY)]
    logs = [math.log(sum(a for a, _ in block) / sum(b for _, b in block)) for block in blocks]
    centre, spread = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "ratio": round(math.exp(centre), 4),
        "low": round(math.exp(centre - 2 * spread), 4),
        "high": round(math.exp(centre + 2 * spread), 4),
        "blocks": len(blocks),
    }


def run_arm(shape: str, arm: str, device: torch.device) -> None:
    """Train one arm over two moves."""
    step = make(shape, arm, 4 * EVERY, device)
    for number in range(2 * EVERY + 2):
        step(number)


def peak_on_cuda(shape: str, arm: str, device: torch.device) -> float:
    """Peak of the device's memory while one arm trains, in MiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run_arm(shape, arm, device)
    return torch.cuda.max_memory_allocated() / 2**20


def peak_of_process(shape: str, arm: str, queue: multiprocessing.Queue[float]) -> None:
    """Peak memory of this process, which trains one arm on the CPU, in MiB."""
    run_arm(shape, arm, torch.device("cpu"))
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    queue.put(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def peak(shape: str, arm: str, device: torch.device) -> float:
    """Peak memory of one arm alone."""
    if device.type == "cuda":
        return peak_on_cuda(shape, arm, device)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=peak_of_process, args=(shape, arm, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--rounds", type=int, default=160)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = measure(arguments.shape, arguments.rounds, device)
    memory = {arm: round(peak(arguments.shape, arm, device), 1) for arm in ARMS}
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()}
    result = {
        "device": name,
        "versions": versions,
        "shape": arguments.shape,
        "rounds": arguments.rounds,
        "median_seconds": {arm: round(statistics.median(values), 4) for arm, values in seconds.items()},
        "autorank_over_plain": ratio(seconds, "autorank", "plain"),
        "adalora_over_plain": ratio(seconds, "adalora", "plain"),
        "peak_memory_mib": memory,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
