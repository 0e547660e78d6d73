from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seq2seq_world import save_seq2seq
from torch import nn

from autorank.evaluate import evaluate, paired_difference, standard_error
from autorank.model import Base, load_base
from autorank.tasks import CausalLM, Example, Metric, Seq2Seq, Task, TextClassification, for_model

TASK = TextClassification(("text",), ("a", "b", "c"), Metric("accuracy", "maximize"))


class Counting(nn.Module):
    """Predicts the first token modulo 3; remembers the shapes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids[:, 0] % 3, 3).float())


def test_outcomes_come_back_in_the_split_s_order() -> None:
    examples = [Example([i, *[1] * (i * 7 % 5)], i % 3 if i % 4 else (i + 1) % 3) for i in range(1, 21)]
    model = Counting()
    result = evaluate(model, TASK, examples, batch_size=6, pad_token_id=0)
    assert result.outcomes[:, 0].tolist() == [i % 3 for i in range(1, 21)]
    assert result.outcomes[:, 1].tolist() == [e.labels for e in examples]
    assert result.scores["accuracy"] == pytest.approx(15 / 20)
    assert [shape[0] for shape in model.shapes] == [6, 6, 6, 2]
    assert sorted(shape[1] for shape in model.shapes) == [shape[1] for shape in model.shapes]


def outcomes(correct: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [correct.double(), torch.ones(len(correct)).double(), torch.zeros(len(correct)).double()], 1
    )


def test_the_standard_error_of_accuracy_is_the_binomial_one() -> None:
    rows = outcomes(torch.arange(400) % 5 != 0)
    assert standard_error(TASK, rows, resamples=400) == pytest.approx(math.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_a_difference_is_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    second = torch.rand(500, generator=generator) < 0.7
    first = second.clone()
    first[(~second).nonzero()[:25]] = True
    found = paired_difference(TASK, outcomes(first), outcomes(second))
    assert found.mean == pytest.approx(0.05) and found.n == 500
    # 25 rows of 500 differ, all one way: sqrt(0.05 * 0.95 / 500) = 0.0097, far below the unpaired 0.028.
    assert found.low == pytest.approx(0.05 - 1.96 * 0.0097, abs=0.004)
    assert found.high == pytest.approx(0.05 + 1.96 * 0.0097, abs=0.004)
    assert paired_difference(TASK, outcomes(second), outcomes(first)).mean == pytest.approx(-0.05)


def test_less_loss_is_a_positive_difference() -> None:
    task = CausalLM(("text",), Metric("loss", "minimize"))
    better = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 1.0]]).double()
    worse = torch.tensor([[2.0, 2.0, 1.0], [4.0, 4.0, 1.0]]).double()
    assert paired_difference(task, better, worse).mean == pytest.approx(0.5)


def test_equal_outcomes_differ_by_nothing() -> None:
    rows = outcomes(torch.arange(50) % 2 == 0)
    found = paired_difference(TASK, rows, rows)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


@pytest.fixture(scope="module", params=["t5", "llama"])
def speaker(request: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Task]:
    """A model that writes, and a task whose metric is of what it writes."""
    metric, task = Metric("exact_match", "maximize"), None
    if request.param == "t5":
        folder = save_seq2seq(tmp_path_factory.mktemp("models") / "t5")
        task = Seq2Seq(("source", "target"), metric)
    else:
        folder, task = tiny_llama, CausalLM(("prompt", "completion"), metric)
    base = load_base(str(folder), auto_class=task.auto_class, model_kwargs={}, device="cpu")
    return base, for_model(task, base.decoder_start)


def rows_for(base: Base, task: Any) -> list[Example]:
    """Sides of many lengths, those that the model reads and those that it should write."""
    words = [word for word in sorted(base.tokenizer.get_vocab()) if word.isalpha()]
    texts = [" ".join(words[: 1 + i * 3 % 7]) for i in range(9)]
    first, second = task.columns
    rows = [
        {first: text, second: " ".join(reversed(text.split()[: 1 + i % 3]))} for i, text in enumerate(texts)
    ]
    return list(task.encode(rows, base.tokenizer, 32).examples)


def test_what_is_written_is_judged_row_by_row(speaker: tuple[Base, Task]) -> None:
    base, task = speaker
    writing: Any = task
    examples = rows_for(base, task)
    longest = max(sum(label >= 0 for label in example.labels) for example in examples)  # type: ignore[union-attr]
    said = [base.writer.write([writing.prompt(example)], longest)[0] for example in examples]
    assert len(set(said)) > 1
    # Every second row wants what the model says.
    rows = [
        replace(row, reference=text if i % 2 else "not this")
        for i, (row, text) in enumerate(zip(examples, said, strict=True))
    ]
    settings: dict[str, Any] = {"batch_size": 4, "pad_token_id": base.pad_token_id}
    result = evaluate(base.model, task, rows, writer=base.writer, **settings)
    assert result.outcomes[:, 3].tolist() == [float(i % 2) for i in range(9)]
    assert result.scores["exact_match"] == pytest.approx(4 / 9)
    plain = evaluate(base.model, replace(writing, metric=Metric("loss", "minimize")), rows, **settings)
    assert torch.equal(plain.outcomes, result.outcomes[:, :3])
    assert plain.scores == {key: value for key, value in result.scores.items() if key != "exact_match"}
    with pytest.raises(AssertionError, match="exact_match needs a writer"):
        evaluate(base.model, task, rows, **settings)


def test_a_difference_of_chrf_is_of_whole_samples() -> None:
    task = Seq2Seq(("source", "target"), Metric("chrf", "maximize"))
    assert task.text_metric is not None
    tokens = [1.0, 2.0, 1.0]
    pairs = [("abcdefgh", "abcdefgh"), ("xy", "abcdefghijkl"), ("abcd", "abce")]
    better = torch.tensor([[*tokens, *task.text_metric.statistics(*pair)] for pair in pairs]).double()
    worse = torch.tensor([[*tokens, *task.text_metric.statistics("z", pair[1])] for pair in pairs]).double()
    from sacrebleu.metrics.chrf import CHRF

    texts, references = zip(*pairs, strict=True)
    expected = CHRF().corpus_score(list(texts), [list(references)]).score
    assert paired_difference(task, better, worse).mean == pytest.approx(expected)
    assert task.score(better)["chrf"] == pytest.approx(expected)
    assert standard_error(task, better) > 0
