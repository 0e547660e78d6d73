from __future__ import annotations

import inspect

import pytest

from autorank import errors
from autorank.errors import AutorankError, first_line

CODES = {
    "CommandError": 2,
    "DataError": 3,
    "ModelError": 4,
    "StudyError": 5,
    "FileError": 6,
    "AllTrialsFailed": 7,
}


def test_every_error_has_the_exit_code_that_the_command_line_promises() -> None:
    made = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__ and kind is not AutorankError
    }
    assert made == CODES
    assert set(errors.__all__) == {*CODES, "AutorankError", "first_line"}


@pytest.mark.parametrize("name", CODES)
def test_every_error_is_an_autorank_error_and_keeps_its_message(name: str) -> None:
    error = getattr(errors, name)("what, rule, way out")
    assert isinstance(error, AutorankError)
    assert str(error) == "what, rule, way out"


def test_the_docstring_is_the_tree() -> None:
    tree = inspect.getdoc(errors) or ""
    for name, code in CODES.items():
        line = next(line for line in tree.splitlines() if f"─ {name} " in line)
        assert f" {code} " in line


def test_the_first_line_of_what_a_library_says() -> None:
    assert first_line(ValueError("  what\nwhere\n")) == "what"
    assert first_line(ValueError()) == "ValueError"
