"""Bad data, as they come from the command line: one clear error, its exit code, and nothing on disk.

Two tables of what may be wrong. The first is of what is found before a weight is read: its models have
all but weights that could be loaded. What can be trained on in spite of it is told instead.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from conftest import Outcome, save_tokenizer
from pyarrow import parquet
from refusals import assert_refused, contents, husk

Cli = Callable[..., Outcome]
Files = Mapping[str, Any]
"""What lies there: bytes, None for a folder, lists of rows as JSON lines, and what writes itself."""

GOOD = [{"text": f"the {word} n{i}", "label": kind} for i, (word, kind) in enumerate(
    [("cat", "animal"), ("red", "colour"), ("dog", "animal"), ("blue", "colour")] * 2)]  # fmt: skip
USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "red cat"}


def splits(train: Any, validation: Any = GOOD, **more: Any) -> dict[str, Any]:
    """A folder of JSON lines."""
    named = {"train": train, "validation": validation, **more}
    return {f"{name}.jsonl": rows for name, rows in named.items()}


def third(**bad: Any) -> dict[str, Any]:
    """A folder whose third train row has other fields."""
    return splits([*GOOD[:2], {**GOOD[2], **bad}, *GOOD[3:]])


def like(row: dict[str, Any], **bad: Any) -> dict[str, Any]:
    """A folder of eight rows like this one, of which the third train row has other fields."""
    rows = [row] * 8
    return splits([*rows[:2], {**row, **bad}, *rows[3:]], rows)


def outside_of_the_names(path: Path) -> None:
    """A Parquet file whose schema names two classes, and a row of a third."""
    names = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = [{"text": f"the cat {i}", "label": label} for i, label in enumerate([0, 1] * 4 + [7])]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=names.arrow_schema), path)


INSTRUCTION = {"instruction": "one", "output": "red"}
PAIR = {"source": "red", "target": "cat"}
WORDS = {"tokens": ["the", "cat"], "tags": ["O", "B-animal"]}
PASSAGE = {"question": "animal", "context": "the red cat", "answers": ["cat"]}

# what is wrong: (the files, the data, flags, what the message must say)
BEFORE_THE_MODEL: dict[str, tuple[Files, str, str, str]] = {
    # -- the file
    "file missing": ({}, "./rows.jsonl", "", r"data './rows\.jsonl': no such file or folder; give"),
    "file in the home of nobody": (
        {}, "~nobody-here/rows.jsonl", "", r"data '~nobody-here/rows\.jsonl': no such file or folder; give",
    ),
    "file missing, one of the name beside it": (
        {"rows.jsonl": GOOD}, "./row.jsonl", "", r"no such file or folder, but there is rows\.jsonl; give",
    ),
    "file empty": ({"rows.jsonl": b""}, "rows.jsonl", "", r"rows\.jsonl: no rows in it; .* at least one"),
    "file of blank lines": ({"rows.jsonl": b"\n \n"}, "rows.jsonl", "", r"rows\.jsonl: no rows in it"),
    "folder empty": ({"rows": None}, "rows", "", r"rows: no train file found \(no files\); name the splits"),
    "folder where a file should be": (
        {"train.jsonl/x.txt": b""}, ".", "", r"no train file found .*name the splits train, validation and",
    ),
    "folder without train": (
        {"validation.jsonl": GOOD}, ".", "", r"\S+: no train split found, but validation; name the splits",
    ),
    "split twice": (
        {**splits(GOOD), "dev.jsonl": GOOD}, ".", "", r"dev\.jsonl, validation\.jsonl would all be the",
    ),
    "wrong extension": (
        {"rows.txt": GOOD}, "rows.txt", "", r"rows\.txt: the extension '\.txt' is not known; files are JSON",
    ),
    "wrong extension, another format": (
        {"rows.csv": GOOD}, "rows.csv", "", r"rows\.csv:1: JSON by its content, not CSV; name it rows\.jsonl",
    ),
    "latin-1": (
        {"rows.csv": "text,label\nthe cat,é\n".encode("latin-1")}, "rows.csv", "",
        r"rows\.csv:2: not UTF-8 \(byte 0xe9 at 9\); save the file as UTF-8",
    ),
    "UTF-16": (
        {"rows.csv": "text,label\nthe cat,a\n".encode("utf-16")}, "rows.csv", "",
        r"rows\.csv:1: not UTF-8 .*save the file as UTF-8",
    ),
    "gz under a plain name": (
        {"rows.jsonl": gzip.compress(b"{}")}, "rows.jsonl", "",
        r"rows\.jsonl: compressed with gzip; .*name it rows\.jsonl\.gz",
    ),
    "plain under a gz name": (
        {"rows.jsonl.gz": GOOD}, "rows.jsonl.gz", "",
        r"rows\.jsonl\.gz: no compressed data, not gzip; name it rows\.jsonl",
    ),
    "bz2 under a gz name": (
        {"rows.csv.gz": bz2.compress(b"text,label\n")}, "rows.csv.gz", "",
        r"compressed with bzip2, not gzip; .*name it rows\.csv\.bz2",
    ),
    "gz cut short": (
        {"rows.jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 99)[:-9]}, "rows.jsonl.gz", "",
        r"rows\.jsonl\.gz: its gzip data are broken .*copy or pack the file again",
    ),
    "Parquet of something else": (
        {"rows.parquet": b"no rows"}, "rows.parquet", "", r"rows\.parquet: not a Parquet file .*write it ag",
    ),
    # -- rows
    "JSONL line malformed": (
        splits(b'{"text": "one", "label": "a"}\n{"text": "two", "label"\n'), ".", "",
        r"train\.jsonl:2: not a JSON object on one line \(Expecting ':' delimiter, column 24\)",
    ),
    "JSONL line no object": (
        splits(b'{"text": "one", "label": "a"}\n["two", "b"]\n'), ".", "",
        r"train\.jsonl:2: found list; each line must be one JSON object, such as",
    ),
    "JSON array cut short": (
        {"rows.json": b'[{"text": "one", "label": "a"},\n'}, "rows.json", "", r"rows\.json:2: the array does",
    ),
    "CSV row too long": (
        {"rows.csv": b"text,label\none,a\nt,w,o\n"}, "rows.csv", "", r"rows\.csv:3: 3 fields, .*with commas",
    ),
    "CSV header names a column twice": (
        {"rows.csv": b"text,text\none,a\n"}, "rows.csv", "", r"rows\.csv:1: the header names .* twice .*give",
    ),
    "column types mixed": (
        third(label=1), ".", "",
        r"train\.jsonl:3: label 1 is int, the first label is str 'animal'; write all labels as names or all",
    ),
    "text null": (third(text=None), ".", "", r"train\.jsonl:3: field 'text' is missing; it must be text"),
    "text empty": (third(text=""), ".", "", r"train\.jsonl:3: field 'text' is empty; remove the row or fill"),
    "text blank": (third(text=" \n"), ".", "", r"train\.jsonl:3: field 'text' is empty; remove the row or"),
    "text no string": (third(text=7), ".", "", r"train\.jsonl:3: field 'text' is int '7'; it must be text"),
    "text half a character": (
        third(text="\ud83d"), ".", "", r"train\.jsonl:3: field 'text' holds half a surrogate pair at char",
    ),
    "label half a character": (
        third(label="\ud83d"), ".", "", r"train\.jsonl:3: field 'label' holds half a surrogate pair at char",
    ),
    "tag half a character": (
        like(WORDS, tags=["O", "B-\ud83d"]), ".", "", r"train\.jsonl:3.*holds half a surrogate pair at char",
    ),
    "label of ones and zeros": (
        like({"text": "one", "label": [0, 1, 0]}), ".", "",
        r"its labels are a 0 or 1 for each class, such as \[0, 1, 0\]; list the classes that a text has",
    ),
    "output nested": (
        like(INSTRUCTION, output={"answer": "red"}), ".", "",
        r"train\.jsonl:3: field 'output' is dict .*answer.*; it must be text",
    ),
    "completion null": (
        like({"prompt": "one", "completion": "red"}, completion=None), ".", "",
        r"train\.jsonl:3: field 'completion' is missing; it must be text",
    ),
    "target no string": (
        like(PAIR, target=["cat"]), ".", "", r"train\.jsonl:3: field 'target' is list .*; it must be text",
    ),
    "tags fewer than words": (
        like(WORDS, tags=["O"]), ".", "", r"train\.jsonl:3: 2 tokens and 1 tags; each word needs one tag",
    ),
    "answer not in its context": (
        like(PASSAGE, answers=["dog"]), ".", "", r"train\.jsonl:3: the answer 'dog' does not occur in the",
    ),
    # -- chats
    "roles out of order": (
        like({"messages": [USER, ASSISTANT]}, messages=[USER, USER, ASSISTANT]), ".", "",
        r"train\.jsonl:3: field 'messages\[1\]\.role' is 'user' after 'user'; a system turn comes first only",
    ),
    "role unknown": (
        like({"messages": [USER, ASSISTANT]}, messages=[{"role": "bot", "content": "one"}]), ".", "",
        r"train\.jsonl:3: field 'messages\[0\]\.role' is 'bot'; roles are system, user, assistant, tool",
    ),
    "chat without an answer": (
        like({"messages": [USER, ASSISTANT]}, messages=[USER]), ".", "",
        r"train\.jsonl:3: field 'messages' has no assistant turn; there is nothing to learn",
    ),
    "no chat template": (
        like({"messages": [USER, ASSISTANT]}), ".", "",
        r"rows with messages need a chat template, and this tokenizer has none: set chat_template in its tok",
    ),
    # -- columns
    "format unknown": (
        like({"question": "one cat", "reply": "a red one"}), ".", "",
        r"no task fits its columns \(question, reply\); rename them to text, label .*--columns prompt=quest",
    ),
    "column missing": (
        like({"text": "one", "klass": "a"}), ".", "--task=text-classification",
        r"the task text-classification needs the columns text, label; found text, klass; rename the columns",
    ),
    "column misspelt": (
        like({"text": "one", "klass": "a"}), ".", "--columns=label=class",
        r"no column 'class', which is to be the label; the train rows have text, klass: do you mean klass\?",
    ),
    "column missing in one split": (
        splits(GOOD, [{"text": "one"}]), ".", "", r"validation\.jsonl:1: field 'label' is missing; it must",
    ),
    "template names no column": (
        like({"text": "one", "output": "red"}), ".", "--template={txt}:",
        r"the template names a column 'txt'; found text, output; do you mean text\?",
    ),
    # -- labels
    "one class only": (
        splits([{**row, "label": "animal"} for row in GOOD]), ".", "",
        r"every train row has the label 'animal'; a classifier needs at least two classes",
    ),
    "one number only": (
        like({"text": "one", "score": 0.5}), ".", "", r"every train row has the score 0\.5; there is nothing",
    ),
    "one tag only": (
        like({"tokens": ["red"], "tags": ["O"]}), ".", "", r"every train word has the tag 'O'; two are",
    ),
    "label not in train": (
        splits(GOOD, [*GOOD[:2], {"text": "one", "label": "comet"}]), ".", "",
        r"validation\.jsonl:3: label 'comet' does not occur in train \(2 classes: animal, colour\); correct",
    ),
    "label not in train, test": (
        splits(GOOD, GOOD, test=[{"text": "one", "label": "comet"}]), ".", "",
        r"test\.jsonl:1: label 'comet' does not occur in train \(2 classes: animal, colour\); correct",
    ),
    "label out of range": (
        splits([{"text": "one", "label": i % 2} for i in range(8)], [{"text": "one", "label": 2}]), ".", "",
        r"validation\.jsonl:1: label 2 does not occur in train \(2 classes: 0, 1\); correct the label, or",
    ),
    "label not in the schema's map": (
        {"rows.parquet": outside_of_the_names}, "rows.parquet", "--eval-fraction=0.3",
        r"rows\.parquet, row 9: label 7 is int, the first label is str '.'; write all labels as names or all",
    ),
    "label null": (third(label=None), ".", "", r"train\.jsonl:3: field 'label' is missing; it must be a"),
    "label a float": (
        splits([{"text": f"one {i}", "label": i / 2} for i in range(8)]), ".", "--task=text-classification",
        r"train\.jsonl:1: label 0\.0 is a float; classes are names or integers \(--task regression predicts",
    ),
    "label a list": (
        third(label=["animal"]), ".", "",
        r"train\.jsonl:3: label is list; it must be a class name or an integer \(--task multi-label",
    ),
    "number not finite": (
        like({"text": "one", "score": 0.5}, score=float("nan")), ".", "",
        r"train\.jsonl:3: score nan cannot be predicted; numbers must be finite",
    ),
    "classes for a regression": (
        splits(GOOD), ".", "--task=regression",
        r"train\.jsonl:1: label is str 'animal'; it must be a number \(--task text-classification",
    ),
    # -- images
    "image broken": (
        {"train/a/1.png": b"no", "train/b/1.png": b"no", "dev/a/1.png": b"no"}, ".", "",
        r"train, row 1: .*a/1\.png is broken, or no image .*replace it or leave it out",
    ),
    "image missing": (
        like({"image": "1.png", "label": "a"}), ".", "",
        r"train\.jsonl:1: the image .*1\.png cannot be read .*correct the path",
    ),
    # -- metrics
    "regression metric on classes": (
        splits(GOOD), ".", "--metric=pearson",
        r"metric 'pearson': the task text-classification gives accuracy, .*; choose one of these",
    ),
    "metric unknown": (
        splits(GOOD), ".", "--metric=f1_marco",
        r"metric 'f1_marco': the task text-classification gives accuracy, f1_macro, .*; choose one of these",
    ),
    "metric not produced: tags mark no spans": (
        like({"tokens": ["the", "cat"], "tags": ["DET", "NOUN"]}), ".", "--metric=span_f1",
        r"metric 'span_f1': the task token-classification gives token_accuracy, .*; choose one of these",
    ),
    "metric not produced: a corpus has no answers": (
        like({"text": "one red cat"}), ".", "--metric=exact_match",
        r"metric 'exact_match': the task causal-lm gives loss, perplexity, token_accuracy; choose one",
    ),
    # -- splits
    "evaluation of 0 rows": (splits(GOOD, b""), ".", "", r"validation\.jsonl: no rows in it; a split"),
    "too few rows to hold some out": (
        {"rows.jsonl": GOOD[:2]}, "rows.jsonl", "",
        r"rows\.jsonl: 2 train rows, too few or too alike to cut validation and test from them; give",
    ),
}  # fmt: skip


def write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def weightless(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return husk(tiny_llama, tmp_path_factory.mktemp("models") / "weightless")


def asked(model: Path, data: str, flags: str = "") -> list[str]:
    return f"--model={model} --data={data} --budget=2k --steps=1000 {flags}".split()


@pytest.mark.parametrize("what", BEFORE_THE_MODEL)
def test_bad_data_are_refused_before_the_model_is_loaded(
    cli: Cli, inside: Path, weightless: Path, what: str
) -> None:
    files, data, flags, said = BEFORE_THE_MODEL[what]
    write(inside, files)
    assert_refused(cli, inside, asked(weightless, data, flags), 3, said)


def with_template(model: Path, folder: Path, template: str) -> Path:
    """The model, whose tokenizer writes chats so."""
    shutil.copytree(model, folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": template}))
    return folder


CHATML = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    "{{ m.role }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
CHAT = {"messages": [USER, ASSISTANT]}
REFUSED = {"messages": [{**USER, "content": "no"}, ASSISTANT]}


@pytest.fixture(scope="module")
def chatty(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tiny_llama, tmp_path_factory.mktemp("models") / "chatty", CHATML)


def test_a_tokenizer_that_does_not_do_is_refused_before_the_model_is_loaded(
    cli: Cli, inside: Path, weightless: Path, chatty: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = tmp_path_factory.mktemp("models")
    mute = husk(weightless, models / "mute")
    save_tokenizer(mute, {"unk_token": "<unk>"}, template=False)
    write(inside, splits(GOOD))
    said = r"has neither a pad token nor an end-of-text token: set `pad_token` in its tokenizer_config\.json"
    assert_refused(cli, inside, asked(mute, "."), 4, said)
    write(inside, splits([REFUSED, CHAT], [CHAT]))
    said = r"train\.jsonl:1: the model's chat template refuses .*'no': not that; change the row, or the templ"
    assert_refused(cli, inside, asked(husk(chatty, models / "husk"), "."), 3, said)
    write(inside, splits(GOOD))
    said = r"max-length 1 leaves no room for text beside .*it must be at least 2"
    assert_refused(cli, inside, asked(weightless, ".", "--max-length=1 --template={text}:"), 2, said)


PROMPT = {"prompt": "the red", "completion": "cat"}
LONG = {"prompt": "the red blue green black white", "completion": "cat"}
LONG_CHAT = {"messages": [{**USER, "content": LONG["prompt"]}, ASSISTANT]}
FAR = {
    "question": "animal",
    "context": "the red blue green black cat",
    "answers": ["red blue green black cat"],
}

# what is wrong: (the files, the model, flags, what the message must say)
WITH_THE_MODEL: dict[str, tuple[Files, str, str, str]] = {
    "no completion is left": (
        splits([LONG] * 3, [PROMPT]), "tiny_llama", "--max-length=4",
        r"no train row is left, 3 dropped \(completion cut away\): raise --max-length or check the data",
    ),
    "no completion to evaluate is left": (
        splits([PROMPT], [LONG]), "tiny_llama", "--max-length=4",
        r"no validation row is left, 1 dropped \(completion cut away\): raise --max-length or check",
    ),
    "no turn of a chat is left": (
        splits([LONG_CHAT], [CHAT]), "chatty", "--max-length=6",
        r"no train row is left, 1 dropped \(no turn of the assistant left\): raise --max-length or check",
    ),
    "every answer is cut off": (
        splits([FAR], [PASSAGE]), "tiny_bert", "--max-length=8 --set schedule.moves=2",
        r"every train answer is cut off at 8 tokens: raise --max-length",
    ),
    "the chat template refuses a row": (
        splits([CHAT, CHAT], [CHAT, REFUSED]), "chatty", "",
        r"validation\.jsonl:2: the model's chat template refuses the conversation that begins 'no': not that",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WITH_THE_MODEL)
def test_data_of_which_nothing_is_left_are_refused(
    cli: Cli, inside: Path, request: pytest.FixtureRequest, what: str
) -> None:
    files, model, flags, said = WITH_THE_MODEL[what]
    write(inside, files)
    assert_refused(cli, inside, asked(request.getfixturevalue(model), ".", flags), 3, said)


def test_a_tokenizer_of_more_tokens_than_the_model_has_embeddings_is_refused(
    cli: Cli, inside: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(tiny_llama, model)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    size = save_tokenizer(model, specials, template=False)
    write(inside, splits(GOOD))
    said = rf"has token ids up to {size - 1}, its embeddings {size - 1} rows: use the tokenizer the model was"
    assert_refused(cli, inside, asked(model, "."), 4, said)


def told(cli: Cli, folder: Path, arguments: list[str]) -> str:
    """What a dry run that ends well says, on one line; the folder is as it was."""
    before = contents(folder)
    outcome = cli("plan", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    assert contents(folder) == before
    return str(outcome.err)


def test_what_can_be_trained_on_all_the_same_is_told(
    cli: Cli, inside: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import BertForSequenceClassification

    model = tmp_path_factory.mktemp("models") / "bert"
    shutil.copytree(tiny_bert, model)
    BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=5).save_pretrained(model)
    lines = "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in GOOD)
    write(inside, {"train.jsonl.gz": gzip.compress(lines.encode()), "dev.jsonl": lines.encode()})
    said = told(cli, inside, asked(model, "."))
    for line in (
        ": JSONL folder, 8 train, 8 validation, 0 test rows",
        "8 of 8 validation rows have an input that is also in train",
        "no test split: the result is checked on validation only",
        "classifier, which the model has in another size than this task needs, is made anew",
        "texts are cut at 64 tokens, the model's limit, not 128",
        "a step takes 8 rows, all of train, not 32",
    ):
        assert line in said, said


def test_without_a_split_to_evaluate_on_the_way_to_one_is_told(
    cli: Cli, inside: Path, tiny_bert: Path
) -> None:
    write(inside, {"rows.jsonl": GOOD})
    said = told(cli, inside, asked(tiny_bert, "rows.jsonl", "--eval-fraction=0.25"))
    assert "of 8 train rows, 2 for validation and 2 for test (eval-fraction 0.25, seed 0)" in said
    said = r"eval-fraction 0\.5: validation and test must be cut from train here, so it must be over 0 and"
    assert_refused(cli, inside, asked(tiny_bert, "rows.jsonl", "--eval-fraction=0.5"), 2, said)


def test_a_study_whose_data_have_gone_bad_stays_as_it_is(
    cli: Cli, inside: Path, tiny_bert: Path, tiny_data: Path
) -> None:
    shutil.copytree(tiny_data, inside / "rows")
    short = "--steps=20 --batch-size=8 --max-length=16 --set=schedule.moves=2 --set=evaluations=1"
    given = f"--model={tiny_bert} --data=rows --budget=2k --name=one --trials=1 {short}"
    assert cli("search", *given.split()).code == 0
    shutil.rmtree(inside / "rows")
    for files, said in (
        ({}, r"rows': no such file or folder; give"),
        ({"rows/train.jsonl": b"the cat\n"}, r"train\.jsonl:1: not a JSON object"),
    ):
        write(inside, files)
        before = contents(inside)
        told = cli("resume", "one", "--trials", 2)
        assert told.code == 3 and re.search(said, told.err) and "Traceback" not in told.err, told.err
        assert cli("resume", "one", "--trials", 2, "--json").json["error"]["exit_code"] == 3
        assert contents(inside) == before
