"""The warm start: a linear probe, solved on the frozen base model's features, as the first head.

Linear probing, then fine-tuning: Kumar et al., 2022, arXiv:2202.10054. Knows tensors and modules
only; it reads no data and trains no adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.errors import ModelError
from autorank.targets import in_block

if TYPE_CHECKING:
    from autorank.tasks import Batch

__all__ = ["final_linear", "fit_probe", "frozen_features", "warm_start"]

# Strengths of the L2 penalty to choose from; each solve starts from the one before.
_PENALTIES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
_HOLD_OUT = 0.2
_ITERATIONS = 30


def final_linear(model: nn.Module, fresh: Sequence[str], num_labels: int) -> str:
    """The name of the layer that gives the logits: the last Linear of `num_labels` outputs behind the blocks.

    Raises:
        ModelError: there is none.
    """
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_labels and not in_block(model, name)
    ]
    initialised = [name for name in found if any(f"{name}.".startswith(f"{top}.") for top in fresh)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no final linear layer with {num_labels} outputs, one a label: "
            "give a model with a plain classification head"
        )
    return (initialised or found)[-1]


@torch.no_grad()  # not inference_mode: what a model caches in a first forward must serve training later
def frozen_features(model: nn.Module, head_name: str, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Exactly what the final linear layer reads, one row for each sample, and the labels.

    Decoders apply that layer to every token and keep the logits of the last one that is not
    padding; the row is that token's.

    Returns:
        Features, float32 [samples, features], and labels, int64 [samples], both on the CPU.

    Raises:
        ModelError: features are not finite, or the layer does not give the model's logits.
    """
    head = cast(nn.Linear, model.get_submodule(head_name))
    device = head.weight.device
    seen: list[Tensor] = []
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for batch in batches:
            seen.clear()
            batch = batch.to(device)
            logits = model(**batch.inputs).logits
            if len(seen) != 1:
                raise ModelError(
                    f"the model runs its head {head_name} {len(seen)} times for a batch, not once"
                )
            features = seen[0]
            if features.ndim == 3:
                features = features[torch.arange(len(features), device=device), _last_tokens(model, batch)]
            _check(head, head_name, features, logits)
            rows.append(features.float().cpu())
            labels.append(batch.labels.cpu())
    finally:
        hook.remove()
    return torch.cat(rows), torch.cat(labels)


def _last_tokens(model: nn.Module, batch: Batch) -> Tensor:
    """The index of each sample's rightmost token that is not padding, as the models themselves find it."""
    ids = batch.inputs["input_ids"]
    pad_token_id: int = cast(Any, model).config.get_text_config().pad_token_id
    return (torch.arange(ids.shape[1], device=ids.device) * (ids != pad_token_id)).argmax(-1)


def _check(head: nn.Linear, head_name: str, features: Tensor, logits: Tensor) -> None:
    if not torch.isfinite(features).all():
        raise ModelError(
            f"the base model gives features that are not finite, in {features.dtype}: try --dtype float32"
        )
    again = head(features)
    tolerance = 1e-3 if features.dtype == torch.float32 else 2e-2
    if again.shape != logits.shape or (again - logits).abs().max() > tolerance * (1e-3 + logits.abs().max()):
        raise ModelError(
            f"the model's logits are not what its layer {head_name} gives: its head is not supported"
        )


def fit_probe(
    features: Tensor, labels: Tensor, classes: int, *, bias: bool, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Multinomial logistic regression with an L2 penalty, for the features as they are.

    Solved by L-BFGS in float64 on standardised features (without a bias they are scaled only). The
    penalty is the one with the least cross-entropy on a held-out fifth of these rows; then all rows
    are used. The same input gives the same head.

    Args:
        features: [samples, features].
        labels: int64 [samples], in [0, classes).
        classes: number of classes.
        bias: whether the head has one.
        seed: for the choice of the held-out rows.

    Returns:
        Weight, float32 [classes, features], and bias, float32 [classes], or None.
    """
    x = features.detach().to("cpu", torch.float64)
    y = labels.detach().to("cpu", torch.int64)
    centre = x.mean(0) if bias else torch.zeros(x.shape[1], dtype=x.dtype)
    scale = (x - centre).square().mean(0).sqrt()
    scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)
    x = (x - centre) / scale
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    start, penalty = _choose_penalty(x.float(), y, classes, bias, seed)
    solved = _solve(x, y, start.double(), penalty, bias)
    weight = solved[:, : len(scale)] / scale
    offset = solved[:, -1] - weight @ centre if bias else None
    return weight.float(), None if offset is None else offset.float()


def warm_start(base_model: nn.Module, head_name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Write the probe into the model's final linear layer, in place; without `bias` its bias becomes zero."""
    head = cast(nn.Linear, base_model.get_submodule(head_name))
    if head.weight.shape != weight.shape:
        raise ModelError(
            f"{head_name} has shape {tuple(head.weight.shape)}, the stored head {tuple(weight.shape)}"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(torch.zeros_like(head.bias) if bias is None else bias)


def _hold_out(labels: Tensor, seed: int) -> Tensor:
    """A mask of held-out rows: a fifth of each class, and never its last row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = order[labels[order] == label]
        held[rows[: int(_HOLD_OUT * len(rows))]] = True
    return held


def _choose_penalty(x: Tensor, y: Tensor, classes: int, bias: bool, seed: int) -> tuple[Tensor, float]:
    """A penalty, and the solution it gave on the rows that were not held out.

    The strongest whose cross-entropy on the held-out rows is within one standard error of the least
    (Breiman et al., 1984): where the data cannot tell, the head that leaves more to fine-tuning.
    """
    held = _hold_out(y, seed)
    solved = torch.zeros(classes, x.shape[1], dtype=x.dtype)
    if not held.any():
        return solved, _PENALTIES[0]
    tried: list[tuple[float, Tensor, float]] = []
    least, margin = float("inf"), 0.0
    for penalty in _PENALTIES:
        solved = _solve(x[~held], y[~held], solved, penalty, bias)
        errors = functional.cross_entropy(x[held] @ solved.T, y[held], reduction="none").double()
        error = float(errors.mean())
        if error > least:
            break  # along the penalties the error has one valley
        least, margin = error, float(errors.std(correction=0)) / len(errors) ** 0.5
        tried.append((error, solved, penalty))
    return next((solution, penalty) for error, solution, penalty in tried if error <= least + margin)


def _solve(x: Tensor, y: Tensor, start: Tensor, penalty: float, bias: bool) -> Tensor:
    """Minimise mean cross-entropy + penalty / 2 · |weights|², from `start`; a bias is not penalised."""
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=_ITERATIONS,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )
    penalised = x.shape[1] - bias

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = weights[:, :penalised].square().sum()
        loss = functional.cross_entropy(x @ weights.T, y) + 0.5 * penalty * squares
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()
