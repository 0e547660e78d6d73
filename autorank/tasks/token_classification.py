"""Token classification: words, and a tag for each of them, such as names and parts of speech.

A word's tag is learnt and told at its first token; its other tokens, and special ones, are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from autorank.data import DataSet, Row
from autorank.errors import DataError, ModelError
from autorank.tasks.classes import check_class, check_seen, f1, f1_macro, label_name
from autorank.tasks.spans import has_spans, spans
from autorank.tasks.task import (
    IGNORED,
    Batch,
    Direction,
    Encoded,
    Example,
    Metric,
    ProbeKind,
    Tokenizer,
    check_text,
    choose_metric,
    pad_rows,
    require_columns,
    require_room,
)
from autorank.tasks.texts import collate_texts
from autorank.tasks.tokens import TOKEN_COLUMNS, token_loss, token_outcomes

__all__ = ["TokenClassification"]

_SPAN_DIRECTIONS: dict[str, Direction] = {"span_f1": "maximize"}
_TAG_DIRECTIONS: dict[str, Direction] = {
    "token_accuracy": "maximize",
    "f1_macro": "maximize",
    "loss": "minimize",
}


@dataclass(frozen=True)
class TokenClassification:
    """Tell the tag, of `tags`, of each word of `tokens`."""

    labels: tuple[str, ...]
    metric: Metric

    columns: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_task_type: ClassVar[str] = "TOKEN_CLS"
    smooths: ClassVar[bool] = True
    probe: ClassVar[ProbeKind] = "multinomial"
    unit: ClassVar[float] = 1.0

    @classmethod
    def from_data(
        cls, data: DataSet, metric: str = "auto", *, labels: Sequence[str] | None = None
    ) -> TokenClassification:
        """The task with the tags of the train split, after a check of every row of every split.

        Integer tags are ordered by value, names by alphabet. Where the tags mark spans, `span_f1` is
        the metric, else `token_accuracy`, unless another is asked for.

        Args:
            data: the rows.
            metric: the name of one of the task's metrics, or `auto`.
            labels: the tags that a trained model knows, in its order; None for those of the train split.

        Raises:
            DataError: a column is missing, a row is not two lists of the same length, a word is no
                text, tags are of mixed types, train has fewer than two, or another split has a tag
                that train has not.
        """
        require_columns(data, cls.columns, cls.name)
        first: object = None
        for split, rows in data.splits.items():
            for index, row in enumerate(rows):
                place = data.where(split, index)
                _check_lists(row, place)
                for number, (word, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True), start=1):
                    here = f"{place}, word {number}"
                    check_text(word, "tokens", here)
                    first = tag if first is None else first
                    check_class(tag, first, here, what="tag")
        if labels is None:
            labels = [*map(label_name, sorted({tag for row in data.train for tag in row["tags"]}))]
        if len(labels) < 2:
            raise DataError(f"{data.source}: every train word has the tag {labels[0]!r}; two are needed")
        check_seen(data, labels, lambda row: row["tags"], what="tag")
        labels = tuple(labels)
        return cls(labels, choose_metric(metric, _directions(labels), cls.name))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The names of all figures that `score` gives."""
        return tuple(_directions(self.labels))

    @property
    def outputs(self) -> int:
        """One output of the head a tag."""
        return len(self.labels)

    def model_kwargs(self) -> dict[str, Any]:
        """The number and the names of the tags, as a model's configuration holds them."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise the words of each row in their order; words and tags beyond the length are cut off.

        A row of which no word has a token is dropped, and a word without one has no tag to learn.

        Raises:
            ModelError: the tokenizer cannot say which word a token is of.
        """
        require_room(tokenizer, max_length, 1)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} does not tell which word a token is of, which the "
                f"task {self.name} needs: give a model with a fast tokenizer (a tokenizer.json)"
            )
        index_of = {label: index for index, label in enumerate(self.labels)}
        examples: list[Example] = []
        truncated = 0
        for row, (ids, types, words, cut) in zip(rows, _tokenize(rows, tokenizer, max_length), strict=True):
            tags = [index_of[label_name(tag)] for tag in row["tags"]]
            labels = _at_first_tokens(words, tags)
            if any(label != IGNORED for label in labels):
                truncated += cut
                examples.append(Example(ids, labels, types))
        empty = len(rows) - len(examples)
        dropped = {"no tokens": empty} if empty else {}
        return Encoded(tuple(examples), len(examples), truncated, dropped)

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels have shape (samples, length)."""
        labels = [example.labels for example in examples if isinstance(example.labels, list)]
        return collate_texts(examples, pad_token_id, pad_rows(labels, IGNORED))

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy over the words, in float32; `logits` has shape (samples, length, tags)."""
        return token_loss(logits, batch.labels, label_smoothing)

    def terms(self, batch: Batch) -> int:
        """The number of words."""
        return int((batch.labels != IGNORED).sum())

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample, all of it sums: float64 on the CPU, shape (samples, 6 + 3 · tags).

        Summed loss, words and words right; spans right, told and true; and of each tag how often it
        was told rightly, told and true.
        """
        told, true, count = logits.detach().argmax(dim=-1).cpu(), batch.labels.cpu(), len(self.labels)
        rows = []
        for predicted, actual in zip(told, true, strict=True):
            kept = actual != IGNORED
            predicted, actual = predicted[kept], actual[kept]
            hits = torch.bincount(actual[predicted == actual], minlength=count)
            counts = [torch.bincount(tags, minlength=count) for tags in (predicted, actual)]
            found = [self._spans(tags.tolist()) for tags in (predicted, actual)]
            sizes = torch.tensor([len(found[0] & found[1]), len(found[0]), len(found[1])])
            rows.append(torch.cat([sizes, hits, *counts]))
        return torch.cat([token_outcomes(logits, batch.labels), torch.stack(rows).double()], dim=1)

    def _spans(self, tags: Sequence[int]) -> set[tuple[str, int, int]]:
        return spans([self.labels[tag] for tag in tags]) if "span_f1" in self.metrics else set()

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """The share of words right, the mean F1 of the tags that occur, the mean loss of a word in nats.

        Where tags mark spans, also the F1 of spans of which type and both ends are right, as
        `conlleval` computes it: over all samples together, and 0 where there are none.
        """
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, math.nan)
        sums = outcomes.sum(dim=0)
        loss, words, right, *of_spans = sums[: TOKEN_COLUMNS + 3].tolist()
        hits, told, true = sums[TOKEN_COLUMNS + 3 :].view(3, -1)
        scores = {
            "span_f1": f1(*of_spans),
            "token_accuracy": right / words,
            "f1_macro": f1_macro(hits, told, true),
            "loss": loss / words,
        }
        return {name: scores[name] for name in self.metrics}

    def predictions(self, logits: torch.Tensor, batch: Batch) -> list[Any]:
        """The tag of each word that has a label in the batch, whatever it is: words cut off have none."""
        pairs = zip(logits.argmax(dim=-1).tolist(), batch.labels.tolist(), strict=True)
        return [
            [self.labels[tag] for tag, label in zip(tags, labels, strict=True) if label != IGNORED]
            for tags, labels in pairs
        ]

    def answers(self, batch: Batch) -> list[Any]:
        """The tag of each of these words."""
        rows = batch.labels.tolist()
        return [[self.labels[label] for label in row if label != IGNORED] for row in rows]

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """Each word's tokens as text, with its tag behind it."""
        assert isinstance(example.labels, list)
        starts = [position for position, label in enumerate(example.labels) if label != IGNORED]
        ends = [*starts[1:], len(example.labels)]
        return " ".join(
            f"{tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True).strip()}"
            f"/{self.labels[example.labels[start]]}"
            for start, end in zip(starts, ends, strict=True)
        )


def _directions(labels: Sequence[str]) -> dict[str, Direction]:
    """The metrics there are for these tags, the one to improve first."""
    return {**(_SPAN_DIRECTIONS if has_spans(labels) else {}), **_TAG_DIRECTIONS}


def _check_lists(row: Row, place: str) -> None:
    """Refuse a row that is not two lists of the same length, with something in them."""
    for column in ("tokens", "tags"):
        value = row.get(column)
        if not isinstance(value, list):
            found = "is missing" if value is None else f"is {type(value).__name__} {str(value)[:40]!r}"
            raise DataError(
                f"{place}: field {column!r} {found}; it must be a list, of words in tokens and of a tag "
                "for each of them in tags (in JSON lines or Parquet: a CSV file holds no lists)"
            )
    words, tags = len(row["tokens"]), len(row["tags"])
    if words != tags:
        raise DataError(f"{place}: {words} tokens and {tags} tags; each word needs one tag")
    if not words:
        raise DataError(f"{place}: field 'tokens' is empty; remove the row or fill it in")


def _tokenize(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length: int
) -> list[tuple[list[int], list[int] | None, list[int | None], bool]]:
    """Of each row: token ids, token types if there are some, the word of each token, whether it was cut."""
    if not rows:
        return []
    space = " " if _needs_spaces(tokenizer) else ""

    def tokens(chosen: Sequence[Row], length: int | None) -> list[tuple[Any, Any, Any]]:
        # `verbose=False`: a text over the model's limit is cut afterwards, no reason for a warning.
        encoded = tokenizer(
            [[row["tokens"][0], *(space + word for word in row["tokens"][1:])] for row in chosen],
            is_split_into_words=True,
            truncation=length is not None,
            max_length=length,
            return_attention_mask=False,
            verbose=False,
        )
        types = encoded.get("token_type_ids") or [None] * len(chosen)
        words = [encoded.word_ids(index) for index in range(len(chosen))]
        return list(zip(encoded["input_ids"], types, words, strict=True))

    found = tokens(rows, None)
    too_long = [index for index, (ids, *_) in enumerate(found) if len(ids) > max_length]
    if too_long:
        for index, cut in zip(too_long, tokens([rows[index] for index in too_long], max_length), strict=True):
            found[index] = cut
    long = set(too_long)
    return [(*row, index in long) for index, row in enumerate(found)]


def _needs_spaces(tokenizer: Tokenizer) -> bool:
    """Whether words given one by one read as in a text only with the space that was before them.

    Byte-level tokenizers, as of GPT-2, know a word by its space, and would see them glued together.
    """

    def ids(words: str | list[str]) -> Any:
        split = isinstance(words, list)
        return tokenizer([words], is_split_into_words=split, add_special_tokens=False)["input_ids"]

    return bool(ids(["a", "b"]) != ids("a b") == ids(["a", " b"]))


def _at_first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The label of each token, from the word that it is of: the word's tag at its first token."""
    before = [None, *words][: len(words)]
    return [
        IGNORED if word is None or word == previous else tags[word]
        for word, previous in zip(words, before, strict=True)
    ]
