"""The callback in real Trainers, from `transformers` and from TRL, on tiny models."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_allocator import base_llama, batch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from autorank import RankAllocatorCallback
from autorank.adapter import lora_layers
from autorank.allocator import RankAllocatorWarning
from autorank.errors import CommandError, FileError, StudyError
from autorank.schedule import make_schedule

STEPS = 30
SCHEDULE = make_schedule(STEPS, share=0.5)
SAVED = (3, 8, 20, 25, STEPS)
"""Steps with a checkpoint: before the first move, within a window, twice with ranks fixed, at the end."""
ROWS = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in batch(step)]


def make_callback(**settings: Any) -> RankAllocatorCallback:
    return RankAllocatorCallback(**{"schedule": SCHEDULE, **settings})


def make_model(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=dropout)
        return peft.get_peft_model(base_llama(), config)


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **arguments: Any
) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        model=make_model() if model is None else model,
        args=TrainingArguments(**{**defaults, **arguments}),
        train_dataset=ROWS,
        eval_dataset=ROWS[:16],
        callbacks=list(callbacks),
    )


class Watch(TrainerCallback):
    """Calls a function at the end of each optimizer step."""

    def __init__(self, check: Callable[..., None]) -> None:
        self.check = check

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check(state=state, control=control, **kwargs)


def stop_at(step: int) -> Callable[..., None]:
    """A check that ends training early, as early stopping does."""

    def check(state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == step

    return check


def ours(said: Any) -> list[str]:
    """The allocator's warnings among all."""
    return [str(warning.message) for warning in said if warning.category is RankAllocatorWarning]


def live(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def budget_watch(callback: RankAllocatorCallback) -> Watch:
    """Checks that the layers and the optimizer hold what the plan says, and that the budget holds."""

    def check(state: Any, model: nn.Module, optimizer: Any, **_: Any) -> None:
        allocator = callback.allocator
        assert sum(p.numel() for p in live(model).values()) == allocator.plan.parameters <= allocator.budget
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert held == [id(p) for p in live(model).values()]
        assert allocator.state_dict()["facts"]["step"] == state.global_step

    return Watch(check)


def moves(callback: RankAllocatorCallback) -> list[tuple[int, str, int, int]]:
    return [(entry.step, entry.layer, entry.before, entry.after) for entry in callback.allocator.ledger]


def first_moves(callback: RankAllocatorCallback) -> list[Any]:
    return [move for move in moves(callback) if move[0] == SCHEDULE.moves[0]]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, RankAllocatorCallback]:
    """A run of defaults."""
    callback = make_callback()
    trainer = make_trainer(tmp_path_factory.mktemp("plain"), callback, budget_watch(callback))
    trainer.train()
    return trainer, callback


def test_ranks_move_and_are_never_over_budget(plain: tuple[Trainer, RankAllocatorCallback]) -> None:
    trainer, callback = plain
    ranks = callback.allocator.plan.ranks
    assert callback.allocator.ledger and len(set(ranks.values())) > 1
    found = {name: module.r["default"] for name, module in lora_layers(trainer.model).items()}
    assert found == {name: rank for name, rank in ranks.items() if rank}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05


def test_the_allocator_steps_right_before_the_optimizer(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    callback = make_callback()

    def check(state: Any, optimizer: Any, **_: Any) -> None:
        def note(*_: Any) -> None:
            steps.append((callback.allocator.state_dict()["facts"]["step"], state.global_step + 1))

        if state.global_step == 1:
            optimizer.optimizer.register_step_pre_hook(note)

    make_trainer(tmp_path, callback, Watch(check), Watch(stop_at(4))).train()
    assert steps == [(2, 2), (3, 3), (4, 4)]


def test_accumulated_gradients_are_one_step(
    plain: tuple[Trainer, RankAllocatorCallback], tmp_path: Path
) -> None:
    """Half batches, two per step, move ranks as whole batches do."""
    callback = make_callback()
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    make_trainer(tmp_path, callback, budget_watch(callback), **halves).train()
    # Adam makes steps of what rounding leaves where there is no gradient: later moves may differ.
    assert first_moves(callback) == first_moves(plain[1]) != []


def test_clipping_changes_no_decision(tmp_path: Path) -> None:
    """The first moves, at weights that hardly change: clipping changes those by another way of Adam."""
    runs = []
    for norm in (1e-3, 1e9):
        callback = make_callback()
        trainer = make_trainer(
            tmp_path, callback, budget_watch(callback), max_grad_norm=norm, learning_rate=1e-9
        )
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert min(norms) > 1e-3 and max(norms) < 1e9
        runs.append(first_moves(callback))
    assert runs[0] == runs[1] != []


def test_gradient_checkpointing_changes_no_decision(
    plain: tuple[Trainer, RankAllocatorCallback], tmp_path: Path
) -> None:
    """The first moves: inputs that require a gradient let later ones reach the lowest layers too."""
    callback, model = make_callback(), make_model()
    model.enable_input_require_grads()  # type: ignore[operator]
    make_trainer(
        tmp_path, callback, budget_watch(callback), model=model, activation_checkpointing=True
    ).train()
    assert first_moves(callback) == first_moves(plain[1]) != []


def test_evaluation_on_the_way_changes_nothing(
    plain: tuple[Trainer, RankAllocatorCallback], tmp_path: Path
) -> None:
    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == STEPS
    assert moves(callback) == moves(plain[1])
    assert_same_weights(trainer.model, plain[0].model)


def test_the_scheduler_drives_resized_parameters(tmp_path: Path) -> None:
    """Adam's steps are about as long as the learning rate, which falls to nearly nothing."""
    before: dict[str, torch.Tensor] = {}
    longest: list[float] = []

    def check(model: nn.Module, **_: Any) -> None:
        now = {name: p.detach().clone() for name, p in live(model).items()}
        if before.keys() == now.keys() and all(before[name].shape == now[name].shape for name in now):
            longest.append(max(float((now[name] - before[name]).abs().max()) for name in now))
        before.clear()
        before.update(now)

    callback = make_callback()
    make_trainer(tmp_path, callback, Watch(check), lr_scheduler_type="linear").train()
    last = 5e-3 / STEPS
    assert moves(callback) and 0 < longest[-1] < 3 * last < longest[-15]


def test_the_best_model_is_one_whose_ranks_fit(tmp_path: Path) -> None:
    """By a metric that the earliest checkpoint is best in."""
    callback = make_callback()
    trainer = make_trainer(
        tmp_path,
        callback,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=5,
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    last = callback.allocator.ledger[-1].step
    assert trainer.state.best_global_step == min(step for step in range(5, STEPS, 5) if step > last)
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in live(trainer.model).items()}
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_training_that_ends_in_a_window_leaves_no_hooks(tmp_path: Path) -> None:
    hooked = []

    def check(state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        hooked.append(any(module._forward_hooks for module in model.modules()))
        control.should_training_stop = state.global_step == 5

    trainer = make_trainer(tmp_path, make_callback(), Watch(check))
    trainer.train()
    assert hooked[-1] and not any(module._forward_hooks for module in trainer.model.modules())
    assert not trainer.model._load_state_dict_pre_hooks


def test_training_can_be_broken_off_and_begun_anew(tmp_path: Path) -> None:
    broken_off = []

    def check(state: Any, model: nn.Module, **_: Any) -> None:
        if not broken_off and state.global_step == 5:
            assert any(module._forward_hooks for module in model.modules())
            broken_off.append(callback.allocator)
            raise KeyboardInterrupt

    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, Watch(check))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert callback.allocator is not broken_off[0] and callback.allocator.ledger
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_gradient_scaler_tells_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    callback = make_callback(importance="uniform")
    trainer = make_trainer(tmp_path, callback, max_steps=1)
    trainer.train()
    told: list[float] = []
    monkeypatch.setattr(callback.allocator, "step", lambda loss_scale: told.append(loss_scale))
    Scaled.scaler.scale(torch.ones(()))  # it makes its scale when it is first used
    for optimizer in (Scaled(), trainer.optimizer):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=optimizer)
    assert told == [64.0, 1.0]


def test_ranks_that_never_moved_are_warned_about(tmp_path: Path) -> None:
    with pytest.warns(RankAllocatorWarning, match="stayed as they were"):
        make_trainer(tmp_path, make_callback(margin=1e12)).train()


def test_training_that_ends_before_its_moves_is_warned_about(tmp_path: Path) -> None:
    callback = make_callback()
    with pytest.warns(RankAllocatorWarning) as said:
        make_trainer(tmp_path, callback, Watch(stop_at(2))).train()
    assert [text[:42] for text in ours(said)] == ["training ended after 2 of 30 planned steps"]


def test_a_schedule_for_longer_training_is_warned_about_when_it_begins(tmp_path: Path) -> None:
    said_at: list[int] = []

    def check(state: Any, **_: Any) -> None:
        said_at.append(len(ours(said)))

    callback = make_callback(schedule=make_schedule(3000))
    with pytest.warns(RankAllocatorWarning) as said:
        make_trainer(tmp_path, callback, Watch(check), max_steps=4).train()
    begin, end = ours(said)
    assert said_at[0] == 1
    assert "training has 4 steps and the schedule, made for 3000, moves ranks at 300, " in begin
    assert "4 of 4 moves cannot happen" in begin and "after 4 of 3000 planned steps" in end


@pytest.mark.parametrize(("steps", "beyond"), [(13, 0), (12, 1), (4, 3)])
def test_moves_that_training_is_too_short_for_are_counted(tmp_path: Path, steps: int, beyond: int) -> None:
    """Steps count from 0: the last move, at step 12, takes the thirteenth."""
    assert SCHEDULE.moves == (3, 6, 9, 12)
    trainer = make_trainer(tmp_path, make_callback(), max_steps=steps)
    if not beyond:
        trainer.train()
        return
    with pytest.warns(RankAllocatorWarning, match=f"{beyond} of 4 moves cannot happen"):
        trainer.train()


def test_uniform_needs_no_word_on_its_length(tmp_path: Path) -> None:
    callback = make_callback(importance="uniform")
    make_trainer(tmp_path, callback, max_steps=4).train()
    assert callback.allocator.ledger == ()


def test_a_run_that_resumes_with_another_schedule_is_refused(
    straight: Callable[..., Any], tmp_path: Path
) -> None:
    schedule = make_schedule(2 * STEPS, share=0.5)
    callback = make_callback(importance="gradient_norm", schedule=schedule, seed=5)
    trainer = make_trainer(tmp_path, callback, max_steps=2 * STEPS)
    callback.resume(trainer.model, straight()[0] / "checkpoint-8")
    with pytest.raises(CommandError, match="total_steps is 60, the allocator's state says 30"):
        trainer.train(resume_from_checkpoint=str(straight()[0] / "checkpoint-8"))


def resumable(
    folder: Path, importance: str = "gradient_norm", **arguments: Any
) -> tuple[Trainer, RankAllocatorCallback]:
    """With dropout, so that random streams must go on as well."""

    def save(state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step in SAVED

    callback = make_callback(importance=importance, seed=5)
    arguments = {"model": make_model(dropout=0.1), **arguments}
    return make_trainer(folder, callback, budget_watch(callback), Watch(save), **arguments), callback


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Runs that were not interrupted: their folders, trainers and callbacks."""
    runs: dict[str, Any] = {}

    def run(importance: str = "gradient_norm") -> Any:
        if importance not in runs:
            folder = tmp_path_factory.mktemp(importance)
            trainer, callback = resumable(folder, importance)
            trainer.train()
            runs[importance] = folder, trainer, callback
        return runs[importance]

    return run


@pytest.mark.parametrize(
    ("importance", "step"),
    [
        ("gradient_norm", 3),
        ("gradient_norm", 8),
        ("gradient_norm", 20),
        ("singular_value", 8),
        ("sensitivity", 8),
        ("random", 8),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    straight: Callable[..., Any], tmp_path: Path, importance: str, step: int
) -> None:
    folder, trainer, callback = straight(importance)
    resumed, own = resumable(tmp_path, importance)
    checkpoint = folder / f"checkpoint-{step}"
    own.resume(resumed.model, checkpoint)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert own.allocator.plan == callback.allocator.plan
    assert own.allocator.ledger == callback.allocator.ledger
    assert_same_weights(resumed.model, trainer.model)
    last = f"checkpoint-{STEPS}"
    for name in ("adapter_model.safetensors", "rank_allocator.json", "adapter_config.json"):
        assert (tmp_path / last / name).read_bytes() == (folder / last / name).read_bytes()
    first, second = (run.optimizer.state_dict()["state"] for run in (trainer, resumed))
    assert first.keys() == second.keys()
    for place in first:
        assert all(torch.equal(first[place][key], second[place][key]) for key in first[place])


def test_layers_left_and_came_back_in_the_runs_above(straight: Callable[..., Any]) -> None:
    ledger = straight("random")[2].allocator.ledger
    left = {entry.layer for entry in ledger if entry.after == 0 and entry.step < 8}
    assert left & {entry.layer for entry in ledger if entry.before == 0 and entry.step > 8}


def test_a_checkpoint_loads_in_plain_peft(straight: Callable[..., Any]) -> None:
    folder, trainer, _ = straight()
    loaded = peft.PeftModel.from_pretrained(base_llama(), str(folder / f"checkpoint-{STEPS}"))
    ids = batch(99)
    trainer.model.eval()
    assert torch.allclose(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits, atol=1e-5)


def test_a_model_whose_ranks_went_on_can_go_back(straight: Callable[..., Any], tmp_path: Path) -> None:
    """Layers that have left come back, though their tensors are those of the checkpoint."""
    folder, trainer, callback = straight()
    model = copy.deepcopy(trainer.model)
    assert 0 in callback.allocator.plan.ranks.values()
    resumed, own = resumable(tmp_path, model=model)
    own.resume(model, folder / "checkpoint-3")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert own.allocator.ledger == callback.allocator.ledger
    assert_same_weights(model, trainer.model)


def test_the_default_budget_is_that_of_the_first_start(straight: Callable[..., Any], tmp_path: Path) -> None:
    folder, _, callback = straight("random")
    held = [entry.parameters for entry in callback.allocator.ledger if entry.step < 20][-1]
    resumed, own = resumable(tmp_path, "random", max_steps=21)
    own.resume(resumed.model, folder / "checkpoint-20")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-20"))
    assert own.allocator.budget == callback.allocator.budget > held
    held = own.allocator.plan.parameters
    resumed.train()  # anew from step 0, which needs no line
    assert own.allocator.budget == held


def test_more_steps_do_not_shift_the_schedule(tmp_path: Path) -> None:
    def run(steps: int, checkpoint: Path | None = None) -> RankAllocatorCallback:
        callback = RankAllocatorCallback()
        folder = tmp_path / str(steps)
        trainer = make_trainer(folder, callback, max_steps=steps, save_strategy="steps", save_steps=7)
        if checkpoint is not None:
            callback.resume(trainer.model, checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return callback

    first = run(STEPS)
    second = run(2 * STEPS, tmp_path / str(STEPS) / "checkpoint-7")
    planned = set(make_schedule(STEPS).moves)
    later = {move[0] for move in moves(second) if move[0] > 7}
    assert later <= planned and later - set(make_schedule(2 * STEPS).moves)
    assert {move[0] for move in moves(first)} <= planned


@pytest.mark.parametrize("step", [3, 8])
def test_a_forgotten_line_is_said_before_anything_is_trained(
    straight: Callable[..., Any], tmp_path: Path, step: int
) -> None:
    """At step 3 the checkpoint's ranks are the model's still, at step 8 they are others."""
    resumed, _ = resumable(tmp_path)
    with pytest.raises(CommandError, match=r"call callback.resume\(trainer.model, checkpoint\) right before"):
        resumed.train(resume_from_checkpoint=str(straight()[0] / f"checkpoint-{step}"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_lacks_layers_is_not_loaded_over_live_ones(tmp_path: Path) -> None:
    """PEFT would keep what these layers hold, and say nothing."""
    trainer, _ = resumable(tmp_path)
    tensors = {k: v for k, v in trainer.model.state_dict().items() if ".lora_" in k and "q_proj" not in k}
    with pytest.raises(CommandError, match="ranks are not the model's"):
        trainer.model.load_state_dict(tensors, strict=False)
    trainer.model.load_state_dict({"base_model.model.lm_head.weight": torch.zeros(40, 16)}, strict=False)


@pytest.mark.parametrize("other", [None, "checkpoint-25"])
def test_a_line_without_its_checkpoint_is_refused(
    straight: Callable[..., Any], tmp_path: Path, other: str | None
) -> None:
    folder = straight()[0]
    resumed, own = resumable(tmp_path)
    own.resume(resumed.model, folder / "checkpoint-20")
    with pytest.raises(CommandError, match="ranks of step 20, and training begins at step"):
        resumed.train(resume_from_checkpoint=other and str(folder / other))


def test_what_is_no_checkpoint_of_an_allocator_is_refused(
    straight: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=r"holds no rank_allocator\.json"):
        make_callback().resume(make_model(), tmp_path)
    facts = straight()[0] / "checkpoint-8" / "rank_allocator.json"
    (tmp_path / facts.name).write_bytes(facts.read_bytes())
    (tmp_path / "rank_allocator.safetensors").write_bytes(b"nothing")
    with pytest.raises(StudyError, match="damaged"):
        make_callback().resume(make_model(), tmp_path)


def test_a_state_that_was_half_written_is_no_state(
    straight: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a checkpoint of an older run lay in the same place."""
    _, trainer, callback = straight()
    args = copy.copy(trainer.args)
    args.output_dir = str(tmp_path)
    folder = tmp_path / f"checkpoint-{STEPS}"
    folder.mkdir()
    callback.on_save(args, trainer.state, trainer.control)
    callback.resume(make_model(), folder)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("autorank.callback.save_file", full)
    with pytest.raises(FileError, match="No space left"):
        callback.on_save(args, trainer.state, trainer.control)
    with pytest.raises(CommandError, match="holds no"):
        make_callback().resume(make_model(), folder)


def test_a_run_of_a_search_of_hyperparameters_has_its_state_in_its_own_folder(
    straight: Callable[..., Any], tmp_path: Path
) -> None:
    _, trainer, callback = straight()
    args = copy.copy(trainer.args)
    args.output_dir = str(tmp_path)
    for run in ("run-0", "run-1"):
        folder = tmp_path / run / f"checkpoint-{STEPS}"
        folder.mkdir(parents=True)
        callback.on_save(args, trainer.state, trainer.control)
        make_callback().resume(make_model(), folder)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="marginn"):
        RankAllocatorCallback(marginn=2.0)
    with pytest.raises(TypeError, match="total_steps"):
        RankAllocatorCallback(total_steps=10)
    callback = RankAllocatorCallback()
    with pytest.raises(CommandError, match="before"):
        _ = callback.allocator
    trainer = make_trainer(tmp_path, callback)
    trainer.args.torch_compile = True
    with pytest.raises(CommandError, match="compiles the model"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.args.torch_compile = False
    trainer.args._n_gpu = 2
    with pytest.raises(CommandError, match="one device only"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning")
def test_ranks_move_and_runs_resume_in_trl(tiny_llama: Path, tmp_path: Path) -> None:
    """As it comes: mixed precision in bfloat16, gradient checkpointing, a loss of its own."""
    from trl import SFTConfig, SFTTrainer

    texts = [
        f"the {colour} {animal} had some soup" for animal in ("cat", "dog") for colour in ("red", "blue")
    ]

    def make(folder: Path) -> tuple[Any, RankAllocatorCallback]:
        callback = make_callback()
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_llama),
            args=SFTConfig(
                output_dir=str(folder),
                max_steps=STEPS,
                per_device_train_batch_size=2,
                learning_rate=5e-3,
                save_steps=8,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"text": texts * 20}),
            processing_class=AutoTokenizer.from_pretrained(tiny_llama),
            peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1),
            callbacks=[callback, budget_watch(callback)],
        )
        return trainer, callback

    trainer, callback = make(tmp_path / "straight")
    assert trainer.accelerator.mixed_precision == "bf16" and trainer.args.gradient_checkpointing
    trainer.train()
    assert len(set(callback.allocator.plan.ranks.values())) > 1
    resumed, own = make(tmp_path / "resumed")
    checkpoint = tmp_path / "straight" / "checkpoint-8"
    own.resume(resumed.model, checkpoint)
    resumed.train(resume_from_checkpoint=os.fspath(checkpoint))
    assert own.allocator.ledger == callback.allocator.ledger
    assert_same_weights(resumed.model, trainer.model)
