"""PEFT's only home: an adapter put on the frozen base model, read back, saved, loaded, removed.

How ranks change is not decided here; `resize.py` changes the live layers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autorank.errors import ModelError, StudyError
from autorank.growth import plain_components
from autorank.plan import RankPlan, alpha_for
from autorank.resize import LoraLayer, drawn_factor, drawn_features, factors, has_left, leave, reshape, revive

__all__ = [
    "Adapter",
    "adapter_config",
    "can_resize",
    "config_for",
    "config_owners",
    "factor_keys",
    "follow_plan",
    "idle_layers",
    "load_adapter",
    "lora_config",
    "lora_layers",
    "save_adapter",
    "take_plan",
    "widen",
    "wrapped_modules",
]

WEIGHTS = "adapter_model.safetensors"
# PEFT's class for this type calls the model without its token types and positions, so that a BERT
# would say something else in it: such adapters are of no type, and PEFT's plain class passes all on.
_LOSSY_TYPE = "QUESTION_ANS"
_PLAN_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")


def lora_config(
    plan: RankPlan,
    *,
    modules_to_save: Sequence[str],
    task_type: str | None,
    base_name: str | None,
    dropout: float = 0.0,
) -> peft.LoraConfig:
    """The one place where a `LoraConfig` is made.

    PEFT reads pattern keys as regexes matched against a suffix of the module's name, the first
    hit winning: so both patterns are always written, keyed by `^` and the escaped full name.
    Layers at rank 0 are no targets.
    """
    live = plan.live
    if not live:
        raise ModelError("every layer of the plan is at rank 0: there is no adapter to build")
    largest = max(plan.ranks.values())
    return peft.LoraConfig(
        task_type=None if task_type == _LOSSY_TYPE else task_type,
        base_model_name_or_path=base_name,
        r=largest,
        lora_alpha=cast(int, alpha_for(plan.scaling, largest)),
        target_modules=[layer.name for layer in live],
        rank_pattern={f"^{re.escape(layer.name)}": plan.ranks[layer.name] for layer in live},
        alpha_pattern={
            f"^{re.escape(layer.name)}": alpha_for(plan.scaling, plan.ranks[layer.name]) for layer in live
        },
        modules_to_save=list(modules_to_save) or None,
        lora_dropout=dropout,
    )


def lora_layers(model: nn.Module, name: str = "default", *, live: bool = True) -> dict[str, LoraLayer]:
    """The layers that carry the adapter `name`, by their full name in the base model, in its order.

    With `live=False` also those at rank 0 now: every layer that PEFT has wrapped or, on a model with
    other adapters, those that this one has left.
    """
    wrapped = {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if isinstance(module, PeftLoraLayer)
    }
    alone = all(module.scaling.keys() <= {name} for module in wrapped.values())

    def at_zero(module: PeftLoraLayer) -> bool:
        return alone or has_left(cast(LoraLayer, module), name)

    return {
        key: cast(LoraLayer, module)
        for key, module in wrapped.items()
        if name in module.scaling or (not live and at_zero(module))
    }


def idle_layers(modules: Mapping[str, LoraLayer], name: str = "default") -> tuple[str, ...]:
    """Those of the live layers that have learnt nothing: what starts at 0 is still 0, or is not finite."""
    found = []
    for key, module in modules.items():
        a, b = factors(module, name)
        factor = (b if drawn_factor(module) == "a" else a).detach()
        if not bool(factor.any()) or not bool(factor.isfinite().all()):
            found.append(key)
    return tuple(found)


def can_resize(layer: LoraLayer) -> bool:
    """Whether the layer is linear or an embedding, and A and B are two matrices that act on its input."""
    if isinstance(cast(object, layer), (AdaLoraLayer, ParamWrapper)):
        return False
    base = layer.get_base_layer()
    # Conv1D is transformers'; the linear layers of quantised models have many homes and this in common.
    named = type(base).__name__ == "Conv1D" or "Linear" in type(base).__name__
    return named or isinstance(base, (nn.Linear, nn.Embedding))


def config_owners(model: nn.Module, name: str = "default") -> tuple[nn.Module, ...]:
    """The modules that keep PEFT's configuration of an adapter: the model, or parts of it that it wraps.

    Those within another one share its configuration and are left out.
    """
    found: dict[str, nn.Module] = {}
    for key, module in model.named_modules():
        within = any(not outer or key.startswith(f"{outer}.") for outer in found)
        if not within and name in (getattr(module, "peft_config", None) or {}):
            found[key] = module
    return tuple(found.values())


def adapter_config(model: nn.Module, name: str = "default") -> peft.LoraConfig:
    """The configuration that PEFT keeps of an adapter on this model; a plain one where it keeps none."""
    configs = [cast(Any, owner).peft_config[name] for owner in config_owners(model, name)]
    return configs[0] if configs and isinstance(configs[0], peft.LoraConfig) else peft.LoraConfig()


def follow_plan(model: nn.Module, name: str, plan: RankPlan) -> None:
    """Make the model's PEFT configuration say what its layers are, so that `save_pretrained` is right.

    The plan names layers as they stand in `model`, the configuration as they stand in its owner.
    """
    owners = config_owners(model, name)
    if not owners:
        return
    config = adapter_config(model, name)
    inner = {id(module): key for key, module in lora_layers(owners[0], name, live=False).items()}
    names = {key: inner[id(module)] for key, module in lora_layers(model, name, live=False).items()}
    for field, value in _plan_fields(_renamed(plan, names)).items():
        setattr(config, field, value)


def _renamed(plan: RankPlan, names: Mapping[str, str]) -> RankPlan:
    layers = tuple(replace(layer, name=names[layer.name]) for layer in plan.layers)
    return RankPlan(layers, {names[name]: rank for name, rank in plan.ranks.items()}, plan.scaling)


def config_for(config: Mapping[str, Any], plan: RankPlan) -> dict[str, Any]:
    """A configuration as PEFT stores it, made to say another plan."""
    fields = _plan_fields(plan)
    return {**config, **fields, "target_modules": sorted(fields["target_modules"])}


def _plan_fields(plan: RankPlan) -> dict[str, Any]:
    """What a plan decides of a `LoraConfig`."""
    config = lora_config(plan, modules_to_save=(), task_type="CAUSAL_LM", base_name=None)
    return {field: getattr(config, field) for field in _PLAN_FIELDS}


def factor_keys(layer: str) -> tuple[str, str]:
    """What an adapter's file calls A and B of a layer."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


def take_plan(model: nn.Module, name: str, plan: RankPlan) -> None:
    """Give an adapter that is on a model the plan's ranks; its tensors are yet to be loaded.

    Parameters are replaced, so no optimizer may hold them yet.

    Raises:
        ModelError: the model's adapter has other layers than the plan, or another scaling.
    """
    modules = lora_layers(model, name, live=False)
    live = lora_layers(model, name)
    other = sorted(modules.keys() ^ plan.ranks.keys())
    if other or not live:
        raise ModelError(
            f"the stored plan and the model's adapter {name!r} differ in {len(other)} layers"
            f"{f', such as {other[0]}' if other else ''}: put the adapter on as for the first start"
        )
    scalings = {module.scaling[name] for module in live.values()}
    if not all(math.isclose(scaling, plan.scaling, rel_tol=1e-6) for scaling in scalings):
        raise ModelError(
            f"the stored plan's scaling is {plan.scaling:g}, the model's {min(scalings):g}: put the "
            "adapter on with the alpha and rank of the first start"
        )
    like = factors(next(iter(live.values())), name)[0].detach()
    for layer, rank in plan.ranks.items():
        module = modules[layer]
        if layer in live:
            reshape(module, name, rank)
        elif rank:
            rows = torch.zeros(rank, drawn_features(module))
            revive(module, name, adapter_config(model, name), rows, plan.scaling, like)
    follow_plan(model, name, plan)


class Adapter:
    """One LoRA adapter on the shared, frozen base model, with its own copy of the head.

    While it is on, the base model's forward runs through it; where several are on, `routing.py` says
    which. Once all are removed the base model is as it was, bit for bit.

    Args:
        base: the base model; its layers are wrapped in place.
        plan: ranks and scaling; layers at rank 0 are left alone.
        modules_to_save: heads and other modules that are trained in full, as copies.
        task_type: PEFT's, such as `SEQ_CLS`; None where it has none.
        seed: seeds A; B starts at zero.
        name: PEFT's name of the adapter.
        dropout: a module that what the adapter reads goes through, one for all its layers.

    Raises:
        ModelError: the layers do not come out with the plan's ranks and scaling.
    """

    def __init__(
        self,
        base: nn.Module,
        plan: RankPlan,
        *,
        modules_to_save: Sequence[str],
        task_type: str | None,
        seed: int,
        name: str = "default",
        dropout: nn.Module | None = None,
    ) -> None:
        self.name = name
        self._dropout = dropout
        self._base = base
        # Layers at rank 0 are wrapped as well, for a rank may move to them.
        wrapped = plan.with_ranks({layer: max(rank, 1) for layer, rank in plan.ranks.items()})
        config = lora_config(
            wrapped,
            modules_to_save=modules_to_save,
            task_type=task_type,
            base_name=getattr(base, "name_or_path", None) or None,
        )
        try:
            self._put_on(config, plan, seed)
        except BaseException:
            self.remove()
            raise

    def _put_on(self, config: peft.LoraConfig, plan: RankPlan, seed: int) -> None:
        # PEFT draws its initial weights from the global stream; they are drawn anew below.
        with torch.random.fork_rng(devices=[]), _others_trained(self._base), warnings.catch_warnings():
            for expected in (
                "Already found a `peft_config`",
                "You are trying to modify a model with PEFT for",
            ):
                warnings.filterwarnings("ignore", expected, UserWarning)
            # PEFT reads an attribute that transformers has renamed, and says of Conv1D layers what
            # it does by itself: turn the matrix round.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self.model = cast(peft.PeftModel, peft.get_peft_model(self._base, config, adapter_name=self.name))
        for key, parameter in self._base.named_parameters():
            if self.name in key.split("."):  # PEFT trains the copy of a head of the first adapter only
                parameter.requires_grad_(True)
        for layer, module in lora_layers(self._base, self.name).items():
            if plan.ranks[layer] == 0:
                reshape(module, self.name, 0)
        follow_plan(self._base, self.name, plan)
        self._check(plan)
        self._draw(seed)
        self.renew_dropout()
        self._widen_heads()
        self._base.eval()

    def renew_dropout(self) -> None:
        """Give layers that have come back from rank 0 the dropout that all others have."""
        if self._dropout is not None:
            for module in lora_layers(self._base, self.name).values():
                cast(Any, module).lora_dropout[self.name] = self._dropout

    def _widen_heads(self) -> None:
        """Train the head's copy in float32 on a base in half precision, where small steps would vanish."""
        for head in wrapped_modules(self._base)[1].values():
            widen(head.modules_to_save[self.name])

    def _check(self, plan: RankPlan) -> None:
        """Read ranks and scalings back: a pattern that matches nothing is silent in PEFT."""
        wanted = {layer.name: (plan.ranks[layer.name], plan.scaling) for layer in plan.live}
        found = {
            n: (m.r[self.name], m.scaling[self.name]) for n, m in lora_layers(self._base, self.name).items()
        }
        if wanted != found:
            wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
            raise ModelError(
                f"{wrong[0]} came out with (rank, scaling) {found.get(wrong[0])}, "
                f"the plan says {wanted.get(wrong[0])}; {len(wrong)} layers differ"
            )

    def _draw(self, seed: int) -> None:
        """Draw A from a stream of its own; B is zero already."""
        generator = torch.Generator().manual_seed(seed)
        for module in lora_layers(self._base, self.name).values():
            a = cast(nn.Linear, module.lora_A[self.name]).weight
            with torch.no_grad():
                a.copy_(plain_components(a.shape[0], a.shape[1], generator))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The live LoRA parameters by full name, without the adapter's own."""
        return {n: p for n, p in self._trainable().items() if ".lora_" in n}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the modules that are trained in full, by full name, without the adapter's own."""
        return {n: p for n, p in self._trainable().items() if ".lora_" not in n}

    def own_copy(self, name: str) -> nn.Module:
        """This adapter's copy of a module that is trained in full, or of a part of one.

        Raises:
            ModelError: the module is not trained in full.
        """
        for key, head in wrapped_modules(self._base)[1].items():
            if f"{name}.".startswith(f"{key}."):
                copy: nn.Module = head.modules_to_save[self.name].get_submodule(name[len(key) + 1 :])
                return copy
        raise ModelError(f"{name} is not trained in full by this adapter")

    def _trainable(self) -> dict[str, nn.Parameter]:
        """By a name that a stored state has under whatever name its adapter is put on again."""
        own = f".{self.name}."
        named = ((f"{n}.", p) for n, p in self._base.named_parameters() if p.requires_grad)
        return {n.replace(own, ".")[:-1]: p for n, p in named if own in n}

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU of everything the adapter's file holds, by PEFT's names."""
        state = peft.get_peft_model_state_dict(
            self.model, adapter_name=self.name, save_embedding_layers=False
        )
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors from `tensors()` or a file into the live parameters.

        Raises:
            StudyError: names or shapes differ from the live adapter's.
        """
        live = peft.get_peft_model_state_dict(self.model, adapter_name=self.name, save_embedding_layers=False)
        wrong = sorted(
            key
            for key in live.keys() | tensors.keys()
            if key not in live or key not in tensors or live[key].shape != tensors[key].shape
        )
        if wrong:
            raise StudyError(
                f"the adapter's tensors do not fit its plan: {wrong[0]} and {len(wrong) - 1} more"
            )
        with torch.no_grad():
            for key, value in live.items():
                value.copy_(tensors[key])

    def remove(self) -> None:
        """Take the adapter off the base model; with the last one the model is as it was before the first."""
        # PEFT's own unload would leave the trained copy of the head in the base model.
        lora, heads = wrapped_modules(self._base)
        for key, layer in lora.items():
            leave(layer, self.name)
            if not layer.scaling and not any(has_left(layer, name) for name in self._others()):
                self._put_back(key, layer.get_base_layer())
        for key, head in heads.items():
            copies = head.modules_to_save
            if self.name in copies:
                # Or the wrapper would ask the copy that is gone, when another adapter is put on or taken off.
                del copies[self.name]
                head._adapters.discard(self.name)
                if self.name in head.active_adapters:
                    head._active_adapter = []
            if not copies:
                self._put_back(key, cast(nn.Module, head.original_module))
        configs = getattr(self._base, "peft_config", {})
        configs.pop(self.name, None)
        if not configs and hasattr(self._base, "peft_config"):
            del self._base.peft_config
            self._base.requires_grad_(False)
            self._base.zero_grad(set_to_none=True)

    def _others(self) -> list[str]:
        """The names of the other adapters on the base model."""
        return [name for name in getattr(self._base, "peft_config", {}) if name != self.name]

    def _put_back(self, key: str, module: nn.Module) -> None:
        """Put a module of the base model where its wrapper is."""
        parent, _, child = key.rpartition(".")
        setattr(self._base.get_submodule(parent), child, module)


def wrapped_modules(base: nn.Module) -> tuple[dict[str, LoraLayer], dict[str, ModulesToSaveWrapper]]:
    """PEFT's LoRA layers, and its wrappers of modules that are trained in full, by name."""
    lora, heads = dict[str, LoraLayer](), dict[str, ModulesToSaveWrapper]()
    for key, module in base.named_modules():
        if isinstance(module, PeftLoraLayer):
            lora[key] = cast(LoraLayer, module)
        elif isinstance(module, ModulesToSaveWrapper):
            heads[key] = module
    return lora, heads


@contextmanager
def _others_trained(base: nn.Module) -> Iterator[None]:
    """Let PEFT put an adapter on, which freezes all others, and leave those trained that were."""
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def widen(head: nn.Module) -> None:
    """Let a head in half precision hold its weights, and compute, in float32; another is left as it is."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in head.parameters()):
        head.float()
        head.register_forward_pre_hook(_to_float32)


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: floating-point inputs in float32."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    plan: RankPlan,
    *,
    modules_to_save: Sequence[str],
    task_type: str | None,
    base_name: str,
    dropout: float = 0.0,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` in PEFT's own format.

    Args:
        folder: an existing one.
        tensors: by PEFT's names.
        plan: ranks and scaling.
        modules_to_save: what was trained in full.
        task_type: PEFT's.
        base_name: what the configuration calls the base model.
        dropout: what the adapter was trained with, for who trains it on.
    """
    config = lora_config(
        plan, modules_to_save=modules_to_save, task_type=task_type, base_name=base_name, dropout=dropout
    )
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules or ())  # PEFT keeps a set, in any order
    save_file(dict(tensors), str(folder / WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_adapter(
    base: nn.Module, folder: Path, plan: RankPlan, *, modules_to_save: Sequence[str], task_type: str | None
) -> Adapter:
    """Put a saved adapter on the base model.

    Raises:
        StudyError: the file is missing or damaged, or does not fit the plan.
    """
    try:
        tensors = load_file(str(folder / WEIGHTS))
    except Exception as error:
        raise StudyError(
            f"the adapter in {folder} cannot be read ({error}): restore it from a copy, or make it again"
        ) from error
    adapter = Adapter(base, plan, modules_to_save=modules_to_save, task_type=task_type, seed=0)
    try:
        adapter.load(tensors)
    except StudyError as error:
        adapter.remove()
        raise StudyError(
            f"the adapter in {folder} was changed: {error}; restore it from a copy, or make it again"
        ) from error
    return adapter
