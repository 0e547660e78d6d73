"""Causal language modelling: a plain corpus, prompts with completions, instructions, or chats.

Of a corpus all is trained; else only what the model should write: completions with the end of
sequence, and the assistant's turns.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from autorank.data import DataSet, Row
from autorank.errors import DataError
from autorank.figures import counted
from autorank.rows import listed
from autorank.tasks.chat import chat_tokens, check_turns, has_chat_template, turn_ends
from autorank.tasks.instructions import (
    ANSWERS,
    alpaca_input,
    alpaca_prompt,
    alpaca_turns,
    fill_template,
    template_fields,
)
from autorank.tasks.own_metric import is_own
from autorank.tasks.sequence import Tokens, pack, runs, worth_packing
from autorank.tasks.task import (
    IGNORED,
    Batch,
    Encoded,
    Example,
    Metric,
    Tokenizer,
    check_text,
    choose_metric,
    ended,
    pad_rows,
    require_columns,
    require_room,
    unended,
    without_end,
)
from autorank.tasks.text_metrics import TEXT_METRICS, TextMetric, text_metric
from autorank.tasks.tokens import TOKEN_METRICS, token_loss, token_outcomes, token_scores

__all__ = ["CausalLM"]

_UNTOLD = "the chat template does not tell what the assistant says: mark it with {% generation %}"


@dataclass(frozen=True)
class CausalLM:
    """Predict the next token of `text`, or of an answer to what comes before it.

    Attributes:
        columns: what is read of a row, the answer last.
        metric: what is improved.
        template: makes the prompt of a row, where one was given.
        packing: whether plain texts are joined to sequences of the full length; `auto` leaves it to
            their lengths.
    """

    columns: tuple[str, ...]
    metric: Metric
    template: str | None = None
    packing: bool | Literal["auto"] = False

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    outputs: ClassVar[int] = 0
    smooths: ClassVar[bool] = True
    labels: ClassVar[tuple[str, ...] | None] = None

    @classmethod
    def from_data(
        cls,
        data: DataSet,
        metric: str = "auto",
        *,
        template: str | None = None,
        packing: bool | Literal["auto"] = False,
    ) -> CausalLM:
        """The task for the data's columns, after a check of every row of every split.

        Of the columns there are, these are taken, the first that are complete: those that a template
        names, with an answer; `messages`; `prompt` and `completion`; `instruction` and `output`; `text`.

        Args:
            data: the rows.
            metric: the name of one of the task's metrics, or `auto`.
            template: makes the prompt of a row, its columns in braces.
            packing: join plain texts to sequences of the full length, or see `settled`.

        Raises:
            DataError: a column is missing, or a field is empty or no text.
            CommandError: a package that computes the metric is missing, or the template cannot be used.
        """
        columns = _columns(data, template)
        require_columns(data, [column for column in columns if column != "input"], cls.name)
        directions = TOKEN_METRICS if columns == ("text",) else TOKEN_METRICS | TEXT_METRICS
        if columns == ("text",) and is_own(metric):
            raise DataError(
                f"{data.source}: metric {metric} compares what is written with an answer, and plain texts "
                f"have none; give prompts with completions, or choose {', '.join(directions)}"
            )
        chosen = choose_metric(metric, directions, cls.name)
        text_metric(chosen)
        task = cls(columns, chosen, template, packing if columns == ("text",) else False)
        for split, rows in data.splits.items():
            for index, row in enumerate(rows):
                task._check(row, data.where(split, index))
        return task

    def _check(self, row: Row, place: str) -> None:
        """Refuse a row that cannot be tokenised."""
        if self.template is not None:
            fill_template(self.template, self.columns[:-1], row, place)
            check_text(_answer(row, self.columns[-1]), self.columns[-1], place)
            return
        for column in self.columns:
            if column == "messages":
                check_turns(row.get(column), place)
            elif column != "input" or alpaca_input(row) is not None:
                check_text(row.get(column), column, place)

    @cached_property
    def text_metric(self) -> TextMetric | None:
        """How a written completion is judged; None where the metric needs none."""
        return text_metric(self.metric)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all figures that `score` gives."""
        return (*TOKEN_METRICS, *([] if self.text_metric is None else [self.metric.name]))

    @property
    def trained(self) -> str:
        """What the loss is on, for people."""
        if self.columns == ("text",):
            return "all of the text"
        return "the assistant's turns only" if self.columns == ("messages",) else "completions only"

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the base model is taken as it is."""
        return {}

    def settled(self, encoded: Encoded) -> CausalLM:
        """The same task; whether to pack, where that is `auto`, as it was decided for these examples."""
        return replace(self, packing=encoded.packed > 0) if self.packing == "auto" else self

    def encode(self, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Tokenise each row, close it with the tokenizer's end of sequence, and cut it on the right.

        A row of which no token would be trained is dropped: its prompt fills the whole length, or it
        has a single token, which nothing precedes. Plain texts that are packed are joined instead, each
        with its end, and cut into sequences of the full length: see `sequence.pack`. Where `packing` is
        `auto`, they are if one is longer than `max_length`, or all fill less than half of it on average.
        """
        require_room(tokenizer, max_length, 2 if self.template or len(self.columns) > 1 else 1)
        sequences = self._sequences(rows, tokenizer)
        packs = self.packing
        if packs == "auto":
            packs = worth_packing([len(one.ids) for one in sequences], max_length)
        if packs:
            sequences = pack(sequences, max_length)
        cut_away = "no turn of the assistant left" if self.chats(tokenizer) else "completion cut away"
        examples: list[Example] = []
        dropped: dict[str, int] = {}
        truncated = 0
        for one in sequences:
            left = runs(one.trained[:max_length])
            if not left:
                reason = cut_away if runs(one.trained) else _UNTOLD if one.untold else "nothing to predict"
                dropped[reason] = dropped.get(reason, 0) + 1
                continue
            truncated += len(one.ids) > max_length
            labels = [token if mark else IGNORED for token, mark in zip(one.ids, one.trained, strict=True)]
            # Of a chat that is cut, the answer to write is that of the last turn that is left.
            reference = one.answers[min(len(left), len(one.answers)) - 1] if one.answers else None
            examples.append(Example(one.ids[:max_length], labels[:max_length], reference=reference))
        notes = _untold_note([one.untold for one in sequences if any(one.trained)])
        packed = len(rows) if packs else 0
        return Encoded(tuple(examples), len(examples), truncated, dropped, packed=packed, notes=notes)

    def chats(self, tokenizer: Tokenizer) -> bool:
        """Whether rows are written as conversations: they are some, or the model knows no other way."""
        instructed = self.columns[0] == "instruction" and self.template is None
        return self.columns == ("messages",) or (instructed and has_chat_template(tokenizer))

    def _sequences(self, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Tokens]:
        """The tokens of each row, uncut."""
        if self.columns == ("text",):
            texts = _tokenize([row["text"] for row in rows], tokenizer)
            closed = [ended(ids, tokenizer) for ids in texts]
            return [Tokens(ids, [True] * len(ids)) for ids in closed]
        if self.chats(tokenizer):
            turns = [row["messages"] if "messages" in self.columns else alpaca_turns(row) for row in rows]
            return [chat_tokens(one, tokenizer) for one in turns]
        pairs = [(self._prompt(row), _answer(row, self.columns[-1])) for row in rows]
        return _prompted(pairs, tokenizer)

    def _prompt(self, row: Row) -> str:
        if self.template is not None:
            return fill_template(self.template, self.columns[:-1], row, "a row")
        return alpaca_prompt(row) if self.columns[0] == "instruction" else str(row["prompt"])

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Pad on the right to the longest example; labels have shape (samples, length)."""
        rows = [example.input_ids for example in examples]
        labels = [example.labels for example in examples if isinstance(example.labels, list)]
        inputs = {
            "input_ids": pad_rows(rows, pad_token_id),
            "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
        }
        return Batch(inputs, pad_rows(labels, IGNORED), len(examples))

    def loss(self, logits: torch.Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy over the trained tokens, in float32.

        Args:
            logits: shape (samples, length, vocabulary); position t predicts token t + 1.
            batch: its labels are `IGNORED` where a token is not trained.
            label_smoothing: the share of each target that is spread over the vocabulary.
        """
        return token_loss(logits[:, :-1], batch.labels[:, 1:], label_smoothing)

    def terms(self, batch: Batch) -> int:
        """The number of trained tokens."""
        return int((batch.labels[:, 1:] != IGNORED).sum())

    def outcomes(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One row per sample: (summed loss, trained tokens, tokens right), float64 on the CPU."""
        return token_outcomes(logits[:, :-1], batch.labels[:, 1:])

    def score(self, outcomes: torch.Tensor) -> dict[str, float]:
        """The metrics of the trained tokens, and that of written text, where the search improves one."""
        return token_scores(outcomes, self.text_metric)

    def prompt(self, example: Example) -> list[int]:
        """The tokens before the last span that is trained: of a chat, before the assistant's last turn."""
        return example.input_ids[: _spans(example)[-1][0]]

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Of a chat what ends a turn of the assistant, which need not be the tokenizer's end of sequence."""
        return turn_ends(tokenizer) if self.chats(tokenizer) else ()

    def describe(self, example: Example, tokenizer: Tokenizer) -> str:
        """The tokens' text, with what is trained between double brackets."""
        parts, at = list[str](), 0
        for start, end in _spans(example):
            before, own = example.input_ids[at:start], example.input_ids[start:end]
            parts += [tokenizer.decode(before), f"[[{tokenizer.decode(own)}]]"]
            at = end
        rest = example.input_ids[at:]
        return "".join([*parts, tokenizer.decode(rest) if rest else ""])


def _columns(data: DataSet, template: str | None) -> tuple[str, ...]:
    """The columns that are read: what is given, and the answer last."""
    there = set(data.columns)
    if template is not None:
        fields = template_fields(template)
        for field in fields:
            if field not in there:
                close = difflib.get_close_matches(field, there, n=1)
                hint = f"; do you mean {close[0]}?" if close else ""
                raise DataError(
                    f"{data.source}: the template names a column {field!r}; found "
                    f"{listed(data.columns)}{hint}"
                )
        answer = next((name for name in ANSWERS if name in there and name not in fields), None)
        if answer is None:
            raise DataError(
                f"{data.source}: a template needs an answer in a column {', '.join(ANSWERS[:-1])} or "
                f"{ANSWERS[-1]} that it does not name itself; found {listed(data.columns)}; say which it is, "
                "such as --columns completion=COLUMN"
            )
        return (*fields, answer)
    if "messages" in there:
        return ("messages",)
    if {"instruction", "output"} <= there and not {"prompt", "completion"} <= there:
        return ("instruction", "input", "output") if "input" in there else ("instruction", "output")
    prompted = {"prompt", "completion"} & there and "text" not in there
    return ("prompt", "completion") if prompted or {"prompt", "completion"} <= there else ("text",)


def _answer(row: Row, column: str) -> Any:
    """The text of the answer; an integer that stands for a class is its digits."""
    value = row.get(column)
    return str(value) if column == "label" and type(value) is int else value


def _untold_note(untold: Sequence[int]) -> tuple[str, ...]:
    """A line where some turns of the rows are not trained and others are."""
    if not any(untold):
        return ()
    count, rows = sum(untold), sum(map(bool, untold))
    what = f"{counted(count, 'turn')} of the assistant in {counted(rows, 'row')}"
    return (f"not trained, for the chat template writes it otherwise once others follow: {what}",)


def _spans(example: Example) -> list[tuple[int, int]]:
    """Where tokens are trained: start and end of each run."""
    assert isinstance(example.labels, list)
    return runs([label != IGNORED for label in example.labels])


def _prompted(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Tokens]:
    """Prompts and completions as tokens, the completions' trained.

    The completion follows the prompt directly. Its tokens are read in that place, because on its
    own many tokenizers would put a space in front of it; only where the two texts melt together
    at the seam is it tokenised alone, so that the prompt always has the tokens it has in use.
    """
    prompts = _tokenize([prompt for prompt, _ in pairs], tokenizer)
    joined = _tokenize([prompt + completion for prompt, completion in pairs], tokenizer)
    found: list[Tokens] = []
    for (_, completion), prompt, whole in zip(pairs, prompts, joined, strict=True):
        prompt = unended(prompt, tokenizer)
        if whole[: len(prompt)] != prompt:
            whole = prompt + _tokenize([completion], tokenizer, add_special_tokens=False)[0]
        whole = ended(whole, tokenizer)
        trained = [at >= len(prompt) for at in range(len(whole))]
        found.append(Tokens(whole, trained, (without_end(completion, tokenizer),)))
    return found


def _tokenize(texts: list[str], tokenizer: Tokenizer, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, uncut."""
    if not texts:
        return []
    # `verbose=False`: a text over the model's limit is cut afterwards, no reason for a warning.
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return [_begun(list(ids), tokenizer) for ids in encoded["input_ids"]]


def _begun(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids with one beginning of sequence, where the tokenizer and the text itself both wrote one."""
    token = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if token is not None and ids[:2] == [token, token] else ids
