"""What the README tells people to type works, on tiny models and rows of the shapes that it names."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from seq2seq_world import LETTERS, save_seq2seq

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in README.splitlines()
    if line.startswith("| `") and "`autorank search" in line
]
CHATML = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a data set under each name that the README uses."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("bert", "llama"):
        shutil.copytree(request.getfixturevalue(f"tiny_{name}"), folder / name)
    shutil.copytree(folder / "llama", folder / "chat-llama")
    (folder / "chat-llama" / "chat_template.jinja").write_text(CHATML)
    save_seq2seq(folder / "t5")
    shutil.copytree(request.getfixturevalue("tiny_data"), folder / "intents")
    shutil.copytree(request.getfixturevalue("tiny_completions"), folder / "questions")
    rows = [json.loads(line) for line in (folder / "intents" / "train.jsonl").read_text().splitlines()]
    kinds = sorted({row["label"] for row in rows})

    def words(row: dict[str, Any]) -> list[str]:
        return str(row["text"]).split()

    write_jsonl(
        folder / "topics.jsonl",
        [{"text": r["text"], "label": [r["label"]][: n % 5]} for n, r in enumerate(rows)],
    )
    write_jsonl(folder / "corpus.jsonl", [{"text": row["text"]} for row in rows])
    tagged = [
        {"tokens": words(row), "tags": ["B-N" if len(w) > 3 else "O" for w in words(row)]} for row in rows
    ]
    write_jsonl(folder / "entities.jsonl", tagged)
    turns = [
        {"conversations": [{"from": "human", "value": row["text"]}, {"from": "gpt", "value": row["label"]}]}
        for row in rows
    ]
    (folder / "chats.json").write_text(json.dumps(turns))
    with (folder / "ratings.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "score"])
        writer.writerows([row["text"], kinds.index(row["label"]) + 0.5] for row in rows)
    letters = [" ".join(LETTERS[(at + n) % 8] for n in range(2 + at % 5)) for at in range(60)]
    lines = ["source\ttarget", *(f"{text}\t{text[::-1]}" for text in dict.fromkeys(letters))]
    (folder / "summaries.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def test_every_task_has_a_row() -> None:
    from autorank.tasks import TASKS

    assert {re.match(r"`([\w-]+)`", row[0])[1] for row in ROWS} == set(TASKS)  # type: ignore[index]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].replace("`", "") for row in ROWS])
def test_the_command_of_a_task_works(
    row: list[str], world: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _, metrics, command = row
    monkeypatch.chdir(world)
    program, *arguments = shlex.split(command.strip("`"))
    assert program == "autorank"
    more = [
        "--trials",
        "1",
        "--steps",
        "20",
        "--batch-size",
        "4",
        "--studies-dir",
        str(tmp_path),
        "--name",
        "s",
    ]
    found = cli(*arguments, *more, "--json")
    assert found.code == 0, found.err
    report = found.json
    measured = set(report["best"]["metrics"])
    if "the same" not in metrics:
        named = set(re.findall(r"\b[a-z]+[a-z0-9]*(?:_[a-z0-9]+)*\b", metrics))
        assert measured <= named and report["metric"] == metrics.split(",")[0].split(" ")[0]
    exported = cli("export", "s", "--studies-dir", tmp_path, "--out", tmp_path / "adapter")
    assert exported.code == 0, exported.err
    facts = json.loads((tmp_path / "adapter" / "autorank_export.json").read_text())
    assert task.startswith(f"`{facts['task']}`")
    scored = cli(
        "evaluate", tmp_path / "adapter", "--data", arguments[arguments.index("--data") + 1], "--json"
    )
    assert scored.code == 0 and measured <= set(scored.json["scores"]), scored.err
