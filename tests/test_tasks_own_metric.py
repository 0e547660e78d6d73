"""Metrics of the user's own: what they are given, what is refused, and that none runs unasked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autorank.artifacts import read_json, write_json
from autorank.config import load_config
from autorank.data import build_data
from autorank.display import Display
from autorank.errors import CommandError, DataError
from autorank.evaluate import evaluate, paired_difference, standard_errors
from autorank.preflight import prepare
from autorank.tasks import Batch, Example, HeadTask, Task, WindowTask, choose_task
from autorank.tasks.own_metric import own_metric
from autorank.tasks.text_metrics import text_metric
from tests.conftest import Outcome

Cli = Callable[..., Outcome]
SOURCE = '''
"""Metrics of a user."""
from math import sqrt
from pathlib import Path

Path("ran.txt").write_text("this module was imported")
limit = 3
seen = []

def equal(prediction, reference):
    seen.append((prediction, reference))
    return prediction == reference

def distance(prediction, reference):
    return abs(prediction - reference)

distance.direction = "minimize"

def sideways(prediction, reference):
    return 1.0

sideways.direction = "left"

def alone(prediction):
    return 1.0

def breaks(prediction, reference):
    return 1 / 0

def words(prediction, reference):
    return "much"

def nothing(prediction, reference):
    return float("nan")

def endless(prediction, reference):
    return 10**400

def leaves(prediction, reference):
    raise SystemExit(0)

def talks(prediction, reference):
    print("I was asked")
    return 1.0

told = []

def found(prediction, references):
    told.append((prediction, references))
    return prediction in references or prediction == "" and not references

class Kinds:
    @staticmethod
    def same(prediction, reference):
        return float(prediction[0] == reference[0])
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of metrics in it, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_a_test.py").write_text(SOURCE)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    sys.modules.pop("mine_of_a_test", None)


def test_a_function_of_the_working_directory_is_a_metric(here: Path) -> None:
    metric = own_metric("mine_of_a_test:distance")
    assert (metric.name, metric.direction) == ("mine_of_a_test:distance", "minimize")
    assert metric.judge([1.0, 2.5], [2.0, 2.0]) == [1.0, 0.5]
    assert own_metric("mine_of_a_test:Kinds.same").judge(["ab", "ba"], ["ac", "ac"]) == [1.0, 0.0]
    assert own_metric("math:dist").direction == "maximize"


def test_a_module_of_the_working_directory_hides_no_other(here: Path) -> None:
    (here / "statistics.py").write_text("raise RuntimeError('not this one')")
    sys.modules.pop("statistics", None)
    assert own_metric("statistics:covariance").judge([[1, 2]], [[1, 2]]) == [0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_of_a_test:", "write module:function, such as my_metrics:closeness"),
        ("mine_of_a_test.py:equal()", "write module:function"),
        ("none_of_a_test:equal", "there is no module 'none_of_a_test', neither installed nor in the working"),
        ("mine_of_a_test:equals", "mine_of_a_test has no equals; it has sqrt, Path, equal, distance"),
        ("mine_of_a_test:limit", "limit is int, which cannot be called"),
        ("mine_of_a_test:alone", "alone must take two arguments, a prediction and what is right"),
        ("mine_of_a_test:sideways", "its direction is 'left'; write maximize or minimize"),
    ],
)
def test_what_is_no_metric_is_refused(here: Path, name: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        own_metric(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", r"importing faulty_of_a_test failed: ZeroDivisionError: .*faulty_of_a_test\.py:1"),
        ("def f(:", "importing faulty_of_a_test failed: SyntaxError"),
        ("raise SystemExit(3)", "importing faulty_of_a_test failed: SystemExit: 3"),
        ("import none_of_a_test", "importing faulty_of_a_test failed: ModuleNotFoundError: .*none_of_a_test"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told(here: Path, source: str, message: str) -> None:
    (here / "faulty_of_a_test.py").write_text(source)
    with pytest.raises(CommandError, match=message):
        own_metric("faulty_of_a_test:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", r"metric mine_of_a_test:breaks\('a', 'b'\) failed: ZeroDivisionError: .*_test\.py:\d+"),
        ("words", r"words\('a', 'b'\) gave 'much': it must give a number"),
        ("nothing", r"nothing\('a', 'b'\) gave nan: it must give a finite number"),
        ("endless", r"endless\('a', 'b'\) gave 10+…: it must give a number"),
        ("leaves", r"leaves\('a', 'b'\) failed: SystemExit: 0"),
    ],
)
def test_a_sample_that_cannot_be_judged_is_named(here: Path, name: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        own_metric(f"mine_of_a_test:{name}").judge(["a"], ["b"])


def test_what_the_users_code_prints_is_no_result(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine_of_a_test.py").write_text(f"print('I am imported'){SOURCE}")
    assert own_metric("mine_of_a_test:talks").judge(["a"], ["b"]) == [1.0]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "I am imported\nI was asked\n")


HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text-classification": ({"text": "a", "label": "x"}, {"text": "b", "label": "y"}),
    "regression": ({"text": "a", "score": 1.5}, {"text": "b", "score": -2.0}),
    "multi-label-classification": ({"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}),
    "token-classification": ({"tokens": ["a"], "tags": ["B-x"]}, {"tokens": ["b"], "tags": ["O"]}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_heads_answers_are_in_the_words_of_its_predictions(name: str) -> None:
    """Logits that say what the labels say are predictions equal to the answers, and those of the data."""
    rows = HEADS[name]
    task, _ = choose_task(name, build_data("things", {"train": rows, "validation": rows}))
    assert isinstance(task, HeadTask)
    labels: torch.Tensor
    logits: torch.Tensor
    if name == "regression":
        labels = torch.tensor([1.5, -2.0])
        logits = labels[:, None]
    elif name == "multi-label-classification":
        labels = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        logits = labels - 0.5
    elif name == "token-classification":
        labels = torch.tensor([[-100, 0], [-100, 1]])
        logits = torch.nn.functional.one_hot(labels.clamp(min=0), 2).float()
    else:
        labels = torch.tensor([0, 1])
        logits = torch.eye(2)
    batch = Batch({}, labels, 2)
    wanted = [row.get("label", row.get("score", row.get("tags"))) for row in rows]
    assert task.answers(batch) == task.predictions(logits, batch) == wanted


class Fixed(torch.nn.Module):
    """Gives each sample the logits that its first token stands for."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": self.logits[input_ids[:, 0]]})()


def scored(task: Task, logits: torch.Tensor, labels: list[Any]) -> Any:
    examples = [Example([at] * (1 + at % 3), label) for at, label in enumerate(labels)]
    return evaluate(Fixed(logits), task, examples, batch_size=3, pad_token_id=0)


def test_the_score_is_the_mean_over_the_samples_beside_all_others(here: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    data = build_data("things", {"train": rows, "validation": rows})
    task, told = choose_task("auto", data, "mine_of_a_test:equal")
    assert told.endswith("metric mine_of_a_test:equal, higher is better")
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(11, 2, generator=generator), [at % 2 for at in range(11)]
    found = scored(task, logits, labels)
    assert found.scores["mine_of_a_test:equal"] == pytest.approx(found.scores["accuracy"])
    assert {"loss", "f1_macro"} < found.scores.keys()
    errors = standard_errors(task, found.outcomes)
    assert errors["mine_of_a_test:equal"] == pytest.approx(errors["accuracy"]) and errors["accuracy"] > 0
    other = scored(task, logits.flip(0), labels)
    plain, _ = choose_task("auto", data, "accuracy")
    mine = paired_difference(task, found.outcomes, other.outcomes)
    assert mine == paired_difference(plain, found.outcomes, other.outcomes)


def test_a_smaller_number_is_better_where_the_function_says_so(here: Path) -> None:
    rows = [{"text": "a", "score": 1.0}, {"text": "b", "score": 2.0}]
    data = build_data("things", {"train": rows, "validation": rows})
    task, told = choose_task("auto", data, "mine_of_a_test:distance")
    assert told.endswith("metric mine_of_a_test:distance, lower is better")
    good, bad = (scored(task, torch.tensor([[1.0 + off], [2.0]]), [1.0, 2.0]) for off in (0.25, 4.0))
    assert good.scores["mine_of_a_test:distance"] == good.scores["mae"] == 0.125
    assert paired_difference(task, good.outcomes, bad.outcomes).mean == 1.875
    lost = scored(task, torch.tensor([[1.0], [2.0]]), [1.0, 2.0])
    lost.outcomes[0, 0] = math.nan
    assert math.isnan(standard_errors(task, lost.outcomes)["mine_of_a_test:distance"])


def test_written_text_is_judged_by_it(here: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    task, _ = choose_task(
        "auto", build_data("things", {"train": rows, "validation": rows}), "mine_of_a_test:equal"
    )
    judge = text_metric(task.metric)
    assert judge is not None and judge.name == "mine_of_a_test:equal"
    assert judge.statistics("b", "b") == [1.0] and judge.statistics("b", "c") == [0.0]
    assert judge.score([3.0], 4) == 0.75
    texts = [{"text": "plain"}]
    with pytest.raises(
        DataError, match="plain texts have none; give prompts with completions, or choose loss"
    ):
        choose_task(
            "auto", build_data("things", {"train": texts, "validation": texts}), "mine_of_a_test:equal"
        )


def test_answers_that_are_found_in_windows_are_judged_by_the_row(
    here: Path, tiny_bert: Path, tiny_passages: Path
) -> None:
    config = {
        "model": str(tiny_bert), "data": str(tiny_passages), "studies_dir": str(here), "budget": "3k",
        "max_length": 12, "steps": 12, "metric": "mine_of_a_test:found",
    }  # fmt: skip
    setup = prepare(load_config(None, config), Display.silent())
    assert isinstance(setup.task, WindowTask)
    rows = len(setup.task.windows(setup.bench.validation))
    assert 1 < rows < len(setup.bench.validation)
    result = setup.evaluate(setup.bench.validation)
    assert len(result.outcomes) == rows
    # Words alone: exact match leaves articles and punctuation out.
    assert result.scores["mine_of_a_test:found"] <= result.scores["exact_match"]
    said, right = sys.modules["mine_of_a_test"].told[-1]
    assert isinstance(said, str) and isinstance(right, list)
    assert len(sys.modules["mine_of_a_test"].told) == rows


def settings(model: Path, data: Path) -> list[object]:
    return [
        "--model", model, "--data", data, "--budget", "3k", "--batch-size", 8, "--max-length", 16,
        "--steps", 12,
    ]  # fmt: skip


@pytest.mark.parametrize("lanes", [1, 2])
def test_it_is_what_a_search_improves(
    cli: Cli, here: Path, tiny_bert: Path, tiny_data: Path, lanes: int
) -> None:
    own, given = "mine_of_a_test:equal", settings(tiny_bert, tiny_data)
    done = cli("search", *given, "--trials", 2, "--name", "s", "--metric", own, "--lanes", lanes)
    assert done.code == 0, done.err
    assert f"{own}, maximize" in done.out
    for trial in cli("show", "s", "--json").json["trials"]:
        assert trial["value"] == trial["metrics"][own] == trial["metrics"]["accuracy"]


def test_a_stored_study_runs_it_only_where_it_is_named_again(
    cli: Cli, here: Path, tiny_bert: Path, tiny_data: Path
) -> None:
    own, given = "mine_of_a_test:equal", settings(tiny_bert, tiny_data)
    assert cli("search", *given, "--trials", 1, "--name", "s", "--metric", own).code == 0
    sys.modules.pop("mine_of_a_test")
    (here / "ran.txt").unlink()
    for command in (
        ["resume", "s", "--trials", 2],
        ["export", "s", "--out", "small", "--budget", "1k"],
        ["train", "s", "--out", "long", "--steps", 4],
    ):
        refused = cli(*command)
        assert refused.code == 5 and "name it again with --metric 'mine_of_a_test:equal'" in refused.err
        other = cli(*command, "--metric", "accuracy")
        assert other.code == 5 and "the study's metric is 'mine_of_a_test:equal', not 'accuracy'" in other.err
    assert cli("show", "s").code == 0 and cli("export", "s", "--out", "whole").code == 0
    scored = cli("evaluate", "whole", "--data", tiny_data, "--json").json["scores"]
    assert own not in scored
    assert not (here / "ran.txt").exists() and not (here / "small").exists()

    again = cli("resume", "s", "--trials", 2, "--metric", own)
    assert again.code == 0, again.err
    assert cli("export", "s", "--out", "small", "--budget", "1k", "--metric", own).code == 0
    scored = cli("evaluate", "whole", "--data", tiny_data, "--metric", own, "--json").json["scores"]
    assert scored[own] == scored["accuracy"]


def test_what_a_prompt_is_answered_is_searched_and_evaluated_by_it(
    cli: Cli, here: Path, tiny_llama: Path, tiny_completions: Path
) -> None:
    own, given = "mine_of_a_test:Kinds.same", settings(tiny_llama, tiny_completions)
    (here / "mine_of_a_test.py").write_text(
        SOURCE.replace("prediction[0] == reference[0]", "len(prediction)")
    )
    done = cli("search", *given, "--trials", 1, "--name", "s", "--metric", own)
    assert done.code == 0, done.err
    assert cli("export", "s", "--out", "out").code == 0
    facts = read_json(here / "out" / "autorank_export.json")
    assert facts["metric"] == own and facts["validation"][own] > 1
    rows = ["--data", tiny_completions, "--split", "validation", "--metric", own]
    found = cli("evaluate", "out", *rows, "--json").json
    assert found["scores"][own] == facts["validation"][own]
    refused = cli("evaluate", "out", *rows, "--no-writing")
    assert refused.code == 2 and "leave out --no-writing" in refused.err


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("breaks", 2, "failed: ZeroDivisionError: division by zero"),
        ("none", 2, "has no none"),
        ("alone", 2, "must take two arguments"),
    ],
)
def test_a_faulty_metric_leaves_nothing_behind(
    cli: Cli, here: Path, tiny_bert: Path, tiny_data: Path, name: str, code: int, message: str
) -> None:
    done = cli("search", *settings(tiny_bert, tiny_data), "--metric", f"mine_of_a_test:{name}", "--json")
    assert done.code == code and message in done.json["error"]["message"]
    assert not (here / "studies").exists()


def test_a_metric_that_breaks_in_a_trial_fails_that_trial_alone(
    cli: Cli, here: Path, tiny_bert: Path, tiny_data: Path
) -> None:
    """It counts its calls: the frozen base and the first trial are judged, a part of the second is not."""
    (here / "mine_of_a_test.py").write_text(
        "count = 0\n"
        "def tired(prediction, reference):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 36 * 3:\n"
        "        raise ValueError('enough')\n"
        "    return prediction == reference\n"
    )
    given = settings(tiny_bert, tiny_data)
    done = cli("search", *given, "--trials", 4, "--name", "s", "--metric", "mine_of_a_test:tired")
    assert done.code == 0, done.err
    trials = cli("show", "s", "--json").json["trials"]
    failed = [trial for trial in trials if trial["state"] == "FAIL"]
    assert (
        len(failed) == 1 and "tired('" in failed[0]["reason"] and "ValueError: enough" in failed[0]["reason"]
    )
    assert sum(trial["state"] == "COMPLETE" for trial in trials) >= 2


def test_code_that_came_with_a_model_is_not_run_by_a_stored_study(
    cli: Cli, here: Path, tiny_bert: Path, tiny_data: Path
) -> None:
    done = cli("search", *settings(tiny_bert, tiny_data), "--trials", 1, "--name", "s")
    assert done.code == 0, done.err
    path = here / "studies" / "s" / "config.json"
    stored = json.loads(path.read_text())
    write_json(path, {**stored, "trust_remote_code": True})
    for command in (["resume", "s"], ["train", "s", "--out", "long", "--steps", 4]):
        refused = cli(*command)
        assert (
            refused.code == 5 and "read that code, and if you trust it add --trust-remote-code" in refused.err
        )
