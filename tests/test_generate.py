"""Text that a model writes: greedy, the same in a batch as alone, and as long as it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import seeded
from seq2seq_world import KINDS, save_seq2seq

from autorank.errors import ModelError
from autorank.generate import Writer, decoder_start
from autorank.model import Base, load_base

DECODERS = {
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        },
    ),
    # Learnt positions: those of the left padding must not count.
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 12, "initializer_range": 0.2},
    ),
}
# Weights at which what a model says depends on what it is told.
LOUD = {"bart": {"init_std": 0.1, "scale_embedding": True}, "marian": {"init_std": 0.2}}
PROMPTS = [[3, 4, 5, 6], [7], [8, 3, 10]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def make(kind: str) -> Base:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            save_seq2seq(folder, kind if kind in KINDS else "t5", **LOUD.get(kind, {}))
            if kind in DECODERS:
                name, values = DECODERS[kind]
                model = getattr(transformers, name)
                with seeded(0):
                    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
                    model(model.config_class(vocab_size=11, **ids, **values)).save_pretrained(folder)
            auto_class = "AutoModelForCausalLM" if kind in DECODERS else "AutoModelForSeq2SeqLM"
            made[kind] = load_base(str(folder), auto_class=auto_class, model_kwargs={}, device="cpu")
            speak(made[kind].model)
        return made[kind]

    return make


def speak(model: Any) -> None:
    """Make a random model say different things, all of them letters."""
    with torch.no_grad(), seeded(1):
        model.get_input_embeddings().weight.mul_(3)
        words = torch.randn(11, 32)
        words[:3] = words[3:].mean(0)  # a special token is never likelier than all letters
        model.get_output_embeddings().weight = torch.nn.Parameter(words, requires_grad=False)


def by_hand(base: Base, prompt: list[int], most: int) -> str:
    """The likeliest token, again and again, the whole text read anew each time."""
    start = decoder_start(base.model)
    ids = list(prompt) if start is None else [start]
    written: list[int] = []
    while len(written) < most:
        inputs = {"input_ids": ids} if start is None else {"input_ids": prompt, "decoder_input_ids": ids}
        with torch.inference_mode():
            logits = base.model(**{key: torch.tensor([value]) for key, value in inputs.items()}).logits
        written.append(int(logits[0, -1].argmax()))
        ids = [*ids, written[-1]]
        if written[-1] == base.tokenizer.eos_token_id:
            break
    text: str = base.tokenizer.decode(written, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("kind", [*KINDS, *DECODERS])
def test_a_batch_is_written_as_each_text_would_be_by_hand(bases: Callable[[str], Base], kind: str) -> None:
    base = bases(kind)
    expected = [by_hand(base, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert base.writer.write(PROMPTS, 6) == expected
    assert [base.writer.write([prompt], 6)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_text_ends_at_the_end_of_sequence(
    bases: Callable[[str], Base], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases(kind)
    words = [text.split() for text in base.writer.write(PROMPTS, 6)]
    assert all(len(text) > 2 for text in words)
    monkeypatch.setattr(
        type(base.tokenizer), "eos_token_id", base.tokenizer.convert_tokens_to_ids(words[0][1]), raising=False
    )
    cut = [text[: text.index(words[0][1])] if words[0][1] in text else text for text in words]
    assert [text.split() for text in base.writer.write(PROMPTS, 6)] == cut


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_text_ends_too_where_the_checkpoint_or_the_caller_says(
    bases: Callable[[str], Base], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases(kind)
    model: Any = base.model
    texts = base.writer.write(PROMPTS[:1], 6)
    end = base.tokenizer.convert_tokens_to_ids(texts[0].split()[2])
    cut = texts[0].split()[: texts[0].split().index(base.tokenizer.decode([end]).strip())]
    assert base.writer.write(PROMPTS[:1], 6, [end])[0].split() == cut
    monkeypatch.setattr(model, "generation_config", transformers.GenerationConfig(eos_token_id=[1, end]))
    assert base.writer.write(PROMPTS[:1], 6) == texts  # a word ends nothing, whatever a checkpoint says
    added = {**base.tokenizer.added_tokens_decoder, end: "a token of its own"}
    monkeypatch.setattr(type(base.tokenizer), "added_tokens_decoder", added)
    assert base.writer.write(PROMPTS[:1], 6)[0].split() == cut


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_no_text_is_longer_than_it_may_be(bases: Callable[[str], Base], kind: str) -> None:
    base = bases(kind)
    texts = base.writer.write(PROMPTS, 3)
    assert max(len(text.split()) for text in texts) == 3
    lengths = [len(text.split()) for text in base.writer.write(PROMPTS, 20)]
    # GPT-2 has 12 positions, of which the prompts take 4, 1 and 3: each has all that is left, as alone.
    assert lengths == ([8, 11, 9] if kind == "gpt2" else [20, 20, 20])
    short = Writer(base.model, base.tokenizer, 0, 5)
    lengths = [len(text.split()) for text in short.write(PROMPTS, 20)]
    assert lengths == ([1, 4, 2] if kind == "gpt2" else [5, 5, 5])


def test_a_long_prompt_in_the_batch_cuts_no_other_text(bases: Callable[[str], Base]) -> None:
    base = bases("gpt2")
    prompts = [[7], [3, 4, 5, 6, 7, 8, 9, 10], [8, 3, 10], [4] * 11]
    expected = [by_hand(base, prompt, 12 - len(prompt)) for prompt in prompts]
    assert base.writer.write(prompts, 20) == expected
    assert base.writer.write(prompts[::-1], 20) == expected[::-1]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_what_the_checkpoint_says_of_writing_is_left_aside_and_left_alone(
    bases: Callable[[str], Base], kind: str
) -> None:
    base = bases(kind)
    model: Any = base.model
    expected = base.writer.write(PROMPTS, 6)
    stored = transformers.GenerationConfig(
        do_sample=True, temperature=0.1, num_beams=3, repetition_penalty=5.0, max_length=4, min_length=9
    )
    before, model.generation_config = model.generation_config, stored
    try:
        facts = stored.to_dict()
        state = torch.get_rng_state()
        assert base.writer.write(PROMPTS, 6) == expected
        assert model.generation_config is stored and stored.to_dict() == facts
        assert torch.equal(torch.get_rng_state(), state)
        broken = Writer(model, base.tokenizer, 0, -9)
        with pytest.raises(ValueError):
            broken.write(PROMPTS, 6)
        assert model.generation_config is stored
    finally:
        model.generation_config = before
    assert model.config.use_cache is False


def read_by(base: Base, prompts: list[list[int]], most: int) -> list[list[list[int]]]:
    """The tokens that each pass of the decoder reads while the model writes."""
    read: list[list[list[int]]] = []
    hook = decoder_of(base).register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    try:
        base.writer.write(prompts, most)
    finally:
        hook.remove()
    return read


def decoder_of(base: Base) -> Any:
    inner: Any = base.model.base_model
    return inner.decoder if base.model.config.is_encoder_decoder else inner


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_keys_and_values_are_kept_while_it_writes_and_only_then(
    bases: Callable[[str], Base], kind: str
) -> None:
    base = bases(kind)
    first, *others = read_by(base, PROMPTS, 4)
    if kind == "llama":
        assert first == [[3, 4, 5, 6], [0, 0, 0, 7], [0, 8, 3, 10]]
    else:
        assert first == [[decoder_start(base.model)]] * 3
    assert [[len(row) for row in rows] for rows in others] == [[1, 1, 1]] * 3
    ids = torch.tensor(PROMPTS[:1])
    with torch.inference_mode():
        output = base.model(input_ids=ids, **({} if kind == "llama" else {"decoder_input_ids": ids}))
    assert not {"past_key_values", "cache"} & set(output.keys())


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_nothing_is_read_once_all_texts_have_ended(
    bases: Callable[[str], Base], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases(kind)
    words = base.tokenizer.convert_tokens_to_ids(base.writer.write(PROMPTS[:1], 6)[0].split())
    monkeypatch.setattr(type(base.tokenizer), "eos_token_id", words[2], raising=False)
    assert len(read_by(base, PROMPTS[:1], 6)) == words.index(words[2]) + 1


def test_a_model_that_cannot_write_is_refused(bases: Callable[[str], Base]) -> None:
    base = bases("llama")
    model: Any = base.model
    with pytest.raises(ModelError, match="LlamaModel cannot write text: choose a metric of tokens"):
        Writer(model.model, base.tokenizer, 0, 8).write(PROMPTS, 3)


def test_where_the_decoder_starts_is_what_the_model_says(
    bases: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [decoder_start(bases(kind).model) for kind in ("t5", "bart", "marian", "llama")] == [0, 1, 0, None]
    model: Any = bases("t5").model
    monkeypatch.delattr(model.config, "decoder_start_token_id")
    monkeypatch.setattr(model.generation_config, "decoder_start_token_id", 7)
    assert decoder_start(model) == 7
    monkeypatch.setattr(model.generation_config, "decoder_start_token_id", None)
    assert decoder_start(model) is None


def test_an_encoder_decoder_that_classifies_and_so_does_not_write_names_its_start_too() -> None:
    sizes = {"vocab_size": 12, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    for start in (0, None):
        config = transformers.T5Config(**sizes, decoder_start_token_id=start)
        assert decoder_start(transformers.T5ForSequenceClassification(config)) == start
