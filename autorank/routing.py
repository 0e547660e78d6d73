"""Which samples of a batch go through which adapter, where several are on one base model.

One adapter at a time is PEFT's own path, untouched. Where several share a forward pass, the rows of
each go through its own A and B and its own head, in one of two ways. The plain one is PEFT's mixed
batch, one adapter after the other, for any kind of layer. The joined one, for linear layers, multiplies
all rows with the A and B of all adapters at once, two products in place of two for each adapter, and
sets to zero what a row has to do with an adapter that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.adapter import wrapped_modules
from autorank.dropout import Alone
from autorank.errors import ModelError
from autorank.resize import LoraLayer

__all__ = ["Routing"]

Forward = Callable[..., Tensor]


class Routing:
    """Sends rows through adapters. Call `renew` when an adapter has come to the model or left it.

    Args:
        base: the base model.
        joined: whether linear layers take the joined way.
    """

    def __init__(self, base: nn.Module, *, joined: bool = True) -> None:
        self._base = base
        self._joined = joined
        self._rows: dict[str, slice] = {}
        self.renew()

    def renew(self) -> None:
        """Look at the model anew."""
        self._lora, self._heads = wrapped_modules(self._base)
        self._only: str | None = None
        self._weights: dict[tuple[object, ...], Tensor] = {}
        self._reached: dict[str, tuple[list[int], set[int]]] = {}

    def rows(self, name: str, layer: nn.Module) -> slice:
        """The samples of the pass that runs which go through an adapter; an empty slice for none.

        None either where no gradient of the adapter's alone would come to the layer.
        """
        if not self._rows:
            return slice(None) if name == self._only else slice(0, 0)
        reached = name not in self._reached or id(layer) in self._reached[name][1]
        return self._rows.get(name, slice(0, 0)) if reached else slice(0, 0)

    def trace(self, name: str, run: Callable[[], object]) -> None:
        """Find out which layers a gradient comes to where an adapter is alone.

        Args:
            name: the adapter's.
            run: a forward pass, of any sample; not run where the adapter is on the layers of the last time.
        """
        live = [id(layer) for layer in self._lora.values() if name in layer.scaling]
        if name in self._reached and self._reached[name][0] == live:
            return
        reached = set[int]()

        def note(module: nn.Module, inputs: object, output: Tensor) -> None:
            if output.requires_grad:
                reached.add(id(module))

        self.only(name)
        layers = cast(list[nn.Module], list(self._lora.values()))
        hooks = [layer.register_forward_hook(note) for layer in layers]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        self._reached[name] = live, reached

    def only(self, name: str) -> None:
        """Send all samples of the passes to come through one adapter."""
        if name == self._only:
            return
        modules: list[Any] = [*self._lora.values(), *self._heads.values()]
        for module in modules:
            module._active_adapter = [name]  # not set_adapter, which would stop the training of all others
        self._only = name

    @contextmanager
    def shared(self, rows: Mapping[str, range], alone: Alone) -> Iterator[None]:
        """Let several adapters share the passes inside, each with its rows.

        Args:
            rows: by the adapter's name, one after the other; together all rows there are.
            alone: entered, with its place among them, while an adapter's own copy of a head runs.

        Raises:
            ModelError: a layer does not have one row for each sample.
        """
        names = [name for name, place in rows.items() for _ in place]
        self._rows = {name: slice(place.start, place.stop) for name, place in rows.items()}
        changed: list[nn.Module] = []
        try:
            for layer in self._lora.values():
                changed.append(_replace_forward(layer, self._lora_forward(layer, names)))
            for head in self._heads.values():
                changed.append(_replace_forward(head, self._head_forward(head, alone)))
            yield
        finally:
            for module in changed:
                vars(module).pop("forward", None)
            self._rows = {}

    def _lora_forward(self, layer: LoraLayer, names: Sequence[str]) -> Forward:
        here = tuple(name for name in self._rows if name in layer.scaling)
        parts: Any = layer
        if not self._joined or not all(_is_plain(parts, name) for name in here):
            plain = cast(Any, type(layer)).forward

            def mixed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                _check_rows(x, names)
                result: Tensor = plain(layer, x, *args, adapter_names=names, **kwargs)
                return result

            return mixed
        base = layer.get_base_layer()
        pairs = [(parts.lora_A[name], parts.lora_B[name]) for name in here]
        scalings = [layer.scaling[name] for name in here]
        dropouts = {name: parts.lora_dropout[name] for name in here}
        drops = not all(isinstance(module, nn.Identity) for module in dropouts.values())

        def joined(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            _check_rows(x, names)
            result: Tensor = base(x, *args, **kwargs)
            if drops:  # every lane's rows by its own stream
                keep = nn.Identity()
                x = torch.cat([dropouts.get(name, keep)(x[rows]) for name, rows in self._rows.items()])
            return self._join(here, scalings, pairs, x, result) if pairs else result

        return joined

    def _join(
        self,
        names: tuple[str, ...],
        scalings: Sequence[float],
        pairs: Sequence[tuple[nn.Linear, nn.Linear]],
        x: Tensor,
        result: Tensor,
    ) -> Tensor:
        """Add what every row's own adapter says.

        With the A of all adapters one below the other, shape (ranks, in_features), and their B side by
        side, shape (out_features, ranks), x Aᵀ holds for every row what each component sees. What
        is not a row's own is set to zero between the two products, and so is its gradient.
        """
        rows = [a.weight for a, _ in pairs]
        a, b = torch.cat(rows), torch.cat([b.weight for _, b in pairs], dim=1)
        seen = functional.linear(x.to(a.dtype), a)
        weights = self._own(names, scalings, tuple(map(len, rows)), seen)
        return result + functional.linear(seen * weights, b).to(result.dtype)

    def _own(
        self, names: tuple[str, ...], scalings: Sequence[float], ranks: tuple[int, ...], seen: Tensor
    ) -> Tensor:
        """The scaling where a component is the row's own, else 0: shape (samples, 1, …, ranks)."""
        places = tuple((self._rows[name].start, self._rows[name].stop) for name in names)
        key = names, ranks, places, tuple(scalings), len(seen), seen.ndim
        if key not in self._weights:
            weights = torch.zeros(len(seen), sum(ranks))
            start = 0
            for (first, last), rank, scaling in zip(places, ranks, scalings, strict=True):
                weights[first:last, start : start + rank] = scaling
                start += rank
            self._weights[key] = weights.view(len(seen), *[1] * (seen.ndim - 2), -1).to(seen)
        return self._weights[key]

    def _head_forward(self, head: nn.Module, alone: Alone) -> Forward:
        copies: Any = head.modules_to_save

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found = []
            for number, (name, place) in enumerate(self._rows.items()):
                with alone(number):
                    found.append(copies[name](x[place], *args, **kwargs))
            return torch.cat(found)

        return forward


def _replace_forward(module: Any, forward: Forward) -> nn.Module:
    """Put a function in the place of a module's forward, under its hooks."""
    vars(module)["forward"] = forward
    replaced: nn.Module = module
    return replaced


def _check_rows(x: Tensor, names: Sequence[str]) -> None:
    if len(x) != len(names):
        raise ModelError(
            f"a layer sees {len(x)} rows for {len(names)} samples, so that several trials cannot share a "
            "pass: use --lanes 1"
        )


def _is_plain(layer: Any, name: str) -> bool:
    """Whether the adapter is A and B of a linear layer and nothing else, so that products can be joined."""
    return name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None
