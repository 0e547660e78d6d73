"""The adapter on real, tiny transformers: what is on it is what the plan says, and it leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from autorank.adapter import (
    Adapter,
    adapter_config,
    can_resize,
    config_owners,
    load_adapter,
    lora_config,
    lora_layers,
    save_adapter,
    take_plan,
)
from autorank.errors import ModelError, StudyError
from autorank.plan import LayerSpec, RankPlan, uniform_plan
from autorank.resize import has_left
from autorank.targets import find_groups

IDS = torch.arange(24).reshape(2, 12) % 30


def tiny_bert(layers: int = 12) -> nn.Module:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    return model.eval().requires_grad_(False)


def specs(model: nn.Module, part: str = ".layer.") -> tuple[LayerSpec, ...]:
    return tuple(
        LayerSpec(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part in name
    )


def mixed_plan(layers: tuple[LayerSpec, ...], scaling: float = 1.75) -> RankPlan:
    return RankPlan(layers, {layer.name: index % 5 for index, layer in enumerate(layers)}, scaling)


def put_on(model: nn.Module, plan: RankPlan, seed: int = 0) -> Adapter:
    return Adapter(model, plan, modules_to_save=("classifier",), task_type="SEQ_CLS", seed=seed)


def save(folder: Path, tensors: dict[str, torch.Tensor], plan: RankPlan) -> None:
    save_adapter(
        folder, tensors, plan, modules_to_save=("classifier",), task_type="SEQ_CLS", base_name="base"
    )


def disturb(adapter: Adapter) -> None:
    """Weights that are not zero anywhere, as after training."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in (adapter.parameters() | adapter.head_parameters()).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_layers_1_and_11_are_not_mixed_up() -> None:
    model = tiny_bert()
    plan = mixed_plan(specs(model))
    adapter = put_on(model, plan)
    live = lora_layers(model)
    assert {name: module.r["default"] for name, module in live.items()} == {
        name: rank for name, rank in plan.ranks.items() if rank
    }
    assert {module.scaling["default"] for module in live.values()} == {1.75}
    assert plan.parameters == sum(p.numel() for p in adapter.parameters().values())
    adapter.remove()


def test_the_budget_counts_what_trains_and_nothing_else_does() -> None:
    model = tiny_bert(2)
    adapter = put_on(model, uniform_plan(specs(model), 2, 2.0, 10**6))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    named = adapter.parameters() | adapter.head_parameters()
    assert trained == {id(p) for p in named.values()}
    assert not any("default" in name for name in named)
    assert sum(p.numel() for p in adapter.head_parameters().values()) == 16 * 3 + 3
    adapter.remove()


def test_a_fresh_adapter_changes_nothing() -> None:
    model = tiny_bert(2)
    before = model(IDS).logits
    adapter = put_on(model, uniform_plan(specs(model), 2, 2.0, 10**6))
    assert torch.equal(model(IDS).logits, before)
    adapter.remove()


def test_the_seed_alone_draws_the_adapter() -> None:
    model = tiny_bert(2)
    plan = uniform_plan(specs(model), 2, 2.0, 10**6)
    state = torch.random.get_rng_state()
    drawn = []
    for seed in (3, 3, 4):
        adapter = put_on(model, plan, seed)
        drawn.append(adapter.tensors())
        adapter.remove()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
    assert not all(torch.equal(drawn[0][key], drawn[2][key]) for key in drawn[0])


def test_the_base_model_is_left_as_it_was() -> None:
    model = tiny_bert(2)
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(model.__dict__)
    for seed in range(5):
        adapter = put_on(model, mixed_plan(specs(model)), seed)
        disturb(adapter)
        adapter.remove()
    after = model.state_dict()
    assert list(after) == list(keys) and all(torch.equal(after[key], keys[key]) for key in keys)
    assert set(model.__dict__) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_the_file_gives_the_live_logits_in_plain_peft(tmp_path: Path) -> None:
    model = tiny_bert()
    plan = mixed_plan(specs(model))
    adapter = put_on(model, plan)
    disturb(adapter)
    live = model(IDS).logits
    save(tmp_path, adapter.tensors(), plan)
    adapter.remove()
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).eval()
    assert torch.allclose(loaded(IDS).logits, live, atol=1e-5)
    ranks = {name: module.r["default"] for name, module in lora_layers(loaded).items()}
    assert ranks == {name: rank for name, rank in plan.ranks.items() if rank}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["rank_pattern"]) == set(config["alpha_pattern"])
    assert all(key.startswith("^bert\\.") for key in config["rank_pattern"])


def test_encoder_and_decoder_namesakes_keep_their_own_ranks(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    layers = specs(model, "SelfAttention")
    plan = mixed_plan(layers)
    adapter = Adapter(model, plan, modules_to_save=(), task_type="SEQ_2_SEQ_LM", seed=0)
    found = {name: module.r["default"] for name, module in lora_layers(model).items()}
    assert found == {name: rank for name, rank in plan.ranks.items() if rank}
    adapter.remove()


def test_a_saved_adapter_goes_back_on(tmp_path: Path) -> None:
    model = tiny_bert(2)
    plan = mixed_plan(specs(model))
    adapter = put_on(model, plan)
    disturb(adapter)
    live, tensors = model(IDS).logits, adapter.tensors()
    save(tmp_path, tensors, plan)
    adapter.remove()
    again = load_adapter(model, tmp_path, plan, modules_to_save=("classifier",), task_type="SEQ_CLS")
    assert torch.equal(model(IDS).logits, live)
    again.remove()


def test_a_file_that_does_not_fit_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    model = tiny_bert(2)
    plan = mixed_plan(specs(model))
    adapter = put_on(model, plan)
    save(tmp_path, adapter.tensors(), plan)
    adapter.remove()
    other = plan.with_ranks({name: rank + 1 for name, rank in plan.ranks.items()})
    for wrong, folder in ((other, tmp_path), (plan, tmp_path / "missing")):
        with pytest.raises(StudyError):
            load_adapter(model, folder, wrong, modules_to_save=("classifier",), task_type="SEQ_CLS")
    assert not lora_layers(model) and not hasattr(model, "peft_config")


def test_the_saved_head_is_the_trained_copy() -> None:
    model = tiny_bert(2)
    adapter = put_on(model, mixed_plan(specs(model)))
    disturb(adapter)
    head = next(p for n, p in adapter.head_parameters().items() if n.endswith("weight")).detach().clone()
    assert torch.equal(adapter.tensors()["base_model.model.classifier.weight"], head)
    adapter.remove()
    assert not torch.equal(model.get_submodule("classifier").weight, head)


def test_a_plan_without_ranks_builds_nothing() -> None:
    layers = (LayerSpec("a", 2, 2),)
    with pytest.raises(ModelError, match="rank 0"):
        lora_config(RankPlan(layers, {"a": 0}, 1.0), modules_to_save=(), task_type="CAUSAL_LM", base_name="b")


def test_conv1d_layers_of_gpt2_carry_adapters_too() -> None:
    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    layers = find_groups(model)["all-linear"]
    plan = mixed_plan(layers)
    before = model(IDS).logits
    adapter = Adapter(model, plan, modules_to_save=(), task_type="CAUSAL_LM", seed=0)
    assert torch.equal(model(IDS).logits, before)
    assert sum(p.numel() for p in adapter.parameters().values()) == plan.parameters
    disturb(adapter)
    assert not torch.allclose(model(IDS).logits, before)
    adapter.remove()
    assert torch.equal(model(IDS).logits, before)


def peft_t5() -> nn.Module:
    """With adapters on an embedding and on linear layers."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["shared", "q", "wo"])
        return peft.get_peft_model(T5ForConditionalGeneration(config), lora)


def stored_plan(model: nn.Module, ranks: tuple[int, ...], scaling: float = 2.0) -> RankPlan:
    layers = tuple(LayerSpec(n, m.in_features, m.out_features) for n, m in lora_layers(model).items())
    return RankPlan(layers, {layer.name: ranks[i % len(ranks)] for i, layer in enumerate(layers)}, scaling)


def test_an_adapter_takes_a_stored_plan_and_another_one_later(tmp_path: Path) -> None:
    model = peft_t5()
    names = list(lora_layers(model))
    for ranks in ((0, 3, 1), (4, 0, 0), (1, 2, 5)):  # the embedding is the first layer
        plan = stored_plan(peft_t5(), ranks)
        take_plan(model, "default", plan)
        live = lora_layers(model)
        assert {name: module.r["default"] for name, module in live.items()} == {
            name: rank for name, rank in plan.ranks.items() if rank
        }
        assert {module.scaling["default"] for module in live.values()} == {2.0}
        parameters = [p for name, p in model.named_parameters() if ".lora_" in name]
        assert sum(p.numel() for p in parameters) == plan.parameters
        assert all(p.requires_grad and not p.any() for p in parameters)
        folder = tmp_path / str(ranks)
        model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        base = T5ForConditionalGeneration(model.get_base_model().config)  # type: ignore[operator]
        loaded = lora_layers(peft.PeftModel.from_pretrained(base, str(folder)))
        assert {name: module.r["default"] for name, module in loaded.items()} == {
            name: plan.ranks[name] for name in names if plan.ranks[name]
        }


def test_a_plan_of_another_adapter_is_not_taken() -> None:
    model = peft_t5()
    plan = stored_plan(model, (1, 2, 3))
    with pytest.raises(ModelError, match="scaling is 3, the model's 2"):
        take_plan(model, "default", stored_plan(model, (1, 2, 3), scaling=3.0))
    first, *others = plan.layers
    with pytest.raises(ModelError, match=f"differ in 1 layers, such as {first.name}"):
        take_plan(model, "default", RankPlan(tuple(others), {n.name: 1 for n in others}, 2.0))
    with pytest.raises(ModelError, match="adapter 'other'"):
        take_plan(model, "other", plan)
    assert {module.r["default"] for module in lora_layers(model).values()} == {2}


def test_layers_of_other_adapters_are_not_taken_for_left_ones() -> None:
    model = peft_t5()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q", "k"]))  # type: ignore[operator]
    names = set(lora_layers(model))
    assert len(names) == 6 and set(lora_layers(model, live=False)) == names
    plan = stored_plan(model, (0, 1, 2))
    take_plan(model, "default", plan)
    assert set(lora_layers(model)) < names
    assert set(lora_layers(model, live=False)) == names
    # The configuration names live layers only; another plan still finds them all.
    take_plan(model, "default", plan.with_ranks(dict.fromkeys(names, 3)))
    assert {module.r["default"] for module in lora_layers(model).values()} == {3}
    assert not any(has_left(module, "default") for module in lora_layers(model).values())
    assert all(name.endswith((".q", ".k")) for name in lora_layers(model, "other", live=False))


class Wrapped(nn.Module):
    """A model of the user's own around a PEFT model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.backbone = backbone


def test_the_configuration_of_a_wrapped_model_follows_too(tmp_path: Path) -> None:
    straight, inner = peft_t5(), peft_t5()
    outer = Wrapped(inner)
    assert config_owners(outer) == (inner,) and adapter_config(outer) is inner.peft_config["default"]
    take_plan(straight, "default", stored_plan(straight, (0, 1, 3)))
    take_plan(outer, "default", stored_plan(outer, (0, 1, 3)))
    assert inner.peft_config["default"] == straight.peft_config["default"]
    inner.save_pretrained(str(tmp_path), save_embedding_layers=False)  # type: ignore[operator]
    base = T5ForConditionalGeneration(inner.get_base_model().config)  # type: ignore[operator]
    loaded = lora_layers(peft.PeftModel.from_pretrained(base, str(tmp_path)))
    found = {name: module.r["default"] for name, module in loaded.items()}
    assert found == {name: module.r["default"] for name, module in lora_layers(inner).items()}


def test_a_model_without_a_configuration_has_none_to_follow() -> None:
    model = peft_t5().get_base_model()  # type: ignore[operator]
    config = model.peft_config
    del model.peft_config
    assert config_owners(model) == ()
    take_plan(model, "default", stored_plan(model, (0, 1, 3)))
    assert set(config["default"].target_modules) == {"shared", "q", "wo"}


class Layers(nn.Module):
    """One layer of every kind that PEFT wraps here."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.embedding = nn.Embedding(4, 4)
        self.turned = Conv1D(4, 4)
        self.quantised = nn.Linear(4, 4)
        self.bare = nn.Linear(4, 4)
        self.image = nn.Conv2d(2, 4, 3)
        self.sound = nn.Conv1d(2, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2)


class QuantLinear(nn.Module):
    """Named as those of quantised models are."""


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_ranks_can_move_where_a_and_b_are_two_matrices() -> None:
    fit, unfit = ["linear", "embedding", "turned", "quantised"], ["image", "sound", "attention"]
    config = peft.LoraConfig(r=2, target_modules=[*fit, *unfit], target_parameters=["bare.weight"])
    layers = lora_layers(peft.get_peft_model(Layers(), config))  # type: ignore[arg-type]
    layers["quantised"].base_layer = QuantLinear()  # type: ignore[attr-defined]
    assert all(can_resize(layers[name]) for name in fit)
    assert not any(can_resize(layers[name]) for name in [*unfit, "bare"])
