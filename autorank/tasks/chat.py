"""Chats as tokens: what the model's own template makes of a conversation, and what of it the assistant says.

Knows no loss and no batch. The turns were checked where the data were read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from autorank.errors import DataError
from autorank.tasks.task import Tokenizer

__all__ = ["chat_tokens", "has_chat_template"]

Turns = Sequence[Mapping[str, Any]]

_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_tokens(turns: Turns, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are the assistant's: its words and what ends a turn.

    A template that marks the assistant's words (`{% generation %}`) is believed. Of any other, a turn
    is what the conversation up to its end has more than the one up to its start with the header of an
    answer. A turn that the template writes otherwise once others follow, without its reasoning for
    example, is not trained: in use the model never writes it so.

    Raises:
        DataError: there is no template, it refuses the conversation, or the tokenizer tells no offsets.
    """
    if not has_chat_template(tokenizer):
        raise DataError(
            "rows with messages need a chat template, and this tokenizer has none: set chat_template in its "
            "tokenizer_config.json, give a model that was trained on chats, or give prompt and completion"
        )
    if _MARKS_TURNS.search(str(tokenizer.chat_template)):
        found = _render(turns, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    text: str = _render(turns, tokenizer, tokenize=False)
    spans = [span for at, turn in enumerate(turns) if (span := _span(turns, at, turn, text, tokenizer))]
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "this tokenizer does not tell which token is which part of a chat: save a fast tokenizer "
            "(tokenizer.json) beside the model"
        )
    # The template writes all special tokens itself.
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    own = [
        any(start < end and start < until and end > since for since, until in spans)
        for start, end in found["offset_mapping"]
    ]
    return list(found["input_ids"]), own


def _span(
    turns: Turns, at: int, turn: Mapping[str, Any], text: str, tokenizer: Tokenizer
) -> tuple[int, int] | None:
    """Where an assistant's turn stands in the whole text; None for others, and where it cannot be told."""
    if turn["role"] != "assistant":
        return None
    before: str = _render(turns[:at], tokenizer, tokenize=False, add_generation_prompt=True)
    through: str = _render(turns[: at + 1], tokenizer, tokenize=False)
    if not through.startswith(before) or not text.startswith(through):
        return None
    return len(before), len(through)


def _render(turns: Turns, tokenizer: Tokenizer, **how: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(turn) for turn in turns], **how)
    except TemplateError as error:
        opening = str(turns[0].get("content"))[:40] if turns else ""
        raise DataError(
            f"the model's chat template refuses the conversation that begins {opening!r}: {error}; change "
            "the row, or the template"
        ) from None
