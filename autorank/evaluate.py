"""Scoring the model on a split, and how sure a score or a difference of scores is.

Knows no study; the metric itself is the task's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autorank.generate import Writer
from autorank.tasks import Example, HeadTask, Task, WindowTask, WritingTask
from autorank.tasks.own_metric import OwnMetric
from autorank.tasks.task import IGNORED, logits_of
from autorank.tasks.text_metrics import TextMetric

__all__ = [
    "Difference",
    "Evaluation",
    "bootstrap_samples",
    "evaluate",
    "judged",
    "paired_difference",
    "standard_error",
    "standard_errors",
]


@dataclass(frozen=True)
class Evaluation:
    """All metrics of a split, and one row of outcomes per example, in the split's order.

    Where rows are read in windows, each an example, there is one for each row.
    """

    scores: dict[str, float]
    outcomes: Tensor


@dataclass(frozen=True)
class Difference:
    """A difference of two scores on the same rows; positive where the first is better.

    `low` and `high` are the ends of a 95 % bootstrap interval over the `n` rows. It holds the
    noise of the sample of rows only, not that of training.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def evaluate(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    writer: Writer | None = None,
) -> Evaluation:
    """Run the model over the examples, alike lengths together, and score the outcomes.

    Memory does not grow with the split beyond a few numbers per example, and what is said of it where
    the user's own metric judges that. Only where the metric is of written text the model writes one for
    each example too, at most as long as the longest answer of the split.

    Args:
        model: in eval mode, with the adapter on it, if any.
        task: what the examples are for.
        examples: of a split; at least one.
        batch_size: rows of a pass.
        pad_token_id: fills up the shorter rows.
        writer: lets this model write; a metric of written text needs it.
    """
    writes = isinstance(task, WritingTask) and task.text_metric is not None
    longest = max(map(_answer_tokens, examples)) if writes else 0
    # Once for all batches: a chat template is rendered for it.
    ends = task.ends(writer.tokenizer) if isinstance(task, WritingTask) and writes and writer else ()
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    rows: list[Tensor] = []
    own = _judge_of_head(task)
    said: list[tuple[Any, Any]] = []
    # Not inference mode: what a model caches in a forward must serve training later.
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = [examples[i] for i in order[start : start + batch_size]]
            batch = task.collate(chosen, pad_token_id).to(device)
            logits = logits_of(model(**batch.inputs))
            found = task.outcomes(logits, batch).cpu()
            if own is not None and isinstance(task, HeadTask):
                said += zip(task.predictions(logits, batch), task.answers(batch), strict=True)
            if isinstance(task, WritingTask) and task.text_metric is not None:
                assert writer is not None, f"the metric {task.metric.name} needs a writer"
                prompts = [task.prompt(example) for example in chosen]
                texts = writer.write(prompts, longest, ends)
                found = torch.cat([found, judged(task.text_metric, texts, chosen)], dim=1)
            rows.append(found)
    outcomes = torch.cat(rows)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    outcomes = outcomes[back].clone()
    if isinstance(task, WindowTask):
        outcomes = task.join(outcomes, examples)
    if own is not None:
        pairs = _of_rows(task, examples, [said[at] for at in back.tolist()])
        numbers = torch.tensor(own.judge(*zip(*pairs, strict=True)), dtype=torch.float64)
        outcomes = torch.cat([outcomes, numbers[:, None]], dim=1)
    return Evaluation(_scores(task, outcomes), outcomes)


def _judge_of_head(task: Task) -> OwnMetric | None:
    """The user's own metric where it judges predictions; of written text `text_metric` has it."""
    return task.metric.own if isinstance(task, HeadTask) else None


def _of_rows(
    task: Task, examples: Sequence[Example], said: Sequence[tuple[Any, Any]]
) -> Sequence[tuple[Any, Any]]:
    """Predictions and what is right, of rows, from those of examples."""
    if not isinstance(task, WindowTask):
        return said
    windows = [said[first:last] for first, last in task.windows(examples)]
    return [(task.answer([found for found, _ in row]), row[0][1]) for row in windows]


def _scores(task: Task, outcomes: Tensor) -> dict[str, float]:
    """All metrics from all outcomes; the numbers of the user's own metric of predictions stand last."""
    own = _judge_of_head(task)
    if own is None:
        return task.score(outcomes)
    value = outcomes[:, -1].mean().item() if bool(torch.isfinite(outcomes).all()) else math.nan
    return {**task.score(outcomes[:, :-1]), own.name: value}


def _answer_tokens(example: Example) -> int:
    """How many tokens should be written."""
    assert isinstance(example.labels, list)
    return sum(label != IGNORED for label in example.labels)


def judged(metric: TextMetric, texts: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """The metric's statistics of each text: float64, shape (samples, k)."""
    pairs = zip(texts, examples, strict=True)
    rows = [metric.statistics(text, example.reference or "") for text, example in pairs]
    return torch.tensor(rows, dtype=torch.float64)


def standard_error(task: Task, outcomes: Tensor, *, resamples: int = 100) -> float:
    """Standard error of the task's metric: the spread over bootstrap samples of the examples."""
    return standard_errors(task, outcomes, resamples=resamples)[task.metric.name]


def standard_errors(task: Task, outcomes: Tensor, *, resamples: int = 100) -> dict[str, float]:
    """Standard error of each of the task's metrics: the spread over bootstrap samples of the examples."""
    drawn = [_scores(task, outcomes[rows]) for rows in bootstrap_samples(len(outcomes), resamples)]
    return {
        name: float(torch.tensor([scores[name] for scores in drawn], dtype=torch.float64).std())
        for name in drawn[0]
    }


def paired_difference(task: Task, first: Tensor, second: Tensor, *, resamples: int = 1000) -> Difference:
    """How much better the first outcomes are than the second, on the same examples, in the metric.

    Paired percentile bootstrap (Efron and Tibshirani 1993, chapter 13): both sides are scored on
    the same resampled examples. The sign is turned for metrics that are minimised.
    """
    name, sign = task.metric.name, 1.0 if task.metric.direction == "maximize" else -1.0

    def gap(rows: Tensor) -> float:
        return sign * (_scores(task, first[rows])[name] - _scores(task, second[rows])[name])

    gaps = torch.tensor([gap(rows) for rows in bootstrap_samples(len(first), resamples)], dtype=torch.float64)
    low, high = torch.quantile(gaps, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(gap(torch.arange(len(first))), low, high, len(first))


def bootstrap_samples(count: int, resamples: int) -> list[Tensor]:
    """Bootstrap samples of row numbers, the same for every call with these sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(count, (count,), generator=generator) for _ in range(resamples)]
