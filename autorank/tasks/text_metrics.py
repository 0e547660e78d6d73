"""Metrics of text that the model writes, against the text that it should have written.

Each is made of additive statistics of a sample, so that a score of any set of samples, a bootstrap
sample above all, comes from their sum. How the text is written is in `autorank.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autorank.errors import CommandError
from autorank.tasks.task import Direction, Metric

__all__ = ["TEXT_METRICS", "TextMetric", "text_metric"]

TEXT_METRICS: dict[str, Direction] = {
    "exact_match": "maximize",
    "rouge_l": "maximize",
    "chrf": "maximize",
}

_CHRF_ORDER = 6


@dataclass(frozen=True)
class TextMetric:
    """A metric of written text.

    Attributes:
        name: one of `TEXT_METRICS`, or the user's own.
        statistics: what a sample adds, from the text written and the one wanted.
        score: the metric, from the statistics summed over samples and the number of samples.
    """

    name: str
    statistics: Callable[[str, str], list[float]]
    score: Callable[[Sequence[float], int], float]


def text_metric(metric: Metric) -> TextMetric | None:
    """How written text is judged by this metric, or None if it is none of written text.

    Raises:
        CommandError: the package that computes it is not installed.
    """
    if metric.own is not None:
        judge = metric.own.judge
        return TextMetric(metric.name, lambda text, reference: judge([text], [reference]), _mean)
    name = metric.name
    if name not in TEXT_METRICS:
        return None
    try:
        return {"exact_match": _exact_match, "rouge_l": _rouge_l, "chrf": _chrf}[name]()
    except ImportError as error:
        raise CommandError(
            f'metric {name} needs the package {error.name}: pip install "autorank-lora[text-metrics]"'
        ) from error


def _mean(totals: Sequence[float], samples: int) -> float:
    return totals[0] / samples


def _exact_match() -> TextMetric:
    """The share of texts, in [0, 1], that are the one wanted but for space around them."""

    def statistics(text: str, reference: str) -> list[float]:
        return [float(text.strip() == reference.strip())]

    return TextMetric("exact_match", statistics, _mean)


def _rouge_l() -> TextMetric:
    """The mean F-measure of the longest common subsequence of words, in [0, 1] (Lin 2004, section 3).

    Words are runs of a to z and digits, in lower case and not stemmed, as `rouge_score` finds them:
    texts in another script score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])

    def statistics(text: str, reference: str) -> list[float]:
        return [float(scorer.score(reference, text)["rougeL"].fmeasure)]

    return TextMetric("rouge_l", statistics, _mean)


def _chrf() -> TextMetric:
    """The F2-score of character n-grams up to 6, over the whole corpus, in [0, 100] (Popović 2015).

    The statistics of a sample are, for each n, the n-grams of both texts and those in common.
    """
    from sacrebleu.metrics.chrf import CHRF

    # sacrebleu makes statistics and scores apart, but shows only the two together.
    chrf: Any = CHRF(char_order=_CHRF_ORDER)

    def statistics(text: str, reference: str) -> list[float]:
        [found] = chrf._extract_corpus_statistics([text], [[reference]])
        return [float(count) for count in found]

    def score(totals: Sequence[float], samples: int) -> float:
        return float(chrf._compute_score_from_stats(list(totals)).score)

    return TextMetric("chrf", statistics, score)
