"""Tokens that are kept: those read are those that would be made, and no others are read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from tokenizers import AddedToken, normalizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from autorank import token_cache
from autorank.config import load_config
from autorank.data import DataSet, build_data
from autorank.display import Display, open_console
from autorank.pixels import Eye
from autorank.preflight import prepare
from autorank.tasks import (
    CausalLM,
    Encoded,
    Example,
    Metric,
    Seq2Seq,
    Task,
    TextClassification,
    WritingTask,
    choose_task,
    for_model,
)
from autorank.tasks.text_metrics import TEXT_METRICS
from autorank.token_cache import TokenCache

Rows = list[dict[str, Any]]

CHATML = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
# What was said in earlier turns is written otherwise, so that these are not trained, which is noted.
FORGETS = CHATML.replace("m.content", "(m.content if loop.last or m.role == 'user' else 'cat')")
CHAT: Rows = [
    {"role": role, "content": content}
    for role, content in (("user", "one"), ("assistant", "red"), ("user", "a"), ("assistant", "dog today"))
]
ANSWER = {"text": ["red cat"], "answer_start": [4]}

WORLDS: dict[str, tuple[str, Rows]] = {
    "text-classification": (
        "tiny_bert",
        [{"text": "the red cat saw", "label": "a"}, {"text": "x", "label": "b"}],
    ),
    "pairs": ("tiny_bert", [{"text_a": "the red cat", "text_b": "soup", "label": name} for name in "ab"]),
    "multi-label": ("tiny_bert", [{"text": "a cat", "label": names} for names in (["x", "y"], [], ["y"])]),
    "regression": ("tiny_bert", [{"text": "a cat", "score": score} for score in (1, 0.1, -2.5e-7, 1e15)]),
    "token-classification": ("tiny_bert", [{"tokens": ["the", "cat"], "tags": ["O", "B-x"]}]),
    "question-answering": (
        "tiny_bert",
        [
            {"question": "one", "context": "the red cat saw it, ö", "answers": ANSWER},
            {"question": "one", "context": "today the red cat", "answers": {"text": [], "answer_start": []}},
            {
                "question": "one of it",
                "context": "the the red cat",
                "answers": {**ANSWER, "answer_start": [8]},
            },
        ],
    ),
    "corpus": ("tiny_llama", [{"text": "the red cat saw it today"}, {"text": "the cat " * 5}]),
    "packed": ("tiny_llama", [{"text": "the red cat"}, {"text": "soup"}]),
    "prompts": (
        "tiny_llama",
        [{"prompt": "the red", "completion": " cat ü"}, {"prompt": "a " * 9, "completion": "b"}],
    ),
    "instructions": ("tiny_llama", [{"instruction": "one", "input": "it", "output": "the cat"}]),
    "chats": ("tiny_llama", [{"messages": CHAT}, {"messages": CHAT[:2]}]),
    "template": ("tiny_llama", [{"colour": "red", "completion": "cat"}]),
    "seq2seq": (
        "tiny_llama",
        [{"source": "the " * 9, "target": "red"}, {"source": "a", "target": "red " * 9}],
    ),
}


def data_of(rows: Rows) -> DataSet:
    return DataSet("here", "rows", (), (), (), tuple(rows), "")


@dataclass(frozen=True)
class World:
    """A task, rows of it and a tokenizer."""

    task: Task
    rows: Rows
    tokenizer: Any
    length: int = 8

    @classmethod
    def of(cls, name: str, request: pytest.FixtureRequest) -> World:
        model, rows = WORLDS[name]
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(model))
        tokenizer.chat_template = FORGETS if name == "chats" else None
        how: dict[str, Any] = {"template": "the {colour}"} if name == "template" else {}
        if name in ("corpus", "packed"):
            how = {"packing": "auto" if name == "packed" else False}
        task, _ = choose_task("auto", build_data("here", {"train": rows, "validation": rows}), **how)
        return cls(for_model(task, 0), rows, tokenizer, 60 if name == "instructions" else 8)

    def encode(self) -> Encoded:
        return self.task.encode(self.rows, self.tokenizer, self.length)

    def cached(self, place: Path | None) -> tuple[Encoded, bool]:
        return TokenCache(self.tokenizer, self.length, place).encode(self.task, data_of(self.rows), "test")

    def key(self, **other: Any) -> str:
        changed = replace(self, **other)
        key = TokenCache(changed.tokenizer, changed.length, Path())._key(changed.task, changed.rows)
        assert key is not None
        return key


@pytest.fixture
def world(request: pytest.FixtureRequest) -> World:
    """The world of that name; of texts with a class if none is given."""
    return World.of(getattr(request, "param", "text-classification"), request)


everywhere = pytest.mark.parametrize("world", WORLDS, indirect=True)


@pytest.fixture(autouse=True)
def every_split_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 0)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@everywhere
def test_what_is_read_is_what_would_be_made(world: World, tmp_path: Path) -> None:
    made = world.encode()
    first, was_read = world.cached(tmp_path)
    assert not was_read and len(entries(tmp_path)) == 1
    found, is_read = world.cached(tmp_path)
    assert is_read and made.examples
    assert repr(found) == repr(first) == repr(made)  # which tells tuples from lists and 1.0 from 1
    assert world.task.collate(found.examples, 0).samples == len(made.examples)


def test_the_worlds_above_hold_whatever_there_is_to_keep(request: pytest.FixtureRequest) -> None:
    told: set[str] = set()
    for name in WORLDS:
        encoded = World.of(name, request).encode()
        told |= {field.name for field in fields(encoded) if getattr(encoded, field.name)}
        for example in encoded.examples:
            told |= {field.name for field in fields(example) if getattr(example, field.name) is not None}
    assert told == {field.name for kind in (Encoded, Example) for field in fields(kind)} - {"picture"}


@everywhere
def test_another_setting_of_the_task_is_another_entry_but_not_another_metric(world: World) -> None:
    other = {
        "columns": ("another",),
        "labels": ("b", "a"),
        "target": "another",
        "template": "another",
        "packing": True,
        "decoder_start": 7,
        "unit": 2.0**40,
        "abstains": not getattr(world.task, "abstains", True),
    }
    keys = [world.key()]
    for field in fields(world.task):
        if field.name != "metric":
            keys.append(world.key(task=replace(world.task, **{field.name: other[field.name]})))
    assert len(set(keys)) == len(keys) == len(fields(world.task))
    made = repr(world.encode())
    for name in {*world.task.metrics, *(TEXT_METRICS if isinstance(world.task, WritingTask) else ())}:
        other_metric = replace(world, task=replace(world.task, metric=Metric(name, "maximize")))
        assert other_metric.key() == keys[0] and repr(other_metric.encode()) == made


def test_another_task_is_another_entry(world: World) -> None:
    columns, metric = ("text", "label"), world.task.metric
    kinds = [CausalLM(columns, metric), Seq2Seq(columns, metric), TextClassification(columns, (), metric)]
    assert len({world.key(task=kind) for kind in kinds}) == 3


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "the red cat", "label": 1}, {"text": "b", "label": 2}],
        [{"text": "b", "label": 2}, {"text": "the red dog", "label": 1}],
        [{"text": "the red dog", "label": 1}],
        [{"text": "the red dog", "label": 1.0}, {"text": "b", "label": 2}],
        [{"text": "the red dog", "label": True}, {"text": "b", "label": 2}],
        [{"label": 1, "text": "the red dog"}, {"text": "b", "label": 2}],  # the order in which tools are told
        [{"text": "the red dog", "label": "1"}, {"text": "b", "label": 2}],
        [{"text": "the red dog", "label": [1]}, {"text": "b", "label": 2}],
        [{"text": "the red dog", "label": (1,)}, {"text": "b", "label": 2}],
    ],
)
def test_other_rows_are_another_entry(world: World, rows: Rows) -> None:
    mine: Rows = [{"text": "the red dog", "label": 1}, {"text": "b", "label": 2}]
    assert world.key(rows=rows) != world.key(rows=mine) == world.key(rows=[dict(row) for row in mine])


def test_another_length_is_another_entry(world: World) -> None:
    assert world.key() != world.key(length=9)


def post_processed(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A $B", special_tokens=[("[SEP]", tokenizer.sep_token_id)]
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.add_tokens(["soupy"]),
        lambda one: one.add_special_tokens({"additional_special_tokens": ["<x>"]}),
        lambda one: setattr(one, "eos_token", "[SEP]"),
        lambda one: setattr(one, "pad_token", "[SEP]"),
        lambda one: setattr(one, "chat_template", CHATML),
        lambda one: setattr(one, "truncation_side", "left"),
        lambda one: setattr(one, "padding_side", "left"),
        lambda one: setattr(one, "model_input_names", ["input_ids"]),
        lambda one: setattr(one, "split_special_tokens", True),
        lambda one: setattr(one.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        lambda one: setattr(one.backend_tokenizer, "pre_tokenizer", None),
        post_processed,
        lambda one: one.add_tokens([AddedToken("cat", lstrip=True)]),
    ],
)
def test_another_tokenizer_is_another_entry(
    world: World, tiny_bert: Path, change: Callable[[Any], object]
) -> None:
    changed = AutoTokenizer.from_pretrained(tiny_bert)
    assert world.key(tokenizer=changed) == world.key()
    change(changed)
    assert world.key(tokenizer=changed) != world.key()


def test_one_word_of_the_vocabulary_and_the_kind_of_tokenizer_count(world: World) -> None:
    stored = json.loads(world.tokenizer.backend_tokenizer.to_str())
    vocabulary = stored["model"]["vocab"]
    swapped = dict(vocabulary, cat=vocabulary["dog"], dog=vocabulary["cat"])
    keys = {world.key()}
    for words in (vocabulary, swapped):
        stored["model"]["vocab"] = words
        backend = type(world.tokenizer.backend_tokenizer).from_str(json.dumps(stored))
        keys.add(world.key(tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend)))
    assert len(keys) == 3


def test_a_tokenizer_that_was_used_is_the_same(world: World) -> None:
    key = world.key()
    world.tokenizer(["the red cat"] * 2, truncation=True, max_length=3, padding="max_length")
    world.tokenizer("the cat " * 500)  # which it warns of, once
    assert world.key() == key
    replace(world, length=3).encode()
    assert world.key() == key


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "jinja2"])
def test_other_versions_are_another_entry(
    world: World, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, version = world.key(), importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0" if name == library else version(name)
    )
    assert world.key() != key


def test_another_autorank_or_python_is_another_entry(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {world.key()}
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "__version__", "0.0")
        keys.add(world.key())
    with monkeypatch.context() as patch:
        patch.setattr("platform.python_version", lambda: "3.0")
        keys.add(world.key())
    package = Path(token_cache.__file__).parent
    (tmp_path / "tasks").mkdir()
    for path in (package / "token_cache.py", *(package / "tasks").glob("*.py")):
        (tmp_path / path.relative_to(package)).write_bytes(path.read_bytes())
    monkeypatch.setattr(token_cache, "__file__", str(tmp_path / "token_cache.py"))
    assert world.key() in keys
    for name in ("token_cache.py", "tasks/texts.py"):  # changed in a checkout, the version as it was
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        keys.add(world.key())
    assert len(keys) == 5


def test_little_is_made_anew(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(len(f"{row!r}\n") for row in world.rows)
    for least, count in ((size + 1, 0), (size, 1)):
        monkeypatch.setattr(token_cache, "LEAST_BYTES", least)
        assert world.cached(tmp_path)[1] is False
        assert len(entries(tmp_path)) == count


class Own(PreTrainedTokenizerFast):
    """A tokenizer whose code is no part of transformers."""


def with_python_inside(tokenizer: Any) -> Any:
    from tokenizers import pre_tokenizers

    class Whole:
        def pre_tokenize(self, text: Any) -> None:
            pass

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Whole())
    return tokenizer


@pytest.mark.parametrize(
    "other",
    [
        lambda tokenizer: ByT5Tokenizer(),
        lambda tokenizer: Own(tokenizer_object=tokenizer.backend_tokenizer, sep_token="[SEP]"),
        with_python_inside,
    ],
)
def test_what_cannot_be_told_apart_is_made_anew(world: World, tmp_path: Path, other: Any) -> None:
    tokenizer = other(world.tokenizer)
    made = world.task.encode(world.rows, tokenizer, 8)
    for _ in range(2):
        assert TokenCache(tokenizer, 8, tmp_path).encode(world.task, data_of(world.rows), "test") == (
            made,
            False,
        )
    assert not entries(tmp_path)


@pytest.mark.parametrize("world", ["chats", "prompts"], indirect=True)
@pytest.mark.parametrize("what", ["strftime_now('%H')", "['one', 'two'] | random", "lipsum(1)"])
def test_chats_whose_template_tells_the_time_are_made_anew(world: World, tmp_path: Path, what: str) -> None:
    world.tokenizer.chat_template = f"{{# {what} #}}{CHATML}"
    world.cached(tmp_path)
    assert len(entries(tmp_path)) == (world.task.columns == ("prompt", "completion"))


def test_images_are_made_anew(tmp_path: Path) -> None:
    eye = Eye(object(), torch.float32, (3, 4, 4))
    assert TokenCache(eye, 8, tmp_path)._identity is None


def forged(path: Path, **changes: Any) -> None:
    """An entry with the right checksum, in which something is another thing."""
    entry = json.loads(path.read_bytes().partition(b"\n")[2]) | changes
    text = json.dumps(entry).encode()
    checksum = hashlib.sha256(path.name.encode() + b"\n" + text).hexdigest()
    path.write_bytes(checksum.encode() + b"\n" + text)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"2", b"3", 1)),
        lambda path: path.write_bytes(os.urandom(100)),
        lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("ran")))),
        lambda path: path.write_bytes(path.read_bytes() + b" "),
        lambda path: forged(path, examples={}),
        lambda path: forged(path, examples=[[[1, 2], 0]]),
        lambda path: forged(path, examples=[[["1"], 0, None, None, None]]),
        lambda path: forged(path, examples=[[[1], "0", None, None, None]]),
        lambda path: forged(path, examples=[[[True], 0, None, None, None]]),
        lambda path: forged(path, packed=-1),
        lambda path: forged(path, more=1),
        lambda path: forged(path, notes=["["] * 3 + [[[[]]]]),
        lambda path: path.unlink() or path.mkdir(),
        lambda path: path.unlink() or path.symlink_to(os.devnull),
        lambda path: path.unlink() or path.symlink_to(path.name),
        lambda path: path.unlink() or os.mkfifo(path),
    ],
)
def test_a_file_that_is_no_entry_is_made_again(
    world: World, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    made, _ = world.cached(tmp_path)
    (path,) = entries(tmp_path)
    spoil(path)
    assert world.cached(tmp_path) == (made, False)
    assert entries(tmp_path) == [path]  # and nothing ran
    if not path.is_dir():
        assert world.cached(tmp_path) == (made, True)


def test_an_entry_under_anothers_name_is_none(world: World, tmp_path: Path) -> None:
    other = world.rows[::-1]
    for rows in (world.rows, other):
        TokenCache(world.tokenizer, 8, tmp_path).encode(world.task, data_of(rows), "test")
    first, second = entries(tmp_path)
    first.write_bytes(second.read_bytes())
    cache = TokenCache(world.tokenizer, 8, tmp_path)
    found = {
        is_read: encoded
        for encoded, is_read in (
            cache.encode(world.task, data_of(rows), "test") for rows in (world.rows, other)
        )
    }
    assert set(found) == {True, False} and found[True] != found[False]


def test_what_cannot_be_written_is_no_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    made = world.encode()
    for _ in range(2):
        for place in (tmp_path / "file", tmp_path / "file" / "below", None):  # None: see conftest.py
            assert world.cached(place) == (made, False)
    assert TokenCache(world.tokenizer, 8).folder is None
    monkeypatch.setattr(token_cache, "MOST_BYTES", 100)
    assert world.cached(tmp_path / "small") == (made, False)
    assert not (tmp_path / "small").exists()


def test_what_was_not_used_for_longest_goes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(count: int) -> bool:
        rows = [{"text": "cat " * 50, "label": "a"}] * 10 + [{"text": "the " * count, "label": "b"}]
        return TokenCache(world.tokenizer, 60, tmp_path).encode(world.task, data_of(rows), "test")[1]

    for age, count in enumerate((3, 2, 1)):
        assert encode(count) is False
        for path in entries(tmp_path):
            os.utime(path, (path.stat().st_mtime - 100 - age,) * 2)
    (tmp_path / ".tmp-of-a-process-that-was-killed").write_bytes(b"x")
    os.utime(tmp_path / ".tmp-of-a-process-that-was-killed", (1, 1))
    assert encode(3) is True  # the oldest is the youngest now
    room = sum(path.stat().st_size for path in entries(tmp_path) if not path.name.startswith("."))
    monkeypatch.setattr(token_cache, "MOST_BYTES", room)
    assert encode(4) is False
    assert len(entries(tmp_path)) in (2, 3) and sum(path.stat().st_size for path in entries(tmp_path)) <= room
    assert not any(path.name.startswith(".") for path in entries(tmp_path))
    assert encode(3) is True and encode(4) is True and encode(2) is False


def prepared(model: Path, data: Path, *sets: str) -> tuple[Any, list[str]]:
    stream = io.StringIO()
    asked = {"model": str(model), "data": str(data), "budget": "2k", "steps": 1000, "max_length": 8}
    display = Display(console=open_console(stream, width=300), plain=True)
    return prepare(load_config(None, asked, sets), display), stream.getvalue().splitlines()


def test_a_search_reads_what_an_earlier_one_has_made_and_tells(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 2), ("validation", 8), ("test", 9)):
        write_jsonl(tmp_path / "rows" / f"{split}.jsonl", [{"text": "cat " * count}] * 3)
    made, told = prepared(tiny_llama, tmp_path / "rows")
    found, told_again = prepared(tiny_llama, tmp_path / "rows")
    folder = tmp_path / "cache" / "autorank" / "tokens" / "default"
    read = [f"{split}: tokens read from {folder}" for split in ("train", "validation", "test")]
    assert [line for line in told_again if line not in told] == read
    assert [line for line in told_again if line not in read] == told
    assert (found.bench.train, found.bench.validation, found.test, found.fingerprint, found.task) == (
        made.bench.train, made.bench.validation, made.test, made.fingerprint, made.task,
    )  # fmt: skip
    assert found.task.packing is True  # as the train rows had it, which were not tokenised
    _, told = prepared(tiny_llama, tmp_path / "rows", "packing=false")
    assert not set(told) & set(read)
