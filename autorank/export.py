"""Export: the adapter of one trial as a plain PEFT folder that needs no autorank.

The stored artifact, or what a longer training made of the trial's settings, is completed with
tokenizer, provenance and model card, after its ranks, scalings and numbers were checked against
the record. Read-only on the study. How an adapter is made smaller is in `transplant.py`, how it is
trained for longer in `longrun.py`.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autorank import __version__
from autorank.artifacts import ArtifactStore, check_writable, file_errors, flush, read_json, write_json
from autorank.budget import parse_budget
from autorank.card import FACTS, loading_lines, model_card, training_lines
from autorank.errors import CommandError, FileError, ModelError, StudyError
from autorank.origin import Origin, locate
from autorank.record import TrialRecord
from autorank.study import Study, study_folder
from autorank.winner import verdict

if TYPE_CHECKING:
    from autorank.display import Display

__all__ = ["export", "train"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LABELS = "labels.json"
PEFT_MINIMUM = "0.21"
_PREFIX = "base_model.model."
_PROCESSOR = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "chat_template*",
    "preprocessor_config.json",
)


def export(
    name: str,
    out: str | Path,
    *,
    studies_dir: str | Path = "studies",
    trial: int | None = None,
    budget: str | int | None = None,
    recover: int = 0,
    config_only: bool = False,
    metric: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
    display: Display | None = None,
) -> Path:
    """Write the adapter of a trial as a folder that plain PEFT loads.

    Args:
        name: the study.
        out: the folder to write; it must not exist, or be empty.
        studies_dir: where studies are stored.
        trial: a trial's number; None for the best.
        budget: most adapter parameters of what is written, fewer than the trial has: the singular
            components with the least energy per parameter are left out. The base model and the data
            are loaded then, to score it on validation before and after.
        recover: steps of training after that, at the ranks that are left.
        config_only: write the `LoraConfig` alone, with the ranks that the adapter would have, to
            train anew from. Nothing is scored then.
        metric: the study's, if it is a function of the user's own, which is run only where it is named.
        trust_remote_code: run code that comes with the model, where the study does.
        say: gets the verdict, where it is of what was written, and the few lines of Python that use it.
        display: who watches the scoring and the training; None for nobody.

    Returns:
        The folder that was written.

    Raises:
        CommandError: the budget is one that the trial keeps already or that buys nothing, or
            `recover` has nothing to recover.
        StudyError: there is no such study or trial, the trial has not finished, or its artifact is
            missing, damaged or not what the record says. With a budget also: the data or settings
            are not those of the study.
        ModelError: the base model is gone or is not the one of the study.
        DataError: the data cannot be read, where there is a budget.
        FileError: the folder is not empty or cannot be written.
    """
    out, folder = Path(os.path.expanduser(out)), study_folder(studies_dir, name)
    size = _check_size(budget, recover, config_only)
    _check_out(out, folder)
    with Study.open_read_only(folder) as study:
        record = study.winner() if trial is None else study.trial(trial)
        _check_record(study, record)
        store, key = ArtifactStore(folder / "artifacts", read_only=True), f"trial-{record.number}"
        if not store.exists(key):
            raise StudyError(
                f"the adapter of trial {record.number} is missing: study {study.name!r} keeps the best "
                f"{study.config.get('keep', 3)}, as --keep says; choose another with --trial, or restore "
                "it from a copy"
            )
        source = store.check(key, record.extra.get("artifact") or {})
        base = _base_of(study)
        config, tensors = _read_config(source), _read_tensors(source)
        _verify(record, config, tensors, source)
        write_weights, shrunk = partial(shutil.copyfile, source / WEIGHTS), None
        if size is not None:
            # Here, for it brings the libraries that load models, which no other export needs.
            from autorank.transplant import transplant

            made = transplant(
                study, record, config, tensors,
                budget=size, recover=recover, scored=not config_only, metric=metric,
                trust_remote_code=trust_remote_code, display=display,
            )  # fmt: skip
            record, config, shrunk = made.record, made.config, made.facts
            _verify(record, config, made.tensors, source)
            write_weights = partial(save_file, made.tensors, metadata={"format": "pt"})
        facts = _facts(study, record, config, base, _labels(source))
        if shrunk is not None:
            facts |= {"transplant": shrunk, **_unread(facts)}
    config = {
        **config,
        "base_model_name_or_path": facts["base_model"]["name"],
        "inference_mode": not config_only,
    }
    if config_only:
        _publish(out, lambda draft: write_json(draft / CONFIG, config))
    else:
        _publish(out, lambda draft: _fill(draft, write_weights, base.folder, config, facts))
    if say is not None:
        if facts["verdict"] is not None:
            say(facts["verdict"])
        say(training_lines(facts, str(out)) if config_only else loading_lines(facts, str(out)))
    return out


def train(
    name: str,
    out: str | Path,
    *,
    steps: int,
    studies_dir: str | Path = "studies",
    trial: int | None = None,
    whole: bool = False,
    metric: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
    display: Display | None = None,
) -> Path:
    """Train what a search found, at its ranks, for as long as is wanted, and export it like a trial.

    Args:
        name: the study.
        out: the folder to write; it must not exist, or be empty.
        steps: how many training steps, from the start.
        studies_dir: where studies are stored.
        trial: a trial's number; None for the best.
        whole: train on the validation rows too; then nothing is scored, and the last step is taken.
        metric: the study's, if it is a function of the user's own, which is run only where it is named.
        trust_remote_code: run code that comes with the model, where the study does.
        say: gets the few lines of Python that use what was written.
        display: who watches; None for nobody.

    Returns:
        The folder that was written.

    Raises:
        CommandError: the number of steps cannot be used.
        StudyError: there is no such study or trial, it has not finished, or the data or settings are
            not those of the study.
        ModelError: the base model is gone or another one, or the training failed.
        FileError: the folder is not empty or cannot be written.
    """
    from autorank.config import config_from_json
    from autorank.display import Display
    from autorank.longrun import long_run
    from autorank.preflight import prepare
    from autorank.references import FrozenBase

    out, folder = Path(os.path.expanduser(out)), study_folder(studies_dir, name)
    display = display or Display.silent()
    if steps < 1:
        raise CommandError(f"steps is {steps}: it must be at least 1")
    _check_out(out, folder)
    with Study.open_read_only(folder) as study:
        record = study.winner() if trial is None else study.trial(trial)
        _check_record(study, record)
        base = _base_of(study)
        settings = config_from_json(study.config, metric=metric, trust_remote_code=trust_remote_code)
        setup = prepare(settings, display)
        study.check_fingerprint(setup.fingerprint)
        frozen = FrozenBase.load(ArtifactStore(folder / "artifacts", read_only=True))
        if frozen is not None:
            frozen.put_on(setup)
        display.note(
            f"training trial {record.number} anew: {steps:,} steps at its ranks, "
            f"on the {'training and validation' if whole else 'training'} rows"
        )
        best = long_run(setup, record, steps=steps, whole=whole, display=display)
        record = replace(
            record,
            steps=steps,
            value=None if whole else best.value,
            metrics=dict(best.scores),
            extra={**record.extra, "best_step": best.step},
        )
        with tempfile.TemporaryDirectory(prefix="autorank-") as draft:
            setup.bench.save(Path(draft), best, dropout=record.params.dropout)
            config, tensors = _read_config(Path(draft)), _read_tensors(Path(draft))
        _verify(record, config, tensors, out)
        facts = _facts(study, record, config, base, setup.task.labels)
        facts |= {"long_run": {"steps": steps, "rows": "all" if whole else "train"}, **_unread(facts)}
    config = {**config, "base_model_name_or_path": facts["base_model"]["name"], "inference_mode": True}
    write_weights = partial(save_file, tensors, metadata={"format": "pt"})
    _publish(out, lambda draft: _fill(draft, write_weights, base.folder, config, facts))
    if say is not None:
        say(loading_lines(facts, str(out)))
    return out


# -- what may be exported --------------------------------------------------------------------------


def _check_size(budget: str | int | None, recover: int, config_only: bool) -> int | None:
    """The budget to shrink to, None where there is none; what does not go together is refused."""
    if recover < 0:
        raise CommandError(f"recover is {recover}: it must be at least 0")
    if recover and budget is None:
        raise CommandError("--recover trains what --budget has cut: give a --budget too, or leave it out")
    if recover and config_only:
        raise CommandError(
            "--config-only writes no weights that --recover could train: leave one of them out"
        )
    return None if budget is None else parse_budget(budget)


def _check_out(out: Path, study: Path) -> None:
    with file_errors(out, "written"):
        if out.is_symlink():
            raise FileError(f"{out} is a link, which cannot be replaced: give the folder that it leads to")
        if out.is_dir() and out.samefile(Path.cwd()):
            raise FileError(f"{out} is the working directory, which cannot be replaced: give another folder")
        if out.exists() and not out.is_dir():
            raise FileError(f"{out} is a file: give a folder that does not exist yet")
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(study)):
            raise FileError(f"{out} lies in the folder of the study: give a folder outside of it")
        if out.is_dir() and any(out.iterdir()):
            raise FileError(f"{out} is not empty: give another folder, or empty this one")
    check_writable(out.absolute().parent, "--out")


def _check_record(study: Study, record: TrialRecord) -> None:
    """Refuse a trial that may not win: its adapter is not what a study promises."""
    what = f"trial {record.number} of study {study.name!r}"
    advice = f"choose another with --trial; `autorank show {study.name}` lists them"
    states = {
        "PRUNED": "was stopped early",
        "FAIL": f"failed ({record.reason})",
        "RUNNING": "has not finished",
    }
    if record.state in states:
        raise StudyError(f"{what} {states[record.state]} and has no adapter to export: {advice}")
    if record.value is None or not math.isfinite(record.value):
        raise StudyError(f"{what} has the value {record.value}, which cannot be trusted: {advice}")
    if (record.trainable_parameters or 0) > study.budget:
        size = f"{record.trainable_parameters:,} parameters, over the budget of {study.budget:,}"
        raise StudyError(f"{what} has {size}: {advice}")


def _base_of(study: Study) -> Origin:
    """The base model's files, which must still be those that the study was made with."""
    source = str(study.config["model"])
    if os.path.isabs(source) and not os.path.isdir(source):
        raise ModelError(
            f"the base model of study {study.name!r} is no longer at {source}: put it back there, or a link"
        )
    base = locate(source)
    wanted = study.fingerprint.get("model")
    if base.revision != wanted:
        raise ModelError(
            f"{source} is not the base model that study {study.name!r} was made with: "
            f"its revision is {base.revision}, the study's is {wanted}; restore that one"
        )
    return base


# -- the artifact is what the record says ------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("target_modules"), list):
        raise StudyError(f"{folder / CONFIG} is no adapter's configuration: export another trial")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        with file_errors(path, "read"), safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StudyError(f"{path} is damaged ({error}): export another trial") from error


def _verify(
    record: TrialRecord, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path
) -> None:
    """Make sure that PEFT will build what was scored: ranks, scalings, counts, finite numbers."""
    wanted = {name: rank for name, rank in record.ranks.items() if rank}
    found, heads = _ranks_of(tensors)
    problem = _first_difference("rank", wanted, found)
    patterns = {f"^{re.escape(name)}" for name in wanted}
    for key, names in (
        ("target_modules", set(wanted)),
        ("rank_pattern", patterns),
        ("alpha_pattern", patterns),
    ):
        if problem is None and set(config.get(key) or ()) != names:
            problem = f"its {key} does not name the layers that have an adapter"
    if problem is None:
        scalings = {name: _scaling(config, name, rank) for name, rank in wanted.items()}
        problem = _first_difference("scaling", dict.fromkeys(wanted, record.params.scaling), scalings)
    broken = sorted(key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
    if problem is None and broken:
        problem = f"{broken[0]} holds numbers that are not finite"
    counts = {"adapter": sum(t.numel() for t in tensors.values()) - heads, "head": heads}
    recorded = {"adapter": record.trainable_parameters, "head": record.head_parameters or 0}
    if problem is None:
        problem = _first_difference("parameters", recorded, counts)
    if problem is not None:
        raise StudyError(
            f"the adapter in {source} is not what trial {record.number} recorded: {problem}; "
            "export another trial"
        )


def _ranks_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """The rank of each layer, -1 where A and B are no pair; and the parameters of all that is no LoRA."""
    sides: dict[str, dict[str, int]] = {}
    heads = 0
    for key, tensor in tensors.items():
        layer, _, side = key.removeprefix(_PREFIX).rpartition(".lora_")
        if side in ("A.weight", "B.weight"):
            sides.setdefault(layer, {})[side] = tensor.shape[0 if side == "A.weight" else 1]
        else:
            heads += tensor.numel()
    ranks = {
        layer: pair["A.weight"] if len(pair) == 2 and len(set(pair.values())) == 1 else -1
        for layer, pair in sides.items()
    }
    return ranks, heads


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float | None:
    """The scaling that PEFT computes for a layer from the configuration's patterns."""
    key = f"^{re.escape(name)}"
    if config["rank_pattern"][key] != rank or config.get("use_rslora") or config.get("use_dora"):
        return None
    return float(config["alpha_pattern"][key]) / rank


def _first_difference(what: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            return f"{key} has {what} {found.get(key)} instead of {wanted.get(key)}"
    return None


# -- what is written ---------------------------------------------------------------------------------


def _facts(
    study: Study,
    record: TrialRecord,
    config: Mapping[str, Any],
    base: Origin,
    labels: Sequence[str] | None,
) -> dict[str, Any]:
    """Everything `autorank_export.json` tells of a trial's adapter."""
    settings, usage = study.config, _usage(study)
    on_hub = not base.source.startswith("builtin:") and not os.path.isdir(os.path.expanduser(base.source))
    return {
        "study": study.name,
        "trial": record.number,
        "step": record.extra.get("best_step"),
        "params": record.params.to_json(),
        "seed": record.seed,
        "base_model": {
            "source": base.source,
            "name": base.source if on_hub else str(base.folder),
            "revision": base.revision,
            "on_hub": on_hub,
        },
        "trust_remote_code": bool(settings.get("trust_remote_code", False)),
        "data": {
            "source": settings["data"],
            "sha256": study.fingerprint.get("data", ""),
            "eval_fraction": settings["eval_fraction"],
            "seed": settings["seed"],
        },
        "columns": settings.get("columns"),
        "template": settings.get("template"),
        "packing": study.fingerprint.get("packing") == "True",
        "abstains": study.fingerprint.get("abstains") == "True",
        "source_language": settings.get("source_language"),
        "target_language": settings.get("target_language"),
        "task": study.fingerprint.get("task", ""),
        "task_type": config["task_type"],
        "dtype": study.fingerprint.get("dtype", "torch.float32").removeprefix("torch."),
        "max_length": min(int(settings["max_length"]), int(usage.get("limit", settings["max_length"]))),
        "usage": usage or None,
        "batch_size": int(settings["batch_size"]),
        "steps": record.steps,
        "metric": study.metric,
        "direction": study.direction,
        "value": record.value,
        "validation": dict(record.metrics),
        "test": _test_scores(study, record),
        **_comparison(study, record),
        "budget": study.budget,
        "trainable_parameters": record.trainable_parameters,
        "head_parameters": record.head_parameters,
        "ranks": dict(record.ranks),
        "ledger": list(record.extra.get("ledger") or ()),
        "scaling": record.params.scaling,
        "transplant": None,
        "long_run": None,
        "modules_to_save": config.get("modules_to_save") or [],
        "id2label": None if labels is None else {str(i): label for i, label in enumerate(labels)},
        "has_pad_token": _has_pad_token(base.folder),
        "peft_minimum": PEFT_MINIMUM,
        "versions": {
            "autorank": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        },
    }


def _usage(study: Study) -> dict[str, Any]:
    """How the model is asked, as the search told it; nothing of a study that did not."""
    told = next((event for event in study.events() if event.get("kind") == "usage"), {})
    return {name: told[name] for name in ("columns", "limit", "generation", "chats") if name in told}


def _labels(source: Path) -> Sequence[str] | None:
    """The names of the classes, where the task has some."""
    if not (source / LABELS).is_file():
        return None
    labels: Sequence[str] | None = read_json(source / LABELS)
    return labels


def _test_scores(study: Study, record: TrialRecord) -> dict[str, Any] | None:
    """What the trial scored on the test rows, where it was scored there."""
    result = study.result() or {}
    references = [reference for reference in (result.get("references") or {}).values() if reference]
    for scored in ({"number": result.get("best"), "test": result.get("test")}, *references):
        if scored.get("number") == record.number:
            test: dict[str, Any] | None = scored.get("test")
            return test
    return None


def _comparison(study: Study, record: TrialRecord) -> dict[str, Any]:
    """What the winner was compared with, and the verdict; for another trial the frozen base alone."""
    result = study.result()
    if result is None:  # the search has not ended
        # Here, for it brings the libraries that load models, which no other export needs.
        from autorank.references import FrozenBase

        frozen = FrozenBase.load(ArtifactStore(study.folder / "artifacts", read_only=True))
        known = {} if frozen is None else {"frozen_base": {"validation": frozen.scores, "test": None}}
        return {"references": known, "verdict": None}
    references = {name: one for name, one in (result.get("references") or {}).items() if one}
    if result.get("best") != record.number:
        return {"references": _base_alone(references), "verdict": None}
    trials = [trial.to_json() for trial in study.trials()]
    sentence = verdict(result, trials=trials, metric=study.metric, direction=study.direction)
    return {"references": references, "verdict": sentence}


def _base_alone(references: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in references.items() if name == "frozen_base"}


def _unread(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of an adapter that is not the trial's own: the test rows and the verdict were of that."""
    return {"test": None, "references": _base_alone(facts["references"]), "verdict": None}


def _has_pad_token(folder: Path) -> bool:
    """Whether the tokenizer's files name a pad token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file() and read_json(folder / name).get("pad_token") is not None:
            return True
    return False


def _fill(
    draft: Path,
    write_weights: Callable[[Path], object],
    base: Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """The whole adapter folder."""
    write_weights(draft / WEIGHTS)
    write_json(draft / CONFIG, config)
    for path in sorted({path for pattern in _PROCESSOR for path in base.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, draft / path.name)
    write_json(draft / FACTS, facts)
    (draft / "README.md").write_text(model_card(facts), encoding="utf-8")


def _publish(out: Path, fill: Callable[[Path], object]) -> None:
    """Fill a draft beside `out`, wait until it is on the disk, then rename it: complete or absent."""
    draft = out.absolute().parent / f".autorank-export-{os.getpid()}"
    with file_errors(out, "written"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        try:
            fill(draft)
            for path in (*draft.iterdir(), draft):
                flush(path)
            os.rename(draft, out)
            flush(out.absolute().parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
