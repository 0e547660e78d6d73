"""An exported adapter in use: scored on rows that have answers, or answering rows that have none.

Reads the folder that `export.py` wrote, and needs no study. It trains nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)

from autorank.adapter import load_adapter
from autorank.artifacts import check_writable, file_errors, read_json, write_text
from autorank.card import FACTS
from autorank.data import DataSet, read_data, read_rows
from autorank.errors import AutorankError, CommandError, DataError, FileError, ModelError, StudyError
from autorank.evaluate import bootstrap_samples, evaluate, judged, standard_errors
from autorank.figures import counted
from autorank.model import Base, load_base, resolve_targets
from autorank.plan import LayerSpec, RankPlan
from autorank.readers import known_stem
from autorank.rows import SPLIT_NAMES, Row
from autorank.tasks import Encoded, Example, HeadTask, Task, WindowTask, WritingTask, encode_rows, for_model
from autorank.tasks.causal_lm import CausalLM
from autorank.tasks.exported import blank_answer, check_columns, restore_task
from autorank.tasks.own_metric import own_metric
from autorank.tasks.task import IGNORED, Metric, logits_of
from autorank.tasks.text_metrics import TEXT_METRICS, text_metric
from autorank.token_cache import TokenCache

__all__ = ["Predictor", "evaluate_export", "predict_export"]

Say = Callable[[str], None]

_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Predictor:
    """A base model with an exported adapter on it, and the task that it was made for."""

    facts: Mapping[str, Any]
    base: Base
    task: Task

    @classmethod
    def open(
        cls,
        folder: Path,
        facts: Mapping[str, Any],
        task: Task,
        *,
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> Predictor:
        """Load the base model and put the adapter on it.

        Raises:
            ModelError: the base model is gone, or is another one than the adapter was trained on.
            StudyError: the adapter's file is damaged, or does not fit.
        """
        origin = facts["base_model"]
        if facts["trust_remote_code"] and not trust_remote_code:
            raise ModelError(
                f"{origin['source']} needs code of its own to run, which came with it: read that code, and "
                "if you trust it add --trust-remote-code"
            )
        base = load_base(
            str(origin["source"]),
            auto_class=task.auto_class,
            model_kwargs=task.model_kwargs(),
            device=device,
            dtype=str(facts["dtype"]),
            trust_remote_code=trust_remote_code,
            source_language=facts.get("source_language"),
            target_language=facts.get("target_language"),
        )
        if base.revision != origin["revision"]:
            raise ModelError(
                f"{origin['source']} is not the base model that {folder} was trained on: its revision is "
                f"{base.revision}, the adapter's is {origin['revision']}; restore that one"
            )
        ranks = {str(name): int(rank) for name, rank in facts["ranks"].items()}
        layers = resolve_targets(base, list(ranks))
        high = next((layer for layer in layers if ranks[layer.name] > layer.full_rank), None)
        if high is not None:
            raise FileError(
                f"{folder / FACTS} was changed: rank {ranks[high.name]:,} of {high.name} is above its full "
                f"rank of {high.full_rank:,}; export the adapter again"
            )
        _check_modules(folder, facts["modules_to_save"], base, layers)
        plan = RankPlan(layers, ranks, float(facts["scaling"]))
        adapter = load_adapter(
            base.model,
            folder,
            plan,
            modules_to_save=tuple(facts["modules_to_save"]),
            task_type=task.peft_task_type,
        )
        broken = sorted(key for key, tensor in adapter.tensors().items() if not bool(tensor.isfinite().all()))
        if broken:
            adapter.remove()
            raise StudyError(
                f"the adapter in {folder} holds numbers that are not finite, in {broken[0]}: export it again"
            )
        return cls(facts, base, for_model(task, base.decoder_start))

    @property
    def max_length(self) -> int:
        """Tokens at which rows are cut, as in training."""
        return min(int(self.facts["max_length"]), self.base.max_length)

    def score(
        self, data: DataSet, batch_size: int, *, writing: bool = True, own: Metric | None = None
    ) -> dict[str, Any]:
        """All metrics of the rows, with their standard errors, and what became of the rows.

        Args:
            data: the rows, as its test split.
            batch_size: rows of a pass.
            writing: let the model write an answer to each prompt too, and judge it.
            own: judges what is written too, beside the metrics that there are.

        Raises:
            DataError: no row is left.
        """
        cache = TokenCache(self.base.processor, self.max_length)
        encoded, _ = cache.encode(self.task, data, "test")
        if not encoded.examples:
            dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in encoded.dropped.items())
            raise DataError(f"{data.source}: no row is left{dropped}")
        found = evaluate(
            self.base.model,
            self.task,
            encoded.examples,
            batch_size=batch_size,
            pad_token_id=self.base.pad_token_id,
        )
        scores, errors = found.scores, standard_errors(self.task, found.outcomes)
        if writing and isinstance(self.task, WritingTask) and encoded.examples[0].reference is not None:
            written = self._written(encoded.examples, batch_size, own)
            scores = scores | {name: value for name, (value, _) in written.items()}
            errors = errors | {name: error for name, (_, error) in written.items()}
        return {
            "rows": len(data.test),
            "examples": encoded.kept,
            "truncated": encoded.truncated,
            "dropped": encoded.dropped,
            "scores": scores,
            "standard_errors": errors,
        }

    def _asked(self, data: DataSet, at: int) -> tuple[Example, ...]:
        """The examples of a row; none where it is a chat of which the last question is cut off."""
        # A prompt that goes on is read as far as the model can, for it was learnt from what comes after it.
        limit = self.base.max_length if isinstance(self.task, CausalLM) else self.max_length
        encoded = self._encoded(data, at, limit)
        if isinstance(self.task, CausalLM) and encoded.truncated:
            whole = self._encoded(data, at, sys.maxsize)
            asked = [list(map(self.task.prompt, one.examples)) for one in (encoded, whole)]
            if asked[0] != asked[1]:  # what is left is an earlier question, which has its answer
                return ()
        return encoded.examples

    def _encoded(self, data: DataSet, at: int, max_length: int) -> Encoded:
        return encode_rows(self.task, data, "test", self.base.processor, max_length, [at])

    def _written(
        self, examples: Sequence[Example], batch_size: int, own: Metric | None
    ) -> dict[str, tuple[float, float]]:
        """Every metric of written text whose package is installed, and `own`, with its standard error."""
        assert isinstance(self.task, WritingTask)
        longest = max(sum(label != IGNORED for label in one.labels) for one in examples)  # type: ignore[union-attr]
        texts = self._write(examples, batch_size, longest)
        known = [Metric(name, direction) for name, direction in TEXT_METRICS.items()]
        found = {}
        for chosen in (*known, *([] if own is None else [own])):
            try:
                metric = text_metric(chosen)
            except CommandError:  # its package is not installed
                continue
            assert metric is not None
            rows = judged(metric, texts, examples)
            drawn = [
                metric.score(rows[sample].sum(0).tolist(), len(sample))
                for sample in bootstrap_samples(len(rows), 100)
            ]
            error = float(torch.tensor(drawn, dtype=torch.float64).std())
            found[chosen.name] = (metric.score(rows.sum(0).tolist(), len(rows)), error)
        return found

    def _write(self, examples: Sequence[Example], batch_size: int, most: int) -> list[str]:
        """What the model writes to each prompt, prompts of like length together."""
        writer = self.base.writer
        assert isinstance(self.task, WritingTask) and writer is not None
        prompts = [self.task.prompt(example) for example in examples]
        ends = self.task.ends(writer.tokenizer)
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            found = writer.write([prompts[at] for at in places], most, ends)
            for at, text in zip(places, found, strict=True):
                texts[at] = text
        return texts

    @torch.no_grad()
    def answer(self, data: DataSet, batch_size: int, most: int) -> list[Any]:
        """What the model says to each row, in their order; None where nothing of it is left to answer."""
        # One by one, so that each example is known to be of its row.
        encoded = [self._asked(data, at) for at in range(len(data.test))]
        examples = [example for one in encoded for example in one]
        found = iter(self._said(examples, batch_size, most))
        answers: list[Any] = []
        for one in encoded:
            said = [next(found) for _ in one]
            if said and isinstance(self.task, WindowTask):
                said = [self.task.answer(said)]
            answers.append(said[0] if said else None)
        return answers

    def _said(self, examples: Sequence[Example], batch_size: int, most: int) -> list[Any]:
        """What the model says to each example, those of like length together."""
        if isinstance(self.task, WritingTask):
            return self._write(examples, batch_size, most)
        assert isinstance(self.task, HeadTask)
        order = sorted(range(len(examples)), key=lambda at: examples[at].length)
        said: list[Any] = [None] * len(examples)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = self.task.collate([examples[at] for at in places], self.base.pad_token_id)
            batch = batch.to(self.base.device)
            found = self.task.predictions(logits_of(self.base.model(**batch.inputs)), batch)
            for at, one in zip(places, found, strict=True):
                said[at] = one
        return said


def evaluate_export(
    folder: str | Path,
    data: str,
    *,
    split: str | None = None,
    metric: str | None = None,
    writing: bool = True,
    columns: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """Score an exported adapter on rows that it was not trained on.

    Args:
        folder: what `autorank export` or `autorank train` wrote.
        data: a file, a folder, an id on the hub.
        split: which rows of a folder or id; by default test, or what there is.
        metric: a function of the user's own, `module:function`, beside those that the task has.
        writing: let the model write an answer to each prompt too, and judge it, which takes long.
        columns: role -> column of these data; by default as the study was told.
        batch_size: rows of a pass; by default those of a training step.
        device: where it is done.
        trust_remote_code: run code that came with the base model, if it needs to.
        say: gets a line for each thing worth knowing.

    Returns:
        `data`, `task`, `metric` (the study's), `rows`, `seen` (those of them that the search trained on
        or chose by), `examples`, `truncated`, `dropped`, and `scores` and `standard_errors` by metric.

    Raises:
        AutorankError: see `errors.py`. FileError: the folder is no export.
    """
    folder, facts = Path(folder), _read_facts(Path(folder))
    size = _batch_size(batch_size, facts)
    mapping = columns or facts.get("columns")
    rows = read_rows(data, columns=mapping, split=split)
    check_columns(facts, data, rows.columns, answers=True, columns=mapping)
    own = None if metric is None else own_metric(metric)
    task = restore_task(facts, rows, "auto" if own is None else own.name)
    written = None
    if own is not None and isinstance(task, WritingTask):
        if not writing:
            raise CommandError(f"metric {own.name} is of text that the model writes: leave out --no-writing")
        # It judges the texts that are written once, for all metrics.
        task, written = restore_task(facts, rows), task.metric
    _tell_rows(say, rows)
    seen = _seen(facts, rows)
    if seen:
        other = f"its score on the study's test rows is in {folder / 'README.md'}"
        _tell(
            say,
            f"{seen:,} of these {len(rows.test):,} rows are those that the adapter was trained on or chosen "
            f"by, so the scores say little of other rows: {other if facts.get('test') else 'give others'}",
        )
    predictor = Predictor.open(folder, facts, task, device=device, trust_remote_code=trust_remote_code)
    told = {"data": data, "task": task.name, "metric": facts["metric"], "seen": seen}
    return told | predictor.score(rows, size, writing=writing, own=written)


def predict_export(
    folder: str | Path,
    data: str,
    out: str | Path,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """Write what an exported adapter says to each row, as JSON lines: the row, and its `prediction`.

    Args:
        folder: what `autorank export` or `autorank train` wrote.
        data: a file, a folder, an id on the hub; rows need no answers.
        out: the file to write; it must not exist.
        split: which rows of a folder or id; by default test, or what there is.
        columns: role -> column of these data; by default as the study was told.
        batch_size: rows of a pass; by default those of a training step.
        max_new_tokens: of a text that is written; by default the length of a training row.
        device: where it is done.
        trust_remote_code: run code that came with the base model, if it needs to.
        say: gets a line for each thing worth knowing.

    Returns:
        `data`, `rows`, `answered` and `out`.

    Raises:
        AutorankError: see `errors.py`. FileError: the folder is no export, or the file exists.
    """
    folder, out = Path(folder), Path(os.path.expanduser(out))
    facts = _read_facts(folder)
    size = _batch_size(batch_size, facts)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise CommandError(f"max-new-tokens is {max_new_tokens}: it must be at least 1")
    check_writable(out.absolute().parent, "--out")
    with file_errors(out, "written"):
        if os.path.lexists(out):
            raise FileError(f"{out} exists: give the name of a new file")
        if not out.absolute().parent.is_dir():
            raise FileError(f"{out} cannot be written: there is no folder {out.parent}")
    given: list[Row] = []

    def complete(row: Row) -> Row:
        given.append(row)
        return blank_answer(facts, row)

    mapping = columns or facts.get("columns") or {}
    rows = read_rows(data, columns=mapping, split=split, complete=complete)
    found = dict.fromkeys(column for row in given for column in row)
    check_columns(facts, data, found, answers=False, columns=mapping)
    task = restore_task(facts, rows)
    if isinstance(task, CausalLM) and task.columns == ("text",):
        raise CommandError(
            f"{data} holds plain texts, to which there is no answer: give rows with a prompt, or score them "
            "with `autorank evaluate`"
        )
    _tell_rows(say, rows)
    if any("prediction" in row for row in given):
        _tell(say, "the rows' own column prediction is left out: what the adapter says takes its place")
    predictor = Predictor.open(folder, facts, task, device=device, trust_remote_code=trust_remote_code)
    answers = predictor.answer(rows, size, max_new_tokens or predictor.max_length)
    own = [{rows.mapped.get(name, name): value for name, value in row.items()} for row in given]
    lines = [_line({**row, "prediction": answer}) for row, answer in zip(own, answers, strict=True)]
    write_text(out, "".join(lines))
    answered = sum(answer is not None for answer in answers)
    return {"data": data, "task": task.name, "rows": len(answers), "answered": answered, "out": str(out)}


def _seen(facts: Mapping[str, Any], rows: DataSet) -> int:
    """How many of the rows are the study's own train or validation rows; 0 where the data are others.

    Split as the study split them, its own data have the hash that the export tells. A file may be one of
    a folder's, for a split.
    """
    if facts.get("data") is None:
        return 0
    study = _Data.model_validate(facts["data"])
    path = Path(os.path.expanduser(rows.source))
    is_split = path.is_file() and any(known_stem(path) in names for names in SPLIT_NAMES.values())
    sources = [rows.source, *([str(path.parent)] if is_split else [])]
    cut: dict[str, Any] = {"eval_fraction": study.eval_fraction, "seed": study.seed}
    for source in sources:
        try:
            own = read_data(source, columns=facts.get("columns"), **cut)
        except AutorankError:  # no data to search with
            continue
        if own.sha256 == study.sha256:
            learnt = (("train", own.train), ("validation", own.validation))
            places = {own.where(split, at) for split, part in learnt for at in range(len(part))}
            return sum(rows.where("test", at) in places for at in range(len(rows.test)))
    return 0


def _line(row: Row) -> str:
    """A row as a line of JSON; half of a surrogate pair, which UTF-8 cannot write, as it is escaped."""
    text = json.dumps(row, ensure_ascii=False, default=_shown)
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text) + "\n"


def _shown(value: object) -> str | None:
    """What JSON lacks, as text; the bytes of an image are left out."""
    return None if isinstance(value, bytes) else str(value)


def _read_facts(folder: Path) -> dict[str, Any]:
    """What an export says of itself.

    Raises:
        FileError: the folder is no export, or one of a version that told less.
    """
    if not (folder / FACTS).is_file():
        hint = "there is no such folder"
        if folder.exists():
            hint = "it holds no adapter" if folder.is_dir() else "it is a file"
            hint = f"it holds no {FACTS}" if (folder / "adapter_config.json").is_file() else hint
        raise FileError(f"{folder} is no export of autorank ({hint}): give what `autorank export` wrote")
    facts = read_json(folder / FACTS)
    missing = [key for key in _NEEDED if not isinstance(facts, dict) or key not in facts]
    if missing:
        raise FileError(
            f"{folder / FACTS} does not tell {', '.join(missing)}: export the adapter again with this version"
        )
    try:
        _Facts.model_validate(facts)
    except ValidationError as error:
        found = error.errors()[0]
        what = ".".join(map(str, found["loc"])) or "it"
        raise FileError(
            f"{folder / FACTS} was changed: {what} cannot be used ({found['msg']}); export the adapter again"
        ) from None
    return dict(facts)


class _Origin(BaseModel):
    """Where an export says that its base model is from."""

    model_config = ConfigDict(strict=True)

    source: str
    revision: str


class _Data(BaseModel):
    """What an export says of the data that it was trained on."""

    model_config = ConfigDict(strict=True)

    sha256: str
    # As a search splits data by default: older exports do not tell how theirs did.
    eval_fraction: FiniteFloat = 0.1
    seed: NonNegativeInt = 0


class _Usage(BaseModel):
    """What an export says of how its model is asked."""

    model_config = ConfigDict(strict=True)

    columns: list[str] = []


class _Facts(BaseModel):
    """What is read of an export's facts, which may come from anyone."""

    model_config = ConfigDict(strict=True)

    base_model: _Origin
    task: str
    dtype: str
    max_length: PositiveInt
    batch_size: PositiveInt
    metric: str
    ranks: dict[str, NonNegativeInt]
    scaling: FiniteFloat
    id2label: dict[str, str] | None
    modules_to_save: list[str]
    trust_remote_code: bool
    data: _Data | None = None
    usage: _Usage | None = None
    columns: dict[str, str] | None = None
    template: str | None = None
    packing: bool = False
    abstains: bool = True
    source_language: str | None = None
    target_language: str | None = None

    @field_validator("id2label")
    @classmethod
    def _in_order(cls, names: dict[str, str] | None) -> dict[str, str] | None:
        if names is not None and list(names) != [str(index) for index in range(len(names))]:
            raise ValueError("its keys are not 0, 1, 2 and so on")
        if names is not None and len(set(names.values())) < len(names):
            raise ValueError("two of its classes have one name")
        return names


_NEEDED = (
    "base_model",
    "task",
    "dtype",
    "max_length",
    "batch_size",
    "metric",
    "ranks",
    "scaling",
    "id2label",
    "modules_to_save",
    "trust_remote_code",
)


def _check_modules(folder: Path, names: Sequence[str], base: Base, layers: Sequence[LayerSpec]) -> None:
    """Refuse modules that are said to be trained in full and are none of the model's, or hold the layers."""
    modules = [name for name, _ in base.model.named_modules()]
    for given in names:
        found = [name for name in modules if f".{name}".endswith(f".{given}") and given]
        if not found or any(f"{layer.name}.".startswith(f"{name}.") for name in found for layer in layers):
            raise FileError(
                f"{folder / FACTS} was changed: {given!r} in modules_to_save cannot be trained in full "
                "beside the adapter's layers; export the adapter again"
            )


def _batch_size(given: int | None, facts: Mapping[str, Any]) -> int:
    size = int(facts["batch_size"]) if given is None else given
    if size < 1:
        raise CommandError(f"batch-size is {size}: it must be at least 1")
    return size


def _tell_rows(say: Say | None, data: DataSet) -> None:
    """Say what was read, and what a person should know of it."""
    _tell(say, f"data {data.source}: {data.format}, {counted(len(data.test), 'row')}")
    for note in data.notes:
        _tell(say, note)


def _tell(say: Say | None, line: str) -> None:
    if say is not None:
        say(line)
