"""What tests of bad input share: one message, its exit code, nothing on disk, and no weight that was read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from conftest import Outcome

TYPES = {2: "CommandError", 3: "DataError", 4: "ModelError", 5: "StudyError", 6: "FileError"}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def husk(model: Path, folder: Path) -> Path:
    """The model, of which all can be read but its weights."""
    shutil.copytree(model, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def assert_refused(
    cli: Callable[..., Outcome],
    folder: Path,
    arguments: list[str],
    code: int,
    said: str,
    commands: Sequence[str] = ("search", "plan"),
) -> None:
    """The commands end with that message and leave the folder as it was."""
    before = contents(folder)
    told = cli(commands[0], *arguments)
    assert told.code == code, (told.out, told.err)
    error = told.err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(said, error), error
    assert "Traceback" not in told.out + told.err and "study" not in told.out
    for command in commands:
        objected = cli(command, *arguments, "--json")
        assert objected.code == code and "Traceback" not in objected.err
        assert objected.json == {
            "error": {
                "type": TYPES[code],
                "message": error.removeprefix("error: "),
                "exit_code": code,
            }
        }
    assert contents(folder) == before
