"""Encoder-decoders all the way: a search, its result, the export, and plain PEFT on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from card_code import assert_card_predicts
from conftest import Outcome, seeded
from peft import PeftModel
from seq2seq_world import save_seq2seq, write_reversals

from autorank.adapter import lora_layers
from autorank.artifacts import read_json
from autorank.config import load_config
from autorank.display import Display
from autorank.evaluate import evaluate
from autorank.generate import Writer
from autorank.plan import RankPlan
from autorank.preflight import prepare
from autorank.study import Study
from autorank.tasks import Example, Metric, Seq2Seq

Cli = Callable[..., Outcome]


def teach_to_copy(folder: Path, steps: int) -> Path:
    """Train a whole model, T5, to say what it is told: up to four letters."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    task = Seq2Seq(("source", "target"), Metric("loss", "minimize"), decoder_start=0)
    stream = torch.Generator().manual_seed(0)
    with seeded(0):
        model.train()
        for _ in range(steps):
            lengths = torch.randint(1, 5, (32,), generator=stream).tolist()
            rows = [[*torch.randint(3, 11, (n,), generator=stream).tolist(), 1] for n in lengths]
            batch = task.collate([Example(row, row) for row in rows], 0)
            loss = task.loss(model(**batch.inputs).logits, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    return folder


def score_in_plain_peft(out: Path, model: Path, data: Path, studies: Path, metric: str) -> dict[str, float]:
    """Run the code of the card of an export, and score what it loads on validation."""
    card = (out / "README.md").read_text(encoding="utf-8")
    found = re.search("```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(found[1], names)
    adapted: PeftModel = names["model"].eval()
    assert type(adapted).__name__ == "PeftModelForSeq2SeqLM"
    given = {"model": str(model), "data": str(data), "studies_dir": str(studies), "metric": metric}
    setup = prepare(
        load_config(None, {**given, "budget": "3k", "max_length": 12, "steps": 12}), Display.silent()
    )
    inner: Any = adapted.get_base_model()
    writer = Writer(inner, names["tokenizer"], setup.base.pad_token_id, 12)
    settings: dict[str, Any] = {"batch_size": 7, "pad_token_id": setup.base.pad_token_id, "writer": writer}
    assert len(lora_layers(inner)) > 0
    scores = evaluate(inner, setup.task, setup.bench.validation, **settings).scores
    with Study.open_read_only(studies / "sides") as study:
        best = study.winner()
    stored = studies / "sides" / "artifacts" / f"trial-{best.number}"
    setup.bench.put_back(stored, RankPlan.from_json(best.extra["plan"]))
    with torch.no_grad():
        batch = setup.task.collate(setup.bench.validation[:4], setup.base.pad_token_id)
        live = setup.base.model.to("cpu")(**batch.inputs).logits
        torch.testing.assert_close(adapted(**batch.inputs).logits, live, atol=1e-5, rtol=0)
    return scores


@pytest.mark.parametrize("kind", ["t5", "gated", "bart", "marian"])
def test_what_a_search_exports_is_what_it_scored(cli: Cli, tmp_path: Path, kind: str) -> None:
    model, data = save_seq2seq(tmp_path / "model", kind), write_reversals(tmp_path / "data", rows=30)
    metric = "loss" if kind == "gated" else "chrf"
    what = ("--model", model, "--data", data, "--metric", metric, "--budget", "3k", "--max-length", 12)
    how = (
        "--trials",
        2,
        "--steps",
        12,
        "--batch-size",
        8,
        "--name",
        "sides",
        "--studies-dir",
        tmp_path / "s",
    )
    done = cli("search", *what, *how)
    assert done.code == 0, done.err
    assert "task seq2seq (columns source, target)" in done.err + done.out
    out = tmp_path / "out"
    assert cli("export", "sides", "--out", out, "--studies-dir", tmp_path / "s").code == 0
    facts = read_json(out / "autorank_export.json")
    assert (facts["task"], facts["task_type"]) == ("seq2seq", "SEQ_2_SEQ_LM")
    assert facts["trainable_parameters"] <= 3000
    scores = score_in_plain_peft(out, model, data, tmp_path / "s", metric)
    assert scores == pytest.approx(facts["validation"], rel=1e-5)
    assert_card_predicts(out, {"source": "the red cat"}, tmp_path)
    expected = {"loss", "perplexity", "token_accuracy", metric}
    assert set(scores) == expected and facts["value"] == facts["validation"][metric]


def test_a_model_that_copies_learns_to_reverse(cli: Cli, tmp_path: Path) -> None:
    model = teach_to_copy(save_seq2seq(tmp_path / "model"), steps=360)
    data = write_reversals(tmp_path / "data", rows=240, longest=3, columns=("prompt", "completion"))
    what = ("--model", model, "--data", data, "--metric", "exact_match", "--budget", "20k")
    how = ("--trials", 1, "--steps", 160, "--batch-size", 16, "--max-length", 12, "--name", "copies")
    done = cli("search", *what, *how, "--studies-dir", tmp_path / "s", "--set", "evaluations=2")
    assert done.code == 0, done.err
    shown = cli("show", "copies", "--studies-dir", tmp_path / "s", "--json").json
    frozen = shown["result"]["references"]["frozen_base"]
    best = shown["best"]["metrics"]
    # Of texts from behind, a model that copies gets those that read the same both ways.
    assert frozen["validation"]["exact_match"] < 0.2
    assert best["exact_match"] > frozen["validation"]["exact_match"] + 0.2
    assert shown["result"]["test"]["exact_match"] > frozen["test"]["exact_match"] + 0.2
