"""The layers of a model that may carry an adapter: the named groups, and what a user's choice names.

Reads a module's tree and nothing else: it loads no model and knows no budget. Layers are Linear
and Conv1D layers by full name; never a head, a tied layer, an embedding or a fused expert.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from autorank.errors import ModelError
from autorank.plan import LayerSpec

__all__ = ["GROUPS", "find_groups", "in_block", "not_adapted", "resolve_targets"]

GROUPS = ("attention", "mlp", "all-linear", "query-value")

# What the query and value projections are called, fused ones last: with those, the fused layer is the pair.
_QUERY_VALUE = (
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("qkv",),
)
_HEADS = ("classifier", "classification_head", "score", "lm_head", "embed_out", "qa_outputs", "logits_proj")
# Their `out_proj` is handed to a kernel as a weight; PEFT 0.21 refuses an adapter on it.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_PATTERN_SIGNS = re.compile(r"[*+?^$|()\[\]{}\\]")


def find_groups(model: nn.Module, fresh: Sequence[str] = ()) -> dict[str, tuple[LayerSpec, ...]]:
    """The named groups this model has, in the order of `GROUPS`, each with its layers in model order.

    A group holds layers of the numbered blocks only: `all-linear` every Linear and Conv1D there,
    `attention` those under a part called attention, `mlp` the rest where there is attention,
    `query-value` the two projections, or the fused one. A group equal to `all-linear`, or to
    one before it, is left out.

    Args:
        model: the base model, without an adapter.
        fresh: names of the modules that are trained in full.

    Raises:
        ModelError: the model already carries an adapter, has no weights, or has no such layer.
    """
    groups = _Tree(model, tuple(fresh)).groups
    if not groups:
        why = "".join(f"; {note}" for note in not_adapted(model))
        raise ModelError(
            f"{type(model).__name__} has no layer that can carry an adapter: it needs numbered blocks with "
            f"Linear or Conv1D layers that share no weights{why}"
        )
    return groups


def resolve_targets(
    model: nn.Module, targets: Sequence[str] | str, fresh: Sequence[str] = ()
) -> tuple[LayerSpec, ...]:
    """The layers that a user's choice names, in model order, each once.

    A list holds group names and module names, matched as PEFT does: the full name, or its end after
    a dot. An entry takes its matches inside the numbered blocks; where it has none there, those
    outside, so `dense` leaves BERT's pooler alone and `pooler.dense` takes it. A string is a group
    name, or else a regular expression that must match full names; heads are left out of its matches.

    Args:
        model: the base model, without an adapter.
        targets: the list or the string.
        fresh: names of the modules that are trained in full.

    Raises:
        ModelError: an entry matches nothing or nothing that can carry an adapter, only a head, a
            tied layer or a layer that stands at two places; the expression is invalid.
    """
    tree = _Tree(model, tuple(fresh))
    chosen: set[str] = set()
    for entry in [targets] if isinstance(targets, str) else targets:
        if entry in GROUPS:
            chosen.update(_by_group(tree, entry))
        else:
            chosen.update((_by_regex if isinstance(targets, str) else _by_name)(tree, entry))
    if not chosen:
        raise ModelError(
            "no target modules were named: name a group or modules, or leave --target-modules out"
        )
    if chosen <= tree.heads:
        raise ModelError(
            f"only the head, {_list(sorted(chosen))}, matches {_shown(targets)}: name layers inside the model"
            f", such as {_list(tree.suffixes)}, or a group: {', '.join(tree.groups)}"
        )
    return tuple(tree.spec(name) for name in tree.modules if name in chosen)


def not_adapted(model: nn.Module) -> tuple[str, ...]:
    """One line for each kind of weight that looks like a layer but gets no adapter."""
    counted: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, parameter in _stacks(model):
        kind = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), tuple(parameter.shape))
        counted[kind] = counted.get(kind, 0) + 1
    notes = [
        f"not adapted: {name} ({count} {_kind_of(name)}s of shape {'x'.join(map(str, shape))}; "
        "they are no Linear layers)"
        for (name, shape), count in counted.items()
    ]
    past = [name for name, module in model.named_modules() if _carries(module) and _read_past(model, name)]
    if past:
        notes.append(f"not adapted: {_list(past, 1)} (fused kernels read the weight past any adapter)")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if convolutions:
        notes.append(f"not adapted: {_list(convolutions, 1)} (Conv2d; adapters go on Linear layers)")
    return tuple(notes)


def in_block(model: nn.Module, name: str) -> bool:
    """Whether the module stands inside a numbered block: an element of a ModuleList."""
    return _block_end(model, name) is not None


def _block_end(model: nn.Module, name: str) -> int | None:
    """How many parts of the name lead to the first numbered block, or None outside of all."""
    parts = name.split(".")
    module = model
    for index, part in enumerate(parts):
        if isinstance(module, nn.ModuleList) and part.isdigit():
            return index + 1
        module = module.get_submodule(part)
    return None


def _in_attention(model: nn.Module, name: str) -> bool:
    inner = name.split(".")[_block_end(model, name) :]
    return any("attn" in part.lower() or "attention" in part.lower() for part in inner[:-1])


def _query_value(names: Sequence[str]) -> list[str]:
    for pair in _QUERY_VALUE:
        if all(any(_ends(name, part) for name in names) for part in pair):
            return [name for name in names if any(_ends(name, part) for part in pair)]
    return []


@dataclass(frozen=True)
class _Tree:
    """What a model's module tree says about its layers; every set is worked out once."""

    model: nn.Module
    fresh: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
                raise ModelError(
                    f"the model already carries an adapter, at {name}: give the base model, or merge the "
                    "adapter into it first"
                )
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise ModelError(
                    f"{name} has no weights here, it is on the meta device (offloaded or never loaded): "
                    "load the whole model onto one device"
                )

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def heads(self) -> frozenset[str]:
        """Layers of the head: the output layer, what is trained in full, what lies behind the inner model."""
        inner = getattr(self.model, "base_model_prefix", "")
        inner = inner if inner in self.modules else ""

        def is_head(name: str) -> bool:
            if name == self.output or any(_under(name, top) for top in self.fresh):
                return True
            if inner:
                return not _under(name, inner) and "pooler" not in name
            return name.split(".")[0] in _HEADS

        return frozenset(
            name for name in self.modules if name and is_head(name) and not in_block(self.model, name)
        )

    @cached_property
    def output(self) -> str | None:
        """The output layer of a language model; it is trained only if its adapter was asked for."""
        module = getattr(self.model, "get_output_embeddings", lambda: None)()
        return next((name for name, other in self.modules.items() if other is module), None)

    @cached_property
    def partners(self) -> dict[str, str]:
        """Module → the module that shares its weight, or that is the same object at another place."""
        first: dict[int, str] = {}
        shared: dict[str, str] = {}
        for name, module in self.modules.items():
            weight = module._parameters.get("weight")
            if weight is None:
                continue
            other = first.setdefault(id(weight), name)
            if other != name:
                shared[name] = other
                shared.setdefault(other, name)
        return shared

    @cached_property
    def usable(self) -> tuple[str, ...]:
        """Layers that may carry an adapter, in model order."""
        return tuple(
            name
            for name, module in self.modules.items()
            if _carries(module)
            and name not in self.partners
            and name not in self.heads
            and not _read_past(self.model, name)
        )

    @cached_property
    def groups(self) -> dict[str, tuple[LayerSpec, ...]]:
        layers = [name for name in self.usable if in_block(self.model, name)]
        attention = [name for name in layers if _in_attention(self.model, name)]
        found = {
            "attention": attention,
            "mlp": [name for name in layers if name not in set(attention)] if attention else [],
            "all-linear": layers,
            "query-value": _query_value(attention),
        }
        kept: dict[str, tuple[LayerSpec, ...]] = {}
        for group in GROUPS:
            specs = tuple(self.spec(name) for name in found[group])
            twin = specs in kept.values() or (group != "all-linear" and found[group] == layers)
            if specs and not twin:
                kept[group] = specs
        return kept

    @cached_property
    def suffixes(self) -> list[str]:
        return _last_parts(self.usable)

    @cached_property
    def stacks(self) -> tuple[str, ...]:
        return tuple(name for name, _ in _stacks(self.model))

    def spec(self, name: str) -> LayerSpec:
        module = self.modules[name]
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            return LayerSpec(name, in_features, out_features)
        assert isinstance(module, nn.Linear)
        return LayerSpec(name, module.in_features, module.out_features)

    def refuse_shared(self, names: Iterable[str]) -> None:
        for name in names:
            partner = self.partners.get(name)
            if partner is None:
                continue
            if self.modules[partner] is self.modules[name]:
                raise ModelError(
                    f"{name} and {partner} are one module used twice: an adapter on one would change both; "
                    "leave it out of the target modules"
                )
            raise ModelError(
                f"{name} shares its weight with {partner} (tied weights): an adapter on one alone cannot be "
                "merged; leave it out of the target modules"
            )


def _by_group(tree: _Tree, group: str) -> set[str]:
    if group not in tree.groups:
        raise ModelError(f"this model has no group {group!r} of its own: it has {', '.join(tree.groups)}")
    return {layer.name for layer in tree.groups[group]}


def _by_name(tree: _Tree, entry: str) -> set[str]:
    """The layers that one entry of a list names."""
    matches = [name for name in tree.modules if name and _ends(name, entry)]
    if not matches:
        raise ModelError(_nothing_matches(tree, entry))
    layers = _layers_among(tree, f"target module {entry!r}", matches)
    layers = [name for name in layers if in_block(tree.model, name)] or layers
    tree.refuse_shared(layers)
    trained = [name for name in layers if name in tree.heads and name != tree.output]
    if trained:
        raise ModelError(
            f"target module {entry!r} is {trained[0]}, which belongs to the head and is trained in full: "
            f"leave it out; layers here are {_list(tree.suffixes)}"
        )
    return set(layers)


def _by_regex(tree: _Tree, expression: str) -> set[str]:
    """The layers whose full name the expression matches, heads left out where others match too."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ModelError(
            f"the regular expression {expression!r} for the target modules is invalid: {error}; "
            "for plain names give a list"
        ) from None
    matches = [name for name in tree.modules if name and pattern.fullmatch(name)]
    if not matches:
        ending = any(_ends(name, expression) for name in tree.usable)
        if "," in expression and not any(sign in expression for sign in "{[("):
            joined = "|".join(part.strip().removeprefix(".*") for part in expression.split(","))
            raise ModelError(
                f"the regular expression {expression!r} matches no module: a comma joins names, not "
                f"expressions; give names alone, or one expression such as '.*({joined})'"
            )
        hint = f"; give the list [{expression}], or '.*{expression}'" if ending else _close(tree, expression)
        raise ModelError(
            f"the regular expression {expression!r} matches no module: it must match full names, such as "
            f"{_list(tree.usable[:2])}{hint}"
        )
    layers = _layers_among(tree, f"the regular expression {expression!r}", matches)
    layers = [name for name in layers if name not in tree.heads] or layers
    tree.refuse_shared(layers)
    return set(layers)


def _layers_among(tree: _Tree, what: str, matches: Sequence[str]) -> list[str]:
    """The matches that can carry an adapter; an error that says what the others are if there is none."""
    layers = [name for name in matches if _carries(tree.modules[name])]
    open_to_adapters = [name for name in layers if not _read_past(tree.model, name)]
    if open_to_adapters:
        return open_to_adapters
    if layers:
        raise ModelError(
            f"{what} matches only {_list(layers, 3)}, whose weight kernels of this architecture read past "
            f"any adapter: layers here are {_list(tree.suffixes)}"
        )
    within = _last_parts(name for name in tree.usable if any(_under(name, match) for match in matches))
    if any(_under(name, match) for name in tree.stacks for match in matches):
        kinds = f"{_kind_of(matches[0])}s, which are not adapted"
    else:
        kinds = ", ".join(sorted({type(tree.modules[name]).__name__ for name in matches}))
    raise ModelError(
        f"{what} matches only {_list(matches, 3)} ({kinds}): adapters go on Linear layers, and GPT-2's "
        f"Conv1D; layers {'under it' if within else 'here'} are {_list(within or tree.suffixes)}"
    )


def _nothing_matches(tree: _Tree, entry: str) -> str:
    stacked = [name for name in tree.stacks if _ends(name, entry)]
    if stacked:
        why = f"is {stacked[0]}, a {_kind_of(stacked[0])} and no Linear layer: it is not adapted"
    elif _PATTERN_SIGNS.search(entry):
        why = (
            "looks like a regular expression, but entries of a list are names: give the expression alone, as "
            "one string, or list names"
        )
    else:
        why = f"matches no module of {type(tree.model).__name__}{_close(tree, entry)}"
    return f"target module {entry!r} {why}; layers here are {_list(tree.suffixes)}"


def _close(tree: _Tree, word: str) -> str:
    """A hint with the names nearest to `word`, or nothing."""
    endings = dict.fromkeys(".".join(name.split(".")[-count:]) for count in (1, 2, 3) for name in tree.usable)
    close = difflib.get_close_matches(word, [e for e in (*endings, *GROUPS) if not e[0].isdigit()], n=3)
    return f"; close names: {', '.join(close)}" if close else ""


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters in the blocks that hold several matrices, such as one for each expert."""
    for name, module in model.named_modules():
        if in_block(model, name) and not isinstance(module, _ConvNd):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield f"{name}.{key}", parameter


def _kind_of(name: str) -> str:
    return "fused expert parameter" if "expert" in name else "three-dimensional parameter"


def _carries(module: nn.Module) -> bool:
    # The output projection of nn.MultiheadAttention is a Linear that is never called: an adapter
    # there would do nothing.
    return (
        isinstance(module, nn.Linear | Conv1D) and type(module).__name__ != "NonDynamicallyQuantizableLinear"
    )


def _read_past(model: nn.Module, name: str) -> bool:
    """Whether fused kernels use a layer's weight without calling it; PEFT refuses these."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in _MAMBA and _ends(name, "out_proj")


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _under(name: str, top: str) -> bool:
    return name == top or name.startswith(top + ".")


def _last_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _list(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _shown(targets: Sequence[str] | str) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(map(repr, targets))
