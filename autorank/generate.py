"""Text that a model writes, for metrics that judge it: greedy, the same text every time.

Knows no task and no metric. What the checkpoint says of sampling or beams is left aside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from autorank.errors import ModelError
from autorank.languages import Languages

__all__ = ["Writer", "decoder_start"]


def decoder_start(model: PreTrainedModel, languages: Languages | None = None) -> int | None:
    """The token that the decoder of an encoder-decoder is given first; None where the model names none.

    Where it translates, `languages` may name another.
    """
    if not model.config.is_encoder_decoder:
        return None
    if languages is not None and languages.start is not None:
        return languages.start
    # A model with a head for classes does not generate, and has no such configuration.
    configs = (model.config, getattr(model, "generation_config", None))
    told = (_token(config, "decoder_start_token_id") for config in configs)
    return next((token for token in told if token is not None), None)


def _first(model: PreTrainedModel, languages: Languages | None) -> int | None:
    """The token that every text begins with: the target's language, or what the checkpoint forces."""
    if languages is not None:
        return languages.first
    return _token(model.generation_config, "forced_bos_token_id") if model.config.is_encoder_decoder else None


def _token(config: Any, key: str) -> int | None:
    token = getattr(config, key, None)
    return token if isinstance(token, int) else None


@dataclass(frozen=True)
class Writer:
    """Lets a model write.

    Attributes:
        model: with the adapter that is to write on it, in eval mode.
        tokenizer: makes text of what is written, and names its end.
        pad_token_id: fills up prompts that are shorter than others.
        limit: the most tokens that the model takes, of prompt and text together unless an encoder
            reads the prompt.
        languages: those that the model translates, if any.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    limit: int
    languages: Languages | None = None

    def write(self, prompts: Sequence[Sequence[int]], most: int, ends: Collection[int] = ()) -> list[str]:
        """What the model says to each prompt, without special tokens.

        A text ends where the tokenizer or the checkpoint says that one does, or at one of `ends`.
        A text is as long as it would be alone: of prompts in one batch the longest has room for the fewest
        tokens, and the others go on when it has none.

        Args:
            prompts: token ids, written to in one batch. They are filled up on the left for a
                decoder, which goes on from a prompt's end.
            most: tokens of a text.
            ends: further tokens that end a text.

        Raises:
            ModelError: the model cannot write.
        """
        model = self.model
        if not model.can_generate():
            raise ModelError(
                f"{type(model).__name__} cannot write text: choose a metric of tokens, such as --metric loss"
            )
        how = self.settings(ends)
        reads = bool(model.config.is_encoder_decoder)
        rooms = [min(most, self.limit if reads else self.limit - len(prompt)) for prompt in prompts]
        said = [list[int]() for _ in prompts]
        waiting, written = list(range(len(prompts))), 0
        while waiting:
            count = min(rooms[at] for at in waiting) - written
            found = self._go_on([[*prompts[at], *said[at]] for at in waiting], count, how)
            for at, ids in zip(waiting, found, strict=True):
                said[at] += ids
            written += count
            # Who has fewer tokens than were asked for has come to an end.
            waiting = [at for at in waiting if len(said[at]) == written < rooms[at]]
        texts: list[str] = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return texts

    def settings(self, ends: Collection[int] = ()) -> dict[str, Any]:
        """How it writes: what `GenerationConfig` of transformers is told, but for the length.

        The likeliest token at every place, with a cache of keys and values; see `write` for the ends.
        """
        told = {
            "pad_token_id": self.pad_token_id,
            "eos_token_id": sorted({*self._ends(), *ends}) or None,
            "decoder_start_token_id": decoder_start(self.model, self.languages),
            "forced_bos_token_id": _first(self.model, self.languages),
        }
        return {"do_sample": False, "num_beams": 1, "use_cache": True, **told}

    @torch.no_grad()
    def _go_on(self, prompts: Sequence[Sequence[int]], count: int, how: Mapping[str, Any]) -> list[list[int]]:
        """So many tokens that follow each prompt, or those in front of the first that ends a text."""
        model, device = self.model, self.model.device
        reads = bool(model.config.is_encoder_decoder)
        width = max(map(len, prompts))
        rows, mask = list[list[int]](), list[list[int]]()
        for prompt in prompts:
            pads, ones = [self.pad_token_id] * (width - len(prompt)), [1] * len(prompt)
            none = [0] * len(pads)
            rows.append([*prompt, *pads] if reads else [*pads, *prompt])
            mask.append([*ones, *none] if reads else [*none, *ones])
        start = 1 if reads else width
        with self._configured(GenerationConfig(max_new_tokens=count, **how)):
            generate: Any = model.generate
            found = generate(
                input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device)
            )
        ends = how["eos_token_id"] or ()
        return [list(takewhile(lambda token: token not in ends, ids)) for ids in found[:, start:].tolist()]

    @contextmanager
    def _configured(self, settings: GenerationConfig) -> Iterator[None]:
        """The model with these settings in the place of the checkpoint's."""
        stored = self.model.generation_config
        self.model.generation_config = settings
        try:
            yield
        finally:
            self.model.generation_config = stored

    def _ends(self) -> list[int]:
        """The tokenizer's end of sequence, and what else ends a text by the checkpoint.

        A word of the vocabulary is none: such a checkpoint was not told which tokenizer it has.
        """
        told = getattr(self.model.generation_config, "eos_token_id", None)
        told = [told] if isinstance(told, int) else told or []
        known, own = self.tokenizer.added_tokens_decoder, self.tokenizer.eos_token_id
        return [*([] if own is None else [int(own)]), *(token for token in told if token in known)]
