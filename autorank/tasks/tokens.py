"""Loss and scores of predicted tokens, shared by the tasks that predict text.

The caller says which token each position predicts; nothing is shifted here.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from autorank.tasks.task import IGNORED, Direction
from autorank.tasks.text_metrics import TextMetric

__all__ = ["TOKEN_COLUMNS", "TOKEN_METRICS", "token_loss", "token_outcomes", "token_scores"]

TOKEN_METRICS: dict[str, Direction] = {
    "loss": "minimize",
    "perplexity": "minimize",
    "token_accuracy": "maximize",
}

TOKEN_COLUMNS = 3
"""Outcomes of a sample: (summed loss, trained tokens, tokens right)."""


def token_loss(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy over the trained tokens, in float32.

    Args:
        logits: shape (samples, length, vocabulary).
        targets: the token that each position predicts, int64, shape (samples, length); `IGNORED`
            where it is not trained.
        label_smoothing: the share of each target that is spread over the vocabulary.
    """
    kept = targets != IGNORED
    return functional.cross_entropy(logits[kept].float(), targets[kept], label_smoothing=label_smoothing)


def token_outcomes(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One row of `TOKEN_COLUMNS` per sample, float64 on the CPU; the arguments are those of `token_loss`."""
    kept = targets != IGNORED
    chosen = logits.detach()[kept].float()
    losses = functional.cross_entropy(chosen, targets[kept], reduction="none")
    mask = kept.cpu()
    rows = torch.zeros(TOKEN_COLUMNS, *mask.shape, dtype=torch.float64)
    rows[0, mask] = losses.cpu().double()
    rows[1, mask] = 1.0
    rows[2, mask] = (chosen.argmax(dim=-1) == targets[kept]).cpu().double()
    return rows.sum(dim=2).T.contiguous()


def token_scores(outcomes: torch.Tensor, written: TextMetric | None = None) -> dict[str, float]:
    """Mean loss per trained token in nats, its exponential, the share of tokens right, and `written`.

    The statistics of `written` stand behind the token columns. All scores are NaN where an outcome
    is not finite.
    """
    if not torch.isfinite(outcomes).all():
        names = (*TOKEN_METRICS, *([] if written is None else [written.name]))
        return dict.fromkeys(names, math.nan)
    total, tokens, right, *totals = outcomes.sum(dim=0).tolist()
    loss = total / tokens
    # Beyond 709 nats the exponential has no float64: such a model is as bad as can be.
    perplexity = math.exp(loss) if loss < 709 else math.inf
    scores = {"loss": loss, "perplexity": perplexity, "token_accuracy": right / tokens}
    return scores if written is None else {**scores, written.name: written.score(totals, len(outcomes))}
