"""The model card of an exported adapter, and the lines of code that use what was written.

Text only: the facts come from `export.py`. The code needs no autorank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from autorank.budget import format_count
from autorank.figures import format_rate, format_value, regulariser_parts

__all__ = ["FACTS", "loading_lines", "model_card", "training_lines"]

FACTS = "autorank_export.json"
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
# Tasks whose exports are of no type of PEFT's: it has none for images, and its own for answers drops inputs.
_UNTYPED = {
    "image-classification": "AutoModelForImageClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
# What `transformers` must be told where one class of several is not what the head says.
_PROBLEMS = {"regression": "regression", "multi-label-classification": "multi_label_classification"}
# Outputs of the heads that have none for each class.
_OUTPUTS = {"regression": 1, "question-answering": 2}
_TRUSTED = "trust_remote_code=True"
# A checkpoint may carry a head for other labels; the adapter brings its own.
_OTHER_HEAD = "ignore_mismatched_sizes=True"


def loading_lines(facts: Mapping[str, Any], folder: str = ".") -> str:
    """Python that loads the base model, the adapter on it, and the tokenizer or image processor.

    Args:
        facts: what `autorank_export.json` holds.
        folder: where the adapter lies, as the code names it.
    """
    auto_class = _auto_class(facts)
    base, dtype = json.dumps(facts["base_model"]["name"]), json.dumps(facts["dtype"])
    source, sees = _source_keywords(facts), _sees(facts)
    head = ["import json", "from pathlib import Path", ""] if facts["id2label"] else []
    lines = [
        *head,
        "from peft import PeftModel",
        f"from transformers import {auto_class}, {'AutoImageProcessor' if sees else 'AutoTokenizer'}",
        "",
        f"folder = {json.dumps(folder)}",
    ]
    if facts["id2label"]:
        lines += [
            f'facts = json.loads(Path(folder, "{FACTS}").read_text(encoding="utf-8"))',
            'id2label = {int(index): label for index, label in facts["id2label"].items()}',
            f"base = {auto_class}.from_pretrained(",
            f"    {base},",
            *(f"    {keyword}," for keyword in source),
            f"    dtype={dtype},",
            *(f"    {keyword}," for keyword in _head_keywords(facts)),
            "    id2label=id2label,",
            "    label2id={label: index for index, label in id2label.items()},",
            ")",
        ]
    else:
        keywords = [base, *source, f"dtype={dtype}", *_head_keywords(facts)]
        lines.append(f"base = {auto_class}.from_pretrained({', '.join(keywords)})")
    if facts["dtype"] != "float32" and facts.get("modules_to_save"):
        lines += [
            f"for name in {json.dumps(facts['modules_to_save'])}:  # trained, and to be used, in float32",
            "    head = base.get_submodule(name).float()",
            "    head.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))",
        ]
    lines += ["model = PeftModel.from_pretrained(base, folder)"]
    trusted = f", {_TRUSTED}" if facts["trust_remote_code"] else ""
    if sees:  # as it was trained; the other way of scaling differs by a little
        return "\n".join(
            [*lines, f'processor = AutoImageProcessor.from_pretrained(folder, backend="pil"{trusted})']
        )
    languages = [
        f", {key}={json.dumps(facts[name])}"
        for key, name in (("src_lang", "source_language"), ("tgt_lang", "target_language"))
        if facts.get(name)
    ]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained(folder{trusted}{''.join(languages)})"]
    why = "windows were as long" if facts["task"] == "question-answering" else "texts were cut there"
    lines += [f"tokenizer.model_max_length = {facts['max_length']}  # {why}, in training too"]
    if not facts["has_pad_token"]:
        lines += ["tokenizer.pad_token = tokenizer.eos_token"]
    if _head_keywords(facts):
        lines += ["base.config.pad_token_id = tokenizer.pad_token_id"]
    return "\n".join(lines)


def training_lines(facts: Mapping[str, Any], folder: str) -> str:
    """Python that trains anew from a stored `LoraConfig`: in PEFT, and in TRL where that applies."""
    auto_class, place = _auto_class(facts), json.dumps(folder)
    base, source = json.dumps(facts["base_model"]["name"]), _source_keywords(facts)
    head = _head_keywords(facts)
    rate = format_rate(facts["params"]["learning_rate"])
    held = regulariser_parts(facts["params"])
    way = "windows of" if facts["task"] == "question-answering" else "texts cut at"
    cut = "" if _sees(facts) else f", {way} {facts['max_length']} tokens"
    decay = (
        f", weight_decay={facts['params']['weight_decay']:g}" if facts["params"].get("weight_decay") else ""
    )
    lines = [
        f"# Found by the search: {', '.join([f'learning rate {rate}{_head_rate(facts)}', *held])};",
        f"# {facts['steps']} steps of {facts['batch_size']} rows{cut}",
        "from peft import LoraConfig, get_peft_model",
        f"from transformers import {auto_class}",
        "",
        f"config = LoraConfig.from_pretrained({place})",
        f"base = {auto_class}.from_pretrained({', '.join([base, *source, *head])})",
        "model = get_peft_model(base, config)",
        "",
    ]
    if facts["task_type"] != "CAUSAL_LM":
        return "\n".join([*lines, "# TRL's SFTTrainer trains language models; for this one use Trainer."])
    loading = f", model_init_kwargs=dict({', '.join(source)})" if source else ""
    return "\n".join(
        [
            *lines,
            "# or in TRL",
            "from trl import SFTConfig, SFTTrainer",
            "",
            "trainer = SFTTrainer(",
            f"    model={base},",
            f'    args=SFTConfig(output_dir="trained", learning_rate={rate}{decay}{loading}),',
            "    train_dataset=dataset,",
            "    peft_config=config,",
            ")",
        ]
    )


def _sees(facts: Mapping[str, Any]) -> bool:
    """Whether the rows are images."""
    return bool(facts["task"] == "image-classification")


def _auto_class(facts: Mapping[str, Any]) -> str:
    """The class of transformers that loads the base model."""
    return _UNTYPED.get(facts["task"]) or _AUTO_CLASSES[facts["task_type"]]


def _head_rate(facts: Mapping[str, Any]) -> str:
    rate = facts["params"].get("head_learning_rate")
    return "" if rate is None else f", of the head {format_rate(rate)}"


def _head_keywords(facts: Mapping[str, Any]) -> list[str]:
    """How many outputs the head has and what they are, where there is one."""
    problem = _PROBLEMS.get(facts["task"])
    outputs = _OUTPUTS.get(facts["task"], len(facts["id2label"] or ()))
    told = [] if problem is None else [f'problem_type="{problem}"']
    return [f"num_labels={outputs}", *told, _OTHER_HEAD] if outputs else []


def _source_keywords(facts: Mapping[str, Any]) -> list[str]:
    """Which version of the base model to load, and whether code of its own may run."""
    base = facts["base_model"]
    revision = [f"revision={json.dumps(base['revision'])}"] if base["on_hub"] and base["revision"] else []
    return [*revision, *([_TRUSTED] if facts["trust_remote_code"] else [])]


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md of an exported adapter."""
    base, metric = facts["base_model"], facts["metric"]
    matter = ["library_name: peft", "tags: [lora, autorank]"]
    if base["on_hub"]:
        matter.append(f"base_model: {json.dumps(base['name'])}")
    ranks = [rank for rank in facts["ranks"].values() if rank]
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    scores = [f"{split} {format_value((facts[split] or {}).get(metric))}" for split in ("validation", "test")]
    head = f", and a head of {format_count(facts['head_parameters'])}" if facts["head_parameters"] else ""
    rows = [
        ("task", facts["task"]),
        ("base model", f"{base['name']} ({base['revision']})"),
        ("data", f"{facts['data']['source']} (sha256 {facts['data']['sha256'][:16]})"),
        (metric, ", ".join(score for score in scores if not score.endswith("-")) or "-"),
        ("trainable parameters", f"{format_count(facts['trainable_parameters'])}{head}"),
        ("ranks", f"{span} at {len(ranks)} layers, scaling {facts['scaling']:g}"),
        *_regularisers_row(facts["params"]),
        *_transplant_row(facts["transplant"], metric),
        *_long_run_row(facts["long_run"]),
        *_texts_row(facts),
        ("trial", f"{facts['trial']} of study {facts['study']}, step {facts['step']}, seed {facts['seed']}"),
    ]
    table = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows]
    return "\n".join(
        [
            "---",
            *matter,
            "---",
            "",
            f"# LoRA adapter from {facts['study']}",
            "",
            "Found by autorank, a search for the best LoRA adapter under a budget of parameters.",
            "It is a plain PEFT adapter with a rank of its own for each layer.",
            "",
            "| | |",
            "|---|---|",
            *table,
            "",
            "To load it, with this folder as the working directory:",
            "",
            "```python",
            loading_lines(facts),
            "```",
            "",
            f"`{FACTS}` holds the whole record. PEFT {facts['peft_minimum']} or newer reads it.",
            "Servers that know one global rank and alpha (vLLM, llama.cpp) mis-scale mixed ranks.",
            "",
        ]
    )


def _regularisers_row(params: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the training was held back by, where anything did."""
    parts = regulariser_parts(params)
    return [("regularisation", ", ".join(parts))] if parts else []


def _texts_row(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where texts were cut, or how they were read, where there are any."""
    way = "read in windows of" if facts["task"] == "question-answering" else "cut at"
    cut = f"{way} {facts['max_length']} tokens, in training and in scoring"
    return [] if _sees(facts) else [("texts", cut)]


def _long_run_row(run: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How long this adapter was trained after the search, where it was."""
    if run is None:
        return []
    rows = "training and validation rows, so it was not scored" if run["rows"] == "all" else "training rows"
    return [("trained anew", f"{format_count(run['steps'])} steps at the trial's ranks, on the {rows}")]


def _transplant_row(shrunk: Mapping[str, Any] | None, metric: str) -> list[tuple[str, str]]:
    """How a larger adapter became this one, where it did."""
    if shrunk is None:
        return []
    steps = shrunk["recover_steps"]
    stages = ["before", "truncated", *(["recovered"] if steps else [])]
    scores = ", ".join(f"{format_value(shrunk['validation'][stage][metric])} {stage}" for stage in stages)
    what = (
        f"from {format_count(shrunk['parameters_before'])} parameters for a budget of "
        f"{format_count(shrunk['budget'])}, {shrunk['energy_kept']:.1%} of the energy kept"
    )
    trained = ""
    if steps and shrunk["best_step"]:
        trained = f", then trained for {format_count(shrunk['best_step'])} of {format_count(steps)} steps"
    elif steps:
        trained = f"; {format_count(steps)} steps of training afterwards made it no better, and are left out"
    return [("truncated", f"{what}{trained}; validation {metric} {scores}")]
