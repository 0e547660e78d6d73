"""Where a base model lies: on one device, or its layers spread over the GPUs of this machine.

accelerate's home. What is spread passes from GPU to GPU layer by layer (transformers' `device_map`),
so that a model may be larger than the memory of one; layers that no GPU holds are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from transformers import PreTrainedModel

from autorank.config import SPREADS
from autorank.errors import ModelError, first_line

__all__ = ["find_device", "place", "spread"]


def find_device(name: str) -> torch.device:
    """The device of that name, tried out; the first GPU where layers are to be spread over all.

    Raises:
        ModelError: there is none, or nothing can be computed there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name in SPREADS and not torch.cuda.is_available():
        raise ModelError(
            f"device {name!r} spreads a model over GPUs, and this machine has none that PyTorch can use: "
            "give cpu, or leave it out"
        )
    try:
        device = torch.device("cuda:0" if name in SPREADS else name)
        if device.type == "meta":
            raise RuntimeError("nothing can be computed there")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ModelError(
            f"device {name!r} cannot be used: {first_line(error).split('. ')[0]}; this machine has "
            f"{', '.join(here)}, and over several GPUs a model is spread by {', '.join(SPREADS)}"
        ) from None
    return device


def place(model: PreTrainedModel, source: str, name: str) -> tuple[torch.device, ...]:
    """Bring the model, which is on the CPU, to the device of that name, or spread it.

    Args:
        model: what `find_device` has found a device for.
        source: what the user calls it.
        name: a device; `balanced` fills the GPUs alike, `balanced_low_0` leaves room on the first one,
            `sequential` fills them one after the other.

    Returns:
        The devices that hold it; the first takes its inputs.

    Raises:
        ModelError: the memory there does not hold it.
    """
    device = find_device(name)
    try:
        if name in SPREADS and torch.cuda.device_count() > 1:
            return spread(model, _device_map(model, source, name))
        model.to(device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        raise ModelError(f"{source} does not fit into the memory of {device}: give a smaller model") from None
    return (device,)


def _device_map(model: PreTrainedModel, source: str, name: str) -> dict[str, torch.device]:
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    whole = list(model._no_split_modules or ())  # blocks, whose layers add up in place
    if name == "sequential":
        memory = get_max_memory()
    else:
        low_zero = name == "balanced_low_0"
        memory = get_balanced_memory(model, no_split_module_classes=whole, low_zero=low_zero)
    found = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    outside = [layer for layer, where in found.items() if not isinstance(where, int)]
    if outside:
        raise ModelError(
            f"{source} does not fit into the memory of {torch.cuda.device_count()} GPUs, and {outside[0]} "
            "would lie outside, where nothing is trained: give a smaller model, or --dtype bfloat16"
        )
    return {layer: torch.device("cuda", int(where)) for layer, where in found.items()}


def spread(model: PreTrainedModel, device_map: Mapping[str, torch.device]) -> tuple[torch.device, ...]:
    """Bring each layer to its device, and have every module move what it is given to its own.

    Args:
        model: on the CPU.
        device_map: the device of each module by its name, all that is below it included; the first one
            is that of the inputs, and of what the model gives back.

    Returns:
        The devices, each once.
    """
    from accelerate import dispatch_model

    devices = tuple(dict.fromkeys(device_map.values()))
    dispatch_model(
        model,
        cast(dict[str, str | int | torch.device], dict(device_map)),
        main_device=devices[0],
        skip_keys=model._skip_keys_device_placement,
        force_hooks=True,
    )
    return devices
