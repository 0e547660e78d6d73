"""Metrics of written text: what the packages and the papers say, from sums over samples."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.chrf import CHRF

from autorank.data import build_data
from autorank.errors import CommandError
from autorank.tasks import choose_task
from autorank.tasks.task import Metric
from autorank.tasks.text_metrics import TEXT_METRICS, text_metric

TEXTS = st.text(st.sampled_from("abc d."), max_size=12)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=6)


def score(name: str, pairs: list[tuple[str, str]]) -> float:
    metric = text_metric(Metric(name, "maximize"))
    assert metric is not None and metric.name == name
    rows = [metric.statistics(text, reference) for text, reference in pairs]
    assert len({len(row) for row in rows}) == 1
    return metric.score([sum(column) for column in zip(*rows, strict=True)], len(rows))


def test_exact_match_is_of_the_text_but_for_space_around_it() -> None:
    assert score("exact_match", [(" a b\n", "a b"), ("a  b", "a b"), ("A b", "a b"), ("", "a")]) == 0.25


# Lin 2004, section 3.1: one reference and two candidates, by the recall of which they were ranked.
@pytest.mark.parametrize(
    ("text", "reference", "f"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("Police killed the gunman!", "police killed the gunman", 1.0),
        ("police", "police killed the gunman", 2 * 1 * 0.25 / 1.25),
        ("", "police killed the gunman", 0.0),
    ],
)
def test_rouge_l_is_that_of_the_paper(text: str, reference: str, f: float) -> None:
    assert score("rouge_l", [(text, reference)]) == pytest.approx(f)
    assert score("rouge_l", [(text, reference), ("x", "y")]) == pytest.approx(f / 2)


@given(PAIRS)
def test_chrf_of_summed_statistics_is_that_of_the_corpus(pairs: list[tuple[str, str]]) -> None:
    texts, references = zip(*pairs, strict=True)
    expected = CHRF().corpus_score(list(texts), [list(references)]).score
    assert score("chrf", pairs) == pytest.approx(expected)


def test_chrf_is_no_mean_of_sentences() -> None:
    pairs = [("abcdef", "abcdef"), ("x", "abcdefabcdefabcdef")]
    means = sum(score("chrf", [pair]) for pair in pairs) / 2
    assert score("chrf", pairs[:1]) == pytest.approx(100) and means == pytest.approx(50)
    assert score("chrf", pairs) < 40


def test_other_metrics_need_no_written_text() -> None:
    assert text_metric(Metric("loss", "minimize")) is None
    assert set(TEXT_METRICS.values()) == {"maximize"}


@pytest.mark.parametrize(("metric", "package"), [("rouge_l", "rouge_score"), ("chrf", "sacrebleu")])
def test_a_missing_package_is_told_before_anything_is_loaded(
    metric: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    rows = [{"source": "a", "target": "b"}]
    prompts = [{"prompt": "a", "completion": "b"}]
    for found in (rows, prompts):
        with pytest.raises(CommandError, match=f"{metric} needs the package {package}.*text-metrics"):
            choose_task("auto", build_data("things", {"train": found, "validation": found}), metric)
