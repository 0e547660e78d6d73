"""Extractive question answering: a question, a context, and the part of the context that answers it.

A context for which there is no room is read in several windows: the question, whole, with as much of
the context as fits, and again from a little before where that ended. All are trained, scored and read
for an answer. As in `run_qa.py` of transformers: the first token of a window stands for "no answer",
which is also what is trained where an answer is not whole in the window, and a row's answer is the
best span of all its windows, unless "no answer" scores as much in each and some train row has none. A
row of which no window holds an answer whole is not trained on, and counts as any other in exact match
and F1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch.nn import functional

from autorank.data import DataSet, Row
from autorank.errors import DataError, ModelError
from autorank.figures import counted
from autorank.tasks.answers import Answer, exact_match, read_answers, word_f1
from autorank.tasks.task import (
    IGNORED,
    Batch,
    Direction,
    Encoded,
    Example,
    Metric,
    Passage,
    ProbeKind,
    Tokenizer,
    check_text,
    choose_metric,
    pad_rows,
    require_columns,
    require_room,
)
from autorank.tasks.texts import collate_texts

__all__ = ["Found", "QuestionAnswering", "best_spans"]

_DIRECTIONS: dict[str, Direction] = {"f1": "maximize", "exact_match": "maximize", "loss": "minimize"}
# What a token's label holds; 0 where no answer starts or ends.
_STARTS, _ENDS = 1, 2
_LONGEST = 30
_NO_ANSWER = (0, 0)
# Tokens of the context that a window shares with the one before, as in run_qa.py, where they are at
# most half of a window's.
_OVERLAP = 128


@dataclass(frozen=True)
class QuestionAnswering:
    """Find where in `context` one of `answers` to `question` starts and ends.

    Where it `abstains` it may also tell that none does.
    """

    metric: Metric
    abstains: bool = True

    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    name: ClassVar[str] = "question-answering"
    metrics: ClassVar[tuple[str, ...]] = tuple(_DIRECTIONS)
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_task_type: ClassVar[str] = "QUESTION_ANS"
    outputs: ClassVar[int] = 2
    labels: ClassVar[tuple[str, ...] | None] = None
    smooths: ClassVar[bool] = False
    probe: ClassVar[ProbeKind] = "ends"
    unit: ClassVar[float] = 1.0

    @classmethod
    def from_data(
        cls, data: DataSet, metric: str = "auto", *, abstains: bool | None = None
    ) -> QuestionAnswering:
        """The task, after a check of every row of every split.

        Args:
            data: the rows.
            metric: the name of one of the task's metrics, or `auto`.
            abstains: whether a trained model may tell that there is no answer; None for whether a
                train row has none.

        Raises:
            DataError: a column is missing, a question or a context is no text, answers do not stand in
                their context, or no train row has one.
        """
        require_columns(data, cls.columns, cls.name)
        for split, rows in data.splits.items():
            found = bare = 0
            for index, row in enumerate(rows):
                place = data.where(split, index)
                for column in ("question", "context"):
                    check_text(row.get(column), column, place)
                answers = read_answers(row, place)
                found += len(answers)
                bare += not answers
            if split == "train" and abstains is None:
                abstains = bare > 0
            if split == "train" and rows and not found:
                raise DataError(f"{data.source}: no train row has an answer; there is nothing to learn from")
        return cls(choose_metric(metric, _DIRECTIONS, cls.name), bool(abstains))

    def model_kwargs(self) -> dict[str, Any]:
        """Two outputs for each token: how much an answer starts there, and how much it ends there."""
        return {"num_labels": 2}

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each question with its context; a long context becomes several examples.

        Nothing is cut. `kept` counts the rows. Those are dropped whose question leaves no room for a
        token of the context.

        Raises:
            ModelError: the tokenizer cannot say which characters a token stands for.
        """
        require_room(tokenizer, max_length, 2)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} does not tell which characters a token stands "
                f"for, which the task {self.name} needs: give a model with a fast tokenizer (a "
                "tokenizer.json)"
            )
        examples: list[Example] = []
        kept = long = lost = 0
        for index, windows in enumerate(_windows(rows, tokenizer, max_length)):
            answers = read_answers(rows[index], "a row")
            targets = [_target(window, answers) for window in windows]
            whole = not answers or any(target != _NO_ANSWER for target in targets)
            texts = tuple(answer.text for answer in answers)
            for window, target in zip(windows, targets, strict=True):
                passage = Passage(rows[index]["context"], window.offsets, texts, index)
                labels = _labels(window, target if whole else None)
                examples.append(Example(window.ids, labels, window.types, passage=passage))
            kept += bool(windows)
            long += len(windows) > 1
            lost += bool(windows) and not whole
        empty, notes = len(rows) - kept, []
        if long:
            notes.append(
                f"{long:,} of {kept:,} contexts do not fit in {max_length} tokens: with the others they are "
                f"read in {len(examples):,} windows"
            )
        if lost:
            notes.append(
                f"not trained, for it is whole in no window: {counted(lost, 'answer')}; raise --max-length "
                "for more"
            )
        dropped = {"no token of the context": empty} if empty else {}
        return Encoded(tuple(examples), kept, 0, dropped, notes=tuple(notes))

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels have shape (samples, length).

        A label is the sum of 1 where an answer starts and 2 where it ends, and `IGNORED` where no answer
        may do either.
        """
        labels = [example.labels for example in examples if isinstance(example.labels, list)]
        passages = tuple(example.passage for example in examples if example.passage is not None)
        return replace(collate_texts(examples, pad_token_id, pad_rows(labels, IGNORED)), passages=passages)

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy, in float32, of where the answers start and end.

        `logits` has shape (samples, length, 2); the positions to choose from are the first one and those
        of the context. Samples of rows whose answer is whole in no window have no share in it.
        """
        known = (_targets(batch.labels)[:, 0] != IGNORED).sum()
        return _losses(logits, batch.labels).mean(dim=1).sum() / known.clamp(min=1)

    def terms(self, batch: Batch) -> int:
        """The number of samples of rows whose answer, or lack of one, is in a window."""
        return int((_targets(batch.labels)[:, 0] != IGNORED).sum())

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per window: of its best span F1 and exact match, loss, 1 if there is a loss, and scores.

        float64 on the CPU, shape (samples, 6). The loss is the mean of those of start and end. The last
        two are the sums of logits of the best span and of "no answer", by which `join` chooses.
        """
        losses = _losses(logits.detach(), batch.labels).mean(dim=1).cpu()
        known = _targets(batch.labels)[:, 0].cpu() != IGNORED
        rows = [
            (
                word_f1(found.text, passage.answers),
                exact_match(found.text, passage.answers),
                float(loss),
                float(is_known),
                found.score,
                found.none,
            )
            for found, passage, loss, is_known in zip(
                self.predictions(logits, batch), batch.passages, losses, known, strict=True
            )
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def windows(self, examples: Sequence[Example]) -> list[tuple[int, int]]:
        """The first window of each row and the one behind its last."""
        starts = [
            at
            for at, one in enumerate(examples)
            if at == 0 or _passage(one).row != _passage(examples[at - 1]).row
        ]
        return list(pairwise([*starts, len(examples)]))

    def join(self, outcomes: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """One row per question: F1, exact match, and of its windows the sum of losses and their number.

        float64, shape (questions, 4). Not finite where a logit is not.
        """
        rows: list[list[float]] = []
        windows = outcomes.tolist()
        for first, last in self.windows(examples):
            found = windows[first:last]
            chosen = self._choose([(score, none) for *_, score, none in found])
            answers = _passage(examples[first]).answers
            said = [word_f1("", answers), exact_match("", answers)] if chosen is None else found[chosen][:2]
            finite = all(math.isfinite(value) for window in found for value in window)
            losses = [sum(window[column] for window in found) for column in (2, 3)]
            rows.append([*said, *losses] if finite else [math.nan] * 4)
        return torch.tensor(rows, dtype=torch.float64)

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """The mean F1 of words and the share of exact matches, in [0, 1], as SQuAD has them, and the loss.

        `outcomes` are those of questions, from `join`. The loss is the mean in nats over the windows that
        have one, NaN where none has.
        """
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, math.nan)
        f1, matches, loss, known = outcomes.sum(dim=0).tolist()
        return {
            "f1": f1 / len(outcomes),
            "exact_match": matches / len(outcomes),
            "loss": loss / known if known else math.nan,
        }

    def predictions(self, logits: torch.Tensor, batch: Batch) -> list[Found]:
        """The part of each window that answers best, of at most 30 tokens."""
        spans, scores = best_spans(logits.detach().float(), batch.labels != IGNORED, _LONGEST)
        nones = logits.detach()[:, 0].float().sum(dim=1)
        of_samples = zip(spans.tolist(), scores.tolist(), nones.tolist(), batch.passages, strict=True)
        return [Found(_text(passage, span), score, none) for span, score, none, passage in of_samples]

    def answer(self, predictions: Sequence[Found]) -> str:
        """The answer of a row from what was found in its windows; "" for none."""
        chosen = self._choose([(found.score, found.none) for found in predictions])
        return "" if chosen is None else predictions[chosen].text

    def _choose(self, scores: Sequence[tuple[float, float]]) -> int | None:
        """Which of a row's windows has its answer; None where "no answer" scores as much in each of them.

        `scores` are those of the best span and of "no answer", for each window. Of equals the first.
        """
        best = max(range(len(scores)), key=lambda window: scores[window][0])
        none = min(none for _, none in scores)
        return None if self.abstains and none >= scores[best][0] else best

    def answers(self, batch: Batch) -> list[Any]:
        """The texts that are right, a list for each sample; none where there is no answer."""
        return [list(passage.answers) for passage in batch.passages]

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text and the answer that is trained."""
        target = tuple(_targets(torch.tensor([example.labels]))[0].tolist())
        passage = _passage(example)
        text = "nothing, for the answer is whole in no window"
        if target == _NO_ANSWER:
            text = "no answer in this window" if passage.answers else "no answer"
        elif IGNORED not in target:
            text = _text(passage, target)
        return f"{tokenizer.decode(example.input_ids)} -> {text}"


@dataclass(frozen=True, slots=True)
class Found:
    """The best span of a window, the sum of logits that it has, and that which "no answer" has there."""

    text: str
    score: float
    none: float


def _passage(example: Example) -> Passage:
    assert example.passage is not None
    return example.passage


@dataclass(frozen=True)
class _Window:
    """What the model sees of a row at once.

    `offsets` holds for each token the characters of the context that it stands for, (0, 0) for tokens of
    which no answer is made. `opens` and `closes` tell whether nothing of the context lies before and
    behind it.
    """

    ids: list[int]
    types: list[int] | None
    offsets: tuple[tuple[int, int], ...]
    opens: bool
    closes: bool

    @property
    def places(self) -> list[int]:
        """The tokens that answers are made of."""
        return [place for place, (start, end) in enumerate(self.offsets) if end > start]


def _windows(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> list[list[_Window]]:
    """The windows of each row; none where there is no room for a token of the context."""
    if not rows:
        return []
    # `verbose=False`: a text over the model's limit comes in windows, no reason for a warning.
    encoded = tokenizer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    types = encoded.get("token_type_ids") or [None] * len(rows)
    tokens = zip(encoded["input_ids"], types, encoded["offset_mapping"], strict=True)
    return [_slide(*row, encoded.sequence_ids(index), max_length) for index, row in enumerate(tokens)]


def _slide(
    ids: list[int],
    types: list[int] | None,
    offsets: Sequence[tuple[int, int]],
    sides: Sequence[int | None],
    max_length: int,
) -> list[_Window]:
    """The windows of a row, from all its tokens: `sides` is 0 for the question's, 1 for the context's."""
    context = [place for place, side in enumerate(sides) if side == 1]
    room = max_length - (len(ids) - len(context))
    if room < 1:
        return []
    begin, end = (context[0], context[-1] + 1) if context else (len(ids), len(ids))
    step = room - min(_OVERLAP, room // 2)
    windows = []
    for first in range(begin, max(begin + 1, end - room + step), step):
        last = min(first + room, end)
        kept = [*range(begin), *range(first, last), *range(end, len(ids))]
        spans = ((offsets[at][0], offsets[at][1]) if at and first <= at < last else (0, 0) for at in kept)
        window = _Window(
            [ids[place] for place in kept],
            None if types is None else [types[place] for place in kept],
            tuple(spans),
            opens=first == begin,
            closes=last == end,
        )
        windows.append(window)
    return [window for window in windows if window.places]


def _target(window: _Window, answers: Sequence[Answer]) -> tuple[int, int]:
    """First and last token of the first answer that is whole in the window; no answer where none is."""
    places = window.places
    begin, end = window.offsets[places[0]][0], window.offsets[places[-1]][1]
    for answer in answers:
        last = answer.start + len(answer.text.rstrip())
        inside = [
            place
            for place in places
            if window.offsets[place][1] > answer.start and window.offsets[place][0] < last
        ]
        if inside and (window.opens or begin <= answer.start) and (window.closes or last <= end):
            return inside[0], inside[-1]
    return _NO_ANSWER


def _labels(window: _Window, target: tuple[int, int] | None) -> list[int]:
    """The label of each token; see `QuestionAnswering.collate`."""
    labels = [IGNORED] * len(window.ids)
    for place in (0, *window.places):
        labels[place] = 0
    if target is not None:
        labels[target[0]] += _STARTS
        labels[target[1]] += _ENDS
    return labels


def _targets(labels: torch.Tensor) -> torch.Tensor:
    """Where the answers start and end, int64, shape (samples, 2), from labels of shape (samples, length).

    `IGNORED` where no window of the row holds an answer whole.
    """
    marks = torch.stack([labels & _STARTS, labels & _ENDS], dim=2)
    marks = (marks > 0) & (labels != IGNORED)[:, :, None]
    return torch.where(marks.any(dim=1), marks.long().argmax(dim=1), IGNORED)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of start and end, float32, shape (samples, 2); 0 where no target is known."""
    candidates = logits.float().masked_fill((labels == IGNORED)[:, :, None], -math.inf)
    return functional.cross_entropy(candidates, _targets(labels), ignore_index=IGNORED, reduction="none")


def best_spans(
    logits: torch.Tensor, allowed: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last token of the span with the highest sum of its start's and its end's logit, and the sum.

    Spans start and end behind the first token, which stands for no answer.

    Args:
        logits: float32, shape (samples, length, 2).
        allowed: bool, shape (samples, length): where a span may start and end.
        longest: most tokens of a span.

    Returns:
        int64, shape (samples, 2), and float32, shape (samples,). Of equals the shortest span, and of
        these the first; (0, 0) and -inf where there is none.
    """
    starts, ends = logits.masked_fill(~allowed[:, :, None], -math.inf).unbind(dim=2)
    best = torch.full_like(starts[:, 0], -math.inf)
    spans = torch.zeros(len(logits), 2, dtype=torch.int64, device=logits.device)
    for width in range(min(longest, logits.shape[1] - 1)):
        sums, first = (starts[:, 1 : logits.shape[1] - width] + ends[:, 1 + width :]).max(dim=1)
        better = (sums > best) | sums.isnan()  # what is no number stays, and is told
        best = torch.where(better, sums, best)
        found = torch.stack([first + 1, first + 1 + width], dim=1)
        spans = torch.where(better[:, None], found, spans)
    return spans, best


def _text(passage: Passage, span: Sequence[int]) -> str:
    """The part of the context between the first and the last token."""
    return passage.text[passage.offsets[span[0]][0] : passage.offsets[span[1]][1]].strip()
