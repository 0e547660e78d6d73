"""The preflight: read, load and check everything that a search needs, before anything is written.

What comes out is a `Setup`; no trial is trained here, and no study is known.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autorank import __version__
from autorank.config import Dimension, SpaceConfig, StudyConfig
from autorank.data import DataSet, read_data
from autorank.display import Display
from autorank.engine.memory import HELD, HELD_RECOMPUTING, free_memory, is_full, step_bytes
from autorank.engine.probe import passing_lanes
from autorank.errors import CommandError, DataError, ModelError
from autorank.evaluate import Evaluation, evaluate
from autorank.figures import counted, format_bytes, shortened
from autorank.fingerprint import make_fingerprint
from autorank.gradient import probe_gains
from autorank.head import final_linear
from autorank.lane import Bench, Recipe, TrialSpec
from autorank.model import Base, check_source, find_groups, load_base, not_adapted, resolve_targets
from autorank.plan import LayerSpec, RankPlan
from autorank.schedule import LEAST_INTERVAL, Schedule, make_schedule
from autorank.space import Space, build_space
from autorank.tasks import (
    Example,
    HeadTask,
    Task,
    WritingTask,
    choose_task,
    encode_rows,
    for_model,
    for_rows,
)
from autorank.tasks.causal_lm import CausalLM
from autorank.token_cache import TokenCache
from autorank.train import NotFinite

__all__ = ["Setup", "check_alone", "check_memory", "dry_run", "measure_gains", "prepare"]

_UNBOUNDED = 100_000  # a length that is no limit of the model's, but of what its tokenizer counts with

EPOCHS = 3.0
"""Passes over the training rows where neither steps nor epochs are given."""

FIRST_EVALUATION = 0.25
"""The share of a trial's steps at which it is scored first, and may have to wait for the others."""


@dataclass(frozen=True)
class Setup:
    """What the preflight found: everything a search needs, before anything is written."""

    config: StudyConfig
    data: DataSet
    bench: Bench
    test: tuple[Example, ...]
    space: Space
    fingerprint: dict[str, str]

    @property
    def task(self) -> Task:
        """The task of the study."""
        return self.bench.task

    @property
    def base(self) -> Base:
        """The base model, with its tokenizer or image processor."""
        return self.bench.base

    @property
    def usage(self) -> dict[str, Any]:
        """How the model is asked, for the exports of the study: plain values.

        `columns` that are read of a row, `limit` of tokens, and where text is written `generation`, the
        keywords of `GenerationConfig`, and whether the rows are `chats`.
        """
        base, task = self.base, self.task
        told: dict[str, Any] = {
            "columns": list(getattr(task, "columns", ("image",))),
            "limit": base.max_length,
        }
        if isinstance(task, WritingTask) and base.writer is not None and base.model.can_generate():
            settings = base.writer.settings(task.ends(base.tokenizer))
            told["generation"] = {name: value for name, value in settings.items() if value is not None}
            told["chats"] = isinstance(task, CausalLM) and task.chats(base.tokenizer)
        return told

    def evaluate(self, examples: Sequence[Example]) -> Evaluation:
        """Score the base model, with whatever adapter is on it, in smaller passes where memory runs out."""
        rows = self.config.batch_size
        while True:
            try:
                return evaluate(
                    self.base.model,
                    self.task,
                    examples,
                    batch_size=rows,
                    pad_token_id=self.base.pad_token_id,
                    writer=self.base.writer,
                )
            except Exception as error:
                if not is_full(error) or rows == 1:
                    raise
            free_memory()
            rows = -(-rows // 2)


def prepare(config: StudyConfig, display: Display) -> Setup:
    """Read, load and check everything that a search needs; print what was found."""
    check_alone()
    if config.steps is not None:  # told by the rows else
        _schedule(config, config.steps)
    declared = check_source(config.model)
    data = read_data(
        config.data, eval_fraction=config.eval_fraction, seed=config.seed, columns=config.columns
    )
    is_encoder_decoder = bool(declared.get("is_encoder_decoder"))
    task, why = choose_task(
        config.task,
        data,
        config.metric,
        encoder_decoder=is_encoder_decoder,
        template=config.template,
        packing=config.packing,
    )
    _check_smoothing(config, task)
    counts = f"{len(data.train):,} train, {len(data.validation):,} validation, {len(data.test):,} test rows"
    display.note(f"data {data.source}: {data.format}, {counts}")
    for note in data.notes:
        display.note(note)
    display.note(why)
    base = load_base(
        config.model,
        auto_class=task.auto_class,
        model_kwargs=task.model_kwargs(),
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        source_language=config.source_language,
        target_language=config.target_language,
        # A tokenizer that cannot make examples of such rows is known by the first.
        check=lambda tokenizer: encode_rows(task, data, "train", tokenizer, config.max_length, [0]),
    )
    if base.model.dtype == torch.float16:
        raise ModelError(
            "float16 trains with loss scaling only, which is not supported: give --dtype bfloat16"
        )
    task = for_model(task, base.decoder_start)
    display.note(f"model {base.source}: {_describe_base(base)}")
    if base.languages is not None:
        display.note(f"languages: {base.languages}")
    for note in not_adapted(base):
        display.note(note)
    for name in base.resized:
        display.note(f"{name}, which the model has in another size than this task needs, is made anew")
    space, notes = build_space(
        _space_config(config, task),
        _groups(base, config),
        config.budget,
        has_head=task.outputs > 0,
        max_rank=config.max_rank,
        min_rank=config.min_rank,
    )
    for note in notes:
        display.note(note)
    _check_ranks(config, space)
    task, splits = _encode(config, data, task, base, display)
    if len(splits["train"]) < config.batch_size:
        rows = counted(len(splits["train"]), "row")
        display.note(f"a step takes {rows}, all of train, not {config.batch_size}")
    recipe = _recipe(config, len(splits["train"]), space)
    head = final_linear(base.model, base.fresh, task.outputs) if task.outputs else None
    bench = Bench(base, task, splits["train"], splits["validation"], recipe, head)
    fingerprint = _fingerprint(config, data, task, base, space, recipe)
    return Setup(config, data, bench, splits["test"], space, fingerprint)


def check_alone() -> None:
    """Refuse to be one of the several processes that a launcher of distributed training starts."""
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1:
        raise CommandError(
            f"WORLD_SIZE is {size}: autorank trains in one process, and a launcher such as torchrun has "
            "started several; start `autorank` by itself"
        )


def _check_smoothing(config: StudyConfig, task: Task) -> None:
    """Refuse label smoothing where the targets are no classes."""
    wanted = config.space.label_smoothing
    if wanted is not None and any(wanted.numbers) and not task.smooths:
        raise CommandError(
            f"space.label_smoothing means nothing to the task {task.name}, whose targets are no classes: "
            "leave it out"
        )


def _describe_base(base: Base) -> str:
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    where = ", ".join(map(str, base.devices))
    return f"{type(base.model).__name__}, {parameters:,} parameters, {dtype} on {where}, {base.revision}"


def _groups(base: Base, config: StudyConfig) -> dict[str, tuple[LayerSpec, ...]]:
    """The groups of layers to choose from: those found, or the one that was asked for."""
    wanted = config.target_modules
    if wanted is None:
        return find_groups(base)
    layers = resolve_targets(base, wanted)
    name = wanted if isinstance(wanted, str) else ",".join(wanted)
    return {name: layers}


def _space_config(config: StudyConfig, task: Task) -> SpaceConfig:
    """What the settings say of the space; a head of numbers starts as the probe has it, unless asked.

    A share of a class's logit is the same class, a share of a number is another number.
    """
    wanted = config.space
    if isinstance(task, HeadTask) and task.probe == "ridge" and wanted.head_scale is None:
        return wanted.model_copy(update={"head_scale": Dimension(choices=(1.0,))})
    return wanted


def _check_ranks(config: StudyConfig, space: Space) -> None:
    """Refuse rank limits that no layer can keep."""
    least = min(layer.full_rank for layers in space.groups.values() for layer in layers)
    for key, value in (("min_rank", config.min_rank), ("max_rank", config.max_rank or 0)):
        if value > least:
            raise CommandError(
                f"{key} {value} is above the full rank {least} of the narrowest layer: lower it"
            )
    affordable = min(space.largest_rank(group) for group in space.groups)
    if config.min_rank > affordable:
        raise CommandError(
            f"min_rank {config.min_rank} is more than the budget of {space.budget:,} buys at every group "
            f"(rank {affordable}): lower it or raise --budget"
        )


def _encode(
    config: StudyConfig, data: DataSet, task: Task, base: Base, display: Display
) -> tuple[Task, dict[str, tuple[Example, ...]]]:
    """Tokenise the splits, of which the first settles the task; say what was cut or dropped, and show one."""
    length = min(config.max_length, base.max_length)
    if length < config.max_length:
        display.note(f"texts are cut at {length} tokens, the model's limit, not {config.max_length}")
    cache = TokenCache(base.processor, length)
    splits: dict[str, tuple[Example, ...]] = {}
    for name in data.splits:
        encoded, is_read = cache.encode(task, data, name)
        if is_read:
            display.note(f"{name}: tokens read from {cache.folder}")
        if name == "train":
            task = for_rows(task, encoded)
        dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in encoded.dropped.items())
        if config.packing is True and not encoded.packed and name == "train":
            display.note("packing joins plain texts only: these rows stay as they are")
        if encoded.packed:
            count = f"{encoded.packed:,} texts packed into {encoded.kept:,} sequences"
            display.note(f"{name}: {count} of {length} tokens{dropped}")
        elif encoded.truncated or dropped:
            cut = f"{encoded.truncated:,} of {encoded.kept:,} texts cut at {length} tokens"
            sides = ", ".join(counted(count, side[:-1]) for side, count in encoded.sides.items())
            more = f"; the model takes {base.max_length:,}: see --max-length"
            more = more if dropped and length < base.max_length < _UNBOUNDED else ""
            display.note(f"{name}: {cut}{f' ({sides})' if sides else ''}{dropped}{more}")
        for note in encoded.notes:
            display.note(f"{name}: {note}")
        if not encoded.examples and name != "test":
            raise DataError(
                f"{data.source}: no {name} row is left{dropped}: raise --max-length or check the data"
            )
        if name != "test" and not any(
            task.terms(task.collate([one], base.pad_token_id)) for one in encoded.examples
        ):
            raise DataError(
                f"{data.source}: every {name} answer is cut off at {length} tokens: raise --max-length"
            )
        _check_ends(base, task, name, encoded.examples)
        splits[name] = encoded.examples
    display.note(f"for example: {shortened(task.describe(splits['train'][0], base.processor))}")
    return task, {"test": (), **splits}


def _check_ends(base: Base, task: Task, split: str, examples: Sequence[Example]) -> None:
    """Refuse texts that an encoder-decoder's classifier, which reads the end of sequence, finds none in."""
    config = base.model.config
    if not config.is_encoder_decoder or task.auto_class != "AutoModelForSequenceClassification":
        return
    counts = [example.input_ids.count(config.eos_token_id) for example in examples]
    usual = max(set(counts), key=counts.count, default=0)
    odd = sum(count != usual for count in counts) if usual else len(counts)
    if odd:
        said = f"{odd:,} of {counted(len(counts), f'{split} text')}"
        raise ModelError(
            f"{base.source} judges a text by its end of sequence, token {config.eos_token_id}, of which "
            f"{said} have {'another number' if usual else 'none'}: save a tokenizer that puts one behind "
            "each text, and take it out of the texts themselves"
        )


def _recipe(config: StudyConfig, rows: int, space: Space) -> Recipe:
    """How every trial is trained; refuses schedules that never fire."""
    steps = config.steps
    if steps is None:
        steps = math.ceil((config.epochs or EPOCHS) * rows / config.batch_size)
    adaptive = "adaptive" in (space.dim("allocation").choices or ())
    schedule = _schedule(config, steps)
    first = math.floor(steps * FIRST_EVALUATION)
    if adaptive:  # a trial is not judged before its first newborns had time to learn
        first = max(first, schedule.moves[:2][-1] + LEAST_INTERVAL)
    first = min(first, steps - 1)
    count = min(config.evaluations, steps - first)
    points = (
        {steps - round(i * (steps - first) / max(1, count - 1)) for i in range(count)}
        if count > 1
        else {steps}
    )
    evaluate_at = tuple(sorted(point for point in points if point > 0))
    settled = schedule.moves[-1] if adaptive else 0
    _check_patience(config.patience, evaluate_at, settled)
    return Recipe(
        steps=steps,
        batch_size=config.batch_size,
        evaluate_at=evaluate_at,
        gradient_clip=config.gradient_clip,
        importance=config.importance,
        schedule=schedule,
        min_rank=config.min_rank,
        max_rank=config.max_rank,
        strict=config.strict,
        patience=config.patience,
        settled=settled,
    )


def _schedule(config: StudyConfig, steps: int) -> Schedule:
    """When the ranks of a trial of so many steps move; any number will do where none ever move."""
    allocation, timing = config.space.allocation, config.schedule
    adaptive = allocation is None or "adaptive" in (allocation.choices or ())
    return make_schedule(
        steps if adaptive else max(steps, 1000),
        warmup=timing.warmup,
        until=timing.until,
        moves=timing.moves,
        share=timing.share,
    )


def _check_patience(patience: int | None, evaluate_at: Sequence[int], settled: int) -> None:
    """Refuse a patience that no trial can try before its end."""
    most = sum(settled < step for step in evaluate_at[1:-1])  # nothing is worse than the first
    if patience is not None and patience > most:
        raise CommandError(
            f"patience {patience} ends no trial early: of {len(evaluate_at)} evaluations only {most} can "
            "count, which come after the first, after the last move of ranks and before the end; lower it "
            "or raise evaluations"
        )


def _fingerprint(
    config: StudyConfig, data: DataSet, task: Task, base: Base, space: Space, recipe: Recipe
) -> dict[str, str]:
    """The facts that must be the same when the study goes on."""
    settings = {
        "steps": recipe.steps,
        "batch size": recipe.batch_size,
        "max length": config.max_length,
        "importance": recipe.importance,
        "moves": f"{', '.join(map(str, recipe.schedule.moves))}, share {recipe.schedule.first_share}",
        "evaluations": ", ".join(map(str, recipe.evaluate_at)),
        "gradient clip": recipe.gradient_clip,
        "ranks": f"{recipe.min_rank} to {recipe.max_rank or 'full'}",
        "strict": recipe.strict,
        "dtype": str(next(base.model.parameters()).dtype),
        **({} if recipe.patience is None else {"patience": recipe.patience}),
    }
    # Only where they are of use, so that studies from before there were any go on.
    settings |= {"template": config.template} if config.template is not None else {}
    settings |= {"packing": True} if getattr(task, "packing", False) else {}
    settings |= {"abstains": True} if getattr(task, "abstains", False) else {}
    settings |= {"languages": str(base.languages)} if base.languages is not None else {}
    return make_fingerprint(
        model=base.revision,
        data=data.sha256,
        task=task.name,
        metric=task.metric.name,
        direction=task.metric.direction,
        budget=config.budget,
        seed=config.seed,
        version=__version__,
        space=space.fingerprint(),
        settings=settings,
    )


def check_memory(setup: Setup, display: Display) -> None:
    """Refuse batches that a CPU's memory does not hold: there the process would end, not the trial.

    Those that it may not hold, as far as is known, are told.

    Raises:
        CommandError: a step needs more than is free.
    """
    if setup.base.device.type != "cpu":
        return
    import psutil

    # Where trials start is not known yet, and matters little: activations take the room, not adapters.
    layers = max(setup.space.groups.values(), key=len)
    rank_one = RankPlan(layers, {layer.name: 1 for layer in layers}, scaling=1.0)
    spec = TrialSpec(0, setup.config.seed, rank_one, False, 0.0, None, None)
    lanes = setup.config.lanes if isinstance(setup.config.lanes, int) else 1
    needed, free = lanes * step_bytes(setup.bench, spec), psutil.virtual_memory().available
    held = HELD_RECOMPUTING if setup.base.recomputes else HELD
    rows = counted(setup.config.batch_size, "row") + (f" in each of {lanes} lanes" if lanes > 1 else "")
    said = f"a step of {rows} takes {format_bytes(needed)}"
    if needed > free:
        raise CommandError(
            f"{said} beside the model, and {format_bytes(free)} of memory are free: lower --batch-size, "
            f"{'--lanes, ' if lanes > 1 else ''}--max-length, or --set gradient_checkpointing=true"
        )
    if held * needed > free:
        display.note(
            f"memory may run out: {said}, a process may hold {held:g} times that, and {format_bytes(free)} "
            "are free; a smaller --batch-size takes less"
        )


def measure_gains(setup: Setup, display: Display) -> Setup:
    """The same setup, its space told by the gradient probe where components belong, if any trial asks.

    Call it once, with the base's head solved; a study that goes on has the gains stored.
    """
    groups = setup.space.gradient_groups
    if not groups:
        return setup
    display.note("probing the frozen base's gradient for where the first components belong")
    layers = {layer.name: layer for group in groups.values() for layer in group}
    gains = probe_gains(setup.bench, tuple(layers.values()), seed=setup.config.seed)
    space = setup.space.with_gains(gains)
    for name, group in groups.items():
        plan = space.gradient_plan(name, 1.0)
        where = f"{len(plan.live)} of {len(group)} layers"
        display.note(f"{name} starts with {plan.parameters:,} parameters at {where}")
        if not any(any(gains[layer.name]) for layer in group):
            display.note(
                f"no layer of {name} stands out of the gradient's noise: ranks are spread evenly, the last "
                "layers first"
            )
    return replace(setup, space=space)


def dry_run(setup: Setup, lanes: int = 1) -> dict[str, Any]:
    """What a search would do, from the preflight and one probe step; nothing is written.

    Args:
        setup: the preflight's.
        lanes: trials that train together.

    Returns:
        `groups` (name, layers, cost of rank 1, largest rank of all layers at once, how trials start,
        and the parameters of the largest start), `model`, `data`,
        `task`, `budget`, `trials`, `lanes`, `steps`, `parameters` (of the default setting),
        `head_parameters` (trained in full), `memory_bytes` (of this process, or of the device, after
        the step), `seconds_per_step` (of all lanes together), and `seconds` of a whole search without
        early stopping.

    Raises:
        CommandError: a trial of the default setting cannot take its first steps.
        ModelError: the memory does not hold so many lanes.
    """
    config, space, recipe = setup.config, setup.space, setup.bench.recipe
    params = space.startup()[0]
    plan = space.starting_plan(params)
    spec = TrialSpec.of(params, number=0, seed=config.seed, plan=plan, adaptive=False)
    sample = setup.bench.validation[: 2 * config.batch_size]
    try:
        with passing_lanes(setup.bench, [spec] * lanes) as samples_per_s:
            memory = _memory_bytes(setup.base.devices)
            began = time.monotonic()
            setup.evaluate(sample)
            row_s = (time.monotonic() - began) / len(sample)
    except NotFinite as error:
        raise CommandError(
            f"the first steps of the default setting fail, for {error} (learning rate "
            f"{spec.learning_rate:.3g}, scaling {spec.plan.scaling:.4g}): lower space.learning_rate or "
            "space.scaling, or check the model's weights"
        ) from error
    except Exception as error:
        if not is_full(error):
            raise
        raise ModelError(
            f"the memory does not hold {counted(lanes, 'lane')} of {config.batch_size} rows each: "
            "lower --lanes, --batch-size or --max-length"
        ) from error
    step_s = min(config.batch_size, len(setup.bench.train)) / samples_per_s
    trial_s = recipe.steps * step_s + len(recipe.evaluate_at) * len(setup.bench.validation) * row_s
    return {
        "model": setup.base.source,
        "data": setup.data.source,
        "task": setup.task.name,
        "budget": config.budget,
        "trials": config.trials,
        "lanes": lanes,
        "steps": recipe.steps,
        "parameters": spec.plan.parameters,
        "head_parameters": setup.bench.head_parameters,
        "groups": [_group_facts(name, space) for name in space.groups],
        "memory_bytes": memory,
        "seconds_per_step": lanes * step_s,
        "seconds": config.trials * trial_s,
    }


def _group_facts(name: str, space: Space) -> dict[str, Any]:
    layers, rank, starts = space.groups[name], space.largest_rank(name), space.starts(name)
    parameters = sum(min(rank, layer.full_rank) * layer.cost for layer in layers)
    if "gradient" in starts:
        parameters = max(parameters, space.gradient_plan(name, 1.0).parameters)
    return {
        "name": name,
        "layers": len(layers),
        "cost": sum(layer.cost for layer in layers),
        "largest_rank": rank,
        "start": list(starts),
        "parameters": parameters,
    }


def _memory_bytes(devices: Sequence[torch.device]) -> int:
    """Memory in use: the devices' peak on CUDA, else that of this process."""
    if devices[0].type == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, devices))
    import psutil

    return int(psutil.Process().memory_info().rss)
