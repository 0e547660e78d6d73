"""Chats as tokens, with templates of several kinds: what is trained is what the assistant writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from autorank.data import Places, build_data
from autorank.errors import DataError
from autorank.evaluate import evaluate
from autorank.generate import Writer
from autorank.tasks import CausalLM, choose_task
from autorank.tasks.chat import chat_tokens, has_chat_template, turn_ends
from autorank.tasks.sequence import runs
from autorank.tasks.task import IGNORED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
# Like reasoning models: what was thought in earlier turns is left out.
FORGETS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
# Like models that are made to think: what opens an answer is not what stands in front of one.
OPENS_OTHERWISE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>{% endif %}"
)
MARKS_NOTHING = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
MUTE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
MARKS_TWICE = MARKED.replace("<|im_end|>", "{% endgeneration %};{% generation %}<|im_end|>")
CONCATENATES = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes, 4"},
]


def make(template: str | None, **more: Any) -> PreTrainedTokenizerFast:
    """Every byte a token, so that text and tokens say the same; it puts `<s>` in front by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **specials, **more)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    backend = fast.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", fast.bos_token_id)]
    )
    assert fast("a")["input_ids"][0] == fast.bos_token_id
    fast.chat_template = template
    return fast


UNMARKED, WITH_MARKS = make(CHATML), make(CHATML_MARKED)


def spans(template: str, turns: list[dict[str, str]]) -> list[str]:
    """The text of each run of trained tokens."""
    tokenizer = make(template)
    tokens = chat_tokens(turns, tokenizer)
    assert tokenizer.decode(tokens.ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    found = [tokenizer.decode(tokens.ids[start:end]) for start, end in runs(tokens.trained)]
    assert len(tokens.answers) == len(found)
    assert all(answer in run for answer, run in zip(tokens.answers, found, strict=True))
    return found


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (CHATML, ["4<|im_end|>\n", "yes, 4<|im_end|>\n"]),
        (MARKED, ["4<|im_end|>", "yes, 4<|im_end|>"]),
        (LLAMA, [" 4 </s>", " yes, 4 </s>"]),
        (FORGETS, ["4<|im_end|>", "yes, 4<|im_end|>"]),
    ],
)
def test_the_assistants_turns_and_their_ends_are_trained_and_no_header(
    template: str, trained: list[str]
) -> None:
    assert spans(template, TURNS) == trained
    assert spans(template, TURNS[:2]) == trained[:1]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, ["<|im_end|>"]),
        (CHATML_MARKED, ["<|im_end|>"]),
        (LLAMA, ["</s>"]),
        (CONCATENATES, []),
        (MUTE, []),
        (MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), []),
    ],
)
def test_what_ends_a_turn_ends_what_is_written(template: str, end: list[str]) -> None:
    tokenizer, turns = make(template), [{"messages": TURNS}]
    assert tokenizer.convert_ids_to_tokens(list(turn_ends(tokenizer))) == end
    assert task_of(turns).ends(tokenizer) == turn_ends(tokenizer)
    prompted: Any = task_of([{"prompt": "2+2?", "completion": "4"}])
    assert prompted.ends(tokenizer) == ()
    tokenizer.chat_template = NO_SYSTEM.replace("'system'", "'user'")
    assert turn_ends(tokenizer) == ()


def test_a_written_turn_is_judged_up_to_its_end() -> None:
    tokenizer = make(CHATML)
    size = len(tokenizer)
    # What follows a token depends on it alone: a header is answered with 4, which ends the turn, and so on.
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=size, hidden_size=size, num_hidden_layers=0, num_attention_heads=1)
    ).eval()
    line, four, end = tokenizer("\n4<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        model.get_output_embeddings().weight.zero_()
        for token, after in ((line, four), (four, end), (end, line)):
            model.get_output_embeddings().weight[after, token] = 1
    rows = [{"messages": TURNS[:2]}, {"messages": TURNS}]
    task = task_of(rows, metric="exact_match")
    examples = task.encode(rows, tokenizer, 999).examples
    found = evaluate(
        model, task, examples, batch_size=2, pad_token_id=0, writer=Writer(model, tokenizer, 0, 999)
    )
    assert found.scores["exact_match"] == 0.5


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), min_size=2, max_size=6))
def test_turns_are_found_where_marks_would_have_put_them(words: list[str]) -> None:
    turns = [{"role": ("user", "assistant")[at % 2], "content": said} for at, said in enumerate(words)]
    assert chat_tokens(turns, UNMARKED) == chat_tokens(turns, WITH_MARKS)


def test_a_turn_that_the_template_rewrites_is_not_trained() -> None:
    thought = [TURNS[0], {"role": "assistant", "content": "<think>hm</think>4"}, *TURNS[2:]]
    assert spans(FORGETS, thought) == ["yes, 4<|im_end|>"]
    assert spans(FORGETS, thought[:2]) == ["<think>hm</think>4<|im_end|>"]
    assert (chat_tokens(thought, make(FORGETS)).untold, chat_tokens(TURNS, make(FORGETS)).untold) == (1, 0)
    task, rows = task_of([{"messages": TURNS}]), [{"messages": thought}, {"messages": TURNS}]
    encoded = task.encode(rows, make(FORGETS), 999)
    assert (encoded.kept, encoded.dropped) == (2, {})
    (note,) = encoded.notes
    assert note.endswith("once others follow: 1 turn of the assistant in 1 row")
    assert task.encode(rows[1:], make(FORGETS), 999).notes == ()


@pytest.mark.parametrize("template", [OPENS_OTHERWISE, MARKS_NOTHING, MUTE])
def test_a_row_is_dropped_where_the_template_tells_no_turn(template: str) -> None:
    encoded = task_of([{"messages": TURNS}]).encode([{"messages": TURNS}], make(template), 999)
    (reason,) = encoded.dropped
    assert encoded.dropped[reason] == 1 and "mark it with {% generation %}" in reason
    assert encoded.notes == ()


def test_what_is_to_be_written_is_what_stands_there_where_marks_are_no_turns() -> None:
    tokenizer = make(MARKS_TWICE)
    assert chat_tokens(TURNS, tokenizer).answers == ("4", "", "yes, 4", "")
    task = task_of([{"messages": TURNS}])
    (example,) = task.encode([{"messages": TURNS}], tokenizer, 999).examples
    assert example.reference == "" and tokenizer.decode(task.prompt(example)).endswith("yes, 4;")
    (cut,) = task.encode([{"messages": TURNS}], tokenizer, len("<s>") + 8).examples
    assert cut.reference in ("4", "") and "yes" not in tokenizer.decode(cut.input_ids)
    joined = make(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content or m.tool_calls[0].function.name }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    two = [TURNS[0], {"role": "assistant", "content": "one "}, {"role": "assistant", "content": "two"}]
    assert chat_tokens(two, joined).answers == ("one two",)
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    calls = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert chat_tokens(calls, joined).answers == ("add",)


def test_of_several_templates_the_one_in_use_is_read() -> None:
    tokenizer = make(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": MARKED}  # type: ignore[assignment]
    tokens = chat_tokens(TURNS, tokenizer)
    assert tokens == chat_tokens(TURNS, make(CHATML))
    tokenizer.chat_template = {"tool_use": MARKED}  # type: ignore[assignment]
    with pytest.raises(DataError, match="cannot be used: This model has multiple chat templates"):
        chat_tokens(TURNS, tokenizer)


@pytest.mark.parametrize(("template", "starts"), [(LLAMA, 2), (CHATML, 0)])
def test_only_the_template_writes_what_starts_a_text(template: str, starts: int) -> None:
    tokenizer = make(template)
    assert chat_tokens(TURNS, tokenizer).ids.count(tokenizer.bos_token_id) == starts


def test_a_first_word_that_takes_the_headers_space_with_it_is_trained(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat."}]
    tokens = chat_tokens(turns, tokenizer)
    ((start, end),) = runs(tokens.trained)
    assert tokenizer.convert_ids_to_tokens(tokens.ids[start]) == "▁The"
    assert tokens.ids[end - 1] == tokenizer.eos_token_id and end == len(tokens.ids)
    assert tokenizer.decode(tokens.ids[:start]).endswith("assistant:")


def test_a_system_turn_and_a_tool_are_read_and_not_trained() -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        *TURNS[:2],
        {"role": "tool", "content": "5"},
        TURNS[3],
    ]
    assert spans(CHATML, turns) == ["4<|im_end|>\n", "yes, 4<|im_end|>\n"]


def test_without_a_template_or_with_one_that_refuses_it_says_so() -> None:
    assert has_chat_template(make(CHATML)) and not has_chat_template(make(None))
    with pytest.raises(DataError, match="need a chat template, and this tokenizer has none"):
        chat_tokens(TURNS, make(None))
    with pytest.raises(DataError, match="refuses the conversation that begins 'be brief': no system here"):
        chat_tokens([{"role": "system", "content": "be brief"}, *TURNS], make(NO_SYSTEM))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    with pytest.raises(DataError, match="refuses the conversation that begins '2\\+2\\?'"):
        chat_tokens([TURNS[0], call], make(CONCATENATES))


def test_a_tokenizer_that_tells_no_offsets_is_refused() -> None:
    slow = ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(DataError, match="save a fast tokenizer"):
        chat_tokens(TURNS, slow)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, "'messages' is missing; it must be a list of turns"),
        ([], "'messages' is empty"),
        ({"role": "user"}, "'messages' is dict"),
        ([*TURNS, "bye"], r"'messages\[4\]' must be a turn"),
        ([{"content": "hi"}, *TURNS], r"'messages\[0\]' must be a turn"),
        ([TURNS[0], {"role": "assistant", "content": 4}], r"'messages\[1\]\.content' must be text"),
        ([TURNS[0], {"role": "assistant"}], r"'messages\[1\]\.content' must be text"),
        (TURNS[1:], "must have an assistant turn, and another one before it"),
        (TURNS[:1], "must have an assistant turn, and another one before it"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_its_place(turns: Any, message: str) -> None:
    rows = [{"messages": TURNS}, {"messages": turns}]
    places = {"train": Places("chats.jsonl", [1, 2], lines=True)}
    data = build_data("here", {"train": rows, "validation": rows[:1]}, places=places)
    with pytest.raises(DataError, match=rf"^chats\.jsonl:2: field .*{message}"):
        CausalLM.from_data(data)


def task_of(rows: list[dict[str, Any]], **more: Any) -> CausalLM:
    task, _ = choose_task("auto", build_data("here", {"train": rows, "validation": rows}), **more)
    assert isinstance(task, CausalLM)
    return task


def test_a_task_of_chats_trains_every_turn_and_writes_the_last() -> None:
    task, tokenizer = task_of([{"messages": TURNS}]), make(CHATML)
    assert task.columns == ("messages",) and task.trained == "the assistant's turns only"
    encoded = task.encode([{"messages": TURNS}], tokenizer, 999)
    (example,) = encoded.examples
    assert task.describe(example, tokenizer).count("[[") == 2
    assert "[[4<|im_end|>\n]]" in task.describe(example, tokenizer)
    assert tokenizer.decode(task.prompt(example)).endswith("sure?<|im_end|>\n<|im_start|>assistant\n")
    assert example.reference == "yes, 4"


def test_a_chat_is_cut_on_the_right_and_dropped_where_no_turn_is_left() -> None:
    task, tokenizer = task_of([{"messages": TURNS}]), make(CHATML)
    whole = task.encode([{"messages": TURNS}], tokenizer, 999).examples[0]
    first = next(at for at, label in enumerate(whole.labels) if label != IGNORED)  # type: ignore[arg-type]
    cut = task.encode([{"messages": TURNS}], tokenizer, first + 1)
    assert (cut.kept, cut.truncated, cut.dropped) == (1, 1, {})
    assert tokenizer.decode(cut.examples[0].input_ids[first:]) == "4"
    assert cut.examples[0].reference == "4"
    longer = task.encode([{"messages": TURNS}], tokenizer, first + 9).examples[0]
    assert task.describe(longer, tokenizer).count("[[") == 1 and longer.reference == "4"
    nearly = task.encode([{"messages": TURNS}], tokenizer, whole.length - 1).examples[0]
    assert task.describe(nearly, tokenizer).count("[[") == 2 and nearly.reference == "yes, 4"
    gone = task.encode([{"messages": TURNS}], tokenizer, first)
    assert (gone.kept, gone.dropped) == (0, {"no turn of the assistant left": 1})


def test_instructions_are_a_chat_where_the_model_has_a_template() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    task = task_of([row])
    (chat,) = task.encode([row], make(CHATML), 999).examples
    shown = task.describe(chat, make(CHATML))
    assert shown.startswith("<|im_start|>user\nAdd.\n\n2 and 2<|im_end|>") and shown.endswith(
        "[[4<|im_end|>\n]]"
    )
    (plain,) = task.encode([row], make(None), 999).examples
    assert task.describe(plain, make(None)).endswith("### Input:\n2 and 2\n\n### Response:\n[[4</s>]]")
    assert plain.reference == "4"


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    tokenizer = make(dated)
    text = tokenizer.decode(chat_tokens(TURNS, tokenizer).ids)
    assert text == "26 Jul 2024\n" + make(CHATML).apply_chat_template(TURNS, tokenize=False)
    assert text != tokenizer.apply_chat_template(TURNS, tokenize=False)
    marked = make("{{ strftime_now('%Y') }}\n" + MARKED)
    assert marked.decode(chat_tokens(TURNS, marked).ids).startswith("2024\n")
