"""What is exported is what was scored, and plain PEFT reads it in a process without autorank."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from refusals import assert_refused
from safetensors.torch import load_file, save_file
from study_world import make_study
from study_world import record as told
from transformers import AutoModelForSequenceClassification

from autorank import __version__
from autorank.adapter import Adapter, lora_layers, save_adapter
from autorank.artifacts import ArtifactStore, read_json, write_json
from autorank.config import SpaceConfig
from autorank.errors import AutorankError, FileError, ModelError, StudyError
from autorank.export import export
from autorank.model import Base, find_groups, load_base
from autorank.plan import RankPlan
from autorank.record import Score
from autorank.space import build_space
from autorank.study import Study

BUDGET = 6_000
LABELS = ["animal", "colour", "food"]
TEXTS = ["we saw a cat today", "red of it again the green bear", "bread"]
RESULT: dict[str, Any] = {
    "best": 0,
    "trials": 5,
    "test": {"accuracy": 0.8},
    "references": {
        "frozen_base": {"validation": {"accuracy": 0.95}, "test": None},
        "uniform": {
            "number": 1,
            "trainable_parameters": 9,
            "validation": {"accuracy": 0.1},
            "test": {"accuracy": 0.2},
        },
        "control": None,
    },
}
VERDICT = (
    "No gain over the frozen base, which is ahead by 0.0500 on validation; trial 0 has no complete paired "
    "control."
)
KINDS = {
    "SEQ_CLS": (
        "AutoModelForSequenceClassification",
        {
            "num_labels": 3,
            "id2label": dict(enumerate(LABELS)),
            "label2id": {label: index for index, label in enumerate(LABELS)},
        },
    ),
    "CAUSAL_LM": ("AutoModelForCausalLM", {}),
}


def batch_of(base: Base) -> dict[str, torch.Tensor]:
    return dict(base.tokenizer(TEXTS, return_tensors="pt", padding=True))


def logits_of(base: Base) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = base.model(**batch_of(base)).logits
    return logits.clone()


def train(base: Base, adapter: Adapter) -> None:
    """A few large steps: B, A and the head all leave their start."""
    parameters = [*adapter.parameters().values(), *adapter.head_parameters().values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(4):
        logits = base.model(**batch_of(base)).logits
        target = torch.arange(logits[..., 0].numel()) % logits.shape[-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass(frozen=True)
class World:
    """A finished study of one adapter, and the logits that the live model gave."""

    studies: Path
    name: str
    task_type: str
    plan: RankPlan
    logits: torch.Tensor

    @property
    def artifact(self) -> Path:
        return self.studies / self.name / "artifacts" / "trial-0"


def make_world(studies: Path, name: str, model: Path, task_type: str) -> World:
    auto_class, kwargs = KINDS[task_type]
    base = load_base(str(model), auto_class=auto_class, model_kwargs=kwargs, device="cpu")
    has_head = task_type == "SEQ_CLS"
    space = build_space(SpaceConfig(), find_groups(base), BUDGET, has_head=has_head, max_rank=None)[0]
    study = Study.create(
        studies / name,
        config={
            "name": name,
            "model": str(model),
            "data": "rows.jsonl",
            "max_length": 24,
            "batch_size": 8,
            "eval_fraction": 0.2,
            "seed": 3,
        },
        fingerprint={"model": base.revision, "data": "d" * 64, "task": "a task", "dtype": "torch.float32"},
        space=space,
        direction="maximize",
        metric="accuracy",
        seed=0,
    )
    with study:
        slot = study.ask(4)
        assert slot is not None and slot.params.target_modules == "all-linear"
        start = space.starting_plan(slot.params)
        # Moved as an allocator would: some layers dead, the others with different ranks.
        plan = start.with_ranks(
            {layer.name: index % 4 if index % 4 < 3 else 5 for index, layer in enumerate(start.layers)}
        )
        adapter = Adapter(
            base.model,
            plan,
            modules_to_save=base.fresh,
            task_type=task_type,
            seed=slot.seed,
        )
        train(base, adapter)
        logits = logits_of(base)
        store = ArtifactStore(studies / name / "artifacts")

        def fill(folder: Path) -> None:
            save_adapter(
                folder,
                adapter.tensors(),
                plan,
                modules_to_save=base.fresh,
                task_type=task_type,
                base_name=base.path,
            )
            write_json(folder / "labels.json", LABELS if has_head else None)

        store.write_folder("trial-0", fill)
        facts = {
            "trainable_parameters": sum(p.numel() for p in adapter.parameters().values()),
            "head_parameters": sum(p.numel() for p in adapter.head_parameters().values()),
            "ranks": dict(plan.ranks),
            "metrics": {"accuracy": 0.9, "loss": 0.3},
            "steps": 8,
            "best_step": 4,
            "artifact": store.digest("trial-0"),
        }
        assert facts["trainable_parameters"] == plan.parameters
        study.tell_complete(0, 0.9, facts)
        for value, end in ((0.1, study.tell_complete), (None, None), (None, study.tell_failed)):
            slot = study.ask(9)
            assert slot is not None
            if end == study.tell_failed:
                study.tell_failed(slot.number, "the loss became NaN at step 3")
            elif end is None:
                study.report(slot.number, 2, Score(0.2))
                study.tell_pruned(slot.number, {"steps": 2})
            else:
                study.tell_complete(slot.number, value, {**facts, "ranks": {}, "artifact": {}})
        study.ask(9)
        study.set_result(RESULT)
    return World(studies, name, task_type, plan, logits)


@pytest.fixture(scope="module")
def other_head(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A checkpoint with a head for five labels, where the study has three."""
    folder = tmp_path_factory.mktemp("base") / "five"
    shutil.copytree(tiny_bert, folder)
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, other_head: Path, tiny_llama: Path) -> dict[str, World]:
    studies = tmp_path_factory.mktemp("studies")
    return {
        "SEQ_CLS": make_world(studies, "things", other_head, "SEQ_CLS"),
        "CAUSAL_LM": make_world(studies, "stories", tiny_llama, "CAUSAL_LM"),
    }


@pytest.fixture
def world(worlds: dict[str, World], tmp_path: Path) -> World:
    """A copy of the classification study that a test may spoil."""
    kept = worlds["SEQ_CLS"]
    shutil.copytree(kept.studies, tmp_path / "studies")
    return World(tmp_path / "studies", kept.name, kept.task_type, kept.plan, kept.logits)


# Run in a fresh process, in an exported folder: the card's own code, then what the model says.
READER = """
import json, re, sys
sys.modules["autorank"] = None
import os
texts, folders = json.loads(sys.argv[1])
said = {}
for folder in folders:
    os.chdir(folder)
    code = re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL).group(1)
    names = {}
    exec(code, names)
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    layers = {
        name.removeprefix("base_model.model."): [module.r["default"], module.scaling["default"]]
        for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    import torch
    with torch.inference_mode():
        logits = model(**batch).logits
    said[folder] = {"layers": layers, "logits": logits.tolist(), "labels": model.config.id2label}
print(json.dumps(said))
"""


def test_plain_peft_gives_the_live_model_in_a_fresh_process(worlds: dict[str, World], tmp_path: Path) -> None:
    folders = {
        kind: export(world.name, tmp_path / kind, studies_dir=world.studies) for kind, world in worlds.items()
    }
    task = json.dumps([TEXTS, [str(folder) for folder in folders.values()]])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, task], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for kind, world in worlds.items():
        found = said[str(folders[kind])]
        wanted = {layer.name: [world.plan.ranks[layer.name], world.plan.scaling] for layer in world.plan.live}
        assert found["layers"] == wanted
        torch.testing.assert_close(torch.tensor(found["logits"]), world.logits, atol=1e-5, rtol=0)
    assert list(said[str(folders["SEQ_CLS"])]["labels"].values()) == LABELS
    assert "Missing" not in done.stderr and "missing adapter" not in done.stderr


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_folder_is_whole_and_tells_where_it_comes_from(
    worlds: dict[str, World], tmp_path: Path, kind: str
) -> None:
    world, said = worlds[kind], []
    out = tmp_path / "deep" / "adapter"
    assert export(world.name, out, studies_dir=world.studies, say=said.append) == out
    files = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "autorank_export.json"} <= files
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    assert list(out.parent.iterdir()) == [out]
    facts = read_json(out / "autorank_export.json")
    assert facts["trial"] == 0 and facts["step"] == 4 and facts["value"] == 0.9
    assert facts["validation"] == {"accuracy": 0.9, "loss": 0.3} and facts["test"] == {"accuracy": 0.8}
    assert facts["ranks"] == dict(world.plan.ranks) and facts["scaling"] == world.plan.scaling
    assert facts["trainable_parameters"] == world.plan.parameters
    tensors = load_file(str(out / "adapter_model.safetensors"))
    assert sum(t.numel() for t in tensors.values()) == world.plan.parameters + facts["head_parameters"]
    assert facts["base_model"]["revision"].startswith("sha256:")
    split = {"eval_fraction": 0.2, "seed": 3}
    assert facts["data"] == {"source": "rows.jsonl", "sha256": "d" * 64, **split}
    assert facts["versions"]["autorank"] == __version__ and facts["versions"]["peft"] == peft.__version__
    assert {"params", "seed", "task", "metric", "direction", "budget"} <= set(facts)
    assert facts["id2label"] == ({"0": "animal", "1": "colour", "2": "food"} if kind == "SEQ_CLS" else None)
    assert said[0] == VERDICT
    assert "PeftModel.from_pretrained" in said[1] and str(out) in said[1]
    compile(said[1], "said", "exec")


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_configuration_alone_trains_anew_with_the_final_ranks(
    worlds: dict[str, World], tmp_path: Path, kind: str
) -> None:
    world, said = worlds[kind], []
    out = export(world.name, tmp_path / "c", studies_dir=world.studies, config_only=True, say=said.append)
    assert [path.name for path in out.iterdir()] == ["adapter_config.json"]
    config = peft.LoraConfig.from_pretrained(str(out))
    assert not config.inference_mode
    names: dict[str, Any] = {}
    exec(said[1].split("# or in TRL")[0], names)
    model = names["model"]
    assert model.config.num_labels == 3 or kind == "CAUSAL_LM"
    layers = lora_layers(model.base_model.model)
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    assert found == {
        layer.name: (world.plan.ranks[layer.name], world.plan.scaling) for layer in world.plan.live
    }
    assert all(re.fullmatch(r"\^[\w\\.]+", key) for key in (*config.rank_pattern, *config.alpha_pattern))
    assert any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    compile(said[1], "said", "exec")
    assert f'LoraConfig.from_pretrained("{out}")' in said[1]
    assert ("SFTTrainer(" in said[1]) == (kind == "CAUSAL_LM")


def test_an_export_tells_what_the_winner_was_compared_with(world: World, tmp_path: Path, cli: Any) -> None:
    told = cli("export", world.name, "--out", tmp_path / "a", "--studies-dir", world.studies)
    assert told.code == 0 and told.out.splitlines()[1] == VERDICT
    as_json = cli(
        "export", world.name, "--out", tmp_path / "b", "--studies-dir", world.studies, "--json"
    ).json
    assert as_json["verdict"] == VERDICT
    facts = read_json(tmp_path / "a" / "autorank_export.json")
    assert facts["verdict"] == VERDICT
    assert facts["references"] == {name: RESULT["references"][name] for name in ("frozen_base", "uniform")}
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"**{VERDICT}**" in card
    assert "| accuracy | validation 0.9000, test 0.8000 |" in card
    assert "| frozen base, no adapter | validation 0.9500 |" in card
    assert (
        "| best uniform ranks | validation 0.1000, test 0.2000 (trial 1) |" in card
        and "| paired control |" not in card
    )


@pytest.mark.parametrize("ended", [True, False])
def test_a_trial_without_a_verdict_stands_beside_the_frozen_base_alone(
    world: World, tmp_path: Path, ended: bool
) -> None:
    folder = world.studies / world.name
    store = ArtifactStore(folder / "artifacts")
    if ended:
        with Study.open(folder) as study:
            study.set_result({**RESULT, "best": 1})
    else:
        with Study.open(folder) as study:
            study._storage.set_study_user_attr(study._id, "result", None)
        store.write_folder("frozen", lambda at: write_json(at / "scores.json", {"accuracy": 0.95}))
    said: list[str] = []
    out = export(world.name, tmp_path / "out", studies_dir=world.studies, trial=0, say=said.append)
    facts, card = read_json(out / "autorank_export.json"), (out / "README.md").read_text()
    assert facts["verdict"] is None and list(facts["references"]) == ["frozen_base"] and len(said) == 1
    assert "frozen base, no adapter | validation 0.9500" in card and "No gain" not in card


# -- refused, and nothing written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--trial 9", 5, r"study 'things' has no trial 9: it has 0 to 4"),
        (
            "--trial 2",
            5,
            r"trial 2 of study 'things' was stopped early and has no adapter to export: choose an",
        ),
        (
            "--trial 3",
            5,
            r"trial 3 .* failed \(the loss became NaN at step 3\) .* choose another with --trial",
        ),
        (
            "--trial 4",
            5,
            r"trial 4 of study 'things' has not finished and has no adapter to export: choose an",
        ),
        (
            "--trial 1",
            5,
            r"the adapter of trial 1 is missing: study 'things' keeps the best 3, as --keep says",
        ),
        ("--out studies/things/x", 6, r"studies/things/x lies in the folder of the study: give a folder"),
        ("--out=~/full", 6, r"full is not empty: give another folder, or empty this one"),
        ("--out full", 6, r"full is not empty: give another folder, or empty this one"),
        ("--out full/file", 6, r"full/file is a file: give a folder that does not exist yet"),
        ("--out full/file/x", 6, r"full/file is a file: --out must be a folder"),
        ("--out loop", 6, r"loop is a link, which cannot be replaced: give the folder that it leads to"),
        ("--out " + "x" * 300, 6, r"cannot be written: File name too long"),
        ("--format uniform", 2, r"--format 'uniform' is not known: the format is peft"),
        ("--format gguf", 2, r"--format 'gguf' is not known: the format is peft"),
        (
            "--rank 8",
            2,
            r"No such option: --rank \(Possible options: --trial\); see `autorank export --help`",
        ),
        ("--budget 2X", 2, r"budget '2X' is not understood: a budget is a number of trainable parameters"),
    ],
)
def test_what_cannot_be_exported_is_one_error_on_the_command_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any, flags: str, code: int, said: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    assert_refused(cli, tmp_path, [world.name, "--out", "new", *flags.split()], code, said, ["export"])


def test_a_study_of_which_nothing_is_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with make_study(tmp_path / "studies" / "heavy") as study:
        slot = study.ask(2)
        assert slot is not None
        study.tell_complete(slot.number, 0.9, {**told(study, slot.params), "trainable_parameters": 4_001})
    said = r"every trial of study 'heavy' is over its budget of 4,000 parameters; the smallest has 4,001"
    assert_refused(cli, tmp_path, ["heavy", "--out", "new"], 5, said, ["export"])


def test_a_base_model_that_has_moved_is_told_on_the_command_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = world.studies / world.name / "config.json"
    gone = tmp_path / "base"
    write_json(settings, {**read_json(settings), "model": str(gone)})
    said = r"the base model of study 'things' is no longer at .*/base: put it back there, or a link"
    for more in ([], ["--config-only"]):
        assert_refused(cli, tmp_path, [world.name, "--out", "new", *more], 4, said, ["export"])


def refuse(error: type[AutorankError], match: str, world: World, out: Path, **more: Any) -> None:
    with pytest.raises(error, match=match):
        export(world.name, out, studies_dir=world.studies, **more)


@pytest.mark.parametrize(
    ("trial", "match"),
    [
        (2, "trial 2 .* was stopped early"),
        (3, r"trial 3 .* failed \(the loss became NaN at step 3\)"),
        (4, "trial 4 .* has not finished"),
        (9, "no trial 9"),
        (1, "is not what was stored|is missing"),
    ],
)
def test_a_trial_without_a_finished_adapter(world: World, tmp_path: Path, trial: int, match: str) -> None:
    refuse(StudyError, match, world, tmp_path / "out", trial=trial)
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_taken(world: World, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    refuse(FileError, "is not empty", world, taken)
    refuse(FileError, "is a file", world, taken / "mine.txt")
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    (taken / "mine.txt").unlink()
    assert export(world.name, taken, studies_dir=world.studies) == taken
    assert (taken / "README.md").exists()


def test_a_target_that_cannot_be_replaced(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    refuse(FileError, "link is a link.*give the folder", world, link)
    monkeypatch.chdir(empty)
    for out in (Path("."), empty):
        refuse(FileError, "is the working directory.*give another folder", world, out)
    assert list(empty.iterdir()) == [] and link.is_symlink()


def test_an_artifact_that_is_gone_or_changed(world: World, tmp_path: Path) -> None:
    weights = world.artifact / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refuse(StudyError, "adapter_model.safetensors", world, tmp_path / "out")
    shutil.rmtree(world.artifact)
    refuse(StudyError, "is missing", world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_artifact(world: World, change: Any) -> None:
    """Another artifact in the place of the recorded one."""
    path = world.artifact / "adapter_config.json"
    config = json.loads(path.read_text())
    weights = world.artifact / "adapter_model.safetensors"
    tensors = load_file(str(weights))
    change(config, tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, str(weights), metadata={"format": "pt"})


def no_longer_finite(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[max(tensors)].view(-1)[0] = float("nan")


def another_rank(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("lora_A.weight") and len(tensors[key]) == 2)
    other = key.replace("lora_A", "lora_B")
    tensors[key], tensors[other] = tensors[key][:1].clone(), tensors[other][:, :1].clone()


def half_a_pair(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if key.endswith("lora_B.weight"))]


def another_alpha(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["alpha_pattern"][next(iter(config["alpha_pattern"]))] += 0.25


def a_key_that_matches_more(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["rank_pattern"] = {"query": 2, **config["rank_pattern"]}


def rank_stabilised(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["use_rslora"] = True


def no_head(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".lora_" not in key]:
        del tensors[key]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (no_longer_finite, "not finite"),
        (another_rank, "has rank 1 instead of 2"),
        (half_a_pair, "has rank -1 instead of"),
        (another_alpha, "has scaling"),
        (a_key_that_matches_more, "its rank_pattern does not name the layers"),
        (rank_stabilised, "has scaling None instead of"),
        (no_head, "head has parameters 0 instead of"),
    ],
)
def test_an_adapter_that_is_not_what_was_recorded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, match: str
) -> None:
    change_artifact(world, change)
    # As if the digest had been taken of this very artifact.
    monkeypatch.setattr(ArtifactStore, "check", lambda store, key, digest: store.path(key))
    refuse(StudyError, match, world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_file(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArtifactStore, "check", lambda store, key, digest: store.path(key))
    (world.artifact / "adapter_model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    refuse(StudyError, "is damaged", world, tmp_path / "out")


def test_a_base_model_that_is_not_the_one_of_the_study(world: World, tmp_path: Path) -> None:
    settings = read_json(world.studies / world.name / "config.json")
    moved = tmp_path / "base"
    shutil.copytree(settings["model"], moved)
    write_json(world.studies / world.name / "config.json", {**settings, "model": str(moved)})
    config = read_json(moved / "config.json")
    write_json(moved / "config.json", {**config, "layer_norm_eps": 1e-3})
    refuse(ModelError, "is not the base model that study", world, tmp_path / "out")
    shutil.rmtree(moved)
    refuse(ModelError, "is no longer at .*base: put it back there", world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_leaves_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    before = sorted(tmp_path.iterdir())
    refuse(FileError, "No space left on device", world, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_no_such_study(world: World, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study 'thing'.*things"):
        export("thing", tmp_path / "out", studies_dir=world.studies)
    with pytest.raises(StudyError, match="no name of a study"):
        export("../things", tmp_path / "out", studies_dir=world.studies)


def test_the_study_is_only_read(world: World, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in world.studies.rglob("*") if path.is_file()}
    export(world.name, tmp_path / "out", studies_dir=world.studies)
    assert {path: path.read_bytes() for path in world.studies.rglob("*") if path.is_file()} == before
