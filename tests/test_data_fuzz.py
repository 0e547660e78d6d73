"""Whatever a file holds, reading, choosing the task and making examples end well or in autorank's errors."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autorank.columns import ROLES
from autorank.data import read_data
from autorank.errors import AutorankError, DataError
from autorank.tasks import Encoded, Task, WindowTask, choose_task, encode_rows, for_model, for_rows

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress
}  # fmt: skip
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]

CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
]
SHARED = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
VALID: dict[str, list[dict[str, Any]]] = {
    "classes": [{"text": f"text {index}", "label": "xy"[index % 2]} for index in range(12)],
    "numbers": [{"text": f"text {index}", "label": index % 2} for index in range(12)],
    "pairs": [{"text_a": f"a {index}", "text_b": "b", "label": index % 2} for index in range(12)],
    "prompts": [{"prompt": f"p {index}", "completion": "c"} for index in range(12)],
    "corpus": [{"text": f"text {index}", "kind": "xy"[index % 2]} for index in range(12)],
    "chat": [
        {"messages": [*CHAT[:1], {"role": "user", "content": f"{index}"}, CHAT[2]]} for index in range(12)
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": f"{n}"}, SHARED[1]]} for n in range(12)],
    "alpaca": [{"instruction": f"do {index}", "input": "", "output": "done"} for index in range(12)],
    "tags": [{"tokens": ["a", f"{index}"], "tags": ["O", "X"]} for index in range(12)],
    "scores": [{"text": f"text {index}", "score": index / 7} for index in range(12)],
    "lists": [{"text": f"text {index}", "label": ["x", "y"][: index % 3]} for index in range(12)],
    "sources": [{"source": f"s {index}", "target": "t"} for index in range(12)],
    "answers": [
        {"question": f"q {index}", "context": "a b c", "answers": {"text": ["b"], "answer_start": [2]}}
        for index in range(12)
    ],
}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("\ud800")
    | st.just("")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*ROLES, "conversations", "role", "content", "from", "value"]) | st.sampled_from(
    ["a\nb", "", "paragraphs", "is_impossible"]
)


def ends_well(
    path: Path, columns: dict[str, str] | None = None, tokenizer: Any = None, length: int = 24
) -> bool:
    """Whether the file is read, has a task and gives examples; any error but autorank's own fails the test.

    Without a tokenizer no examples are made.
    """
    try:
        data = read_data(str(path), eval_fraction=0.2, seed=0, columns=columns)
        task, line = choose_task("auto", data)
        if tokenizer is not None:
            task = for_model(task, 0)
            for split in data.splits:
                encoded = encode_rows(task, data, split, tokenizer, length)
                task = for_rows(task, encoded)
                made_of(task, encoded, tokenizer, length)
    except AutorankError as error:
        assert str(error)
        assert "\n" not in str(error)
        return False
    assert task.name in line
    assert all(data.splits[split] for split in ("train", "validation"))
    return True


def made_of(task: Task, encoded: Encoded, tokenizer: Any, length: int) -> None:
    """What holds of all examples, whatever they were made of."""
    examples = len(encoded.examples)
    rows = len(task.windows(encoded.examples)) if isinstance(task, WindowTask) else examples
    assert rows == encoded.kept >= encoded.truncated
    for one in encoded.examples:
        assert 0 < one.length <= length
        batch = task.collate([one], 0)
        assert batch.samples == 1 and task.describe(one, tokenizer)
        assert task.terms(batch) or task.name == "question-answering"


CHATML = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, template=False)
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60)
@given(content=st.binary(max_size=80), packing=st.sampled_from(list(PACKERS)), pack=st.booleans())
def test_random_bytes(folder: Path, suffix: str, content: bytes, packing: str, pack: bool) -> None:
    path = folder / f"bytes{suffix}{packing}"
    path.write_bytes(PACKERS[packing](content) if pack else content)
    ends_well(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60)
@given(text=st.text(st.sampled_from("{}[]\",:\t\n\r\\'0e-. atextlabel\u2028\x00é"), max_size=60))
@example(text="\r")
@example(text='text\tlabel\n"')
def test_random_lines(folder: Path, suffix: str, text: str) -> None:
    path = folder / f"lines{suffix}"
    path.write_bytes(text.encode())
    ends_well(path)


@settings(max_examples=200)
@given(value=VALUES | st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=12), array=st.booleans())
def test_random_json(folder: Path, value: Any, array: bool) -> None:
    path = folder / "random.json"
    lines = value if isinstance(value, list) and not array else [value]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    ends_well(path)


@settings(max_examples=100)
@given(
    head=st.lists(NAMES, min_size=1, max_size=4),
    rows=st.lists(
        st.lists(st.text(max_size=4) | st.sampled_from(["1", "0.5", "a"]), max_size=4), max_size=12
    ),
    tabs=st.booleans(),
)
def test_random_tables(folder: Path, head: list[str], rows: list[list[str]], tabs: bool) -> None:
    path = folder / ("table.tsv" if tabs else "table.csv")
    lines = [("\t" if tabs else ",").join(fields) for fields in [head, *rows]]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    ends_well(path)


@pytest.mark.parametrize("kind", VALID)
def test_the_rows_that_are_mutated_below_are_sound(folder: Path, tokenizer: Any, kind: str) -> None:
    path = folder / "sound.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in VALID[kind]), encoding="utf-8")
    assert ends_well(path, tokenizer=tokenizer)


def mutate(rows: list[dict[str, Any]], draw: st.DataObject) -> None:
    """Change one thing somewhere in the rows: drop it, add to it, or put any value in its place."""
    inside: Any = draw.draw(st.sampled_from(rows), label="row")
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = draw.draw(st.sampled_from(keys), label="key") if keys else None
        deeper = key is not None and isinstance(inside[key], (dict, list)) and draw.draw(st.booleans())
        if not deeper:
            break
        inside = inside[key]
    how = draw.draw(st.sampled_from(["drop", "put", "add"]), label="how")
    if how == "drop" and key is not None:
        del inside[key]
    elif how == "put" and key is not None:
        inside[key] = draw.draw(VALUES)
    elif isinstance(inside, dict):
        inside[draw.draw(NAMES)] = draw.draw(VALUES)
    else:
        inside.append(copy.deepcopy(draw.draw(st.sampled_from([*CHAT, *SHARED]) | VALUES)))


@pytest.mark.parametrize("kind", VALID)
@settings(max_examples=60)
@given(draw=st.data())
def test_mutated_rows(folder: Path, tokenizer: Any, kind: str, draw: st.DataObject) -> None:
    rows = copy.deepcopy(VALID[kind])
    for _ in range(draw.draw(st.integers(1, 3))):
        mutate(rows, draw)
    path = folder / "mutated.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    roles = st.dictionaries(st.sampled_from(ROLES), st.sampled_from([*rows[0], "text", "label"]), max_size=2)
    columns = draw.draw(roles.filter(lambda said: len(set(said.values())) == len(said)), label="columns")
    ends_well(path, columns or None, tokenizer, draw.draw(st.sampled_from([4, 8, 24]), label="length"))


ARTICLES = [
    {
        "title": "t",
        "paragraphs": [
            {
                "context": f"a b {index}",
                "qas": [{"question": "a?", "id": "", "answers": [{"text": "b", "answer_start": 2}]}],
            }
        ],
    }
    for index in range(12)
]


@settings(max_examples=120)
@given(draw=st.data())
def test_mutated_articles(folder: Path, draw: st.DataObject) -> None:
    whole = [{"data": copy.deepcopy(ARTICLES), "version": "1.1"}]
    path = folder / "squad.json"
    path.write_text(json.dumps(whole[0]), encoding="utf-8")
    assert ends_well(path)
    for _ in range(draw.draw(st.integers(1, 3))):
        mutate(whole, draw)
    path.write_text(json.dumps(whole[0]), encoding="utf-8")
    ends_well(path)


@settings(max_examples=30)
@given(value=VALUES, where=st.integers(0, 11))
def test_a_bad_text_is_told_with_its_line(folder: Path, value: Any, where: int) -> None:
    rows = copy.deepcopy(VALID["classes"])
    rows[where]["text"] = value
    path = folder / "bad.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    if isinstance(value, str) and value.strip() and value.isprintable():
        assert ends_well(path)
    elif not isinstance(value, str):
        with pytest.raises(DataError, match=rf"bad\.jsonl:{where + 1}: field 'text' "):
            choose_task("auto", read_data(str(path), eval_fraction=0.2, seed=0))
