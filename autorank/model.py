"""The frozen base model: loaded once, checked, ready for adapters. transformers' home.

Finds no files (origin.py), chooses no layers (targets.py) and never trains.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from autorank import targets as layers
from autorank.errors import ModelError, first_line
from autorank.generate import Writer, decoder_start
from autorank.languages import Languages, set_languages
from autorank.origin import Origin, check_source, complete, preview
from autorank.pixels import Eye
from autorank.placement import find_device, place
from autorank.plan import LayerSpec

__all__ = ["Base", "check_source", "find_groups", "load_base", "not_adapted", "resolve_targets"]

# Tokenizers without a limit say a number of this size or far above it.
_NO_LIMIT = 1_000_000
_PURPOSES = {
    "AutoModelForSequenceClassification": "sequence classification",
    "AutoModelForTokenClassification": "token classification",
    "AutoModelForQuestionAnswering": "question answering",
    "AutoModelForCausalLM": "causal language modelling",
    "AutoModelForSeq2SeqLM": "sequence to sequence",
    "AutoModelForImageClassification": "image classification",
}
_SEEING = ("AutoModelForImageClassification",)


@dataclass
class Base:
    """A base model on its devices, in eval mode, every parameter frozen.

    `fresh` names the modules whose weights the checkpoint lacks, initialised from the seed: heads
    and poolers, to be trained in full; `resized` are those of them that it has in another size.
    `processor` makes inputs of rows: a tokenizer, or an `Eye` where the model reads images, which have
    no `pad_token_id` (0) and no `max_length`, the most tokens that model and tokenizer take.
    `recomputes` where a training step computes activations twice, in training mode, and keeps few.
    `languages` are those that it translates, where its tokenizer knows several.
    """

    model: PreTrainedModel
    processor: PreTrainedTokenizerBase | Eye
    source: str
    path: str
    revision: str
    fresh: tuple[str, ...]
    devices: tuple[torch.device, ...]
    pad_token_id: int
    max_length: int
    recomputes: bool = False
    languages: Languages | None = None
    resized: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs, and gives its outputs; one of several that hold its layers."""
        return self.devices[0]

    @property
    def decoder_start(self) -> int | None:
        """The token that an encoder-decoder's decoder is given first; None where the model names none."""
        return decoder_start(self.model, self.languages)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor of a model that reads text; no other model may be asked for it."""
        assert not isinstance(self.processor, Eye), f"{self.source} reads images"
        return self.processor

    @property
    def writer(self) -> Writer | None:
        """Lets the model write, with whatever adapter is on it; None where it reads images."""
        if isinstance(self.processor, Eye):
            return None
        return Writer(self.model, self.processor, self.pad_token_id, self.max_length, self.languages)


def load_base(
    source: str,
    *,
    auto_class: str,
    model_kwargs: dict[str, Any],
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    source_language: str | None = None,
    target_language: str | None = None,
    check: Callable[[PreTrainedTokenizerBase], object] | None = None,
) -> Base:
    """Load a base model and its tokenizer or image processor, and freeze it.

    Modules that the checkpoint lacks are initialised on the CPU from `seed`; the caller's random
    streams are left as they were. A head of another size than asked for is initialised anew.

    Args:
        source: a folder, a hub id, or `builtin:minilm`.
        auto_class: `AutoModelForSequenceClassification`, `AutoModelForTokenClassification`,
            `AutoModelForQuestionAnswering`, `AutoModelForCausalLM`, `AutoModelForSeq2SeqLM` or
            `AutoModelForImageClassification`.
        model_kwargs: what the task adds to the configuration: `num_labels`, `id2label`, `label2id`,
            `problem_type`.
        device: see `placement.place`; `auto` is CUDA where there is one, else the CPU.
        dtype: `auto` is float32; bfloat16 for a checkpoint in half precision on a CUDA device that has it.
        trust_remote_code: run code that comes with the model.
        gradient_checkpointing: compute activations once more in the backward pass, to keep few of them.
        seed: for fresh modules.
        source_language: what an encoder-decoder reads, where its tokenizer knows several languages.
        target_language: what it writes there.
        check: is given the tokenizer, if the model reads text, before any weight is fetched or read, which
            may take long; what it raises goes on.

    Raises:
        ModelError: anything that makes the source, the device, the dtype or a language unusable.
    """
    if auto_class != "AutoModelForSeq2SeqLM" and (source_language or target_language):
        raise ModelError(
            f"source_language and target_language are for an encoder-decoder that translates, not for "
            f"{_PURPOSES[auto_class]}: leave them out"
        )
    found = find_device(device)
    seen = preview(source)
    precision = _dtype(dtype, found, seen)
    load = partial(
        _load,
        auto_class=auto_class,
        model_kwargs=model_kwargs,
        dtype=precision,
        trust_remote_code=trust_remote_code,
        seed=seed,
    )
    tokenizer = None
    if auto_class not in _SEEING:
        try:
            tokenizer = _load_tokenizer(seen, trust_remote_code)
        except ModelError:
            load(complete(seen))  # a model that is none for the task says so first
            raise
        _ensure_padding(source, tokenizer)
        if check is not None:
            check(tokenizer)
    origin = complete(seen)
    model, missing, other = load(origin)
    processor = _load_eye(origin, trust_remote_code, model) if tokenizer is None else tokenizer
    fresh = _fresh_modules(model, missing | other)
    _check_fresh(origin, model, fresh, headless="num_labels" not in model_kwargs)
    pad_token_id, limit = 0, _NO_LIMIT
    if tokenizer is not None:
        _check_vocabulary(source, model, tokenizer)
        pad_token_id = _tell_padding(model, tokenizer)
        limit = _length_limit(model, tokenizer)
    languages = None
    if auto_class == "AutoModelForSeq2SeqLM":
        languages = set_languages(source, processor, model, source_language, target_language)
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        _recompute(source, model)
    devices = place(model, source, device)
    if auto_class == "AutoModelForCausalLM":
        _check_causal(source, model)
    return Base(
        model,
        processor,
        source,
        str(origin.folder),
        origin.revision,
        fresh,
        devices,
        pad_token_id,
        limit,
        gradient_checkpointing,
        languages,
        tuple(name for name in fresh if any(key.startswith(f"{name}.") for key in other)),
    )


def find_groups(base: Base) -> dict[str, tuple[LayerSpec, ...]]:
    """The named groups of layers this model has; see `targets.find_groups`."""
    return layers.find_groups(base.model, base.fresh)


def resolve_targets(base: Base, targets: Sequence[str] | str) -> tuple[LayerSpec, ...]:
    """The layers a user's choice names; see `targets.resolve_targets`."""
    return layers.resolve_targets(base.model, targets, base.fresh)


def not_adapted(base: Base) -> tuple[str, ...]:
    """One line for each kind of weight that gets no adapter; see `targets.not_adapted`."""
    return layers.not_adapted(base.model)


def _dtype(name: str, device: torch.device, origin: Origin) -> torch.dtype:
    """The dtype of that name, if the device can train with it."""
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        stored = str(origin.config.get("dtype") or origin.config.get("torch_dtype"))
        half = stored.removeprefix("torch.") in ("bfloat16", "float16")
        return torch.bfloat16 if half and device.type == "cuda" and has_bfloat16 else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype {name!r} is not known: it is auto, float32, bfloat16 or float16")
    if name == "float16" and device.type == "cpu":
        raise ModelError("dtype float16 is not supported on the cpu: use bfloat16 or float32")
    if name == "bfloat16" and not has_bfloat16:
        raise ModelError(f"dtype bfloat16 is not supported on {device}: use float32 or float16")
    return cast(torch.dtype, getattr(torch, name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own reports and bars off the terminal: what matters in them is an error here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@_quiet()
def _load(
    origin: Origin,
    auto_class: str,
    model_kwargs: dict[str, Any],
    dtype: torch.dtype,
    trust_remote_code: bool,
    seed: int,
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model on the CPU, the parameters that its checkpoint lacks, and those it has in another size."""
    # Seeding the CPU's generator alone: torch.manual_seed would seed every device, and fork_rng
    # gives back only what it was told about.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model, info = getattr(transformers, auto_class).from_pretrained(
                origin.folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **model_kwargs,
            )
        except Exception as error:
            raise _not_loadable(origin, auto_class, error) from error
    carried = sorted(key for key in info["unexpected_keys"] if ".lora_" in key or ".base_layer." in key)
    if carried:
        raise ModelError(
            f"{origin.source} already carries an adapter (its weights hold {carried[0]}): merge it into "
            "the model first, or give the base model"
        )
    for module in model.modules():  # an encoder-decoder's decoder has a configuration of its own
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr] # keys and values serve no training
    return model, set(info["missing_keys"]), {key for key, *_ in info["mismatched_keys"]}


def _not_loadable(origin: Origin, auto_class: str, error: Exception) -> ModelError:
    """What a failure of transformers' loader means for the person who named the model."""
    source, text = origin.source, str(error)
    kind = origin.config.get("model_type", "unknown")
    if "trust_remote_code" in text:
        return ModelError(
            f"{source} needs code of its own to run, which came with it: read that code, and if you trust it "
            "add --set trust_remote_code=true"
        )
    if "Unrecognized configuration class" in text:
        wanted = _PURPOSES.get(auto_class, auto_class)
        return ModelError(
            f"{source} is a {kind} model, which transformers cannot use for {wanted}: give another model, "
            "or another --task"
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return ModelError(
            f"{source} is of model type {kind!r}, which transformers {transformers.__version__} does not "
            "know: update transformers or give another model"
        )
    if isinstance(error, pickle.UnpicklingError):  # its message tells how to run what is in there
        return ModelError(
            f"{source} has weights in the older format, which are damaged or hold more than tensors, and so "
            "could run code: they are not read; give the model as safetensors"
        )
    return ModelError(
        f"{source} could not be loaded: {type(error).__name__}: {first_line(error)}; if its files are "
        "damaged download or save it again, or else give another model"
    )


@_quiet()
def _load_eye(origin: Origin, trust_remote_code: bool, model: PreTrainedModel) -> Eye:
    try:
        # Pillow's way of scaling, though another may be quicker: scores must not depend on what is installed.
        processor = AutoImageProcessor.from_pretrained(
            origin.folder, backend="pil", trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _not_loadable(origin, "", error) from error
        raise ModelError(
            f"{origin.source} has no image processor that can be loaded ({first_line(error)}): save one "
            "beside the model with `processor.save_pretrained`"
        ) from error
    return Eye.of(origin.source, processor, model.dtype, getattr(model.config, "num_channels", 3))


@_quiet()
def _load_tokenizer(origin: Origin, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            origin.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _not_loadable(origin, "", error) from error
        raise ModelError(
            f"{origin.source} has no tokenizer that can be loaded ({first_line(error)}): save one "
            "beside the model with `tokenizer.save_pretrained`"
        ) from error
    # Where no tokenizer files are, transformers makes one that knows its special tokens only.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(
            f"{origin.source} has no tokenizer files: save the tokenizer beside the model with "
            "`tokenizer.save_pretrained`"
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _fresh_modules(model: nn.Module, missing: set[str]) -> tuple[str, ...]:
    """The fewest modules that cover the missing parameters and hold no other."""
    modules = dict(model.named_modules())
    covering: set[str] = set()
    for key in missing & {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        name = key.rpartition(".")[0]
        while "." in name:
            parent = name.rpartition(".")[0]
            if not all(f"{parent}.{inner}" in missing for inner, _ in modules[parent].named_parameters()):
                break
            name = parent
        covering.add(name)
    return tuple(name for name in modules if name in covering)


def _check_fresh(origin: Origin, model: PreTrainedModel, fresh: Sequence[str], *, headless: bool) -> None:
    """A head or a pooler may be missing from a checkpoint; anything else makes the model useless."""
    inner = model.base_model_prefix
    for name in fresh:
        in_body = layers.in_block(model, name) or (name == inner or name.startswith(f"{inner}."))
        if headless or not name or (in_body and "pool" not in name):
            raise ModelError(
                f"{origin.source} does not hold the weights of {name or 'any module'} that "
                f"{type(model).__name__} needs, or holds them in another shape: it is a model for another "
                "task (an encoder classifies; prompts and completions, and plain text, need a causal "
                "language model, sources and targets an encoder-decoder), or incomplete"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{origin.source}: {name} was not loaded (it is on the meta device)")


def _check_vocabulary(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    largest = max(tokenizer.get_vocab().values())
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {source} has token ids up to {largest:,}, its embeddings {rows:,} rows: use "
            "the tokenizer the model was trained with, or resize the embeddings"
        )


def _ensure_padding(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure there is a pad token: the end-of-text token if no other."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {source} has neither a pad token nor an end-of-text token: set "
                "`pad_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token


def _tell_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make sure that the model knows the pad token; its id."""
    pad_token_id = int(cast(int, tokenizer.pad_token_id))
    # Decoders with a classification head look for the last token that is not this one.
    model.config.pad_token_id = pad_token_id
    model.config.get_text_config().pad_token_id = pad_token_id
    return pad_token_id


def _recompute(source: str, model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{source} is a {type(model).__name__}, which has no gradient checkpointing: leave it out, or "
            "lower --batch-size or --max-length"
        )
    # The second name is that of earlier versions.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # The other kind wants gradients of a frozen input.
    enable({"use_reentrant": False})


def _length_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens of an input: the least of what the tokenizer and the position embeddings allow."""
    limits = [int(tokenizer.model_max_length)]
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
    return min(*limits, _NO_LIMIT)


@torch.no_grad()
def _check_causal(source: str, model: PreTrainedModel) -> None:
    """Refuse a model whose tokens see the ones after them: its loss would mean nothing."""
    ids = torch.tensor([[1] + 7 * [2], [1] + 7 * [3]], device=model.device)
    ids %= cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    if (first[0] - first[1]).abs().max() > tolerance * first.abs().max():
        raise ModelError(
            f"{source} is no causal language model: what it predicts depends on later tokens; "
            "give a decoder, or --task text-classification"
        )
