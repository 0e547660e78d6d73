"""A metric of the user's own, `module:function`: imported, checked and called for one sample at a time.

Code runs here that autorank did not bring: only what the user names is imported. What a stored study
or an export names is not, until the user repeats it; see `config.config_from_json`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from autorank.errors import CommandError

__all__ = ["Direction", "OwnMetric", "is_own", "own_metric"]

Direction = Literal["maximize", "minimize"]
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class OwnMetric:
    """A function of a prediction and what is right; a split's score is its mean over the samples.

    Attributes:
        name: `module:function`.
        direction: which way is better.
        function: takes the prediction and the reference of one sample, gives a number.
    """

    name: str
    direction: Direction
    function: Callable[[Any, Any], Any]

    def judge(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """The number that the function gives for each sample.

        Raises:
            CommandError: it raised, or gave what is no finite number.
        """
        with redirect_stdout(sys.stderr):  # stdout is for results
            return [self._of(*pair) for pair in zip(predictions, references, strict=True)]

    def _of(self, prediction: Any, reference: Any) -> float:
        called = f"metric {self.name}({_short(prediction)}, {_short(reference)})"
        try:
            found = self.function(prediction, reference)
        except (Exception, SystemExit) as error:
            raise CommandError(f"{called} failed: {_said(error)}: correct the function") from error
        try:
            value = float(found)
        except (TypeError, ValueError, OverflowError):
            raise CommandError(f"{called} gave {_short(found)}: it must give a number") from None
        if not math.isfinite(value):
            raise CommandError(f"{called} gave {value}: it must give a finite number")
        return value


def is_own(name: str) -> bool:
    """Whether a metric's name is `module:function`."""
    return ":" in name


def own_metric(name: str) -> OwnMetric:
    """Import the function; modules of the working directory are found too, behind all others.

    Its attribute `direction` says which way is better; without one a larger number is.

    Args:
        name: `module:function`; both may have dots.

    Raises:
        CommandError: there is no such module or function, its import fails, or it cannot be a metric.
    """
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise CommandError(
            f"metric {name!r}: write module:function, such as my_metrics:closeness for the function "
            "closeness of my_metrics.py"
        )
    found: Any = _import(module_name, name)
    for part in path.split("."):
        if not hasattr(found, part):
            there = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
            listed = ", ".join(there[:10]) or "no function"
            raise CommandError(f"metric {name}: {module_name} has no {path}; it has {listed}")
        found = getattr(found, part)
    if not callable(found):
        raise CommandError(f"metric {name}: {path} is {type(found).__name__}, which cannot be called")
    try:
        inspect.signature(found).bind("prediction", "reference")
    except TypeError as error:
        raise CommandError(
            f"metric {name}: {path} must take two arguments, a prediction and what is right: {error}"
        ) from error
    except ValueError:  # some that are written in C do not tell what they take
        pass
    direction = getattr(found, "direction", "maximize")
    if direction not in get_args(Direction):
        raise CommandError(f"metric {name}: its direction is {direction!r}; write maximize or minimize")
    return OwnMetric(name, cast(Direction, direction), found)


def _import(module: str, name: str) -> Any:
    with _working_directory(), redirect_stdout(sys.stderr):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise CommandError(f"metric {name}: importing {module} failed: {_said(error)}") from error
            raise CommandError(
                f"metric {name}: there is no module {error.name!r}, neither installed nor in the working "
                f"directory {Path.cwd()}"
            ) from error
        except (Exception, SystemExit) as error:
            raise CommandError(f"metric {name}: importing {module} failed: {_said(error)}") from error


@contextmanager
def _working_directory() -> Iterator[None]:
    """Modules of the working directory can be imported, but none hides another."""
    here = str(Path.cwd())
    sys.path.append(here)
    importlib.invalidate_caches()  # a file of this second may not have been seen
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(here)
        sys.path.reverse()


def _said(error: BaseException) -> str:
    """What an error says, and the line that raised it."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({last.filename}:{last.lineno})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
