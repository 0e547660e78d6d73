from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from types import ModuleType

import pytest

import autorank


def test_exported_members() -> None:
    assert sorted(autorank.__all__) == [
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
    assert dir(autorank) == sorted([*autorank.__all__, "__version__"])


def test_the_version_is_one_that_packaging_understands() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", autorank.__version__)


@pytest.mark.parametrize("name", autorank.__all__)
def test_a_public_name_is_the_thing_itself_even_where_a_module_has_its_name(name: str) -> None:
    for module in ("autorank.search", "autorank.export"):
        assert isinstance(importlib.import_module(module), ModuleType)
    member = getattr(autorank, name)
    assert callable(member)
    assert not isinstance(member, ModuleType)
    assert inspect.getdoc(member)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        autorank.serach  # noqa: B018


def test_importing_is_light() -> None:
    heavy = ["torch", "transformers", "peft", "optuna", "datasets", "numpy", "rich", "typer", "pydantic"]
    code = (
        f"import autorank, sys; autorank.parse_budget('2M'); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_is_for_and_what_it_offers() -> None:
    import pkgutil

    for found in pkgutil.walk_packages(autorank.__path__, "autorank."):
        module = importlib.import_module(found.name)
        lines = (module.__doc__ or "").strip().splitlines()
        assert lines, found.name
        assert isinstance(module.__all__, list), found.name
        assert all(hasattr(module, name) for name in module.__all__), found.name
