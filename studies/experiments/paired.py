"""Arms that take turns within one run, the ratio of their times, and what a benchmark prints.

A slow minute of the machine is slow for all arms; a ratio is of steps of the same rounds.
"""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

__all__ = ["Step", "machine", "medians", "take_turns", "tell", "time_ratio"]

Step = Callable[[int], Any]
"""Does one step of an arm, of the number given."""


def take_turns(arms: Mapping[str, Step], rounds: int, *, warm: int) -> dict[str, list[float]]:
    """Seconds of every step of every arm but for the first ones; a round's order is drawn anew each time."""
    names = list(arms)
    seconds: dict[str, list[float]] = {arm: [] for arm in names}
    order = random.Random(0)
    for number in range(rounds):
        for arm in order.sample(names, len(names)):
            began = time.perf_counter()
            arms[arm](number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[arm].append(time.perf_counter() - began)
    return {arm: values[warm:] for arm, values in seconds.items()}


def time_ratio(
    first: Sequence[float], second: Sequence[float], *, block: int, errors: float, times: int = 1, digits: int
) -> dict[str, float]:
    """Total time of the first over that of the second, with an interval from blocks of rounds.

    Args:
        first: seconds of each round.
        second: of the other arm, in the same rounds.
        block: rounds of a block.
        errors: standard errors on either side of the centre, for 95 % by the number of blocks.
        times: what the ratio is multiplied by.
        digits: of what is given.
    """
    pairs = list(zip(first, second, strict=True))
    blocks = [pairs[start : start + block] for start in range(0, len(pairs) - block + 1, block)]
    logs = [math.log(times * sum(a for a, _ in part) / sum(b for _, b in part)) for part in blocks]
    centre, spread = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "ratio": round(math.exp(centre), digits),
        "low": round(math.exp(centre - errors * spread), digits),
        "high": round(math.exp(centre + errors * spread), digits),
        "blocks": len(blocks),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
    }


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median step of every arm."""
    return {arm: round(statistics.median(values), 4) for arm, values in seconds.items()}


def tell(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the result, and store it where that is asked."""
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
