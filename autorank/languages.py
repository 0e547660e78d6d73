"""Languages: of translators whose tokenizer puts a text's language beside it, such as NLLB and mBART.

Which languages a study translates, and with which tokens the decoder then starts. One pair for all
rows; texts and their tokens are the tokenizer's and the task's business.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from autorank.errors import ModelError
from autorank.rows import listed

__all__ = ["Languages", "set_languages"]


@dataclass(frozen=True)
class Languages:
    """From which language a model translates into which, by the tokenizer's own codes.

    Attributes:
        source: None where the tokenizer needs none.
        target: of what is written.
        start: the target's token where the decoder is given it first, as mBART's of 2020 is.
        first: the target's token where every text begins with it, behind the model's own start.
    """

    source: str | None
    target: str
    start: int | None
    first: int | None

    def __str__(self) -> str:
        return f"{self.source} to {self.target}" if self.source else f"to {self.target}"


def set_languages(
    name: str, tokenizer: Any, model: Any, source: str | None, target: str | None
) -> Languages | None:
    """Set the tokenizer to these languages, or to those that it or the model names itself.

    Args:
        name: of the model, for messages.
        tokenizer: of the model.
        model: an encoder-decoder; its generation may be set to start with a language.
        source: the code of the language that is read; None for what the tokenizer says.
        target: the code of the language that is written; None for what tokenizer or model say.

    Returns:
        None where the tokenizer knows no languages.

    Raises:
        ModelError: the target is not told, the tokenizer does not know a language, or it has none.
    """
    if not hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        if source is not None or target is not None:
            raise ModelError(
                f"the tokenizer of {name} knows no languages: leave source_language and target_language out"
            )
        return None
    target = target or tokenizer.tgt_lang or _told_by(model, tokenizer)
    if target is None:
        raise ModelError(
            f"{name} writes in one of many languages and does not say which: say it with --set "
            f"target_language=CODE, and --set source_language=CODE unless it is {tokenizer.src_lang} "
            f"(codes are such as {listed(_codes(tokenizer)[:4])})"
        )
    for language in (source, target):
        if language is not None and _token(tokenizer, language) is None:
            close = difflib.get_close_matches(language, _codes(tokenizer), n=3, cutoff=0.4)
            raise ModelError(
                f"the tokenizer of {name} does not know the language {language!r}: do you mean "
                f"{listed(close or _codes(tokenizer)[:4])}?"
            )
    tokenizer.src_lang = source or tokenizer.src_lang
    tokenizer.tgt_lang = target
    token, around = _token(tokenizer, target), tokenizer(text_target="")["input_ids"]
    if token not in (around[0], around[-1]):
        raise ModelError(
            f"the tokenizer of {name}, a {type(tokenizer).__name__}, puts the language {target} neither "
            "before nor behind a text: give another model"
        )
    leads = token == around[0]
    return Languages(tokenizer.src_lang, target, None if leads else token, token if leads else None)


def _told_by(model: Any, tokenizer: Any) -> str | None:
    """The language that the model starts to write with by itself, if that is set."""
    named = {_token(tokenizer, code): code for code in _codes(tokenizer)}
    for key in ("forced_bos_token_id", "decoder_start_token_id"):
        for config in (model.generation_config, model.config):
            code = named.get(getattr(config, key, None))
            if code is not None:
                return code
    return None


def _codes(tokenizer: Any) -> list[str]:
    """The codes of all languages: its special tokens but for those that every tokenizer has."""
    common = {getattr(tokenizer, f"{kind}_token", None) for kind in _COMMON}
    return sorted(token.strip("_") for token in tokenizer.all_special_tokens if token not in common)


_COMMON = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def _token(tokenizer: Any, language: str) -> int | None:
    """The token of a language; some tokenizers write `__de__` for `de`."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return next((special[name] for name in (language, f"__{language}__") if name in special), None)
