"""Every shape of model all the way: a search, its export, plain PEFT on it, and the base as it was."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from card_code import assert_card_predicts
from conftest import Outcome, save_tokenizer, seeded, write_jsonl
from peft import PeftModel
from seq2seq_world import save_seq2seq, write_reversals
from torch import nn

from autorank.adapter import lora_layers
from autorank.artifacts import read_json
from autorank.evaluate import evaluate
from autorank.generate import Writer
from autorank.plan import RankPlan
from autorank.preflight import Setup
from autorank.study import Study

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
ENCODER = {**BLOCKS, "intermediate_size": 48, "pad_token_id": 0}
DECODER = {**BLOCKS, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
EXPERTS = {**DECODER, "num_experts_per_tok": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
FUSED = tuple(
    f"not adapted: model.layers.*.mlp.experts.{name} (2 fused expert parameters of shape "
    for name in ("gate_up_proj", "down_proj")
)


@dataclass(frozen=True)
class Shape:
    """An architecture in small, and what a search must make of it."""

    saved: str
    layers: tuple[str, ...]
    values: dict[str, Any]
    task: str = "causal-lm"
    tied: bool = False
    notes: tuple[str, ...] = field(default=())


SHAPES = {
    "bert": Shape("BertModel", ("query", "key", "value", "dense"), ENCODER, "text-classification"),
    "roberta": Shape("RobertaModel", ("query", "key", "value", "dense"), ENCODER, "text-classification"),
    "deberta": Shape(
        "DebertaV2Model",
        ("query_proj", "key_proj", "value_proj", "dense"),
        {
            **ENCODER,
            "relative_attention": True,  # as DeBERTa-v3 has it
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        "text-classification",
    ),
    "t5": Shape("t5", ("q", "k", "v", "o", "wi", "wo"), {}, "seq2seq", tied=True),
    "gpt2": Shape(
        "GPT2LMHeadModel",
        ("c_attn", "c_proj", "c_fc"),
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
        tied=True,
    ),
    "llama": Shape("LlamaForCausalLM", GATED, DECODER),
    "llama that classifies": Shape("LlamaForCausalLM", GATED, DECODER, "text-classification"),
    "qwen2": Shape("Qwen2ForCausalLM", GATED, {**DECODER, "tie_word_embeddings": True}, tied=True),
    "qwen3": Shape("Qwen3ForCausalLM", GATED, {**DECODER, "head_dim": 8}),
    "gemma": Shape("GemmaForCausalLM", GATED, {**DECODER, "head_dim": 16, "pad_token_id": None}, tied=True),
    "phi3": Shape(
        "Phi3ForCausalLM",
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        {**DECODER, "pad_token_id": None},
    ),
    "mixtral": Shape("MixtralForCausalLM", ATTENTION, {**EXPERTS, "num_local_experts": 4}, notes=FUSED),
    "qwen2 moe": Shape(
        "Qwen2MoeForCausalLM",
        (*GATED, "shared_expert_gate"),
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
        notes=FUSED,
    ),
}


def save(folder: Path, shape: Shape) -> Path:
    """A random model of that shape with a tokenizer; those of decoders have no pad token."""
    if shape.task == "seq2seq":
        return save_seq2seq(folder, shape.saved)
    encodes = "pad_token_id" in shape.values and shape.values["pad_token_id"] == 0
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if encodes:
        specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    size = save_tokenizer(folder, specials, template=encodes)
    model = getattr(transformers, shape.saved)
    with seeded(0):
        # More rows than tokens: some tokenizers of transformers bring tokens of their own.
        model(model.config_class(vocab_size=size + 4, **shape.values)).save_pretrained(folder)
    return folder


def ties(model: nn.Module) -> list[set[str]]:
    """The names of parameters that are one tensor."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), set()).add(name)
    return [found for found in names.values() if len(found) > 1]


@dataclass(frozen=True)
class World:
    """A finished search on a shape, with the very model that it trained on."""

    shape: Shape
    model: Path
    studies: Path
    said: str
    setup: Setup
    before: dict[str, torch.Tensor]
    tied: list[set[str]]

    @property
    def base(self) -> Any:
        return self.setup.base.model


@pytest.fixture(scope="module")
def data(
    tiny_data: Path, tiny_completions: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Rows for each task, a few and of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    for task, source, column in (
        ("text-classification", tiny_data, "text"),
        ("causal-lm", tiny_completions, "prompt"),
    ):
        for path in source.iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()[:36]]
            cut = [{**row, column: row[column][: 12 + index % 20]} for index, row in enumerate(rows)]
            write_jsonl(folder / task / path.name, cut)
    write_reversals(folder / "seq2seq", rows=36)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module", params=list(SHAPES))
def world(
    request: pytest.FixtureRequest,
    cli: Callable[..., Outcome],
    data: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    shape, folder = SHAPES[request.param], tmp_path_factory.mktemp("shape")
    model = save(folder / "model", shape)
    module = importlib.import_module("autorank.search")
    prepare, found = module.prepare, []

    def watched(*arguments: Any) -> Setup:
        setup = prepare(*arguments)
        base = setup.base.model
        found.append((setup, {key: value.clone() for key, value in base.state_dict().items()}, ties(base)))
        return setup

    what = (
        "--model",
        model,
        "--data",
        data[shape.task],
        "--budget",
        "4k",
        "--max-length",
        14,
        "--device",
        "cpu",
    )
    # Random scores, so that ranks move for sure.
    how = (
        "--trials",
        2,
        "--steps",
        20,
        "--batch-size",
        8,
        "--importance",
        "random",
        "--set",
        "evaluations=2",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare", watched)
        done = cli("search", *what, *how, "--name", "one", "--studies-dir", folder / "studies")
    assert done.code == 0, done.err
    yield World(shape, model, folder / "studies", done.out + done.err, *found[0])
    shutil.rmtree(folder)


def test_the_base_model_is_as_it_was(world: World) -> None:
    after = world.base.state_dict()
    fresh = world.setup.base.fresh  # a head, which is solved before the first trial
    stayed = [key for key in world.before if not any(key.startswith(f"{name}.") for name in fresh)]
    assert list(after) == list(world.before) and len(stayed) >= len(after) - 4
    assert all(torch.equal(after[key], world.before[key]) for key in stayed)
    assert not lora_layers(world.base) and not hasattr(world.base, "peft_config")
    assert ties(world.base) == world.tied and bool(world.tied) == world.shape.tied


def test_targets_are_all_layers_of_the_blocks_and_the_rest_is_told(world: World) -> None:
    layers = [layer.name for layer in world.setup.space.groups["all-linear"]]
    assert {name.rpartition(".")[2] for name in layers} == set(world.shape.layers)
    modules = dict(world.base.named_modules())
    inside = [name for name, m in modules.items() if isinstance(m, nn.Linear | transformers.Conv1D)]
    outside = [name for name in inside if name not in layers]
    assert not any(re.search(r"\.\d+\.", name) for name in outside)  # only heads, poolers, output layers
    assert "lm_head" not in layers and not any("embed" in name for name in layers)
    told = [line.strip() for line in world.said.splitlines() if "not adapted" in line]
    assert len(told) == len(world.shape.notes)
    assert all(line.startswith(note) for line, note in zip(told, world.shape.notes, strict=True))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize("number", [0, 1])
def test_plain_peft_gives_what_was_scored(
    world: World, cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, study = tmp_path / "out", world.studies / "one"
    done = cli("export", "one", "--trial", number, "--out", out, "--studies-dir", world.studies)
    assert done.code == 0, done.err
    facts = read_json(out / "autorank_export.json")
    with Study.open_read_only(study) as opened:
        record = opened.trials()[number]
    assert record.state == "COMPLETE" and facts["trainable_parameters"] <= 4000
    assert record.params.allocation == ("uniform", "adaptive")[number]
    full = {layer.name: layer.full_rank for layer in world.setup.space.groups["all-linear"]}
    level = {name: min(record.params.rank, full[name]) for name in facts["ranks"]}
    assert (facts["ranks"] == level) == (number == 0)

    lines = re.search("```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert lines is not None and "import autorank" not in lines[1]
    names: dict[str, Any] = {}
    monkeypatch.chdir(out)
    exec(lines[1], names)
    adapted: PeftModel = names["model"].eval()
    inner: Any = adapted.get_base_model()
    assert {name: layer.r["default"] for name, layer in lora_layers(inner).items()} == {
        name: rank for name, rank in facts["ranks"].items() if rank
    }
    assert bool(ties(inner)) == world.shape.tied
    if world.shape.tied:
        embedded = inner.get_input_embeddings().weight
        assert embedded is inner.get_output_embeddings().weight
        assert torch.equal(embedded, world.base.get_input_embeddings().weight)

    setup, pad = world.setup, world.setup.base.pad_token_id
    rows = sorted(setup.bench.validation, key=lambda example: example.length)
    batch = setup.task.collate([*rows[:3], *rows[-3:]], pad)
    assert (batch.inputs["attention_mask"] == 0).any()
    adapter = setup.bench.put_back(
        study / "artifacts" / f"trial-{number}", RankPlan.from_json(record.extra["plan"])
    )
    with torch.no_grad():
        live = world.base(**batch.inputs).logits
        adapter.remove()
        bare = world.base(**batch.inputs).logits
        torch.testing.assert_close(adapted(**batch.inputs).logits, live, atol=1e-5, rtol=0)
    assert (live - bare).abs().max() > 1e-4  # the adapter does something
    again = evaluate(
        inner,
        setup.task,
        setup.bench.validation,
        batch_size=5,
        pad_token_id=pad,
        writer=Writer(inner, names["tokenizer"], pad, 14),
    )
    assert again.scores == pytest.approx(facts["validation"], abs=1e-4)
    column = {"text-classification": "text", "causal-lm": "prompt", "seq2seq": "source"}[world.shape.task]
    assert_card_predicts(out, {column: "the red cat"}, tmp_path)


def test_padding_changes_nothing(world: World) -> None:
    base, task = world.setup.base, world.setup.task
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id == base.pad_token_id
    brought = base.tokenizer.pad_token == "<|endoftext|>"  # by Qwen's own tokenizer
    if base.tokenizer.eos_token_id is not None and world.shape.task != "seq2seq" and not brought:
        assert base.pad_token_id == base.tokenizer.eos_token_id  # there was none
    rows = sorted(world.setup.bench.validation, key=lambda example: example.length)
    short, long = rows[0], rows[-1]
    assert short.length < long.length
    with torch.no_grad():
        alone, together = (
            task.outcomes(base.model(**batch.inputs).logits, batch)[0]
            for batch in (task.collate(chosen, base.pad_token_id) for chosen in ([short], [short, long]))
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
