"""Search for the best LoRA adapter under a budget of trainable parameters.

The public names are loaded when they are first used, so that `import autorank` is light.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autorank.allocator import RankAllocator, shape_from_state
    from autorank.budget import parse_budget
    from autorank.callback import RankAllocatorCallback
    from autorank.export import export
    from autorank.gradient import start_from_gradient
    from autorank.schedule import Schedule, make_schedule
    from autorank.search import resume, search
    from autorank.watch import RankAllocatorWarning

__all__ = [
    "RankAllocator",
    "RankAllocatorCallback",
    "RankAllocatorWarning",
    "Schedule",
    "export",
    "make_schedule",
    "parse_budget",
    "resume",
    "search",
    "shape_from_state",
    "start_from_gradient",
]
__version__ = "0.1.0"

_HOMES = {
    "RankAllocator": "allocator",
    "RankAllocatorCallback": "callback",
    "RankAllocatorWarning": "watch",
    "Schedule": "schedule",
    "export": "export",
    "make_schedule": "schedule",
    "parse_budget": "budget",
    "resume": "search",
    "search": "search",
    "shape_from_state": "allocator",
    "start_from_gradient": "gradient",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This package as a module whose public names are never modules.

    Python binds a submodule to its package when it is first imported. That would put the modules
    `search` and `export` where the functions of these names belong.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
