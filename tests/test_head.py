from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import LeaveOneOut
from torch import Tensor, nn
from torch.nn import functional

from autorank.adapter import Adapter
from autorank.errors import ModelError
from autorank.head import (
    final_linear,
    fit_ends,
    fit_multinomial,
    fit_one_vs_rest,
    fit_probe,
    fit_ridge,
    frozen_features,
    warm_start,
)
from autorank.plan import LayerSpec, RankPlan

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 24}
CLASSES = 3
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", BERT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", BERT),
    "gpt2": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24},
    ),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", {**SIZES, "intermediate_size": 24}),
}
HEADS = {
    "bert": "classifier",
    "roberta": "classifier.out_proj",
    "distilbert": "classifier",
    "deberta": "classifier",
    "gpt2": "score",
    "llama": "score",
}


def build(kind: str, num_labels: int = CLASSES) -> nn.Module:
    name, config, values = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, config)(**values, num_labels=num_labels, pad_token_id=1)
        return getattr(transformers, name)(config).eval()


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]
    labels: Tensor
    samples: int

    def to(self, device: torch.device) -> Batch:
        return self


def batches() -> list[Batch]:
    """Two batches of unequal lengths, padded on the right with token 1."""
    stream = torch.Generator().manual_seed(0)
    result = []
    for lengths in ((7, 3, 5), (2, 9)):
        ids = torch.randint(2, 40, (len(lengths), max(lengths)), generator=stream)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        labels = torch.randint(0, CLASSES, (len(lengths),), generator=stream)
        inputs = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
        result.append(Batch(inputs, labels, len(lengths)))
    return result


@pytest.mark.parametrize("kind", MODELS)
def test_the_final_linear_layer_is_found(kind):
    model = build(kind)
    assert final_linear(model, (), CLASSES) == HEADS[kind]
    assert final_linear(model, (HEADS[kind].split(".")[0],), CLASSES) == HEADS[kind]


def test_a_pooler_with_as_many_outputs_as_labels_is_not_taken_for_the_head():
    assert final_linear(build("bert", num_labels=16), (), 16) == "classifier"
    assert final_linear(build("deberta", num_labels=16), ("pooler", "classifier"), 16) == "classifier"


def test_a_model_without_such_a_layer_is_refused():
    with pytest.raises(ModelError, match="no final linear layer with 5 outputs"):
        final_linear(build("bert"), (), 5)


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_exactly_what_the_head_reads(kind):
    model = build(kind)
    head = model.get_submodule(HEADS[kind])
    features, labels = frozen_features(model, HEADS[kind], batches())
    with torch.no_grad():
        logits = torch.cat([model(**batch.inputs).logits for batch in batches()])
        again = functional.linear(features, head.weight, head.bias)
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == [label for batch in batches() for label in batch.labels.tolist()]
    assert features.shape == (5, head.in_features)
    assert features.dtype == torch.float32
    assert not head._forward_pre_hooks


def test_features_of_a_decoder_do_not_depend_on_the_padding():
    model = build("llama")
    together, _ = frozen_features(model, "score", batches())
    alone = []
    for batch in batches():
        for ids, mask in zip(*batch.inputs.values(), strict=True):
            one = {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
            alone.append(frozen_features(model, "score", [Batch(one, batch.labels[:1], 1)])[0])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "deberta", "gpt2", "llama"])
def test_features_of_tokens_are_those_with_a_label(kind):
    name, config, values = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, config)(**values, num_labels=CLASSES, pad_token_id=1)
        model = getattr(transformers, name.replace("Sequence", "Token"))(config).eval()
    head_name = final_linear(model, (), CLASSES)
    stream, told = torch.Generator().manual_seed(0), []
    for batch in batches():
        labels = torch.randint(0, CLASSES, batch.inputs["input_ids"].shape, generator=stream)
        told.append(Batch(batch.inputs, labels.where(labels + batch.inputs["attention_mask"] > 1, -100), 1))
    features, labels = frozen_features(model, head_name, told)
    with torch.no_grad():
        logits = torch.cat([model(**batch.inputs).logits[batch.labels != -100] for batch in told])
    head = model.get_submodule(head_name)
    torch.testing.assert_close(functional.linear(features, head.weight, head.bias), logits)
    assert torch.equal(labels, torch.cat([batch.labels[batch.labels != -100] for batch in told]))
    assert 4 < len(labels) < 26
    # A sample of them, whatever the batches they come in.
    few, few_labels = frozen_features(model, head_name, told * 20, seed=1, most=4)
    again, _ = frozen_features(model, head_name, told * 20, seed=1, most=4)
    other, _ = frozen_features(model, head_name, told * 20, seed=2, most=4)
    assert few.shape == (4, features.shape[1]) and torch.equal(few, again) and not torch.equal(few, other)
    for row, label in zip(few, few_labels, strict=True):
        same = torch.isclose(features, row, atol=1e-5).all(1)
        assert label in labels[same]


def test_features_that_are_not_finite_are_refused_and_the_hook_is_taken_off():
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        frozen_features(model, "classifier", batches())
    assert not model.classifier._forward_pre_hooks


def test_a_layer_that_does_not_give_the_logits_is_refused():
    model = build("roberta", num_labels=16)
    with pytest.raises(ModelError, match=r"not what its layer classifier\.dense gives"):
        frozen_features(model, "classifier.dense", batches())


def blobs(samples: int = 240, width: int = 6, classes: int = 4, spread: float = 0.6) -> tuple[Tensor, Tensor]:
    """Overlapping clouds, one a class, on features of very different sizes and places."""
    stream = torch.Generator().manual_seed(1)
    centres = torch.randn(classes, width, generator=stream)
    labels = torch.arange(samples) % classes
    points = centres[labels] + spread * torch.randn(samples, width, generator=stream)
    return points * torch.logspace(-2, 2, width) + torch.linspace(-5, 5, width), labels


def accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    return float((functional.linear(features, weight, bias).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("bias", [True, False])
def test_the_probe_separates_what_can_be_separated(bias):
    features, labels = blobs(spread=0.3)
    if not bias:
        features = features - features.mean(0)
    weight, offset = fit_multinomial(features, labels, 4, bias=bias, seed=0)
    assert weight.shape == (4, 6) and weight.dtype == torch.float32
    assert (offset is not None) == bias
    assert accuracy(features, labels, weight, offset) > 0.98


def stationarity(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
    """The gradient of the probe's cross-entropy on standardised features, its weights, and the penalty.

    At the optimum of cross-entropy + penalty / 2 · |weights|² the gradient is -penalty · weights.
    """
    weight, bias = fit_multinomial(features, labels, classes, bias=True, seed=0)
    assert bias is not None
    scale = features.double().std(0, correction=0)
    x = (features.double() - features.double().mean(0)) / scale
    standard = weight.double() * scale
    probabilities = functional.linear(features.double(), weight.double(), bias.double()).softmax(1)
    errors = (probabilities - functional.one_hot(labels, classes)) / len(labels)
    torch.testing.assert_close(errors.sum(0), torch.zeros(classes).double(), rtol=0, atol=2e-4)
    gradient = errors.T @ x
    return gradient, standard, float(-(gradient * standard).sum() / standard.square().sum())


def test_the_probe_is_the_optimum_of_the_penalised_loss():
    gradient, weights, penalty = stationarity(*blobs(), 4)
    assert 2e-4 < penalty < 4e-2
    torch.testing.assert_close(gradient, -penalty * weights, rtol=0, atol=2e-4)


def test_the_probe_does_not_depend_on_scale_and_place_of_the_features():
    features, labels = blobs()
    plain = functional.linear(features, *fit_multinomial(features, labels, 4, bias=True, seed=0))
    moved = features * torch.tensor([3.0, 0.5, 7.0, 1.0, 2.0, 0.1]) + 4.0
    torch.testing.assert_close(
        functional.linear(moved, *fit_multinomial(moved, labels, 4, bias=True, seed=0)),
        plain,
        rtol=1e-2,
        atol=1e-2,
    )


def test_the_probe_is_repeatable_and_draws_from_no_stream_of_the_caller():
    features, labels = blobs()
    before = torch.random.get_rng_state()
    first = fit_multinomial(features, labels, 4, bias=True, seed=3)
    torch.rand(5)
    second = fit_multinomial(features, labels, 4, bias=True, seed=3)
    torch.random.set_rng_state(before)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    fit_multinomial(features, labels, 4, bias=True, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_penalty_is_weak_where_the_data_are_clear_and_strong_where_they_are_not():
    stream = torch.Generator().manual_seed(2)
    features = torch.randn(400, 20, generator=stream)
    clear = (features[:, 0] > 0).long()
    noise = torch.randint(0, 2, (400,), generator=stream)
    assert stationarity(features, clear, 2)[2] < 2e-3
    assert stationarity(features, noise, 2)[2] == pytest.approx(3e-2, rel=0.3)


@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        pytest.param([[0.0, 1.0], [1.0, 0.0]], 2, id="one row a class"),
        pytest.param([[2.0, 1.0], [2.0, 0.0]] * 9, 2, id="a constant feature"),
        pytest.param([[0.0, 1.0], [1.0, 0.0]] * 9, 5, id="classes without rows"),
        pytest.param([[1.0, 1.0], [1.0, 1.0]] * 9, 2, id="nothing but constants"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_poor_data_still_give_a_finite_head(rows, classes, bias):
    features = torch.tensor(rows)
    labels = torch.arange(len(rows)) % 2
    weight, offset = fit_multinomial(features, labels, classes, bias=bias, seed=0)
    assert torch.isfinite(weight).all()
    assert offset is None or torch.isfinite(offset).all()
    if len(features.unique(dim=0)) > 1:
        assert accuracy(features, labels, weight, offset) == 1.0


def numbers(noise: float, samples: int = 300) -> tuple[Tensor, Tensor]:
    """Features of very different sizes and places, and a number that they tell but for noise."""
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 5, generator=stream)
    y = 4000 + 30 * (
        x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]) + noise * torch.randn(samples, generator=stream)
    )
    return x * torch.logspace(-2, 2, 5) + torch.linspace(-5, 5, 5), y


def test_the_ridge_probe_finds_numbers_in_their_own_unit():
    features, targets = numbers(noise=0.0)
    weight, bias = fit_ridge(features, targets, bias=True)
    assert bias is not None and weight.dtype == bias.dtype == torch.float32
    assert (weight.shape, bias.shape) == ((1, 5), (1,))
    predicted = functional.linear(features, weight, bias)[:, 0]
    assert (predicted - targets).abs().max() < 0.01 * targets.std()
    assert predicted.mean() == pytest.approx(targets.mean().item(), rel=1e-5)


@pytest.mark.parametrize("noise", [0.3, 3.0, 30.0])
def test_the_ridge_probe_is_that_of_scikit_learn(noise):
    features, targets = numbers(noise=noise, samples=40)
    weight, offset = fit_ridge(features, targets, bias=True)
    scale = features.double().std(0, correction=0)
    alphas = [
        40 * ridge for ridge in (10.0, 3.0, 1.0, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
    ]
    oracle = RidgeCV(alphas=alphas).fit((features / scale).numpy(), targets.double().numpy())
    torch.testing.assert_close(weight[0].double(), torch.from_numpy(oracle.coef_) / scale, rtol=1e-3, atol=0)
    predicted = functional.linear(features.double(), weight.double(), offset.double())[:, 0]
    assert predicted.mean() == pytest.approx(targets.mean().item(), rel=1e-6)


def test_without_a_bias_the_ridge_is_that_of_what_the_level_leaves():
    features, targets = numbers(noise=1.0)
    weight, offset = fit_ridge(features, targets, bias=False)
    assert offset is None
    scale = features.double().square().mean(0).sqrt()
    x, y = (features / scale).numpy(), targets.double().numpy()
    level = y.mean() * Ridge(alpha=1e-6 * len(x), fit_intercept=False).fit(x, np.ones(len(x))).coef_
    oracle = RidgeCV(alphas=[300 * 10.0**-power for power in range(7)], fit_intercept=False, cv=LeaveOneOut())
    oracle.set_params(scoring="neg_mean_squared_error").fit(x, y - x @ level)
    found = torch.from_numpy(level + oracle.coef_) / scale
    torch.testing.assert_close(weight[0].double(), found, rtol=1e-3, atol=0)


def test_numbers_far_from_0_need_no_bias_where_a_feature_hardly_changes():
    features, targets = numbers(noise=1.0)
    features = torch.cat([features, 7.0 + 0.01 * features[:, :1]], 1)
    weight, bias = fit_ridge(features, targets, bias=False)
    assert bias is None
    assert (functional.linear(features, weight)[:, 0] - targets).std() < 0.5 * targets.std()


def test_the_ridge_is_strong_where_the_features_tell_nothing():
    features, _ = numbers(noise=0.0)
    targets = torch.randn(300, generator=torch.Generator().manual_seed(9))
    weight, bias = fit_ridge(features, targets, bias=True)
    predicted = functional.linear(features, weight, bias)[:, 0]
    assert predicted.std() < 0.1 * targets.std()


def test_each_class_has_a_logistic_regression_of_its_own():
    features, classes = blobs()
    labels = functional.one_hot(classes, 4).float()
    labels[:, 3] += labels[:, 0]  # a row may have several classes
    labels[:, 2] = 0.0  # a class may have no row
    weight, bias = fit_one_vs_rest(features, labels, 4, bias=True, seed=0)
    assert bias is not None and (weight.shape, bias.shape) == ((4, 6), (4,))
    assert torch.isfinite(weight).all() and bias[2] < -3
    scale = features.double().std(0, correction=0)
    x = ((features.double() - features.double().mean(0)) / scale).numpy()
    standard = weight.double() * scale
    probabilities = functional.linear(features, weight, bias).double().sigmoid()
    gradient = ((probabilities - labels) / len(labels)).T @ torch.from_numpy(x)
    penalty = float(-(gradient * standard).sum() / standard.square().sum())
    for index in (0, 1, 3):
        oracle = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=1000)
        oracle.fit(x, labels[:, index].numpy())
        torch.testing.assert_close(standard[index], torch.from_numpy(oracle.coef_[0]), rtol=2e-2, atol=2e-2)


def test_the_probe_is_that_of_its_kind():
    features, classes = blobs()
    many, (rows, targets) = functional.one_hot(classes, 4).float(), numbers(noise=1.0)
    for kind, given, direct in (
        ("multinomial", (features, classes, 4), fit_multinomial(features, classes, 4, bias=True, seed=5)),
        ("one-vs-rest", (features, many, 4), fit_one_vs_rest(features, many, 4, bias=True, seed=5)),
        ("ridge", (rows, targets, 1), fit_ridge(rows, targets, bias=True)),
        ("ends", (features, classes, 2), fit_ends(features, classes, bias=True, seed=5)),
    ):
        found = fit_probe(kind, *given, bias=True, seed=5)
        assert torch.equal(found[0], direct[0]) and torch.equal(found[1], direct[1])


def test_the_ends_of_answers_are_two_regressions():
    features, marks = blobs()
    weight, bias = fit_ends(features, marks, bias=True, seed=0)
    both = torch.stack([(marks == 1) | (marks == 3), marks >= 2], dim=1)
    apart = fit_one_vs_rest(features, both, 2, bias=True, seed=0)
    assert torch.equal(weight, apart[0]) and torch.equal(bias, apart[1])


@pytest.mark.parametrize("rows", [[[0.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_give_finite_heads_of_numbers_and_of_classes(rows, bias):
    features = torch.tensor(rows)
    targets = torch.arange(1.0, len(rows) + 1)
    for weight, offset in (
        fit_ridge(features, targets, bias=bias),
        fit_one_vs_rest(features, (targets > 1).float()[:, None].repeat(1, 3), 3, bias=bias, seed=0),
    ):
        assert torch.isfinite(weight).all()
        assert offset is None or torch.isfinite(offset).all()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_warm_start_makes_the_models_logits_the_probes(kind):
    model, name = build(kind), HEADS[kind]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    features, labels = frozen_features(model, name, batches())
    has_bias = model.get_submodule(name).bias is not None
    weight, bias = fit_multinomial(features, labels, CLASSES, bias=has_bias, seed=0)
    warm_start(model, name, weight, bias)
    with torch.no_grad():
        logits = torch.cat([model(**batch.inputs).logits for batch in batches()])
    torch.testing.assert_close(logits, functional.linear(features, weight, bias), rtol=1e-4, atol=1e-5)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.weight"} | ({f"{name}.bias"} if has_bias else set())


def test_in_half_precision_a_warm_start_tells_numbers_as_closely_as_the_probe():
    model = build("bert").to(torch.bfloat16)
    model.requires_grad_(False)
    weight, bias = torch.zeros(CLASSES, 16), 2005 + torch.arange(CLASSES) / 8
    warm_start(model, "classifier", weight, bias)
    layer = LayerSpec("bert.encoder.layer.0.attention.self.query", 16, 16)
    plan = RankPlan((layer,), {layer.name: 1}, 1.0)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert torch.equal(model(**inputs).logits[0], bias)
    adapter = Adapter(model, plan, modules_to_save=("classifier",), task_type="SEQ_CLS", seed=0)
    assert torch.equal(model(**inputs).logits[0], bias)
    assert torch.equal(adapter.tensors()["base_model.model.classifier.bias"], bias)


def test_a_warm_start_without_a_bias_clears_the_heads():
    model = build("bert")
    nn.init.ones_(model.classifier.bias)
    warm_start(model, "classifier", torch.zeros(CLASSES, 16), None)
    assert model.classifier.bias.abs().max() == 0


def test_a_stored_head_of_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"shape \(3, 16\), the stored head \(4, 16\)"):
        warm_start(build("bert"), "classifier", torch.zeros(4, 16), None)
