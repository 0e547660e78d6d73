"""Extractive question answering: a question, a context, and the part of the context that answers it.

The model sees one window: the question, whole, and as much of the context from its start as there is
room for. What lies behind it is not seen, in training, in scoring and in answering alike. An answer of
which a token is cut off is not trained on, and it counts as any other in exact match and F1: as
missed, unless another answer of the row is found. Raise the maximum length where many are cut off.

The first token of a window stands for "no answer".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.nn import functional

from autorank.data import DataSet, Row
from autorank.errors import DataError, ModelError
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

__all__ = ["QuestionAnswering", "best_spans"]

_DIRECTIONS: dict[str, Direction] = {"f1": "maximize", "exact_match": "maximize", "loss": "minimize"}
# What a token's label holds; 0 where no answer starts or ends.
_STARTS, _ENDS = 1, 2
_LONGEST = 30
_NO_ANSWER = (0, 0)


@dataclass(frozen=True)
class QuestionAnswering:
    """Find where in `context` one of `answers` to `question` starts and ends, or tell that none does."""

    metric: Metric

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
    def from_data(cls, data: DataSet, metric: str = "auto") -> QuestionAnswering:
        """The task, after a check of every row of every split.

        Raises:
            DataError: a column is missing, a question or a context is no text, answers do not stand in
                their context, or no train row has one.
        """
        require_columns(data, cls.columns, cls.name)
        for split, rows in data.splits.items():
            found = 0
            for index, row in enumerate(rows):
                place = data.where(split, index)
                for column in ("question", "context"):
                    check_text(row.get(column), column, place)
                found += len(read_answers(row, place))
            if split == "train" and rows and not found:
                raise DataError(f"{data.source}: no train row has an answer; there is nothing to learn from")
        return cls(choose_metric(metric, _DIRECTIONS, cls.name))

    def model_kwargs(self) -> dict[str, Any]:
        """Two outputs for each token: how much an answer starts there, and how much it ends there."""
        return {"num_labels": 2}

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each question with its context; a long context is cut at its end.

        Rows are dropped where the question leaves no room for a token of the context. `sides` counts
        the rows that have answers, none of which is left whole.

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
        truncated = lost = 0
        for row, window in zip(rows, _windows(rows, tokenizer, max_length), strict=True):
            if window is None:
                continue
            answers = read_answers(row, "a row")
            target = _target(window, answers)
            passage = Passage(row["context"], window.offsets, tuple(answer.text for answer in answers))
            examples.append(Example(window.ids, _labels(window, target), window.types, passage=passage))
            truncated += window.is_cut
            lost += target is None
        empty = len(rows) - len(examples)
        return Encoded(
            tuple(examples),
            len(examples),
            truncated,
            {"no token of the context": empty} if empty else {},
            {"answers cut off": lost} if lost else {},
        )

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
        of the context. Samples whose answer was cut off have no share in it.
        """
        known = (_targets(batch.labels)[:, 0] != IGNORED).sum()
        return _losses(logits, batch.labels).mean(dim=1).sum() / known.clamp(min=1)

    def terms(self, batch: Batch) -> int:
        """The number of samples whose answer, or lack of one, is in the window."""
        return int((_targets(batch.labels)[:, 0] != IGNORED).sum())

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample: (F1, exact match, loss, 1 if there is a loss), float64 on the CPU.

        The loss is the mean of those of start and end, and 0 where the answer was cut off.
        """
        logits = logits.detach()
        losses = _losses(logits, batch.labels).mean(dim=1).cpu()
        known = _targets(batch.labels)[:, 0].cpu() != IGNORED
        texts = zip(self.predictions(logits, batch), batch.passages, strict=True)
        judged = [
            (word_f1(text, passage.answers), exact_match(text, passage.answers)) for text, passage in texts
        ]
        of_texts = torch.tensor(judged, dtype=torch.float64)
        return torch.cat([of_texts, torch.stack([losses.double(), known.double()], dim=1)], dim=1)

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """The mean F1 of words and the share of exact matches, in [0, 1], as SQuAD has them, and the loss.

        The loss is the mean in nats over the samples that have one, NaN where none has.
        """
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, math.nan)
        f1, matches, loss, known = outcomes.sum(dim=0).tolist()
        return {
            "f1": f1 / len(outcomes),
            "exact_match": matches / len(outcomes),
            "loss": loss / known if known else math.nan,
        }

    def predictions(self, logits: torch.Tensor, batch: Batch) -> list[Any]:
        """The part of each context that answers best, of at most 30 tokens; "" for no answer."""
        spans = best_spans(logits.detach().float(), batch.labels != IGNORED, _LONGEST)
        pairs = zip(spans.tolist(), batch.passages, strict=True)
        return [_text(passage, (first, last)) for (first, last), passage in pairs]

    def answers(self, batch: Batch) -> list[Any]:
        """The texts that are right, a list for each sample; none where there is no answer."""
        return [list(passage.answers) for passage in batch.passages]

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text and the answer that is trained."""
        target = tuple(_targets(torch.tensor([example.labels]))[0].tolist())
        assert example.passage is not None
        text = "an answer that is cut off"
        if IGNORED not in target:
            text = _text(example.passage, target) or "no answer"
        return f"{tokenizer.decode(example.input_ids)} -> {text}"


@dataclass(frozen=True)
class _Window:
    """What the model sees of a row.

    `offsets` holds for each token the characters of the context that it stands for, (0, 0) for tokens of
    which no answer is made; `reach` is the end of the last of them.
    """

    ids: list[int]
    types: list[int] | None
    offsets: tuple[tuple[int, int], ...]
    is_cut: bool

    @property
    def places(self) -> list[int]:
        """The tokens that answers are made of."""
        return [place for place, (start, end) in enumerate(self.offsets) if end > start]


def _windows(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> list[_Window | None]:
    """The window of each row; None where no token of the context is in it."""
    if not rows:
        return []
    # `verbose=False`: a text over the model's limit is cut afterwards, no reason for a warning.
    encoded = tokenizer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    types = encoded.get("token_type_ids") or [None] * len(rows)
    tokens = zip(encoded["input_ids"], types, encoded["offset_mapping"], strict=True)
    return [_cut(*row, encoded.sequence_ids(index), max_length) for index, row in enumerate(tokens)]


def _cut(
    ids: list[int],
    types: list[int] | None,
    offsets: Sequence[tuple[int, int]],
    sides: Sequence[int | None],
    max_length: int,
) -> _Window | None:
    """The window of a row, from all its tokens: `sides` is 0 for the question's, 1 for the context's."""
    context = [place for place, side in enumerate(sides) if side == 1]
    room = len(context) - max(0, len(ids) - max_length)
    if room < 1:
        return None
    gone = set(context[room:])
    kept = [place for place in range(len(ids)) if place not in gone]
    return _Window(
        [ids[place] for place in kept],
        None if types is None else [types[place] for place in kept],
        tuple(tuple(offsets[place]) if place and sides[place] == 1 else (0, 0) for place in kept),  # type: ignore[misc]
        bool(gone),
    )


def _target(window: _Window, answers: Sequence[Answer]) -> tuple[int, int] | None:
    """First and last token of the first answer that is whole in the window; None where none is."""
    if not answers:
        return _NO_ANSWER
    places = window.places
    seen = max((window.offsets[place][1] for place in places), default=0)
    for answer in answers:
        end = answer.start + len(answer.text.rstrip())
        inside = [
            place
            for place in places
            if window.offsets[place][1] > answer.start and window.offsets[place][0] < end
        ]
        if inside and (end <= seen or not window.is_cut):
            return inside[0], inside[-1]
    return None


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

    `IGNORED` where the answer was cut off.
    """
    marks = torch.stack([labels & _STARTS, labels & _ENDS], dim=2)
    marks = (marks > 0) & (labels != IGNORED)[:, :, None]
    return torch.where(marks.any(dim=1), marks.long().argmax(dim=1), IGNORED)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of start and end, float32, shape (samples, 2); 0 where the answer was cut off."""
    candidates = logits.float().masked_fill((labels == IGNORED)[:, :, None], -math.inf)
    return functional.cross_entropy(candidates, _targets(labels), ignore_index=IGNORED, reduction="none")


def best_spans(logits: torch.Tensor, allowed: torch.Tensor, longest: int) -> torch.Tensor:
    """First and last token of the span with the highest sum of its start's and its end's logit.

    The first token alone is a span, for no answer; spans of others start and end behind it.

    Args:
        logits: float32, shape (samples, length, 2).
        allowed: bool, shape (samples, length): where a span may start and end; true for the first.
        longest: most tokens of a span.

    Returns:
        int64, shape (samples, 2). Of equals the shortest span, and of these the first.
    """
    starts, ends = logits.masked_fill(~allowed[:, :, None], -math.inf).unbind(dim=2)
    best = starts[:, 0] + ends[:, 0]
    spans = torch.zeros(len(logits), 2, dtype=torch.int64, device=logits.device)
    for width in range(min(longest, logits.shape[1] - 1)):
        sums, first = (starts[:, 1 : logits.shape[1] - width] + ends[:, 1 + width :]).max(dim=1)
        better = sums > best
        best = torch.where(better, sums, best)
        found = torch.stack([first + 1, first + 1 + width], dim=1)
        spans = torch.where(better[:, None], found, spans)
    return spans


def _text(passage: Passage, span: tuple[int, ...]) -> str:
    """The part of the context between the first and the last token."""
    if span == _NO_ANSWER:
        return ""
    return passage.text[passage.offsets[span[0]][0] : passage.offsets[span[1]][1]].strip()
