"""What the preflight tells of the rows, and which of it makes a study another one."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from seq2seq_world import save_seq2seq
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from autorank.config import load_config
from autorank.display import Display, open_console
from autorank.errors import DataError, ModelError
from autorank.preflight import Setup, prepare

CHATML = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "red cat"}]}


def prepared(model: Path, folder: Path, rows: list[dict[str, Any]], *sets: str) -> tuple[Setup, str]:
    """The setup of a study of these rows, and what was told meanwhile."""
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    asked = {"model": str(model), "data": str(folder), "budget": "2k", "steps": 1000, "max_length": 8}
    stream = io.StringIO()
    setup = prepare(
        load_config(None, asked, sets), Display(console=open_console(stream, width=300), plain=True)
    )
    return setup, stream.getvalue()


def texts(*words: int) -> list[dict[str, Any]]:
    return [{"text": " ".join(["cat"] * count)} for count in words]


def test_packing_is_told_and_makes_another_study(tiny_llama: Path, tmp_path: Path) -> None:
    facts: dict[str, dict[str, str]] = {}
    for sets, sequences in (("packing=auto", 3), ("packing=true", 3), ("packing=false", 3)):
        setup, told = prepared(tiny_llama, tmp_path, texts(9, 4, 5), sets)
        assert len(setup.bench.train) == sequences
        packed = "train: 3 texts packed into 3 sequences of 8 tokens" in told
        assert packed is (sets != "packing=false")
        assert ("train: 1 of 3 texts cut at 8 tokens" in told) is not packed
        facts[sets] = setup.fingerprint
    assert facts["packing=auto"] == facts["packing=true"] == {**facts["packing=false"], "packing": "True"}


def test_the_train_split_decides_for_all(tiny_llama: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", texts(7, 7))
    assert len(prepared(tiny_llama, tmp_path, texts(7, 7))[0].test) == 2
    setup, told = prepared(tiny_llama, tmp_path, texts(1, 1, 1, 1))
    assert "test: 2 texts packed into 2 sequences" in told
    assert [example.length for example in setup.test] == [8, 8] and "packing" in setup.fingerprint


def test_packing_what_is_no_plain_text_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the red", "completion": " cat"}]
    setup, told = prepared(tiny_llama, tmp_path, rows, "packing=true")
    assert told.count("packing joins plain texts only") == 1 and "packing" not in setup.fingerprint
    assert "packing joins" not in prepared(tiny_llama, tmp_path, rows)[1]


def test_a_template_is_told_and_makes_another_study(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"colour": "red", "prompt": "the", "completion": "cat"}]
    plain, _ = prepared(tiny_llama, tmp_path, rows)
    made, told = prepared(tiny_llama, tmp_path, rows, r"template=the {colour}\n")
    assert made.fingerprint == {**plain.fingerprint, "template": "the {colour}\n"}
    assert "task causal-lm (as it has a template): trained on completions only" in told
    assert "for example: the red[[cat </s>]]" in told


def with_template(model: Path, folder: Path, template: str) -> Path:
    """The model, its tokenizer with a chat template."""
    from transformers import AutoTokenizer

    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_shows_what_is_trained_and_needs_a_template(
    tiny_llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(DataError, match="rows with messages need a chat template"):
        prepared(tiny_llama, tmp_path, [CHAT])
    model = with_template(tiny_llama, tmp_path_factory.mktemp("chats"), CHATML)
    _, told = prepared(model, tmp_path, [CHAT])
    assert "trained on the assistant's turns only" in told
    assert "[[red cat </s>]]" in told


def test_where_no_turn_can_be_told_the_error_says_why(
    tiny_llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = with_template(tiny_llama, tmp_path_factory.mktemp("chats"), CHATML.replace("assistant ", "bear "))
    with pytest.raises(DataError, match=r"no train row is left, 1 dropped \(the chat template does not tell"):
        prepared(model, tmp_path, [CHAT])


@pytest.fixture(scope="module")
def chatty(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_llama, tmp_path_factory.mktemp("models"), CHATML)


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seq2seq(tmp_path_factory.mktemp("models") / "t5")


LONG = "the red blue green black white cat dog"
SAID = {"role": "assistant", "content": LONG}
# What the rows are: the model, two or three rows, one that fits, one that is too long and one of which
# nothing trained would be left, and what is told of the task, of the counts and of the first row.
ROWS: dict[str, tuple[str, list[dict[str, Any]], tuple[str, str, str]]] = {
    "classes": (
        "tiny_bert", [{"text": "the cat", "label": "animal"}, {"text": LONG, "label": "colour"}],
        ("text-classification (columns text, label): 2", "1 of 2 texts cut", "the cat [SEP] -> animal"),
    ),
    "numbers": (
        "tiny_bert", [{"text": "the cat", "score": 0.5}, {"text": LONG, "score": 2.5}],
        ("regression (columns text, score): numbers in score", "1 of 2 texts cut", "the cat [SEP] -> 0.5"),
    ),
    "lists of classes": (
        "tiny_bert", [{"text": "the cat", "label": ["animal"]}, {"text": LONG, "label": []}],
        ("multi-label-classification (columns text, label)", "1 of 2 texts cut", "the cat [SEP] -> animal"),
    ),
    "words and tags": (
        "tiny_bert",
        [{"tokens": ["the", "cat"], "tags": ["O", "B-one"]}, {"tokens": LONG.split(), "tags": ["O"] * 8}],
        ("token-classification (columns tokens, tags): 2 tags", "1 of 2 texts cut", "the/O cat/B-one"),
    ),
    "answers": (
        "tiny_bert",
        [{"question": "one", "context": "the cat", "answers": ["cat"]},
         {"question": "one", "context": LONG, "answers": ["red"]},
         {"question": LONG, "context": "the cat", "answers": ["cat"]}],
        ("question-answering (columns question, context, answers): answers in context",
         "1 of 2 contexts do not fit in 8 tokens: with the others they are read in 4 windows",
         "[SEP] the cat [SEP] -> cat"),
    ),
    "a corpus": (
        "tiny_llama", [{"text": "the cat"}, {"text": LONG}],
        ("causal-lm (column text, no label): trained on all of", "1 of 2 texts cut", "the[[cat </s>]]"),
    ),
    "prompts": (
        "tiny_llama",
        [{"prompt": "the red", "completion": "cat"}, {"prompt": "the", "completion": LONG},
         {"prompt": LONG, "completion": "cat"}],
        ("causal-lm (columns prompt, completion): trained on completions only",
         "1 of 2 texts cut at 8 tokens, 1 dropped (completion cut away)", "the red[[cat </s>]]"),
    ),
    "instructions": (
        "chatty",
        [{"instruction": "one", "output": "red cat"}, {"instruction": "one", "output": LONG},
         {"instruction": LONG, "output": "cat"}],
        ("causal-lm (columns instruction, output): trained on completions only",
         "1 of 2 texts cut at 8 tokens, 1 dropped (no turn of the assistant left)", "[[red cat </s>]]"),
    ),
    "chats": (
        "chatty",
        [CHAT, {"messages": [CHAT["messages"][0], SAID]}, {"messages": [{**SAID, "role": "user"}, SAID]}],
        ("causal-lm (column messages): trained on the assistant's turns only",
         "1 of 2 texts cut at 8 tokens, 1 dropped (no turn of the assistant left)", "[[red cat </s>]]"),
    ),
    "sources and targets": (
        "tiny_t5", [{"source": "a b", "target": "b a"}, {"source": "a b c d e f g h", "target": "h"}],
        ("seq2seq (columns source, target): source to target",
         "1 of 2 texts cut at 8 tokens (1 source, 0 targets)", "a b </s> [[b a </s>]]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), [("a </s>", "1 of 2 train texts have another number"), ("a", "")])
def test_a_classifier_that_reads_the_end_of_sequence_finds_one_in_each_text(
    tiny_t5: Path, tmp_path: Path, text: str, said: str
) -> None:
    rows = [{"text": text, "label": "x"}, {"text": "b c", "label": "y"}]
    if not said:
        assert prepared(tiny_t5, tmp_path, rows)[0].task.name == "text-classification"
        tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
        shutil.copytree(tiny_t5, tmp_path / "endless")
        tokenizer.save_pretrained(tmp_path / "endless")
        tiny_t5, said = tmp_path / "endless", "2 of 2 train texts have none"
    with pytest.raises(ModelError, match=rf"judges a text by its end of sequence, token 1, of which {said}"):
        prepared(tiny_t5, tmp_path, rows)


@pytest.mark.parametrize("what", ROWS)
def test_what_becomes_of_the_rows_is_told_with_an_example(
    tmp_path: Path, request: pytest.FixtureRequest, what: str
) -> None:
    model, rows, (chosen, counts, example) = ROWS[what]
    setup, told = prepared(request.getfixturevalue(model), tmp_path, rows, "packing=false")
    lines = told.splitlines()
    assert f"data {tmp_path}: JSONL folder, {len(rows)} train, {len(rows)} validation, 0 test rows" in lines
    assert any(line.startswith(f"task {chosen}") for line in lines), told
    dropped = "1 dropped (no token of the context)"
    assert what != "answers" or any(dropped in line for line in lines), told
    for split in ("train", "validation"):
        assert any(line.startswith(f"{split}: {counts}") for line in lines), told
    more = [line.endswith("; the model takes 64: see --max-length") for line in lines if " dropped (" in line]
    assert all(more), told
    assert any(line.startswith("for example: ") and line.endswith(example) for line in lines), told
    # What trains nothing is not there.
    assert len(setup.bench.train) == (4 if what == "answers" else 2)  # windows
    assert all(setup.task.terms(setup.task.collate([one], 0)) for one in setup.bench.train)


def test_the_base_is_scored_in_smaller_passes_where_memory_runs_out(tiny_llama: Path, tmp_path: Path) -> None:
    setup, _ = prepared(tiny_llama, tmp_path, texts(*range(2, 12)), "packing=false")
    whole = setup.evaluate(setup.bench.validation)

    def small(module: object, inputs: object, named: dict[str, torch.Tensor]) -> None:
        if len(named["input_ids"]) > room:
            raise torch.OutOfMemoryError("no room")

    hook = setup.base.model.register_forward_pre_hook(small, with_kwargs=True)
    try:
        room = 3
        assert setup.evaluate(setup.bench.validation).scores == pytest.approx(whole.scores)
        room = 0
        with pytest.raises(torch.OutOfMemoryError):
            setup.evaluate(setup.bench.validation)
    finally:
        hook.remove()
