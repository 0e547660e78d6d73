"""The warm start: a linear probe, solved on the frozen base model's features, as the first head.

Multinomial logistic regression for one class of several, one logistic regression for each of any
number of classes and for the ends of an answer, ridge regression for a number: by `fit_probe`.

Linear probing, then fine-tuning: Kumar et al., 2022, arXiv:2202.10054. Knows tensors and modules
only; it reads no data and trains no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.adapter import widen
from autorank.errors import ModelError
from autorank.targets import in_block
from autorank.tasks.task import IGNORED, logits_of

if TYPE_CHECKING:
    from autorank.tasks import Batch, ProbeKind

__all__ = [
    "final_linear",
    "fit_ends",
    "fit_multinomial",
    "fit_one_vs_rest",
    "fit_probe",
    "fit_ridge",
    "frozen_features",
    "warm_start",
]

Head = tuple[Tensor, Tensor | None]
"""Weight, float32 [outputs, features], and bias, float32 [outputs], or None."""
Losses = Callable[[Tensor, Tensor], Tensor]
"""The loss of each row, [rows], from what a head gives, [rows, outputs], and the labels."""

# Strengths of the L2 penalty to choose from; each solve starts from the one before.
_PENALTIES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
# Without a bias, features that hardly change come with a small share of their size.
_RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, *_PENALTIES, 1e-4, 1e-5, 1e-6)
_LEVEL = 1e-6
# Positions of tokens that a probe is solved on, of those with a label.
_POSITIONS = 20_000
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
def frozen_features(
    model: nn.Module, head_name: str, batches: Iterable[Batch], *, seed: int = 0, most: int = _POSITIONS
) -> tuple[Tensor, Tensor]:
    """Exactly what the final linear layer reads, one row for each sample or labelled token, and the labels.

    Decoders apply that layer to every token and keep the logits of the last one that is not
    padding; the row is that token's. Where the model gives logits for every token, there is a row
    for each token that has a label.

    Args:
        model: with its head.
        head_name: of its final linear layer.
        batches: the samples.
        seed: for the choice of tokens.
        most: tokens to keep, each of those with a label as likely as any other.

    Returns:
        Features, float32 [rows, features], and labels as the batches have them, [rows] or
        [rows, classes], both on the CPU.

    Raises:
        ModelError: features are not finite, or the layer does not give the model's logits.
    """
    head = cast(nn.Linear, model.get_submodule(head_name))
    device = head.weight.device
    seen: list[Tensor] = []
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    keys = torch.empty(0)
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for batch in batches:
            seen.clear()
            batch = batch.to(device)
            logits = logits_of(model(**batch.inputs))
            if len(seen) != 1:
                raise ModelError(
                    f"the model runs its head {head_name} {len(seen)} times for a batch, not once"
                )
            features, targets = seen[0], batch.labels
            by_token = logits.ndim == 3
            if by_token:
                kept = targets != IGNORED
                features, logits, targets = features[kept], logits[kept], targets[kept]
            elif features.ndim == 3:
                features = features[torch.arange(len(features), device=device), _last_tokens(model, batch)]
            _check(head, head_name, features, logits)
            rows.append(features.float().cpu())
            labels.append(targets.cpu())
            if by_token:
                keys = torch.cat([keys, torch.rand(len(targets), generator=generator)])
                if len(keys) > 2 * most:  # not after every batch, which would copy all each time
                    keys, rows, labels = _least(keys, rows, labels, most)
    finally:
        hook.remove()
    if len(keys) > most:
        _, rows, labels = _least(keys, rows, labels, most)
    return torch.cat(rows), torch.cat(labels)


def _least(
    keys: Tensor, rows: list[Tensor], labels: list[Tensor], most: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The rows with the least keys, in their order: a sample of all so far, were they any number."""
    chosen = keys.topk(most, largest=False).indices.sort().values
    return keys[chosen], [torch.cat(rows)[chosen]], [torch.cat(labels)[chosen]]


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
    kind: ProbeKind, features: Tensor, labels: Tensor, outputs: int, *, bias: bool, seed: int
) -> Head:
    """Solve the probe of that kind; the same input gives the same head.

    Whatever the kind, features are standardised for it in float64 (without a bias they are scaled
    only), and the head is one for the features as they are. The L2 penalty is chosen on rows that are
    held out, a fifth of these or one at a time; then all rows are used.

    Args:
        kind: `multinomial`, `one-vs-rest`, `ridge` or `ends`.
        features: [rows, features].
        labels: what the kind's own function takes.
        outputs: of the head; 1 for `ridge`, 2 for `ends`.
        bias: whether the head has one.
        seed: for the choice of the held-out rows.
    """
    if kind == "ridge":
        return fit_ridge(features, labels, bias=bias)
    if kind == "ends":
        return fit_ends(features, labels, bias=bias, seed=seed)
    fit = {"multinomial": fit_multinomial, "one-vs-rest": fit_one_vs_rest}[kind]
    return fit(features, labels, outputs, bias=bias, seed=seed)


def fit_multinomial(features: Tensor, labels: Tensor, classes: int, *, bias: bool, seed: int) -> Head:
    """Multinomial logistic regression by L-BFGS; labels are int64 [rows], in [0, classes)."""
    y = labels.detach().to("cpu", torch.int64)
    return _fit_logistic(features, y, _hold_out(y, seed), classes, _cross_entropy, bias, 1.0)


def fit_one_vs_rest(features: Tensor, labels: Tensor, classes: int, *, bias: bool, seed: int) -> Head:
    """A logistic regression for each class, all with one penalty; labels are 1 or 0, [rows, classes].

    The penalty is that of the least loss: under a stronger one no rare class would be told.
    """
    y = labels.detach().to("cpu", torch.float64)
    held = _hold_out(torch.zeros(len(y)), seed)
    return _fit_logistic(features, y, held, classes, _binary_cross_entropy, bias, 0.0)


def fit_ends(features: Tensor, labels: Tensor, *, bias: bool, seed: int) -> Head:
    """Whether an answer starts and whether it ends at a token: labels are int64 [rows], 1 and 2, added up.

    A logistic regression for each of the two. The model's loss is a softmax over the tokens of a text,
    to which what all its tokens have in common, such as a bias, is nothing.
    """
    marks = torch.stack([labels & 1, labels & 2], dim=1) > 0
    return fit_one_vs_rest(features, marks, 2, bias=bias, seed=seed)


def fit_ridge(features: Tensor, targets: Tensor, *, bias: bool) -> Head:
    """Ridge regression, solved exactly; targets are numbers, [rows].

    The mean of the targets is not penalised: the bias has it or, without one, the weights that come
    nearest to a constant. So numbers may be far from 0. The penalty is that of the least squared
    error in leaving one row out, which has a closed form (Allen, 1974). Measured with MiniLM on
    query_wellformedness: Pearson 0.311 on validation; the rule of the other kinds, one within a standard
    error of the least, gives 0.166, for squared errors spread too widely to tell anything.
    """
    space = _Standard.of(features, bias)
    x, rows = space.x[:, : len(space.scale)], len(space.x)
    values, vectors = torch.linalg.eigh(x.T @ x / rows)
    values, turned = values.clamp(min=0.0), x @ vectors

    def solve(y: Tensor, penalty: float) -> Tensor:
        """Minimise mean squared error + penalty · |weights|², on the axes of `turned`."""
        weights: Tensor = turned.T @ y / rows / (values + penalty)
        return weights

    def left_out(y: Tensor, penalty: float) -> float:
        leverage = turned.square() @ (1.0 / (values + penalty)) / rows + bias / rows
        errors = (y - turned @ solve(y, penalty)) / (1.0 - leverage).clamp(min=1e-9)
        return float(errors.square().mean())

    y = targets.detach().to("cpu", torch.float64)
    mean = y.mean()
    level = torch.zeros_like(values) if bias else mean * solve(torch.ones_like(y), _LEVEL)
    y = y - (mean if bias else turned @ level)
    penalty = min(_RIDGES, key=lambda ridge: left_out(y, ridge))
    solved = vectors @ (level + solve(y, penalty))
    weight, offset = space.head(torch.cat([solved, mean[None]] if bias else [solved])[None])
    return weight.float(), None if offset is None else offset.float()


@dataclass(frozen=True)
class _Standard:
    """Features standardised, with a column of ones where the head has a bias: float64 [rows, columns]."""

    x: Tensor
    centre: Tensor
    scale: Tensor
    bias: bool

    @classmethod
    def of(cls, features: Tensor, bias: bool) -> _Standard:
        x = features.detach().to("cpu", torch.float64)
        centre = x.mean(0) if bias else torch.zeros(x.shape[1], dtype=x.dtype)
        scale = (x - centre).square().mean(0).sqrt()
        scale = torch.where(scale > 1e-6 * scale.max(), scale, 1.0)
        x = (x - centre) / scale
        return cls(
            torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else x, centre, scale, bias
        )

    def head(self, solved: Tensor) -> Head:
        """Weight and bias, float64, for the features as they are, from weights [outputs, columns] for `x`."""
        weight = solved[:, : len(self.scale)] / self.scale
        return weight, solved[:, -1] - weight @ self.centre if self.bias else None


def _fit_logistic(
    features: Tensor, y: Tensor, held: Tensor, classes: int, losses: Losses, bias: bool, tolerance: float
) -> Head:
    """The logistic regression whose loss of each row is `losses` of its logits; see `_choose_penalty`."""
    space = _Standard.of(features, bias)
    start, penalty = _choose_penalty(space.x.float(), y, held, classes, losses, bias, tolerance)
    weight, offset = space.head(_solve(space.x, y, start.double(), penalty, losses, bias))
    return weight.float(), None if offset is None else offset.float()


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


def _binary_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none").sum(1)


def warm_start(base_model: nn.Module, head_name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Write the probe into the model's final linear layer, in place; without `bias` its bias becomes zero.

    The layer is in float32 from then on: in half precision numbers about 2,000 would be told to the next 8.
    """
    head = cast(nn.Linear, base_model.get_submodule(head_name))
    if head.weight.shape != weight.shape:
        raise ModelError(
            f"{head_name} has shape {tuple(head.weight.shape)}, the stored head {tuple(weight.shape)}"
        )
    widen(head)
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


def _choose_penalty(
    x: Tensor,
    y: Tensor,
    held: Tensor,
    outputs: int,
    losses: Losses,
    bias: bool,
    tolerance: float,
) -> tuple[Tensor, float]:
    """A penalty, and the solution it gave on the rows that were not held out.

    The strongest whose mean loss on the held-out rows is within so many standard errors of the least
    (one: Breiman et al., 1984): where the data cannot tell, the head that leaves more to fine-tuning.
    """
    solved = torch.zeros(outputs, x.shape[1], dtype=x.dtype)
    if not held.any():
        return solved, _PENALTIES[0]
    tried: list[tuple[float, Tensor, float]] = []
    least, margin = float("inf"), 0.0
    for penalty in _PENALTIES:
        solved = _solve(x[~held], y[~held], solved, penalty, losses, bias)
        errors = losses(x[held] @ solved.T, y[held]).double()
        error = float(errors.mean())
        if error > least:
            break  # along the penalties the error has one valley
        least, margin = error, float(errors.std(correction=0)) / len(errors) ** 0.5
        tried.append((error, solved, penalty))
    return next(
        (solution, penalty) for error, solution, penalty in tried if error <= least + tolerance * margin
    )


def _solve(x: Tensor, y: Tensor, start: Tensor, penalty: float, losses: Losses, bias: bool) -> Tensor:
    """Minimise mean loss + penalty / 2 · |weights|², from `start`; a bias is not penalised."""
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
        loss = losses(x @ weights.T, y).mean() + 0.5 * penalty * squares
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()
