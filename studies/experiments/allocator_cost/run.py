"""What the allocator costs: step time and peak memory against plain PEFT LoRA and PEFT's AdaLoRA.

    python studies/experiments/allocator_cost/run.py --rounds 160 --out result.json
    python studies/experiments/allocator_cost/run.py --shape llama --rounds 160    # for a GPU

Three copies of a model take the same batches in turn within one run, so that a slow minute of the
machine is slow for all; a ratio is of steps of one round. The allocator moves ranks every 20
steps; AdaLoRA reallocates every 20. Peak memory is that of each arm alone: of a process of its own, or
of the device.
Weights are random: no time depends on them.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import re
import sys
import warnings
from pathlib import Path

import peft
import torch

from autorank import RankAllocator
from autorank.schedule import Schedule

sys.path.insert(0, str(Path(__file__).parents[1]))
from paired import Step, machine, medians, take_turns, tell, time_ratio
from shapes import SHAPES

ARMS = ("plain", "autorank", "adalora")
EVERY, RANK = 20, 4
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

    return step


def ratio(seconds: dict[str, list[float]], arm: str) -> dict[str, float]:
    """Total time of an arm over plain LoRA's, from blocks of one move each."""
    return time_ratio(seconds[arm], seconds["plain"], block=EVERY, errors=2, digits=4)


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
    shape, rounds = arguments.shape, arguments.rounds
    arms = {arm: make(shape, arm, rounds, device) for arm in ARMS}
    seconds = take_turns(arms, rounds, warm=EVERY)
    del arms  # their memory is not that of one alone
    memory = {arm: round(peak(shape, arm, device), 1) for arm in ARMS}
    result = {
        **machine(device),
        "shape": shape,
        "rounds": rounds,
        "median_seconds": medians(seconds),
        "autorank_over_plain": ratio(seconds, "autorank"),
        "adalora_over_plain": ratio(seconds, "adalora"),
        "peak_memory_mib": memory,
    }
    tell(result, arguments.out)


if __name__ == "__main__":
    main()
