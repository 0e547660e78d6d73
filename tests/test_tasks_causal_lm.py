"""Causal language modelling: what is trained, cut, dropped and scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from autorank.data import Places, build_data, read_data
from autorank.errors import CommandError, DataError
from autorank.evaluate import evaluate
from autorank.tasks import Batch, CausalLM, Example, Metric, Tokenizer, choose_task, for_rows
from autorank.tasks.task import IGNORED

LOSS = Metric("loss", "minimize")
PLAIN = CausalLM(("text",), LOSS)
PROMPTED = CausalLM(("prompt", "completion"), LOSS)
PACKED = CausalLM(("text",), LOSS, packing=True)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    """Whole words, no token put in front, `</s>` as the end of sequence."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def stories(shared: Path) -> Any:
    """A real byte-pair tokenizer that puts `<s>` and a space in front of a text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models" / "stories260k")


def trained(example: Example, tokenizer: Tokenizer) -> str:
    """The text of the tokens that have a label, which must be the token itself."""
    assert isinstance(example.labels, list)
    kept = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    assert kept == [label for label in example.labels if label != IGNORED]
    text: str = tokenizer.decode(kept)
    return text


def test_of_a_plain_text_everything_is_trained_and_the_end(tokenizer: Any) -> None:
    encoded = PLAIN.encode([{"text": "the red cat"}], tokenizer, 64)
    (example,) = encoded.examples
    assert trained(example, tokenizer) == "the red cat </s>"
    assert example.labels == example.input_ids
    assert (encoded.kept, encoded.truncated, encoded.dropped) == (1, 0, {})


def test_of_a_prompted_row_only_the_completion_and_the_end_are_trained(tokenizer: Any) -> None:
    (example,) = PROMPTED.encode([{"prompt": "the red", "completion": " cat"}], tokenizer, 64).examples
    assert tokenizer.decode(example.input_ids) == "the red cat </s>"
    assert trained(example, tokenizer) == "cat </s>"
    assert isinstance(example.labels, list)
    assert example.labels[:2] == [IGNORED, IGNORED]


def test_a_row_is_cut_on_the_right_and_counted(tokenizer: Any) -> None:
    rows = [{"text": "the red cat"}, {"text": "soup"}]
    encoded = PLAIN.encode(rows, tokenizer, 3)
    assert [trained(example, tokenizer) for example in encoded.examples] == ["the red cat", "soup </s>"]
    assert encoded.truncated == 1


def test_a_row_whose_completion_is_cut_away_is_dropped_and_counted(tokenizer: Any) -> None:
    rows = [{"prompt": "the red " * times, "completion": "cat"} for times in (1, 2, 3)]
    encoded = PROMPTED.encode(rows, tokenizer, 4)
    assert (encoded.kept, encoded.truncated, encoded.dropped) == (1, 0, {"completion cut away": 2})
    encoded = PROMPTED.encode(rows, tokenizer, 5)
    assert (encoded.kept, encoded.truncated, encoded.dropped) == (2, 1, {"completion cut away": 1})
    assert trained(encoded.examples[1], tokenizer) == "cat"


def test_a_single_token_has_nothing_to_predict(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    endless = AutoTokenizer.from_pretrained(tiny_llama)
    endless.eos_token = None
    encoded = PLAIN.encode([{"text": "cat"}, {"text": "red cat"}], endless, 8)
    assert (encoded.kept, encoded.dropped) == (1, {"nothing to predict": 1})
    assert trained(encoded.examples[0], endless) == "red cat"


def test_an_end_that_the_tokenizer_adds_itself_is_not_doubled(tiny_llama: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    closing = AutoTokenizer.from_pretrained(tiny_llama)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", closing.eos_token_id)]
    )
    assert trained(PLAIN.encode([{"text": "cat"}], closing, 8).examples[0], closing) == "cat </s>"
    (example,) = PROMPTED.encode([{"prompt": "red", "completion": " cat"}], closing, 8).examples
    assert closing.decode(example.input_ids) == "red cat </s>"
    assert trained(example, closing) == "cat </s>"


def test_what_begins_and_ends_a_text_stands_there_once_though_the_data_write_it_out(stories: Any) -> None:
    row = {"prompt": "<s>Once upon", "completion": " a time</s>"}
    (example,) = PROMPTED.encode([row], stories, 64).examples
    assert [example.input_ids.count(token) for token in (stories.bos_token_id, stories.eos_token_id)] == [
        1,
        1,
    ]
    (bare,) = PROMPTED.encode([{"prompt": "Once upon", "completion": " a time"}], stories, 64).examples
    assert PROMPTED.prompt(example)[0] == PROMPTED.prompt(bare)[0] == stories.bos_token_id
    assert example.reference == bare.reference == " a time"
    (plain,) = PLAIN.encode([{"text": "<s>Once upon a time</s>"}], stories, 64).examples
    assert plain.input_ids == example.input_ids


def test_a_completion_is_read_in_its_place(stories: Any) -> None:
    rows = [
        {"prompt": "Once upon", "completion": " a time"},
        {"prompt": "Tom said:", "completion": "Yes"},
    ]
    for row, example in zip(rows, PROMPTED.encode(rows, stories, 64).examples, strict=True):
        whole = stories(row["prompt"] + row["completion"])["input_ids"]
        assert example.input_ids == [*whole, stories.eos_token_id]
        prompt = stories(row["prompt"])["input_ids"]
        assert example.labels == [IGNORED] * len(prompt) + example.input_ids[len(prompt) :]


def test_a_prompt_keeps_its_own_tokens_where_the_seam_would_melt(stories: Any) -> None:
    row = {"prompt": "Once upon a ti", "completion": "me"}
    prompt = stories(row["prompt"])["input_ids"]
    assert stories(row["prompt"] + row["completion"])["input_ids"][: len(prompt)] != prompt
    (example,) = PROMPTED.encode([row], stories, 64).examples
    assert example.input_ids[: len(prompt)] == prompt
    assert example.input_ids.count(stories.bos_token_id) == 1
    assert trained(example, stories).replace(" ", "") == "me</s>"


def test_no_rows_give_no_examples(tokenizer: Any) -> None:
    assert PLAIN.encode([], tokenizer, 8).examples == PROMPTED.encode([], tokenizer, 8).examples == ()


def test_a_length_without_room_is_refused(stories: Any) -> None:
    with pytest.raises(CommandError, match="max-length 1 leaves no room"):
        PLAIN.encode([{"text": "cat"}], stories, 1)


def test_collate_ignores_padding_even_where_it_is_the_end_of_sequence() -> None:
    batch = PLAIN.collate([Example([5, 2], [5, 2]), Example([7, 8, 2], [IGNORED, 8, 2])], pad_token_id=2)
    assert batch.inputs["input_ids"].tolist() == [[5, 2, 2], [7, 8, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[5, 2, IGNORED], [IGNORED, 8, 2]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.samples == 2


def random_batch() -> tuple[torch.Tensor, Batch]:
    labels = torch.tensor([[1, 2, 3, IGNORED], [IGNORED, IGNORED, 0, 4], [IGNORED, 1, IGNORED, IGNORED]])
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    return logits, Batch({}, labels, 3)


def test_loss_is_the_mean_over_trained_tokens() -> None:
    logits, batch = random_batch()
    by_hand = [
        -functional.log_softmax(logits[row, at - 1], dim=-1)[batch.labels[row, at]].item()
        for row in range(3)
        for at in range(1, 4)
        if batch.labels[row, at] != IGNORED
    ]
    assert len(by_hand) == 5
    assert PLAIN.loss(logits, batch).item() == pytest.approx(sum(by_hand) / 5, rel=1e-6)
    assert PLAIN.loss(logits.bfloat16(), batch).dtype == torch.float32


@given(st.floats(0, 0.99))
def test_targets_that_are_trained_are_smoothed_over_the_vocabulary(share: float) -> None:
    logits, batch = random_batch()
    expected = functional.cross_entropy(
        logits[:, :-1].reshape(9, 5), batch.labels[:, 1:].reshape(9), ignore_index=IGNORED,
        label_smoothing=share,
    )  # fmt: skip
    loss = PLAIN.loss(logits, batch, label_smoothing=share)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_transformers_is_the_same(tiny_llama: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    rows = [{"prompt": "the red cat", "completion": " soup"}, {"prompt": "a", "completion": " dog rice the"}]
    batch = PROMPTED.collate(PROMPTED.encode(rows, tokenizer, 64).examples, tokenizer.eos_token_id)
    with torch.inference_mode():
        output = model(**batch.inputs, labels=batch.labels)
        assert PROMPTED.loss(output.logits, batch).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_scores_are_of_tokens_not_of_rows() -> None:
    logits, batch = random_batch()
    outcomes = PLAIN.outcomes(logits, batch)
    assert outcomes.shape == (3, 3)
    assert outcomes.dtype == torch.float64
    assert outcomes[:, 1].tolist() == [2, 2, 1]
    right = logits[:, :-1].argmax(dim=-1) == batch.labels[:, 1:]
    assert outcomes[:, 2].tolist() == right.sum(dim=1).tolist()
    scores = PLAIN.score(outcomes)
    assert scores["loss"] == pytest.approx(PLAIN.loss(logits, batch).item(), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["token_accuracy"] == pytest.approx(right.sum().item() / 5)


def test_scores_do_not_depend_on_batches_or_padding() -> None:
    logits, batch = random_batch()
    whole = PLAIN.outcomes(logits, batch)
    alone = [
        PLAIN.outcomes(logits[row : row + 1], Batch({}, batch.labels[row : row + 1], 1)) for row in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), whole)
    cut = PLAIN.outcomes(logits[2:, :2], Batch({}, batch.labels[2:, :2], 1))
    torch.testing.assert_close(cut, whole[2:])


def test_values_that_are_not_finite_score_nan_and_huge_losses_do_not_overflow() -> None:
    logits, batch = random_batch()
    logits[1, 2] = math.nan
    assert all(math.isnan(score) for score in PLAIN.score(PLAIN.outcomes(logits, batch)).values())
    scores = PLAIN.score(torch.tensor([[2000.0, 2.0, 0.0]], dtype=torch.float64))
    assert scores == {"loss": 1000.0, "perplexity": math.inf, "token_accuracy": 0.0}


def test_a_completion_is_written_after_its_prompt_and_judged_by_all_of_its_text(tokenizer: Any) -> None:
    rows = [{"prompt": "the red", "completion": " cat soup"}]
    for length in (64, 3):
        (example,) = PROMPTED.encode(rows, tokenizer, length).examples
        assert tokenizer.decode(PROMPTED.prompt(example)) == "the red"
        assert example.reference == " cat soup"
    (example,) = PLAIN.encode([{"text": "the red cat"}], tokenizer, 64).examples
    assert tokenizer.decode(PLAIN.prompt(example)) == "the" and example.reference is None
    task = CausalLM(("prompt", "completion"), Metric("exact_match", "maximize"))
    assert task.metrics == (*PROMPTED.metrics, "exact_match")
    scores = task.score(torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.0, 0.0]], dtype=torch.float64))
    assert (scores["loss"], scores["token_accuracy"], scores["exact_match"]) == (2.0, 0.5, 0.5)


def test_describe_marks_what_is_trained(tokenizer: Any) -> None:
    (example,) = PROMPTED.encode([{"prompt": "the red", "completion": " cat"}], tokenizer, 64).examples
    assert PROMPTED.describe(example, tokenizer) == "the red[[cat </s>]]"
    (example,) = PLAIN.encode([{"text": "the red cat"}], tokenizer, 64).examples
    assert PLAIN.describe(example, tokenizer) == "the[[red cat </s>]]"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "train.jsonl:2: field 'completion' is empty"),
        ({"prompt": None, "completion": "b"}, "train.jsonl:2: field 'prompt' is missing"),
        ({"prompt": "a", "completion": {"x": 1}}, "train.jsonl:2: field 'completion' is dict"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    rows = [{"prompt": "a", "completion": "b"}, row]
    places = {"train": Places("train.jsonl", [1, 2], lines=True)}
    with pytest.raises(DataError, match=message):
        CausalLM.from_data(build_data("things", {"train": rows, "validation": rows[:1]}, places=places))


def test_missing_columns_are_listed() -> None:
    rows = [{"prompt": "a", "answer": "b"}]
    with pytest.raises(DataError, match="needs the columns prompt, completion; found prompt, answer"):
        CausalLM.from_data(build_data("things", {"train": rows, "validation": rows}))
    rows = [{"body": "a"}]
    with pytest.raises(DataError, match="needs the columns text; found body"):
        CausalLM.from_data(build_data("things", {"train": rows, "validation": rows}))


def test_real_rows_with_a_real_tokenizer(shared: Path, stories: Any) -> None:
    data = read_data(str(shared / "data" / "gsm8k"), eval_fraction=0.1, seed=0)
    task = CausalLM.from_data(data)
    rows = data.validation[:100]
    encoded = task.encode(rows, stories, 512)
    assert encoded.kept + sum(encoded.dropped.values()) == 100
    assert encoded.truncated > 0
    uncut = [example for example in encoded.examples if len(example.input_ids) < 512]
    completions = {row["completion"] for row in rows}
    assert all(trained(example, stories).removesuffix("</s>").strip() in completions for example in uncut)


def test_packed_texts_lose_nothing_and_pad_nothing(tokenizer: Any) -> None:
    rows = [{"text": text} for text in ("the red cat", "the", "the red cat the red cat cat")]
    encoded = PACKED.encode(rows, tokenizer, 4)
    ids = [token for example in encoded.examples for token in example.input_ids]
    assert tokenizer.decode(ids) == "the red cat </s> the </s> the red cat the red cat cat </s>"
    assert [example.length for example in encoded.examples] == [4, 4, 4, 2]
    assert (encoded.kept, encoded.packed, encoded.truncated, encoded.dropped) == (4, 3, 0, {})
    shown = [PACKED.describe(example, tokenizer) for example in encoded.examples]
    assert shown[:2] == ["the[[red cat </s>]]", "the[[</s>]]the[[red]]"]
    shorter = PACKED.encode([*rows[:2], {"text": "the red cat the red cat"}], tokenizer, 4)
    assert [example.length for example in shorter.examples] == [4, 4, 4]  # nothing precedes a token alone
    assert shorter.dropped == {}


def test_packed_texts_are_trained_on_what_they_are_trained_on_alone(tokenizer: Any, stories: Any) -> None:
    rows = [{"text": "the red cat"}, {"text": "soup"}, {"text": "we had some rice"}]
    for one in (tokenizer, stories):  # the second puts a token in front of each text
        (packed,) = PACKED.encode(rows, one, 999).examples
        alone = PLAIN.encode(rows, one, 999).examples
        expected = [[IGNORED, *example.labels[1:]] for example in alone]  # type: ignore[index]
        assert packed.input_ids == [token for example in alone for token in example.input_ids]
        assert packed.labels == [label for labels in expected for label in labels]


def test_of_a_packed_split_the_scores_are_those_of_its_trained_tokens(
    tiny_llama: Path, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    rows = [{"text": text} for text in ("the red cat", "soup", "we had some rice today", "one bear")]
    examples = PACKED.encode(rows, tokenizer, 5).examples
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(torch.tensor([example.input_ids])).logits[0].log_softmax(dim=-1)
            for at, label in enumerate(example.labels[1:]):  # type: ignore[index]
                if label != IGNORED:
                    total, tokens = total - logits[at, label].item(), tokens + 1
    # A text has as many trained tokens as words; two sequences begin with one of them.
    assert tokens == sum(len(row["text"].split()) for row in rows) - 2
    found = evaluate(model, PACKED, examples, batch_size=2, pad_token_id=1).scores
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_sequence_of_which_nothing_is_trained_is_dropped(tokenizer: Any) -> None:
    encoded = PACKED.encode([{"text": "the red cat"}, {"text": "soup"}], tokenizer, 2)
    # the red | cat </s> | soup </s>
    assert [PACKED.describe(one, tokenizer) for one in encoded.examples][2] == "soup[[</s>]]"
    encoded = PACKED.encode([{"text": "the red"}, {"text": "soup"}], tokenizer, 2)
    # the red | </s> soup | </s>
    assert (encoded.kept, encoded.packed, encoded.dropped) == (1, 2, {"nothing to predict": 1})


@pytest.mark.parametrize(
    ("texts", "packs"),
    [
        (["the red cat", "the red cat"], False),  # four tokens of eight, with their ends
        (["the red cat", "the red"], True),
        (["the red cat the red cat the"], False),
        (["the red cat the red cat the red"], True),
    ],
)
def test_auto_packs_where_texts_are_short_or_would_be_cut(
    texts: list[str], packs: bool, tokenizer: Any
) -> None:
    rows = [{"text": text} for text in texts]
    task, _ = choose_task("auto", build_data("here", {"train": rows, "validation": rows}), packing="auto")
    settled = for_rows(task, task.encode(rows, tokenizer, 8))
    assert isinstance(settled, CausalLM) and settled.packing is packs
    assert bool(task.encode(rows, tokenizer, 8).packed) is packs
    # The train split has decided for the others.
    assert bool(settled.encode([{"text": "the red cat"}], tokenizer, 8).packed) is packs
    for fixed in (True, False):
        decided = CausalLM(("text",), LOSS, packing=fixed)
        assert decided.settled(decided.encode(rows, tokenizer, 8)) is decided


def test_only_a_plain_corpus_is_packed() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    data = build_data("here", {"train": rows, "validation": rows})
    assert CausalLM.from_data(data, packing=True).packing is False
    assert CausalLM.from_data(data, packing="auto").packing is False
    texts = [{"text": "a b"}]
    corpus = CausalLM.from_data(build_data("here", {"train": texts, "validation": texts}), packing=True)
    assert corpus.packing is True


@pytest.mark.parametrize("given", ["", "  ", None])
def test_an_instruction_needs_no_input(given: str | None, tokenizer: Any) -> None:
    rows = [{"instruction": "the", "input": given, "output": "cat"}, {"instruction": "a", "output": "dog"}]
    data = build_data("here", {"train": rows, "validation": rows})
    task = CausalLM.from_data(data)
    assert task.columns == ("instruction", "input", "output") and task.trained == "completions only"
    encoded = task.encode(rows, tokenizer, 64)
    assert [trained(example, tokenizer) for example in encoded.examples] == ["cat </s>", "dog </s>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "input": ["b"], "output": "c"}, "field 'input' is list"),
        ({"instruction": "a", "input": "b", "output": " "}, "field 'output' is empty"),
        ({"input": "b", "output": "c"}, "field 'instruction' is missing"),
    ],
)
def test_a_bad_instruction_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    rows = [{"instruction": "a", "input": "b", "output": "c"}, row]
    with pytest.raises(DataError, match=f"train, row 2: {message}"):
        CausalLM.from_data(build_data("here", {"train": rows, "validation": rows[:1]}))


def test_a_template_makes_the_prompt_and_an_integer_label_the_answer(tokenizer: Any) -> None:
    rows = [{"colour": "red", "animal": "cat", "label": 7}]
    data = build_data("here", {"train": rows, "validation": rows})
    task = CausalLM.from_data(data, template="the {colour} {animal} ")
    assert task.columns == ("colour", "animal", "label") and task.trained == "completions only"
    (example,) = task.encode(rows, tokenizer, 64).examples
    assert tokenizer.decode(task.prompt(example)) == "the red cat" and example.reference == "7"


@pytest.mark.parametrize(
    ("template", "rows", "message"),
    [
        ("{q}", [{"q": "a"}], "needs an answer in a column completion, output or label"),
        ("{completion}", [{"completion": "a"}], "needs an answer"),
        ("{p}", [{"q": "a", "completion": "b"}], "found q, completion"),
        ("{q}", [{"q": "a", "completion": ""}], "field 'completion' is empty"),
        ("{q}", [{"q": ["a"], "completion": "b"}], "validation, row 1|train, row 1"),
    ],
)
def test_a_template_that_does_not_fit_the_rows_is_refused(
    template: str, rows: list[dict[str, Any]], message: str
) -> None:
    data = build_data("here", {"train": rows, "validation": rows})
    with pytest.raises(DataError, match=message):
        CausalLM.from_data(data, template=template)
