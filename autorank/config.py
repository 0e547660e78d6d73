"""The settings of a study: what a YAML file, flags and `--set` may say, checked in one place.

A `StudyConfig` is complete and immutable: it is stored with the study and is all that resuming
needs, from any working directory. Whether the model, the data or a layer exists is found out later.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from autorank.budget import parse_budget
from autorank.columns import parse_columns
from autorank.errors import CommandError, StudyError

__all__ = [
    "NAME",
    "NAME_RULE",
    "QUICKSTART",
    "REGULARISERS",
    "SPREADS",
    "Dimension",
    "ScheduleConfig",
    "SpaceConfig",
    "StudyConfig",
    "build_config",
    "config_from_json",
    "config_to_json",
    "default_name",
    "is_quickstart",
    "load_config",
    "merge_settings",
    "parse_lanes",
    "parse_samples",
    "parse_time",
    "setting_named",
]

QUICKSTART: Mapping[str, Any] = {
    "model": "builtin:minilm",
    "data": "builtin:stdlib-docs",
    "budget": "100k",
    "trials": 5,
    "steps": 100,
    "max_length": 48,
    # Few steps from a head that fits already: higher rates unlearn it. Measured on validation.
    "space": {
        "learning_rate": {"low": 3e-4, "high": 1e-3},
        "head_learning_rate": {"low": 1e-4, "high": 1e-3},
        "head_scale": 1.0,
    },
}
"""What a search uses where neither model nor data is named: minutes on two CPU cores."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first neither '.' nor '-'"
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", re.ASCII)
_TIME_RULE = "a time is seconds or has units, such as 90s, 30m, 2h or 1h30m, and is above 0"

REGULARISERS = ("dropout", "weight_decay", "label_smoothing")
"""What may hold a trial's training back: dimensions that are 0 where nothing is said."""

SPREADS = ("balanced", "balanced_low_0", "sequential")
"""Ways to spread a model over all GPUs, by transformers' names for a `device_map`."""

# Words that other tools use for what is called something else here.
_SYNONYMS = {
    "alpha": "space.scaling",
    "dataset": "data",
    "device_map": "device",
    "early_stopping_patience": "patience",
    "label_smoothing_factor": "space.label_smoothing",
    "lora_alpha": "space.scaling",
    "lora_dropout": "space.dropout",
    "lora_r": "space.rank",
    "lr": "space.learning_rate",
    "n_trials": "trials",
    "r": "space.rank",
    "timeout": "time",
    "wd": "space.weight_decay",
}


def parse_time(value: str | float) -> float:
    """Read a time such as `90s`, `30m`, `2h`, `1h30m` or a number of seconds.

    Returns:
        Seconds, finite and above 0.

    Raises:
        CommandError: the value has another form, or is not above 0.
    """
    seconds = math.nan
    if isinstance(value, str):
        match = _TIME.fullmatch(value.strip().lower())
        if match is not None and any(match.groups()):
            hours, minutes, rest = (float(part or 0) for part in match.groups())
            seconds = hours * 3600 + minutes * 60 + rest
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    if not (math.isfinite(seconds) and seconds > 0):
        raise CommandError(f"time {value!r} cannot be used: {_TIME_RULE}")
    return seconds


def parse_samples(value: str | int) -> int:
    """Read a number of training samples, written as a budget is: 40000, 40k, 1.5M.

    Raises:
        CommandError: it is no such number.
    """
    try:
        return parse_budget(value)
    except CommandError:
        raise CommandError(
            f"samples {value!r} cannot be used: it is a count such as 40000, 40k or 1.5M"
        ) from None


def parse_lanes(value: str | int | None) -> Any:
    """Read how many trials train together: a number from 1 to 64, or `auto`.

    Raises:
        CommandError: it is neither.
    """
    if value is None or value == "auto":
        return value
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 64:
        raise CommandError(f"lanes {value!r} cannot be used: it is a number from 1 to 64, or auto")
    return number


def _as_tuple(value: Any) -> Any:
    """A list as a tuple, for YAML and JSON have no tuples."""
    return tuple(value) if isinstance(value, list) else value


class _Settings(BaseModel):
    """What all settings share: no unknown keys, no guessing between types, no changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


class Dimension(_Settings):
    """One dimension of the search space: a fixed value, a list of choices or a range.

    Written as `4`, as `[2, 4, 8]` or as `{low: 1, high: 16, log: true}`. Without `log` the
    dimension keeps the scale that the space gives it.
    """

    choices: Annotated[tuple[int | float | str, ...] | None, BeforeValidator(_as_tuple)] = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, (Mapping, Dimension)):
            return value
        choices = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        for choice in choices:
            if isinstance(choice, float) and not math.isfinite(choice):
                raise ValueError(f"{choice} cannot be used: a number must be finite")
        return {"choices": choices}

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        if self.choices is not None:
            if (self.low, self.high, self.log) != (None, None, None):
                raise ValueError("a dimension has choices or a range, not both")
            if not self.choices:
                raise ValueError("a list of choices needs at least one")
            if len(set(self.choices)) != len(self.choices):
                raise ValueError("a list of choices holds each one once")
        elif self.low is None or self.high is None:
            raise ValueError("a range needs both low and high")
        elif self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: swap them")
        elif self.log and self.low <= 0:
            raise ValueError(f"low {self.low} must be above 0 on a log scale")
        return self

    @model_serializer
    def _write(self) -> Any:
        if self.choices is None:
            log = {} if self.log is None else {"log": self.log}
            return {"low": self.low, "high": self.high, **log}
        return self.choices[0] if self.is_fixed else list(self.choices)

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return self.choices is not None and len(self.choices) == 1

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """The numbers that bound or make up this dimension; empty for words."""
        values = self.choices if self.choices is not None else (self.low, self.high)
        return tuple(value for value in values if isinstance(value, (int, float)))


class SpaceConfig(_Settings):
    """What a trial may be, where it differs from the defaults of the space.

    `start` says what decides a trial's starting plan: `uniform`, one rank for all layers, or
    `gradient`, which gives each layer its own. `dropout` is of what adapters read, `weight_decay` of
    their A and B, `label_smoothing` of the training loss; all three are 0 where nothing is said.
    """

    rank: Dimension | None = None
    scaling: Dimension | None = None
    learning_rate: Dimension | None = None
    head_learning_rate: Dimension | None = None
    head_scale: Dimension | None = None
    dropout: Dimension | None = None
    weight_decay: Dimension | None = None
    label_smoothing: Dimension | None = None
    target_modules: Dimension | None = None
    allocation: Dimension | None = None
    start: Dimension | None = None

    @model_validator(mode="after")
    def _check(self) -> SpaceConfig:
        for name in ("rank", "learning_rate", "head_learning_rate", "head_scale"):
            self._check_numbers(name, "above 0", lambda number: number > 0)
        self._check_numbers("scaling", "above 0 and at most a million", lambda number: 0 < number <= 1e6)
        for name in ("dropout", "label_smoothing"):
            self._check_numbers(name, "at least 0 and below 1", lambda number: 0 <= number < 1)
        self._check_numbers("weight_decay", "at least 0", lambda number: number >= 0)
        for name in ("target_modules", "allocation", "start"):
            dimension = getattr(self, name)
            if dimension is not None and (dimension.choices is None or dimension.numbers):
                raise ValueError(f"space.{name} is a word or a list of words")
        for name, known in (("allocation", ("uniform", "adaptive")), ("start", ("uniform", "gradient"))):
            dimension = getattr(self, name)
            for choice in (dimension.choices or ()) if dimension else ():
                if choice not in known:
                    raise ValueError(f"space.{name} {choice!r} is not known: it is {' or '.join(known)}")
        if self.rank and self.start and self.start.choices == ("gradient",):
            raise ValueError(
                "space.rank and space.start gradient exclude each other: the gradient gives each layer "
                "a rank of its own"
            )
        return self

    def _check_numbers(self, name: str, rule: str, fits: Callable[[int | float], bool]) -> None:
        dimension: Dimension | None = getattr(self, name)
        if dimension is None:
            return
        if dimension.choices is not None and len(dimension.numbers) < len(dimension.choices):
            raise ValueError(f"space.{name} is a number, a list of numbers or a range")
        if name == "rank" and not all(isinstance(n, int) and n >= 1 for n in dimension.numbers):
            raise ValueError(f"space.rank {_listed(dimension)} must be whole numbers from 1")
        if not all(map(fits, dimension.numbers)):
            raise ValueError(f"space.{name} {_listed(dimension)} must be {rule}")


def _listed(dimension: Dimension) -> str:
    return ", ".join(str(number) for number in dimension.numbers)


class ScheduleConfig(_Settings):
    """When ranks move, in fractions of a trial's steps.

    No moves in the first `warmup`; then `moves` moves until `until`, each of a share of all
    components that starts at `share` and decays; afterwards ranks are fixed.
    """

    warmup: float = Field(default=0.1, ge=0)
    until: float = Field(default=0.5, gt=0, le=0.8)
    moves: int = Field(default=4, ge=1)
    share: float = Field(default=0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.warmup >= self.until:
            raise ValueError(
                f"warmup {self.warmup} leaves no time for moves before until {self.until}: it must be smaller"
            )
        return self


class StudyConfig(_Settings):
    """Everything that a study is asked to do. YAML keys are the field names; `time_s` is `time`."""

    name: str
    model: str = Field(min_length=1)
    data: str = Field(min_length=1)
    columns: Annotated[dict[str, str] | None, BeforeValidator(parse_columns)] = None
    budget: Annotated[int, BeforeValidator(parse_budget)]
    task: Literal[
        "auto",
        "text-classification",
        "multi-label-classification",
        "regression",
        "image-classification",
        "token-classification",
        "question-answering",
        "causal-lm",
        "seq2seq",
    ] = "auto"
    trials: int = Field(default=12, ge=1)
    time_s: Annotated[float, BeforeValidator(parse_time)] | None = Field(
        default=None, validation_alias=AliasChoices("time", "time_s"), serialization_alias="time"
    )
    samples: Annotated[int, BeforeValidator(parse_samples)] | None = None
    target: float | None = None
    plateau: int | None = Field(default=None, ge=1)
    keep: int = Field(default=3, ge=1)
    lanes: Annotated[int | Literal["auto"] | None, BeforeValidator(parse_lanes)] = None
    sampler: Literal["tpe", "gp"] = "tpe"
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0, le=1e9)
    batch_size: int = Field(default=32, ge=1)
    max_length: int = Field(default=128, ge=1)
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    studies_dir: str = Field(default="studies", min_length=1)
    target_modules: Annotated[tuple[str, ...] | str | None, BeforeValidator(_as_tuple)] = None
    importance: Literal["gradient_norm", "singular_value", "sensitivity", "random"] = "singular_value"
    metric: str = Field(default="auto", min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = Field(default="auto", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    min_rank: int = Field(default=0, ge=0)
    max_rank: int | None = Field(default=None, ge=1)
    evaluations: int = Field(default=5, ge=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    template: str | None = None
    packing: bool | Literal["auto"] = "auto"
    source_language: str | None = Field(default=None, min_length=1)
    target_language: str | None = Field(default=None, min_length=1)
    patience: int | None = Field(default=None, ge=1)
    strict: bool = False
    trust_remote_code: bool = False
    space: SpaceConfig = SpaceConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if NAME.fullmatch(self.name) is None:
            raise ValueError(f"name {self.name!r} cannot be used: it must be {NAME_RULE}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs} exclude each other: give one")
        if self.max_rank is not None and self.min_rank > self.max_rank:
            raise ValueError(f"min_rank {self.min_rank} is above max_rank {self.max_rank}: lower it")
        drops = self.space.dropout is not None and any(self.space.dropout.numbers)
        if self.gradient_checkpointing and (drops or self.lanes not in (None, "auto", 1)):
            other = "space.dropout" if drops else f"lanes {self.lanes}"
            raise ValueError(
                f"gradient_checkpointing and {other} exclude each other: what is computed again would "
                "be another trial's, or drop other elements; leave one of them out"
            )
        if self.device in SPREADS and self.lanes not in (None, "auto", 1):
            raise ValueError(
                f"device {self.device} and lanes {self.lanes} exclude each other: lanes share a pass on one "
                "device; leave one of them out"
            )
        rank = self.space.rank
        if rank is not None and min(rank.numbers) < self.min_rank:
            raise ValueError(
                f"space.rank {_listed(rank)} goes below min_rank {self.min_rank}: raise it or lower min_rank"
            )
        start = self.space.start
        if self.min_rank and start is not None and "gradient" in (start.choices or ()):
            raise ValueError(
                f"min_rank {self.min_rank} and space.start gradient exclude each other: the gradient "
                "leaves layers at rank 0"
            )
        if self.target_modules is not None:
            if not self.target_modules or not all(self.target_modules):
                raise ValueError("target_modules is empty: name at least one module, or leave it out")
            if self.space.target_modules is not None:
                raise ValueError(
                    "target_modules and space.target_modules exclude each other: the first fixes "
                    "the layers, the second lists the groups to choose from"
                )
        return self


def default_name(model: str, data: str) -> str:
    """The name of a study that was given none: `minilm-stdlib-docs`."""
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", _last_part(source)).strip(".-") for source in (model, data)]
    return "-".join(part[:31].rstrip(".-") for part in parts if part) or "study"


def _last_part(source: str) -> str:
    """`minilm` of `builtin:minilm`, `a/minilm/` and `minilm.jsonl`."""
    last = source.removeprefix("builtin:").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"\.(jsonl|json|csv|tsv|parquet)(\.(gz|bz2|xz))?$", "", last, flags=re.IGNORECASE)


def is_quickstart(settings: Mapping[str, Any]) -> bool:
    """Whether merged settings name neither a model nor data."""
    return settings.get("model") is None and settings.get("data") is None


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> StudyConfig:
    """Make a configuration of a YAML file, flags that override it, and `key=value` above both.

    Raises:
        CommandError: the file cannot be read, or a setting cannot be used; the message lists each.
    """
    return build_config(merge_settings(path, overrides or {}, sets))


def merge_settings(
    path: str | Path | None, overrides: Mapping[str, Any], sets: Sequence[str]
) -> dict[str, Any]:
    """Lay the file, the overrides and the `key=value` sets above one another, unchecked.

    A null in the file or a set stands for the default; an override that is None says nothing.
    Steps and epochs exclude each other, so a layer that names one takes away the other one below.
    """
    file = _read_yaml(Path(path)) if path is not None else {}
    flags = {key: value for key, value in overrides.items() if value is not None}
    settings: dict[str, Any] = {}
    for layer in (file, flags, _read_sets(sets)):
        for key, other in (("steps", "epochs"), ("epochs", "steps")):
            if layer.get(key) is not None:
                settings.pop(other, None)
        _lay_over(settings, layer)
    return settings


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Write `above` into `below`, table by table."""
    for key, value in above.items():
        if isinstance(value, Mapping):
            table = below[key] if isinstance(below.get(key), dict) else {}
            below[key] = table
            _lay_over(table, value)
        else:
            below[key] = value


def build_config(settings: Mapping[str, Any]) -> StudyConfig:
    """Check merged settings and fill in the quickstart's values and the default name.

    A model or data that is a path here and now is written down as an absolute one.

    Raises:
        CommandError: a setting is missing, unknown or out of range.
    """
    given = _without_nulls(settings)
    if is_quickstart(given):
        # Only one of these lengths can hold: a length that was given replaces the quickstart's.
        defaults = {
            key: value for key, value in QUICKSTART.items() if key != "steps" or "epochs" not in given
        }
        given = {**defaults, **given}
    for key, other, example in (
        ("model", "data", "a local folder, a hub id or builtin:minilm"),
        ("data", "model", "a folder, a file, a hub id or builtin:stdlib-docs"),
    ):
        if key not in given:
            raise CommandError(
                f"{other} is {given[other]!r} but no {key} is named: add --{key} ({example}), "
                "or name neither to run the quickstart"
            )
    if "budget" not in given:
        raise CommandError("no budget is named: add --budget, a number of trainable parameters such as 170k")
    given.setdefault("name", default_name(str(given["model"]), str(given["data"])))
    given.update({key: _absolute(given[key]) for key in ("model", "data")})
    try:
        return StudyConfig.model_validate(given)
    except ValidationError as error:
        raise CommandError("; ".join(_explain(error))) from error


def _absolute(source: Any) -> Any:
    """A source that lies on this disk by its whole path; links stay, for their names may matter."""
    if not isinstance(source, str) or source.startswith("builtin:"):
        return source
    path = os.path.expanduser(source)
    return str(Path(path).absolute()) if os.path.exists(path) else source


def config_to_json(config: StudyConfig) -> dict[str, Any]:
    """A JSON object that `config_from_json` reads back to an equal configuration."""
    return config.model_dump(mode="json", by_alias=True)


def config_from_json(
    data: Mapping[str, Any], *, metric: str | None = None, trust_remote_code: bool = False
) -> StudyConfig:
    """Read what `config_to_json` wrote.

    A stored study may come from anyone, so code that it names is not run unless the user names it too.

    Args:
        data: the JSON object.
        metric: the metric as the user names it now; it must be named where it is code, `module:function`.
        trust_remote_code: whether the user trusts code that comes with the model.

    Raises:
        StudyError: the stored configuration was changed, damaged or written by another version, its
            metric is not the one named, or it asks for code that the user did not.
    """
    stored = data.get("metric", "auto")
    if metric is None and ":" in str(stored):
        raise StudyError(
            f"the study's metric is code, the function {stored!r}, which is not run unasked: if you trust "
            f"it, name it again with --metric {stored!r}"
        )
    if metric is not None and metric != stored:
        raise StudyError(
            f"the study's metric is {stored!r}, not {metric!r}: leave --metric out, or start a new study "
            "with it and a --name"
        )
    if data.get("trust_remote_code") and not trust_remote_code:
        raise StudyError(
            f"the study runs code that comes with its model {data.get('model')!r}, which is not run unasked: "
            "read that code, and if you trust it add --trust-remote-code"
        )
    try:
        return StudyConfig.model_validate(_moved(_without_nulls(data)))
    except (ValidationError, CommandError) as error:
        reasons = "; ".join(_explain(error)) if isinstance(error, ValidationError) else str(error)
        raise StudyError(
            f"the stored configuration of this study cannot be used: {reasons}; "
            "restore its config.json or start a new study with --name"
        ) from error


def _moved(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an earlier version stored, as it is said now; once one dropout held for a whole study."""
    # Before packing was a setting, rows were not packed.
    data = {"packing": False, **data}
    if "dropout" not in data:
        return data
    rest = {key: value for key, value in data.items() if key != "dropout"}
    return rest | {"space": {**rest.get("space", {}), "dropout": data["dropout"]}}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


class _Loader(yaml.SafeLoader):
    """YAML with two traps taken out: `1e-3` is a number, and a repeated key is an error."""


_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is not None and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} stands here twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark is not None else origin
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise CommandError(f"{where}: not YAML: {problem}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CommandError(
            f"{path}: there is no such file: name the YAML file of a study; "
            "`autorank resume NAME` goes on with a study that was started"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CommandError(f"{path}: cannot be read as a study file: {reason}") from error
    settings = _parse_yaml(text, str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise CommandError(f"{path}: a study file is a table of settings, such as `budget: 170k`")
    return settings


def _read_sets(sets: Sequence[str]) -> dict[str, Any]:
    """The `key=value` texts as one nested table; keys are dotted, values are YAML, a template is text."""
    settings: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise CommandError(f"--set {text!r} is not understood: write key=value, such as space.rank=4")
        table = settings
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise CommandError(f"--set {text!r}: {part!r} was already set to a value, so it has no keys")
        plain = parts == ["template"] and _is_plain(value)
        table[parts[-1]] = _unescaped(value) if plain else _parse_yaml(value, f"--set {key.strip()}")
    return settings


def _is_plain(value: str) -> bool:
    """Whether a text stands there as it is: not in quotes, and no null."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return not quoted and value not in ("", "~", "null")


def _unescaped(value: str) -> str:
    """The text with the two escapes that a shell has no easy way to write otherwise."""
    return value.replace("\\n", "\n").replace("\\t", "\t")


# What pydantic calls a wrong type, in the words of a person who writes YAML.
_RULES = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "a table of settings",
    "string_too_short": "text that is not empty",
    "string_type": "text, in quotes where it looks like a number or a date",
    "string_unicode": "text in UTF-8",
    "tuple_type": "a list",
}

_SHORTER = (
    ("greater than or equal to", "at least"),
    ("greater than", "above"),
    ("less than or equal to", "at most"),
    ("less than", "below"),
)


def _explain(error: ValidationError) -> list[str]:
    """One clause for each setting that pydantic found wrong: key, value, rule."""
    clauses: list[str] = []
    values: dict[str, Any] = {}
    rules: dict[str, list[str]] = {}  # a union tells one rule for each of its members
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            clauses.append(f"{'.'.join(path)} is not a setting{_nearest(path)}")
        elif item["type"] == "missing":
            clauses.append(f"{'.'.join(path)} is missing")
        elif item["type"] == "value_error":
            key, reason = ".".join(path), str(item["ctx"]["error"])
            named = not key or reason.startswith((f"{key} ", f"{key}."))
            clauses.append(reason if named else f"{key}: {reason}")
        else:
            key = ".".join(part for part in path if part in _KEYS)
            rule = _RULES.get(item["type"]) or item["msg"].removeprefix("Input should be ")
            values.setdefault(key, item["input"])
            told = rules.setdefault(key, [])
            if item["type"] == "literal_error" and isinstance(item["input"], str):
                known = re.findall(r"'([^']*)'", item["ctx"]["expected"])
                close = difflib.get_close_matches(item["input"], known, n=1)
                rule += f"; do you mean {close[0]}?" if close else ""
            for long, short in _SHORTER:
                rule = rule.replace(long, short)
            told.append(rule)
    for key, told in rules.items():
        if "a number" in told and "a whole number" in told:
            told.remove("a whole number")
        clauses.append(f"{key} is {values[key]!r}: it must be {' or '.join(dict.fromkeys(told))}")
    return clauses


def _keys_of(model: type[BaseModel]) -> list[str]:
    return [field.serialization_alias or name for name, field in model.model_fields.items()]


_TABLES: Mapping[str, type[BaseModel]] = {"space": SpaceConfig, "schedule": ScheduleConfig}
_PATHS = [
    *_keys_of(StudyConfig),
    *(f"{name}.{key}" for name, table in _TABLES.items() for key in _keys_of(table)),
]
_KEYS = {part for path in _PATHS for part in path.split(".")} | set(_keys_of(Dimension))


def setting_named(word: str) -> str | None:
    """The key of the setting that a word names, here or in other tools: `lr` is space.learning_rate."""
    name = word.strip("-").replace("-", "_")
    by_last = {known.split(".")[-1]: known for known in reversed(_PATHS)}
    return _SYNONYMS.get(name) or by_last.get(name)


def _nearest(path: list[str]) -> str:
    """The known key that a person may have meant by an unknown one, as a question."""
    unknown = path[-1].replace("-", "_")
    if unknown in _SYNONYMS:
        return f": do you mean {_SYNONYMS[unknown]}?"
    if len(path) > 2:
        return f": the keys here are {', '.join(_keys_of(Dimension))}"
    here = [known for known in _PATHS if known.split(".")[:-1] == path[:-1]]
    by_last = {known.split(".")[-1]: known for known in [*reversed(_PATHS), *here]}
    close = difflib.get_close_matches(unknown, by_last, n=1)
    return f": do you mean {by_last[close[0]]}?" if close else f": the keys here are {', '.join(here)}"
