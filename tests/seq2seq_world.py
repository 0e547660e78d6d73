"""Encoder-decoders made from scratch, and sequences to turn into others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import seeded, write_jsonl

LETTERS = tuple("abcdefgh")
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 48,
}
# Marian's decoder starts with the pad token, BART's with the end of sequence.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", {**BART, "decoder_start_token_id": 1, "bos_token_id": None}),
    "marian": (
        "MarianMTModel",
        {**BART, "decoder_start_token_id": 0, "decoder_vocab_size": 11, "forced_eos_token_id": None},
    ),
}


def save_seq2seq(folder: Path, kind: str = "t5", scale: float = 1.0, **values: Any) -> Path:
    """A random encoder-decoder of that kind over the letters; its tokenizer closes a text by itself.

    Args:
        folder: where to.
        kind: of `KINDS`.
        scale: of the attention's weights and those behind it.
        values: what else the configuration says.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    name, defaults = KINDS[kind]
    model = getattr(transformers, name)
    with seeded(0):
        built = model(
            model.config_class(
                vocab_size=len(words), pad_token_id=0, eos_token_id=1, **{**defaults, **values}
            )
        )
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if parameter.ndim == 2 and ("block" in key or "layers" in key):
                parameter.mul_(scale)
    built.save_pretrained(folder)
    return folder


def write_reversals(
    folder: Path,
    *,
    rows: int = 96,
    shortest: int = 1,
    longest: int = 5,
    columns: tuple[str, str] = ("source", "target"),
) -> Path:
    """A JSONL folder of letters and the same letters from behind: so many rows, and a third each to check."""
    stream, seen = random.Random(0), set[str]()
    for split, count in (("train", rows), ("validation", rows // 3), ("test", rows // 3)):
        found = []
        while len(found) < count:
            letters = stream.choices(LETTERS, k=stream.randint(shortest, longest))
            if " ".join(letters) not in seen:
                seen.add(" ".join(letters))
                found.append(dict(zip(columns, (" ".join(letters), " ".join(letters[::-1])), strict=True)))
        write_jsonl(folder / f"{split}.jsonl", found)
    return folder
