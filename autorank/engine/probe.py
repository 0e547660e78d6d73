"""How many lanes pay on this machine: measured, with a few steps of trials that are thrown away."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from autorank.engine.memory import free_memory, is_full
from autorank.lane import Bench, Lane, TrialSpec, train_lanes
from autorank.routing import Routing
from autorank.train import NotFinite

__all__ = ["Throughput", "measure_lanes", "passing_lanes"]

GAIN = 1.05
"""Twice as many lanes must do so many times the samples per second, or they are not worth it."""

ROOM = 0.8
"""Most of a device's memory that the chosen lanes may take: batches differ in length."""

_STEPS = 3


@dataclass(frozen=True)
class Throughput:
    """What so many lanes did: training samples per second of all together, and the device's peak memory.

    Attributes:
        lanes: how many.
        samples_per_s: 0 where they could not be trained so.
        memory_bytes: 0 on a CPU, whose memory is not the lanes' alone.
        reason: why they could not.
    """

    lanes: int
    samples_per_s: float
    memory_bytes: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def measure_lanes(bench: Bench, specs: Sequence[TrialSpec], *, most: int) -> tuple[int, list[Throughput]]:
    """Double the lanes as long as that pays and fits.

    Args:
        bench: what they train on; it is left as it was.
        specs: trials as the search starts them, used in turn.
        most: lanes that can be used.

    Returns:
        How many lanes to use, and what was measured, one lane first.
    """
    found: list[Throughput] = []
    count = chosen = 1
    while count <= most:
        found.append(_measure(bench, [specs[n % len(specs)] for n in range(count)]))
        one = found[-1]
        pays = len(found) == 1 or one.samples_per_s >= GAIN * found[-2].samples_per_s
        if not one.samples_per_s or not pays or not _fits(bench, one.memory_bytes):
            break
        chosen = count
        if not _fits(bench, 2 * one.memory_bytes):
            break
        count *= 2
    return chosen, found


def _fits(bench: Bench, memory_bytes: int) -> bool:
    """Whether so much leaves the device some room."""
    if bench.base.device.type != "cuda":
        return True
    return memory_bytes <= ROOM * torch.cuda.get_device_properties(bench.base.device).total_memory


@contextmanager
def passing_lanes(bench: Bench, specs: Sequence[TrialSpec]) -> Iterator[float]:
    """Lanes of these trials, their ranks fixed, taken off again in the end.

    Yields:
        Training samples per second of all together, over some steps after a first one that warms up.

    Raises:
        NotFinite: no lane can take a step.
    """
    device, lanes = bench.base.device, list[Lane]()
    routing = Routing(bench.base.model) if len(specs) > 1 else None
    try:
        for number, spec in enumerate(specs):
            one = replace(spec, number=number, adaptive=False)
            lanes.append(Lane(one, bench, name=f"probe{number:03}", routing=routing))
        for one_of in bench.base.devices if device.type == "cuda" else ():
            torch.cuda.reset_peak_memory_stats(one_of)
        _step(bench, lanes, routing)
        began, samples = _now(device), sum(lane.samples for lane in lanes)
        for _ in range(_STEPS):
            _step(bench, lanes, routing)
        yield (sum(lane.samples for lane in lanes) - samples) / (_now(device) - began)
    finally:
        for lane in lanes:
            lane.close()
        free_memory()


def _step(bench: Bench, lanes: Sequence[Lane], routing: Routing | None) -> None:
    failed = [one for one in train_lanes(bench, lanes, routing=routing) if isinstance(one, Exception)]
    if len(failed) == len(lanes):
        raise failed[0]


def _measure(bench: Bench, specs: Sequence[TrialSpec]) -> Throughput:
    """Train so many lanes for some steps."""
    device = bench.base.device
    try:
        with passing_lanes(bench, specs) as samples_per_s:
            memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
            return Throughput(len(specs), samples_per_s, memory)
    except Exception as error:
        if is_full(error):
            return Throughput(len(specs), 0.0, 0, "out of memory")
        if len(specs) == 1 and not isinstance(error, NotFinite):
            raise
        return Throughput(len(specs), 0.0, 0, str(error).splitlines()[0] if str(error) else repr(error))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
