"""Exports in use: the scores are those of the search, the answers those of the model, row by row."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from refusals import assert_refused
from safetensors.torch import load_file, save_file

from autorank.card import FACTS
from autorank.config import load_config
from autorank.errors import CommandError, DataError, FileError, ModelError, StudyError
from autorank.export import export
from autorank.predictor import evaluate_export, predict_export
from autorank.search import search


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes an export: model and data by the names of their fixtures."""
    made: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def make(model: str, data: str, **more: Any) -> tuple[Path, dict[str, Any]]:
        key = data, repr(more)
        if key not in made:
            folder = tmp_path_factory.mktemp("use")
            places = {name: str(request.getfixturevalue(name)) for name in (model, data)}
            settings = {
                "model": places[model],
                "data": places[data],
                "budget": "6k",
                "trials": 1,
                "steps": 30,
            }
            settings |= {"batch_size": 8, "name": "one", "studies_dir": str(folder / "studies"), **more}
            report = search(load_config(None, settings)).report
            made[key] = export("one", folder / "adapter", studies_dir=folder / "studies"), report
        return made[key]

    return make


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_scores_are_those_of_the_search(exported: Any, tiny_data: Path) -> None:
    folder, report = exported("tiny_bert", "tiny_data")
    for split, scores in (("validation", report["best"]["metrics"]), ("test", report["result"]["test"])):
        found = evaluate_export(folder, str(tiny_data), split=split)
        assert found["scores"] == pytest.approx(scores, abs=1e-5) and found["metric"] == "accuracy"
        assert (found["rows"], found["examples"], found["dropped"]) == (36, 36, {})
        share, error = found["scores"]["accuracy"], found["standard_errors"]["accuracy"]
        assert error == pytest.approx((share * (1 - share) / 36) ** 0.5, rel=0.4)
    assert (
        evaluate_export(folder, str(tiny_data))["scores"] == found["scores"]
    )  # test, where no split is named


def test_the_rows_that_it_was_trained_on_are_told(exported: Any, tiny_data: Path, tmp_path: Path) -> None:
    def told(folder: Path, data: Path, **more: Any) -> tuple[int, str]:
        said: list[str] = []
        seen: int = evaluate_export(folder, str(data), say=said.append, **more)["seen"]
        assert sum("trained on" in line for line in said) == bool(seen)
        return seen, said[-1]

    folder, _ = exported("tiny_bert", "tiny_data")
    assert told(folder, tiny_data)[0] == 0 == told(folder, tiny_data, split="test")[0]
    assert told(folder, tiny_data / "test.jsonl")[0] == 0
    assert told(folder, tiny_data / "train.jsonl")[0] == 96
    alone = shutil.copyfile(tiny_data / "train.jsonl", tmp_path / "train.jsonl")
    assert told(folder, alone)[0] == 0  # whose it is cannot be told without the others
    seen, line = told(folder, tiny_data, split="validation")
    assert seen == 36 and line == (
        "36 of these 36 rows are those that the adapter was trained on or chosen by, so the scores say "
        f"little of other rows: its score on the study's test rows is in {folder / 'README.md'}"
    )
    # Columns that are read in another way are the same rows.
    assert told(folder, tiny_data, split="train", columns={"text": "text"})[0] == 96


@pytest.fixture(scope="module")
def one_file(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows_of(tiny_data / "train.jsonl"))


def test_a_file_that_the_search_split_is_known_again(exported: Any, one_file: Path, tmp_path: Path) -> None:
    folder, _ = exported("tiny_bert", "one_file", eval_fraction=0.2, seed=5)
    copied, other = tmp_path / "copied.jsonl", tmp_path / "other.jsonl"
    shutil.copyfile(one_file, copied)
    count = len(rows_of(one_file))
    said: list[str] = []
    found = evaluate_export(folder, str(copied), say=said.append)
    assert found["rows"] == count and found["seen"] == count - round(0.2 * count)
    assert f"{found['seen']} of these {count} rows are those" in said[-1]
    write_jsonl(other, rows_of(one_file)[1:])
    assert evaluate_export(folder, str(other))["seen"] == 0
    # Of an older export it is told where the split was the default one, and nothing else changes.
    facts = json.loads((folder / FACTS).read_text())
    old = shutil.copytree(folder, tmp_path / "old")
    for key in ("references", "verdict"):
        del facts[key]
    facts["data"] = {key: facts["data"][key] for key in ("source", "sha256")}
    (old / FACTS).write_text(json.dumps(facts))
    again = evaluate_export(old, str(copied))
    assert again == {**found, "data": str(copied), "seen": 0}


def test_rows_that_were_scored_before_are_not_tokenised_again(
    exported: Any, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    monkeypatch.setattr("autorank.token_cache.LEAST_BYTES", 0)
    monkeypatch.setattr("autorank.token_cache.TokenCache.folder", tmp_path)
    found = evaluate_export(folder, str(tiny_data))
    monkeypatch.setattr("autorank.tasks.TextClassification.encode", None)
    assert evaluate_export(folder, str(tiny_data)) == found
    with pytest.raises(TypeError):
        evaluate_export(folder, str(tiny_data), split="train")


def test_rows_without_answers_are_answered_in_their_order(
    exported: Any, tiny_data: Path, tmp_path: Path
) -> None:
    folder, report = exported("tiny_bert", "tiny_data")
    given = rows_of(tiny_data / "test.jsonl")
    data = write_jsonl(
        tmp_path / "ask.jsonl", [{"id": n, "text": row["text"]} for n, row in enumerate(given)]
    )
    found = predict_export(folder, str(data), tmp_path / "out.jsonl", batch_size=5)
    assert (found["rows"], found["answered"]) == (36, 36)
    answers = rows_of(tmp_path / "out.jsonl")
    assert [set(row) for row in answers] == [{"id", "text", "prediction"}] * 36
    assert [row["id"] for row in answers] == list(range(36))
    right = sum(row["prediction"] == one["label"] for row, one in zip(answers, given, strict=True))
    assert right / 36 == pytest.approx(report["result"]["test"]["accuracy"])


def test_columns_may_have_other_names(exported: Any, tiny_data: Path, tmp_path: Path) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    rows = [{"q": row["text"], "klass": row["label"]} for row in rows_of(tiny_data / "test.jsonl")]
    data, columns = write_jsonl(tmp_path / "other.jsonl", rows), {"text": "q", "label": "klass"}
    same = evaluate_export(folder, str(tiny_data))["scores"]
    assert evaluate_export(folder, str(data), columns=columns)["scores"] == same
    notes: list[str] = []
    predict_export(folder, str(data), tmp_path / "out.jsonl", columns=columns, say=notes.append)
    assert notes[1:] == ["columns: text is read from q, label is read from klass"]
    assert [set(row) for row in rows_of(tmp_path / "out.jsonl")] == [{"q", "klass", "prediction"}] * 36


def test_a_row_keeps_the_names_that_its_file_has(exported: Any, tiny_data: Path, tmp_path: Path) -> None:
    """Also where the study read another column."""
    folder, _ = exported("tiny_bert", "tiny_data")
    shutil.copytree(folder, tmp_path / "told")
    facts = json.loads((tmp_path / "told" / "autorank_export.json").read_text())
    path = tmp_path / "told" / "autorank_export.json"
    path.write_text(json.dumps({**facts, "columns": {"text": "utterance"}}))
    for name in ("text", "utterance"):
        data = write_jsonl(tmp_path / f"{name}.jsonl", [{name: "the cat", "id": 1}])
        predict_export(tmp_path / "told", str(data), tmp_path / f"{name}-out.jsonl")
        (row,) = rows_of(tmp_path / f"{name}-out.jsonl")
        assert set(row) == {name, "id", "prediction"}


def test_rows_of_one_class_can_be_scored_and_of_an_unknown_one_not(
    exported: Any, tiny_data: Path, tmp_path: Path
) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    rows = rows_of(tiny_data / "test.jsonl")
    one = [row for row in rows if row["label"] == rows[0]["label"]]
    assert evaluate_export(folder, str(write_jsonl(tmp_path / "one.jsonl", one)))["rows"] == len(one)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*rows[:2], {"text": "a", "label": "comet"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:3: label 'comet'"):
        evaluate_export(folder, str(bad))
    assert predict_export(folder, str(bad), tmp_path / "out.jsonl")["answered"] == 3
    assert rows_of(tmp_path / "out.jsonl")[2]["label"] == "comet"


def test_a_folder_may_hold_the_rows_to_use_alone(exported: Any, tiny_data: Path, tmp_path: Path) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    (tmp_path / "rows").mkdir()
    shutil.copy(tiny_data / "test.jsonl", tmp_path / "rows")
    notes: list[str] = []
    found = evaluate_export(folder, str(tmp_path / "rows"), say=notes.append)
    again = evaluate_export(folder, str(tiny_data), say=notes.append)
    assert found["scores"] == again["scores"]
    assert [note.split(": ")[1] for note in notes] == [
        "JSONL folder, 36 rows",
        "JSONL folder, test split, 36 rows",
    ]
    assert predict_export(folder, str(tmp_path / "rows"), tmp_path / "out.jsonl")["answered"] == 36


def test_what_the_rows_lose_is_told(exported: Any, tmp_path: Path) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"q": "a cat", "text": "mine", "prediction": "mine"}])
    notes: list[str] = []
    predict_export(folder, str(data), tmp_path / "out.jsonl", columns={"text": "q"}, say=notes.append)
    assert notes == [
        f"data {data}: JSONL file, 1 row",
        "columns: text is read from q",
        "the data's own column text is left out, for text is read from q",
        "the rows' own column prediction is left out: what the adapter says takes its place",
    ]


def test_half_a_character_in_a_row_comes_back_as_it_was(exported: Any, tmp_path: Path) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    row = {"text": "a caf\u00e9", "note": "half \ud83d", "own\udc00": 1}
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    predict_export(folder, str(data), tmp_path / "out.jsonl")
    (answered,) = rows_of(tmp_path / "out.jsonl")
    assert answered.items() >= row.items()
    assert "caf\u00e9" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_prompts_are_scored_and_completed(exported: Any, tiny_completions: Path, tmp_path: Path) -> None:
    folder, report = exported("tiny_llama", "tiny_completions")
    found = evaluate_export(folder, str(tiny_completions))
    written = {"exact_match", "rouge_l", "chrf"}
    assert set(found["scores"]) == {"loss", "perplexity", "token_accuracy"} | written
    tokens = {name: value for name, value in found["scores"].items() if name not in written}
    assert tokens == pytest.approx(report["result"]["test"], abs=1e-5)
    quick = evaluate_export(folder, str(tiny_completions), writing=False)
    assert quick["scores"] == tokens
    given = rows_of(tiny_completions / "test.jsonl")
    data = write_jsonl(tmp_path / "ask.jsonl", [{"prompt": row["prompt"]} for row in given])
    predict_export(folder, str(data), tmp_path / "out.jsonl", max_new_tokens=2)
    answers = [row["prediction"] for row in rows_of(tmp_path / "out.jsonl")]
    right = sum(a.strip() == row["completion"].strip() for a, row in zip(answers, given, strict=True))
    assert right / 36 == pytest.approx(found["scores"]["exact_match"])


def test_a_row_without_a_token_is_answered_by_nothing(
    exported: Any, tiny_completions: Path, tmp_path: Path
) -> None:
    folder, _ = exported("tiny_llama", "tiny_completions")
    rows = [{"prompt": "the red"}, {"prompt": "the " * 300}, {"prompt": "a big"}]
    found = predict_export(folder, str(write_jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "out.jsonl")
    assert (found["rows"], found["answered"]) == (3, 2)
    assert [row["prediction"] is None for row in rows_of(tmp_path / "out.jsonl")] == [False, True, False]


def test_a_prompt_is_read_as_far_as_the_model_can(
    exported: Any, tiny_completions: Path, tmp_path: Path
) -> None:
    """Training cuts at 12 tokens, where the answer must have room, and the model takes 64."""
    folder, _ = exported("tiny_llama", "tiny_completions", max_length=12, steps=12)
    rows = [{"prompt": "the " * count} for count in (11, 12, 40, 63, 64)]
    found = predict_export(folder, str(write_jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "out.jsonl")
    assert (found["rows"], found["answered"]) == (5, 4)
    assert rows_of(tmp_path / "out.jsonl")[-1]["prediction"] is None


@pytest.fixture(scope="module")
def chatty_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} </s> {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": t} for at, t in enumerate(turns)]}


@pytest.fixture(scope="module")
def tiny_chats(tiny_completions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny-chats"
    for split in ("train", "validation"):
        rows = rows_of(tiny_completions / f"{split}.jsonl")
        write_jsonl(folder / f"{split}.jsonl", [chat(row["prompt"], row["completion"]) for row in rows])
    return folder


def test_a_chat_whose_question_is_cut_off_is_answered_by_nothing(
    exported: Any, chatty_llama: Path, tiny_chats: Path, tmp_path: Path
) -> None:
    folder, _ = exported("chatty_llama", "tiny_chats")
    long = "the cat " * 40
    rows = [chat("the red", "cat", "a big"), chat("the red", "cat", long), chat(long), chat("a big")]
    found = predict_export(folder, str(write_jsonl(tmp_path / "a.jsonl", rows)), tmp_path / "out.jsonl")
    assert (found["rows"], found["answered"]) == (4, 2)
    answers = [row["prediction"] for row in rows_of(tmp_path / "out.jsonl")]
    # Of the second row the first question would be left, which has its answer.
    assert [answer is None for answer in answers] == [False, True, True, False]


# Run in a fresh process without autorank: all the code of a card, asked other things than it asks.
ASKER = """
import contextlib, io, json, os, re, sys
sys.modules["autorank"] = None
said = []
for folder, name, value in json.loads(sys.argv[1]):
    os.chdir(folder)
    code = "\\n".join(re.findall("```python\\n(.*?)```", open("README.md").read(), re.DOTALL))
    code, count = re.subn(f"(?m)^{name} = .*$", lambda _: f"{name} = {value!r}", code)
    assert count == 1, code
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    said.append(out.getvalue())
print(json.dumps(said))
"""


def test_the_code_of_the_card_says_what_predict_says(
    exported: Any, tiny_completions: Path, tmp_path: Path
) -> None:
    long = "the red cat " * 40
    asked: list[tuple[str, str, dict[str, Any], str, Any]] = []
    for text in ("the red", long):
        asked.append(("tiny_bert", "tiny_data", {"text": text}, "text", text))
    kinds = {row["completion"]: row["prompt"] for row in rows_of(tiny_completions / "test.jsonl")}
    for prompt in kinds.values():
        asked.append(("tiny_llama", "tiny_completions", {"prompt": prompt}, "prompt", prompt))
        turns = chat(prompt)["messages"]
        asked.append(("chatty_llama", "tiny_chats", {"messages": turns}, "turns", turns))
    rows_with_template = {"question": "the red", "hint": 7}
    asked.append(("tiny_llama", "tiny_questions", rows_with_template, "row", rows_with_template))
    writes = {"steps": 250, "space": {"learning_rate": 5e-3}}  # enough to write more than an end
    more: dict[str, Any] = {"tiny_completions": writes, "tiny_chats": writes}
    more["tiny_questions"] = {**writes, "template": "{question} is {hint} {{so}}"}
    tasks, wanted = [], []
    for model, data, row, name, value in asked:
        folder, _ = exported(model, data, **more.get(data, {}))
        tasks.append([str(folder), name, value])
        out = tmp_path / f"{len(wanted)}.jsonl"
        predict_export(folder, str(write_jsonl(tmp_path / "ask.jsonl", [row])), out)
        wanted.append(rows_of(out)[0]["prediction"])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ASKER, json.dumps(tasks)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [f"{answer}\n" for answer in wanted]
    written = [answer for answer, (_, name, _) in zip(wanted, tasks, strict=True) if name != "text"]
    assert len(set(written)) > 1 and all(written), written


@pytest.fixture(scope="module")
def tiny_questions(tiny_completions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for a template, of which a number is a column."""
    folder = tmp_path_factory.mktemp("data") / "tiny-questions"
    for split in ("train", "validation"):
        rows = rows_of(tiny_completions / f"{split}.jsonl")
        given = [{"question": r["prompt"], "hint": n, "output": r["completion"]} for n, r in enumerate(rows)]
        write_jsonl(folder / f"{split}.jsonl", given)
    return folder


def test_plain_texts_have_no_answer(exported: Any, tiny_completions: Path, tmp_path: Path) -> None:
    folder, _ = exported("tiny_llama", "tiny_completions")
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": "the red cat"}])
    facts = json.loads((folder / FACTS).read_text())
    assert (facts["columns"], facts["template"], facts["packing"]) == (None, None, False)
    assert set(evaluate_export(folder, str(data))["scores"]) == {"loss", "perplexity", "token_accuracy"}
    with pytest.raises(CommandError, match="holds plain texts, to which there is no answer"):
        predict_export(folder, str(data), tmp_path / "out.jsonl")


def test_what_cannot_be_used_is_refused_and_writes_nothing(
    exported: Any, tiny_data: Path, tmp_path: Path
) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    (tmp_path / "old.jsonl").write_text("mine")
    out = tmp_path / "out.jsonl"
    for error, message, call in (
        (FileError, "is no export of autorank .it holds no adapter", lambda: evaluate_export(tmp_path, "x")),
        (FileError, "there is no such folder", lambda: evaluate_export(tmp_path / "no", "x")),
        (FileError, "it is a file", lambda: evaluate_export(tmp_path / "old.jsonl", "x")),
        (FileError, "old.jsonl exists", lambda: predict_export(folder, "x", tmp_path / "old.jsonl")),
        (DataError, "no such file", lambda: predict_export(folder, "./none.jsonl", out)),
        (CommandError, "batch-size is 0", lambda: evaluate_export(folder, str(tiny_data), batch_size=0)),
        (CommandError, "split 'dev'", lambda: evaluate_export(folder, str(tiny_data), split="dev")),
        (CommandError, "at least 1", lambda: predict_export(folder, "x", out, max_new_tokens=0)),
        (ModelError, "device", lambda: predict_export(folder, str(tiny_data), out, device="nowhere")),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not out.exists() and (tmp_path / "old.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("rows.jsonl", "", "no rows in it"),
        ("rows.txt", "the cat", "the extension '.txt' is not known"),
        (
            "rows.jsonl",
            '{"text": "the cat", "label": "animal"}\n{"text"\n',
            "rows.jsonl:2: not a JSON object",
        ),
        ("rows.jsonl", '{"text": 1, "label": "animal"}\n', "rows.jsonl:1: field 'text' is int '1'"),
        ("rows.jsonl", '{"txt": "the cat", "label": "animal"}\n', "the adapter reads text"),
    ],
)
def test_bad_rows_are_one_error_on_the_command_line(
    exported: Any, tmp_path: Path, cli: Any, name: str, content: str | None, said: str
) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    data = tmp_path / name
    if content is not None:
        data.write_text(content)
    before = sorted(tmp_path.iterdir())
    for command in (("evaluate", folder), ("predict", folder, "--out", tmp_path / "out.jsonl")):
        told = cli(*command, "--data", data)
        assert told.code == 3 and said in told.err.splitlines()[-1] and told.out == "", told
        assert told.err.startswith("error: ") and "Traceback" not in told.err
        error = cli(*command, "--data", data, "--json").json["error"]
        assert (error["type"], error["exit_code"]) == ("DataError", 3)
        assert f"error: {error['message']}" == told.err.strip()
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_that_says_other_things_is_refused(exported: Any, tiny_data: Path, tmp_path: Path) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    facts = json.loads((folder / FACTS).read_text())
    copy = tmp_path / "adapter"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())

    def changed(**more: Any) -> None:
        (copy / FACTS).write_text(json.dumps({**facts, **more}))

    changed(base_model={**facts["base_model"], "revision": "sha256:0"})
    with pytest.raises(ModelError, match="is not the base model"):
        evaluate_export(copy, str(tiny_data))
    changed(trust_remote_code=True)
    with pytest.raises(ModelError, match="--trust-remote-code"):
        evaluate_export(copy, str(tiny_data))
    one = next(iter(facts["ranks"]))
    for what, other in {
        "ranks": [1],
        f"ranks.{one}": {"ranks": {**facts["ranks"], one: "2"}},
        "scaling": float("nan"),
        "base_model": 5,
        "id2label": {"1": "a", "0": "b"},
        "columns": "text=q",
        "template": 5,
        "batch_size": 0,
        "max_length": "8",
        "modules_to_save": "classifier",
        "data.seed": {"data": {**facts["data"], "seed": "0"}},
        "usage.columns": {"usage": {"columns": "text"}},
    }.items():
        changed(**(other if isinstance(other, dict) and what.partition(".")[0] in other else {what: other}))
        with pytest.raises(FileError, match=f"was changed: {re.escape(what)} cannot be used"):
            evaluate_export(copy, str(tiny_data))
    changed(ranks={**facts["ranks"], one: 10**11})
    with pytest.raises(FileError, match=f"rank 100,000,000,000 of {re.escape(one)} is above its full rank"):
        evaluate_export(copy, str(tiny_data))
    for bad in ("../x", "", "encoder"):
        changed(modules_to_save=[bad])
        with pytest.raises(FileError, match=f"was changed: {bad!r} in modules_to_save cannot"):
            evaluate_export(copy, str(tiny_data))
    changed(id2label={"0": "animal", "1": "food", "2": "food"})
    with pytest.raises(FileError, match=r"was changed: id2label cannot be used .*two of its classes"):
        evaluate_export(copy, str(tiny_data))
    for none in (None, {}):
        changed(id2label=none)
        with pytest.raises(FileError, match="does not tell the classes of its task text-classification"):
            evaluate_export(copy, str(tiny_data))
    changed(task="juggling")
    with pytest.raises(FileError, match="update autorank"):
        evaluate_export(copy, str(tiny_data))
    (copy / FACTS).write_text("{}")
    with pytest.raises(FileError, match="does not tell base_model, task"):
        evaluate_export(copy, str(tiny_data))
    (copy / FACTS).write_text("[" * 100_000)
    with pytest.raises(StudyError, match="is damaged"):
        evaluate_export(copy, str(tiny_data))
    changed()
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors[min(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(StudyError, match=f"not finite, in {re.escape(min(tensors))}"):
        predict_export(copy, str(tiny_data), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_adapter_that_does_not_fit_is_one_error_on_the_command_line(
    exported: Any, tiny_data: Path, tmp_path: Path, cli: Any
) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    facts = json.loads((folder / FACTS).read_text())
    one = next(name for name, rank in facts["ranks"].items() if rank)
    elsewhere = {**facts["base_model"], "revision": "sha256:0"}
    for changes, code, said in (
        (
            {"ranks": {**facts["ranks"], one: facts["ranks"][one] + 1}},
            5,
            r"adapter was changed: .* do not fit its plan: .*lora_A\.weight and 1 more; rest",
        ),
        ({"base_model": elsewhere}, 4, r"is not the base model that .* was trained on: .* restore that one"),
        ({"base_model": {**elsewhere, "source": "/no/base"}}, 4, r"there is no folder /no/base"),
        (None, 6, r"is no export of autorank \(it holds no autorank_export\.json\): give what `autorank exp"),
    ):
        copy = tmp_path / "adapter"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        if changes is None:  # as another tool's
            (copy / FACTS).unlink()
        else:
            (copy / FACTS).write_text(json.dumps({**facts, **changes}))
        for command in (["evaluate"], ["predict", "--out", str(tmp_path / "out.jsonl")]):
            assert_refused(
                cli, tmp_path, [str(copy), f"--data={tiny_data}", *command[1:]], code, said, command[:1]
            )


def test_the_commands_print_what_people_and_programs_read(
    exported: Any, tiny_data: Path, tmp_path: Path, cli: Any
) -> None:
    folder, report = exported("tiny_bert", "tiny_data")
    shown = cli("evaluate", folder, "--data", tiny_data)
    assert shown.code == 0 and "36 examples scored" in shown.out
    first = next(line for line in shown.out.splitlines() if "accuracy" in line)
    assert f"{report['result']['test']['accuracy']:.4f}" in first
    told = cli("evaluate", folder, "--data", tiny_data, "--split", "validation", "--json").json
    assert told["scores"]["accuracy"] == pytest.approx(report["best"]["value"])
    out = tmp_path / "answers.jsonl"
    said = cli("predict", folder, "--data", tiny_data / "test.jsonl", "--out", out)
    assert said.code == 0 and f"36 rows answered in {out}" in said.out.replace("\n", "")
    again = cli("predict", folder, "--data", tiny_data / "test.jsonl", "--out", out, "--json")
    assert again.code == 6 and "exists" in again.json["error"]["message"]
    assert cli("predict", folder, "--data", tiny_data, "--out", "x", "--columns", "text").code == 2


def test_rows_without_the_column_are_told_what_is_read(
    exported: Any, tiny_data: Path, tmp_path: Path
) -> None:
    folder, _ = exported("tiny_bert", "tiny_data")
    data = str(write_jsonl(tmp_path / "ask.jsonl", [{"opinion": "the red cat", "id": 1}]))
    for use in (lambda: evaluate_export(folder, data), lambda: predict_export(folder, data, tmp_path / "o")):
        with pytest.raises(
            DataError,
            match=r"the adapter reads text \(as in training\) or text_a, text_b; found .*opinion.*: say",
        ):
            use()
    mapped = {"text": "opinion"}
    with pytest.raises(
        DataError, match=r"there is no column label, only opinion, id; .*text=opinion,label=COL"
    ):
        evaluate_export(folder, data, columns=mapped)
    assert predict_export(folder, data, tmp_path / "o", columns=mapped)["answered"] == 1
