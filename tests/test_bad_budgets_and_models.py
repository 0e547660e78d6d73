"""Bad budgets, settings, models and targets from the command line: one clear error, and nothing on disk.

Three tables of what may be wrong: settings that are refused before a weight is read, models that are
none, and targets. `test_bad_data.py` does the same for data, `test_export.py` for exports.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Outcome, seeded
from image_world import save_vit, write_squares
from refusals import assert_refused, husk
from safetensors.torch import load_file, save_file

Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(model: object, data: object, *flags: str) -> list[str]:
    return [f"--model={model}", f"--data={data}", "--budget=2k", "--steps=20", "--batch-size=8", *flags]


# -- settings ------------------------------------------------------------------------------------

# what is wrong: (flags, what the message must say)
SETTINGS: dict[str, tuple[list[str], str]] = {
    "learning rates reversed": (
        ["--set=space.learning_rate={low: 1e-2, high: 1e-3}"],
        r"space\.learning_rate: low 0\.01 is above high 0\.001: swap them",
    ),
    "learning rate 0": (["--set=space.learning_rate=0"], r"space\.learning_rate 0 must be above 0"),
    "learning rate no number": (
        ["--set=space.head_learning_rate=.nan"],
        r"space\.head_learning_rate: nan cannot be used: a number must be finite",
    ),
    "scaling 0": (["--set=space.scaling=[0, 2]"], r"space\.scaling 0, 2 must be above 0 and at most a mill"),
    "alpha": (["--set=alpha=-8"], r"alpha is not a setting: do you mean space\.scaling\?"),
    "steps too few": (
        ["--steps=4"], r"schedule: 4 steps are too few .*: train for at least 12 steps \(--steps 12\), or k",
    ),
    "keep 0": (["--keep=0"], r"keep is 0: it must be at least 1"),
    "plateau 0": (["--plateau=0"], r"plateau is 0: it must be at least 1"),
    "target no number": (["--target=nan"], r"target is nan: it must be a finite number"),
    "device empty": (["--device="], r"device is '': it must be text that is not empty"),
    "dtype unknown": (["--dtype=int4"], r"dtype is 'int4': it must be 'auto', 'float32', 'bfloat16' or"),
    "several unknown keys": (
        ["--set=space.rnak=3", "--set=shedule.moves=2"],
        r"space\.rnak is not a setting: do you mean space\.rank\?; shedule is not .* mean schedule\?",
    ),
    "quantisation": (["--set=quantization=nf4"], r"quantization is not a setting: the keys here are name"),
    "targets twice": (
        ["--target-modules=query", "--set=space.target_modules=[mlp]"],
        r"target_modules and space\.target_modules exclude each other",
    ),
    "targets empty": (["--target-modules=,"], r"target_modules is empty: name at least one module, or leave"),
    "ranks reversed": (
        ["--set=space.rank={low: 4, high: 2}"], r"space\.rank: low 4 is above high 2: swap them",
    ),
    "ranks from a probe, and given": (
        ["--set=space.rank=2", "--set=space.start=gradient"],
        r"space\.rank and space\.start gradient exclude each other",
    ),
    "rank below the least": (
        ["--set=space.rank=[1, 4]", "--set=min_rank=2"],
        r"space\.rank 1, 4 goes below min_rank 2: raise it or lower min_rank",
    ),
    "warm-up after the moves": (
        ["--set=schedule.warmup=1"], r"schedule: warmup 1\.0 leaves no time for moves before until 0\.5",
    ),
    "no final phase": (["--set=schedule.until=1"], r"schedule\.until is 1: it must be at most 0\.8"),
    "interval": (
        ["--set=schedule.interval=99"],
        r"schedule\.interval is not a setting: the keys here are schedule\.warmup, schedule\.until",
    ),
    "two objectives": (["--set=metric=[accuracy, loss]"], r"metric is \['accuracy', 'loss'\]: it must be te"),
    "a pruner": (["--set=pruner=median"], r"pruner is not a setting: the keys here are name"),
    "epochs without end": (
        ["--set=steps=null", "--epochs=1e308"], r"epochs is 1e\+308: it must be at most 1000000000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_bad_settings_are_refused_before_anything_is_read(cli: Cli, inside: Path, what: str) -> None:
    flags, said = SETTINGS[what]
    assert_refused(cli, inside, asked("./no-model", "./no-data", *flags), 2, said)


# what is wrong: (flags, what the message must say)
WITH_THE_MODEL: dict[str, tuple[list[str], str]] = {
    "budget below every group": (
        ["--budget=255", "--set=min_rank=1"],
        r"--budget 255 buys nothing here: the cheapest group, query-value, needs 256 at rank 1; raise it or",
    ),
    "rank above full rank": (
        ["--set=space.rank={low: 40, high: 50}"], r"rank 40 is above what attention can have, 32: lower",
    ),
    "the moves' window too narrow": (
        ["--set=schedule.warmup=0.45"],
        r"20 steps are too few for ranks to move between 45% and 50% of them: train for at least 60 steps",
    ),
    "epochs too few": (
        ["--set=steps=null", "--epochs=0.01"], r"1 steps are too few for ranks to move .* at least 12 steps",
    ),
    "samples for less than a trial": (
        ["--samples=100"], r"--samples 100 is less than the 160 training samples of one trial: raise it, or",
    ),
    "weight decay": (
        ["--set=space.weight_decay=5000"], r"space\.weight_decay 5000 at learning rate 0\.004 takes all of a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WITH_THE_MODEL)
def test_what_the_model_does_not_allow_is_refused(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path, what: str
) -> None:
    flags, said = WITH_THE_MODEL[what]
    assert_refused(cli, inside, asked(tiny_bert, tiny_data, *flags), 2, said)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_plan_whose_first_steps_fail_says_of_what(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path, lanes: int
) -> None:
    wild = [f"--set=space.{rate}=1e30" for rate in ("learning_rate", "head_learning_rate")]
    said = (
        r"first steps of the default setting fail, for the loss is nan at step \d \(learning rate 1e\+30, sc"
    )
    arguments = asked(tiny_bert, tiny_data, *wild, f"--lanes={lanes}")
    assert_refused(cli, inside, arguments, 2, said, commands=["plan"])


@pytest.mark.parametrize("command", ["search", "plan"])
def test_one_of_several_processes_of_a_launcher_is_refused_at_once(
    cli: Cli, inside: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = r"WORLD_SIZE is 4: autorank trains in one process, and a launcher such as torchrun has started"
    assert_refused(cli, inside, asked("./no-model", "./no-data"), 2, said, commands=[command])


# -- models --------------------------------------------------------------------------------------


def change(file: str, **values: Any) -> Callable[[Path], None]:
    """A change of the JSON file; a value that is None is taken out."""

    def apply(folder: Path) -> None:
        found = {**json.loads((folder / file).read_text()), **values} if (folder / file).exists() else values
        kept = {key: value for key, value in found.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return apply


def only(name: str, content: bytes) -> Callable[[Path], None]:
    """A folder with that file alone."""

    def apply(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)

    return apply


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def own_code(folder: Path) -> None:
    classes = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    change("config.json", model_type="own", auto_map=classes)(folder)
    (folder / "own.py").write_text("raise SystemExit('the code was run')")


# what is wrong: (what is done to a model without weights that could be loaded, what the message must say)
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, r"there is no folder \./model: give a model folder, a hub id or builtin:mini"),
    "a file": (file_instead, r"/model is a file, not a model: give the folder that holds config"),
    "no transformers model": (only("x.txt", b""), r"is not a transformers model: it has no config\.json; g"),
    "GGUF": (only("x.gguf", b"GGUF"), r"it holds a GGUF file; give the model in transformers' own format"),
    "in a folder inside": (only("0/config.json", b"{}"), r"but its folder 0 has: give that one"),
    "no model type": (change("config.json", model_type=None), r"its config\.json names no model_type; give"),
    "configuration torn": (only("config.json", b'{"model'), r"config\.json cannot be read: .*; restore it"),
    "type unknown": (
        change("config.json", model_type="bert9"), r"model type 'bert9', which transformers .* update transf",
    ),
    "remote code": (own_code, r"read that code, and if you trust it add --set trust_remote_code=true"),
    "an adapter": (
        only("adapter_config.json", b'{"base_model_name_or_path": "owner/base", "some_newer_key": 1}'),
        r"is an adapter, not a base model: give the model it was made for, --model owner/base",
    ),
    "an adapter beside it": (
        change("adapter_config.json", r=8), r"already carries an adapter \(adapter_config\.json beside conf",
    ),
    "quantised": (
        change("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is quantised, and quantised base models are not supported: give the same model without quantis",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights .*give a complete model f",
    ),
    "weights damaged": (
        lambda folder: None, r"could not be loaded: SafetensorError: .*; if its files are damaged download",
    ),
    "weights that run code": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_bytes(
            b"\x80\x02cos\nsystem\n"
        ),
        r"in the older format, .* could run code: they are not read; give the model as safetensors$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
def test_what_is_no_base_model_is_refused(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path, what: str
) -> None:
    spoil, said = MODELS[what]
    spoil(husk(tiny_bert, inside / "model"))
    assert_refused(cli, inside, asked("./model", tiny_data), 4, said)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("owner/none", r"there is no folder owner/none; as a hub id it is not whole in the local cache, and"),
        (
            "no such",
            r"'no such' is neither a folder nor a possible hub id: give a model folder, a hub id such",
        ),
        ("builtin:gpt", r"builtin:gpt is not a built-in model: there is builtin:minilm"),
        ("~nobody-here/bert", r"there is no folder ~nobody-here/bert: give a model folder, a hub id or"),
    ],
)
def test_a_name_that_leads_to_no_model_is_refused(cli: Cli, inside: Path, source: str, said: str) -> None:
    assert_refused(cli, inside, asked(source, "./no-data"), 4, said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device=cuda:99"], r"device 'cuda:99' cannot be used: .*; this machine has cpu"),
        (["--device=gpu"], r"device 'gpu' cannot be used: .*; this machine has cpu"),
        (["--device=meta"], r"device 'meta' cannot be used: nothing can be computed there; this machine has"),
        (["--device=cpu", "--dtype=float16"], r"dtype float16 is not supported on the cpu: use bfloat16 or"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_refused_before_a_weight_is_read(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path, flags: list[str], said: str
) -> None:
    husk(tiny_bert, inside / "model")
    assert_refused(cli, inside, asked("model", tiny_data, *flags), 4, said)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has that device")
def test_of_what_torch_says_of_a_device_the_first_sentence_is_told(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path
) -> None:
    said = r"device 'mps' cannot be used: .{0,120}; this machine has cpu"
    assert_refused(cli, inside, asked(tiny_bert, tiny_data, "--device=mps"), 4, said)


def test_weights_that_do_not_fit_or_carry_an_adapter_are_refused(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path
) -> None:
    weights = load_file(tiny_bert / "model.safetensors")
    query = "encoder.layer.0.attention.self.query"
    for changes, tensors, said in (
        ({"hidden_size": 48}, {}, r"does not hold the weights of bert\.embeddings that .* in another shape"),
        ({"num_hidden_layers": 3}, {}, r"does not hold the weights of bert\.encoder\.layer\.2 that BertFor"),
        ({}, {f"{query}.lora_A.default.weight": torch.zeros(2, 32)}, r"already carries an adapter \(its wei"),
    ):
        shutil.copytree(tiny_bert, inside / "model", dirs_exist_ok=True)
        change("config.json", **changes)(inside / "model")
        save_file({**weights, **tensors}, inside / "model" / "model.safetensors", metadata={"format": "pt"})
        assert_refused(cli, inside, asked("model", tiny_data), 4, said)


def test_a_model_without_a_tokenizer_is_refused(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path
) -> None:
    shutil.copytree(tiny_bert, inside / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    said = r"/model has no tokenizer files: save the tokenizer beside the model with `tokenizer\.save_pre"
    assert_refused(cli, inside, asked("model", tiny_data), 4, said)


def test_a_model_for_another_task_is_refused(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_completions: Path
) -> None:
    said = r"does not hold the weights of cls\.predictions .*plain text, need a causal language model"
    assert_refused(cli, inside, asked(tiny_bert, tiny_completions), 4, said)
    write_squares(inside / "squares", 3, 2)
    said = r"is a bert model, which transformers cannot use for image classification: give another model, or"
    assert_refused(cli, inside, asked(tiny_bert, "squares"), 4, said)


# -- targets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(
    tiny_bert: Path,
    tiny_data: Path,
    tiny_llama: Path,
    tiny_completions: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Path]]:
    """Models by what is special about their layers, with data that they can learn."""
    folder = tmp_path_factory.mktemp("models")
    given = json.loads((tiny_llama / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: given[key] for key in keys} | {"num_key_value_heads": 2, "max_position_embeddings": 64}
    for name, config in (
        ("tied", transformers.LlamaConfig(**sizes, tie_word_embeddings=True)),
        ("experts", transformers.MixtralConfig(**sizes, num_local_experts=2)),
        ("mamba", transformers.MambaConfig(**{key: sizes[key] for key in keys[:4]}, state_size=4)),
    ):
        shutil.copytree(tiny_llama, folder / name)
        with seeded():
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    squares = write_squares(folder / "squares", 3, 2)
    return {
        "encoder": (tiny_bert, tiny_data),
        "decoder": (tiny_llama, tiny_completions),
        "tied": (folder / "tied", tiny_completions),
        "experts": (folder / "experts", tiny_completions),
        "mamba": (folder / "mamba", tiny_completions),
        "vision": (save_vit(folder / "vision"), squares),
    }


@pytest.mark.parametrize(
    ("world", "targets", "said"),
    [
        (
            "encoder",
            "FAKE",
            r"'FAKE' matches no module of BertForSequenceClassification; layers here are query",
        ),
        (
            "encoder",
            "query,quer",
            r"target module 'quer' matches no module .*; close names: query; layers her",
        ),
        ("encoder", "((", r"the regular expression '\(\(' .* is invalid: missing \), .* give a list"),
        (
            "encoder",
            "query,.*value",
            r"a comma joins names, not expressions; .* such as '\.\*\(query\|value\)'",
        ),
        ("encoder", "query.*", r"'query\.\*' matches no module: it must match full names, such as bert\.enc"),
        (
            "encoder",
            "encoder.layer.0.attention",
            r"\(BertAttention\): .*; layers under it are query, key, val",
        ),
        (
            "encoder",
            "LayerNorm",
            r"\(LayerNorm\): adapters go on Linear layers, and GPT-2's Conv1D; layers he",
        ),
        ("encoder", "word_embeddings", r"\(Embedding\): adapters go on Linear layers"),
        ("encoder", "classifier,query", r"belongs to the head and is trained in full: leave it out; layers"),
        (
            "encoder",
            ".*classifier",
            r"only the head, classifier, matches '\.\*classifier': name layers inside",
        ),
        (
            "decoder",
            "lm_head",
            r"only the head, lm_head, matches 'lm_head': name layers inside the model, such",
        ),
        (
            "tied",
            "q_proj,lm_head",
            r"lm_head shares its weight with model\.embed_tokens \(tied weights\): an",
        ),
        (
            "experts",
            "down_proj",
            r"a fused expert parameter and no Linear layer: it is not adapted; layers he",
        ),
        ("experts", ".*experts", r"\(fused expert parameters, which are not adapted\)"),
        ("experts", "mlp", r"this model has no group 'mlp' of its own: it has all-linear, query-value"),
        (
            "mamba",
            "conv1d",
            r"mixer\.conv1d \(Conv1d\): adapters go on Linear layers, and GPT-2's Conv1D; lay",
        ),
        (
            "mamba",
            "out_proj",
            r"mixer\.out_proj, whose weight kernels of this architecture read past any adap",
        ),
        ("vision", "projection", r"patch_embeddings\.projection \(Conv2d\): adapters go on Linear layers"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(
    cli: Cli, inside: Path, worlds: dict[str, tuple[Path, Path]], world: str, targets: str, said: str
) -> None:
    model, data = worlds[world]
    assert_refused(cli, inside, asked(model, data, f"--target-modules={targets}"), 4, said)


def test_a_list_of_expressions_is_refused(cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path) -> None:
    said = (
        r"'\.\*value' looks like a regular expression, but entries of a list are names: give the expression"
    )
    arguments = asked(tiny_bert, tiny_data, "--set=target_modules=[query, '.*value']")
    assert_refused(cli, inside, arguments, 4, said)


def test_what_is_not_adapted_is_told(cli: Cli, worlds: dict[str, tuple[Path, Path]]) -> None:
    for world, said in (
        ("experts", "not adapted: model.layers.*.mlp.experts.gate_up_proj (2 fused expert parameters"),
        ("vision", "not adapted: vit.embeddings.patch_embeddings.projection (Conv2d; adapters go on Linear"),
    ):
        told = cli("plan", *asked(*worlds[world]), "--json")
        assert told.code == 0 and said in told.err, told.err
