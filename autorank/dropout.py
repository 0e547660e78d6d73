"""Dropout, drawn for each trial from a stream of its own, whoever shares the pass.

The adapter's is a module of its own. The base's draws from one global stream: where several trials share a
forward pass, its calls are cut into their rows, and each trial's part is drawn from that trial's
stream. So a trial sees the masks that it would see alone, where its rows are padded to the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autorank.sketch import seeded

__all__ = ["AdapterDropout", "Alone", "Passes", "dropout_on", "has_dropout", "undivided"]


Alone = Callable[[int], AbstractContextManager[None]]
"""Entered with a trial's place in a pass: all rows within are its own, as in its copy of a head."""
Passes = Callable[[Sequence[int]], AbstractContextManager[Alone]]
"""A context for each forward pass, which is told how many rows each trial has in it."""


def undivided(_: Sequence[int]) -> AbstractContextManager[Alone]:
    """A pass that nothing has to be cut in."""
    return nullcontext(lambda _: nullcontext())


class AdapterDropout(nn.Module):
    """Drops elements of what an adapter reads, where it is on; one for all layers of the adapter.

    Args:
        p: the share that is dropped, in [0, 1); what stays is scaled by 1 / (1 - p).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self._p = p
        self._key: str | None = None
        self._streams: dict[torch.device, torch.Generator] = {}

    def start(self, key: str) -> None:
        """Drop from now on, by a stream on each device with layers, which depends on the key alone."""
        self._key, self._streams = key, {}

    def stop(self) -> None:
        """Drop nothing."""
        self._key = None

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        if self._key is None:
            return x
        if x.device not in self._streams:
            key = "/".join([self._key, *["next"] * len(self._streams)])
            self._streams[x.device] = torch.Generator(x.device).manual_seed(seeded(key).initial_seed())
        kept = torch.rand(x.shape, generator=self._streams[x.device], device=x.device) >= self._p
        return x * kept / (1 - self._p)


def has_dropout(model: nn.Module) -> bool:
    """Whether anything is dropped in training: a module of dropout, or an attention that is told to."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any("dropout" in key and isinstance(p, float) and p > 0 for key, p in vars(module).items())
        for module in model.modules()
    )


@contextmanager
def dropout_on(model: nn.Module, device: torch.device, keys: Sequence[str]) -> Iterator[Passes]:
    """The model in training mode; eval mode and the caller's random state afterwards.

    Args:
        model: the base model.
        device: where it takes its inputs; that of all its layers, where there are several keys.
        keys: what the stream of each trial is drawn from.

    Yields:
        See `Passes`.
    """
    seeds = [seeded(key).initial_seed() for key in keys]
    # Seeding one device seeds them all.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seeds[0])
        streams = _Streams(device, seeds) if len(seeds) > 1 else None
        model.train()
        try:
            yield undivided if streams is None else streams.over
        finally:
            model.eval()


class _Streams(TorchFunctionMode):
    """Cuts calls that drop something into the rows of each trial."""

    def __init__(self, device: torch.device, seeds: Sequence[int]) -> None:
        super().__init__()
        self._device = device
        self._sizes: Sequence[int] = ()
        self._alone: int | None = None
        self._states = []
        for seed in seeds:
            torch.manual_seed(seed)
            self._states.append(self._state())

    @contextmanager
    def over(self, sizes: Sequence[int]) -> Iterator[Alone]:
        """For a pass with so many rows of each trial."""
        self._sizes = sizes
        with self:
            yield self._own

    @contextmanager
    def _own(self, number: int) -> Iterator[None]:
        """Within it all rows are those of one trial, as in its own copy of a head."""
        self._alone = number
        try:
            yield
        finally:
            self._alone = None

    def _state(self) -> Tensor:
        cuda = self._device.type == "cuda"
        return torch.cuda.get_rng_state(self._device) if cuda else torch.get_rng_state()

    def _set_state(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        share = 0.0
        if func is functional.dropout and _argument(args, kwargs, 2, "training", True):
            share = _argument(args, kwargs, 1, "p", 0.5)
        elif func is functional.scaled_dot_product_attention:
            share = _argument(args, kwargs, 4, "dropout_p", 0.0)
        return self._by_trial(func, args, kwargs) if share > 0 else func(*args, **kwargs)

    def _by_trial(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Call on each trial's rows with its stream, and put the results together."""
        if self._alone is not None:
            self._set_state(self._states[self._alone])
            own: Tensor = func(*args, **kwargs)
            self._states[self._alone] = self._state()
            return own
        total, start, found = sum(self._sizes), 0, []

        def has_rows(value: Any) -> bool:
            return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == total

        def rows(value: Any) -> Any:
            return value[start : start + size] if has_rows(value) else value

        if not has_rows(args[0] if args else next(iter(kwargs.values()))):
            shared: Tensor = func(*args, **kwargs)  # what all trials have, such as a table of positions
            return shared
        for number, size in enumerate(self._sizes):
            self._set_state(self._states[number])
            found.append(func(*map(rows, args), **{key: rows(value) for key, value in kwargs.items()}))
            self._states[number] = self._state()
            start += size
        return torch.cat(found)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)
