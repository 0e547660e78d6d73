"""Chats as tokens: what the model's own template makes of a conversation, and what of it the assistant says.

Knows no loss and no batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from autorank.errors import DataError
from autorank.tasks.sequence import Tokens, runs
from autorank.tasks.task import Tokenizer

__all__ = ["chat_tokens", "check_turns", "has_chat_template", "turn_ends"]

Turns = Sequence[Mapping[str, Any]]

# A template that prints today's date is given one that stays, so that a study has the same tokens on every
# day: that which Llama 3's own template falls back to. Templates are handed no functions from outside.
_DATE = {
    "%d": "26",
    "%m": "07",
    "%b": "Jul",
    "%B": "July",
    "%y": "24",
    "%Y": "2024",
    "%a": "Fri",
    "%A": "Friday",
}
_TODAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}', '{text}')" for code, text in _DATE.items())
    + " }}{%- endmacro -%}"
)
_SHORTEST = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_turns(turns: object, place: str) -> None:
    """Refuse what is no conversation; in what order its roles come is for reading and the template to say.

    Raises:
        DataError: it is no list of turns with a role and a text, or the assistant says nothing, or
            speaks first.
    """
    if not isinstance(turns, list) or not turns:
        found = "is missing" if turns is None else "is empty" if turns == [] else f"is {type(turns).__name__}"
        raise DataError(f"{place}: field 'messages' {found}; it must be a list of turns")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(f"{place}: field 'messages[{index}]' must be a turn, with role and content")
        spoken = turn.get("content")
        free = turn["role"] == "tool" or (spoken is None and turn.get("tool_calls"))
        if not free and not isinstance(spoken, str):
            raise DataError(f"{place}: field 'messages[{index}].content' must be text (a string)")
    if turns[0]["role"] == "assistant" or all(turn["role"] != "assistant" for turn in turns):
        raise DataError(
            f"{place}: field 'messages' must have an assistant turn, and another one before it; "
            "there is nothing to learn from it"
        )


def chat_tokens(turns: Turns, tokenizer: Tokenizer) -> Tokens:
    """Token ids of a conversation; those of the assistant's turns are trained: its words and what ends them.

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
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "this tokenizer does not tell which token is which part of a chat: save a fast tokenizer "
            "(tokenizer.json) beside the model"
        )
    own = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if _marks_turns(tokenizer):
        found = _render(turns, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, trained = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
        told = own if any(trained) else []
    else:
        text: str = _render(turns, tokenizer, tokenize=False)
        spans = {at: span for at in own if (span := _span(turns, at, text, tokenizer))}
        told = list(spans)
        # The template writes all special tokens itself.
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, trained = list(found["input_ids"]), _inside(found["offset_mapping"], list(spans.values()))
    # What is to be written, run by run: the words of the turn, or what is there where it has or is none.
    said = [tokenizer.decode(ids[start:end], skip_special_tokens=True) for start, end in runs(trained)]
    words = [turns[at].get("content") for at in told]
    if len(words) == len(said):
        said = [str(word or text) for word, text in zip(words, said, strict=True)]
    return Tokens(ids, trained, tuple(said), len(own) - len(told))


def turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that ends the assistant's turns by the template, where it has one of its own for that."""
    try:
        told = chat_tokens(_SHORTEST, tokenizer)
    except DataError:  # the template wants more of a conversation
        return ()
    own = [token for token, trained in zip(told.ids, told.trained, strict=True) if trained]
    while own and not tokenizer.decode(own[-1:]).strip():  # many have a line's end behind it
        own.pop()
    return tuple(token for token in own[-1:] if token in tokenizer.added_tokens_decoder)


def _marks_turns(tokenizer: Tokenizer) -> bool:
    """Whether the template in use, of several that some tokenizers have, marks the assistant's words."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"the model's chat template cannot be used: {error}") from None
    return bool(_MARKS_TURNS.search(template))


def _span(turns: Turns, at: int, text: str, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Where a turn of the assistant stands in the whole text; None where it cannot be told."""
    before: str = _render(turns[:at], tokenizer, tokenize=False, add_generation_prompt=True)
    through: str = _render(turns[: at + 1], tokenizer, tokenize=False)
    told = through.startswith(before) and text.startswith(through) and before != through
    return (len(before), len(through)) if told else None


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Of each token, whether a character of it is in a span; both are in the order of the text."""
    found, waiting = list[bool](), list(reversed(spans))
    for start, end in offsets:
        while waiting and waiting[-1][1] <= start:
            waiting.pop()
        found.append(bool(waiting) and end > waiting[-1][0])
    return found


def _render(turns: Turns, tokenizer: Tokenizer, **how: Any) -> Any:
    from jinja2 import TemplateError

    try:
        template: str = tokenizer.get_chat_template()
        if "strftime_now" in template:
            how["chat_template"] = _TODAY + template
        return tokenizer.apply_chat_template([dict(turn) for turn in turns], **how)
    except (TemplateError, TypeError, ValueError) as error:
        opening = str(turns[0].get("content"))[:40]
        raise DataError(
            f"the model's chat template refuses the conversation that begins {opening!r}: {error}; change "
            "the row, or the template"
        ) from None
