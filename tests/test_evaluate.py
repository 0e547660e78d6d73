from __future__ import annotations

import gc
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_world import save_vit, write_squares
from seq2seq_world import save_seq2seq
from torch import nn

from autorank.data import build_data, read_data
from autorank.evaluate import Evaluation, evaluate, paired_difference, standard_error
from autorank.model import Base, load_base
from autorank.tasks import (
    CausalLM,
    Example,
    Metric,
    Seq2Seq,
    Task,
    TextClassification,
    WindowTask,
    choose_task,
    for_model,
)

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


# -- every task ------------------------------------------------------------------------------------

COUNTS = (1, 5, 3, 2, 6, 4, 1)
WORDS = ["the", "cat", "red", "dog", "blue", "bear"]
TEXTS = [" ".join(WORDS[:count]) for count in COUNTS]
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "text-classification": ("tiny_bert", [{"text": t, "label": n % 3} for n, t in enumerate(TEXTS)]),
    "multi-label-classification": (
        "tiny_bert",
        [{"text": t, "label": ["a", "b", "c"][: n % 4]} for n, t in enumerate(TEXTS)],
    ),
    "regression": ("tiny_bert", [{"text": t, "score": n + 0.5} for n, t in enumerate(TEXTS)]),
    "token-classification": (
        "tiny_bert",
        [{"tokens": WORDS[:count], "tags": ["O", "B-a", "B-b"] * 2} for count in COUNTS],
    ),
    "question-answering": (
        "tiny_bert",
        [
            {"question": "one", "context": t, "answers": [t.split()[-1]] * (n % 3)}
            for n, t in enumerate(TEXTS)
        ],
    ),
    "causal-lm": ("tiny_llama", [{"prompt": t, "completion": f" {t}"} for t in TEXTS]),
    "seq2seq": ("tiny_t5", [{"source": "a b c"[: 2 * (n % 3) + 1], "target": "d e f g"[:n]} for n in COUNTS]),
    "image-classification": ("tiny_vit", []),
}


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seq2seq(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


@dataclass(frozen=True)
class World:
    """A model with rows of a task for it, of many lengths."""

    base: Base
    task: Any
    examples: tuple[Example, ...]

    def evaluate(self, examples: Any, batch_size: int, pad_token_id: int | None = None) -> Evaluation:
        pad = self.base.pad_token_id if pad_token_id is None else pad_token_id
        return evaluate(self.base.model, self.task, examples, batch_size=batch_size, pad_token_id=pad)


@pytest.fixture(scope="module", params=ROWS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    model, rows = ROWS[request.param]
    if rows:
        rows = [{**row, "tags": row["tags"][: len(row["tokens"])]} if "tags" in row else row for row in rows]
        data = build_data("rows", {"train": rows, "validation": rows})
    else:
        data = read_data(str(write_squares(tmp_path_factory.mktemp("data"))), eval_fraction=0.1, seed=0)
    task, _ = choose_task(request.param, data)
    folder = str(request.getfixturevalue(model))
    base = load_base(folder, auto_class=task.auto_class, model_kwargs=task.model_kwargs(), device="cpu")
    task = for_model(task, base.decoder_start)
    return World(base, task, task.encode(data.train[:8], base.processor, 32).examples)


def losses_by_hand(world: World, example: Example) -> list[float]:
    """The loss of all that is to be told of a row, each on its own; the row is alone and not padded."""
    labels: Any = example.labels
    ids = torch.tensor([example.input_ids])
    inputs: dict[str, Any] = {"input_ids": ids}
    if example.token_type_ids is not None:
        inputs["token_type_ids"] = torch.tensor([example.token_type_ids])
    if example.picture is not None:
        inputs = {"pixel_values": example.picture.pixels()[None]}
    if world.task.name == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[world.base.decoder_start, *labels[:-1]]])
    with torch.no_grad():
        output = world.base.model(**inputs)
    if world.task.name == "question-answering":
        allowed = [place for place, label in enumerate(labels) if label != -100]
        found = []
        for mark, logits in ((1, output.start_logits[0]), (2, output.end_logits[0])):
            (target,) = (n for n, place in enumerate(allowed) if labels[place] & mark)
            found.append(-logits[allowed].log_softmax(0)[target].item())
        return found
    logits = output.logits[0].double()
    if world.task.name == "regression":
        return [(logits[0].item() - labels) ** 2]
    if world.task.name == "multi-label-classification":
        chances = logits.sigmoid().tolist()
        return [-math.log(p if n in labels else 1 - p) for n, p in enumerate(chances)]
    chances = logits.log_softmax(-1)
    if isinstance(labels, int):
        return [-chances[labels].item()]
    ahead = 1 if world.task.name == "causal-lm" else 0
    told = [(place - ahead, label) for place, label in enumerate(labels) if label != -100 and place >= ahead]
    return [-chances[place, label].item() for place, label in told]


def test_the_loss_of_every_task_is_that_of_a_loop_by_hand(world: World) -> None:
    losses = [loss for example in world.examples for loss in losses_by_hand(world, example)]
    name = "mse" if world.task.name == "regression" else "loss"
    expected = sum(losses) / len(losses)
    for batch_size in (1, 3, 100):
        scores = world.evaluate(world.examples, batch_size).scores
        assert scores[name] == pytest.approx(expected, rel=1e-5)
        assert set(scores) == set(world.task.metrics)


def test_what_rows_are_padded_with_is_never_seen(world: World) -> None:
    first, other = (world.evaluate(world.examples, 100, pad).outcomes for pad in (3, 7))
    assert torch.equal(first, other)


def held_bytes() -> int:
    """The memory of the tensors that are still held, of those made since the garbage collector's freeze."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def test_memory_grows_by_the_outcomes_of_more_rows_and_nothing_else(world: World) -> None:
    """In the last pass, of rows all alike, there are a batch, its logits and what is kept of those before."""
    passes: list[int | None] = []
    example, finds = world.examples[0], isinstance(world.task, WindowTask)

    def row(number: int) -> Example:
        passage = None if example.passage is None else replace(example.passage, row=number)
        return replace(example, passage=passage)

    def held(batches: int) -> tuple[int, int]:
        passes.clear()
        hook = world.base.model.register_forward_hook(
            lambda *_: passes.append(held_bytes() if len(passes) == batches - 1 else None)
        )
        outcomes = world.evaluate([row(number) for number in range(4 * batches)], 4).outcomes
        hook.remove()
        assert len(passes) == batches and passes[-1] is not None
        return passes[-1], outcomes.nbytes

    gc.freeze()
    try:
        held(1)  # the model may make what it keeps
        (few, small), (many, large) = held(2), held(12)
    finally:
        gc.unfreeze()
    # Windows have two figures more than the four of the rows that they are joined to.
    assert many - few == (large - small) * (6 / 4 if finds else 1) > 0
