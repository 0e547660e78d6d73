"""What tests of exports share: the code of a card, run, and asked what `autorank predict` is asked."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from autorank.predictor import predict_export


def ask(folder: Path, **given: str) -> str:
    """What all code of a card prints; the one line that sets each name in `given` is given other code."""
    blocks = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2 and "import autorank" not in blocks[1]
    for name, value in given.items():
        blocks[1], count = re.subn(f"(?m)^{name} = .*$", f"{name} = {value}".replace("\\", r"\\"), blocks[1])
        assert count == 1, blocks[1]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        exec("\n".join(blocks), {})
    return out.getvalue().removesuffix("\n")


def assert_card_predicts(folder: Path, row: dict[str, Any], scratch: Path, **given: str) -> Any:
    """The card says of a row what `autorank predict` says; `given` is by default the row's own columns."""
    said = scratch / "said-of-card.jsonl"
    predict_export(folder, str(write_jsonl(scratch / "card.jsonl", [row])), said)
    prediction = json.loads(said.read_text(encoding="utf-8"))["prediction"]
    said.unlink()
    printed = ask(folder, **(given or {name: repr(value) for name, value in row.items()}))
    if isinstance(prediction, float):
        assert float(printed) == pytest.approx(prediction, rel=1e-5)
    else:
        assert printed == str(prediction), (printed, prediction)
    return prediction
