from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from autorank.errors import ModelError
from autorank.plan import LayerSpec
from autorank.targets import GROUPS, find_groups, in_block, not_adapted, resolve_targets

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 24, "num_labels": 3}
DECODER = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 24}


def build(name: str, config: str, **values: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**values)).eval()


def bert() -> nn.Module:
    return build("BertForSequenceClassification", "BertConfig", **BERT)


def llama(**values: object) -> nn.Module:
    return build("LlamaForCausalLM", "LlamaConfig", **DECODER, **values)


def gpt2() -> nn.Module:
    values = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "num_labels": 3}
    return build("GPT2ForSequenceClassification", "GPT2Config", **values)


def distilbert() -> nn.Module:
    values = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": 3}
    return build("DistilBertForSequenceClassification", "DistilBertConfig", **values)


def mixtral() -> nn.Module:
    values = {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}
    return build("MixtralForCausalLM", "MixtralConfig", **values)


def names(layers: tuple[LayerSpec, ...]) -> list[str]:
    return [layer.name for layer in layers]


def per_block(layers: tuple[LayerSpec, ...], prefix: str) -> list[tuple[str, int, int]]:
    """The layers of the first block, and a check that the second one has the same."""
    blocks = [
        [
            (layer.name.removeprefix(f"{prefix}.{index}."), layer.in_features, layer.out_features)
            for layer in layers
            if layer.name.startswith(f"{prefix}.{index}.")
        ]
        for index in (0, 1)
    ]
    assert blocks[0] == blocks[1]
    assert len(layers) == 2 * len(blocks[0])
    return blocks[0]


@pytest.mark.parametrize(
    ("model", "prefix", "attention", "mlp", "query_value"),
    [
        (
            bert(),
            "bert.encoder.layer",
            [(f"attention.self.{part}", 16, 16) for part in ("query", "key", "value")]
            + [("attention.output.dense", 16, 16)],
            [("intermediate.dense", 16, 32), ("output.dense", 32, 16)],
            ["attention.self.query", "attention.self.value"],
        ),
        (
            build("RobertaForSequenceClassification", "RobertaConfig", **BERT),
            "roberta.encoder.layer",
            [(f"attention.self.{part}", 16, 16) for part in ("query", "key", "value")]
            + [("attention.output.dense", 16, 16)],
            [("intermediate.dense", 16, 32), ("output.dense", 32, 16)],
            ["attention.self.query", "attention.self.value"],
        ),
        (
            distilbert(),
            "distilbert.transformer.layer",
            [(f"attention.{part}_lin", 16, 16) for part in ("q", "k", "v", "out")],
            [("ffn.lin1", 16, 32), ("ffn.lin2", 32, 16)],
            ["attention.q_lin", "attention.v_lin"],
        ),
        (
            build("DebertaV2ForSequenceClassification", "DebertaV2Config", **BERT),
            "deberta.encoder.layer",
            [(f"attention.self.{part}_proj", 16, 16) for part in ("query", "key", "value")]
            + [("attention.output.dense", 16, 16)],
            [("intermediate.dense", 16, 32), ("output.dense", 32, 16)],
            ["attention.self.query_proj", "attention.self.value_proj"],
        ),
        (
            gpt2(),
            "transformer.h",
            [("attn.c_attn", 16, 48), ("attn.c_proj", 16, 16)],
            [("mlp.c_fc", 16, 64), ("mlp.c_proj", 64, 16)],
            ["attn.c_attn"],
        ),
        (
            llama(tie_word_embeddings=True),
            "model.layers",
            [(f"self_attn.{part}_proj", 16, out) for part, out in (("q", 16), ("k", 8), ("v", 8), ("o", 16))],
            [("mlp.gate_proj", 16, 24), ("mlp.up_proj", 16, 24), ("mlp.down_proj", 24, 16)],
            ["self_attn.q_proj", "self_attn.v_proj"],
        ),
    ],
    ids=["bert", "roberta", "distilbert", "deberta", "gpt2", "llama"],
)
def test_the_groups_of_known_architectures(model, prefix, attention, mlp, query_value):
    groups = find_groups(model)
    assert tuple(groups) == GROUPS
    assert per_block(groups["attention"], prefix) == attention
    assert per_block(groups["mlp"], prefix) == mlp
    assert sorted(per_block(groups["all-linear"], prefix)) == sorted(attention + mlp)
    assert [name for name, *_ in per_block(groups["query-value"], prefix)] == query_value


SEQ2SEQ = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 40,
            "d_model": 16,
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
        },
    ),
}


def seq2seq(kind: str, **values: object) -> nn.Module:
    name, config, shape = SEQ2SEQ[kind]
    return build(name, config, **{"decoder_start_token_id": 0, **shape, **values})


@pytest.mark.parametrize(
    ("kind", "values", "attention", "mlp", "query_value"),
    [
        (
            "t5",
            {},
            {
                "encoder.block.{}.layer.0.SelfAttention": "qkvo",
                "decoder.block.{}.layer.0.SelfAttention": "qkvo",
                "decoder.block.{}.layer.1.EncDecAttention": "qkvo",
            },
            {"encoder.block.{}.layer.1.DenseReluDense": ["wi", "wo"]}
            | {"decoder.block.{}.layer.2.DenseReluDense": ["wi", "wo"]},
            ("q", "v"),
        ),
        (
            "t5",
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            {
                "encoder.block.{}.layer.0.SelfAttention": "qkvo",
                "decoder.block.{}.layer.0.SelfAttention": "qkvo",
                "decoder.block.{}.layer.1.EncDecAttention": "qkvo",
            },
            {"encoder.block.{}.layer.1.DenseReluDense": ["wi_0", "wi_1", "wo"]}
            | {"decoder.block.{}.layer.2.DenseReluDense": ["wi_0", "wi_1", "wo"]},
            ("q", "v"),
        ),
        (
            "bart",
            {},
            {
                "model.encoder.layers.{}.self_attn": ["k_proj", "v_proj", "q_proj", "out_proj"],
                "model.decoder.layers.{}.self_attn": ["k_proj", "v_proj", "q_proj", "out_proj"],
                "model.decoder.layers.{}.encoder_attn": ["k_proj", "v_proj", "q_proj", "out_proj"],
            },
            {"model.encoder.layers.{}": ["fc1", "fc2"], "model.decoder.layers.{}": ["fc1", "fc2"]},
            ("q_proj", "v_proj"),
        ),
    ],
    ids=["t5", "gated", "bart"],
)
def test_the_groups_of_encoder_decoders_hold_both_and_what_lies_between(
    kind, values, attention, mlp, query_value
):
    def both(parts):
        return {f"{top.format(n)}.{part}" for top, ends in parts.items() for n in (0, 1) for part in ends}

    model = seq2seq(kind, **values)
    groups = find_groups(model)
    assert tuple(groups) == GROUPS
    assert set(names(groups["attention"])) == both(attention)
    assert set(names(groups["mlp"])) == both(mlp)
    assert set(names(groups["all-linear"])) == both(attention) | both(mlp)
    assert set(names(groups["query-value"])) == both(dict.fromkeys(attention, query_value))
    assert len(groups["query-value"]) == 2 * 3 * 2
    known = [name for name, _ in model.named_modules()]
    assert names(groups["all-linear"]) == [name for name in known if name in both(attention) | both(mlp)]


def test_a_name_of_an_encoder_decoder_takes_its_namesakes_and_a_full_name_one():
    model = seq2seq("t5")
    assert len(resolve_targets(model, ["q"])) == 6 and len(resolve_targets(model, ["wi", "wo"])) == 8
    assert names(resolve_targets(model, ["EncDecAttention.q"])) == [
        f"decoder.block.{n}.layer.1.EncDecAttention.q" for n in (0, 1)
    ]
    (one,) = resolve_targets(model, ["encoder.block.1.layer.0.SelfAttention.q"])
    assert (one.in_features, one.out_features) == (16, 16)
    assert names(resolve_targets(model, r"decoder\..*\.wo")) == [
        f"decoder.block.{n}.layer.2.DenseReluDense.wo" for n in (0, 1)
    ]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_tied_output_layer_of_an_encoder_decoder_is_no_target(kind):
    with pytest.raises(ModelError, match=r"lm_head shares its weight with .*shared \(tied weights\)"):
        resolve_targets(seq2seq(kind), ["lm_head"])


def test_the_output_layer_of_an_encoder_decoder_is_its_head():
    untied = seq2seq("bart", tie_word_embeddings=False)
    assert "lm_head" not in names(find_groups(untied)["all-linear"])
    with pytest.raises(ModelError, match="only the head, lm_head, matches"):
        resolve_targets(untied, ["lm_head"])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize(
    "model",
    [bert(), gpt2(), distilbert(), llama(), seq2seq("t5"), seq2seq("bart")],
    ids=lambda m: type(m).__name__,
)
def test_every_layer_has_the_shape_of_the_adapter_that_peft_puts_there(model):
    layers = find_groups(model)["all-linear"]
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=1, target_modules=names(layers))
    ).base_model.model
    for layer in layers:
        adapted = wrapped.get_submodule(layer.name)
        a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        assert (a.shape[1], b.shape[0]) == (layer.in_features, layer.out_features)
        assert a.numel() + b.numel() == layer.cost


@pytest.mark.parametrize("wanted", [["q_proj"], ["mlp.up_proj", "o_proj"], ["layers.1.self_attn.q_proj"]])
def test_a_list_of_names_means_what_it_means_to_peft(wanted):
    model = llama()
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=1, target_modules=wanted))
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(names(resolve_targets(model, wanted))) == expected


def test_entries_of_a_list_are_joined_in_model_order_without_repeats():
    model = bert()
    both = resolve_targets(model, ["output.dense", "query-value", "query"])
    every = names(find_groups(model)["all-linear"])
    assert names(both) == [n for n in every if n.endswith(("output.dense", "query", "value"))]


def test_a_string_is_a_group_or_a_regular_expression_on_full_names():
    model = bert()
    assert resolve_targets(model, "mlp") == find_groups(model)["mlp"]
    assert names(resolve_targets(model, r".*layer\.1\..*query")) == [
        "bert.encoder.layer.1.attention.self.query"
    ]
    with pytest.raises(ModelError, match=r"matches only .*BertAttention"):
        resolve_targets(model, r".*layer\.1\.attention")
    with pytest.raises(ModelError, match=r"'query' matches no module.*full names.*give the list \[query\]"):
        resolve_targets(model, "query")


def test_the_pooler_is_taken_only_when_it_is_named():
    model = bert()
    assert "bert.pooler.dense" not in names(find_groups(model)["all-linear"])
    assert "bert.pooler.dense" not in names(resolve_targets(model, ["dense"]))
    assert names(resolve_targets(model, ["pooler.dense"])) == ["bert.pooler.dense"]
    with pytest.raises(ModelError, match="trained in full"):
        resolve_targets(model, ["pooler.dense", "query"], fresh=("bert.pooler", "classifier"))


def test_a_head_is_no_target():
    model = bert()
    assert names(resolve_targets(model, ".*", fresh=("classifier",)))[-1] == "bert.pooler.dense"
    for fresh in ((), ("classifier",)):
        with pytest.raises(ModelError, match="classifier, which belongs to the head") as caught:
            resolve_targets(model, ["query", "classifier"], fresh)
        assert str(caught.value).endswith("layers here are query, key, value, dense")
        with pytest.raises(ModelError, match=r"only the head, classifier, matches 'class\.\*'"):
            resolve_targets(model, "class.*", fresh)


def test_the_output_layer_of_a_language_model_must_be_asked_for_and_not_alone():
    model = llama(tie_word_embeddings=False)
    assert "lm_head" not in names(find_groups(model)["all-linear"])
    assert "lm_head" not in names(resolve_targets(model, ".*"))
    assert names(resolve_targets(model, ["q_proj", "lm_head"]))[-1] == "lm_head"
    with pytest.raises(ModelError, match="only the head, lm_head, matches 'lm_head'"):
        resolve_targets(model, ["lm_head"])


def test_a_tied_output_layer_is_refused_and_its_partner_named():
    model = llama(tie_word_embeddings=True)
    assert "lm_head" not in names(resolve_targets(model, ".*"))
    for wanted in (["q_proj", "lm_head"], ["lm_head"], "lm_head"):
        with pytest.raises(ModelError, match=r"lm_head shares its weight with model\.embed_tokens"):
            resolve_targets(model, wanted)


def test_layers_that_share_a_weight_are_left_out_of_groups_and_refused_by_name():
    model = llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    assert not any("q_proj" in name for name in names(find_groups(model)["all-linear"]))
    shared = r"model\.layers\.0\.self_attn\.q_proj shares its weight with model\.layers\.1\.self_attn\.q_proj"
    for wanted in (["q_proj"], ".*q_proj", ".*"):
        with pytest.raises(ModelError, match=shared):
            resolve_targets(model, wanted)


def test_a_module_used_twice_is_refused():
    model = llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    groups = find_groups(model)
    assert not any("up_proj" in name for name in names(groups["mlp"]))
    assert len(groups["mlp"]) == 4
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.up_proj and .*layers\.1\.mlp\.up_proj are one module"
    ):
        resolve_targets(model, ["up_proj"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["q_proj", "FAKE"], "'FAKE' matches no module of LlamaForCausalLM; layers here are q_proj, k_proj"),
        (["q_prj"], "close names: q_proj"),
        (["self_atn.q_proj"], r"close names: self_attn\.q_proj"),
        ("q_proj,.*v_proj", r"a comma joins names, not expressions; .* such as '\.\*\(q_proj\|v_proj\)'"),
        ("(((", "invalid: missing \\)"),
        (["q_proj", ".*v_proj"], "looks like a regular expression"),
        (["self_attn"], r"\(LlamaAttention\).*layers under it are q_proj, k_proj, v_proj, o_proj"),
        (["layers"], r"\(ModuleList\)"),
        (["input_layernorm"], r"\(LlamaRMSNorm\): adapters go on Linear layers, and GPT-2's Conv1D; layers"),
        ("model.embed_tokens", r"\(Embedding\)"),
        ([], "no target modules were named"),
    ],
)
def test_targets_that_cannot_be_used(wanted, message):
    with pytest.raises(ModelError, match=message):
        resolve_targets(llama(), wanted)


def test_a_group_that_the_model_has_not_is_refused():
    with pytest.raises(ModelError, match="no group 'attention' of its own: it has all-linear"):
        resolve_targets(Plain(), ["attention"])


class Plain(nn.Module):
    """Blocks without attention, a convolution, and a head; no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 8), "conv": nn.Conv1d(4, 4, 1)}) for _ in range(2)
        )
        self.classifier = nn.Linear(4, 2)


def test_a_plain_module_will_do():
    model = Plain()
    assert find_groups(model) == {
        "all-linear": (LayerSpec("blocks.0.up", 4, 8), LayerSpec("blocks.1.up", 4, 8))
    }
    assert (
        in_block(model, "blocks.1.up") and not in_block(model, "classifier") and not in_block(model, "blocks")
    )
    assert not_adapted(model) == ()
    for wanted in (["conv"], "conv"):
        with pytest.raises(ModelError, match=r"\(Conv1d\): adapters go on Linear"):
            resolve_targets(model, wanted)


def test_layers_outside_of_blocks_can_be_named_where_no_block_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert resolve_targets(model, ["0"]) == (LayerSpec("0", 4, 4),)
    with pytest.raises(ModelError, match="Sequential has no layer that can carry an adapter"):
        find_groups(model)


def test_the_projection_inside_multi_head_attention_is_no_layer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    assert names(find_groups(model)["all-linear"]) == [
        f"layers.{index}.linear{which}" for index in (0, 1) for which in (1, 2)
    ]
    with pytest.raises(ModelError, match="NonDynamicallyQuantizableLinear"):
        resolve_targets(model, ["out_proj"])


def test_layers_that_mambas_kernels_read_past_an_adapter_are_named_and_never_taken():
    sizes = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, intermediate_size=32))
    parts = {name.rpartition(".")[2] for name in names(find_groups(model)["all-linear"])}
    assert parts == {"in_proj", "x_proj", "dt_proj"}
    assert names(resolve_targets(model, ["in_proj"])) == [
        f"backbone.layers.{i}.mixer.in_proj" for i in (0, 1)
    ]
    assert all(".out_proj" not in name for name in names(resolve_targets(model, r".*layers.*")))
    layers = find_groups(model)["all-linear"]
    peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=names(layers)))
    for wanted in (["out_proj"], ".*out_proj"):
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, intermediate_size=32))
        assert not_adapted(model)[0].startswith(
            "not adapted: backbone.layers.0.mixer.out_proj and 1 more (fused"
        )
        with pytest.raises(
            ModelError, match=r"out_proj, whose weight kernels .*layers here are in_proj, x_p"
        ):
            resolve_targets(model, wanted)


def test_fused_experts_are_named_and_never_taken():
    model = mixtral()
    assert tuple(find_groups(model)) == ("all-linear", "query-value")
    assert all(".self_attn." in name for name in names(find_groups(model)["all-linear"]))
    assert not_adapted(model) == tuple(
        f"not adapted: model.layers.*.mlp.experts.{name} (2 fused expert parameters of shape {shape}; "
        "they are no Linear layers)"
        for name, shape in (("gate_up_proj", "2x48x16"), ("down_proj", "2x16x24"))
    )
    for wanted in (["experts"], ["down_proj"], ["mlp.experts"]):
        with pytest.raises(ModelError, match="not adapted"):
            resolve_targets(model, wanted)


def test_a_model_that_carries_an_adapter_is_refused():
    model = llama()
    peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(
        ModelError, match=r"already carries an adapter, at model\.layers\.0\.self_attn\.q_proj"
    ):
        find_groups(model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(ModelError, match=r"conv\.weight has no weights here, it is on the meta device"):
        resolve_targets(model, ["up"])
