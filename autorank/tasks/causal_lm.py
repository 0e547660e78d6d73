"""Causal language modelling: a plain corpus, or prompts with completions.

With prompts the loss is on the completion and the end of sequence only. Chat formats and packing
of several rows into one sequence are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from autorank.data import DataSet, Row
from autorank.tasks.task import (
    IGNORED,
    Batch,
    Direction,
    Encoded,
    Example,
    Metric,
    Tokenizer,
    check_text,
    choose_metric,
    pad_rows,
    require_columns,
    require_room,
)

__all__ = ["CausalLM"]

_DIRECTIONS: dict[str, Direction] = {
    "loss": "minimize",
    "perplexity": "minimize",
    "token_accuracy": "maximize",
}


@dataclass(frozen=True)
class CausalLM:
    """Predict the next token of `text`, or of `completion` after `prompt`."""

    columns: tuple[str, ...]
    metric: Metric

    name: ClassVar[str] = "causal-lm"
    metrics: ClassVar[tuple[str, ...]] = tuple(_DIRECTIONS)
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    outputs: ClassVar[int] = 0
    smooths: ClassVar[bool] = True
    labels: ClassVar[tuple[str, ...] | None] = None

    @classmethod
    def from_data(cls, data: DataSet, metric: str = "auto") -> CausalLM:
        """The task for the data's columns, after a check of every row of every split.

        `prompt` and `completion` are taken where the data have both, else `text`.

        Raises:
            DataError: a column is missing, or a field is empty or no text.
        """
        prompted = {"prompt", "completion"} & set(data.columns) and "text" not in data.columns
        both = {"prompt", "completion"} <= set(data.columns)
        columns = ("prompt", "completion") if prompted or both else ("text",)
        require_columns(data, columns, cls.name)
        for split, rows in data.splits.items():
            for index, row in enumerate(rows):
                for column in columns:
                    check_text(row.get(column), column, data.where(split, index))
        return cls(columns, choose_metric(metric, _DIRECTIONS, cls.name))

    @property
    def trained(self) -> str:
        """What the loss is on, for people."""
        return "completions only" if len(self.columns) == 2 else "all of the text"

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the base model is taken as it is."""
        return {}

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each row, close it with the tokenizer's end of sequence, and cut it on the right.

        A row of which no token would be trained is dropped: its prompt fills the whole length, or it
        has a single token, which nothing precedes.
        """
        require_room(tokenizer, max_length, len(self.columns))
        pairs = self._prompted(rows, tokenizer) if len(self.columns) == 2 else self._plain(rows, tokenizer)
        examples: list[Example] = []
        dropped: dict[str, int] = {}
        truncated = 0
        for ids, start in pairs:
            # The first token is never predicted, so training begins at the second at the earliest.
            if max(start, 1) >= min(len(ids), max_length):
                reason = "completion cut away" if max(start, 1) >= max_length else "nothing to predict"
                dropped[reason] = dropped.get(reason, 0) + 1
                continue
            truncated += len(ids) > max_length
            examples.append(Example(ids[:max_length], ([IGNORED] * start + ids[start:])[:max_length]))
        return Encoded(tuple(examples), len(examples), truncated, dropped)

    def _plain(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
        """Token ids of each text; all of them are trained."""
        return [(_closed(ids, tokenizer), 0) for ids in _tokenize([row["text"] for row in rows], tokenizer)]

    def _prompted(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
        """Token ids of prompt and completion, and where the completion starts.

        The completion follows the prompt directly. Its tokens are read in that place, because on its
        own many tokenizers would put a space in front of it; only where the two texts melt together
        at the seam is it tokenised alone, so that the prompt always has the tokens it has in use.
        """
        prompts = _tokenize([row["prompt"] for row in rows], tokenizer)
        joined = _tokenize([row["prompt"] + row["completion"] for row in rows], tokenizer)
        pairs = []
        for row, prompt, whole in zip(rows, prompts, joined, strict=True):
            prompt = _opened(prompt, tokenizer)
            if whole[: len(prompt)] != prompt:
                alone = _tokenize([row["completion"]], tokenizer, add_special_tokens=False)[0]
                whole = prompt + alone
            pairs.append((_closed(whole, tokenizer), len(prompt)))
        return pairs

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels have shape (samples, length)."""
        rows = [example.input_ids for example in examples]
        labels = [example.labels for example in examples if isinstance(example.labels, list)]
        inputs = {
            "input_ids": pad_rows(rows, pad_token_id),
            "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
        }
        return Batch(inputs, pad_rows(labels, IGNORED), len(examples))

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy over the trained tokens, in float32.

        Args:
            logits: shape (samples, length, vocabulary); position t predicts token t + 1.
            batch: its labels are `IGNORED` where a token is not trained.
            label_smoothing: the share of each target that is spread over the vocabulary.
        """
        targets, kept = _targets(batch.labels)
        chosen = logits[:, :-1][kept].float()
        return functional.cross_entropy(chosen, targets[kept], label_smoothing=label_smoothing)

    def terms(self, batch: Batch) -> int:
        """The number of trained tokens."""
        return int(_targets(batch.labels)[1].sum())

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample: (summed loss, trained tokens, tokens right), float64 on the CPU."""
        targets, kept = _targets(batch.labels)
        chosen = logits.detach()[:, :-1][kept].float()
        losses = functional.cross_entropy(chosen, targets[kept], reduction="none")
        mask = kept.cpu()
        rows = torch.zeros(3, *mask.shape, dtype=torch.float64)
        rows[0, mask] = losses.cpu().double()
        rows[1, mask] = 1.0
        rows[2, mask] = (chosen.argmax(dim=-1) == targets[kept]).cpu().double()
        return rows.sum(dim=2).T.contiguous()

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """Mean loss per trained token in nats, its exponential, and the share of tokens right."""
        if not torch.isfinite(outcomes).all():
            return dict.fromkeys(self.metrics, float("nan"))
        total, tokens, right = outcomes.sum(dim=0).tolist()
        loss = total / tokens
        # Beyond 709 nats the exponential has no float64: such a model is as bad as can be.
        perplexity = math.exp(loss) if loss < 709 else math.inf
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": right / tokens}

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text, with what is trained between double brackets."""
        assert isinstance(example.labels, list)
        start = next(index for index, label in enumerate(example.labels) if label != IGNORED)
        start = max(start, 1)
        before, after = example.input_ids[:start], example.input_ids[start:]
        return f"{tokenizer.decode(before)}[[{tokenizer.decode(after)}]]"


def _targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token that each position predicts, and which of them are trained: (samples, length - 1)."""
    targets = labels[:, 1:]
    return targets, targets != IGNORED


def _tokenize(texts: list[str], tokenizer: Tokenizer, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, uncut."""
    if not texts:
        return []
    # `verbose=False`: a text over the model's limit is cut afterwards, no reason for a warning.
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _eos(tokenizer: Tokenizer) -> int | None:
    """The id of the tokenizer's end of sequence, where it has one."""
    token: int | None = getattr(tokenizer, "eos_token_id", None)
    return token


def _opened(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids without the end of sequence that some tokenizers add: something follows."""
    return ids[:-1] if ids and ids[-1] == _eos(tokenizer) else ids


def _closed(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids with exactly one end of sequence, where the tokenizer has one."""
    token = _eos(tokenizer)
    return ids if token is None else [*_opened(ids, tokenizer), token]
