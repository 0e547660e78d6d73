"""The allocator inside `transformers.Trainer`, and trainers built on it such as TRL's `SFTTrainer`.

It makes the allocator when training begins, steps it, and keeps its state in the Trainer's
checkpoints. Which ranks move is decided in `allocator.py`; one process and one device only.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Size, Tensor, nn
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from autorank.allocator import RankAllocator, RankAllocatorWarning, shape_from_state
from autorank.artifacts import file_errors, flush, read_json, write_json
from autorank.errors import CommandError, StudyError
from autorank.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["RankAllocatorCallback"]

FILE = "rank_allocator"
"""What the files of an allocator's state are called, facts and tensors; of one that is not PEFT's
`default` with the adapter's name."""

WAY_TO_RESUME = (
    "call callback.resume(trainer.model, checkpoint) right before "
    "trainer.train(resume_from_checkpoint=checkpoint)"
)


@dataclass(frozen=True)
class _Stored:
    """What a checkpoint holds of an allocator."""

    step: int
    total_steps: int
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class RankAllocatorCallback(TrainerCallback):
    """Moves ranks between the LoRA layers of a PEFT model while a Trainer trains it.

        callback = RankAllocatorCallback(budget="2M")
        trainer = Trainer(model=peft_model, ..., callbacks=[callback])
        trainer.train()
        callback.allocator.plan, callback.allocator.ledger

    Checkpoints hold the allocator's state. Resuming takes one line more, which gives the new model
    the ranks that the checkpoint's tensors have; the Trainer loads those before any callback runs:

        callback.resume(trainer.model, "out/checkpoint-500")
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    The run then goes on as if it had not been interrupted. With `load_best_model_at_end` the best
    checkpoint is sought among those since ranks last moved: tensors of other ranks do not fit.

    Args:
        settings: the keyword arguments of `RankAllocator`; `total_steps` is that of a given
            `schedule`, else the Trainer's. Settings of a resumed run are passed again; the budget
            that None stands for, and the steps that the schedule is made for, are those of its
            first start.

    Raises:
        TypeError: `RankAllocator` has no such keyword argument.
    """

    def __init__(self, **settings: Any) -> None:
        # A misspelt setting shows here, not when the training begins.
        inspect.signature(RankAllocator).bind(None, None, total_steps=0, **settings)
        self._settings = settings
        self._name: str = settings.get("adapter_name", "default")
        self._allocator: RankAllocator | None = None
        self._stored: _Stored | None = None
        self._guard: RemovableHandle | None = None

    @property
    def allocator(self) -> RankAllocator:
        """The allocator of the latest training.

        Raises:
            CommandError: no training has begun.
        """
        if self._allocator is None:
            raise CommandError("there is no allocator before trainer.train() has begun")
        return self._allocator

    def resume(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Give a model the ranks of a checkpoint, before the Trainer loads it and makes its optimizer.

        Args:
            model: the PEFT model, its adapter configured as for the first start: `trainer.model`.
            checkpoint: the folder that `resume_from_checkpoint` will name.

        Raises:
            CommandError: the checkpoint holds no allocator.
            ModelError: the model's adapter has other layers or another scaling.
            StudyError: the allocator's files are damaged.
        """
        stored = _read(*_files(Path(checkpoint), self._name))
        shape_from_state(model, {"facts": stored.facts}, adapter_name=self._name)
        self._stored = stored

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch for a checkpoint of other ranks, which the Trainer loads before any other event."""
        self._guard = kwargs["model"].register_load_state_dict_pre_hook(self._refuse_other_ranks)

    def _refuse_other_ranks(self, model: nn.Module, tensors: Mapping[str, Tensor], *_: Any) -> None:
        # PEFT would report shapes, and keep in silence what layers hold that the checkpoint has not.
        live = self._lora_shapes(dict(model.named_parameters(remove_duplicate=False)))
        loaded = self._lora_shapes(tensors)
        if loaded and loaded != live:
            raise CommandError(f"the checkpoint's ranks are not the model's: {WAY_TO_RESUME}")

    def _lora_shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, Size]:
        return {
            key: value.shape
            for key, value in tensors.items()
            if ".lora_" in key and self._name in key.split(".")
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the allocator, or go on with the one that `resume` read.

        Warns where the schedule has moves that this training is too short for.

        Raises:
            CommandError: the Trainer uses several devices or compiles the model, it resumes and `resume`
                was not called, or `RankAllocator` refuses.
        """
        if self._guard is not None:
            self._guard.remove()
        if args.parallel_mode is not ParallelMode.NOT_PARALLEL:
            raise CommandError(
                "ranks move on one device only, and the Trainer is in mode "
                f"{args.parallel_mode.value}: start one process, with CUDA_VISIBLE_DEVICES naming one device"
            )
        if args.torch_compile:
            raise CommandError(
                "the Trainer compiles the model (torch_compile), where hooks on layers do not run: turn it "
                "off while ranks move"
            )
        if self._allocator is not None:
            _close(self._allocator)
        stored, self._stored = self._stored, None
        _check_start(state.global_step, stored)
        settings = dict(self._settings)
        schedule = settings.get("schedule")
        if schedule is None:
            schedule = make_schedule(state.max_steps if stored is None else stored.total_steps)
        settings |= {"total_steps": schedule.total_steps, "schedule": schedule}
        self._allocator = RankAllocator(kwargs["model"], kwargs["optimizer"], **settings)
        if stored is not None:
            self._allocator.load_state_dict({"facts": stored.facts, "tensors": stored.tensors})
        if settings.get("importance") != "uniform":
            _check_length(schedule, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the allocator, once per optimizer step, however many passes it accumulates."""
        # The Trainer has clipped the gradients. Sketches read those of the layers' outputs, which
        # clipping does not reach; only `sensitivity` sees clipped ones, each step's by its own factor.
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        if self.allocator.step(loss_scale=1.0 if scaler is None else scaler.get_scale()):
            # What was best has other ranks now, and could not be loaded at the end.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the allocator's state in the checkpoint that the Trainer has just written."""
        folder = _checkpoint(Path(str(args.output_dir)), state.global_step)
        stored = self.allocator.state_dict()
        facts, tensors = _files(folder, self._name)
        # Written last, the facts vouch for the tensors; those of an older run must not.
        facts.unlink(missing_ok=True)
        with file_errors(tensors, "written"):
            save_file(stored["tensors"], str(tensors))
            flush(tensors)
        write_json(facts, stored["facts"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no hook on the model where training ended early, and say so where no rank moved."""
        _close(self.allocator)


def _check_start(step: int, stored: _Stored | None) -> None:
    """Refuse to start at one step with the ranks of another."""
    if stored is None and step:
        raise CommandError(
            f"training resumes at step {step} and the allocator's state is not there: {WAY_TO_RESUME}"
        )
    if stored is not None and stored.step != step:
        raise CommandError(
            f"resume() gave the model the ranks of step {stored.step}, and training begins at step {step}: "
            "pass the same checkpoint to trainer.train(resume_from_checkpoint=checkpoint)"
        )


def _check_length(schedule: Schedule, steps: int) -> None:
    """Say so where training is too short for the schedule's moves; longer training only adds to its end."""
    beyond = [move for move in schedule.moves if move >= steps]
    if beyond:
        warnings.warn(
            f"training has {steps} steps and the schedule, made for {schedule.total_steps}, moves ranks at "
            f"{', '.join(map(str, schedule.moves))}: {len(beyond)} of {len(schedule.moves)} moves cannot "
            "happen. Make a first start with a schedule for its own length, which is the default",
            RankAllocatorWarning,
            stacklevel=2,
        )


def _close(allocator: RankAllocator) -> None:
    """Take the hooks off. A Trainer may stop early; where it was to be shorter, its start told so."""
    with warnings.catch_warnings():
        if allocator.ledger:
            warnings.simplefilter("ignore", RankAllocatorWarning)
        allocator.close()


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a checkpoint holds facts and tensors of an allocator, by PEFT's name of its adapter."""
    stem = FILE if name == "default" else f"{FILE}.{name}"
    return folder / f"{stem}.json", folder / f"{stem}.safetensors"


def _checkpoint(output: Path, step: int) -> Path:
    """The checkpoint just written; a search of hyperparameters has a folder for each of its runs."""
    own = output / f"checkpoint-{step}"
    if own.is_dir():
        return own
    runs = output.glob(f"run-*/{own.name}")
    return max(runs, key=lambda folder: folder.stat().st_mtime, default=own)


def _read(place: Path, tensors_place: Path) -> _Stored:
    """Read what `on_save` wrote."""
    if not place.is_file():
        raise CommandError(
            f"{place.parent} holds no {place.name}: it is no checkpoint of a run with this callback. An "
            "adapter that was trained without it is loaded by PeftModel.from_pretrained and trained anew"
        )
    facts = read_json(place)
    try:
        tensors = load_file(str(tensors_place))
        return _Stored(int(facts["step"]), int(facts["settings"]["total_steps"]), facts, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StudyError(
            f"the allocator's state in {place.parent} is damaged ({error}): use another checkpoint"
        ) from error
