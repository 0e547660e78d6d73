"""What a task is: rows in, examples, batches, a loss and scores out.

The protocol and the small data classes that all tasks share. No task is defined here, and the
choice between them is made in `autorank.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

from autorank.data import DataSet, Row
from autorank.errors import CommandError, DataError
from autorank.figures import close_to
from autorank.pixels import Picture
from autorank.rows import listed
from autorank.tasks.own_metric import Direction, OwnMetric, is_own, own_metric

if TYPE_CHECKING:
    from autorank.tasks.text_metrics import TextMetric

__all__ = [
    "IGNORED",
    "Batch",
    "Direction",
    "Encoded",
    "Example",
    "HeadTask",
    "Metric",
    "Passage",
    "ProbeKind",
    "Task",
    "Tokenizer",
    "WindowTask",
    "WritingTask",
    "check_text",
    "check_whole",
    "choose_metric",
    "ended",
    "logits_of",
    "pad_rows",
    "require_room",
    "unended",
    "without_end",
]

ProbeKind = Literal["multinomial", "one-vs-rest", "ridge", "ends"]

IGNORED = -100
"""The label of a token that is not trained: padding, and prompts."""


class Tokenizer(Protocol):
    """What a task asks of a tokenizer: the part of PreTrainedTokenizerBase that is used here."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Lists of token ids for lists of texts, and of text pairs."""
        ...

    @property
    def chat_template(self) -> Any:
        """How a conversation is written, if it says so."""
        ...

    def get_chat_template(self) -> str:
        """The template in use, of several that there may be."""
        ...

    @property
    def added_tokens_decoder(self) -> Any:
        """The tokens that are no words, by id: the special ones, and others that stand for themselves."""
        ...

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """A conversation as text, or as tokens."""
        ...

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The text of token ids."""
        ...

    def num_special_tokens_to_add(self, *args: Any, **kwargs: Any) -> int:
        """How many tokens are put around a text, or around a pair of texts."""
        ...


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that answers are looked for in, and which of it a sample's tokens are.

    `offsets` holds the first character of each token in the text and the one behind its last; (0, 0)
    for tokens that are not of it. `answers` are right, any of them; none where there is none. `row` is
    the number of the row, among those encoded together, of which the sample is a window.
    """

    text: str
    offsets: tuple[tuple[int, int], ...]
    answers: tuple[str, ...]
    row: int


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens, or a window of it, or an image without any.

    `labels` is a class index, a number to predict (a float), the indices of any number of classes (a
    tuple), or one label per token (a list).

    `reference` is the text that should be written after what the model is given, uncut. `passage` is
    where an answer is looked for.
    """

    input_ids: list[int]
    labels: int | float | tuple[int, ...] | list[int]
    token_type_ids: list[int] | None = None
    reference: str | None = None
    picture: Picture | None = None
    passage: Passage | None = None

    @property
    def length(self) -> int:
        """How long it is in a batch: its tokens, on the longer side where it has two; 1 for an image."""
        if self.picture is not None:
            return 1
        labels = len(self.labels) if isinstance(self.labels, list) else 0
        return max(len(self.input_ids), labels)


@dataclass(frozen=True)
class Encoded:
    """The examples of a split, and what became of its rows.

    `kept` counts the examples, or the rows where these are read in windows, each an example;
    `truncated` those of them that were cut at the maximum length;
    `dropped` the rows that gave no example, by reason; `sides` says of examples with two texts how
    many were cut in each; `packed` is how many rows were joined to make them, if any were; `notes` are
    what else a person should know, a line each.
    """

    examples: tuple[Example, ...]
    kept: int
    truncated: int
    dropped: dict[str, int]
    sides: dict[str, int] = field(default_factory=dict)
    packed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Examples padded to the longest of them.

    Attributes:
        inputs: what the model is called with, each int64 of shape (samples, length): `input_ids`,
            `attention_mask` and, where the tokenizer gives them, `token_type_ids`; for an
            encoder-decoder also `decoder_input_ids`, which has the length of the labels. Of images
            `pixel_values` alone, of the model's dtype, shape (samples, channels, height, width).
        labels: int64, shape (samples,) for classes or (samples, length) for tokens; float32, shape
            (samples,) for numbers, or (samples, classes), 1 or 0, for any number of classes.
        samples: the number of rows.
        passages: of each sample, where answers are looked for in texts.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    samples: int
    passages: tuple[Passage, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(
            {name: tensor.to(device) for name, tensor in self.inputs.items()},
            self.labels.to(device),
            self.samples,
            self.passages,
        )

    def take(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, padded as they are."""
        contiguous = isinstance(rows, range) and rows.step == 1
        chosen = slice(rows[0], rows[-1] + 1) if contiguous and rows else list(rows)
        inputs = {name: tensor[chosen] for name, tensor in self.inputs.items()}
        passages = tuple(self.passages[row] for row in rows) if self.passages else ()
        return Batch(inputs, self.labels[chosen], len(rows), passages)


@dataclass(frozen=True)
class Metric:
    """A figure that a task's `score` gives, or a function of the user's `own`, and which way is better."""

    name: str
    direction: Direction
    own: OwnMetric | None = None


class Task(Protocol):
    """What differs between tasks. Everything else is shared: the loop, the search, the export."""

    @property
    def name(self) -> str:
        """The task's name, as `--task` takes it."""
        ...

    @property
    def metric(self) -> Metric:
        """What the search improves."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all figures that `score` gives."""
        ...

    @property
    def auto_class(self) -> str:
        """The `transformers` class that loads a base model for this task."""
        ...

    @property
    def peft_task_type(self) -> str | None:
        """The task's name in PEFT's `TaskType`; None where it has none for it."""
        ...

    @property
    def outputs(self) -> int:
        """Outputs of the head that is trained beside the adapter; 0 where the model needs none."""
        ...

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes by index; None where there are none."""
        ...

    def model_kwargs(self) -> dict[str, Any]:
        """What the base model's configuration must say for this task."""
        ...

    def encode(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
        """Turn rows into examples of at most `max_length` tokens, in the rows' order.

        `tokenizer` is a `Tokenizer`, or the model's `Eye` where the task is of images.
        """
        ...

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad examples on the right to the longest of them."""
        ...

    @property
    def smooths(self) -> bool:
        """Whether the loss knows label smoothing; where it does not, a search for it is refused."""
        ...

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """The training loss: a float32 scalar, the mean over what is trained in this batch.

        `label_smoothing` is the share of each target, in [0, 1), that is spread over all classes
        alike (arXiv 1512.00567, section 7). It is 0 where the task does not smooth.
        """
        ...

    def terms(self, batch: Batch) -> int:
        """How many samples or tokens the loss is the mean of."""
        ...

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What scoring needs of each sample: float64 on the CPU, shape (samples, k).

        Outcomes of batches are concatenated for `score`, so memory grows with the rows only; those of
        a `WindowTask` are joined first.
        """
        ...

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """All metrics from all outcomes. A sample whose loss is not finite makes every one NaN."""
        ...

    def describe(self, example: Example, tokenizer: Any) -> str:
        """One example for people: its text, and what is trained on it."""
        ...


@runtime_checkable
class WritingTask(Task, Protocol):
    """A task whose metric may be of text that the model writes.

    Where it is, the columns of `text_metric`'s statistics follow those of `outcomes` in what `score`
    is given.
    """

    @property
    def text_metric(self) -> TextMetric | None:
        """How written text is judged; None where the metric needs none."""
        ...

    def prompt(self, example: Example) -> list[int]:
        """The tokens that the model is given."""
        ...

    def ends(self, tokenizer: Any) -> tuple[int, ...]:
        """Tokens that end an answer, beside those that end any text of the tokenizer and the model."""
        ...


@runtime_checkable
class HeadTask(Task, Protocol):
    """A task with a head, of `outputs` outputs, that is trained beside the adapter."""

    @property
    def probe(self) -> ProbeKind:
        """The kind of linear probe that the head starts from; see `autorank.head`."""
        ...

    @property
    def unit(self) -> float:
        """The size, over 0, of what the logits tell apart; the loss is in it, and so are the head's steps.

        1 where logits have no unit. A head that gives the user's numbers then learns the same in any
        unit of theirs.
        """
        ...

    def predictions(self, logits: torch.Tensor, batch: Batch) -> list[Any]:
        """What the model says of each sample, in the words of the data.

        A class name, a float, a list of class names, a list with the tag of each word that the
        batch's labels do not ignore, or what a `WindowTask` makes its answer of.
        """
        ...

    def answers(self, batch: Batch) -> list[Any]:
        """What would have been right, in the same words; where several texts are, a list of them."""
        ...


@runtime_checkable
class WindowTask(HeadTask, Protocol):
    """A task that may read a row in several windows, each an example; a row is scored and answered whole."""

    def windows(self, examples: Sequence[Example]) -> list[tuple[int, int]]:
        """The first example of each row and the one behind its last; a row's stand together."""
        ...

    def join(self, outcomes: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """Outcomes of rows, for `score`, from those of examples."""
        ...

    def answer(self, predictions: Sequence[Any]) -> Any:
        """What the model says of a row, from its `predictions` of the row's windows."""
        ...


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a model's output, samples first.

    A model that tells where answers start and end has two for each token, which it gives apart: they
    become the last dimension, shape (samples, length, 2).
    """
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: torch.Tensor = output.logits
    return logits


def choose_metric(wanted: str, directions: Mapping[str, Direction], task: str) -> Metric:
    """The metric of that name, for `auto` the task's first, or the user's own `module:function`.

    Raises:
        DataError: the task has no such metric.
        CommandError: the user's function cannot be used.
    """
    if is_own(wanted):
        own = own_metric(wanted)
        return Metric(own.name, own.direction, own)
    name = next(iter(directions)) if wanted == "auto" else wanted
    if name not in directions:
        raise DataError(
            f"metric {wanted!r}: the task {task} gives {', '.join(directions)}; choose one of these, auto, "
            f"or a function of your own as module:function{close_to(wanted, directions)}"
        )
    return Metric(name, directions[name])


def check_text(value: object, column: str, place: str) -> None:
    """Refuse what cannot be tokenised: anything but a string with a visible character in it."""
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"{place}: field {column!r} {found}; it must be text (a string)")
    if not value.strip():
        raise DataError(f"{place}: field {column!r} is empty; remove the row or fill it in")
    check_whole(value, column, place)


def check_whole(value: str, column: str, place: str) -> None:
    """Refuse half of a surrogate pair, which no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {column!r} holds half a surrogate pair at character {error.start + 1}; "
            "write the whole character"
        ) from None


def require_columns(data: DataSet, wanted: Sequence[str], task: str) -> None:
    """Refuse a data set in which no row has one of the columns that a task reads."""
    missing = [column for column in wanted if column not in data.columns]
    if missing:
        raise DataError(
            f"{data.source}: the task {task} needs the columns {', '.join(wanted)}; "
            f"found {listed(data.columns)}; rename the columns, or choose another --task"
        )


def require_room(tokenizer: Tokenizer, max_length: int, texts: int) -> None:
    """Refuse a maximum length that leaves no token for each text beside the special tokens."""
    needed = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if max_length < needed:
        raise CommandError(
            f"max-length {max_length} leaves no room for text beside this tokenizer's special tokens; "
            f"it must be at least {needed}"
        )


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of numbers as one int64 tensor (rows, longest), filled up with `value` on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def unended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids without the ends of sequence that many tokenizers add, and some data write: something follows."""
    while ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
        ids = ids[:-1]
    return ids


def ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids with exactly one end of sequence, which is the last, where the tokenizer has one."""
    token: int | None = getattr(tokenizer, "eos_token_id", None)
    return ids if token is None else [*unended(ids, tokenizer), token]


def without_end(text: str, tokenizer: Tokenizer) -> str:
    """An answer without the end of sequence that some data write out: a model's text is read without it."""
    end: str | None = getattr(tokenizer, "eos_token", None)
    return text.removesuffix(end) if end else text
