"""Sequence to sequence: what each side becomes, what is trained, and what is scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from seq2seq_world import KINDS, save_seq2seq

from autorank.data import Places, build_data
from autorank.errors import CommandError, DataError, ModelError
from autorank.model import load_base
from autorank.tasks import Batch, CausalLM, Example, Metric, Seq2Seq, WritingTask, for_model
from autorank.tasks.task import IGNORED

TASK = Seq2Seq(("source", "target"), Metric("loss", "minimize"), decoder_start=0)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seq2seq(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def tokenizer(t5: Path) -> Any:
    """Letters a to h are 3 to 10; `</s>`, which closes every text, is 1; what is not known is 2."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(t5)


def row(source: str, target: str) -> dict[str, str]:
    return {"source": source, "target": target}


def test_both_sides_are_closed_once(tokenizer: Any) -> None:
    (example,) = TASK.encode([row("a b c", "b a")], tokenizer, 8).examples
    assert example == Example([3, 4, 5, 1], [4, 3, 1], reference="b a")
    assert TASK.prompt(example) == [3, 4, 5, 1]
    assert TASK.describe(example, tokenizer) == "a b c </s> [[b a </s>]]"


def test_a_target_is_closed_where_the_tokenizer_does_not_do_so(t5: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(t5)
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    (example,) = TASK.encode([row("a b", "b")], plain, 8).examples
    assert (example.input_ids, example.labels) == ([3, 4], [4, 1])


def test_an_end_that_the_data_write_out_is_not_doubled_and_not_to_be_written(tokenizer: Any) -> None:
    (example,) = TASK.encode([row("a b", f"b {tokenizer.eos_token}")], tokenizer, 8).examples
    assert example.labels == [4, 1]
    assert (example.reference or "").split() == ["b"]


def test_a_target_has_the_tokens_of_its_own_language(tokenizer: Any) -> None:
    asked = []

    class Translator:
        eos_token_id = 1

        def __call__(self, **given: Any) -> Any:
            asked.append(sorted({"text", "text_target"} & set(given)))
            return tokenizer(given.pop("text", None) or given.pop("text_target"), **given)

        def num_special_tokens_to_add(self, pair: bool) -> int:
            return int(tokenizer.num_special_tokens_to_add(pair))

    TASK.encode([row("a b c d", "b")], Translator(), 3)  # type: ignore[arg-type]
    assert asked == [["text"], ["text_target"], ["text"]]


def test_each_side_is_cut_and_counted(tokenizer: Any) -> None:
    rows = [row("a b c d", "a"), row("a", "a b c d"), row("a b c d", "a b c"), row("a b", "a b")]
    encoded = TASK.encode(rows, tokenizer, 3)
    assert [example.input_ids for example in encoded.examples] == [[3, 4, 1], [3, 1], [3, 4, 1], [3, 4, 1]]
    assert [example.labels for example in encoded.examples] == [[3, 1], [3, 4, 5], [3, 4, 5], [3, 4, 1]]
    assert [example.reference for example in encoded.examples] == ["a", "a b c d", "a b c", "a b"]
    assert (encoded.kept, encoded.truncated, encoded.sides) == (4, 3, {"sources": 2, "targets": 2})


def test_a_row_without_a_target_token_is_dropped(t5: Path) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    deaf = AutoTokenizer.from_pretrained(t5)
    deaf.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    encoded = TASK.encode([row("a", "~"), row("a", "b")], deaf, 8)
    assert (encoded.kept, encoded.dropped) == (1, {"no tokens": 1})


def test_an_example_is_as_long_as_its_longer_side() -> None:
    assert Example([3, 4, 5, 1], [4, 1]).length == 4
    assert Example([3, 1], [4, 4, 1]).length == 3
    assert Example([3, 1], 7).length == 2


def test_targets_go_in_one_place_behind_the_start() -> None:
    examples = [Example([3, 4, 1], [5, 1]), Example([3, 1], [6, 7, 8, 1])]
    batch = TASK.starting_with(9).collate(examples, pad_token_id=0)
    assert batch.inputs["input_ids"].tolist() == [[3, 4, 1], [3, 1, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[9, 5, 0, 0], [9, 6, 7, 8]]
    assert batch.labels.tolist() == [[5, 1, IGNORED, IGNORED], [6, 7, 8, 1]]
    assert (batch.samples, TASK.terms(batch)) == (2, 6)
    taken = batch.take(range(1, 2))
    assert taken.inputs["decoder_input_ids"].tolist() == [[9, 6, 7, 8]] and taken.labels.shape == (1, 4)


def test_a_batch_needs_the_start_and_other_tasks_do_not() -> None:
    task = Seq2Seq(("source", "target"), Metric("loss", "minimize"))
    with pytest.raises(AssertionError, match="start token"):
        task.collate([Example([3, 1], [4, 1])], 0)
    with pytest.raises(ModelError, match="set decoder_start_token_id in its config"):
        for_model(task, None)
    started = for_model(task, 5)
    assert isinstance(started, Seq2Seq) and started.decoder_start == 5
    other = CausalLM(("text",), Metric("loss", "minimize"))
    assert for_model(other, None) is other and for_model(other, 5) is other


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_of_transformers_is_the_same(tmp_path: Path, kind: str) -> None:
    base = load_base(
        str(save_seq2seq(tmp_path / kind, kind)), auto_class=TASK.auto_class, model_kwargs={}, device="cpu"
    )
    task = for_model(TASK, base.decoder_start)
    rows = [row("a b c", "c b a"), row("a", "b c d e f"), row("h g", "a")]
    batch = task.collate(task.encode(rows, base.tokenizer, 16).examples, base.pad_token_id)
    with torch.inference_mode():
        output = base.model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            labels=batch.labels,
        )
        logits = base.model(**batch.inputs).logits
    torch.testing.assert_close(logits[0, :4], output.logits[0, :4])
    assert task.loss(logits, batch).item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert task.loss(logits.bfloat16(), batch).dtype == torch.float32
    scores = task.score(task.outcomes(logits, batch))
    assert scores["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    kept = batch.labels != IGNORED
    assert scores["token_accuracy"] == pytest.approx(
        (logits.argmax(-1) == batch.labels)[kept].double().mean().item()
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_outcomes_do_not_depend_on_the_batch(tmp_path: Path, kind: str) -> None:
    base = load_base(
        str(save_seq2seq(tmp_path / kind, kind)), auto_class=TASK.auto_class, model_kwargs={}, device="cpu"
    )
    task = for_model(TASK, base.decoder_start)
    examples = task.encode([row("a b c", "c b a"), row("a", "b c d e f")], base.tokenizer, 16).examples

    def outcomes(batch: Batch) -> torch.Tensor:
        with torch.inference_mode():
            return task.outcomes(base.model(**batch.inputs).logits, batch)

    alone = [outcomes(task.collate([example], base.pad_token_id)) for example in examples]
    torch.testing.assert_close(outcomes(task.collate(examples, base.pad_token_id)), torch.cat(alone))


def test_values_that_are_not_finite_score_nan() -> None:
    task = Seq2Seq(("source", "target"), Metric("exact_match", "maximize"))
    scores = task.score(torch.tensor([[1.0, 2.0, 1.0, 1.0], [math.nan, 2.0, 0.0, 0.0]], dtype=torch.float64))
    assert tuple(scores) == task.metrics == ("loss", "perplexity", "token_accuracy", "exact_match")
    assert all(math.isnan(score) for score in scores.values())


def test_what_is_written_is_scored_beside_the_tokens() -> None:
    task = Seq2Seq(("source", "target"), Metric("exact_match", "maximize"))
    scores = task.score(torch.tensor([[1.0, 2.0, 1.0, 1.0], [3.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 1.0]]))
    expected = {"loss": 1.0, "perplexity": math.e, "token_accuracy": 0.5, "exact_match": 2 / 3}
    assert scores == pytest.approx(expected)
    assert isinstance(task, WritingTask) and task.text_metric is not None
    assert TASK.text_metric is None and TASK.metrics == ("loss", "perplexity", "token_accuracy")


def test_prompts_and_completions_are_taken_where_there_is_no_source() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    task = Seq2Seq.from_data(build_data("things", {"train": rows, "validation": rows}), "rouge_l")
    assert (task.columns, task.metric) == (("prompt", "completion"), Metric("rouge_l", "maximize"))
    both = [{**rows[0], "source": "a", "target": "b"}]
    task = Seq2Seq.from_data(build_data("things", {"train": both, "validation": both}))
    assert (task.columns, task.metric) == (("source", "target"), Metric("loss", "minimize"))


def test_a_bad_row_is_refused_with_its_place() -> None:
    rows = [row("a", "b"), {"source": "a", "target": None}]
    places = {"train": Places("train.jsonl", [1, 2], lines=True)}
    with pytest.raises(DataError, match=r"train\.jsonl:2: field 'target' is missing"):
        Seq2Seq.from_data(build_data("things", {"train": rows, "validation": rows[:1]}, places=places))
    rows = [{"source": "a", "label": "b"}]
    with pytest.raises(DataError, match="seq2seq needs the columns source, target; found source, label"):
        Seq2Seq.from_data(build_data("things", {"train": rows, "validation": rows}))


def test_a_length_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CommandError, match="max-length 1 leaves no room"):
        TASK.encode([row("a", "b")], tokenizer, 1)
