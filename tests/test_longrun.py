"""What a search found, trained for longer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autorank.artifacts import read_json
from autorank.config import load_config
from autorank.errors import CommandError, FileError, ModelError, StudyError
from autorank.export import train
from autorank.lane import Lane
from autorank.search import search
from autorank.study import Study
from autorank.train import NotFinite

LOADER = """
import json, sys
sys.modules["autorank"] = None
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3)
model = PeftModel.from_pretrained(base, sys.argv[2])
ranks = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
print(json.dumps({name.removeprefix("base_model.model."): rank for name, rank in ranks.items()}))
"""


@pytest.fixture(scope="module")
def studies(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    settings = {
        "model": str(tiny_bert),
        "data": str(tiny_data),
        "budget": "3k",
        "trials": 3,
        "steps": 20,
        "batch_size": 8,
        "max_length": 16,
        "name": "tiny",
        "studies_dir": str(folder),
    }
    search(load_config(None, settings))
    return folder


def best_of(studies: Path) -> dict[str, Any]:
    with Study.open_read_only(studies / "tiny") as study:
        return study.winner().to_json()


def test_it_is_exported_like_any_trial_at_the_ranks_that_were_found(
    studies: Path, tiny_bert: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    best = best_of(studies)
    before = {path: path.read_bytes() for path in (studies / "tiny").rglob("*") if path.is_file()}
    out = tmp_path / "long"
    told = cli("train", "tiny", "--steps", 60, "--out", out, "--studies-dir", studies, "--json").json
    facts = read_json(out / "autorank_export.json")
    assert told == {
        "out": str(out),
        "trial": best["number"],
        "step": facts["step"],
        "steps": 60,
        "value": facts["value"],
    }
    assert (facts["ranks"], facts["params"], facts["seed"]) == (best["ranks"], best["params"], best["seed"])
    assert facts["long_run"] == {"steps": 60, "rows": "train"} and facts["test"] is None
    assert facts["verdict"] is None and list(facts["references"]) == ["frozen_base"]
    assert facts["value"] == facts["validation"]["accuracy"] and 0 < facts["step"] <= 60
    assert "| trained anew | 60 steps at the trial's ranks" in (out / "README.md").read_text()
    stored = load_file(
        studies / "tiny" / "artifacts" / f"trial-{best['number']}" / "adapter_model.safetensors"
    )
    trained = load_file(out / "adapter_model.safetensors")
    assert {k: t.shape for k, t in trained.items()} == {k: t.shape for k, t in stored.items()}
    assert not any(torch.equal(trained[key], stored[key]) for key in trained if "lora_B" in key)
    assert before == {path: path.read_bytes() for path in (studies / "tiny").rglob("*") if path.is_file()}
    loaded = subprocess.run(
        [sys.executable, "-c", LOADER, str(tiny_bert), str(out)], capture_output=True, text=True, check=True
    )
    wanted = {name: rank for name, rank in best["ranks"].items() if rank}
    assert json.loads(loaded.stdout.splitlines()[-1]) == wanted


def test_with_all_rows_nothing_is_scored_and_the_last_step_is_taken(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    make = Lane.__init__

    def spy(lane: Lane, spec: Any, bench: Any, state: Any = None) -> None:
        rows.append(len(bench.train))
        make(lane, spec, bench, state)

    monkeypatch.setattr(Lane, "__init__", spy)
    monkeypatch.setattr(Lane, "evaluate", None)
    train("tiny", tmp_path / "all", steps=10, whole=True, trial=0, studies_dir=studies)
    facts = read_json(tmp_path / "all" / "autorank_export.json")
    assert rows == [96 + 36]
    assert (facts["trial"], facts["step"], facts["value"], facts["validation"]) == (0, 10, None, {})
    assert (
        "on the training and validation rows, so it was not scored"
        in (tmp_path / "all" / "README.md").read_text()
    )


def test_the_same_steps_give_the_same_adapter(studies: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train("tiny", tmp_path / name, steps=6, studies_dir=studies)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two


def test_what_cannot_be_trained_is_refused_and_nothing_is_written(
    studies: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CommandError, match="steps is 0"):
        train("tiny", out, steps=0, studies_dir=studies)
    with pytest.raises(StudyError, match="no trial 9"):
        train("tiny", out, steps=5, trial=9, studies_dir=studies)
    with pytest.raises(FileError, match="not empty"):
        train("tiny", studies, steps=5, studies_dir=studies)
    refused = cli("train", "tiny", "--steps", 5, "--out", out, "--data", "test", "--studies-dir", studies)
    assert refused.code == 2 and "--data 'test' is not known: it is train or all" in refused.err

    def diverge(lane: Lane) -> float:
        raise NotFinite("the loss is nan at step 1")

    monkeypatch.setattr(Lane, "train", diverge)
    with pytest.raises(ModelError, match="the loss is nan at step 1"):
        train("tiny", out, steps=5, studies_dir=studies)
    assert not out.exists()
