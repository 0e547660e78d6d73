"""Sequence to sequence: an encoder reads the source, a decoder writes the target.

Summaries, translations, and whatever else an encoder-decoder model is for. Prefixes that some
models want in front of the source ("summarize: ") are part of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from autorank.data import DataSet, Row
from autorank.tasks.task import (
    IGNORED,
    Batch,
    Encoded,
    Example,
    Metric,
    Tokenizer,
    check_text,
    choose_metric,
    ended,
    pad_rows,
    require_columns,
    require_room,
    unended,
    without_end,
)
from autorank.tasks.text_metrics import TEXT_METRICS, TextMetric, text_metric
from autorank.tasks.tokens import TOKEN_METRICS, token_loss, token_outcomes, token_scores

__all__ = ["Seq2Seq"]


@dataclass(frozen=True)
class Seq2Seq:
    """Write `target` from `source`, or `completion` from `prompt`.

    `decoder_start` is the token that the model's decoder is given first; see `starting_with`.
    """

    columns: tuple[str, str]
    metric: Metric
    decoder_start: int | None = None

    name: ClassVar[str] = "seq2seq"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    outputs: ClassVar[int] = 0
    labels: ClassVar[tuple[str, ...] | None] = None
    smooths: ClassVar[bool] = True

    @classmethod
    def from_data(cls, data: DataSet, metric: str = "auto") -> Seq2Seq:
        """The task for the data's columns, after a check of every row of every split.

        `prompt` and `completion` are taken where the data have both and no `source` and `target`.

        Raises:
            DataError: a column is missing, or a field is empty or no text.
            CommandError: a package that computes the metric is missing.
        """
        named, prompted = ("source", "target"), ("prompt", "completion")
        found = set(data.columns)
        columns = prompted if set(prompted) <= found and not set(named) <= found else named
        require_columns(data, columns, cls.name)
        for split, rows in data.splits.items():
            for index, row in enumerate(rows):
                for column in columns:
                    check_text(row.get(column), column, data.where(split, index))
        chosen = choose_metric(metric, TOKEN_METRICS | TEXT_METRICS, cls.name)
        text_metric(chosen)
        return cls(columns, chosen)

    def starting_with(self, token: int) -> Seq2Seq:
        """The same task for a model whose decoder is given this token first."""
        return replace(self, decoder_start=token)

    @cached_property
    def text_metric(self) -> TextMetric | None:
        """How a written target is judged; None where the metric needs none."""
        return text_metric(self.metric)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all figures that `score` gives."""
        return (*TOKEN_METRICS, *([] if self.text_metric is None else [self.metric.name]))

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the base model is taken as it is."""
        return {}

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise both sides of each row, and cut each at the maximum length.

        A source keeps its special tokens where it is cut. A target is closed with the tokenizer's
        end of sequence; where it is cut there is none, so that no model learns to stop there.
        """
        require_room(tokenizer, max_length, 1)
        source, target = self.columns
        sources = _tokenize([row[source] for row in rows], tokenizer)
        targets = _tokenize([row[target] for row in rows], tokenizer, as_target=True)
        long = [index for index, ids in enumerate(sources) if len(ids) > max_length]
        cut = _tokenize([rows[index][source] for index in long], tokenizer, max_length)
        for index, ids in zip(long, cut, strict=True):
            sources[index] = ids
        long_sources, examples = set(long), list[Example]()
        sides = {"sources": 0, "targets": 0}
        truncated = 0
        for index, (row, ids, labels) in enumerate(zip(rows, sources, targets, strict=True)):
            # Where the decoder starts with the target's language, its tokenizer puts that behind the end,
            # from where transformers moves it to the front; nothing is read of it there.
            if labels[-2:] == [getattr(tokenizer, "eos_token_id", None), self.decoder_start]:
                labels = labels[:-1]
            closed = ended(labels, tokenizer)
            if not ids or not unended(labels, tokenizer):
                continue
            cuts = {"sources": index in long_sources, "targets": len(closed) > max_length}
            sides = {side: sides[side] + cuts[side] for side in sides}
            truncated += any(cuts.values())
            examples.append(Example(ids, closed[:max_length], reference=without_end(row[target], tokenizer)))
        empty = len(rows) - len(examples)
        dropped = {"no tokens": empty} if empty else {}
        return Encoded(tuple(examples), len(examples), truncated, dropped, sides)

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad both sides on the right; labels have shape (samples, longest target).

        `decoder_input_ids` are the targets, each moved one place behind the start token. No mask
        goes with them: a decoder sees no later token, so what is padded touches nothing before it.
        """
        assert self.decoder_start is not None, "the model's start token is yet to be told"
        sources = [example.input_ids for example in examples]
        targets = [example.labels for example in examples if isinstance(example.labels, list)]
        inputs = {
            "input_ids": pad_rows(sources, pad_token_id),
            "attention_mask": pad_rows([[1] * len(ids) for ids in sources], 0),
            "decoder_input_ids": pad_rows([[self.decoder_start, *ids[:-1]] for ids in targets], pad_token_id),
        }
        return Batch(inputs, pad_rows(targets, IGNORED), len(examples))

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy over the trained tokens, in float32.

        Args:
            logits: shape (samples, target length, vocabulary); position t predicts label t.
            batch: its labels are `IGNORED` where a target is padded.
            label_smoothing: the share of each target that is spread over the vocabulary.
        """
        return token_loss(logits, batch.labels, label_smoothing)

    def terms(self, batch: Batch) -> int:
        """The number of trained tokens."""
        return int((batch.labels != IGNORED).sum())

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample: (summed loss, trained tokens, tokens right), float64 on the CPU."""
        return token_outcomes(logits, batch.labels)

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """The metrics of the target's tokens, and that of written text, where the search improves one."""
        return token_scores(outcomes, self.text_metric)

    def prompt(self, example: Example) -> list[int]:
        """The source's tokens."""
        return example.input_ids

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """None."""
        return ()

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The source's text, and the target's between double brackets."""
        return f"{tokenizer.decode(example.input_ids)} [[{tokenizer.decode(example.labels)}]]"


def _tokenize(
    texts: list[str], tokenizer: Tokenizer, max_length: int | None = None, *, as_target: bool = False
) -> list[list[int]]:
    """Token ids of each text; as a target in that language, where a tokenizer knows two."""
    if not texts:
        return []
    # `verbose=False`: a text over the model's limit is cut afterwards, no reason for a warning.
    encoded = tokenizer(
        **{"text_target" if as_target else "text": texts},
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]
